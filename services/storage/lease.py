"""A lock in a store without locks: an object that names its holder, kept fresh by a heartbeat.

No clock is trusted. Others tell a living holder from a dead one by watching: a living one rewrites its lease every
BEAT_S. Whoever sees no change for LEASE_S may take the lease over, if it has still not changed by then. Each taking has
a token of its own: a write for the holder of another token is refused (a fence), whatever that holder believes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from defuse_core.errors import RunBusyError, StoreError
from defuse_core.formatting import one_line, without_credentials

if TYPE_CHECKING:
    from services.storage.s3 import S3Store

log = logging.getLogger("defuse")
BEAT_S = 5.0
LEASE_S = 30.0
SETTLE_S = 1.0
WRITE_ATTEMPTS = 3
READ_AGAIN_S = 0.1
KEY = ".lease.json"


@dataclass(frozen=True)
class LeaseState:
    """The content of the lease object."""

    holder: str  # for people
    token: str = ""  # of one taking of the lease; empty where the object cannot be read
    generation: int = 0  # grows with every taking, so that the order is known
    beats: int = 0
    # its holder ended; the object stays until the run is deleted, so that `generation` goes on
    released: bool = False

    @classmethod
    def parse(cls, content: bytes) -> LeaseState:
        """Return the state in `content`; one of an unknown holder where it cannot be read."""
        try:
            return cls(**json.loads(content))
        except (ValueError, TypeError):
            return cls("another driver")

    def dump(self) -> bytes:
        return json.dumps(asdict(self)).encode()


class LeaseObject:
    """The object in a bucket that holds a lease, with conditional writes."""

    def __init__(self, store: S3Store) -> None:
        self.store = store
        self.address = store.address

    def read(self) -> tuple[str, bytes] | None:
        """Return version and content, or None where there is no lease.

        It reads twice before it returns None: some servers replace an object in two steps.
        """
        with contextlib.suppress(FileNotFoundError):
            return self.store.read_with_version(KEY)
        time.sleep(READ_AGAIN_S)
        with contextlib.suppress(FileNotFoundError):
            return self.store.read_with_version(KEY)
        return None

    def require(self, own: LeaseState) -> None:
        """Raise RunBusyError where the lease is not the one that was taken as `own`."""
        seen = self.read()
        state = LeaseState("nobody", released=True) if seen is None else LeaseState.parse(seen[1])
        if state.token != own.token or state.released:
            holder = "nobody" if state.released else state.holder
            raise RunBusyError(
                f"{self.address}: {own.holder} held this run; {holder} holds it now; see `defuse status`"
            )

    def is_held(self) -> bool:
        """Whether a living driver holds the lease, by the server's clock; nobody waits for a heartbeat."""
        with contextlib.suppress(FileNotFoundError):
            return self.store.age_s(KEY) < LEASE_S and not LeaseState.parse(self.store.read(KEY)).released
        return False

    def write_if(self, data: bytes, version: str | None) -> str | None:
        """Write if the version is `version` (None: absent). Return the new version, or None if it is not."""
        seen = self.read()
        if (seen and seen[0]) != version:  # all that a server without conditional writes can do
            return None
        return self.store.write_if(KEY, data, version)

    def delete_if(self, version: str) -> None:
        """Delete if the version is `version`, as far as the server honours that condition."""
        self.store.delete_if(KEY, version)

    def is_conditional(self, data: bytes) -> bool:
        """Whether the server honours the condition of a write. `data` is what the lease holds now."""
        others = (None, '"of no object"')  # versions that it does not have
        return all(self.store.write_if(KEY, data, version) is None for version in others)


