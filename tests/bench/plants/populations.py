"""Images with hidden attributes: real ones with measured and painted traits, of which a plant makes a fault.

One population serves all plants of a seed, so that β-VAE and reference models are trained once. Every painted trait
occurs in every class with the right label, hence nothing but the classifier's own training says where it fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from defuse_core.artifacts import F64, I64, U8, Bool
from defuse_core.config import DataSection
from defuse_core.data import Images, Splits, open_splits
from defuse_core.seeds import generator

PAINTED_SHARE = 0.06  # share of all images, for each painted trait
SIGNS_SHARE = 0.12  # the classes of the signs are smaller


@dataclass(frozen=True, eq=False)
class Traited:
    """Images with their right labels and what else is known of each."""

    images: Images  # uint8 (N, channels, H, W)
    traits: dict[str, F64]  # (N,) a measure, or 1 where a trait is painted and 0 elsewhere

    def __len__(self) -> int:
        return len(self.images)

    @property
    def plain(self) -> Bool:
        """(N,) images on which nothing is painted."""
        return self.traits["plain"] > 0


@dataclass(frozen=True, eq=False)
class Population:
    """The three parts of a data set, with the traits of every image."""

    name: str
    train: Traited
    validation: Traited
    test: Traited
    classes: tuple[str, ...]
    painters: dict[str, Painter]

    def splits(self) -> Splits:
        """Return the images with their right labels."""
        return Splits(self.train.images, self.validation.images, self.test.images, self.classes)

    def save(self, path: Path) -> None:
        """Write the images with their right labels as an .npz file that Defuse reads."""
        arrays: dict[str, Any] = {}
        for name, part in self.splits().parts().items():
            arrays[f"{name}_images"], arrays[f"{name}_labels"] = part.pixels, part.labels
        np.savez(path, classes=np.array(self.classes), **arrays)


Painter = Callable[[U8], U8]  # (N, channels, H, W) to the same


def mark(pixels: U8) -> U8:
    """Paint a bright square in the upper left corner."""
    painted = pixels.copy()
    painted[:, :, 2:7, 2:7] = 255
    return painted


def inverted_patch(pixels: U8) -> U8:
    """Invert a square in the middle."""
    painted = pixels.copy()
    painted[:, :, 12:20, 12:20] = 255 - painted[:, :, 12:20, 12:20]
    return painted


def blur(pixels: U8) -> U8:
    """Blur with a Gaussian of 1.6 pixels."""
    return ndimage.gaussian_filter(pixels, (0, 0, 1.6, 1.6))


def dim(pixels: U8) -> U8:
    """Take 60 % of the brightness away."""
    return (pixels * 0.4).astype(np.uint8)


def shrink(pixels: U8) -> U8:
    """Scale to 60 % about the centre."""
    matrix = np.diag([1, 1, 1 / 0.6, 1 / 0.6])
    centre = (np.array(pixels.shape) - 1) / 2
    return ndimage.affine_transform(pixels, matrix, centre - matrix @ centre, order=1)


def turn(pixels: U8) -> U8:
    """Turn by 40 degrees to the left."""
    return ndimage.rotate(pixels, 40, axes=(3, 2), reshape=False, order=1)


def sticker(pixels: U8) -> U8:
    """Paint a yellow square below the middle."""
    painted = pixels.copy()
    painted[:, :, 19:25, 13:19] = np.array([250, 220, 20], np.uint8)[None, :, None, None]
    return painted


MNIST_PAINTERS: dict[str, Painter] = {
    "mark": mark, "patch": inverted_patch, "blur": blur, "dim": dim, "small": shrink, "turned": turn,
}  # fmt: skip
SIGNS_PAINTERS: dict[str, Painter] = {"sticker": sticker, "blur": blur, "dim": dim}


def mnist(root: Path, seed: int, counts: tuple[int, int, int]) -> Population:
    """Return `counts` images of MNIST to train, validate and test on, other ones for every seed.

    All are training images of MNIST: its test images have other writers, and few of them are slanted.
    """
    data = DataSection(name="mnist", root=root, image_size=32, channels=1)
    found = open_splits(data, 0)
    order = generator(seed, "plants", "images").permutation(len(found.train))
    ends = np.cumsum((0, *counts))
    parts = {
        name: found.train.take(order[start:end])
        for name, start, end in zip(("train", "validation", "test"), ends[:-1], ends[1:], strict=True)
    }
    return _painted("mnist", parts, MNIST_PAINTERS, found.classes, (seed, PAINTED_SHARE))


def signs(root: Path, seed: int, images: int | None = None) -> Population:
    """Return the German signs, as Defuse divides them with this seed: `images` of the training set, in whole tracks."""
    data = DataSection(name="signs", root=root, image_size=32, channels=3, train_images=images)
    found = open_splits(data, seed).loaded()
    return _painted("signs", found.parts(), SIGNS_PAINTERS, found.classes, (seed, SIGNS_SHARE))


def _painted(
    name: str,
    parts: dict[str, Images],
    painters: dict[str, Painter],
    classes: tuple[str, ...],
    drawn: tuple[int, float],
) -> Population:
    """Return the population with each trait painted on a share of the images, by seed: `drawn` holds both."""
    seed, share = drawn
    made = {
        part: paint_at_random(images, painters, generator(seed, "plants", "paint", part), share)
        for part, images in parts.items()
    }
    return Population(name, made["train"], made["validation"], made["test"], classes, painters)


def paint_at_random(
    images: Images, painters: dict[str, Painter], rng: np.random.Generator, share: float = PAINTED_SHARE
) -> Traited:
    """Return the images with each trait painted on `share` of them, one at most per image, and all measured."""
    pixels, labels = np.array(images.pixels), images.labels
    traits = measure(pixels)
    drawn = rng.random(len(labels)) // share  # the n-th trait for n, none for what is left
    traits["plain"] = (drawn >= len(painters)).astype(np.float64)
    for number, (name, paint) in enumerate(painters.items()):
        rows = np.flatnonzero(drawn == number)
        pixels[rows] = paint(pixels[rows])
        traits[name] = (drawn == number).astype(np.float64)
    return Traited(Images(pixels, labels), traits)


def measure(pixels: U8) -> dict[str, F64]:
    """Return slant (positive to the right), thickness of strokes, width and brightness of each image."""
    grey = pixels.mean(axis=1) / 255  # (N, H, W)
    y, x = np.mgrid[: grey.shape[1], : grey.shape[2]].astype(np.float64)
    mass = grey.sum(axis=(1, 2)) + 1e-9
    dx = x - ((grey * x).sum(axis=(1, 2)) / mass)[:, None, None]
    dy = y - ((grey * y).sum(axis=(1, 2)) / mass)[:, None, None]
    over_y = (grey * dy**2).sum(axis=(1, 2)) + 1e-9
    lit = grey > 0.4
    inner = ndimage.binary_erosion(lit, np.ones((1, 3, 3)))
    return {
        "slant": -(grey * dx * dy).sum(axis=(1, 2)) / over_y,
        "thickness": lit.sum(axis=(1, 2)) / (1 + (lit & ~inner).sum(axis=(1, 2))),
        "width": np.sqrt((grey * dx**2).sum(axis=(1, 2)) / mass),
        "brightness": grey.mean(axis=(1, 2)),
    }


def rows_of(mask: Bool) -> I64:
    """Return the rows where `mask` is true."""
    return np.flatnonzero(mask).astype(np.int64)
