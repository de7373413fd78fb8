"""The watch's network: how far an input is from every failure scenario and every class, in standard deviations."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from defuse_core.artifacts import F64
from defuse_core.models import Vae


class Watch(nn.Module):
    """The encoder and G Gaussians over its codes: images -> distance from every Gaussian."""

    roots: Tensor  # (G, Z, Z) inverse Cholesky factors
    offsets: Tensor  # (G, Z) the same applied to the means

    def __init__(self, vae: Vae, means: F64, covariances: F64) -> None:
        super().__init__()
        self.vae = vae
        roots = np.linalg.inv(np.linalg.cholesky(covariances)) if len(means) else covariances
        self.register_buffer("roots", torch.tensor(roots, dtype=torch.float32))
        self.register_buffer(
            "offsets", torch.tensor(np.einsum("aij,aj->ai", roots, means), dtype=torch.float32)
        )

    def forward(self, images: Tensor) -> Tensor:
        """(n, channels, H, W) -> Mahalanobis distances (n, G)."""
        mu = self.vae.encode(images)[0].float()  # (n, Z)
        whitened = torch.einsum("aij,nj->nai", self.roots, mu) - self.offsets
        distances: Tensor = whitened.norm(dim=2)
        return distances
