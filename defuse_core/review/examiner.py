"""What the classifier and the reference models answer on draws of the components."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TypeVar

from defuse_core.artifacts import F32, I64, Models, ReferenceSet, Scenarios
from defuse_core.config import RunFile
from defuse_core.distill.draws import Draws, anchors_of
from defuse_core.models import decoder_of, load_classifier, load_vae, predict
from defuse_core.protocols import Call, Compute
from defuse_core.review.verdicts import majority, tally
from defuse_core.training.reference_models import (
    load_reference_models,
    model_probabilities,
    unanimous_labels,
    votes_of_models,
)

T = TypeVar("T")
AT_ONCE = 8  # components or scenarios that one task examines


class Examiner:
    """What the classifier and the reference models answer on decoded codes."""

    def __init__(self, spec: RunFile, models: Models, references: ReferenceSet, scenarios: Scenarios) -> None:
        self.classes = len(models.classes)
        self.decoder = decoder_of(load_vae(spec, models.vae), anchors_of(scenarios))
        self.classifier = load_classifier(spec, models.classifier, self.classes)
        self.references = load_reference_models(spec, spec.review.reference, references, self.classes)
        self.min_probability = spec.identify.min_probability
        self.min_confidence = spec.review.reference.min_confidence

    def examine(self, draws: Draws) -> tuple[I64, I64]:
        """Return for n draws the classifier's answers and the labels that the reference models see, each (n,).

        A label is a class of which every reference model is sure, to identify.min_probability at least; an image
        without such a class has none. Where only their mean is sure, independent models often see another class.
        """
        predicted, probabilities = self._answers(draws)
        return predicted, unanimous_labels(probabilities, self.min_probability)

    def review(self, draws: Draws) -> tuple[I64, I64]:
        """Return for n draws the classifier's answers and the labels that a review gives them, each (n,).

        A label is the majority of the reference models' votes, as it is for the images of the gallery.
        """
        predicted, probabilities = self._answers(draws)
        votes = votes_of_models(probabilities[:, None], self.min_confidence)
        return predicted, majority(tally(votes, (1, len(predicted)), self.classes))[0]

    def _answers(self, draws: Draws) -> tuple[I64, F32]:
        """Return the classifier's answers, (n,), and the reference models' probabilities, (W, n, C)."""
        images = self.decoder.decode(draws.codes, draws.anchors)
        return predict(self.classifier, images), model_probabilities(self.references, images)


def in_tasks(
    compute: Compute,
    step: str,
    count: int,
    function: Callable[..., list[T]],
    *args: object,
    at_once: int = AT_ONCE,
) -> list[T]:
    """Return what function(*args, rows, progress=...) returns for ranges of `count` rows, one task each, in order.

    No result depends on the ranges, of `at_once` rows: every row has its own seed, or none.
    """
    ranges = [range(first, min(first + at_once, count)) for first in range(0, count, at_once)]
    results = compute.tasks(step, [Call(function, *args, rows) for rows in ranges])
    return list(itertools.chain(*results))
