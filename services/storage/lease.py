"""A lock in a place without locks: an object that says who holds it, kept fresh by a heartbeat.

Nobody's clock is trusted. A holder that has died is told from a living one by watching: a living one rewrites
its lease every BEAT_S. Whoever sees no change for LEASE_S may take it over, if it is then still the same.
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
from typing import Protocol

from defuse_core.errors import RunBusyError, StoreError

log = logging.getLogger("defuse")
BEAT_S = 5.0
LEASE_S = 30.0
SETTLE_S = 1.0
KEY = ".lease.json"


class Slot(Protocol):
    """The one object that the lease is, with writes on condition."""

    @property
    def address(self) -> str: ...

    def look(self) -> tuple[str, bytes] | None:
        """Return version and content, or None where there is no lease."""

    def put(self, data: bytes, version: str | None) -> str | None:
        """Write if the version is `version` (None: absent). Return the new one, or None if it is not."""

    def is_conditional(self, data: bytes) -> bool:
        """Whether the server heeds the condition of a write. `data` is what the lease holds now."""

    def clear(self) -> None:
        """Remove it."""


class Lease:
    """A lease that this process holds."""

    def __init__(self, slot: Slot, holder: str) -> None:
        self.slot, self.holder = slot, holder
        self.version: str | None = None
        self.lost = False
        self.beats, self.kept = 0, time.time()
        self.beating = threading.Lock()
        self.ended = threading.Event()

    def check(self) -> None:
        """Raise RunBusyError if another driver has taken the run over."""
        if time.time() - self.kept > LEASE_S / 2:  # this process was paused
            self.beat()
        if self.lost:
            raise RunBusyError(
                f"{self.slot.address}: this driver was silent for over {LEASE_S:.0f} s and another one took "
                "the run over; see `defuse status`, and run again when it has ended"
            )

    def take(self) -> None:
        """Write the lease. Raises RunBusyError if a living driver holds it."""
        self.version = self._put(self._content(0), None)
        if self.version is None:
            self.version = self._put(self._content(0), self._wait_for_the_dead())
        if self.version is not None and not self.slot.is_conditional(self._content(0)):
            self._settle()
        if self.version is None:
            raise RunBusyError(f"{self.slot.address}: another driver has just begun to write this run")

    def keep(self) -> None:
        """Rewrite the lease until it ends or is lost. A store that fails for a while is tried again."""
        while not self.lost and not self.ended.wait(BEAT_S):
            self.beat()

    def beat(self) -> None:
        """Rewrite the lease once, and find out whether it is still this driver's."""
        with self.beating, contextlib.suppress(StoreError):
            self.beats += 1
            version = None if self.lost else self._put(self._content(self.beats), self.version)
            self.lost = version is None
            self.version, self.kept = version or self.version, time.time()

    def release(self) -> None:
        """Remove the lease, if it is still this driver's."""
        with contextlib.suppress(StoreError, FileNotFoundError):
            seen = self.slot.look()
            if seen is not None and seen[0] == self.version:
                self.slot.clear()

    def _put(self, content: bytes, version: str | None) -> str | None:
        """Write on condition. A refusal may be the echo of a write that went through and was sent twice."""
        written = self.slot.put(content, version)
        if written is None and (seen := self.slot.look()) is not None and seen[1] == content:
            return seen[0]
        return written

    def _settle(self) -> None:
        """Without conditional writes two drivers may both have written: the last one has it."""
        log.warning(
            "%s: this server ignores conditions on writes; waiting %.0f s in case another driver began too",
            self.slot.address,
            SETTLE_S,
        )
        time.sleep(SETTLE_S)
        seen = self.slot.look()
        self.version = seen[0] if seen is not None and seen[1] == self._content(0) else None

    def _content(self, beats: int) -> bytes:
        return json.dumps({"holder": self.holder, "beats": beats}).encode()

    def _wait_for_the_dead(self) -> str | None:
        """Return the version of a lease whose holder is dead, None if it was removed. Raises RunBusyError."""
        first, begun = self.slot.look(), time.monotonic()
        if first is None:
            return None
        holder = _holder(first[1])
        log.info("%s: held by %s; waiting %.0f s to see whether it lives", self.slot.address, holder, LEASE_S)
        while time.monotonic() - begun < LEASE_S:
            time.sleep(min(1.0, BEAT_S / 2))
            seen = self.slot.look()
            if seen is None:
                return None
            if seen[0] != first[0]:
                raise RunBusyError(
                    f"{self.slot.address}: {_holder(seen[1])} writes this run; stop it, or wait for its end"
                )
        return first[0]


def _holder(content: bytes) -> str:
    try:
        return str(json.loads(content)["holder"])
    except (ValueError, KeyError, TypeError):
        return "another driver"


@contextlib.contextmanager
def hold(slot: Slot) -> Iterator[Lease]:
    """Hold the lease inside the block. Raises RunBusyError, naming the holder, if another driver has it."""
    lease = Lease(slot, f"process {os.getpid()} on {platform.node()} ({secrets.token_hex(3)})")
    lease.take()
    keeper = threading.Thread(target=lease.keep, name="defuse-lease", daemon=True)
    keeper.start()
    try:
        yield lease
    finally:
        lease.ended.set()
        keeper.join()
        lease.release()
