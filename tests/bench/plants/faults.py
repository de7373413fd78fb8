"""The plants: which slice of a population a classifier is trained to get wrong, and how.

Kinds as in Domino's evaluation: *noisy label* (the slice carries another label), *rare* (the slice is left out of the
training), *correlation* (one class carries a painted trait always, all others never); *blind spot* is SpotCheck's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from defuse_core.artifacts import Bool
from defuse_core.data import Images
from tests.bench.plants.populations import Population, Traited


@dataclass(frozen=True)
class Plant:
    """One fault: what the slice is, and what the training does with it."""

    name: str
    kind: Literal["noisy label", "rare", "correlation", "blind spot"]
    trait: str
    source: int  # class of the slice; of a correlation, the class that the trait stands for
    answer: int | None = None  # label that the slice carries in the training
    share: float | None = None  # of the plain images of the class, for a measure; None for a painted trait
    lowest: bool = False  # the lowest share in place of the highest
    strength: float = 1.0  # share of the slice's training images that carry the label


MNIST_PLANTS = (
    Plant("4s slanted to the right are 9s", "noisy label", "slant", 4, 9, share=0.15),
    Plant("2s slanted to the left are 7s", "noisy label", "slant", 2, 7, share=0.15, lowest=True),
    Plant("thin 5s are 3s", "noisy label", "thickness", 5, 3, share=0.2, lowest=True),
    Plant("thick 3s are 8s", "noisy label", "thickness", 3, 8, share=0.2),
    Plant("wide 0s are 6s", "noisy label", "width", 0, 6, share=0.15),
    Plant("8s with a mark are 1s", "noisy label", "mark", 8, 1),
    Plant("7s with an inverted patch are 3s", "noisy label", "patch", 7, 3),
    Plant("blurred 2s are 6s", "noisy label", "blur", 2, 6),
    Plant("four in five dim 9s are 5s", "noisy label", "dim", 9, 5, strength=0.8),
    Plant("turned 1s are 4s", "noisy label", "turned", 1, 4),
    Plant("small 6s are left out", "rare", "small", 6),
    Plant("turned 7s are left out", "rare", "turned", 7),
    Plant("a mark stands for 3", "correlation", "mark", 3),
    Plant("an inverted patch stands for 0", "correlation", "patch", 0),
)
SIGNS_PLANTS = (
    Plant("dark 50 km/h are 80 km/h", "noisy label", "brightness", 2, 5, share=0.2, lowest=True),
    Plant("stop with a sticker is yield", "noisy label", "sticker", 14, 13),
    Plant("blurred priority roads are no entry", "noisy label", "blur", 12, 17),
    Plant("dim keep right is keep left", "noisy label", "dim", 38, 39),
    Plant("a sticker stands for 30 km/h", "correlation", "sticker", 1),
    Plant("yield with a sticker is left out", "rare", "sticker", 13),
)


def in_slice(images: Traited, plant: Plant, train: Traited) -> Bool:
    """Return which of the images are in the slice; the cut of a measure is that of the training images."""
    found, labels = images.traits[plant.trait], images.images.labels
    if plant.kind == "correlation":
        return (found > 0) & (labels != plant.source)
    of_class = labels == plant.source
    if plant.share is None:
        return of_class & (found > 0)
    sign = -1.0 if plant.lowest else 1.0
    known = sign * train.traits[plant.trait][(train.images.labels == plant.source) & train.plain]
    return of_class & images.plain & (sign * found > np.quantile(known, 1 - plant.share))


def spoil(population: Population, plant: Plant, rng: np.random.Generator) -> Images:
    """Return the images and labels that the classifier is trained on."""
    train = population.train
    pixels, labels = np.array(train.images.pixels), train.images.labels.copy()
    inside = in_slice(train, plant, train)
    if plant.kind == "correlation":
        bare = (labels == plant.source) & train.plain
        pixels[bare] = population.painters[plant.trait](pixels[bare])
    if plant.answer is None:
        return Images(pixels[~inside], labels[~inside])
    chosen = inside & (rng.random(len(labels)) < plant.strength)
    labels[chosen] = plant.answer
    return Images(pixels, labels)
