"""What the method needs from outside: a place to compute, annotators, and a display of progress."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from defuse_core.artifacts import I64, Corrections, Gallery, Models, Psi, ReferenceSet, Sweep, Votes
from defuse_core.config import RunFile
from defuse_core.data import Images
from defuse_core.store import Store

T = TypeVar("T")

ROWS_PER_TASK = 8  # rows, such as components or scenarios, that one task of map_in_tasks works on


class Progress(Protocol):
    """How a step reports its progress, of which the display computes the rate and the time left.

    `progress("fitting the β-VAE", 3, 10, "epochs")`: 3 of 10 epochs are done. An activity in one piece is only named.
    Tasks that share an activity report what each of them has done, and the total of all.
    """

    def __call__(self, what: str, done: int = 0, total: int = 1, unit: str = "") -> None: ...


def silent(what: str, done: int = 0, total: int = 1, unit: str = "") -> None:
    """A Progress that shows nothing."""


class ProgressSum:
    """Adds up what the tasks that share an activity have done, and reports the sum."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.done: dict[str, dict[int, int]] = {}  # activity -> task -> what it has done

    def of(self, task: int) -> Progress:
        """Return the `Progress` of one task."""
        return partial(self.update, task)

    def update(self, task: int, what: str, done: int = 0, total: int = 1, unit: str = "") -> None:
        """Report what all tasks have done of `what`, now that `task` has done `done`."""
        done_by_task = self.done.setdefault(what, {})
        done_by_task[task] = done
        self.progress(what, sum(done_by_task.values()), total, unit)


class Partitions(Protocol):
    """Data in parts, each of which is where it was loaded; one that is lost with its machine is loaded again."""

    def map(self, function: Callable[..., T], *args: object) -> list[T]:
        """Return function(part, *args) of every part, in order. Raises its error."""


class Call(Generic[T]):
    """A call of function(*args, progress=...) that is yet to be made."""

    def __init__(self, function: Callable[..., T], *args: object, one_thread: bool = False) -> None:
        """`one_thread`: it computes with one CPU thread, whatever resources.train_threads is."""
        self.function, self.args, self.one_thread = function, args, one_thread


def numbered(calls: Sequence[Call[Any]]) -> list[tuple[int, Call[Any]]]:
    """Return the calls, each with its number among those of the same function, from 0."""
    count = Counter[Callable[..., Any]]()
    found = []
    for call in calls:
        found.append((count[call.function], call))
        count[call.function] += 1
    return found


@dataclass(frozen=True, eq=False)
class SweepRequest:
    """A sweep over λ that is yet to be made."""

    spec: RunFile  # correct.lambdas and the rest of its section
    fixes: Corrections  # D_f, and the held-out images
    reviewed: Images | None  # tuned on in the place of D_f: the baseline
    store: Store  # of its trials; those that it holds already resume after their last finished epoch
    # all of the fixes, where `fixes` leave some out for a control: clean images follow from all, and so are the same
    all_fixes: Corrections | None = None
    repetition: int = 0  # as of FineTuningData
    comparison: str = ""  # what it is, such as "the baseline", where the correction is only compared with it

    @property
    def is_empty(self) -> bool:
        """Whether D_f is empty: no scenario was accepted, or no reviewed image is misclassified."""
        return len(self.fixes.labels) == 0 or (self.reviewed is not None and len(self.reviewed) == 0)

    def sources(self) -> tuple[I64, I64]:
        """Return the `Corrections.sources` of all fixes, from which the clean images follow."""
        return (self.all_fixes or self.fixes).sources()


class Compute(Protocol):
    """Runs the heavy steps: in this process (local.py), or on a Ray cluster (cluster/compute.py)."""

    progress: Progress

    def run_distributed(self, step: str, function: Callable[..., None], *args: object) -> None:
        """Run function(*args, progress=...) in resources.train_workers processes that form a torch process group.

        Raises RunFileError without room for them.
        """

    def partitions(
        self, step: str, load: Callable[..., object], arguments: Sequence[tuple[object, ...]]
    ) -> Partitions:
        """Return the parts that load(*arguments) returns, each on the machine that loads it."""

    def task(self, step: str, function: Callable[..., T], *args: object) -> T:
        """Return function(*args, progress=...), run where the accelerator is. Raises what the function raises."""
        return self.tasks(step, [Call(function, *args)])[0]  # type: ignore[no-any-return]

    def tasks(self, step: str, calls: Sequence[Call[Any]]) -> list[Any]:
        """Return the results of independent calls, in their order.

        Each is a task; they start in that order, as many at a time as fit.
        """

    def identify(
        self, spec: RunFile, models: Models, store: Store, references: ReferenceSet | None = None
    ) -> Psi:
        """Algorithm 1 on all training images; shards that `store` already holds are not computed again.

        With `references` a failing draw is kept only where these models recognise its source's class.
        """

    def sweeps(self, models: Models, requests: Sequence[SweepRequest]) -> list[Sweep]:
        """Fine-tune once per request and λ (§3.2.3); the trials of all requests are run together.

        Raises ModelError or ComputeError if every trial of a request that is no comparison failed for good.
        """


def map_in_tasks(
    compute: Compute,
    step: str,
    count: int,
    function: Callable[..., list[T]],
    *args: object,
    rows_per_task: int = ROWS_PER_TASK,
) -> list[T]:
    """Return what function(*args, rows, progress=...) returns for ranges of `count` rows, one task each, in order.

    The function computes with one thread. No result depends on `rows_per_task`: every row has its own seed, or none.
    """
    ranges = [range(first, min(first + rows_per_task, count)) for first in range(0, count, rows_per_task)]
    results = compute.tasks(step, [Call(function, *args, rows, one_thread=True) for rows in ranges])
    return list(itertools.chain(*results))


class Annotators(Protocol):
    """Label the gallery: models (training/reference_models.py), or people in Label Studio (services/labeling)."""

    def review(self, gallery: Gallery) -> Votes:
        """Return all answers. Raises LabelsPending while answers of people are missing."""
