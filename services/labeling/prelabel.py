"""Model-assisted review (the paper's future work): reference models answer first, people correct them.

A preselected answer biases a vote, so this is off by default, and the votes of a run say when it was on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from defuse_core.artifacts import F32, NONE_OF_THE_ABOVE, Gallery
from defuse_core.pipeline import Compute
from defuse_core.reference import ask_models
from defuse_core.runs import Run
from services.labeling.tasks import Place, Suggestion


@dataclass(frozen=True, eq=False)
class Prelabels:
    """What the reference models make of the gallery."""

    probabilities: F32  # (W, S, R, C)


def prelabels(run: Run, compute: Compute, gallery: Gallery) -> Prelabels:
    """Return the models' probabilities, made once per run."""

    def make() -> Prelabels:
        return Prelabels(ask_models(run, compute, gallery))

    return run.once("review", Prelabels, make)


def suggest(probabilities: F32, min_confidence: float, pages: bool) -> dict[str, Suggestion]:
    """Return a suggestion per sample key, the least certain first.

    That is the order in which people get the tasks.
    """
    mean = probabilities.mean(axis=0)  # (S, R, C)
    if pages:
        mean = mean.mean(axis=1, keepdims=True)  # (S, 1, C)
    best, confidence = mean.argmax(axis=2), mean.max(axis=2)
    order = np.argsort(confidence, axis=None, kind="stable")
    suggestions = {}
    for scenario, image in zip(*np.unravel_index(order, confidence.shape), strict=True):
        sure = float(confidence[scenario, image])
        answer = int(best[scenario, image]) if sure >= min_confidence else NONE_OF_THE_ABOVE
        key = Place(int(scenario), None if pages else int(image)).key
        suggestions[key] = Suggestion(answer, sure, "page" if pages else "image")
    return suggestions
