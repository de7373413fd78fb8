"""Train the β-VAE: reconstruction plus β times KL (§2), with an optional class head on the codes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defuse_core.artifacts import VaeEpoch
from defuse_core.config import RunFile
from defuse_core.data import Images, Splits
from defuse_core.device import autocast, device
from defuse_core.models import (
    Vae,
    build_vae,
    expect_autoencoder,
    expect_full_precision,
    kl_to_prior,
    load_pretrained,
    to_device,
    to_tensor,
    use_default_layout_if_needed,
)
from defuse_core.protocols import Progress
from defuse_core.seeds import generator, torch_seed
from defuse_core.store import Store
from defuse_core.training import (
    Adam,
    Losses,
    Training,
    format_row,
    minibatches,
    set_learning_rate,
    train_step,
)
from defuse_core.training.batches import (
    DeviceImages,
    averaged,
    drawn_normal,
    seed_dropout,
    worker_minibatches,
)

log = logging.getLogger("defuse")


def initial_vae(spec: RunFile, train: Images) -> Vae:
    """Return the β-VAE before its training, on this process's device: from the seed, with vae.weights, or custom."""
    torch.manual_seed(torch_seed(spec.seed, "vae"))
    vae = build_vae(spec)
    load_pretrained(vae, spec.vae.weights, spec.vae.epochs > 0)
    expect_full_precision(vae, "the β-VAE", trained=spec.vae.epochs > 0)
    to_device(vae)  # before its first call, of which it may keep something
    images = to_tensor(train.batch(slice(0, 2)))
    use_default_layout_if_needed(vae, images)
    expect_autoencoder(vae.eval(), images, spec.vae.latent_dim)
    return vae.train()


def train_vae(spec: RunFile, vae: Vae, splits: Splits, store: Store, progress: Progress) -> list[VaeEpoch]:
    """Train the β-VAE of `initial_vae`; return one row per epoch (reconstruction and KL in nats per image)."""
    section = spec.vae
    head = _class_head(spec, len(splits.classes)) if section.class_weight else None
    trained = vae if head is None else nn.ModuleDict({"vae": vae, "head": to_device(head)})
    optimizer = Adam(trained.parameters(), section.learning_rate)
    training = Training(trained, optimizer, store, "vae", splits.fingerprint())
    loss_of = averaged(trained, partial(vae_loss, spec, vae.train(), head))
    images = DeviceImages(splits.train, spec.resources.readers)
    for epoch in training.epochs(section.epochs):
        row = _vae_epoch(optimizer, loss_of, images, spec, epoch, progress)
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


def _vae_epoch(
    optimizer: Adam,
    loss_of: Callable[..., VaeLoss],
    images: DeviceImages,
    spec: RunFile,
    epoch: int,
    progress: Progress,
) -> VaeEpoch:
    """Train for one epoch, counted from 0, and return its figures."""
    section, count = spec.vae, len(images)
    seed_dropout(spec.seed, "vae", "dropout", epoch)
    noise = torch.Generator(device()).manual_seed(torch_seed(spec.seed, "vae", "noise", epoch))
    batches = list(minibatches(count, section.batch_size, generator(spec.seed, "vae", epoch)))
    done, losses, beta = epoch * count, Losses("the β-VAE"), 0.0
    for step, (part, batch, labels) in enumerate(
        worker_minibatches(images, batches), start=epoch * len(batches) + 1
    ):
        beta = section.beta * min(1.0, step / max(1, section.kl_warmup_steps))
        set_learning_rate(optimizer, section, step, section.epochs * len(batches))
        loss = loss_of(batch, labels, drawn_normal(part, section.latent_dim, noise), beta)
        train_step(part.weighted(loss.total), optimizer)
        losses.add(*(part.weighted(term) for term in loss))
        done += part.count
        progress("training the β-VAE", done, section.epochs * count, "images")
    reconstruction, divergence, class_loss = losses.mean()[1]
    return VaeEpoch(epoch + 1, reconstruction, divergence, beta, class_loss if section.class_weight else None)


class VaeLoss(NamedTuple):
    """The β-VAE's loss and what it consists of, in nats per image."""

    total: Tensor
    reconstruction: Tensor  # -E log p(x|z), Bernoulli
    divergence: Tensor  # KL(q(z|x) || p(z))
    class_loss: Tensor  # cross-entropy of the class head, 0 without one


def vae_loss(
    spec: RunFile,
    vae: Vae,
    head: nn.Module | None,
    images: Tensor,
    labels: Tensor,
    drawn: Tensor,
    beta: float,
) -> VaeLoss:
    """Return the loss on (n, channels, H, W) images, with (n, Z) standard normal numbers; `head` classifies codes.

    The networks alone are computed in bf16.
    """
    arithmetic = spec.resources.arithmetic("vae")
    with autocast(arithmetic):
        moments = vae.encode(images)
    mu, log_variance = (moment.float() for moment in moments)
    codes = mu + torch.exp(0.5 * log_variance) * drawn
    with autocast(arithmetic):
        logits = vae.decode_logits(codes)
    logits = logits.float()
    reconstruction = F.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)
    divergence = kl_to_prior(mu, log_variance).sum() / len(images)
    total = reconstruction + beta * divergence
    class_loss = torch.zeros_like(total)
    if head is not None:
        class_loss = F.cross_entropy(head(codes), labels)
        total = total + spec.vae.class_weight * class_loss
    return VaeLoss(total, reconstruction, divergence, class_loss)
