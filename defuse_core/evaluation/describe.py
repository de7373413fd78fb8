"""Names for failure scenarios without words from outside: what sets their pictures apart from their class.

Each picture is described by a few measurements that have a word for either end, such as thin and thick strokes. A
scenario's name holds the largest deviations from decodings of real images of its label, in standard deviations of
that class. Decodings are compared with decodings, since both are smoother than photographs; anchored ones with the
images themselves.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from defuse_core.artifacts import F32, F64
from defuse_core.config import RunFile
from defuse_core.data import Splits
from defuse_core.data.splits import random_rows
from defuse_core.evaluation.evaluate import Findings
from defuse_core.models import decoder_at, encode_images, load_vae
from defuse_core.review.verdicts import most_common_error
from defuse_core.seeds import generator

COMPARED_IMAGES = 2000  # real images whose decodings a scenario is compared with
LEAST_DEVIATION = 0.7  # standard deviations from which on a measurement is named
MOST_WORDS = 3
MEASUREMENTS = (  # word for a low value, word for a high value
    ("dark", "bright"),
    ("low contrast", "high contrast"),
    ("blurred", "sharp"),
    ("small", "large"),
    ("thin", "thick"),
    ("slanted to the left", "slanted to the right"),
    ("to the left", "to the right"),
    ("high up", "low down"),
    ("narrow", "wide"),
)
# Least standard deviations of the MEASUREMENTS, since less cannot be seen; sizes and places are in pixels.
VISIBLE = np.array([1 / 255, 1 / 255, 0.01, 0.1, 0.1, 0.02, 0.1, 0.1, 0.02])


def measure(images: F32) -> F64:
    """Return the MEASUREMENTS of (n, channels, H, W) images, (n, 9)."""
    grey = images.mean(axis=1, dtype=np.float64)  # (n, H, W)
    edges = np.abs(ndimage.laplace(grey, axes=(1, 2))).mean(axis=(1, 2))
    # not the mean, which thick strokes change as well
    dark, light = np.quantile(grey, [0.02, 0.98], axis=(1, 2))
    brightness, contrast = (dark + light) / 2, light - dark
    figure = np.abs(grey - _border(grey)[:, None, None])  # difference from the background
    mass = figure.sum(axis=(1, 2)) + 1e-9
    y, x = (
        axis - (length - 1) / 2
        for axis, length in zip(np.indices(grey.shape[1:]), grey.shape[1:], strict=True)
    )
    at_x, at_y = (figure * x).sum(axis=(1, 2)) / mass, (figure * y).sum(axis=(1, 2)) / mass
    dx, dy = x - at_x[:, None, None], y - at_y[:, None, None]
    var_x, var_y, cov = (
        (figure * product).sum(axis=(1, 2)) / mass for product in (dx * dx, dy * dy, dx * dy)
    )
    # the centre of each row shifts by cov / var_y pixels from row to row; upwards is towards smaller y
    slant = -cov / np.maximum(var_y, 1e-9)
    width = np.array([_stroke_width(picture) for picture in figure])
    aspect = np.sqrt(var_x / np.maximum(var_y, 1e-9))
    sharpness = edges / (grey.std(axis=(1, 2)) + 1e-9)
    size = np.sqrt(var_x + var_y)
    return np.stack([brightness, contrast, sharpness, size, width, slant, at_x, at_y, aspect], axis=1)


def _border(grey: F64) -> F64:
    """Return the median of the outermost pixels of each image, (n,): its background."""
    sides = (grey[:, 0], grey[:, -1], grey[:, :, 0], grey[:, :, -1])
    border: F64 = np.median(np.concatenate(sides, axis=1), axis=1)
    return border


def _stroke_width(figure: F64) -> float:
    """Return twice the area by the perimeter, pixels, of what differs from the background by over half of the most.

    For a long stroke that is its width.
    """
    inside = np.pad(ndimage.zoom(figure, 2, order=1) > 0.5 * figure.max(), 1)
    perimeter = sum(int((inside != np.roll(inside, 1, axis)).sum()) for axis in (0, 1))
    return float(inside.sum() / perimeter) if perimeter else 0.0  # at twice the size, so area / perimeter


def deviation_words(images: F32, compared: F32) -> str:
    """Return what sets `images` apart from `compared`, the largest deviation first; empty where nothing does."""
    if not len(images) or len(compared) < 2:
        return ""
    others = measure(compared)
    spread = np.maximum(others.std(axis=0), VISIBLE)
    scores = (measure(images).mean(axis=0) - others.mean(axis=0)) / spread
    order = np.argsort(-np.abs(scores), kind="stable")[:MOST_WORDS]
    words = [MEASUREMENTS[m][int(scores[m] > 0)] for m in order if abs(scores[m]) >= LEAST_DEVIATION]
    return ", ".join(words)


def describe_scenarios(spec: RunFile, found: Findings, held_out: F32, splits: Splits) -> tuple[str, ...]:
    """Return a name for each accepted scenario, (A,), from its (A·n, ...) held-out images."""
    fixes, classes = found.fixes, found.models.classes
    if not len(fixes.labels):
        return ()
    real = splits.validation or splits.test or splits.train
    rng = generator(spec.seed, "describe")
    real = real.take(random_rows(len(real), COMPARED_IMAGES, rng))
    vae = load_vae(spec, found.models.vae)
    decoded = decoder_at(spec, vae, real).decode(encode_images(vae, real), np.arange(len(real)))
    per_scenario = held_out.reshape(len(fixes.labels), -1, *held_out.shape[1:])
    image_labels = found.verdicts.image_labels
    names = []
    for number, label, images in zip(fixes.scenario, fixes.labels, per_scenario, strict=True):
        mistaken = most_common_error(found.gallery.predicted[number], label, image_labels[number])
        title = classes[label] if mistaken is None else f"{classes[label]} read as {classes[mistaken]}"
        words = deviation_words(images, decoded[real.labels == label])
        names.append(f"{title}: {words}" if words else title)
    return tuple(names)
