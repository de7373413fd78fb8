"""§3.2.3: fine-tune f on L(D) + λ·CE(D_f), once per λ; and the rule of choice (section `correct`).

The rule says which epoch of each λ, and then which λ, corrects the classifier.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from defuse_core.artifacts import Bool, FailedTrial, Models, Sweep, SweepRow, Trial, Weights
from defuse_core.config import CorrectSection, RunFile
from defuse_core.device import autocast, cpu_threads
from defuse_core.errors import ComputeError, DefuseError, InputError, ModelError
from defuse_core.intervals import ROUNDING, certain_class_loss
from defuse_core.models import is_as_finite, load_classifier, weights_of
from defuse_core.seeds import generator, torch_seed
from defuse_core.training import (
    Adam,
    Losses,
    cycle,
    load_optimizer_state,
    minibatches,
    optimizer_state,
    set_learning_rate,
    train_step,
)
from defuse_core.training.batches import DeviceImages, random_affine
from defuse_core.training.precision import right_by_part
from defuse_core.tuning_data import FineTuningData

log = logging.getLogger("defuse")
EQUAL_TUNE = 0.01  # gain in accuracy on tuned images that is no reason to lose clean accuracy
SMALLER_LAMBDAS = "add smaller values to correct.lambdas; the run then tunes those alone"
NO_LAMBDA_REMEDY = (
    "add smaller values to correct.lambdas (the run then tunes those alone), unless its report says that λ = 0 costs "
    "too much as well"
)


@dataclass(frozen=True, eq=False)
class FineTuning:
    """What all λ and epochs of one sweep share."""

    spec: RunFile
    models: Models
    data: FineTuningData

    @property
    def rule(self) -> ChoiceRule:
        return ChoiceRule(self.spec.correct, self.models.accuracy)

    def classifier(self, weights: Weights) -> nn.Module:
        """Return the classifier with these weights, in eval mode.

        Raises InputError where this machine cannot make it, such as without one of its packages: the steps before did,
        so that no λ is at fault, and none may be left out for it.
        """
        try:
            return load_classifier(self.spec, weights, len(self.models.classes))
        except ModelError as error:
            raise InputError(f"correct: {error}") from error

    def new_trial(self, lam: float) -> Trial:
        """Return the trial of λ before its first epoch."""
        return Trial(lam, (), self.models.classifier, {}, self.models.classifier, 0, False)

    def score(self, classifier: nn.Module, lam: float, epoch: int, loss: float) -> SweepRow:
        """Return the row of an epoch with this mean loss, with the accuracies of a classifier in eval mode."""
        if not self.rule.needs_score(epoch):
            return SweepRow(lam, epoch, loss)
        scenario = self.data.scenario
        parts = {**self.data.clean.parts(), "tune": scenario.tune, "scenario": scenario.held_out}
        right = right_by_part(classifier, parts, self.spec.resources)
        shares = {name: float(each.mean()) if len(each) else math.nan for name, each in right.items()}
        return SweepRow(
            lam,
            epoch,
            loss,
            train=shares["train"],
            validation=shares.get("validation"),
            test=shares.get("test"),
            tune=shares["tune"],
            scenario=shares["scenario"],
            class_loss=self._class_loss(right),
        )

    def _class_loss(self, right: Mapping[str, Bool]) -> float:
        """Return the largest accuracy, a fraction of 1, that a class certainly lost on a part of data.right_before.

        Each part by itself, since the training images, which are many, lose little. The bound is one of each class,
        part and epoch. Images of one track count once.
        """
        parts, classes = self.data.clean.parts(), len(self.models.classes)
        losses = [
            certain_class_loss(before, right[part], parts[part].labels, parts[part].tracks, classes).max()
            for part, before in self.data.right_before.items()
        ]
        return max(map(float, losses), default=0.0)


class TuningSteps:
    """The minibatches of fine-tuning: in each step some images of D and as many of D_f, the same ones for every λ."""

    def __init__(self, tuning: FineTuning) -> None:
        self.spec, data = tuning.spec, tuning.data
        self.clean = DeviceImages(data.clean.train, self.spec.resources.readers)
        self.scenario = DeviceImages(data.scenario.d_f)
        # split and sample of the images have streams of their own: every repetition is on the same ones
        self.streams = ("correct", "repetition", data.repetition) if data.repetition else ("correct",)

    def epoch(self, epoch: int, optimizer: Optimizer) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield images of D and then of D_f, (2 B, channels, H, W), with their labels, (B,) each, for one pass over D.

        Sets the learning rate of each step, and seeds what the network itself draws, such as dropout.
        """
        section, seeded = self.spec.correct, partial(generator, self.spec.seed, *self.streams)
        torch.manual_seed(torch_seed(self.spec.seed, *self.streams, epoch))  # independent of what ran before
        count, size = len(self.clean), section.batch_size
        scenario_rows = cycle(len(self.scenario), min(size, count), seeded("scenarios", epoch))
        affine_rng = seeded("moves", epoch)
        order = list(minibatches(count, size, seeded(epoch)))
        first, steps = (epoch - 1) * len(order) + 1, section.epochs * len(order)
        for step, (rows, batch, labels) in enumerate(self.clean.batches(order), start=first):
            set_learning_rate(optimizer, section, step, steps)
            wrong = next(scenario_rows)[: len(rows)]  # the last step of an epoch may be shorter
            both = torch.cat([batch, self.scenario.batch(wrong)])
            if section.augment:
                both = random_affine(both, affine_rng)
            yield both, labels, self.scenario.labels(wrong)


