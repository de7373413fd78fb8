"""Stores and tasks that misbehave, importable by Ray's workers. Counts are kept in files, which workers share."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from cluster.identify import ShardWorker
from defuse_core.artifacts import I64, Models
from defuse_core.config import RunFile
from defuse_core.errors import RunBusyError, StoreError
from defuse_core.identify import Identifier
from defuse_core.local import Profile
from defuse_core.protocols import Progress, silent
from defuse_core.store import FolderStore, Store
from defuse_core.train import train_part
from defuse_core.training.batches import is_first_worker

Unless = Callable[[bytes], bool] | None


class Tally:
    """A count that all processes of this machine share."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self) -> int:
        """Count one more, and return how many there are."""
        with self.path.open("a+") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            handle.write(".")
            handle.flush()
            return handle.tell()

    def __int__(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0


class DyingWorker(ShardWorker):
    """Its process ends whenever it starts."""

    def __init__(self, *given: object) -> None:
        os._exit(1)


class ImpatientStore(FolderStore):
    """Ends what goes on for ever."""

    def __init__(self, folder: Path, within_s: float) -> None:
        super().__init__(folder)
        self.end = time.monotonic() + within_s

    def require_lock(self) -> None:
        assert time.monotonic() < self.end, "it does not end"


class StumblingStore(FolderStore):
    """Fails every n-th write."""

    def __init__(self, folder: Path, every: int) -> None:
        super().__init__(folder)
        self.every = every
        self.tally = Tally(folder.with_name(folder.name + "-writes"))

    def write(self, key: str, data: bytes, unless: Unless = None) -> None:
        if self.tally.add() % self.every == 0:
            raise StoreError(f"{key}: the bucket is having a bad day")
        super().write(key, data, unless)


class OwnDiskStore(FolderStore):
    """A folder that every node has for itself: what a worker writes is not where the driver looks."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.driver = os.getpid()

    def write(self, key: str, data: bytes, unless: Unless = None) -> None:
        there = self.folder if os.getpid() == self.driver else self.folder.with_name("another-disk")
        FolderStore(there).write(key, data, unless)


class GatedStore(FolderStore):
    """Holds whoever writes, once there are `after` keys, until the gate opens, for four minutes at most."""

    def __init__(self, folder: Path, after: int = 0) -> None:
        super().__init__(folder)
        self.after = after
        self.gate = folder.with_name(folder.name + "-gate")

    def write(self, key: str, data: bytes, unless: Unless = None) -> None:
        super().write(key, data, unless)
        if len(self.list()) < self.after:
            return
        deadline = time.monotonic() + 240
        while not self.gate.exists() and time.monotonic() < deadline:
            time.sleep(0.05)

    def open(self) -> None:
        self.gate.touch()


class NotingStore(FolderStore):
    """Calls note(notes, progress=...) in each process that writes, such as note_working_dir below."""

    def __init__(self, folder: Path, note: Callable[..., None]) -> None:
        super().__init__(folder)
        self.note, self.notes = note, folder.with_name(folder.name + "-notes")

    def write(self, key: str, data: bytes, unless: Unless = None) -> None:
        super().write(key, data, unless)
        self.note(self.notes, progress=silent)


class RefusingStore(FolderStore):
    """Never takes keys that hold `part`; fails as a bug would if `with_bug`."""

    def __init__(self, folder: Path, part: str, with_bug: bool = False) -> None:
        super().__init__(folder)
        self.part, self.with_bug = part, with_bug

    def write(self, key: str, data: bytes, unless: Unless = None) -> None:
        if self.part in key:
            raise ZeroDivisionError("of a pixel\nby nothing") if self.with_bug else StoreError(f"{key}: no")
        super().write(key, data, unless)


class HiccupStore(FolderStore):
    """Fails as a GPU may that another process has filled, the first time that a key that holds `part` is written."""

    def __init__(self, folder: Path, part: str) -> None:
        super().__init__(folder)
        self.part = part
        self.tally = Tally(folder.with_name(folder.name + "-hiccups"))

    def write(self, key: str, data: bytes, unless: Unless = None) -> None:
        if self.part in key and self.tally.add() == 1:
            raise RuntimeError("CUDA out of memory")
        super().write(key, data, unless)


@dataclass(frozen=True)
class BrokenGpu(Profile):
    """The GPU of the first process that identifies, on which every shard fails in that process."""

    starts: Path = Path()

    @contextlib.contextmanager
    def trace(self, step: str, name: str, progress: Progress, task: int = 0) -> Iterator[Progress]:
        def fail(*_: object) -> None:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

        if name.startswith("shard") and Tally(self.starts).add() == 1:
            Identifier.shard = fail  # type: ignore[method-assign, assignment]
        yield progress


class DeadlyStore(FolderStore):
    """Kills whoever writes a key that holds `part`, as running out of memory would."""

    def __init__(self, folder: Path, part: str) -> None:
        super().__init__(folder)
        self.part = part

    def write(self, key: str, data: bytes, unless: Unless = None) -> None:
        if self.part in key:
            os.kill(os.getpid(), signal.SIGKILL)
        super().write(key, data, unless)


class CountingStore(FolderStore):
    """Counts the writes of each key, and takes its time over each."""

    def __init__(self, folder: Path, pause_s: float = 0.0) -> None:
        super().__init__(folder)
        self.pause_s = pause_s

    def write(self, key: str, data: bytes, unless: Unless = None) -> None:
        super().write(key, data, unless)
        self.writes(key).add()
        time.sleep(self.pause_s)

    def writes(self, key: str) -> Tally:
        """Return how often `key` was written."""
        folder = self.folder.with_name(self.folder.name + "-counts")
        folder.mkdir(exist_ok=True)
        return Tally(folder / key.replace("/", "-"))


class TakenOverStore(CountingStore):
    """Another driver takes the run over as soon as a key is written."""

    def require_lock(self) -> None:
        if self.list():
            raise RunBusyError("another driver took the run over")


def note_visible_gpus(folder: Path, *, progress: Progress) -> None:
    """Write down CUDA_VISIBLE_DEVICES of this process."""
    folder.mkdir(exist_ok=True)
    (folder / f"{os.getpid()}").write_text(visible_gpus(0))


def visible_gpus(number: int) -> str:
    """Return CUDA_VISIBLE_DEVICES of this process."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "all")


def sleeping(pid: Path, *, progress: Progress) -> None:
    """Write down which process this is, and do nothing for a long time."""
    pid.write_text(str(os.getpid()))
    time.sleep(300)


def meeting(folder: Path, name: str, other: str, *, progress: Progress) -> str:
    """Return `name` once the task called `other` runs, too."""
    (folder / name).touch()
    deadline = time.monotonic() + 240
    while not (folder / other).exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{other} does not run beside {name}")
        time.sleep(0.05)
    return name


def place_among_starts(starts: Path, *, progress: Progress) -> int:
    """Return how many tasks have started, this one with them."""
    return Tally(starts).add()


def shouting(word: str, *, progress: Progress) -> str:
    """Say how far it is, log a line, and return the word in capitals."""
    for done in range(1, 4):
        progress("shouting", done, 3, "letters")
    logging.getLogger("defuse").info("shouted %s", word)
    return word.upper()


def counting(count: int, total: int, *, progress: Progress) -> None:
    """Say after each of `count` numbers how far it is, faster than anybody can read."""
    for done in range(1, count + 1):
        progress("counting", done, total, "numbers")


def note_working_dir(folder: Path, *, progress: Progress) -> None:
    """Write down the working directory of this process."""
    folder.mkdir(exist_ok=True)
    (folder / f"{os.getpid()}").write_text(str(Path.cwd()))


def note_place(folder: Path, *, progress: Progress) -> None:
    """Write down the working directory of this process and the GPUs that it sees."""
    folder.mkdir(exist_ok=True)
    note_working_dir(folder / "working directories", progress=silent)
    note_visible_gpus(folder / "gpus", progress=silent)


def failing(error: Exception, *, progress: Progress) -> None:
    raise error


def dying(tally: Path, times: int, *, progress: Progress) -> str:
    """Be killed the first `times` times."""
    if Tally(tally).add() <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def train_part_dying_once(
    spec: RunFile, store: Store, part: Any, marker: Path, *, progress: Progress
) -> None:
    """Train with others; the second worker is killed in the second epoch, the first time."""

    def deadly(what: str, done: int = 0, total: int = 1, unit: str = "") -> None:
        if done > total // 3 and not marker.exists():
            time.sleep(12)  # until Ray Train knows that all workers have started
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    train_part(spec, store, part, progress=progress if is_first_worker() else deadly)


def train_part_ending_its_task(
    spec: RunFile, store: Store, part: Any, task: Path, *, progress: Progress
) -> None:
    """Train with others; the process of the task that started them, noted in `task`, is killed once they have begun."""
    if is_first_worker():
        os.kill(int(task.read_text()), signal.SIGKILL)
    train_part(spec, store, part, progress=progress)


def run_together_noted(function: Any, args: tuple[Any, ...], *others: Any, progress: Progress) -> None:
    """`run_together`, whose process is noted in the file that is the last of `args`."""
    from cluster.ray_train_tune import run_together  # imports pandas and more

    args[-1].write_text(str(os.getpid()))
    run_together(function, args, *others, progress=progress)


def train_part_noting(spec: RunFile, store: Store, part: Any, notes: Path, *, progress: Progress) -> None:
    """Train with others; each worker writes down its working directory and the GPUs that it sees."""
    note_place(notes, progress=silent)
    train_part(spec, store, part, progress=progress)


@ray.remote(num_cpus=2)
class OtherWork:
    """Holds all CPUs of the cluster of the tests."""

    def began(self) -> None:
        pass


def load_numbers(tally: Path, number: int) -> I64:
    """Count the call, and return a part of five numbers."""
    Tally(tally).add()
    return np.full(5, number)


def load_without_store(tally: Path, number: int) -> I64:
    """Fail to load the first part, and take a while over the others."""
    if not number:
        raise StoreError("the bucket is away")
    time.sleep(0.5)
    return load_numbers(tally, number)


def add(part: I64, number: int) -> int:
    return int(part.sum()) + number


def rest(_part: I64, seconds: float) -> None:
    time.sleep(seconds)


def sum_or_die_once(part: I64, marker: Path) -> int:
    """Be killed once, at the part of twos."""
    if part[0] == 2 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return int(part.sum())


def held_cpus(*, progress: Progress) -> float:
    """Return how many CPUs this task holds."""
    held: float = ray.get_runtime_context().get_assigned_resources()["CPU"]
    return held


def held_by_rows(rows: range, *, progress: Progress) -> list[float]:
    """Return for each of the rows how many CPUs their task holds."""
    return [held_cpus(progress=progress) for _ in rows]


def pid_by_rows(rows: range, *, progress: Progress) -> list[int]:
    """Return for each of the rows the process of their task."""
    return [os.getpid() for _ in rows]


def vae_size(models: Models, number: int, *, progress: Progress) -> tuple[int, int]:
    """Return `number` and the number of the β-VAE's weights."""
    return number, sum(array.size for array in models.vae.values())
