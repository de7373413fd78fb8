"""Corrections that evidence holds the chosen one against: plain further training, and tuning without a fold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from defuse_core.artifacts import I64, Bool, Corrections, Sweep
from defuse_core.config import RunFile
from defuse_core.distill.draws import in_region
from defuse_core.evaluation.evaluate import Findings
from defuse_core.review.verdicts import most_common_errors

# Trainings with λ = 0. One alone is no measure: another order of the minibatches may turn half of a scenario's images.
PLAIN_TRAININGS = 3


@dataclass(frozen=True, eq=False)
class Controls:
    """Corrections that only evidence needs."""

    plain: tuple[Sweep, ...]  # P of λ = 0, which differ in their random numbers alone; never empty
    folds: tuple[Sweep, ...]  # each tuned without its fold's scenarios; empty with fewer than two scenarios


def plain_spec(spec: RunFile, sweep: Sweep) -> RunFile:
    """Return the run file of plain further training: λ = 0 for as many epochs as the chosen correction."""
    return _fine_tuning(spec, 0.0, sweep)


def plain_names() -> tuple[str, ...]:
    """Return the names of the plain trainings in a run, (P,); the place of each is the repetition that it is."""
    return ("plain", *(f"plain_{number}" for number in range(1, PLAIN_TRAININGS)))


def fold_spec(spec: RunFile, sweep: Sweep) -> RunFile:
    """Return the run file of a correction without one fold: the chosen λ and epochs."""
    assert sweep.chosen is not None
    return _fine_tuning(spec, sweep.chosen.lam, sweep)


def _fine_tuning(spec: RunFile, lam: float, sweep: Sweep) -> RunFile:
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
