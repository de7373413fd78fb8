"""The scenario watch: whether an input is inside a region where the classifier is known to have failed.

A scenario is the Gaussian of the codes mu(x) that the encoder gives to the scenario's own tuning images. The mixture
component would not do: it was fitted on perturbed codes, and an image decoded from one of them encodes elsewhere. On
two runs on scikit-learn's digits such images were some 24 standard deviations away: at 1 % of ordinary inputs, the
component finds 7 % of the scenario's images, the Gaussian of its own images all of them.

An input is inside a scenario if its Mahalanobis distance is smaller than that of all but a share of the training
images. So that share of ordinary inputs is inside by construction; `recall` measures the scenario's held-out images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from defuse_core.artifacts import F32, F64, I64, Corrections
from defuse_core.config import RunFile
from defuse_core.data import Images
from defuse_core.device import cpu_threads
from defuse_core.models import Decoder, Vae, decoder_of, encode_images
from defuse_core.seeds import generator

LEVELS = np.unique(
    np.concatenate([np.linspace(0, 0.1, 201), np.linspace(0.1, 1, 91)])
)  # dense at small shares
VARIANCE_FLOOR = 1e-3  # share of the mean variance that is added to each: unused dimensions have almost none


def mahalanobis(codes: F32, means: F64, covariances: F64) -> F64:
    """Return the distance of every code (n, Z) from every component (A, Z), (A, Z, Z): (n, A)."""
    distances = np.zeros((len(codes), len(means)))
    for j, (mean, covariance) in enumerate(zip(means, covariances, strict=True)):
        whitened = np.linalg.solve(np.linalg.cholesky(covariance), (codes - mean).T)  # (Z, n)
        distances[:, j] = np.linalg.norm(whitened, axis=0)
    return distances


@dataclass(frozen=True, eq=False)
class Calibration:
    """The Gaussian of every scenario, and the distances of the training images from it."""

    means: F64  # (A, Z)
    covariances: F64  # (A, Z, Z)
    levels: F64  # (L,) shares of the training images, 0 to 1
    distances: F64  # (A, L) quantiles of the training images' distances at those levels
    recall: F64  # (A, L) share of the scenario's held-out images within those distances


def calibrate(spec: RunFile, vae: Vae, train: Images, corrections: Corrections) -> Calibration:
    """Return the calibration on at most `serve.watch_images` training images, drawn by seed."""
    rng = generator(spec.seed, "watch")
    rows = np.sort(rng.choice(len(train), min(len(train), spec.serve.watch_images), replace=False))
    with cpu_threads(spec.resources.train_threads):
        decoder = decoder_of(vae, corrections.anchors)
        means, covariances = _fit_gaussians(decoder, corrections)
        ordinary = mahalanobis(encode_images(vae, train.take(rows)), means, covariances)  # (n, A)
        distances = np.quantile(ordinary, LEVELS, axis=0).T  # (A, L)
        recall = np.zeros_like(distances)
        for j, codes in enumerate(corrections.test):
            held_out = encode_images(vae, decoder.decode(codes, _row(corrections.test_anchor, j)))
            near = mahalanobis(held_out, means[j : j + 1], covariances[j : j + 1])  # (n, 1)
            recall[j] = (near <= distances[j]).mean(axis=0)
    return Calibration(means, covariances, LEVELS, distances, recall)


def _row(anchors: I64 | None, scenario: int) -> I64 | None:
    return None if anchors is None else anchors[scenario]


def _fit_gaussians(decoder: Decoder, corrections: Corrections) -> tuple[F64, F64]:
    """Return mean (A, Z) and covariance (A, Z, Z) of the encodings of the scenarios' images to tune on."""
    encoded = [
        encode_images(decoder.vae, decoder.decode(codes, _row(corrections.tune_anchor, j))).astype(np.float64)
        for j, codes in enumerate(corrections.tune)
    ]
    floors = [VARIANCE_FLOOR * codes.var(axis=0).mean() * np.eye(codes.shape[1]) for codes in encoded]
    covariances = [np.cov(codes.T) + floor for codes, floor in zip(encoded, floors, strict=True)]
    return np.stack([codes.mean(axis=0) for codes in encoded]), np.stack(covariances)


class Watch(nn.Module):
    """The encoder and the scenarios' Gaussians: images -> distance from every scenario."""

    roots: Tensor  # (A, Z, Z) inverse Cholesky factors
    offsets: Tensor  # (A, Z) the same applied to the means

    def __init__(self, vae: Vae, means: F64, covariances: F64) -> None:
        super().__init__()
        self.vae = vae
        roots = np.linalg.inv(np.linalg.cholesky(covariances)) if len(means) else covariances
        self.register_buffer("roots", torch.tensor(roots, dtype=torch.float32))
        self.register_buffer(
            "offsets", torch.tensor(np.einsum("aij,aj->ai", roots, means), dtype=torch.float32)
        )

    def forward(self, images: Tensor) -> Tensor:
        """(n, channels, H, W) -> Mahalanobis distances (n, A)."""
        mu = self.vae.encode(images)[0].float()  # (n, Z)
        whitened = torch.einsum("aij,nj->nai", self.roots, mu) - self.offsets
        distances: Tensor = whitened.norm(dim=2)
        return distances
