"""Model-assisted review (the paper's future work): reference models answer first, people correct them.

A preselected answer biases a vote, so this is off by default, and the votes of a run say when it was on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from defuse_core.artifacts import F32, NONE_OF_THE_ABOVE, Gallery
from defuse_core.protocols import Compute
from defuse_core.reference_models import ask_models
from defuse_core.runs import Run
from services.labeling.tasks import Suggestion


@dataclass(frozen=True, eq=False)
class Prelabels:
    """What the reference models make of the gallery."""

    probabilities: F32  # (W, S, R, C)


def prelabels(run: Run, compute: Compute, gallery: Gallery) -> Prelabels:
    """Return the models' probabilities, made once per run."""

    def make() -> Prelabels:
        return Prelabels(ask_models(run, compute, gallery))

    return run.once("review", Prelabels, make)


def suggest(probabilities: F32, min_confidence: float, pages: bool) -> dict[int, Suggestion]:
    """Return a suggestion per task, by its number, the least certain first.

    That is the order in which people get the tasks.
    """
    mean = probabilities.mean(axis=0)  # (S, R, C)
    if pages:
        mean = mean.mean(axis=1, keepdims=True)  # (S, 1, C)
    best, confidence = mean.argmax(axis=2), mean.max(axis=2)
    suggestions = {}
    for number in np.argsort(confidence, axis=None, kind="stable").tolist():
        sure = float(confidence.flat[number])
        answer = int(best.flat[number]) if sure >= min_confidence else NONE_OF_THE_ABOVE
        suggestions[number] = Suggestion(answer, sure, "page" if pages else "image")
    return suggestions
