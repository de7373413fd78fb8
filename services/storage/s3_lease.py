"""The lease of a store in a bucket, as an object."""

from __future__ import annotations

import contextlib
import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from services.storage.lease import KEY, LEASE_S, LeaseState

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

    def is_held(self) -> bool:
        """Whether a living driver holds the lease, by the server's clock; nobody waits for a heartbeat."""
        with contextlib.suppress(FileNotFoundError), self.store._errors(KEY):
            answer = self.store._client.get_object(**self.store._at(KEY))
            now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
            silent_s = (now - answer["LastModified"]).total_seconds()
            return silent_s < LEASE_S and not LeaseState.parse(answer["Body"].read()).released
        return False

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
