"""Seeded divisions of a data set. The images of every part keep their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from defuse_core.artifacts import F64, I64, Bool
from defuse_core.config import DataSection
from defuse_core.data.images import Images, Splits
from defuse_core.errors import DataError
from defuse_core.formatting import count_of
from defuse_core.seeds import generator

CHECK_TRACKS = "check the tracks (data.track_pattern, or the array train_tracks)"


def class_counts(splits: Splits) -> dict[str, I64]:
    """Return how many images of each class each part has, split -> (C,)."""
    classes = len(splits.classes)
    return {name: np.bincount(images.labels, minlength=classes) for name, images in splits.parts().items()}


def stratified_order(labels: I64, rng: np.random.Generator) -> I64:
    """Return all rows (N,) in a random order in which every prefix has about the same class proportions."""
    rows, position = _spread(labels, rng)
    return rows[np.argsort(position, kind="stable")]


def _spread(labels: I64, rng: np.random.Generator) -> tuple[I64, F64]:
    """Return all rows (N,), class by class, each class in a random order and at even places, (N,), from 0 to 1."""
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, counts = np.unique(labels, return_counts=True)
    rank = np.concatenate([np.arange(n) for n in counts])
    position = (rank + rng.random(len(labels))) / np.repeat(counts, counts)
    return by_class.astype(np.int64), position


def random_rows(count: int, most: int, rng: np.random.Generator) -> I64:
    """Return at most `most` of `count` rows, drawn without replacement, in order."""
    return np.sort(rng.choice(count, min(count, most), replace=False)).astype(np.int64)


def hold_out(images: Images, share: float, rng: np.random.Generator) -> tuple[Images, Images]:
    """Return (kept, held): `share` of each class, or of its tracks, is held out; every class has images that are kept.

    Where fewer are kept than there are classes, these are of different ones. Raises DataError if a part is empty.
    """
    if images.tracks is not None:
        held, kept = split_tracks(images, share, rng)
        untrained = ~np.isin(images.labels, images.labels[kept])  # of a class whose tracks are all held out
        held = held[~np.isin(images.tracks[held], images.tracks[untrained])]
        kept = np.setdiff1d(np.arange(len(images)), held)
        if not (len(held) and len(kept)):
            tracks = count_of(len(np.unique(images.tracks)), "track")
            raise DataError(
                f"data.validation_share: {share} of {tracks} leaves a part empty; {CHECK_TRACKS}, add images or change "
                "the share"
            )
        return images.take(kept), images.take(held)
    count = round(share * len(images))
    if not 0 < count < len(images):
        raise DataError(
            f"data.validation_share: {share} of {count_of(len(images), 'image')} is {count}, "
            "and each part needs at least one; add images or change the share"
        )
    order = stratified_order(images.labels, rng)[::-1]
    last = np.unique(images.labels[order], return_index=True)[1]  # of each class, which is kept
    order = np.concatenate([order[last], np.delete(order, last)])
    return images.take(np.sort(order[:-count])), images.take(np.sort(order[-count:]))


def divided(splits: Splits, data: DataSection, seed: int) -> Splits:
    """Return a data set as `data` divides it: validation_share is held out where there is no validation part, and
    train_images are drawn of the others.
    """
    train, validation = splits.train, splits.validation
    held_out = validation is None and data.validation_share > 0
    if held_out:
        train, validation = hold_out(train, data.validation_share, generator(seed, "split", "validation"))
    train = sample(train, data.train_images, seed)
    return replace(splits, train=train, validation=validation, validation_held_out=held_out)


def track_numbers(objects: Sequence[str] | npt.NDArray[Any]) -> I64:
    """Return Images.tracks, (N,), from what names the object that each image shows: a number for each that differs."""
    return np.unique(objects, return_inverse=True)[1].astype(np.int64)


def split_tracks(images: Images, share: float, rng: np.random.Generator) -> tuple[I64, I64]:
    """Return the rows of two parts without a track in common, each in order; `share` of the tracks form the first part.

    Tracks, or images without tracks, are divided class by class, so that a class with few of them is in both.
    """
    if images.tracks is None:
        rows, position = _spread(images.labels, rng)
        return np.sort(rows[position < share]), np.sort(rows[position >= share])
    _, first, track = np.unique(images.tracks, return_index=True, return_inverse=True)
    order = stratified_order(images.labels[first], rng)
    in_first = np.isin(track, order[: round(share * len(order))])
    return np.flatnonzero(in_first), np.flatnonzero(~in_first)


def is_perturbed(train: Images, share: float, seed: int) -> Bool:
    """Return which training images are perturbed, (N,), by identify.share. Raises DataError where it leaves none."""
    perturbed: Bool = np.ones(len(train), bool)
    if share < 1:
        perturbed[split_tracks(train, share, generator(seed, "identify", "split"))[1]] = False
    if not perturbed.any():
        raise DataError(
            f"identify.share: {share} of {count_of(len(train), 'training image')} leaves none to perturb; "
            "raise the share, or give more images"
        )
    return perturbed


def track_mates(images: Images, rows: I64, others: I64) -> I64:
    """Return the images of the tracks of `rows`, but for tracks of `others` and classes that would lose all images."""
    if images.tracks is None:
        return np.zeros(0, np.int64)
    mates = np.isin(images.tracks, np.setdiff1d(images.tracks[rows], images.tracks[others]))
    left = ~mates
    left[rows] = False
    mates &= np.isin(images.labels, images.labels[left])
    return np.flatnonzero(mates).astype(np.int64)


def halves(images: Images, seed: int) -> tuple[Images, Images]:
    """Return two random halves, validation and test of the German signs and SVHN (Appendix B)."""
    if len(images) < 2:
        raise DataError(
            f"the official test set has {count_of(len(images), 'image')}, and halving it needs two; check data.root"
        )
    order = generator(seed, "split", "halves").permutation(len(images))
    middle = len(images) // 2
    return images.take(np.sort(order[:middle])), images.take(np.sort(order[middle:]))


def sample(train: Images, limit: int | None, seed: int) -> Images:
    """Return at most `limit` training images, in the class proportions of all (data.train_images).

    Tracks are taken whole, one at least.
    """
    if limit is None or limit >= len(train):
        return train
    rng = generator(seed, "split", "sample")
    _, first, track, frames = np.unique(
        train.unit, return_index=True, return_inverse=True, return_counts=True
    )
    order = stratified_order(train.labels[first], rng)
    fitting = max(1, int(np.searchsorted(np.cumsum(frames[order]), limit, side="right")))
    return train.take(np.flatnonzero(np.isin(track, order[:fitting])))
