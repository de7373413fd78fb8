"""`defuse run --profile STEP`: traces of torch's operations, to be opened in chrome://tracing or Perfetto."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import logging
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity

from defuse_core.device import release_memory
from defuse_core.progress import Progress, silent
from defuse_core.store import Store

log = logging.getLogger("defuse")
T = TypeVar("T")
# Of progress, one per training step, after which a trace ends: a longer one opens in no viewer.
MAX_REPORTS = 30


@dataclass(frozen=True)
class Profile:
    """Which step is traced, and where the traces are stored. Picklable, as workers need it."""

    step: str | None = None  # None traces nothing
    store: Store | None = None  # of the run

    def call(
        self, step: str, function: Callable[..., T], *args: object, progress: Progress, task: int = 0
    ) -> T:
        """Return function(*args, progress=...), traced where `step` is the one to trace.

        `task` is the number of the call among those of the same function that run together. The memory that the call
        freed is returned to the system: a worker may wait long for its next task, and a notebook is not the run alone.
        """
        try:
            with self.trace(step, function.__name__, progress, task) as reporting:
                return function(*args, progress=reporting)
        finally:
            release_memory()

    @contextlib.contextmanager
    def trace(self, step: str, name: str, progress: Progress, task: int = 0) -> Iterator[Progress]:
        """Trace the block if `step` is the one to trace, at most until MAX_REPORTS reports of progress."""
        if step != self.step or self.store is None:
            yield progress
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        tracer = _Tracer(torch.profiler.profile(activities=activities), progress)
        try:
            yield tracer
        finally:
            tracer.stop()
            self._save(tracer.profiler, self.store, name, task + 1)

    def first(self, step: str, name: str, items: Iterator[T]) -> Iterator[T]:
        """Yield `items`; the making of the first one is traced where `step` is the one to trace."""
        with self.trace(step, name, silent):
            begun = list(itertools.islice(items, 1))
        yield from itertools.chain(begun, items)

    def _save(self, profiler: torch.profiler.profile, store: Store, name: str, number: int) -> None:
        """Store the trace under its name and, from 2 on, the first number that no trace has yet."""
        stem = f"profile/{self.step}-{re.sub(r'[^A-Za-z0-9.-]+', '-', name)}"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            data = gzip.compress(path.read_bytes())
        keys = (f"{stem}-{n}.json.gz" if n > 1 else f"{stem}.json.gz" for n in itertools.count(number))
        key = next(key for key in keys if store.create(key, data))
        log.info("profile: %s/%s", store.address, key)


UNTRACED = Profile()


class _Tracer:
    """A Progress that ends the trace after some reports."""

    def __init__(self, profiler: torch.profiler.profile, progress: Progress) -> None:
        self.profiler, self.progress = profiler, progress
        self.reports, self.running = 0, True
        profiler.start()

    def __call__(self, what: str, done: int, total: int, unit: str) -> None:
        self.reports += 1
        if self.reports >= MAX_REPORTS:
            self.stop()
        self.progress(what, done, total, unit)

    def stop(self) -> None:
        """End the trace, once."""
        if self.running:
            self.running = False
            self.profiler.stop()
