"""The rule of choice (section `correct`): which epoch of each λ, and then which λ, corrects the classifier."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from defuse_core.artifacts import FailedTrial, Models, Sweep, SweepRow, Trial, Weights
from defuse_core.config import CorrectSection, RunFile
from defuse_core.errors import ComputeError, DefuseError, ModelError
from defuse_core.intervals import ROUNDING

log = logging.getLogger("defuse")
EQUAL_TUNE = 0.01  # so much accuracy on tuned images is no reason to lose clean accuracy
SMALLER_LAMBDAS = "add smaller values to correct.lambdas; the run then tunes those alone"


def may_be_picked(section: CorrectSection, epoch: int) -> bool:
    """Whether the rule of choice may pick the epoch, or section `correct` asks what each epoch loses."""
    last_alone = section.schedule == "one_cycle" or section.choose_by == "last"
    return epoch == section.epochs or not last_alone or section.stop_at_loss is not None


def after_epoch(
    spec: RunFile, models: Models, trial: Trial, row: SweepRow, weights: Weights, moments: Weights
) -> Trial:
    """Return the trial with one more epoch, which `row` scores and after which the rest is the state of training."""
    rows, best, best_epoch = (*trial.rows, row), trial.best, trial.best_epoch
    if row.is_scored and (
        not best_epoch or _rank(spec, models, row) > _rank(spec, models, rows[best_epoch - 1])
    ):
        best, best_epoch = weights, row.epoch
    epochs, hopeless = spec.correct.epochs, _is_hopeless(spec, models, row)
    if hopeless and row.epoch < epochs:
        log.info("correct: λ = %g is given up after epoch %d of %d", trial.lam, row.epoch, epochs)
    done = hopeless or row.epoch == epochs
    state = ({}, {}) if done else (weights, moments)
    return Trial(trial.lam, rows, *state, best, best_epoch, done)


def collect_sweep(
    spec: RunFile,
    models: Models,
    trials: Sequence[Trial],
    failures: Mapping[float, DefuseError] | None = None,
    *,
    comparison: str = "",
) -> Sweep:
    """Return the sweep with the weights that the rule of choice picks over all λ; the smaller λ of equals.

    Nothing is picked where no λ keeps the clean accuracy within correct.max_loss and max_class_loss (choose_by tune).
    `comparison` is what the trials are, such as the baseline, where the correction is only compared with them.
    `failures` holds the error of each λ that is left out, which is logged. Raises ModelError or ComputeError if all
    failed, unless they are a comparison, which is left out then.
    """
    failed = tuple(FailedTrial(lam, str(error)) for lam, error in sorted((failures or {}).items()))
    whose = f" of {comparison}" if comparison else ""
    for each in failed:
        log.warning("correct: the trial%s with λ = %g failed for good: %s", whose, each.lam, each.cause)
    if failures and not trials and not comparison:
        kind = ModelError if all(isinstance(e, ModelError) for e in failures.values()) else ComputeError
        raise kind(f"correct: every trial{whose} failed; λ = {failed[0].lam:g}: {failed[0].cause}")
    for trial in trials:
        if not trial.done:
            raise ComputeError(
                f"correct: expected a finished trial with λ = {trial.lam:g}, found {len(trial.rows)} of "
                f"{spec.correct.epochs} epochs; run again to continue it"
            )
    ordered = sorted(trials, key=lambda trial: trial.lam)
    rows = tuple(row for trial in ordered for row in trial.rows)
    if not ordered:
        return Sweep(rows, None, {}, failed)
    best = _best_trial(spec, models, ordered)
    chosen = best.rows[best.best_epoch - 1]
    if not _is_allowed(spec, models, chosen):
        log.warning(
            "correct: %s, since every λ loses more than correct.max_loss = %g of the clean accuracy, or certainly "
            "more than %g of that of a class (correct.max_class_loss)%s",
            f"{comparison} has no result" if comparison else "NOTHING IS CHOSEN",
            spec.correct.max_loss,
            spec.correct.class_loss_allowed,
            "" if comparison else f"; {SMALLER_LAMBDAS}",
        )
        return Sweep(rows, None, {}, failed)
    return Sweep(rows, chosen, best.best, failed)


def best_rows(spec: RunFile, models: Models, rows: Sequence[SweepRow]) -> list[SweepRow]:
    """Return for each λ, ascending, the row of the epoch that the rule of choice picks; the earlier of equals."""
    by_lam: dict[float, list[SweepRow]] = {}
    for row in rows:
        if row.is_scored:
            by_lam.setdefault(row.lam, []).append(row)
    return [max(by_lam[lam], key=lambda row: _rank(spec, models, row)) for lam in sorted(by_lam)]


def _rank(spec: RunFile, models: Models, row: SweepRow) -> tuple[float, ...]:
    """Return what the rule of choice maximises over the epochs of a λ. Held-out scenario and test images play no part.

    choose_by tune: tune accuracies that are equal in whole percent count as equal, and the clean accuracy decides.
    An epoch before the last of a cycle is no candidate: its learning rate has not fallen yet.
    """
    if spec.correct.choose_by == "last":
        return (row.epoch,)
    epoch = row.epoch if spec.correct.schedule == "one_cycle" else 0
    if spec.correct.choose_by != "tune":
        return (epoch, getattr(row, spec.correct.choose_by))
    if not _is_allowed(spec, models, row):
        return (epoch, 0.0, _clean(row), _tune(row))
    return (epoch, 1.0, round(_tune(row), 2), _clean(row), _tune(row))


def _best_trial(spec: RunFile, models: Models, trials: Sequence[Trial]) -> Trial:
    """Return the trial that the rule of choice picks by the best epoch of each; the first of equals.

    choose_by tune: of the λ whose tune accuracy is within EQUAL_TUNE of the highest, the one of highest clean accuracy.
    """

    def best_row(trial: Trial) -> SweepRow:
        return trial.rows[trial.best_epoch - 1]

    allowed = [trial for trial in trials if _is_allowed(spec, models, best_row(trial))]
    if spec.correct.choose_by != "tune" or not allowed:
        return max(trials, key=lambda trial: _rank(spec, models, best_row(trial)))
    enough = max(_tune(best_row(trial)) for trial in allowed) - EQUAL_TUNE - ROUNDING
    as_good = [trial for trial in allowed if _tune(best_row(trial)) >= enough]
    return max(as_good, key=lambda trial: (_clean(best_row(trial)), _tune(best_row(trial))))


def _clean(row: SweepRow) -> float:
    """Return the accuracy on images that no scenario is drawn from: validation, or train without one."""
    found = row.train if row.validation is None else row.validation
    assert found is not None  # the row is scored
    return found


def _tune(row: SweepRow) -> float:
    assert row.tune is not None  # the row is scored
    return row.tune


def _is_allowed(spec: RunFile, models: Models, row: SweepRow) -> bool:
    """Whether the rule of choice may pick the row: choose_by tune bounds the loss, over all classes and of each."""
    if spec.correct.choose_by != "tune":
        return True
    of_a_class = row.class_loss > spec.correct.class_loss_allowed + ROUNDING
    return not (of_a_class or _loses_more(models, row, spec.correct.max_loss))


def _is_hopeless(spec: RunFile, models: Models, row: SweepRow) -> bool:
    """Whether λ is given up after the epoch of the row. Other trials play no part, so that results stay the same."""
    limit = spec.correct.stop_at_loss
    return limit is not None and _loses_more(models, row, limit)


def _loses_more(models: Models, row: SweepRow, limit: float) -> bool:
    """Whether more clean accuracy is lost (validation, or train without one) than `limit`, a fraction of 1."""
    split = "train" if row.validation is None else "validation"
    return models.accuracy[split] - _clean(row) > limit + ROUNDING
