"""Train the classifier f and the β-VAE (Appendix B), and measure both."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defuse_core.artifacts import F64, Models
from defuse_core.checkpoint import (
    Training,
    labels_of,
    minibatches,
    train_step,
)
from defuse_core.config import RunFile
from defuse_core.data import Images, Splits, open_splits
from defuse_core.device import cpu_threads, device, device_name
from defuse_core.errors import ModelError, RunFileError
from defuse_core.models import (
    ResNet18,
    Vae,
    accuracy,
    build_classifier,
    build_vae,
    decode_codes,
    encode_images,
    map_batches,
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
PROBE_IMAGES = 10_000  # training images that the β-VAE's figures are measured on
PROBE_BATCH = 256


def train(spec: RunFile, store: Store | None = None, *, progress: Progress) -> Models:
    """Return f and the β-VAE, trained or loaded from files, with their accuracies and the β-VAE's reconstructions.

    With a store, an interrupted training resumes from its last checkpoint and reaches the same weights.
    """
    on_disk = open_splits(spec.data, spec.seed)
    _expect_validation(spec, on_disk)
    vae = _initial_vae(spec)  # first: weights that do not fit fail before anything is trained
    splits = on_disk.loaded()  # every part: an unreadable image fails now, not after the training
    with cpu_threads(spec.resources.train_threads):
        classifier, classifier_history = train_classifier(spec, splits, store, progress)
        vae_history = train_vae(spec, vae, splits, store, progress)
        probe = splits.train.take(slice(0, PROBE_IMAGES))
        reconstruction, flips = _reconstruction_errors(classifier, vae, probe)
        accuracies = _accuracies(classifier, splits)
        if spec.classifier.epochs == 0 and accuracies["train"] < 0.5:
            log.warning(
                "the classifier from classifier.weights is right on only %.0f %% of the training images; does it "
                "number the classes in this order? %s",
                100 * accuracies["train"],
                ", ".join(splits.classes),
            )
        return Models(
            classifier=weights_of(classifier),
            vae=weights_of(vae),
            classes=splits.classes,
            images=splits.counts(),
            data_fingerprint=splits.fingerprint(),
            accuracy=accuracies,
            classifier_history=tuple(classifier_history),
            vae_history=tuple(vae_history),
            reconstruction=reconstruction,
            reconstruction_flips=flips,
            kl_per_dimension=_kl_per_dimension(vae, probe),
            device=device_name(),
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


def _initial_vae(spec: RunFile) -> Vae:
    """Return the β-VAE before its training: initialised from the seed, or with vae.weights."""
    torch.manual_seed(torch_seed(spec.seed, "vae"))
    vae = build_vae(spec)
    _load_pretrained(vae, spec.vae.weights, spec.vae.epochs > 0)
    return vae


def train_vae(
    spec: RunFile, vae: Vae, splits: Splits, store: Store | None, progress: Progress
) -> list[dict[str, float]]:
    """Train the β-VAE; return one row per epoch (reconstruction and KL in nats per image)."""
    section = spec.vae
    to_device(vae)
    optimizer = torch.optim.Adam(vae.parameters(), lr=section.learning_rate, fused=True)
    training = Training(vae, optimizer, store, "vae", splits.fingerprint())
    for epoch in training.epochs(section.epochs):
        row = _vae_epoch(vae, training, splits.train, spec, epoch, progress)
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


def _vae_epoch(
    vae: Vae, training: Training, images: Images, spec: RunFile, epoch: int, progress: Progress
) -> dict[str, float]:
    section, count = spec.vae, len(images)
    noise = torch.Generator(device()).manual_seed(torch_seed(spec.seed, "vae", "noise", epoch))
    batches = list(minibatches(count, section.batch_size, generator(spec.seed, "vae", epoch)))
    done, terms, beta = epoch * count, [], 0.0
    for step, rows in enumerate(batches, start=epoch * len(batches) + 1):
        beta = section.beta * min(1.0, step / max(1, section.kl_warmup_steps))
        reconstruction, divergence = vae_terms(vae, to_tensor(images.batch(rows)), noise)
        train_step(reconstruction + beta * divergence, training.optimizer, "the β-VAE")
        terms.append((reconstruction.item(), divergence.item()))
        done += len(rows)
        progress("training the β-VAE", done, section.epochs * count, "images")
    means = np.mean(terms, axis=0)
    return {"epoch": epoch + 1.0, "reconstruction": float(means[0]), "kl": float(means[1]), "beta": beta}


def vae_terms(vae: Vae, images: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the two terms of the β-VAE's loss, in nats per image: -E log p(x|z) (Bernoulli) and KL(q(z|x) || p(z))."""
    mu, log_variance = vae.encode(images)
    codes = mu + torch.exp(0.5 * log_variance) * torch.randn(mu.shape, generator=noise, device=mu.device)
    logits = vae.decode_logits(codes)
    reconstruction = F.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)
    return reconstruction, kl_to_prior(mu, log_variance).sum() / len(images)


def kl_to_prior(mu: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(q || N(0, 1)) per image and latent dimension, (n, Z), in nats."""
    return 0.5 * (mu.square() + log_variance.exp() - log_variance - 1)


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


def _reconstruction_errors(classifier: nn.Module, vae: Vae, images: Images) -> tuple[float, float]:
    """Return the mean squared error per pixel of decoding mu, and the share of decodings that f gets wrong."""
    errors, flips = [], []
    for start in range(0, len(images), PROBE_BATCH):  # so that memory does not grow with the images' size
        shown = images.take(slice(start, start + PROBE_BATCH))
        decoded = decode_codes(vae, encode_images(vae, shown))
        squares = (decoded - shown.batch(slice(0, len(shown)))) ** 2
        errors.append(squares.mean(axis=(1, 2, 3), dtype=np.float64))
        flips.append(predict(classifier, decoded) != shown.labels)
    return float(np.concatenate(errors).mean()), float(np.concatenate(flips).mean())


def _kl_per_dimension(vae: Vae, images: Images) -> F64:
    per_image = map_batches(
        lambda rows: kl_to_prior(*vae.encode(to_tensor(images.batch(rows)))), len(images), 256
    )
    per_dimension: F64 = per_image.mean(axis=0, dtype=np.float64)
    return per_dimension


def _format_row(row: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "epoch")
