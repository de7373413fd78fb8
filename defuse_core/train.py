"""Train the classifier f and the β-VAE (Appendix B), and measure both."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defuse_core.artifacts import F64, Health, Models
from defuse_core.checkpoint import (
    Training,
    labels_of,
    minibatches,
    train_step,
)
from defuse_core.config import RunFile, VaeSection
from defuse_core.data import Images, Splits, open_splits
from defuse_core.device import cpu_threads, device, device_name
from defuse_core.errors import ModelError, RunFileError
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
    ResNet18,
    Vae,
    accuracy,
    build_classifier,
    build_vae,
    expect_autoencoder,
    kl_to_prior,
    predict,
    read_weights,
    set_weights,
    to_device,
    to_tensor,
    weights_of,
)
from defuse_core.progress import Progress
from defuse_core.seeds import generator, torch_seed
from defuse_core.store import Store

log = logging.getLogger("defuse")


def train(spec: RunFile, store: Store | None = None, *, progress: Progress) -> Models:
    """Return f and the β-VAE, trained or loaded from files, with their accuracies and the β-VAE's reconstructions.

    With a store, an interrupted training resumes from its last checkpoint and reaches the same weights.
    """
    on_disk = open_splits(spec.data, spec.seed)
    _expect_validation(spec, on_disk)
    vae = _initial_vae(
        spec, on_disk.train
    )  # first: a β-VAE that does not fit fails before anything is trained
    splits = on_disk.loaded()  # every part: an unreadable image fails now, not after the training
    with cpu_threads(spec.resources.train_threads):
        classifier, classifier_history = train_classifier(spec, splits, store, progress)
        vae_history = train_vae(spec, vae, splits, store, progress)
        accuracies = _accuracies(classifier, splits)
        if spec.classifier.epochs == 0 and accuracies["train"] < 0.5:
            log.warning(
                "the classifier from classifier.weights is right on only %.0f %% of the training images; does it "
                "number the classes in this order? %s",
                100 * accuracies["train"],
                ", ".join(splits.classes),
            )
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
            **_measure_vae(spec, classifier, vae, splits),
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


def _measure_vae(spec: RunFile, classifier: nn.Module, vae: Vae, splits: Splits) -> VaeFigures:
    probe = splits.train.take(slice(0, PROBE_IMAGES))
    errors, answers = reconstruction_errors(classifier, vae, probe)
    kl = mean_kl(vae, probe)
    health = measure_health(spec, probe.labels, predict(classifier, probe), answers, kl)
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
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Return the classifier and one row per epoch. Returns the last epoch or the best on validation (keep)."""
    section = spec.classifier
    torch.manual_seed(torch_seed(spec.seed, "classifier"))
    classifier = build_classifier(spec, len(splits.classes))
    _load_pretrained(classifier, section.weights, section.epochs > 0)
    _expect_logits(classifier, splits)
    to_device(classifier)
    training = Training(classifier, _optimizer(spec, classifier), store, "classifier", splits.fingerprint())
    for epoch in training.epochs(section.epochs):
        loss = _classifier_epoch(training, splits.train, spec, epoch, progress)
        row = {"epoch": epoch + 1.0, "loss": loss}
        if splits.validation is not None:
            row["validation"] = accuracy(classifier.eval(), splits.validation)
        before = max((past.get("validation", 0.0) for past in training.history), default=-1.0)
        if section.keep == "best_validation" and row["validation"] > before:
            training.best = weights_of(classifier)
        training.history.append(row)
        log.info("classifier epoch %d of %d: %s", epoch + 1, section.epochs, _format_row(row))
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


def _initial_vae(spec: RunFile, train: Images) -> Vae:
    """Return the β-VAE before its training: initialised from the seed, with vae.weights, or custom."""
    torch.manual_seed(torch_seed(spec.seed, "vae"))
    vae = build_vae(spec)
    _load_pretrained(vae, spec.vae.weights, spec.vae.epochs > 0)
    expect_autoencoder(vae.eval(), torch.from_numpy(train.batch(slice(0, 2))), spec.vae.latent_dim)
    return vae.train()


def train_vae(
    spec: RunFile, vae: Vae, splits: Splits, store: Store | None, progress: Progress
) -> list[dict[str, float]]:
    """Train the β-VAE; return one row per epoch (reconstruction and KL in nats per image)."""
    section = spec.vae
    head = _class_head(spec, len(splits.classes)) if section.class_weight else None
    trained = to_device(vae if head is None else nn.ModuleDict({"vae": vae, "head": head}))
    optimizer = torch.optim.Adam(trained.parameters(), lr=section.learning_rate, fused=True)
    training = Training(trained, optimizer, store, "vae", splits.fingerprint())
    for epoch in training.epochs(section.epochs):
        row = _vae_epoch(vae.train(), head, training, splits.train, spec, epoch, progress)
        training.history.append(row)
        log.log(
            logging.INFO if epoch + 1 == section.epochs else logging.DEBUG,
            "β-VAE epoch %d of %d: %s",
            epoch + 1,
            section.epochs,
            _format_row(row),
        )
    vae.eval()
    return training.history


