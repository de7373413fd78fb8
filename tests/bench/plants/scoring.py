"""Groups of failing images that a method proposes, and how they compare with the slice that was planted.

A plant is *discovered* if a group's ten highest-scored test images lie in the slice to 80 % (precision@10 of Domino's
evaluation). By SpotCheck's rule a group belongs to a slice if at least 80 % of its members do, and the slice is found
if the members of all such groups together hold at least 80 % of it; members are images that the classifier gets wrong,
so recall is taken over the images of the slice that it gets wrong.

A group of no slice is not therefore wrong, since every classifier also fails by nature. It is *natural* if the
classifier is wrong on significantly more of its ten nearest test images than on its class (binomial test, 1 %),
where nearness ignores the classifier; otherwise it is *false*.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from defuse_core.artifacts import F64, I64, Bool

TOP = 10
ENOUGH = 0.8
SIGNIFICANT = 0.01


@dataclass(frozen=True, eq=False)
class Group:
    """One candidate, as scores of all test images."""

    name: str
    score: F64  # (N,) how much each test image belongs to the group; -inf where it does not
    members: Bool  # (N,) the test images that it names: misclassified ones
    nearest: F64  # (N,) as score, though without the classifier's answer where the method allows that


@dataclass(frozen=True)
class Outcome:
    """How the groups of one method compare with one plant."""

    precision: float  # highest precision@10 over all groups
    by_precision: bool  # discovered: precision@10 of some group is at least 0.8
    by_union: bool  # found by SpotCheck's rule
    union_recall: float  # of the slice's misclassified images, by all groups of precision 0.8
    groups: int
    belonging: int  # of the first ten, those that belong to the plant
    natural: int  # of the first ten
    false: int  # of the first ten


def top(score: F64, count: int = TOP) -> I64:
    """Return the rows of the highest scores, at most `count`, without those of score -inf."""
    order = np.argsort(-score, kind="stable")[:count]
    return order[np.isfinite(score[order])]


def precision_at_ten(group: Group, inside: Bool) -> float:
    """Return the share of ten that the highest-scored images in the slice make; fewer than ten count as misses."""
    return float(inside[top(group.score)].sum()) / TOP


def compare(groups: Sequence[Group], inside: Bool, labels: I64, predicted: I64) -> Outcome:
    """Return how `groups`, heaviest first, compare with the slice `inside` (N,)."""
    wrong = predicted != labels
    precisions = [precision_at_ten(group, inside) for group in groups]
    pure = [group for group in groups if group.members.any() and inside[group.members].mean() >= ENOUGH]
    union = np.zeros(len(inside), bool)
    for group in pure:
        union |= group.members
    target = inside & wrong
    recall = float(union[target].mean()) if target.any() else math.nan
    belongs = [
        precision >= ENOUGH or any(group is other for other in pure)
        for group, precision in zip(groups, precisions, strict=True)
    ]
    natural = [is_natural(group, labels, wrong) for group in groups]
    first = list(zip(belongs, natural, strict=True))[:TOP]
    return Outcome(
        precision=max(precisions, default=0.0),
        by_precision=max(precisions, default=0.0) >= ENOUGH,
        by_union=recall >= ENOUGH,
        union_recall=recall,
        groups=len(groups),
        belonging=sum(b for b, _ in first),
        natural=sum(n and not b for b, n in first),
        false=sum(not n and not b for b, n in first),
    )


def is_natural(group: Group, labels: I64, wrong: Bool) -> bool:
    """Return whether the classifier is wrong on more of the group's nearest images than chance allows."""
    return chance(group.nearest, labels, wrong) < SIGNIFICANT


def chance(nearest: F64, labels: I64, wrong: Bool) -> float:
    """Return the p-value of so many errors on the ten nearest images, given the error rate on their class."""
    rows = top(nearest)
    if not len(rows):
        return 1.0
    usual = float(wrong[labels == np.bincount(labels[rows]).argmax()].mean())
    return float(binomtest(int(wrong[rows].sum()), len(rows), max(usual, 1e-9), "greater").pvalue)


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Return the mean of `values` with its 95 % bootstrap interval."""
    known = np.array([value for value in values if not math.isnan(value)])
    if not len(known):
        return math.nan, math.nan, math.nan
    rng = np.random.default_rng(seed)
    means = known[rng.integers(0, len(known), (2000, len(known)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(known.mean()), float(low), float(high)
