"""Whether a correction does more than plain further training (λ = 0) does, on the same pictures.

Components were accepted since the classifier before is wrong there, so that nearly every other model is better than it
on them. Plain further training shows what they owe to the scenarios.
"""

from __future__ import annotations

import numpy as np

from defuse_core.artifacts import F64, I64, Anchors, Bool
from defuse_core.data import Images
from defuse_core.intervals import SIGNIFICANT, binomial_tail


def units_of(anchors: Anchors | None, anchor: I64 | None, train: Images, count: int) -> I64:
    """Return a number for each of `count` pictures, (count,); those with the same one are no independent evidence.

    It is that of the track that a picture is anchored at, of the image where images have no tracks, and its own with
    plain decoding. `anchor` holds indices into `anchors`.
    """
    if anchors is None or anchor is None:
        return np.arange(count)
    return tracks_of(train)[anchors.source[anchor.reshape(-1)]]


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


def is_better(pairs: I64) -> Bool:
    """Return which rows of (A, 3) `pairs_of` are significantly more often right, (A,): a sign test, one-sided."""
    better: Bool = binomial_tail(pairs[:, 1], pairs[:, 1] + pairs[:, 2], 0.5) < SIGNIFICANT
    return better


def is_testable(units: int) -> bool:
    """Whether `is_better` could be true of so many units, if all were better."""
    return bool(0.5**units < SIGNIFICANT)
