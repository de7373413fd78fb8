"""§3.2.3: fine-tune f on L(D) + λ·CE(D_f), once per λ."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defuse_core.artifacts import (
    I64,
    Bool,
    Corrections,
    Models,
    SweepRow,
    Trial,
    Weights,
)
from defuse_core.codec import decode, encode
from defuse_core.config import RunFile
from defuse_core.data import Images, Splits
from defuse_core.device import autocast, cpu_threads, is_out_of_memory
from defuse_core.errors import DamagedError, DefuseError, ModelError, StoreError
from defuse_core.intervals import certain_loss
from defuse_core.lambda_choice import after_epoch, may_be_picked
from defuse_core.models import load_classifier, weights_of
from defuse_core.seeds import generator, torch_seed
from defuse_core.store import Store
from defuse_core.training.augment import random_affine
from defuse_core.training.batches import DeviceImages
from defuse_core.training.loop import (
    Adam,
    Losses,
    Optimizer,
    cycle,
    load_optimizer_state,
    minibatches,
    optimizer_state,
    set_learning_rate,
    train_step,
)
from defuse_core.training.precision import right_by_part
from defuse_core.tuning_data import FineTuningData

log = logging.getLogger("defuse")


class TuningSteps:
    """The minibatches of fine-tuning: in each step some images of D and as many of D_f, the same ones for every λ."""

    def __init__(self, spec: RunFile, tuning: FineTuningData) -> None:
        self.spec = spec
        self.clean = DeviceImages(tuning.clean.train, spec.resources.readers)
        self.scenario = DeviceImages(tuning.scenario.d_f)
        # split and sample of the images have streams of their own: every repetition is on the same ones
        self.streams = ("correct", "repetition", tuning.repetition) if tuning.repetition else ("correct",)

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


def new_trial(models: Models, lam: float) -> Trial:
    """Return the trial of λ before its first epoch."""
    return Trial(lam, (), models.classifier, {}, models.classifier, 0, False)


def fine_tune(
    spec: RunFile, models: Models, tuning: FineTuningData, lam: float, trial: Trial | None
) -> Iterator[Trial]:
    """Yield the trial of one λ after each epoch; `trial` resumes one. On one CPU thread, or this process's GPU.

    It ends after correct.epochs, or after an epoch that loses more clean accuracy than correct.stop_at_loss.
    """
    trial = trial or new_trial(models, lam)
    classifier = load_classifier(spec, trial.weights, len(models.classes))
    optimizer = Adam(classifier.parameters(), spec.correct.learning_rate)
    load_optimizer_state(optimizer, trial.moments)
    steps = TuningSteps(spec, tuning)
    for epoch in range(len(trial.rows) + 1, spec.correct.epochs + 1):
        with cpu_threads(1):
            loss = _epoch(spec, classifier, optimizer, steps, lam, epoch)
            row = score(spec, models, classifier, tuning, lam, epoch, loss)
        trial = after_epoch(spec, models, trial, row, weights_of(classifier), optimizer_state(optimizer))
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


def require_progress(before: Weights, classifier: nn.Module, moments: Weights, lam: float) -> None:
    """Raise ModelError where an epoch overflowed or, with λ over 0, left every weight as it was: λ is too large."""
    now = weights_of(classifier)
    finite = all(np.isfinite(array).all() for array in (*now.values(), *moments.values()))
    learned = {name for name, parameter in classifier.named_parameters() if parameter.requires_grad}
    changed = any(not np.array_equal(before[name], now[name]) for name in learned & set(now))
    if finite and (changed or lam == 0):
        return
    what = "changed no weight" if finite else "overflowed"
    raise ModelError(f"training with λ = {lam:g} diverged: an epoch {what}; choose a smaller λ")


def score(
    spec: RunFile,
    models: Models,
    classifier: nn.Module,
    tuning: FineTuningData,
    lam: float,
    epoch: int,
    loss: float,
) -> SweepRow:
    """Return the row of an epoch with this mean loss, with the accuracies of a classifier in eval mode."""
    if not may_be_picked(spec.correct, epoch):
        return SweepRow(lam, epoch, loss)
    clean = tuning.clean.parts()
    parts = {**clean, "tune": tuning.scenario.tune, "scenario": tuning.scenario.held_out}
    right = right_by_part(classifier, parts, spec.resources.arithmetic("answers"))
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
        class_loss=_class_loss(spec, models, tuning.clean, right),
    )


def _class_loss(spec: RunFile, models: Models, clean: Splits, right: Mapping[str, Bool]) -> float:
    """Return the largest accuracy that a class has certainly lost on training and validation images together.

    On validation images alone with vae.decode: anchored: D lacks images at which held-out failures are anchored. Images
    of one track count once.
    """
    counted = {"validation"} if spec.vae.decode == "anchored" else {"train", "validation"}
    classes = len(models.classes)
    before, after = np.zeros(classes), np.zeros(classes)
    counts, units = np.zeros(classes, np.int64), np.zeros(classes, np.int64)
    for part, images in clean.parts().items():
        if part in counted:
            of_each = np.bincount(images.labels, minlength=classes)
            counts += of_each
            units += _units_of_each(images, classes)
            before += of_each * np.nan_to_num(models.class_accuracy[part])
            after += np.bincount(images.labels, right[part], minlength=classes)
    total = np.maximum(counts, 1)
    return float(certain_loss(before / total, after / total, units).max())


def _units_of_each(images: Images, classes: int) -> I64:
    """Return the number of tracks of each class, or of images where they have no tracks, (C,)."""
    labels = images.labels
    if images.tracks is not None:
        labels = np.unique(np.stack([labels, images.tracks]), axis=1)[0]
    return np.bincount(labels, minlength=classes)


def trial_key(lam: float) -> str:
    """Return the key of a trial in the store of its sweep."""
    return f"lam-{lam!r}.safetensors"


def run_trial(
    spec: RunFile, models: Models, tuning: FineTuningData, lam: float, store: Store
) -> Iterator[Trial]:
    """Yield the trial of one λ after each epoch, once `store` holds it; continues the one that is stored there.

    Another process may work on the same trial, one that was given up for lost: fewer epochs never replace more.
    """
    stored = read_trial(store, lam)
    if stored is not None and stored.done:
        yield stored
        return
    for trial in fine_tune(spec, models, tuning, lam, stored):
        write_trial(store, trial)
        yield trial


def write_trial(store: Store, trial: Trial) -> None:
    """Store the trial, unless the store holds as many epochs of its λ or more."""
    unless = partial(_has_epochs, trial.lam, len(trial.rows))
    store.write(trial_key(trial.lam), encode(trial), unless=unless)


def finished_trials(spec: RunFile, store: Store) -> dict[float, Trial]:
    """Return the trials in `store` that are done, by λ."""
    stored = {lam: read_trial(store, lam) for lam in spec.correct.lambdas}
    return {lam: trial for lam, trial in stored.items() if trial is not None and trial.done}


def read_trial(store: Store, lam: float) -> Trial | None:
    """Return the stored trial of λ; None where there is none, and where it is damaged, which is logged."""
    key = trial_key(lam)
    if not store.exists(key):
        return None
    data = store.read(key)
    try:
        return _decode_trial(lam, data, f"{store.address}/{key}")
    except StoreError as error:
        log.warning("correct: %s", error)
        return None


def _decode_trial(lam: float, data: bytes, where: str) -> Trial:
    remedy = "the trial begins again"
    trial = decode(Trial, data, where, remedy)
    if trial.lam != lam:
        raise DamagedError(
            f"{where}: expected the trial of λ = {lam:g}, found that of λ = {trial.lam:g}; {remedy}"
        )
    return trial


def _has_epochs(lam: float, epochs: int, data: bytes) -> bool:
    """Whether `data` is the trial of λ after so many epochs or more."""
    try:
        return len(_decode_trial(lam, data, trial_key(lam)).rows) >= epochs
    except StoreError:
        return False


def nothing_to_tune(fixes: Corrections, reviewed: Images | None) -> bool:
    """Return whether D_f is empty: no scenario was accepted, or no reviewed image is misclassified."""
    return len(fixes.labels) == 0 or (reviewed is not None and len(reviewed) == 0)


def is_trial_failure(error: BaseException) -> bool:
    """Return whether the sweep leaves out a trial with this error: not if images, store or machines failed."""
    machines = isinstance(error, DefuseError | OSError) or is_out_of_memory(error)
    return isinstance(error, ModelError) or not machines
