"""The real images nearest to each scenario: does the classifier fail on them, too, or on generated ones alone?

Axes, beside those of artifacts/__init__.py: E nearest real images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from defuse_core.artifacts import F64, I64, U8, Bool, Corrections, Scenarios
from defuse_core.data import Images
from defuse_core.data.images import to_levels
from defuse_core.distill.draws import distances_from
from defuse_core.intervals import SIGNIFICANT, binomial_tail, discoveries, hypergeometric_tail
from defuse_core.models import Vae, encode_images, predict

NEAREST = 12  # real images shown beside a scenario
# Real images whose error is compared with that of all of the label; a quarter of these where there are under 200.
NEAREST_TESTED = 50
# Lower bound of an error on real images from which they show the failures of a component.
LEAST_REAL_ERROR = 0.2


@dataclass(frozen=True, eq=False)
class NearestReal:
    """Real images of a scenario's label that are nearest to it, and the error of the classifier before on them.

    Where the label has fewer than E images, they follow again from the first.
    """

    images: U8  # (A, E, channels, H, W)
    labels: I64  # (A, E)
    predicted: I64  # (A, E)
    # (A,) on the nearest, as many as are tested; of tracks, where images have any; nan where no image has the label:
    # images mean nothing
    error: F64
    error_of_all: float  # on all real images
    # (A,) whether `error` is significantly larger than `error_of_label`, or than LEAST_REAL_ERROR, among all scenarios
    seen: Bool
    testable: Bool  # (A,) False where the label has too few errors, or images, for `seen`
    error_of_label: F64  # (A,) on all real images of the label, or on all of their tracks


def find_nearest_real(
    vae: Vae, before: nn.Module, scenarios: Scenarios, fixes: Corrections, real: Images
) -> NearestReal:
    """Return, per accepted scenario, the nearest real images by Mahalanobis distance, and f's error on them.

    Only images of the scenario's label are compared: its pictures show that class. Images of one track count once,
    where the nearest of them is. Of the scenarios that are seen, a share SIGNIFICANT is expected to be false at most.
    """
    codes = encode_images(vae, real)
    predicted = predict(before, real)
    wrong = predicted != real.labels
    shown, labels, answers, tests = [], [], [], list[tuple[float, float, bool]]()
    of_label: F64 = np.full(len(fixes.labels), np.nan)
    for place, (number, label) in enumerate(zip(fixes.scenario, fixes.labels, strict=True)):
        rows = np.flatnonzero(real.labels == label)
        distance = distances_from(scenarios, number, codes[rows])
        near = rows[np.argsort(distance, kind="stable")]
        outcomes = _outcomes(wrong[near], None if real.tracks is None else real.tracks[near])
        of_label[place] = outcomes.mean() if len(rows) else np.nan
        tests.append(_error_nearby(outcomes))
        kept = np.resize(near, NEAREST) if len(near) else np.zeros(NEAREST, np.int64)
        shown.append(to_levels(real.batch(kept)))
        labels.append(real.labels[kept])
        answers.append(predicted[kept])
    shape = (len(fixes.labels), NEAREST)
    pictures = np.array(shown, np.uint8) if shown else np.zeros((*shape, *real.pixels.shape[1:]), np.uint8)
    error, p_values, can_tell = np.array(tests, np.float64).reshape(-1, 3).T
    testable = can_tell > 0
    return NearestReal(
        images=pictures,
        labels=np.array(labels, np.int64).reshape(shape),
        predicted=np.array(answers, np.int64).reshape(shape),
        error=error,
        error_of_all=float(wrong.mean()),
        seen=_seen(p_values, testable),
        testable=testable,
        error_of_label=of_label,
    )


def _outcomes(wrong: Bool, tracks: I64 | None) -> Bool:
    """Return whether each track is wrong, that is most of its images, in the order in which (n,) images name them.

    `wrong` itself where images have no tracks.
    """
    if tracks is None:
        return wrong
    _, first, track = np.unique(tracks, return_index=True, return_inverse=True)
    most: Bool = 2 * np.bincount(track, wrong) > np.bincount(track)
    return most[np.argsort(first)]


def _error_nearby(wrong: Bool) -> tuple[float, float, bool]:
    """Return the error on the nearest of n images or tracks, its p-value, and whether any error could be significant.

    `wrong` (n,) is in order of distance. Against the error of all n the test is hypergeometric, since the nearest are a
    part of all. It says nothing where a class fails as a whole, so that an error over LEAST_REAL_ERROR is enough, too.
    """
    count = len(wrong)
    tested = wrong[: max(1, min(NEAREST_TESTED, count // 4))]
    if not len(tested):
        return float("nan"), 1.0, False
    hits, of_all = int(tested.sum()), int(wrong.sum())
    most = of_all or len(tested)  # without any error, whether there are images enough

    def p_value(hits: int, of_all: int) -> float:
        over_all = hypergeometric_tail(hits, len(tested), of_all, count)
        over_least = float(binomial_tail(hits, len(tested), LEAST_REAL_ERROR))
        return min(1.0, 2 * min(over_all, over_least))  # Bonferroni: either of two tests is enough

    testable = p_value(min(most, len(tested)), most) < SIGNIFICANT
    return float(tested.mean()), p_value(hits, of_all), testable


def _seen(p_values: F64, testable: Bool) -> Bool:
    """Return which scenarios are significant among those that could be, (A,), at a false discovery rate."""
    seen = np.zeros(len(testable), np.bool_)
    seen[testable] = discoveries(p_values[testable], SIGNIFICANT)
    return seen
