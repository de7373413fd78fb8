"""The scenario watch: does an input lie in a region where the classifier is known to have failed?

An input x lies in scenario j if the Mahalanobis distance of its code mu(x) from component j is smaller than that of all
but a share of the training images. So the watch tells of that share of ordinary inputs by construction, whatever the
shape of the component; how many of the scenario's own images it tells of is measured beside it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from defuse_core.artifacts import F32, F64
from defuse_core.config import RunFile
from defuse_core.data import Images
from defuse_core.device import cpu_threads
from defuse_core.models import Vae, decode_codes, encode_images
from defuse_core.seeds import generator

LEVELS = np.unique(
    np.concatenate([np.linspace(0, 0.1, 201), np.linspace(0.1, 1, 91)])
)  # finer where it matters


def mahalanobis(codes: F32, means: F64, covariances: F64) -> F64:
    """Return the distance of every code (n, Z) from every component (A, Z), (A, Z, Z): (n, A)."""
    distances = np.zeros((len(codes), len(means)))
    for j, (mean, covariance) in enumerate(zip(means, covariances, strict=True)):
        whitened = np.linalg.solve(np.linalg.cholesky(covariance), (codes - mean).T)  # (Z, n)
        distances[:, j] = np.linalg.norm(whitened, axis=0)
    return distances


def calibrate(
    spec: RunFile, vae: Vae, train: Images, means: F64, covariances: F64, held_out: F32
) -> tuple[F64, F64, F64]:
    """Return levels (L,), the distances that such shares of the training images stay below (A, L), and recall (A, L).

    Recall is the share of a scenario's held-out pictures, (A, n, Z) codes decoded and encoded again as a server would
    see them, that stay below the same distance.
    """
    rng = generator(spec.seed, "watch")
    rows = np.sort(rng.choice(len(train), min(len(train), spec.serve.watch_images), replace=False))
    with cpu_threads(spec.resources.train_threads):
        ordinary = mahalanobis(encode_images(vae, train.take(rows)), means, covariances)  # (n, A)
        distances = np.quantile(ordinary, LEVELS, axis=0).T  # (A, L)
        recall = np.zeros_like(distances)
        for j, codes in enumerate(held_out):
            seen = mahalanobis(
                encode_images(vae, decode_codes(vae, codes)), means[j : j + 1], covariances[j : j + 1]
            )
            recall[j] = (seen <= distances[j]).mean(axis=0)
    return LEVELS, distances, recall


class Watch(nn.Module):
    """The encoder and the components, ready for batches: images -> distance from every scenario."""

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