def _class_head(spec: RunFile, classes: int) -> nn.Module:
    """Return a linear classifier of latent codes. It shapes the codes during training and is not kept."""
    torch.manual_seed(torch_seed(spec.seed, "vae", "head"))
    return nn.Linear(spec.vae.latent_dim, classes)


def _vae_epoch(
    vae: Vae,
    head: nn.Module | None,
    training: Training,
    images: Images,
    spec: RunFile,
    epoch: int,
    progress: Progress,
) -> dict[str, float]:
    section, count = spec.vae, len(images)
    noise = torch.Generator(device()).manual_seed(torch_seed(spec.seed, "vae", "noise", epoch))
    batches = list(minibatches(count, section.batch_size, generator(spec.seed, "vae", epoch)))
    done, rows_of_terms, beta = epoch * count, [], 0.0
    for step, rows in enumerate(batches, start=epoch * len(batches) + 1):
        beta = section.beta * min(1.0, step / max(1, section.kl_warmup_steps))
        _set_learning_rate(training.optimizer, section, step, section.epochs * len(batches))
        terms = vae_terms(vae, to_tensor(images.batch(rows)), noise)
        loss = terms.reconstruction + beta * terms.divergence
        figures = {"reconstruction": terms.reconstruction.item(), "kl": terms.divergence.item()}
        if head is not None:
            class_loss = F.cross_entropy(head(terms.codes), labels_of(images, rows))
            loss = loss + section.class_weight * class_loss
            figures["class"] = class_loss.item()
        train_step(loss, training.optimizer, "the β-VAE")
        rows_of_terms.append(figures)
        done += len(rows)
        progress("training the β-VAE", done, section.epochs * count, "images")
    means = {name: float(np.mean([row[name] for row in rows_of_terms])) for name in rows_of_terms[0]}
    return {"epoch": epoch + 1.0, **means, "beta": beta}


def _set_learning_rate(optimizer: torch.optim.Optimizer, section: VaeSection, step: int, steps: int) -> None:
    """Set the learning rate of step 1 to `steps`. It depends on nothing else, so a resumed training needs no state."""
    if section.schedule == "constant":
        return
    rising = max(1, steps // 10)
    falling = max(0, step - rising) / max(1, steps - rising)  # share of the steps after the rise
    share = min(1.0, step / rising) * 0.5 * (1 + math.cos(math.pi * falling))
    for group in optimizer.param_groups:
        group["lr"] = section.learning_rate * share


class VaeTerms(NamedTuple):
    """The terms of the β-VAE's loss, in nats per image, and the codes that they were computed with."""

    reconstruction: Tensor  # -E log p(x|z), Bernoulli
    divergence: Tensor  # KL(q(z|x) || p(z))
    codes: Tensor  # (n, Z) drawn from q(z|x)


def vae_terms(vae: Vae, images: Tensor, noise: torch.Generator) -> VaeTerms:
    """Return the terms of the loss on (n, channels, H, W) images."""
    mu, log_variance = vae.encode(images)
    codes = mu + torch.exp(0.5 * log_variance) * torch.randn(mu.shape, generator=noise, device=mu.device)
    logits = vae.decode_logits(codes)
    reconstruction = F.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)
    return VaeTerms(reconstruction, kl_to_prior(mu, log_variance).sum() / len(images), codes)


def _optimizer(spec: RunFile, module: nn.Module) -> torch.optim.Optimizer:
    if spec.classifier.optimizer == "adadelta":
        return torch.optim.Adadelta(module.parameters(), lr=spec.classifier.learning_rate)
    return torch.optim.Adam(module.parameters(), lr=spec.classifier.learning_rate, fused=True)


def _load_pretrained(module: nn.Module, path: Path | None, trained_on: bool) -> None:
    if path is not None:
        weights = read_weights(path)
        if isinstance(module, ResNet18):
            weights = module.with_own_names(weights, new_head=trained_on)
        set_weights(module, weights, str(path))


def _expect_logits(classifier: nn.Module, splits: Splits) -> None:
    """Raise ModelError unless the classifier returns one logit per class for each image."""
    sample = torch.from_numpy(splits.train.batch(slice(0, 2)))
    try:
        found = tuple(classifier.eval()(sample).shape)
    except Exception as error:
        raise ModelError(
            f"the classifier cannot take images of shape {tuple(sample.shape)}: {error}"
        ) from error
    expected = (len(sample), len(splits.classes))
    if found != expected:
        raise ModelError(
            f"the classifier: expected logits of shape {expected} (images, classes), found {found}"
        )


def _accuracies(classifier: nn.Module, splits: Splits) -> dict[str, float]:
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    return {name: accuracy(classifier, images) for name, images in parts.items() if images is not None}


def _format_row(row: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "epoch")
