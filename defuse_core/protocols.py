"""What the method needs from outside: a place to compute, and annotators. Each has two implementations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from defuse_core.artifacts import Corrections, Gallery, Models, Psi, ReferenceSet, Sweep, Votes
from defuse_core.config import RunFile
from defuse_core.data import Images
from defuse_core.progress import Progress
from defuse_core.store import Store

T = TypeVar("T")


class Partitions(Protocol):
    """Data in parts, each of which is where it was loaded; one that is lost with its machine is loaded again."""

    def map(self, function: Callable[..., T], *args: object) -> list[T]:
        """Return function(part, *args) of every part, in order."""


class Compute(Protocol):
    """Runs the heavy steps: in this process (local.py), or on a Ray cluster (cluster/compute.py)."""

    progress: Progress

    def partitions(
        self, step: str, load: Callable[..., object], arguments: Sequence[tuple[object, ...]]
    ) -> Partitions:
        """Return the parts that load(*arguments) returns, each on the machine that loads it."""

    def task(self, step: str, function: Callable[..., T], *args: object) -> T:
        """Return function(*args, progress=...), run where the accelerator is. Raises what the function raises."""

    def identify(
        self, spec: RunFile, models: Models, store: Store, references: ReferenceSet | None = None
    ) -> Psi:
        """Algorithm 1 on all training images; shards that `store` already holds are not computed again.

        With `references` a failing draw is kept only where these models recognise its source's class.
        """

    def sweep(
        self, spec: RunFile, models: Models, fixes: Corrections, reviewed: Images | None, store: Store
    ) -> Sweep:
        """Fine-tune once per λ (§3.2.3), on the codes of `fixes`, or on `reviewed` in their place (the baseline).

        Trials that `store` already holds resume after their last finished epoch.
        """


class Annotators(Protocol):
    """Label the gallery: reference models (reference_models.py), or people in Label Studio (services/labeling)."""

    def review(self, gallery: Gallery) -> Votes:
        """Return all answers. Raises LabelsPending while answers of people are missing."""
