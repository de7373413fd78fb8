"""Corrections that evidence holds the chosen one against: plain further training (λ = 0), and tuning without a fold.

Components were accepted since the classifier before is wrong there, so that nearly every other model is better than it
on them. Plain further training shows what they owe to the scenarios. What one such training does on a scenario depends
on the order of its minibatches, so that there are P of them, and the correction is held against each, on the same
pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from defuse_core.artifacts import F64, I64, Anchors, Bool, Corrections, Sweep
from defuse_core.config import RunFile
from defuse_core.distill.draws import in_region
from defuse_core.evaluation.evaluate import Findings
from defuse_core.intervals import MIN_CONFIRMED, SIGNIFICANT, binomial_tail, significantly_over
from defuse_core.review.verdicts import most_common_errors

# Names in a run of the trainings with λ = 0; the place of each is the repetition that it is. One training alone is no
# measure: another order of the minibatches may turn half of a scenario's images.
PLAIN_NAMES = ("plain", "plain_1", "plain_2")
PLAIN_TRAININGS = len(PLAIN_NAMES)


@dataclass(frozen=True, eq=False)
class Controls:
    """Corrections that only evidence needs."""

    plain: tuple[Sweep, ...]  # P of λ = 0, which differ in their random numbers alone; never empty
    folds: tuple[Sweep, ...]  # each tuned without its fold's scenarios; empty with fewer than two scenarios


def control_spec(spec: RunFile, lam: float, sweep: Sweep) -> RunFile:
    """Return the run file of a control with this λ, for as many epochs as the chosen correction."""
    epochs = sweep.chosen.epoch if sweep.chosen else spec.correct.epochs
    return spec.with_fields("correct", lambdas=(lam,), epochs=epochs, choose_by="last", stop_at_loss=None)


def folds(fixes: Corrections, sweep: Sweep) -> Sequence[int]:
    """Return the numbers of the folds: none with fewer than two accepted scenarios, or without a correction."""
    return (0, 1) if len(fixes.labels) > 1 and sweep.chosen is not None else ()


def fold_of(fixes: Corrections) -> I64:
    """Return which of the two folds each accepted scenario belongs to, (A,)."""
    return np.arange(len(fixes.labels)) % 2


def has_same_confusion_in_other_fold(fixes: Corrections, errors: I64) -> Bool:
    """Return the accepted scenarios whose label and most common wrong answer one of the other fold has, too, (A,)."""
    confusions = np.stack([fixes.labels, errors], axis=1)  # (A, 2)
    alike = (confusions[:, None] == confusions).all(axis=2)  # (A, A)
    fold = fold_of(fixes)
    found: Bool = (alike & (fold[:, None] != fold)).any(axis=1)
    return found


def without_fold(found: Findings, fold: int) -> Corrections:
    """Return the corrections of all scenarios outside `fold`, without the unreviewed failures near one of it.

    Near are codes in its region or with its confusion, and the others of the source images, or tracks, of these codes.
    """
    fixes, left_out = found.fixes, fold_of(found.fixes) == fold
    kept = fixes.take(np.flatnonzero(~left_out))
    codes = fixes.unreviewed
    if codes is None:
        return kept
    errors = most_common_errors(found.gallery, found.verdicts, fixes.scenario)
    near = np.zeros(len(codes), np.bool_)
    for row in np.flatnonzero(left_out):
        near |= in_region(found.scenarios, int(fixes.scenario[row]), codes.codes)
        near |= (codes.truth == fixes.labels[row]) & (codes.predicted == errors[row])
    return replace(kept, unreviewed=codes.take(~np.isin(codes.unit, codes.unit[near])))


def units_of(anchors: Anchors | None, anchor: I64 | None, count: int) -> I64:
    """Return a number for each of `count` pictures, (count,); those with the same one are no independent evidence.

    It is that of the track that a picture is anchored at, of the image where images have no tracks, and its own with
    plain decoding. `anchor` holds indices into `anchors`.
    """
    if anchors is None or anchor is None:
        return np.arange(count)
    return anchors.unit[anchor.reshape(-1)]


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
    order = np.lexsort((worse - better, tails), axis=0)
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


def is_confirmed(pairs: I64, right: F64) -> Bool:
    """Return on which scenarios the correction is better, and right on over half of the images: `right` is (A,)."""
    confirmed: Bool = is_better(pairs) & (right > MIN_CONFIRMED)
    return confirmed


def is_worse(pairs: I64) -> Bool:
    """Return likewise on which scenarios each plain training is significantly better than the correction, (A,)."""
    return is_better(pairs[..., [0, 2, 1]])


def is_testable(units: I64) -> Bool:
    """Return where the sign test could be significant of so many units, if all were better."""
    testable: Bool = 0.5**units < SIGNIFICANT
    return testable