def fine_tune(tuning: FineTuning, lam: float, trial: Trial | None) -> Iterator[Trial]:
    """Yield the trial of one λ after each epoch; `trial` resumes one. On one CPU thread, or this process's GPU.

    It ends after correct.epochs, or after an epoch that loses more clean accuracy than correct.stop_at_loss.
    """
    spec, trial = tuning.spec, trial or tuning.new_trial(lam)
    classifier = tuning.classifier(trial.weights)
    optimizer = Adam(classifier.parameters(), spec.correct.learning_rate)
    load_optimizer_state(optimizer, trial.moments)
    steps = TuningSteps(tuning)
    for epoch in range(len(trial.rows) + 1, spec.correct.epochs + 1):
        with cpu_threads(1):
            loss = _epoch(spec, classifier, optimizer, steps, lam, epoch)
            row = tuning.score(classifier, lam, epoch, loss)
        trial = after_epoch(tuning.rule, trial, row, weights_of(classifier), optimizer_state(optimizer))
        yield trial
        if trial.done:
            return


def _epoch(
    spec: RunFile, classifier: nn.Module, optimizer: Optimizer, steps: TuningSteps, lam: float, epoch: int
) -> float:
    """One pass over D, with as many images of D_f in every step. Returns the mean loss.

    Both form one batch, so that batch normalisation sees the mixture of both in training; with λ = 0 it sees D alone.
    """
    classifier.train()
    losses, before = Losses(f"with λ = {lam:g}"), weights_of(classifier)
    count = 0
    for both, labels, wrong in steps.epoch(epoch, optimizer):
        count, size = count + 1, len(labels)
        seen = both if lam else both[:size]
        with autocast(spec.resources.arithmetic("classifier")):
            logits = classifier(seen).float()
        loss = F.cross_entropy(logits[:size], labels)
        if lam:
            loss = loss + lam * F.cross_entropy(logits[size:], wrong)
        train_step(loss, optimizer)
        losses.add(loss)
    if changes_weights(count, optimizer):
        require_progress(before, classifier, optimizer_state(optimizer), lam)
    classifier.eval()
    return losses.mean()[0]


def changes_weights(steps: int, optimizer: Optimizer) -> bool:
    """Return whether an epoch of so many steps changes weights: the last step of a cycle, at a rate of 0, does not."""
    rate: float = optimizer.param_groups[0]["lr"]
    return steps > 1 or rate > 0


