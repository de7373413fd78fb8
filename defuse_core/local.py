"""Computing in this process: a call with its traces, and LocalCompute, every step one after the other.

The results on a cluster must equal those of LocalCompute. A trace of torch's operations (`defuse run --profile STEP`)
opens in chrome://tracing or Perfetto.
"""

from __future__ import annotations

import gzip
import itertools
import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerAction, ProfilerActivity

from defuse_core.artifacts import Models, Psi, ReferenceSet, Sweep, Trial
from defuse_core.config import RunFile
from defuse_core.correct import FineTuning
from defuse_core.data.read_ahead import reader_pool
from defuse_core.device import computing_on, device, is_device_failure, is_out_of_memory, release_memory
from defuse_core.errors import ANOTHER_NAME, ComputeError, DefuseError, ModelError
from defuse_core.formatting import one_line
from defuse_core.identify import Identifier, finished_shards, gather_shards, save_shard, shard_count
from defuse_core.protocols import Call, Compute, Progress, ProgressSum, SweepRequest, numbered, silent
from defuse_core.store import Store
from defuse_core.trials import (
    collect_stored,
    finished_trials,
    is_trial_failure,
    names_of,
    run_stack,
    stacks_of,
    without_weights,
)
from defuse_core.tuning_data import load_fine_tuning_data

log = logging.getLogger("defuse")
T = TypeVar("T")
MAX_REPORTS = 30  # of progress, one per training step, after which a trace ends: viewers refuse longer ones
# step -> fields of the run file with which it takes less memory if they are smaller
BATCH_FIELDS = {
    "train": "batch_size, channels or hidden of classifier, vae, review.reference or judges",
    "identify": "identify.batch_size or block_images",
    "correct": "correct.batch_size or stack",
    "report": "judges.batch_size or correct.batch_size",
}


@dataclass(frozen=True)
class Profile:
    """Which step is traced, and where the traces are stored. Picklable, as workers need it."""

    step: str | None = None  # None traces nothing
    store: Store | None = None  # of the run

    @contextmanager
    def task(
        self, step: str, function: Callable[..., object], progress: Progress, number: int
    ) -> Iterator[Progress]:
        """Trace the call of `function` in the block where `step` is the one to trace; yield its Progress.

        `number` is that of the call among those of the same function that run together. The memory that the call freed
        is returned to the system: a worker may wait long for its next task, and a notebook is not the run alone.
        """
        try:
            with self.trace(step, function.__name__, progress, number) as traced:
                yield traced
        finally:
            reader_pool.cache_clear()  # its processes end
            release_memory()

    @contextmanager
    def trace(self, step: str, name: str, progress: Progress, task: int = 0) -> Iterator[Progress]:
        """Trace the block if `step` is the one to trace, at most until MAX_REPORTS reports of progress."""
        if step != self.step or self.store is None:
            yield progress
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        profiler = torch.profiler.profile(activities=activities, schedule=_first_reports)

        def traced(what: str, done: int = 0, total: int = 1, unit: str = "") -> None:
            progress(what, done, total, unit)
            profiler.step()

        try:
            with profiler:
                yield traced
        finally:
            self._save(profiler, self.store, name, task + 1)

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


def _first_reports(report: int) -> ProfilerAction:
    """Return what a trace does after so many reports, up to the next one: it ends with report MAX_REPORTS."""
    if report < MAX_REPORTS - 1:
        return ProfilerAction.RECORD
    return ProfilerAction.RECORD_AND_SAVE if report < MAX_REPORTS else ProfilerAction.NONE


class LocalPartitions:
    """The protocol `Partitions`, in this process."""

    def __init__(self, parts: list[object]) -> None:
        self.parts = parts

    def map(self, function: Callable[..., T], *args: object) -> list[T]:
        return [function(part, *args) for part in self.parts]


@contextmanager
def _machine_errors(step: str, where: str) -> Iterator[None]:
    """Raise ComputeError, with what to do, where the block finds no memory or its GPU fails; `where` begins it."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            on_cpu = " (on the CPU with resources.gpus_per_worker=0)" if device().type == "cuda" else ""
            smaller = f", or lower {BATCH_FIELDS[step]} under {ANOTHER_NAME}" if step in BATCH_FIELDS else ""
            raise ComputeError(
                f"{where}: out of memory ({one_line(error)}); free memory and run again to continue{on_cpu}{smaller}"
            ) from error
        if is_device_failure(error):
            raise ComputeError(
                f"{where}: {one_line(error)}; run again in a new process (restart a notebook's kernel) to continue"
            ) from error
        raise


def local_device(gpus_per_worker: object) -> AbstractContextManager[None]:
    """Compute the block on the CPU where a run has no GPUs (0), else on this process's device."""
    return computing_on(torch.device("cpu")) if gpus_per_worker == 0 else nullcontext()


