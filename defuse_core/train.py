"""Train the classifier f and the β-VAE (Appendix B), and measure both."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from defuse_core.artifacts import F64, I64, Bool, ClassifierEpoch, Models
from defuse_core.config import RunFile
from defuse_core.data import Images, Splits, expect_whole_files, log_parts, open_splits
from defuse_core.data.splits import class_counts
from defuse_core.device import autocast, cpu_threads, device_name
from defuse_core.errors import RunFileError
from defuse_core.evaluation.health import (
    STRIP_KEY,
    health_after_training,
    log_health,
    mean_kl,
    probe_images,
    reconstruction_errors,
    reconstruction_strip,
)
from defuse_core.evaluation.undecided import never_right, why_guessing
from defuse_core.intervals import class_accuracy, only_guesses
from defuse_core.models import (
    EXTERNAL,
    build_classifier,
    check_outputs,
    expect_rows,
    expect_trainable,
    load_pretrained,
    log_classifier,
    set_weights,
    to_device,
    weights_of,
)
from defuse_core.protocols import Call, Compute, Progress
from defuse_core.seeds import generator, torch_seed
from defuse_core.store import Store
from defuse_core.training import Adam, Losses, Training, format_row, minibatches, train_step
from defuse_core.training.batches import (
    DeviceImages,
    averaged,
    group_size,
    seed_dropout,
    worker_minibatches,
    worker_number,
)
from defuse_core.training.precision import right_by_part
from defuse_core.training.train_vae import initial_vae, train_vae

log = logging.getLogger("defuse")


def train(spec: RunFile, store: Store, *, progress: Progress) -> Models:
    """Return f and the β-VAE, trained, resumed or loaded, with their accuracies and the β-VAE's reconstructions.

    An interrupted training resumes from its last checkpoint in `store` and reaches the same weights.
    """
    on_disk = _open_parts(spec)
    if not _trains_both(spec):
        log_parts(spec.data, on_disk)
    vae = initial_vae(spec, on_disk.train)  # first: one that does not fit fails before anything is trained
    splits = on_disk.loaded()  # every part: an unreadable image fails now, not after the training
    _expect_whole_before_training(splits, store, "classifier", "vae")
    with cpu_threads(spec.resources.train_threads):
        classifier, classifier_history = train_classifier(spec, splits, store, progress)
        accuracies, class_accuracies = _accuracies(spec, classifier, splits)
        if spec.classifier.epochs == 0:
            log_classifier(spec, classifier, splits, accuracies)
        if missed := never_right(class_accuracies, class_counts(splits), splits.classes):
            log.warning("train: %s", missed)
        vae_history = train_vae(spec, vae, splits, store, progress)
        probe = probe_images(splits.train)
        errors, answers = reconstruction_errors(classifier, vae, probe)
        kl = mean_kl(vae, probe)
        health = health_after_training(spec, classifier, vae, probe, answers, kl)
        log_health(health, splits.classes)
        models = Models(
            classifier=weights_of(classifier),
            vae=weights_of(vae),
            classes=splits.classes,
            images=splits.counts(),
            data_fingerprint=splits.fingerprint(),
            accuracy=accuracies,
            class_accuracy=class_accuracies,
            classifier_history=tuple(classifier_history),
            vae_history=tuple(vae_history),
            device=device_name(),
            reconstruction=float(errors.mean()),
            reconstruction_flips=1 - float((answers == probe.labels).mean()),
            kl_per_dimension=kl,
            health=health,
            validation_from_training=spec.classifier.epochs == 0 and splits.validation_held_out,
            class_images=class_counts(splits),
        )
        if guessing := why_guessing(models):
            log.warning("train: %s", guessing)
        store.write(STRIP_KEY, reconstruction_strip(spec, vae, splits.train))
    return models


def train_side_by_side(
    spec: RunFile, store: Store, compute: Compute, others: Sequence[Call[Any]] = ()
) -> Models:
    """Return what `train` does. Classifier, β-VAE and `others` are tasks that run at the same time where they fit.

    Classifier and β-VAE leave their last checkpoints in `store`, from which `train` goes on. A classifier that is not
    trained is checked by `train` before the β-VAE is trained there. Where one training uses all CPUs
    (resources.train_threads), they follow one another.
    """
    trainings = [(train_part, spec, store, part) for part in ("vae", "classifier")]
    if spec.resources.train_workers > 1:
        for training, epochs in zip(trainings, (spec.vae.epochs, spec.classifier.epochs), strict=True):
            if epochs > 0:
                compute.run_distributed("train", *training)
    elif _trains_both(spec):
        compute.tasks("train", [*(Call(*training) for training in trainings), *others])  # the longest first
    elif others:
        models: Models = compute.tasks("train", [Call(train, spec, store), *others])[0]
        return models
    # loads the last checkpoint of what was trained above, trains the rest, and measures all
    return compute.task("train", train, spec, store)


def _trains_both(spec: RunFile) -> bool:
    return spec.classifier.epochs > 0 and spec.vae.epochs > 0


def train_part(
    spec: RunFile, store: Store, part: Literal["classifier", "vae"], *, progress: Progress
) -> None:
    """Train the classifier or the β-VAE up to its last checkpoint in `store`."""
    on_disk = _open_parts(spec)
    vae = initial_vae(spec, on_disk.train)  # in both: one that does not fit fails before anything is trained
    with cpu_threads(spec.resources.train_threads):
        if part == "vae":
            # A classifier of the user's own that does not fit fails before the β-VAE's hours.
            if spec.classifier.weights is not None or spec.classifier.architecture in EXTERNAL:
                initial_classifier(spec, on_disk.train, len(on_disk.classes))
            splits = on_disk.loaded("train")
            _expect_whole_before_training(splits, store, part)
            train_vae(spec, vae, splits, store, progress)
            return
        log_parts(spec.data, on_disk)
        splits = on_disk.loaded()
        if not _trains_both(spec):  # else it is done beside the β-VAE
            _expect_whole_before_training(splits, store, part)
        train_classifier(spec, splits, store, progress)


def _open_parts(spec: RunFile) -> Splits:
    """Return the parts of the data set. Raises DataError or RunFileError for what would end the step later."""
    on_disk = open_splits(spec.data, spec.seed)
    _expect_validation(spec, on_disk)
    return on_disk


def _expect_whole_before_training(splits: Splits, store: Store, *parts: str) -> None:
    """Raise DataError for files that cannot be read later, unless the training of one of `parts` goes on.

    Each worker takes its share.
    """
    if not any(store.exists(f"training/{part}.safetensors") for part in parts):
        expect_whole_files(splits, slice(worker_number(), None, group_size()))


def _expect_validation(spec: RunFile, splits: Splits) -> None:
    """Raise RunFileError for a choice that needs validation images where the data set has none."""
    kept = spec.classifier.keep if spec.classifier.epochs else ""  # nothing is trained, so nothing is kept
    for field, value in (("classifier.keep", kept), ("correct.choose_by", spec.correct.choose_by)):
        if "validation" in value and splits.validation is None:
            raise RunFileError(
                f"{field}: {value} needs validation images and this data set has none; "
                "set data.validation_share, or choose by something else"
            )
    wanted = spec.correct.train_images
    bounded = spec.correct.choose_by == "tune" or spec.correct.stop_at_loss is not None
    if not bounded or splits.validation is not None:
        return
    if wanted and wanted < len(splits.train):
        field, why = "correct.train_images", "a sample of the training images is too small to measure"
    elif spec.vae.decode == "anchored":
        field, why = (
            "vae.decode: anchored",
            "training images that pictures are anchored at are left out, which changes",
        )
    else:
        return
    raise RunFileError(
        f"{field}: {why} the clean accuracy that correct.max_loss and stop_at_loss bound, and this data set has no "
        "validation images; set data.validation_share"
    )


def initial_classifier(spec: RunFile, train: Images, classes: int) -> nn.Module:
    """Return the classifier before its training: initialised from the seed, with classifier.weights, or custom."""
    torch.manual_seed(torch_seed(spec.seed, "classifier"))
    classifier = build_classifier(spec, classes)
    load_pretrained(classifier, spec.classifier.weights, spec.classifier.epochs > 0)
    to_device(classifier)
    check_outputs(classifier, spec.classifier, train, classes)
    expect_trainable(classifier, train)
    return classifier


def train_classifier(
    spec: RunFile, splits: Splits, store: Store, progress: Progress
) -> tuple[nn.Module, list[ClassifierEpoch]]:
    """Return the classifier and one row per epoch. Returns the last epoch or the best on validation (keep)."""
    section = spec.classifier
    classifier = initial_classifier(spec, splits.train, len(splits.classes))
    training = Training(classifier, _optimizer(spec, classifier), store, "classifier", splits.fingerprint())
    images = DeviceImages(splits.train, spec.resources.readers)
    loss_of = averaged(classifier, partial(classifier_loss, spec, classifier))
    for epoch in training.epochs(section.epochs):
        row = ClassifierEpoch(epoch + 1, _classifier_epoch(training, loss_of, images, spec, epoch, progress))
        if splits.validation is not None:
            right = right_by_part(classifier.eval(), {"validation": splits.validation}, spec.resources)
            row = _with_validation(row, right["validation"], splits.validation.labels, len(splits.classes))
        if section.keep == "best_validation" and _is_better(row, training.history):
            training.best = weights_of(classifier)
        training.history.append(row)
        log.info("classifier epoch %d of %d: %s", epoch + 1, section.epochs, format_row(row))
    if training.best:
        set_weights(classifier, training.best, "the best epoch")
    return classifier.eval(), training.history


def _with_validation(row: ClassifierEpoch, right: Bool, labels: I64, classes: int) -> ClassifierEpoch:
    counts = np.bincount(labels, minlength=classes)
    guessing = only_guesses(class_accuracy(right, labels, classes), counts)
    return replace(row, validation=float(right.mean()), guesses=guessing)


def _is_better(row: ClassifierEpoch, history: Sequence[ClassifierEpoch]) -> bool:
    """Whether an epoch has a higher validation accuracy than those before.

    One that only guesses is worse than any other: its accuracy can be the highest where nearly all images are of one
    class.
    """
    kept = [(not each.guesses, each.validation or 0.0) for each in history]
    return row.validation is not None and (not row.guesses, row.validation) > max(kept, default=(False, -1.0))


def classifier_loss(spec: RunFile, classifier: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy on (n, channels, H, W) images. Raises ModelError unless there are n logits."""
    with autocast(spec.resources.arithmetic("classifier")):
        logits = classifier(images)
    expect_rows(len(logits), len(labels))
    return F.cross_entropy(logits.float(), labels)


