"""Figures with a known error: confidence bounds and tests of proportions and of pairs, the area under a ROC curve.

Axes, beside those of artifacts/__init__.py: P plain trainings.
"""

from __future__ import annotations

import numpy as np
from scipy import special  # scipy.stats takes half a second to import, in every worker

from defuse_core.artifacts import F64, I64, Bool

SIGNIFICANT = 0.05  # p-value below which a test counts
MIN_CONFIRMED = 0.5  # a confirmed correction is right on over this share of a scenario's held-out images
MANY_CLASSES = 20  # over so many, bounds of single classes allow for their number
LEAST_SKILL = 0.1  # skill below which a classifier guesses: 0 is as right as guessing, 1 is always right
GOOD_SKILL = 0.5  # skill of a good one: images so few that it may be one do not show that it guesses
ROUNDING = 1e-9  # 0.963 - 0.958 is slightly more than 0.005 in floating point


def wilson(hits: I64 | F64, total: I64 | F64, confidence: float = 0.95) -> tuple[F64, F64]:
    """Return Wilson's bounds of the shares hits/total, low and high, two-sided; 0 and 1 where total is 0."""
    z = special.ndtri(0.5 + confidence / 2)
    counts = np.maximum(total, 1)
    share, square = hits / counts, z**2 / counts
    centre = (share + square / 2) / (1 + square)
    half = np.sqrt(share * (1 - share) * square + square**2 / 4) / (1 + square)
    nothing = np.asarray(total) == 0
    low, high = np.clip(centre - half, 0, share), np.clip(centre + half, share, 1)
    return np.where(nothing, 0.0, low), np.where(nothing, 1.0, high)


def share_with_bounds(hits: float, total: float) -> F64:
    """Return the share hits/total and Wilson's bounds of it, low and high, (3,); nan where total is 0.

    Both are fractions where `total` is an `effective_number`.
    """
    if not total:
        return np.full(3, np.nan)
    low, high = wilson(np.array([hits]), np.array([total]))
    return np.array([hits / total, low[0], high[0]])


def mean_with_bounds(means: F64, pooled: F64) -> F64:
    """Return the mean of (n,) shares and its 95 % interval, (3,), by Student's t; `pooled` where n is below 2.

    The interval covers that of `pooled`, the share over the images of all groups with its bounds: equal shares of a few
    groups do not make it a point.
    """
    if len(means) < 2:
        return pooled
    error = special.stdtrit(len(means) - 1, 0.975) * means.std(ddof=1) / np.sqrt(len(means))
    low, high = min(means.mean() - error, pooled[1]), max(means.mean() + error, pooled[2])
    return np.array([means.mean(), max(0.0, low), min(1.0, high)])


def wilson_lower(hits: I64 | F64, total: I64 | F64, level: float = 0.05) -> F64:
    """Return Wilson's one-sided lower bound of the shares hits/total, too high with probability `level`."""
    return wilson(hits, total, 2 * (1 - level) - 1)[0]  # as much on either side


def exact_lower(hits: I64, total: I64) -> F64:
    """Return Clopper and Pearson's one-sided lower bound, of 95 %, of the shares hits/total; 0 where total is 0.

    It holds for few observations, too, where Wilson's is too high: that of 1/1 is 0.05, and Wilson's 0.27.
    """
    low: F64 = special.betaincinv(np.maximum(hits, 1), np.maximum(total - hits, 0) + 1, 0.05)
    return np.where(np.asarray(hits) > 0, low, 0.0)


def certain_loss(
    before: F64, after: F64, units: I64 | F64, phi: F64 | float = 0.0, level: float = 0.05
) -> F64:
    """Return the lower bound (one-sided, 1 - `level`) of each fall of an accuracy on so many images or tracks, (C,).

    0 for none. It is Newcombe's (1998), of the two bounds by Wilson: a single image that became wrong is no certain
    loss, though it is the whole accuracy of its class. `phi` correlates both accuracies; 0 if they are independent.
    """
    down, up = _distances_to_bounds(before, after, units, level)
    bound: F64 = before - after - np.sqrt(np.maximum(down**2 - 2 * phi * down * up + up**2, 0.0))
    return np.where(units > 0, np.maximum(bound, 0.0), 0.0)


def _distances_to_bounds(before: F64, after: F64, units: I64 | F64, level: float) -> tuple[F64, F64]:
    """Return how far Wilson's lower bounds of `before` and his upper bounds of `after` are from these shares, (C,)."""
    down = before - wilson_lower(before * units, units, level)
    return down, 1 - wilson_lower((1 - after) * units, units, level) - after


