"""Waiting for what other processes and threads do."""

from __future__ import annotations

import time
from collections.abc import Callable

WAIT_S = 120.0  # ends what hangs; on a busy machine a start alone takes a good part of it


def wait_until(
    condition: Callable[[], object],
    found: Callable[[], object] = lambda: "the condition did not come true",
    within_s: float = WAIT_S,
    every_s: float = 0.05,  # longer for a condition that is expensive to check
) -> None:
    """Return once `condition` holds. Raises AssertionError with what `found` returns if it does not in time."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, f"after {within_s:g} s: {found()}"
        time.sleep(every_s)
