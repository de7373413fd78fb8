"""Controls of evidence: corrections that the chosen one is compared with.

They are plain further training (λ = 0), and tuning without a fold. Components are accepted because the classifier
before fails on them, so almost any other model does better there. The gain over plain further training comes from the
scenarios. The result of one such training on a scenario depends on the order of its minibatches, so there are P of
them, and the correction is compared with each, on the same pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from defuse_core.artifacts import I64, Bool, Corrections, Sweep
from defuse_core.config import RunFile
from defuse_core.device import cpu_threads
from defuse_core.distill.draws import in_any_region
from defuse_core.evaluation import Findings
from defuse_core.review.verdicts import most_common_errors


@dataclass(frozen=True, eq=False)
class Controls:
    """Corrections that only evidence needs."""

    plain: tuple[Sweep, ...]  # P of λ = 0, which differ in their random numbers alone; never empty
    folds: tuple[Sweep, ...]  # each tuned without its fold's scenarios; empty with fewer than two scenarios

    @property
    def finished_plain(self) -> tuple[Sweep, ...]:
        """The plain trainings but those that failed for good; all if each did."""
        return tuple(sweep for sweep in self.plain if sweep.has_correction) or self.plain


def control_spec(spec: RunFile, lam: float, sweep: Sweep) -> RunFile:
    """Return the run file of a control with this λ, for as many epochs as the chosen correction."""
    epochs = sweep.chosen.epoch if sweep.chosen else spec.correct.epochs
    return spec.with_fields("correct", lambdas=(lam,), epochs=epochs, choose_by="last", stop_at_loss=None)


def folds(fixes: Corrections, sweep: Sweep) -> Sequence[int]:
    """Return the numbers of the folds: none with fewer than two accepted scenarios, or without a correction."""
    return (0, 1) if len(fixes.labels) > 1 and sweep.has_correction else ()


def fold_of(fixes: Corrections) -> I64:
    """Return which of the two folds each accepted scenario belongs to, (A,)."""
    return np.arange(len(fixes.labels)) % 2


def has_known_confusion(found: Findings, errors: I64) -> Bool:
    """Return the accepted scenarios whose label and wrong answer one has that is tuned on without them, (A,).

    `errors` (A,) are their most common wrong answers.
    """
    fixes = found.fixes
    confusions = np.stack([fixes.labels, errors], axis=1)  # (A, 2)
    fold, known = fold_of(fixes), np.zeros(len(errors), np.bool_)
    for number in (0, 1):
        tuned = np.isin(fixes.scenario, _outside(found, number).scenario)
        alike = (confusions[:, None] == confusions[tuned]).all(axis=2)
        known |= (fold == number) & alike.any(axis=1)
    return known


@cpu_threads(1)
def without_fold(found: Findings, fold: int) -> Corrections:
    """Return the corrections of all scenarios outside `fold`, without what is near one of it.

    Of the draws to tune on those are near that lie in its region. Of the unreviewed failures also those with its
    confusion, and the others of the source images, or tracks, of these codes.
    """
    fixes, kept = found.fixes, _outside(found, fold)
    codes = fixes.unreviewed
    if codes is None:
        return kept
    left_out = np.flatnonzero(fold_of(fixes) == fold)
    errors = most_common_errors(found.gallery, found.verdicts, fixes.scenario)
    near = in_any_region(found.scenarios, fixes.scenario[left_out], codes.codes)
    for row in left_out:
        near |= (codes.truth == fixes.labels[row]) & (codes.predicted == errors[row])
    return replace(kept, unreviewed=codes.take(~np.isin(codes.unit, codes.unit[near])))


def _outside(found: Findings, fold: int) -> Corrections:
    """Return the corrections of the scenarios outside `fold`, without draws to tune on in the region of one inside.

    The other draws of a scenario take their places, in turn. A scenario without another draw is left out, too.
    """
    inside = fold_of(found.fixes) == fold
    fixes, left_out = found.fixes.take(np.flatnonzero(~inside)), found.fixes.scenario[inside]
    accepted, count, dims = fixes.tune.shape
    near = in_any_region(found.scenarios, left_out, fixes.tune.reshape(-1, dims))
    away = ~near.reshape(accepted, count)
    rows = np.flatnonzero(away.any(axis=1))
    places = np.array([np.resize(np.flatnonzero(away[row]), count) for row in rows], np.int64)
    places = places.reshape(len(rows), count)  # (A, n_tune)
    kept, anchor = fixes.take(rows), None
    if kept.tune_anchor is not None:
        anchor = np.take_along_axis(kept.tune_anchor, places, axis=1)
    return replace(kept, tune=np.take_along_axis(kept.tune, places[..., None], axis=1), tune_anchor=anchor)
