"""Train the classifier f and the β-VAE (Appendix B), and measure both."""

from __future__ import annotations

import logging
from typing import TypedDict

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from defuse_core.artifacts import F64, ClassifierEpoch, Health, Models
from defuse_core.checkpoint import Training, format_row, labels_of, minibatches, train_step
from defuse_core.config import RunFile
from defuse_core.data import Images, Splits, log_parts, open_splits
from defuse_core.device import cpu_threads, device_name
from defuse_core.errors import RunFileError
from defuse_core.health import (
    PROBE_IMAGES,
    STRIP_KEY,
    log_health,
    mean_kl,
    measure_health,
    reconstruction_errors,
    reconstruction_strip,
)
from defuse_core.models import (
    Vae,
    accuracy,
    build_classifier,
    check_outputs,
    load_pretrained,
    log_classifier,
    predict,
    set_weights,
    to_device,
    to_tensor,
    weights_of,
)
from defuse_core.progress import Progress
from defuse_core.seeds import generator, torch_seed
from defuse_core.store import Store
from defuse_core.train_vae import initial_vae, train_vae

log = logging.getLogger("defuse")


def train(spec: RunFile, store: Store | None = None, *, progress: Progress) -> Models:
    """Return f and the β-VAE, trained or loaded from files, with their accuracies and the β-VAE's reconstructions.

    With a store, an interrupted training resumes from its last checkpoint and reaches the same weights.
    """
    on_disk = open_splits(spec.data, spec.seed)
    _expect_validation(spec, on_disk)
    log_parts(spec.data, on_disk)
    vae = initial_vae(spec, on_disk.train)  # first: one that does not fit fails before anything is trained
    splits = on_disk.loaded()  # every part: an unreadable image fails now, not after the training
    with cpu_threads(spec.resources.train_threads):
        classifier, classifier_history = train_classifier(spec, splits, store, progress)
        accuracies = _accuracies(classifier, splits)
        if spec.classifier.epochs == 0:
            log_classifier(spec, classifier, splits, accuracies)
        vae_history = train_vae(spec, vae, splits, store, progress)
        models = Models(
            classifier=weights_of(classifier),
            vae=weights_of(vae),
            classes=splits.classes,
            images=splits.counts(),
            data_fingerprint=splits.fingerprint(),
            accuracy=accuracies,
            classifier_history=tuple(classifier_history),
            vae_history=tuple(vae_history),
            device=device_name(),
            **_measure_vae(classifier, vae, splits),
        )
        if store is not None:
            store.write(STRIP_KEY, reconstruction_strip(vae, splits.train))
    return models


class VaeFigures(TypedDict):
    """The fields of Models that describe the trained β-VAE."""

    reconstruction: float
    reconstruction_flips: float
    kl_per_dimension: F64
    health: Health


def _measure_vae(classifier: nn.Module, vae: Vae, splits: Splits) -> VaeFigures:
    probe = splits.train.take(slice(0, PROBE_IMAGES))
    errors, answers = reconstruction_errors(classifier, vae, probe)
    kl = mean_kl(vae, probe)
    health = measure_health(probe.labels, predict(classifier, probe), answers, kl)
    log_health(health, splits.classes)
    return VaeFigures(
        reconstruction=float(errors.mean()),
        reconstruction_flips=1 - health.reconstructions_right,
        kl_per_dimension=kl,
        health=health,
    )


def _expect_validation(spec: RunFile, splits: Splits) -> None:
    """Raise RunFileError for a choice that needs validation images where the data set has none."""
    for field, value in (
        ("classifier.keep", spec.classifier.keep),
        ("correct.choose_by", spec.correct.choose_by),
    ):
        if "validation" in value and splits.validation is None:
            raise RunFileError(
                f"{field}: {value} needs validation images and this data set has none; "
                "set data.validation_share, or choose by something else"
            )
    wanted = spec.correct.train_images
    if (
        spec.correct.choose_by == "tune"
        and splits.validation is None
        and wanted
        and wanted < len(splits.train)
    ):
        raise RunFileError(
            "correct.train_images: a sample of the training images is too small to measure the clean accuracy that "
            "correct.max_loss bounds, and this data set has no validation images; set data.validation_share"
        )


def train_classifier(
    spec: RunFile, splits: Splits, store: Store | None, progress: Progress
) -> tuple[nn.Module, list[ClassifierEpoch]]:
    """Return the classifier and one row per epoch. Returns the last epoch or the best on validation (keep)."""
    section = spec.classifier
    torch.manual_seed(torch_seed(spec.seed, "classifier"))
    classifier = build_classifier(spec, len(splits.classes))
    load_pretrained(classifier, section.weights, section.epochs > 0)
    to_device(classifier)
    check_outputs(classifier, section, splits.train, len(splits.classes))
    training = Training(classifier, _optimizer(spec, classifier), store, "classifier", splits.fingerprint())
    for epoch in training.epochs(section.epochs):
        loss = _classifier_epoch(training, splits.train, spec, epoch, progress)
        validation = None if splits.validation is None else accuracy(classifier.eval(), splits.validation)
        row = ClassifierEpoch(epoch + 1, loss, validation)
        before = max((past.validation or 0.0 for past in training.history), default=-1.0)
        if section.keep == "best_validation" and validation is not None and validation > before:
            training.best = weights_of(classifier)
        training.history.append(row)
        log.info("classifier epoch %d of %d: %s", epoch + 1, section.epochs, format_row(row))
    if training.best:
        set_weights(classifier, training.best, "the best epoch")
    return classifier.eval(), training.history


def _classifier_epoch(
    training: Training, images: Images, spec: RunFile, epoch: int, progress: Progress
) -> float:
    classifier, size = training.module.train(), spec.classifier.batch_size
    torch.manual_seed(torch_seed(spec.seed, "classifier", epoch))  # for the dropout of a custom classifier
    total = spec.classifier.epochs * len(images)
    done, losses = epoch * len(images), []
    for rows in minibatches(len(images), size, generator(spec.seed, "classifier", epoch)):
        loss = F.cross_entropy(classifier(to_tensor(images.batch(rows))), labels_of(images, rows))
        losses.append(train_step(loss, training.optimizer, "the classifier"))
        done += len(rows)
        progress("training the classifier", done, total, "images")
    return float(np.mean(losses))


def _optimizer(spec: RunFile, module: nn.Module) -> torch.optim.Optimizer:
    if spec.classifier.optimizer == "adadelta":
        return torch.optim.Adadelta(module.parameters(), lr=spec.classifier.learning_rate)
    return torch.optim.Adam(module.parameters(), lr=spec.classifier.learning_rate, fused=True)


def _accuracies(classifier: nn.Module, splits: Splits) -> dict[str, float]:
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    return {name: accuracy(classifier, images) for name, images in parts.items() if images is not None}