def certain_mean_loss(before: F64, after: F64, units: I64) -> float:
    """Return the lower bound (one-sided, 95 %) of the fall of the mean over the classes; 0 for none.

    The accuracies (C,) are independent. As in `certain_loss` a single image, the whole of its class, shows no loss.
    """
    some = units > 0
    distances = _distances_to_bounds(before[some], after[some], units[some], SIGNIFICANT)
    fall = (before - after)[some].mean() - np.linalg.norm(distances) / some.sum()
    return max(0.0, float(fall))


def highest_mean(shares: F64, units: I64, confidence: float = 0.95) -> float:
    """Return the upper bound of the mean over the classes of shares (C,): Newcombe's, of the bounds by Wilson."""
    share, counts = shares[units > 0], units[units > 0]
    high = wilson(share * counts, counts, confidence)[1]
    return float(share.mean() + np.linalg.norm(high - share) / len(share))


def only_guesses(right: F64, counts: I64) -> bool:
    """Whether a classifier is hardly better than one that does not look at the images.

    It is right on shares (C,) of the `counts` (C,) images of each class, none of which it was trained on. The mean over
    the classes is at most 1/classes for all answers that do not depend on the image, such as the most frequent class.
    False for images of a single class, and for so few that a good classifier could be right on such shares by chance:
    the only image of a class shows next to nothing.
    """
    classes, images = int((counts > 0).sum()), int(counts.sum())
    if classes < 2:
        return False
    chance, mean = 1 / classes, float(np.nanmean(right))
    possible = wilson(np.array([mean * images]), np.array([images]))[1].item()
    return (
        mean < 2 * chance
        and mean - chance < LEAST_SKILL * (1 - chance)
        and possible - chance < GOOD_SKILL * (1 - chance)
        and highest_mean(right, counts) - chance < GOOD_SKILL * (1 - chance)
    )


def certain_class_loss(before: Bool, after: Bool, labels: I64, units: I64 | None, classes: int) -> F64:
    """Return the `certain_loss` of each class on the same (n,) images, right before and after, (C,).

    It is Newcombe's (Statistics in Medicine 17, 2635-2650, 1998) for pairs, method 10: images that are right both times
    say nothing of a loss. They count as `effective_number` draws. The bounds are of 95 %, and of more with over
    MANY_CLASSES, so that one of them is false at most, on average.
    """
    draws = effective_number(labels, units, classes)
    cells = np.bincount(4 * labels + 2 * before + after, minlength=4 * classes).reshape(classes, 4)
    neither, gained, lost, both = (cells / np.maximum(1, cells.sum(axis=1, keepdims=True))).T
    excess = both * neither - lost * gained
    # his correction for continuity, of a positive correlation alone
    corrected = np.minimum(excess, np.maximum(0, excess - 0.5 / np.maximum(1, draws)))
    squared = (both + lost) * (gained + neither) * (both + gained) * (lost + neither)
    phi = corrected / np.sqrt(np.where(squared > 0, squared, 1))
    return certain_loss(both + lost, both + gained, draws, phi, level=1 / max(MANY_CLASSES, classes))


def class_accuracy(right: Bool | F64, labels: I64, classes: int) -> F64:
    """Return the accuracy within each class, (C,); nan for a class without images."""
    counts = np.bincount(labels, minlength=classes)
    with np.errstate(invalid="ignore"):
        shares: F64 = np.bincount(labels, right, minlength=classes) / counts
    return shares


def class_loss(before: Bool, after: Bool, labels: I64, units: I64 | None, classes: int) -> F64:
    """Return the accuracy that each class lost on the same (n,) images, right before and after, (C,); nan without any.

    With over MANY_CLASSES it is the `certain_class_loss`: some of so many lose much by chance.
    """
    counts = np.bincount(labels, minlength=classes)
    loss = np.bincount(labels, before.astype(np.int64) - after, classes) / np.maximum(counts, 1)
    if classes > MANY_CLASSES:
        loss = certain_class_loss(before, after, labels, units, classes)
    return np.where(counts > 0, loss, np.nan)


def chi2_quantile(share: float | F64, dimensions: int) -> F64:
    """Return the squared distance from the mean within which `share` of a standard normal distribution lies."""
    quantile: F64 = 2 * special.gammaincinv(dimensions / 2, share)
    return quantile


def binomial_tail(hits: I64 | F64 | int, total: I64 | int, share: float | F64) -> F64:
    """Return P(X >= hits) of X ~ Binomial(total, share); 1 where total is 0.

    Hits may be a fraction (a sum of one share per unit); the tail is then between those of the neighbouring integers.
    """
    some = np.asarray(hits) > 0
    tail: F64 = special.betainc(np.where(some, hits, 1.0), np.maximum(total - hits, 0) + 1, share)
    return np.where(some, tail, 1.0)


