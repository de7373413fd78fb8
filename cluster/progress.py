"""Progress and log lines from workers to the driver, through an actor; metrics for Ray's dashboard and Prometheus."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.metrics import Counter, Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from defuse_core.protocols import Progress, ProgressSum
from defuse_core.runs import versions

log = logging.getLogger("defuse")
UPDATE_EVERY_S = 0.25
POLL_EVERY_S = 0.25
FLUSH_S = 5.0
COUNTERS = {  # counters of work done, in Ray's metrics: defuse_NAME
    "images": "Training images perturbed",
    "decodings": "Codes decoded and classified",
    "failures": "Codes of Psi found",
    "shards_redone": "Shards made again, since they failed once or their worker was lost",
}
Update = tuple[str, int, int, str]  # the arguments of `Progress`


class ProgressActor:
    """The actor: the latest update of each activity, and the log lines since the last fetch."""

    def __init__(self, versions: dict[str, str]) -> None:
        """`versions` are the driver's."""
        self.versions, self.warned = versions, set[str]()
        self.updates: dict[str, Update] = {}
        self.lines: list[tuple[int, str]] = []
        self.begin()

    def begin(self) -> None:
        """Forget what earlier tasks have done: other tasks are about to start."""
        self.shared = ProgressSum(self._record)

    def update(self, task: int, update: Update) -> None:
        self.shared.update(task, *update)

    def _record(self, what: str, done: int = 0, total: int = 1, unit: str = "") -> None:
        self.updates[what] = (what, done, total, unit)

    def log(self, level: int, line: str) -> None:
        self.lines.append((level, line))

    def compare(self, node: str, versions: dict[str, str]) -> None:
        """Warn, once for each node and package, where a worker computes with another version than the driver."""
        for name, own in self.versions.items():
            there = versions.get(name)
            line = (
                f"{node} has {f'{name} {there}' if there else f'no {name}'}, and this process {own}: results can "
                "differ from those of either; install the same on every node, or `defuse submit` uploads Defuse"
            )
            if name != "platform" and there != own and line not in self.warned:
                self.warned.add(line)
                self.log(logging.WARNING, line)

    def flush(self) -> None:
        """Do nothing: calls are handled in order, so the reply means that all earlier calls of the caller arrived."""

    def fetch(self) -> tuple[list[Update], list[tuple[int, str]]]:
        """Return the updates and log lines since the last fetch."""
        updates, lines = list(self.updates.values()), self.lines
        self.updates, self.lines = {}, []
        return updates, lines


class ProgressListener:
    """The driver's end: starts the actor and shows what workers report. Losing the actor loses lines, never work."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        remote = ray.remote(ProgressActor).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here)
        self.actor: Any = remote.remote(versions())
        self.polled_at = 0.0

    def poll(self) -> bool:
        """Show what workers reported since the last call, at most a few times a second; True if there was anything."""
        if time.monotonic() - self.polled_at < POLL_EVERY_S:
            return False
        return self.flush()

    def flush(self) -> bool:
        """Show what has arrived, now; True if there was anything."""
        self.polled_at = time.monotonic()
        try:
            updates, lines = ray.get(self.actor.fetch.remote(), timeout=10)
        except RayError:
            return False
        for level, line in lines:
            log.log(level, line)
        for what, done, total, unit in updates:
            self.progress(what, done, total, unit)
        return bool(updates or lines)

    def begin(self) -> None:
        """Count what tasks report from 0 again: call it before tasks that share an activity are started.

        Returns once it is done, since the calls of other processes could overtake this one.
        """
        with contextlib.suppress(RayError):
            ray.get(self.actor.begin.remote(), timeout=FLUSH_S)

    def close(self) -> None:
        """Show the rest, and end the actor."""
        with contextlib.suppress(RayError):
            self.flush()
            ray.kill(self.actor)


class ProgressReporter:
    """A worker's `Progress`: sends updates to the actor, at most a few times a second for each activity."""

    def __init__(self, actor: Any, task: int) -> None:
        self.actor, self.task = actor, task
        self.sent_at: dict[str, float] = {}
        self.unsent: dict[str, Update] = {}

    def __call__(self, what: str, done: int = 0, total: int = 1, unit: str = "") -> None:
        self.unsent[what] = (what, done, total, unit)
        if done >= total or time.monotonic() - self.sent_at.get(what, 0.0) >= UPDATE_EVERY_S:
            self._send(what)

    def _send(self, what: str) -> None:
        self.sent_at[what] = time.monotonic()
        self.actor.update.remote(self.task, self.unsent.pop(what))

    def flush(self) -> None:
        """Send the updates that came too soon: of tasks that share a total, none reaches it alone."""
        for what in list(self.unsent):
            self._send(what)


class _ActorLogHandler(logging.Handler):
    def __init__(self, actor: Any) -> None:
        super().__init__(logging.DEBUG)
        self.actor = actor

    def emit(self, record: logging.LogRecord) -> None:
        self.actor.log.remote(record.levelno, record.getMessage())


@functools.cache
def _versions_here() -> dict[str, str]:
    """Return this worker's versions: to read them takes milliseconds, and it reports on each shard."""
    return versions()


@contextlib.contextmanager
def reporting(actor: Any, task: int = 0) -> Iterator[ProgressReporter]:
    """In a worker: send its versions and Defuse's log lines to the actor, and yield the reporter of progress.

    `task` is the number of this task among those of the same function that were started together.
    """
    handler, level = _ActorLogHandler(actor), log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    reporter = ProgressReporter(actor, task)
    try:
        actor.compare.remote(str(ray.util.get_node_ip_address()), _versions_here())  # type: ignore[no-untyped-call]
        yield reporter
    finally:
        reporter.flush()
        log.removeHandler(handler)
        log.setLevel(level)
        with contextlib.suppress(RayError):
            ray.get(actor.flush.remote(), timeout=FLUSH_S)


def add_to_counter(name: str, amount: int) -> None:
    """Add to one of COUNTERS, in the process that did the work."""
    if amount:  # Ray raises for an increment of 0
        _counter(name).inc(amount)


@functools.cache
def _counter(name: str) -> Counter:
    return Counter(f"defuse_{name}", description=COUNTERS[name])


@functools.cache
def running_trials() -> Gauge:
    """Return the gauge of the trials that run now. Called in the driver."""
    return Gauge("defuse_trials_running", description="Trials of the sweep over lambda that are running")
