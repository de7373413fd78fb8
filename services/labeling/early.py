"""Enough is enough: scenarios whose verdict and label no missing answer can change any more.

A missing answer may turn out to be any class, none-of-the-above, or never come. The rules are those of
`defuse_core.judge`; the tests hold both against each other over all completions of small cases.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from scipy.optimize import linear_sum_assignment

from defuse_core.artifacts import I64, Bool

FORBIDDEN = -(10**9)  # weight of a label that an image cannot end with
FILL = 10**6  # weight of filling a slot of the class that is to win, over anything else


def is_decided(counts: I64, missing: I64, predicted: I64, rho: float) -> bool:
    """Return whether the verdict and label of one scenario are the same under every completion of its votes.

    counts: (R, C) votes per class so far, none-of-the-above left out. missing: (R,) answers that may still
    come. predicted: (R,). Exact; takes microseconds, except for scenarios that stay rejected only because
    every majority is bound to be tied, which take a few assignment problems per class.
    """
    labels, unlabelled = reachable_labels(counts, missing)
    misclassified = np.arange(counts.shape[1]) != predicted[:, None]  # (R, C)
    if _always_accepted(labels, unlabelled, misclassified, rho):
        return True
    return not _ever_accepted(labels, unlabelled, misclassified, rho)


def reachable_labels(counts: I64, missing: I64) -> tuple[Bool, Bool]:
    """Return which classes (R, C) each image can still end with, and (R,) whether it can end without one."""
    ranked = np.sort(
        np.pad(counts, ((0, 0), (1, 0))), axis=1
    )  # the pad stands in for a second class where C = 1
    first, second = ranked[:, -1:], ranked[:, -2:-1]
    others = np.where((counts == first) & ((counts == first).sum(axis=1, keepdims=True) == 1), second, first)
    labels = counts + missing[:, None] > others
    gap = np.where(counts.shape[1] == 1, first, first - second)[:, 0]
    unlabelled = (gap == 0) | ((gap <= missing) & (counts.shape[1] > 1))
    return labels, unlabelled


def _always_accepted(labels: Bool, unlabelled: Bool, misclassified: Bool, rho: float) -> bool:
    """Whether every completion accepts the scenario, and under one label."""
    worst = _ratio_over(rho, len(labels))
    if worst is None:
        return False
    right, wrong = -worst.numerator, worst.denominator - worst.numerator
    share = np.where(misclassified, wrong, right)
    least = np.minimum(np.where(labels, share, FILL).min(axis=1), np.where(unlabelled, 0, FILL))  # (R,)
    if unlabelled.all() or least.sum() < 0:
        return False
    return any(_always_leads(labels, unlabelled, label) for label in np.flatnonzero(labels.any(axis=0)))


def _always_leads(labels: Bool, unlabelled: Bool, label: int) -> bool:
    """Whether `label` has more images than any other class in every completion."""
    only = labels[:, label] & ~unlabelled & (labels.sum(axis=1) == 1)
    margin = only.astype(int)[:, None] - labels  # (R, C) an image for another class counts against
    margin[:, label] = 1
    return bool((margin.sum(axis=0) > 0).all())


def _ever_accepted(labels: Bool, unlabelled: Bool, misclassified: Bool, rho: float) -> bool:
    """Whether some completion accepts the scenario, under whichever label."""
    least = _ratio_over(rho, len(labels))
    if least is None:
        return False
    right, wrong = -least.numerator, least.denominator - least.numerator
    weights = np.where(labels, np.where(misclassified, wrong, right), FORBIDDEN)  # (R, C)
    free = np.where(unlabelled, 0, FORBIDDEN)
    if np.maximum(weights.max(axis=1), free).sum() < 0:
        return False
    return any(
        _can_win(weights, free, label, images)
        for label in np.flatnonzero(labels.any(axis=0))
        for images in range(1, int(labels[:, label].sum()) + 1)
    )


def _can_win(weights: I64, free: I64, label: int, images: int) -> bool:
    """Whether `label` can have so many images, others fewer, and the share misclassified be enough.

    An assignment of images to slots: `images` of them for the label, one fewer for each other class, and one
    without a label per image.
    """
    slots = [np.repeat(weights[:, [label]] + FILL, images, axis=1)]
    slots += [np.repeat(np.delete(weights, label, axis=1), images - 1, axis=1)]
    slots += [np.repeat(free[:, None], len(weights), axis=1)]
    table = np.concatenate(slots, axis=1)
    rows, columns = linear_sum_assignment(table, maximize=True)
    total = int(table[rows, columns].sum())
    return total - FILL * images >= 0


def _ratio_over(rho: float, images: int) -> Fraction | None:
    """Return the least share w/k of at most so many images that is more than rho; None if there is none.

    The shares are compared as the floats that judge() compares.
    """
    over = [Fraction(w, k) for k in range(1, images + 1) for w in range(k + 1) if w / k > rho]
    return min(over, default=None)
