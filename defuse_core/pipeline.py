"""The story: the whole method, one line per step (Figure 1, left to right)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from defuse_core.artifacts import (
    Corrections,
    Evaluation,
    Gallery,
    Models,
    Psi,
    Scenarios,
    Sweep,
    Verdicts,
    Votes,
)
from defuse_core.config import RunFile
from defuse_core.correct import reviewed_failures
from defuse_core.data import Images
from defuse_core.distill import distill
from defuse_core.errors import InputError
from defuse_core.evaluate import Findings, evaluate
from defuse_core.health import expect_healthy
from defuse_core.judge import judge, read_overrides
from defuse_core.report import Report, write_report
from defuse_core.runs import Run
from defuse_core.sample import sample_corrections, sample_gallery
from defuse_core.store import Store
from defuse_core.train import train

T = TypeVar("T")


class Compute(Protocol):
    """Where heavy steps run: in this process (local.py), or on a Ray cluster (cluster/compute.py)."""

    def task(self, step: str, function: Callable[..., T], *args: object) -> T:
        """Return function(*args, progress=...), run where the accelerator is. Errors of the tree come through."""

    def identify(self, spec: RunFile, models: Models, store: Store) -> Psi:
        """Algorithm 1 on all training images; shards that are in `store` already are not made again."""

    def sweep(
        self, spec: RunFile, models: Models, fixes: Corrections, reviewed: Images | None, store: Store
    ) -> Sweep:
        """Fine-tune once per λ (§3.2.3), on the codes of `fixes`, or on `reviewed` in their place (the baseline).

        Trials that are in `store` already go on from their last finished epoch.
        """


class Annotators(Protocol):
    """Who answers: reference models (reference.py), or people in Label Studio (services/labeling)."""

    def review(self, gallery: Gallery) -> Votes:
        """Return all answers. Raises LabelsPending while people have not given theirs."""


def run_defuse(run: Run, compute: Compute, annotators: Annotators) -> Report:
    """Debug one classifier, and return what was found. Each artefact is made once per run."""
    spec, store = run.spec, run.store
    models = run.once("train", Models, lambda: compute.task("train", train, spec, store))
    psi = run.once("identify", Psi, lambda: compute.identify(spec, expect_healthy(spec, models), store))
    scenarios = run.once("distill", Scenarios, lambda: compute.task("distill", distill, spec, psi, store))
    gallery = run.once("draw", Gallery, lambda: compute.task("draw", sample_gallery, spec, models, scenarios))
    votes = run.once("review", Votes, lambda: annotators.review(gallery))
    verdicts = run.once(
        "review", Verdicts, lambda: judge(gallery, votes, spec.review.rho, read_overrides(store))
    )
    fixes = run.once("correct", Corrections, lambda: sample_corrections(spec, scenarios, verdicts))
    reviewed = reviewed_failures(gallery, verdicts)
    baseline = run.once(
        "correct",
        Sweep,
        lambda: compute.sweep(spec, models, fixes, reviewed, store.within("trials/baseline")),
        "baseline",
    )
    sweep = run.once(
        "correct", Sweep, lambda: compute.sweep(spec, models, fixes, None, store.within("trials/defuse"))
    )
    found = Findings(models, psi, scenarios, gallery, votes, verdicts, fixes, baseline, sweep)
    evaluation = run.once("report", Evaluation, lambda: compute.task("report", evaluate, spec, found, store))
    return write_report(run, found, evaluation)


def rewrite_report(run: Run) -> Report:
    """Return the report of a finished run, written again from its artefacts. Raises InputError if unfinished."""
    found = Findings(
        _made(run, Models),
        _made(run, Psi),
        _made(run, Scenarios),
        _made(run, Gallery),
        _made(run, Votes),
        _made(run, Verdicts),
        _made(run, Corrections),
        _made(run, Sweep, "baseline"),
        _made(run, Sweep),
    )
    return write_report(run, found, _made(run, Evaluation))


def _made(run: Run, kind: type[T], key: str | None = None) -> T:
    artefact = run.load(kind, key)
    if artefact is None:
        raise InputError(f"run {run.name} is not finished; `defuse status {run.name}` shows how far it is")
    return artefact
