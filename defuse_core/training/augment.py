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
    grid = F.affine_grid(torch.from_numpy(theta).to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


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
        blurred = F.avg_pool2d(moved, 3, stride=1, padding=1, count_include_pad=False)
        moved = torch.where(_column(rng.random(count)[rows] < share, images), blurred, moved)
    bright = _column(rng.uniform(0.4, 1.2, count)[rows].astype(np.float32), images)
    return (moved * bright).clamp(0, 1)


def _column(values: np.ndarray, like: Tensor) -> Tensor:  # type: ignore[type-arg]
    return torch.from_numpy(values).to(like.device).view(-1, 1, 1, 1)