class Lease:
    """A lease that this process holds."""

    def __init__(self, stored: LeaseObject, holder: str) -> None:
        self.object = stored
        self.state = LeaseState(holder, secrets.token_hex(8))
        self.version: str | None = None
        self.lost = False
        self.remove = False  # whether `release` deletes the object, as the run was deleted
        self.ended = threading.Event()

    def require(self) -> None:
        """Raise RunBusyError once a heartbeat has found that another driver took the run over."""
        if self.lost:
            raise RunBusyError(
                f"{self.object.address}: this driver was silent for over {LEASE_S:.0f} s and another one took "
                "the run over; see `defuse status`, and run again when it has ended"
            )

    def take(self) -> None:
        """Write the lease. Raises RunBusyError if a living driver holds it."""
        self.version = self._write(None)
        if self.version is None:
            self._take_over()
        if self.version is not None and not self.object.is_conditional(self.state.dump()):
            self._settle()
        if self.version is None:
            raise RunBusyError(f"{self.object.address}: another driver has just begun to write this run")

    def keep(self) -> None:
        """Rewrite the lease until it ends or is lost. After an error of any kind, logged once, it tries again."""
        failed = False
        while not self.lost and not self.ended.wait(BEAT_S):
            try:
                self.beat()
                failed = False
            except Exception as error:
                if not failed:
                    reason = one_line(without_credentials(str(error)) or type(error).__name__)
                    log.warning(
                        "%s: the lease was not renewed, trying again: %s", self.object.address, reason
                    )
                failed = True

    def beat(self) -> None:
        """Rewrite the lease once, and find out whether this driver still holds it."""
        self.state = replace(self.state, beats=self.state.beats + 1)
        version = self._write(self.version)
        self.lost = version is None
        self.version = version or self.version

    def release(self) -> None:
        """Mark the lease as released, or remove it with its run, if this driver still holds it."""
        with contextlib.suppress(StoreError):
            if self.remove:
                self._remove()
                return
            self.state = replace(self.state, released=True)
            self._write(self.version)

    def _write(self, version: str | None) -> str | None:
        """Write on condition; None where another driver's lease is in place.

        A refusal may follow a write of this driver that took effect although its answer was lost: the token shows it.
        """
        for _ in range(WRITE_ATTEMPTS):
            written = self.object.write_if(self.state.dump(), version)
            if written is not None:
                return written
            seen = self.object.read()
            if seen is None or not self._is_own(seen[1]):
                return None
            version = seen[0]
            if seen[1] == self.state.dump():
                return version
        return None

    def _remove(self) -> None:
        seen = self.object.read()
        if seen is not None and self._is_own(seen[1]):
            self.object.delete_if(seen[0])

    def _is_own(self, content: bytes) -> bool:
        """Whether the object holds this driver's lease, which its token shows."""
        return LeaseState.parse(content).token == self.state.token

    def _take_over(self) -> None:
        """Take a lease that was released, or whose holder is dead. Raises RunBusyError if its holder lives."""
        seen = self.object.read()
        if seen is not None and not LeaseState.parse(seen[1]).released:
            seen = self._watch(*seen)
        if seen is not None:
            self.state = replace(self.state, generation=LeaseState.parse(seen[1]).generation + 1)
        self.version = self._write(seen and seen[0])

    def _watch(self, version: str, content: bytes) -> tuple[str, bytes] | None:
        """Return the lease once it is free: unchanged for LEASE_S, released, or None where it was removed.

        Raises RunBusyError if its holder lives.
        """
        begun, holder = time.monotonic(), LeaseState.parse(content).holder
        log.info("%s: held by %s; waiting %.0f s for its heartbeat", self.object.address, holder, LEASE_S)
        while time.monotonic() - begun < LEASE_S:
            time.sleep(min(1.0, BEAT_S / 2))
            seen = self.object.read()
            if seen is None or LeaseState.parse(seen[1]).released:
                return seen
            if seen[0] != version:
                holder = LeaseState.parse(seen[1]).holder
                raise RunBusyError(
                    f"{self.object.address}: {holder} writes this run; stop it, or wait for its end"
                )
        return version, content

    def _settle(self) -> None:
        """Without conditional writes two drivers may both have written: the last one has the lease."""
        log.warning(
            "%s: this server ignores conditions on writes; waiting %.0f s in case another driver began too",
            self.object.address,
            SETTLE_S,
        )
        time.sleep(SETTLE_S)
        seen = self.object.read()
        self.version = seen[0] if seen is not None and self._is_own(seen[1]) else None


@contextlib.contextmanager
def hold(stored: LeaseObject, beating: LeaseObject) -> Iterator[Lease]:
    """Hold the lease inside the block. Raises RunBusyError, naming the holder, if another driver has it.

    `beating` is the same object for the heartbeat; it waits for no answer as long as LEASE_S. Whoever stops the command
    does not wait longer either: a lease that is not released is free after LEASE_S.
    """
    lease = Lease(stored, f"process {os.getpid()} on {platform.node()}")
    lease.take()
    lease.object = beating
    keeper = threading.Thread(target=lease.keep, name="defuse-lease", daemon=True)
    keeper.start()
    releasing = stored  # which tries longer
    try:
        yield lease
    except KeyboardInterrupt:
        releasing = beating
        raise
    finally:
        lease.ended.set()
        keeper.join()
        lease.object = releasing
        lease.release()
