"""The scenario watch: does an input lie in a region where the classifier is known to have failed?

A scenario is described as the encoder sees it: by the Gaussian of the codes mu(x) of its own tuning pictures. The
component of the mixture would not do: it was fitted on perturbed codes, and a picture decoded from one of them encodes
elsewhere. On two runs on scikit-learn's digits such pictures lay some 24 standard deviations off: described by the
component a scenario finds 7 % of them, described by its pictures all, both at 1 % of ordinary inputs.

An input lies in a scenario if its Mahalanobis distance is smaller than that of all but a share of the training images.
So the watch tells of that share of ordinary inputs by construction; how many of a scenario's held-out pictures it
tells of is measured beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from defuse_core.artifacts import F32, F64, Corrections
from defuse_core.config import RunFile
from defuse_core.data import Images
from defuse_core.device import cpu_threads
from defuse_core.models import Vae, decode_codes, encode_images
from defuse_core.seeds import generator

LEVELS = np.unique(
    np.concatenate([np.linspace(0, 0.1, 201), np.linspace(0.1, 1, 91)])
)  # finer where it matters

FLOOR = (
    1e-3  # of the mean variance, added to each: a dimension that the β-VAE gave up varies by almost nothing
)


def mahalanobis(codes: F32, means: F64, covariances: F64) -> F64:
    """Return the distance of every code (n, Z) from every component (A, Z), (A, Z, Z): (n, A)."""
    distances = np.zeros((len(codes), len(means)))
    for j, (mean, covariance) in enumerate(zip(means, covariances, strict=True)):
        whitened = np.linalg.solve(np.linalg.cholesky(covariance), (codes - mean).T)  # (Z, n)
        distances[:, j] = np.linalg.norm(whitened, axis=0)
    return distances


@dataclass(frozen=True, eq=False)
class Calibration:
    """Every scenario as the encoder sees it, and how near to it the training images lie."""

    means: F64  # (A, Z)
    covariances: F64  # (A, Z, Z)
    levels: F64  # (L,) shares of the training images, 0 to 1
    distances: F64  # (A, L) distance that so many training images stay below
    recall: F64  # (A, L) share of the scenario's held-out pictures that stay below the same distance


def calibrate(spec: RunFile, vae: Vae, train: Images, fixes: Corrections) -> Calibration:
    """Return the calibration on at most `serve.watch_images` training images, drawn by seed."""
    rng = generator(spec.seed, "watch")
    rows = np.sort(rng.choice(len(train), min(len(train), spec.serve.watch_images), replace=False))
    with cpu_threads(spec.resources.train_threads):
        means, covariances = _as_seen(vae, fixes.tune)
        ordinary = mahalanobis(encode_images(vae, train.take(rows)), means, covariances)  # (n, A)
        distances = np.quantile(ordinary, LEVELS, axis=0).T  # (A, L)
        recall = np.zeros_like(distances)
        for j, codes in enumerate(fixes.test):
            held_out = encode_images(vae, decode_codes(vae, codes))
            near = mahalanobis(held_out, means[j : j + 1], covariances[j : j + 1])  # (n, 1)
            recall[j] = (near <= distances[j]).mean(axis=0)
    return Calibration(means, covariances, LEVELS, distances, recall)


def _as_seen(vae: Vae, drawn: F32) -> tuple[F64, F64]:
    """Return mean (A, Z) and covariance (A, Z, Z) of the codes of the pictures of `drawn` codes (A, n, Z)."""
    seen = [encode_images(vae, decode_codes(vae, codes)).astype(np.float64) for codes in drawn]
    floor = [FLOOR * codes.var(axis=0).mean() * np.eye(codes.shape[1]) for codes in seen]
    covariances = [np.cov(codes.T) + least for codes, least in zip(seen, floor, strict=True)]
    return np.stack([codes.mean(axis=0) for codes in seen]), np.stack(covariances)


class Watch(nn.Module):
    """The encoder and the scenarios, ready for batches: images -> distance from every scenario."""

    roots: Tensor  # (A, Z, Z) inverse Cholesky factors
    offsets: Tensor  # (A, Z) the same applied to the means

    def __init__(self, vae: Vae, means: F64, covariances: F64) -> None:
        super().__init__()
        self.encoder = vae.encoder
        roots = np.linalg.inv(np.linalg.cholesky(covariances)) if len(means) else covariances
        self.register_buffer("roots", torch.tensor(roots, dtype=torch.float32))
        self.register_buffer(
            "offsets", torch.tensor(np.einsum("aij,aj->ai", roots, means), dtype=torch.float32)
        )

    def forward(self, images: Tensor) -> Tensor:
        """(n, channels, H, W) -> Mahalanobis distances (n, A)."""
        mu = self.encoder(images).chunk(2, dim=1)[0].float()  # (n, Z)
        whitened = torch.einsum("aij,nj->nai", self.roots, mu) - self.offsets
        distances: Tensor = whitened.norm(dim=2)
        return distances
