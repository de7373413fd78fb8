"""The lease of a store in a bucket, as an object."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from services.storage.lease import KEY

if TYPE_CHECKING:
    from services.storage.s3 import S3Store

READ_AGAIN_S = 0.1


class LeaseInBucket:
    """The protocol `LeaseObject`."""

    def __init__(self, store: S3Store) -> None:
        self.store = store
        self.address = store.address

    def read(self) -> tuple[str, bytes] | None:
        """Read twice before returning None: some servers replace an object in two steps."""
        seen = self._read()
        if seen is None:
            time.sleep(READ_AGAIN_S)
            seen = self._read()
        return seen

    def _read(self) -> tuple[str, bytes] | None:
        with contextlib.suppress(FileNotFoundError):
            return self.store._fetch(KEY)
        return None

    def write_if(self, data: bytes, version: str | None) -> str | None:
        seen = self.read()
        if (seen and seen[0]) != version:  # all that a server without conditional writes can do
            return None
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        return self.store._put_if(KEY, data, **condition)

    def delete_if(self, version: str) -> None:
        self.store._delete_if(KEY, version)

    def is_conditional(self, data: bytes) -> bool:
        conditions = ({"IfNoneMatch": "*"}, {"IfMatch": '"of no object"'})  # neither holds
        return all(self.store._put_if(KEY, data, **condition) is None for condition in conditions)
