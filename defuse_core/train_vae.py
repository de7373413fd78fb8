"""Train the β-VAE: reconstruction plus β times KL (§2), with an optional class head on the codes."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defuse_core.artifacts import I64, VaeEpoch
from defuse_core.checkpoint import Training, format_row, labels_of, minibatches, train_step
from defuse_core.config import RunFile, VaeSection
from defuse_core.data import Images, Splits
from defuse_core.device import device
from defuse_core.models import (
    Vae,
    build_vae,
    expect_autoencoder,
    kl_to_prior,
    load_pretrained,
    to_device,
    to_tensor,
)
from defuse_core.progress import Progress
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
    spec: RunFile, vae: Vae, splits: Splits, store: Store | None, progress: Progress
) -> list[VaeEpoch]:
    """Train the β-VAE; return one row per epoch (reconstruction and KL in nats per image)."""
    section = spec.vae
    head = _class_head(spec, len(splits.classes)) if section.class_weight else None
    trained = to_device(vae if head is None else nn.ModuleDict({"vae": vae, "head": head}))
    optimizer = torch.optim.Adam(trained.parameters(), lr=section.learning_rate, fused=True)
    training = Training(trained, optimizer, store, "vae", splits.fingerprint())
    trainer = _VaeTrainer(spec, vae.train(), head, optimizer, splits.train, progress)
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
    optimizer: torch.optim.Optimizer
    images: Images
    progress: Progress

    def epoch(self, epoch: int) -> VaeEpoch:
        """Train for one epoch, counted from 0, and return its figures."""
        spec, section, count = self.spec, self.spec.vae, len(self.images)
        noise = torch.Generator(device()).manual_seed(torch_seed(spec.seed, "vae", "noise", epoch))
        batches = list(minibatches(count, section.batch_size, generator(spec.seed, "vae", epoch)))
        done, losses, beta = epoch * count, [], 0.0
        for step, rows in enumerate(batches, start=epoch * len(batches) + 1):
            beta = section.beta * min(1.0, step / max(1, section.kl_warmup_steps))
            set_learning_rate(self.optimizer, section, step, section.epochs * len(batches))
            losses.append(self._step(rows, beta, noise))
            done += len(rows)
            self.progress("training the β-VAE", done, section.epochs * count, "images")
        reconstruction, divergence, class_loss = np.mean(losses, axis=0).tolist()
        return VaeEpoch(
            epoch + 1, reconstruction, divergence, beta, None if self.head is None else class_loss
        )

    def _step(self, rows: I64, beta: float, noise: torch.Generator) -> tuple[float, float, float]:
        """Take one step; return reconstruction, KL and the class head's cross-entropy (0 without one)."""
        terms = vae_terms(self.vae, to_tensor(self.images.batch(rows)), noise)
        loss, class_loss = terms.reconstruction + beta * terms.divergence, 0.0
        if self.head is not None:
            cross_entropy = F.cross_entropy(self.head(terms.codes), labels_of(self.images, rows))
            loss, class_loss = loss + self.spec.vae.class_weight * cross_entropy, cross_entropy.item()
        train_step(loss, self.optimizer, "the β-VAE")
        return terms.reconstruction.item(), terms.divergence.item(), class_loss


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


def vae_terms(vae: Vae, images: Tensor, noise: torch.Generator) -> VaeTerms:
    """Return the terms of the loss on (n, channels, H, W) images."""
    mu, log_variance = vae.encode(images)
    codes = mu + torch.exp(0.5 * log_variance) * torch.randn(mu.shape, generator=noise, device=mu.device)
    logits = vae.decode_logits(codes)
    reconstruction = F.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)
    return VaeTerms(reconstruction, kl_to_prior(mu, log_variance).sum() / len(images), codes)