def overflowed(before: Weights, after: Weights) -> list[str]:
    """Return the arrays in which NaN or infinity is new."""
    return [name for name, array in after.items() if not is_as_finite(array, before[name])]


def require_progress(before: Weights, classifier: nn.Module, moments: Weights, lam: float) -> None:
    """Raise ModelError where an epoch overflowed or, with λ over 0, left every weight as it was: λ is too large."""
    now = weights_of(classifier)
    finite = all(np.isfinite(array).all() for array in moments.values()) and not overflowed(before, now)
    learned = {name for name, parameter in classifier.named_parameters() if parameter.requires_grad}
    changed = any(not np.array_equal(before[name], now[name]) for name in learned & set(now))
    if finite and (changed or lam == 0):
        return
    what = "changed no weight" if finite else "overflowed"
    raise ModelError(f"training with λ = {lam:g} diverged: an epoch {what}")


@dataclass(frozen=True)
class ChoiceRule:
    """Which epoch of each λ, and which λ, is chosen, and which λ ends early. Uses no held-out scenario or test images.

    choose_by tune: where tune accuracies are equal, the clean accuracy decides. Two epochs are equal in whole percent
    (`rank`), since each is compared with the best one before it. All λ are compared at once: those within EQUAL_TUNE of
    the highest are equal (`best`).
    """

    section: CorrectSection
    before: Mapping[str, float]  # accuracy of the classifier before, by part

    def needs_score(self, epoch: int) -> bool:
        """Whether the epoch may be picked, or section `correct` asks what each epoch loses."""
        section = self.section
        last_alone = section.schedule == "one_cycle" or section.choose_by == "last"
        return epoch == section.epochs or not last_alone or section.stop_at_loss is not None

    def allows(self, row: SweepRow) -> bool:
        """Whether the row may be picked: choose_by tune bounds the loss, over all classes and of each."""
        if self.section.choose_by != "tune":
            return True
        of_a_class = row.class_loss > self.section.class_loss_allowed + ROUNDING
        return not (of_a_class or self._loses_more(row, self.section.max_loss))

    def gives_up(self, row: SweepRow) -> bool:
        """Whether λ ends after the epoch of the row. Other trials play no part, so that results stay the same."""
        limit = self.section.stop_at_loss
        return limit is not None and self._loses_more(row, limit)

    def _loses_more(self, row: SweepRow, limit: float) -> bool:
        """Whether more clean accuracy is lost (validation, or train without one) than `limit`, a fraction of 1."""
        split = "train" if row.validation is None else "validation"
        return self.before[split] - _clean(row) > limit + ROUNDING

    def rank(self, row: SweepRow) -> tuple[float, ...]:
        """Return what is maximised over the epochs of a λ.

        An epoch before the last of a cycle is no candidate: its learning rate has not fallen yet.
        """
        if self.section.choose_by == "last":
            return (row.epoch,)
        epoch = row.epoch if self.section.schedule == "one_cycle" else 0
        if self.section.choose_by != "tune":
            return (epoch, getattr(row, self.section.choose_by))
        if not self.allows(row):
            return (epoch, 0.0, _clean(row), _tune(row))  # 0.0 and 1.0: allowed rows first
        return (epoch, 1.0, round(_tune(row), 2), _clean(row), _tune(row))

    def best_rows(self, rows: Sequence[SweepRow]) -> list[SweepRow]:
        """Return for each λ, ascending, the row of the epoch that is picked; the earlier of equals."""
        by_lam: dict[float, list[SweepRow]] = {}
        for row in rows:
            if row.is_scored:
                by_lam.setdefault(row.lam, []).append(row)
        return [max(by_lam[lam], key=self.rank) for lam in sorted(by_lam)]

    def choose(self, trials: Sequence[Trial]) -> Trial:
        """Return the trial that is picked by the best epoch of each; the first of equals."""
        allowed = [trial for trial in trials if self.allows(_best_row(trial))]
        if self.section.choose_by != "tune" or not allowed:
            return max(trials, key=lambda trial: self.rank(_best_row(trial)))
        enough = max(_tune(_best_row(trial)) for trial in allowed) - EQUAL_TUNE - ROUNDING
        as_good = [trial for trial in allowed if _tune(_best_row(trial)) >= enough]
        return max(as_good, key=lambda trial: (_clean(_best_row(trial)), _tune(_best_row(trial))))