def hypergeometric_tail(hits: int, drawn: int, marked: int, total: int) -> float:
    """Return P(X >= hits) for the marked ones among `drawn` of `total` without replacement."""
    from scipy.stats import hypergeom

    return float(hypergeom.sf(hits - 1, total, marked, drawn))


def mcnemar(gained: int, lost: int) -> float:
    """Return McNemar's exact p-value, two-sided, of images or tracks that became right and wrong."""
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def significantly_over(hits: I64 | F64, total: I64, share: float, false_discovery_rate: float) -> Bool:
    """Return which of the shares hits/total are over `share`, (S,): exact binomial tests, Benjamini and Hochberg."""
    return discoveries(binomial_tail(hits, total, share), false_discovery_rate)


def discoveries(p_values: F64, false_discovery_rate: float) -> Bool:
    """Return which of (S,) tests are significant at this rate of false ones among them: Benjamini and Hochberg."""
    from scipy.stats import false_discovery_control

    if not len(p_values):
        return np.zeros(0, np.bool_)
    found: Bool = false_discovery_control(p_values) <= false_discovery_rate + ROUNDING
    return found


def pairs_of(defuse: F64, plain: F64, units: I64) -> I64:
    """Return how many units are labelled, and on how many the first, and the second, is more often right, (3,).

    `defuse` and `plain` (n,) are 1 where right, 0 where wrong, nan where it is not known. A unit counts once, by the
    mean over its pictures.
    """
    change = defuse - plain
    known = np.isfinite(change)
    numbers, of = np.unique(units[known], return_inverse=True)
    total = np.bincount(of, change[known], minlength=len(numbers))
    return np.array([len(numbers), (total > 0).sum(), (total < 0).sum()], np.int64)


def pairs_by_scenario(defuse: F64, plain: F64, units: I64) -> I64:
    """Return the `pairs_of` each scenario, (A, 3), for arrays (A, n)."""
    rows = [pairs_of(*each) for each in zip(defuse, plain, units, strict=True)]
    return np.array(rows, np.int64).reshape(-1, 3)


def least_favourable(pairs: I64) -> I64:
    """Return of the `pairs_of` each plain training, (P, ..., 3), those that speak least for the correction, (..., 3).

    Their p-value of the sign test, one-sided, is the largest.
    """
    _, better, worse = np.moveaxis(pairs, -1, 0)
    tails = binomial_tail(better, better + worse, 0.5)
    # the second key tells +0 −0 from +0 −10
    order = np.lexsort((worse, tails), axis=0)
    found: I64 = np.take_along_axis(pairs, order[-1:, ..., None], axis=0)[0]
    return found


def is_better(pairs: I64) -> Bool:
    """Return on which of the scenarios the correction is significantly better than each plain training, (A,).

    `pairs` (P, A, 3) are those of `pairs_of`. The p-value of a scenario is the largest of its sign tests, one-sided;
    the false discovery rate over the scenarios with enough units is SIGNIFICANT (Benjamini and Hochberg).
    """
    units, better, worse = least_favourable(pairs).T
    found: Bool = np.zeros(len(units), np.bool_)
    tested = is_testable(units)
    found[tested] = significantly_over(better[tested], (better + worse)[tested], 0.5, SIGNIFICANT)
    return found


def is_beyond(right: F64, plain: F64) -> Bool:
    """Return where `right` (A,) is over what 95 of 100 further trainings like `plain` (P, A) would reach, (A,).

    The bound is Student's for one more observation. Trainings that differ in their random numbers alone can differ on a
    scenario by far more than its pictures differ, however many these are. False where P is 1: their spread is unknown.
    """
    trainings = len(plain)
    if trainings < 2:
        return np.zeros(len(right), np.bool_)
    error = plain.std(axis=0, ddof=1) * np.sqrt(1 + 1 / trainings)
    beyond: Bool = right > plain.mean(axis=0) + special.stdtrit(trainings - 1, 0.95) * error
    return beyond


def is_confirmed(pairs: I64, right: F64, plain: F64) -> Bool:
    """Return on which scenarios the correction is better, beyond plain trainings, and right on over half of the images.

    `right` (A,) and `plain` (P, A) are the shares that the correction, and each plain training, is right on.
    """
    return is_better(pairs) & is_beyond(right, plain) & (right > MIN_CONFIRMED)


def is_worse(pairs: I64, right: F64, plain: F64) -> Bool:
    """Return on which scenarios the correction is likewise worse, (A,)."""
    return is_better(swapped(pairs)) & is_beyond(-right, -plain)


def swapped(pairs: I64) -> I64:
    """Return `pairs_of`, (..., 3), of the same classifiers in the other order."""
    return pairs[..., [0, 2, 1]]


