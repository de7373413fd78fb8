"""The reference models and the judges of a run, trained when they are first needed; and models as annotators."""

from __future__ import annotations

import numpy as np

from defuse_core.artifacts import F32, Gallery, Models, ReferenceSet, Votes
from defuse_core.protocols import Compute
from defuse_core.reference_models import (
    gallery_probabilities,
    train_judges,
    train_reference_models,
    votes_of_models,
)
from defuse_core.runs import Run


class ReferenceAnnotators:
    """The protocol `Annotators`, implemented by models, which answer at once."""

    def __init__(self, run: Run, compute: Compute) -> None:
        self.run, self.compute = run, compute

    def review(self, gallery: Gallery) -> Votes:
        """Return one answer per model and image; below min_confidence a model answers none-of-the-above."""
        probabilities = ask_models(self.run, self.compute, gallery)
        return votes_of_models(probabilities, self.run.spec.review.reference.min_confidence)


def reference_models(run: Run, compute: Compute) -> ReferenceSet:
    """Return the reference models of the run, trained when they are first needed."""

    def make() -> ReferenceSet:
        return compute.task("train", train_reference_models, run.spec, _fingerprint(run))

    return run.once("train", ReferenceSet, make, "references")


def judges(run: Run, compute: Compute) -> ReferenceSet | None:
    """Return the judges of the run, trained when they are first needed; None with judges.count 0."""
    if run.spec.judges.count == 0:
        return None

    def make() -> ReferenceSet:
        return compute.task("report", train_judges, run.spec, _fingerprint(run))

    return run.once("report", ReferenceSet, make, "judges")


def _fingerprint(run: Run) -> str | None:
    """Return the fingerprint of the images that the run's classifier was trained on, if it has one."""
    models = run.load(Models)
    return None if models is None else models.data_fingerprint


def ask_models(run: Run, compute: Compute, gallery: Gallery) -> F32:
    """Return the reference models' class probabilities on the gallery, (W, S, R, C)."""
    if not gallery.predicted.size:
        section = run.spec.review.reference
        return np.zeros((section.count, *gallery.predicted.shape, len(gallery.classes)), np.float32)
    references = reference_models(run, compute)
    return compute.task("review", gallery_probabilities, run.spec, references, gallery)
