"""What tests of the cluster look at: log lines, and whether two runs found the same."""

from __future__ import annotations

import logging
import re

import numpy as np

from defuse_core.artifacts import Shard
from defuse_core.codec import decode
from defuse_core.identify import shard_key
from defuse_core.store import Store


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