@contextmanager
def local_compute(
    spec: RunFile, progress: Progress = silent, profile: Profile = UNTRACED
) -> Iterator[LocalCompute]:
    """Yield the Compute of a run in this process, for the block: on its GPU, unless resources.gpus_per_worker is 0."""
    with local_device(spec.resources.gpus_per_worker):
        yield LocalCompute(progress, profile)


class LocalCompute(Compute):
    """The protocol `Compute`, without a cluster."""

    def __init__(self, progress: Progress = silent, profile: Profile = UNTRACED) -> None:
        self.progress, self.profile = progress, profile

    def tasks(self, step: str, calls: Sequence[Call[Any]]) -> list[Any]:
        shared, results = ProgressSum(self.progress), []
        for number, call in numbered(calls):
            task = self.profile.task(step, call.function, shared.of(number), number)
            with _machine_errors(step, step), task as progress:
                results.append(call.function(*call.args, progress=progress))
        return results

    def run_distributed(self, step: str, function: Callable[..., None], *args: object) -> None:
        log.warning("%s: resources.train_workers needs Ray; one worker does all", step)
        self.task(step, function, *args)

    def partitions(
        self, step: str, load: Callable[..., object], arguments: Sequence[tuple[object, ...]]
    ) -> LocalPartitions:
        with _machine_errors(step, step):
            return LocalPartitions([load(*each) for each in arguments])

    @_machine_errors("identify", "identify")
    def identify(
        self, spec: RunFile, models: Models, store: Store, references: ReferenceSet | None = None
    ) -> Psi:
        count = shard_count(models.images["train"], spec.identify)
        identifier = Identifier(spec, models, references)
        records = finished_shards(store, identifier.fingerprint)
        for index in range(count):
            if index not in records:
                with self.profile.trace("identify", "shard", silent) if not records else nullcontext():
                    shard = identifier.shard(index)
                records[index] = save_shard(store, shard)
            self.progress("perturbing training images", index + 1, count, "shards")
        return gather_shards(records)

    @_machine_errors("correct", "correct")
    def sweeps(self, models: Models, requests: Sequence[SweepRequest]) -> list[Sweep]:
        return [self._sweep(models, request) for request in requests]

    def _sweep(self, models: Models, request: SweepRequest) -> Sweep:
        """Fine-tune each stack of λ in turn, and choose; continues the trials that the request's store holds."""
        if request.is_empty:
            return collect_stored(request, models, [], {})
        spec, finished = request.spec, finished_trials(request.spec, request.store)
        outcomes: dict[float, Trial | DefuseError] = {**finished}
        left = [lams for lams in stacks_of(spec.correct) if not set(lams) <= finished.keys()]
        if left:
            tuning = FineTuning(spec, models, load_fine_tuning_data(models, request, progress=self.progress))
            for lams in left:
                outcomes |= self._stack(tuning, lams, request.store)
                self.progress("fine-tuning over λ", len(outcomes), len(spec.correct.lambdas), "trials")
        trials = [each for each in outcomes.values() if isinstance(each, Trial)]
        failures = {lam: each for lam, each in outcomes.items() if isinstance(each, DefuseError)}
        return collect_stored(request, models, trials, failures)

    def _stack(
        self, tuning: FineTuning, lams: tuple[float, ...], store: Store
    ) -> dict[float, Trial | DefuseError]:
        """Return of each λ the finished trial, without weights, or the error that it is left out for.

        Raises an error that ends the sweep.
        """
        made = dict[float, Trial | DefuseError]()
        trials = run_stack(tuning, lams, store)
        try:
            with _machine_errors("correct", f"correct: λ = {names_of(lams)}"):
                for lam, outcome in self.profile.first("correct", f"lambda-{names_of(lams)}", trials):
                    if isinstance(outcome, ModelError):
                        made[lam] = outcome
                    elif outcome.done:
                        made[lam] = without_weights(outcome)
        except Exception as error:
            if not is_trial_failure(error):
                raise
            cause = (
                error if isinstance(error, DefuseError) else ComputeError(f"{type(error).__name__}: {error}")
            )
            made |= {lam: cause for lam in lams if lam not in made}
        return made