def _classifier_epoch(
    training: Training,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    images: DeviceImages,
    spec: RunFile,
    epoch: int,
    progress: Progress,
) -> float:
    """Train for one epoch, counted from 0; return the mean loss of its steps, in nats."""
    training.module.train()
    seed_dropout(spec.seed, "classifier", "dropout", epoch)
    total = spec.classifier.epochs * len(images)
    done, losses = epoch * len(images), Losses("the classifier")
    order = minibatches(len(images), spec.classifier.batch_size, generator(spec.seed, "classifier", epoch))
    for part, batch, labels in worker_minibatches(images, order):
        loss = part.weighted(loss_of(batch, labels))
        train_step(loss, training.optimizer)
        losses.add(loss)
        done += part.count
        progress("training the classifier", done, total, "images")
    return losses.mean()[0]


def _optimizer(spec: RunFile, module: nn.Module) -> Optimizer:
    if spec.classifier.optimizer == "adadelta":
        return torch.optim.Adadelta(module.parameters(), lr=spec.classifier.learning_rate)
    return Adam(module.parameters(), spec.classifier.learning_rate)


def _accuracies(
    spec: RunFile, classifier: nn.Module, splits: Splits
) -> tuple[dict[str, float], dict[str, F64]]:
    """Return the share of the images of each part that the classifier gets right, and of each class, (C,)."""
    right = right_by_part(classifier, splits.parts(), spec.resources)
    classes = len(splits.classes)
    shares = {
        name: class_accuracy(right[name], images.labels, classes) for name, images in splits.parts().items()
    }
    return {name: float(each.mean()) for name, each in right.items()}, shares
