"""Small random changes of training images that leave their class as it is."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from defuse_core.artifacts import F64
from defuse_core.training.data_parallel import MinibatchPart


def random_affine(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Return each image (n, channels, H, W) randomly rotated, slanted, scaled along each axis, and shifted.

    No image is mirrored, since that changes the class of digits and signs.
    """
    count = len(images)
    angle, slant = rng.uniform(-0.17, 0.17, count), rng.uniform(-0.15, 0.15, count)  # radians; tangent
    scale, shift = rng.uniform(0.9, 1.1, (count, 2)), rng.uniform(-0.12, 0.12, (count, 2))
    return _transformed(images, angle, slant, scale, shift)


def _transformed(images: Tensor, angle: F64, slant: F64, scale: F64, shift: F64) -> Tensor:
    """Return images under affine maps, for (n,) angles and slants, (n, 2) scales, and shifts in half sides."""
    theta = np.zeros((len(images), 2, 3), np.float32)
    cos, sin = np.cos(angle), np.sin(angle)
    theta[:, 0, 0], theta[:, 0, 1] = cos * scale[:, 0], (slant * cos - sin) * scale[:, 0]
    theta[:, 1, 0], theta[:, 1, 1] = sin * scale[:, 1], (slant * sin + cos) * scale[:, 1]
    theta[:, :, 2] = shift
    grid = _affine_grid(torch.from_numpy(theta).to(images.device), *images.shape[2:])
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _affine_grid(theta: Tensor, height: int, width: int) -> Tensor:
    """Return `F.affine_grid(theta, ...)`, (n, height, width, 2), on a CPU in an eighth of its time."""
    y, x = (torch.linspace(-1, 1, side, device=theta.device) * (side - 1) / side for side in (height, width))
    x_share, y_share, shift = theta[:, :, :, None, None].unbind(2)  # (n, 2, 1, 1) each
    return (x_share * x + y_share * y[:, None]).add_(shift).permute(0, 2, 3, 1)


def augment(images: Tensor, rng: np.random.Generator, part: MinibatchPart | None = None) -> Tensor:
    """Return each image randomly rotated, scaled, shifted, and darkened or brightened; most are blurred.

    Blur and darkness matter: decodings are smoother than photographs and of lower contrast, and a person reads them all
    the same. Numbers are drawn for the whole minibatch of which `images` are this worker's `part`.
    """
    count, rows = (len(images), slice(None)) if part is None else (part.count, part.rows)
    angle, scale = rng.uniform(-0.2, 0.2, count)[rows], rng.uniform(0.85, 1.15, count)[rows]
    shift = rng.uniform(-0.12, 0.12, (count, 2))[rows]
    moved = _transformed(images, angle, np.zeros(len(images)), np.stack([scale, scale], axis=1), shift)
    for share in (0.5, 0.25):
        moved = torch.where(_column(rng.random(count)[rows] < share, images), _blurred(moved), moved)
    bright = _column(rng.uniform(0.4, 1.2, count)[rows].astype(np.float32), images)
    return (moved * bright).clamp(0, 1)


def _blurred(images: Tensor) -> Tensor:
    """Return the mean of each pixel and its neighbours, as F.avg_pool2d does, on a CPU in a tenth of its time."""
    return _sums_of_neighbours(images) / _sums_of_neighbours(torch.ones_like(images[:1, :1]))


def _sums_of_neighbours(images: Tensor) -> Tensor:
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1))
    sums = torch.zeros_like(images)
    for top in range(3):
        for left in range(3):
            sums += padded[..., top : top + height, left : left + width]
    return sums


def _column(values: np.ndarray, like: Tensor) -> Tensor:  # type: ignore[type-arg]
    return torch.from_numpy(values).to(like.device).view(-1, 1, 1, 1)