def no_lambda_chosen(tuned: int, failed: int) -> str:
    """Return why no λ is chosen, as a clause: `failed` of them failed, and the `tuned` others cost too much."""
    costs = "more clean accuracy than correct.max_loss and max_class_loss allow"
    if not failed:
        return f"every λ costs {costs}"
    return f"{failed} of {tuned + failed} λ failed, and {tuned} cost{'s' if tuned == 1 else ''} {costs}"


def _best_row(trial: Trial) -> SweepRow:
    return trial.rows[trial.best_epoch - 1]


def _clean(row: SweepRow) -> float:
    """Return the accuracy on images that no scenario is drawn from: validation, or train without one."""
    found = row.train if row.validation is None else row.validation
    assert found is not None  # the row is scored
    return found


def _tune(row: SweepRow) -> float:
    assert row.tune is not None  # the row is scored
    return row.tune


def after_epoch(rule: ChoiceRule, trial: Trial, row: SweepRow, weights: Weights, moments: Weights) -> Trial:
    """Return the trial with one more epoch, which `row` scores and after which the rest is the state of training."""
    best, best_epoch = trial.best, trial.best_epoch
    if row.is_scored and (not best_epoch or rule.rank(row) > rule.rank(_best_row(trial))):
        best, best_epoch = weights, row.epoch
    epochs, hopeless = rule.section.epochs, rule.gives_up(row)
    if hopeless and row.epoch < epochs:
        log.info("correct: λ = %g is given up after epoch %d of %d", trial.lam, row.epoch, epochs)
    done = hopeless or row.epoch == epochs
    state = ({}, {}) if done else (weights, moments)
    return Trial(trial.lam, (*trial.rows, row), *state, best, best_epoch, done)


def collect_sweep(
    spec: RunFile,
    models: Models,
    trials: Sequence[Trial],
    failures: Mapping[float, DefuseError],
    *,
    comparison: str = "",
) -> Sweep:
    """Return the sweep with the weights that the rule of choice picks over all λ; the smaller λ of equals.

    Nothing is picked where no λ keeps the clean accuracy within correct.max_loss and max_class_loss (choose_by tune).
    `comparison` is what the trials are, such as the baseline, where the correction is only compared with them.
    `failures` holds the error of each λ that is left out, which is logged. Raises ModelError or ComputeError if all
    failed, unless they are a comparison, which is left out then.
    """
    failed = tuple(FailedTrial(lam, str(error)) for lam, error in sorted(failures.items()))
    whose = f" of {comparison}" if comparison else ""
    for each in failed:
        log.warning("correct: the trial%s with λ = %g failed for good: %s", whose, each.lam, each.cause)
    if failures and not trials and not comparison:
        kind = ModelError if all(isinstance(e, ModelError) for e in failures.values()) else ComputeError
        remedy = f"; {SMALLER_LAMBDAS}" if kind is ModelError else ""
        raise kind(f"correct: every trial failed; λ = {failed[0].lam:g}: {failed[0].cause}{remedy}")
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
    rule = ChoiceRule(spec.correct, models.accuracy)
    picked = rule.choose(ordered)
    chosen = _best_row(picked)
    if not rule.allows(chosen):
        log.warning(
            "correct: %s: %s (max_loss %g; significantly more than %g of one class)%s",
            f"{comparison} has no result" if comparison else "NO λ CHOSEN",
            no_lambda_chosen(len(ordered), len(failed)),
            spec.correct.max_loss,
            spec.correct.class_loss_allowed,
            "" if comparison else f"; {NO_LAMBDA_REMEDY}",
        )
        return Sweep(rows, None, {}, failed)
    return Sweep(rows, chosen, picked.best, failed)
