"""Constructed evidence, without any judge."""

from __future__ import annotations

import numpy as np

from defuse_core.artifacts import F64
from defuse_core.evaluation.describe import NearestReal
from defuse_core.evaluation.evidence import BEFORE, DEFUSE, PLAIN, Evidence
from defuse_core.intervals import is_confirmed


def sample_evidence(own_label: F64, units: int = 256, judges: float = 0.99, before: float = 0.98) -> Evidence:
    """Evidence with the accuracies (A, B) by own label on the scenarios, each on so many labelled units.

    A scenario without an accuracy after plain further training (nan) has no unit that is compared with it. `judges` is
    the accuracy of each of three judges on real images, and `before` that of the classifier.
    """
    count, nothing = len(own_label), np.full(3, np.nan)
    mean = own_label.mean(axis=0) if count else np.full(4, np.nan)
    shares = np.stack([mean, np.maximum(mean - 0.05, 0), np.minimum(mean + 0.05, 1)], axis=1)
    differences = np.nan_to_num(own_label[:, [DEFUSE]] - own_label[:, [PLAIN, BEFORE]])
    gain, change = np.rint(units * differences).astype(np.int64).T
    labelled = np.where(np.isnan(own_label[:, PLAIN]), 0, units)
    # of two plain trainings that do the same
    pairs = np.stack([np.stack([labelled, np.maximum(gain, 0), np.zeros(count, np.int64)], axis=1)] * 2)
    with_before = np.stack([np.full(count, units), np.maximum(change, 0), np.maximum(-change, 0)], axis=1)
    real = np.zeros((count, 1, 1, 32, 32), np.uint8)
    return Evidence(
        judges=np.full(3, judges),
        before_test=before,
        labelled=1.0,
        purity=np.array([0.9, 0.8, 1.0]),
        own_label=shares,
        one_label=shares,
        left_out=shares[[0, 3, 2]],
        wider=np.stack([shares[[0, 3, 2]]] * 2),
        real_failures=shares,
        real_failure_images=200,
        scenario_purity=np.full(count, 0.9),
        scenario_own_label=own_label,
        scenario_left_out=own_label[:, DEFUSE],
        confirmed=is_confirmed(pairs, own_label[:, DEFUSE], np.stack([own_label[:, PLAIN]] * 2)),
        names=("8 read as 3",) * count,
        at_fault=("classifier",) * count,
        real=NearestReal(
            real,
            np.zeros((count, 1), np.int64),
            np.zeros((count, 1), np.int64),
            np.full(count, 0.1),
            0.02,
            np.zeros(count, np.bool_),
            np.ones(count, np.bool_),
            np.full(count, 0.02),
        ),
        krippendorff=0.9,
        screen_recall=nothing,
        pairs=pairs,
        real_failure_pairs=np.array([[200, 60, 20]] * 2),
        worse=np.zeros(count, np.bool_),
        plain_each=np.stack([shares[PLAIN, :1]] * 2, axis=1).repeat(4, axis=0),
        scenario_plain=np.stack([own_label[:, PLAIN]] * 2),
        pairs_with_before=with_before,
        plain_clean=np.array([[0.98, 0.984], [0.982, 0.986]]),
        test_pairs=np.array([[500, 9, 6], [500, 8, 6]]),
        test_pairs_with_before=np.zeros((2, 3), np.int64),
        real_failure_pairs_with_baseline=np.array([200, 30, 25]),
    )
