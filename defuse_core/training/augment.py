"""Small random changes of training images that leave their class as it is."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def move(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Return each image (n, channels, H, W) randomly rotated, scaled and shifted.

    No image is mirrored, since that changes the class of digits and signs.
    """
    count = len(images)
    angle = rng.uniform(-0.2, 0.2, count)  # radians
    scale, shift = rng.uniform(0.85, 1.15, count), rng.uniform(-0.12, 0.12, (count, 2))
    theta = np.zeros((count, 2, 3), np.float32)
    theta[:, 0, 0] = theta[:, 1, 1] = np.cos(angle) * scale
    theta[:, 0, 1], theta[:, 1, 0] = -np.sin(angle) * scale, np.sin(angle) * scale
    theta[:, :, 2] = shift  # of half the side
    grid = F.affine_grid(torch.from_numpy(theta).to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def augment(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Return each image moved, and darkened or brightened; most are blurred.

    Blur and darkness matter: decodings are smoother than photographs and of lower contrast, and a person reads them all
    the same.
    """
    moved = move(images, rng)
    for share in (0.5, 0.25):
        blurred = F.avg_pool2d(moved, 3, stride=1, padding=1, count_include_pad=False)
        moved = torch.where(_column(rng.random(len(images)) < share, images), blurred, moved)
    bright = _column(rng.uniform(0.4, 1.2, len(images)).astype(np.float32), images)
    return (moved * bright).clamp(0, 1)


def _column(values: np.ndarray, like: Tensor) -> Tensor:  # type: ignore[type-arg]
    return torch.from_numpy(values).to(like.device).view(-1, 1, 1, 1)
