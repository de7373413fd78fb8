"""What a finished run holds of its scenarios and classifiers, and why it may have no scenarios."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from defuse_core.artifacts import (
    Corrections,
    Gallery,
    Models,
    Psi,
    ReferenceSet,
    Scenarios,
    Sweep,
    Verdicts,
)
from defuse_core.config import RunFile
from defuse_core.evaluation import expect_same_answers
from defuse_core.evaluation.health import with_measured_health
from defuse_core.models import load_classifier
from defuse_core.review.undecided import why_undecided
from defuse_core.runs import Run


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """What a finished run holds of its scenarios and classifiers."""

    spec: RunFile
    models: Models
    gallery: Gallery
    verdicts: Verdicts
    fixes: Corrections
    sweep: Sweep

    def classifiers(self) -> tuple[nn.Module, nn.Module]:
        """Return the classifier before and after the correction; the same where nothing was corrected.

        Raises RunMismatchError where its code has changed since the run began.
        """
        weights = self.models.classifier, self.sweep.weights or self.models.classifier
        before, after = (load_classifier(self.spec, each, len(self.models.classes)) for each in weights)
        expect_same_answers(self.spec, before, self.gallery)
        return before, after


def load_finished(run: Run) -> FinishedRun:
    """Return what is stored of a finished run. Raises InputError for one that is not finished."""
    return FinishedRun(
        run.spec,
        run.require(Models),
        run.require(Gallery),
        run.require(Verdicts),
        run.require(Corrections),
        run.require(Sweep),
    )


def undecided_of(run: Run) -> str | None:
    """Return why a finished run could not tell whether its classifier has failure scenarios; None where it could."""
    verdicts = run.require(Verdicts)
    if len(verdicts.accepted):
        return None
    return why_undecided(
        run.spec,
        run.require(Gallery),
        verdicts,
        models=with_measured_health(run, run.require(Models)),
        references=run.load(ReferenceSet, "references"),
        psi=run.load(Psi),
        scenarios=run.load(Scenarios),
    )
