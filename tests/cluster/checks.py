"""What tests of the cluster look at: log lines, and whether two runs found the same."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from defuse_core.artifacts import Psi, Shard, Sweep
from defuse_core.codec import decode
from defuse_core.identify import shard_key
from defuse_core.store import Store
from tests.waiting import WAIT_S, wait_until


class Lines(logging.Handler):
    """Keeps Defuse's log lines."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def processes(self, beginning: str) -> list[int]:
        """Return the processes told of in lines that begin so, in order."""
        found = (re.search(r"process (\d+) on", line) for line in self.lines if line.startswith(beginning))
        return [int(match[1]) for match in found if match]


def assert_same_psi(count: int, one: Store, other: Store) -> None:
    """Every shard holds the same codes in the same order, bit for bit."""
    for index in range(count):
        a, b = (decode(Shard, store.read(shard_key(index)), "").failures for store in (one, other))
        for field in ("codes", "source", "truth", "predicted"):
            assert np.array_equal(getattr(a, field), getattr(b, field)), (index, field)


def assert_equal_psi(psi: Psi, other: Psi) -> None:
    assert np.array_equal(psi.codes, other.codes)
    untimed, other_untimed = (vars(replace(p, worker_seconds=0.0)) | {"codes": 0} for p in (psi, other))
    assert untimed == other_untimed


def assert_equal_sweeps(sweep: Sweep, other: Sweep) -> None:
    assert (sweep.rows, sweep.chosen, sweep.failed) == (other.rows, other.chosen, other.failed)
    assert all(np.array_equal(sweep.weights[key], other.weights[key]) for key in other.weights)


def noted(folder: Path) -> set[str]:
    """Return what processes noted in `folder`, such as their working directories (fakes.note_working_dir)."""
    return {path.read_text() for path in folder.iterdir()}


def wait_for_the_end_of(processes: set[int]) -> None:
    """Return once the processes of workers have ended. Ray gives an idle one back to its pool."""

    def working() -> list[int]:
        return [process for process in processes if b"ray::IDLE" not in title_of(process)]

    wait_until(lambda: not working(), lambda: f"the processes {working()} go on")


def title_of(process: int) -> bytes:
    """Return what `ps` shows of a process; of one that is gone, what it shows of an idle worker."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes() or b"ray::IDLE"
    except OSError:
        return b"ray::IDLE"


def kill_soon(
    lines: Lines, beginning: str, when: Callable[[], bool], then: Callable[[], None] = lambda: None
) -> threading.Thread:
    """Kill the newest process told of in lines that begin so, once `when`, and call `then`."""

    def wait_and_kill() -> None:
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            processes = lines.processes(beginning)
            if processes and when():
                os.kill(processes[-1], signal.SIGKILL)
                then()
                return
            time.sleep(0.02)

    thread = threading.Thread(target=wait_and_kill)
    thread.start()
    return thread
