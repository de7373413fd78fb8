"""Progress and log lines on their way from workers to the driver, through an actor between them."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from defuse_core.progress import Progress

log = logging.getLogger("defuse")
TELL_EVERY_S = 0.25
PASS_EVERY_S = 0.25
FLUSH_S = 5.0
Told = tuple[str, int, int, str]


class Mailbox:
    """The actor: the last word on each thing under way, and the log lines since they were last fetched."""

    def __init__(self) -> None:
        self.told: dict[str, Told] = {}
        self.lines: list[tuple[int, str]] = []

    def tell(self, told: Told | None) -> None:
        """Take note of how far something is. None tells nothing, and its answer that all before it has come."""
        if told is not None:
            self.told[told[0]] = told

    def say(self, level: int, line: str) -> None:
        """Take a log line."""
        self.lines.append((level, line))

    def fetch(self) -> tuple[list[Told], list[tuple[int, str]]]:
        """Return what came since the last fetch."""
        told, lines = list(self.told.values()), self.lines
        self.told, self.lines = {}, []
        return told, lines


class Relay:
    """The driver's end. Losing the mailbox loses lines, never work."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        remote = ray.remote(Mailbox).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here)
        self.mailbox: Any = remote.remote()
        self.passed_at = 0.0

    def pass_on(self) -> bool:
        """Show and log what workers told since the last call, a few times a second; True if there was any."""
        if time.monotonic() - self.passed_at < PASS_EVERY_S:
            return False
        return self.flush()

    def flush(self) -> bool:
        """Show and log now what has come."""
        self.passed_at = time.monotonic()
        try:
            told, lines = ray.get(self.mailbox.fetch.remote(), timeout=10)
        except RayError:
            return False
        for level, line in lines:
            log.log(level, line)
        for what, done, total, unit in told:
            self.progress(what, done, total, unit)
        return bool(told or lines)

    def close(self) -> None:
        """Pass on what is left, and end the mailbox."""
        with contextlib.suppress(RayError):
            self.flush()
            ray.kill(self.mailbox)


class Teller:
    """A worker's `Progress`: tells the mailbox, but not more often than anybody could read."""

    def __init__(self, mailbox: Any) -> None:
        self.mailbox = mailbox
        self.last: dict[str, float] = {}

    def __call__(self, what: str, done: int, total: int, unit: str) -> None:
        """Tell that `done` of `total` units of `what` are done."""
        now = time.monotonic()
        if done >= total or now - self.last.get(what, 0.0) >= TELL_EVERY_S:
            self.last[what] = now
            self.mailbox.tell.remote((what, done, total, unit))


class _Lines(logging.Handler):
    def __init__(self, mailbox: Any) -> None:
        super().__init__(logging.DEBUG)
        self.mailbox = mailbox

    def emit(self, record: logging.LogRecord) -> None:
        self.mailbox.say.remote(record.levelno, record.getMessage())


@contextlib.contextmanager
def relayed(mailbox: Any) -> Iterator[Teller]:
    """In a worker: send Defuse's log lines to the mailbox, and yield the progress to tell."""
    handler, level = _Lines(mailbox), log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        yield Teller(mailbox)
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        with contextlib.suppress(RayError):
            ray.get(mailbox.tell.remote(None), timeout=FLUSH_S)


@dataclass(frozen=True)
class Place:
    """Where a worker runs."""

    node: str  # its address
    pid: int
    gpus: tuple[str, ...]  # ids granted by Ray
    visible: str  # CUDA_VISIBLE_DEVICES of its process

    def __str__(self) -> str:
        device = f"GPU {', '.join(self.gpus)} (CUDA_VISIBLE_DEVICES={self.visible})" if self.gpus else "CPU"
        return f"process {self.pid} on {self.node}, {device}"


def this_place(what: str) -> Place:
    """Return where this process runs, and say loudly if it holds a GPU that torch cannot use."""
    import torch

    gpus = tuple(str(gpu) for gpu in ray.get_gpu_ids())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    node = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    place = Place(node, os.getpid(), gpus, visible)
    if gpus and not torch.cuda.is_available():
        log.warning(
            "%s: %s was granted, but torch %s cannot use it: working on the CPU. Install a torch for its GPU "
            "and driver on %s, or set resources.gpus_per_worker=0",
            what,
            f"GPU {', '.join(gpus)}",
            torch.__version__,
            place.node,
        )
    return place
