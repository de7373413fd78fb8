"""Train the classifier f and the β-VAE (Appendix B), and measure both."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defuse_core.artifacts import F64, I64, ClassifierEpoch, Health, Models, ReferenceSet, VaeEpoch
from defuse_core.checkpoint import Training, format_row, labels_of, minibatches, train_step
from defuse_core.config import RunFile, VaeSection
from defuse_core.data import Images, Splits, log_parts, open_splits
from defuse_core.device import cpu_threads, device, device_name
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
    build_vae,
    check_outputs,
    expect_autoencoder,
    kl_to_prior,
    load_pretrained,
    log_classifier,
    predict,
    set_weights,
    to_device,
    to_tensor,
    weights_of,
)
from defuse_core.progress import Progress
from defuse_core.reference_models import augment, load_reference_models
from defuse_core.seeds import generator, torch_seed
from defuse_core.store import Store

log = logging.getLogger("defuse")


def initial_vae(spec: RunFile, train: Images) -> Vae:
    """Return the β-VAE before its training: initialised from the seed, with vae.weights, or custom."""
    torch.manual_seed(torch_seed(spec.seed, "vae"))
    vae = build_vae(spec)
    load_pretrained(vae, spec.vae.weights, spec.vae.epochs > 0)
    expect_autoencoder(vae.eval(), torch.from_numpy(train.batch(slice(0, 2))), spec.vae.latent_dim)
    return vae.train()


def train_vae(
    spec: RunFile,
    vae: Vae,
    splits: Splits,
    store: Store | None,
    progress: Progress,
    guides: Sequence[nn.Module] = (),
) -> list[VaeEpoch]:
    """Train the β-VAE; return one row per epoch (reconstruction and KL in nats per image).

    `guides` are the classifiers that vae.guide_weight asks about the decodings. They are not trained.
    """
    section = spec.vae
    head = _class_head(spec, len(splits.classes)) if section.class_weight else None
    trained = to_device(vae if head is None else nn.ModuleDict({"vae": vae, "head": head}))
    optimizer = torch.optim.Adam(trained.parameters(), lr=section.learning_rate, fused=True)
    training = Training(trained, optimizer, store, "vae", splits.fingerprint())
    for guide in guides:
        guide.requires_grad_(False)
    trainer = _VaeTrainer(spec, vae.train(), head, tuple(guides), optimizer, splits.train, progress)
    for epoch in training.epochs(section.epochs):
        row = trainer.epoch(epoch)
        training.history.append(row)
        log.log(
            logging.INFO if epoch + 1 == section.epochs else logging.DEBUG,
            "β-VAE epoch %d of %d: %s",
            epoch + 1,
            section.epochs,
            format_row(row),
        )
    vae.eval()
    return training.history


def _class_head(spec: RunFile, classes: int) -> nn.Module:
    """Return a linear classifier of latent codes. It shapes the codes during training and is not kept."""
    torch.manual_seed(torch_seed(spec.seed, "vae", "head"))
    return nn.Linear(spec.vae.latent_dim, classes)


@dataclass(frozen=True)
class _VaeTrainer:
    """What every epoch of the β-VAE's training uses."""

    spec: RunFile
    vae: Vae
    head: nn.Module | None
    guides: tuple[nn.Module, ...]  # each step asks one of them, in turn
    optimizer: torch.optim.Optimizer
    images: Images
    progress: Progress

    def epoch(self, epoch: int) -> VaeEpoch:
        """Train for one epoch, counted from 0, and return its figures."""
        spec, section, count = self.spec, self.spec.vae, len(self.images)
        noise = torch.Generator(device()).manual_seed(torch_seed(spec.seed, "vae", "noise", epoch))
        views = generator(spec.seed, "vae", "guide", epoch)
        batches = list(minibatches(count, section.batch_size, generator(spec.seed, "vae", epoch)))
        done, losses, beta = epoch * count, [], 0.0
        for step, rows in enumerate(batches, start=epoch * len(batches) + 1):
            beta = section.beta * min(1.0, step / max(1, section.kl_warmup_steps))
            set_learning_rate(self.optimizer, section, step, section.epochs * len(batches))
            losses.append(self._step(rows, step, beta, noise, views))
            done += len(rows)
            self.progress("training the β-VAE", done, section.epochs * count, "images")
        reconstruction, divergence, class_loss, guide_loss = np.mean(losses, axis=0).tolist()
        return VaeEpoch(
            epoch + 1,
            reconstruction,
            divergence,
            beta,
            None if self.head is None else class_loss,
            guide_loss if self.guides else None,
        )

    def _step(
        self, rows: I64, step: int, beta: float, noise: torch.Generator, views: np.random.Generator
    ) -> tuple[float, float, float, float]:
        """Take one step; return reconstruction, KL, and the cross-entropies of class head and guide (0 without)."""
        section, labels = self.spec.vae, labels_of(self.images, rows)
        terms = vae_terms(self.vae, to_tensor(self.images.batch(rows)), noise)
        loss, class_loss, guide_loss = terms.reconstruction + beta * terms.divergence, 0.0, 0.0
        if self.head is not None:
            cross_entropy = F.cross_entropy(self.head(terms.codes), labels)
            loss, class_loss = loss + section.class_weight * cross_entropy, cross_entropy.item()
        if self.guides:
            decodings = augment(torch.sigmoid(terms.logits), views)
            cross_entropy = F.cross_entropy(self.guides[step % len(self.guides)](decodings), labels)
            loss, guide_loss = loss + section.guide_weight * cross_entropy, cross_entropy.item()
        train_step(loss, self.optimizer, "the β-VAE")
        return terms.reconstruction.item(), terms.divergence.item(), class_loss, guide_loss


def set_learning_rate(optimizer: torch.optim.Optimizer, section: VaeSection, step: int, steps: int) -> None:
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
    logits: Tensor  # (n, channels, H, W) decoded from the codes


def vae_terms(vae: Vae, images: Tensor, noise: torch.Generator) -> VaeTerms:
    """Return the terms of the loss on (n, channels, H, W) images."""
    mu, log_variance = vae.encode(images)
    codes = mu + torch.exp(0.5 * log_variance) * torch.randn(mu.shape, generator=noise, device=mu.device)
    logits = vae.decode_logits(codes)
    reconstruction = F.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)
    return VaeTerms(reconstruction, kl_to_prior(mu, log_variance).sum() / len(images), codes, logits)


def train(
    spec: RunFile,
    store: Store | None = None,
    references: ReferenceSet | None = None,
    *,
    progress: Progress,
) -> Models:
    """Return f and the β-VAE, trained or loaded from files, with their accuracies and the β-VAE's reconstructions.

    `references` are the reference models, which vae.guide_weight asks. With a store, an interrupted training resumes
    from its last checkpoint and reaches the same weights.
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
        vae_history = train_vae(spec, vae, splits, store, progress, _guides(spec, splits, references))
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


def _guides(spec: RunFile, splits: Splits, references: ReferenceSet | None) -> list[nn.Module]:
    if not spec.vae.guide_weight:
        return []
    if references is None:
        raise ValueError("vae.guide_weight needs the reference models")
    return load_reference_models(spec, spec.review.reference, references, len(splits.classes))


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