def is_testable(units: I64) -> Bool:
    """Return where the sign test could be significant of so many units, if all were better."""
    testable: Bool = 0.5**units < SIGNIFICANT
    return testable


def probability_not_over(hits: I64 | F64, total: I64, share: float) -> F64:
    """Return the posterior probability, under a uniform prior, that the true shares are at most `share`."""
    probability: F64 = special.betainc(hits + 1, total - hits + 1, share)
    return probability


def effective_number(groups: I64, units: I64 | None, count: int) -> F64:
    """Return how many independent draws the rows of each of `count` groups are worth, (count,): Kish's number (1965).

    `groups` (n,) and `units` (n,) are those of the rows. Those of one unit are a single draw; units of unequal size are
    worth fewer draws than there are units, since the largest decide a share of the rows. Without units each row is one.
    """
    sizes: F64 | I64 = np.ones(len(groups))
    if units is not None:
        numbers = np.unique(units, return_inverse=True)[1]
        both, sizes = np.unique(numbers * count + groups, return_counts=True)
        groups = both % count
    total = np.bincount(groups, sizes, count)
    draws: F64 = total**2 / np.maximum(1, np.bincount(groups, sizes**2, count))
    return draws


def share_of_units(hits: float, rows: Bool, units: I64 | None) -> F64:
    """Return the share of `rows` (n,) that are hits, with Wilson's bounds of `effective_number` draws, (3,)."""
    count = int(rows.sum())
    draws = effective_number(np.zeros(count, np.int64), None if units is None else units[rows], 1).item()
    share, low, high = share_with_bounds(hits * draws / max(1, count), draws)
    return np.array([hits / count if count else share, low, high])


def auroc(scores: F64, positive: Bool, units: I64 | None = None) -> F64:
    """Return the area under the ROC curve of (n,) scores with its 95 % interval: value, low, high.

    The interval is the wider, at each end, of two: that of DeLong, DeLong and Clarke-Pearson (1988) on the logit, with
    Student's t, is too narrow for ten or twenty positives near 1; Newcombe's (2006, method 5) is too narrow where both
    kinds are spread unequally. For an area of 0 or 1 the rule of three, 3/n of the rarer kind, takes the place of the
    first. (nan, nan, nan) where one kind is missing. Rows with one number in `units` (n,), such as the photographs of a
    track, are no independent evidence: then the first is Obuchowski's (1997), and units are counted.
    """
    from scipy.stats import rankdata

    ones, zeros = scores[positive], scores[~positive]
    if not len(ones) or not len(zeros) or not np.isfinite(scores).all():
        return np.full(3, np.nan)
    ranks = rankdata(scores)
    above = (ranks[positive] - rankdata(ones)) / len(zeros)  # of each positive: share of negatives below it
    below = 1 - (ranks[~positive] - rankdata(zeros)) / len(ones)
    area = float(above.mean())
    numbers = np.arange(len(scores)) if units is None else np.unique(units, return_inverse=True)[1]
    counts = len(np.unique(numbers[positive])), len(np.unique(numbers[~positive]))
    rarer = min(counts)
    low, high = _newcombe(area, *counts)
    if area in (0.0, 1.0) or rarer < 2:
        bounds = area + np.array([-3, 3]) / rarer
    else:
        of_ones = np.bincount(numbers[positive], above - area, numbers.max() + 1) / len(ones)
        of_zeros = np.bincount(numbers[~positive], below - area, numbers.max() + 1) / len(zeros)
        terms = (of_ones**2, of_zeros**2, 2 * of_ones * of_zeros)
        sizes = (*counts, len(np.unique(numbers)))
        variance = sum(n / (n - 1) * term.sum() for n, term in zip(sizes, terms, strict=True))
        error = np.sqrt(max(0.0, variance))
        half = special.stdtrit(rarer - 1, 0.975) * error / (area * (1 - area))
        bounds = special.expit(special.logit(area) + np.array([-half, half]))
    return np.array([area, max(0.0, min(low, bounds[0])), min(1.0, max(high, bounds[1]))])


def _newcombe(area: float, ones: int, zeros: int) -> tuple[float, float]:
    """Return the areas that the measured one is 1.96 standard errors away from, by Hanley and McNeil's (1982) error."""
    from scipy.optimize import brentq

    mean = (ones + zeros) / 2 - 1

    def distance(true: float) -> float:
        variance = true * (1 - true) * (1 + mean * ((1 - true) / (2 - true) + true / (1 + true)))
        return abs(true - area) - float(special.ndtri(0.975) * np.sqrt(variance / (ones * zeros)))

    inside = min(max(area, 1e-9), 1 - 1e-9)  # at 0 and 1 the error is 0
    return float(brentq(distance, 0.0, inside)), float(brentq(distance, inside, 1.0))
