"""Whether a correction does more than plain further training (λ = 0) does, on the same pictures.

Components were accepted since the classifier before is wrong there, so that nearly every other model is better than it
on them. Plain further training shows what they owe to the scenarios. What one such training does on a scenario depends
on the order of its minibatches, so that there are P of them, and the correction is held against each.
"""

from __future__ import annotations

import numpy as np

from defuse_core.artifacts import F64, I64, Anchors, Bool
from defuse_core.data import Images
from defuse_core.intervals import SIGNIFICANT, binomial_tail, significantly_over

# share of a scenario's held-out images over which a correction is right where it is confirmed
MIN_CONFIRMED = 0.5


def units_of(anchors: Anchors | None, anchor: I64 | None, count: int) -> I64:
    """Return a number for each of `count` pictures, (count,); those with the same one are no independent evidence.

    It is that of the track that a picture is anchored at, of the image where images have no tracks, and its own with
    plain decoding. `anchor` holds indices into `anchors`.
    """
    if anchors is None or anchor is None:
        return np.arange(count)
    return anchors.unit[anchor.reshape(-1)]


def tracks_of(images: Images) -> I64:
    """Return the number of each image's track, (N,); its own where images have no tracks."""
    return np.arange(len(images)) if images.tracks is None else images.tracks


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
