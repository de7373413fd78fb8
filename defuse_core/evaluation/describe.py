"""What evidence says of each scenario: a name, and the real images nearest to it.

A name has no words from outside: it says what sets the pictures of a scenario apart from their class. Each picture is
described by a few measurements that have a word for either end, such as thin and thick strokes. A scenario's name
holds the largest deviations from decodings of real images of its label, in standard deviations of that class. Decodings
are compared with decodings, since both are smoother than photographs; anchored ones with the images themselves.

The nearest real images show whether the classifier fails on them, too, or on generated ones alone.

Axes, beside those of artifacts/__init__.py: E nearest real images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from torch import nn

from defuse_core.artifacts import F32, F64, I64, U8, Bool, Corrections, Scenarios
from defuse_core.config import RunFile
from defuse_core.data import Images, Splits
from defuse_core.data.images import evenly_spaced, to_levels
from defuse_core.data.splits import random_rows
from defuse_core.distill.draws import distances_from
from defuse_core.evaluation import Findings
from defuse_core.intervals import SIGNIFICANT, binomial_tail, discoveries, hypergeometric_tail
from defuse_core.models import Vae, decoder_at, encode_images, load_vae, predict
from defuse_core.review.verdicts import most_common_error
from defuse_core.seeds import generator
from defuse_core.tuning_data import by_scenario

CLASS_IMAGES = 200  # real images of its class, at most, whose decodings a scenario is compared with
ENOUGH_IMAGES = 50  # training images are compared with where fewer of its validation images exist
# Of pictures over LARGE pixels, each of which takes long, so many of a scenario and of its class are measured. With as
# many to compare with, LEAST_STANDARD_ERRORS asks for no more than LEAST_DEVIATION.
LARGE, MEASURED_IF_LARGE = 64, 52
FEWEST_IMAGES = 10  # fewest images for which anything is named
LEAST_DEVIATION = 0.7  # standard deviations from which on a measurement is named
# and standard errors of the mean of the images compared with: with few of them some mean is far off by chance
LEAST_STANDARD_ERRORS = 5.0
MOST_WORDS = 3
SAME = 0.95  # correlation within the class from which on two measurements are one, such as light and contrast on black
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


def deviation_words(images: F32, others: F64) -> str:
    """Return what sets `images` apart from others that are measured, (n, 9), the largest deviation first.

    Empty where nothing does, or with fewer than FEWEST_IMAGES to compare with. A measurement that only follows one
    already named, with which it is correlated (SAME), is not named.
    """
    if not len(images) or len(others) < FEWEST_IMAGES:
        return ""
    spread = np.maximum(others.std(axis=0), VISIBLE)
    scores = (measure(images).mean(axis=0) - others.mean(axis=0)) / spread
    with np.errstate(invalid="ignore"):  # a measurement may be constant over the class
        alike = np.corrcoef(others.T) * np.sign(np.outer(scores, scores)) > SAME
    least, named = max(LEAST_DEVIATION, LEAST_STANDARD_ERRORS / np.sqrt(len(others))), list[int]()
    for m in np.argsort(-np.abs(scores).round(6), kind="stable"):  # of equal ones always the first
        if abs(scores[m]) >= least and not alike[m, named].any():
            named.append(m)
    return ", ".join(MEASUREMENTS[m][int(scores[m] > 0)] for m in named[:MOST_WORDS])


def describe_scenarios(spec: RunFile, found: Findings, held_out: Images, splits: Splits) -> tuple[str, ...]:
    """Return a name for each accepted scenario, (A,), from its A·n held-out images."""
    fixes, classes = found.fixes, found.models.classes
    if not len(fixes.labels):
        return ()
    vae = load_vae(spec, found.models.vae)
    others = {label: _measured_class(spec, vae, splits, label) for label in set(fixes.labels.tolist())}
    per_scenario = by_scenario(held_out, len(fixes.labels))
    image_labels = found.verdicts.image_labels
    names = []
    for number, label, images in zip(fixes.scenario, fixes.labels, per_scenario, strict=True):
        mistaken = most_common_error(found.gallery.predicted[number], label, image_labels[number])
        title = classes[label] if mistaken is None else f"{classes[label]} read as {classes[mistaken]}"
        words = deviation_words(_to_measure(images).batch(), others[int(label)])
        names.append(f"{title}: {words}" if words else title)
    return tuple(names)


def _to_measure(images: Images) -> Images:
    """Return all images; of large ones MEASURED_IF_LARGE, evenly spaced."""
    if images.pixels.shape[-1] <= LARGE:
        return images
    return images.take(evenly_spaced(len(images), MEASURED_IF_LARGE))


def _measured_class(spec: RunFile, vae: Vae, splits: Splits, label: int) -> F64:
    """Return the MEASUREMENTS of decoded real images of a class, (n, 9); nothing of fewer than FEWEST_IMAGES."""
    real, rows = splits.train, np.flatnonzero(splits.train.labels == label)
    if splits.validation is not None:
        held_out = np.flatnonzero(splits.validation.labels == label)
        if len(held_out) >= min(ENOUGH_IMAGES, len(rows)):
            real, rows = splits.validation, held_out
    if len(rows) < FEWEST_IMAGES:
        return np.zeros((0, len(MEASUREMENTS)))
    rng = generator(spec.seed, "describe", label)
    real = _to_measure(real.take(rows[random_rows(len(rows), CLASS_IMAGES, rng)]))
    return measure(decoder_at(spec, vae, real).decode(encode_images(vae, real), np.arange(len(real))))


NEAREST = 12  # real images shown beside a scenario
# Real images whose error is compared with that of all of the label; a quarter of these where there are under 200.
NEAREST_TESTED = 50
# Lower bound of an error on real images from which they show the failures of a component.
LEAST_REAL_ERROR = 0.2


@dataclass(frozen=True, eq=False)
class NearestReal:
    """Real images of a scenario's label that are nearest to it, and the error of the classifier before on them.

    Where the label has fewer than E images, they follow again from the first.
    """

    images: U8  # (A, E, channels, H, W)
    labels: I64  # (A, E)
    predicted: I64  # (A, E)
    # (A,) on the nearest ones that are tested, or on their tracks; nan where no image has the label, and then `images`
    # mean nothing
    error: F64
    error_of_all: float  # on all real images
    # (A,) whether `error` is significantly larger than `error_of_label`, or than LEAST_REAL_ERROR, among all scenarios
    seen: Bool
    # (A,) False where the label has no errors, or too few of them or of images, for `seen`; and where they are not
    # `seen`, but f was trained on the images
    testable: Bool
    error_of_label: F64  # (A,) on all real images of the label, or on all of their tracks


def find_nearest_real(
    vae: Vae, before: nn.Module, scenarios: Scenarios, fixes: Corrections, real: Images, readers: int = 0
) -> NearestReal:
    """Return, per accepted scenario, the nearest real images by Mahalanobis distance, and f's error on them.

    Only images of the scenario's label are compared: its pictures show that class. Images of one track count once,
    where the nearest of them is. Of the scenarios that are seen, a share SIGNIFICANT is expected to be false at most.
    """
    codes = encode_images(vae, real, readers)
    predicted = predict(before, real, readers=readers)
    wrong = predicted != real.labels
    shown, labels, answers, tests = [], [], [], list[tuple[float, float, bool]]()
    of_label: F64 = np.full(len(fixes.labels), np.nan)
    for place, (number, label) in enumerate(zip(fixes.scenario, fixes.labels, strict=True)):
        rows = np.flatnonzero(real.labels == label)
        distance = distances_from(scenarios, number, codes[rows])
        near = rows[np.argsort(distance, kind="stable")]
        outcomes = _outcomes(wrong[near], None if real.tracks is None else real.tracks[near])
        of_label[place] = outcomes.mean() if len(rows) else np.nan
        tests.append(_error_nearby(outcomes))
        kept = np.resize(near, NEAREST) if len(near) else np.zeros(NEAREST, np.int64)
        shown.append(to_levels(real.batch(kept)))
        labels.append(real.labels[kept])
        answers.append(predicted[kept])
    shape = (len(fixes.labels), NEAREST)
    pictures = np.array(shown, np.uint8) if shown else np.zeros((*shape, *real.pixels.shape[1:]), np.uint8)
    error, p_values, can_tell = np.array(tests, np.float64).reshape(-1, 3).T
    testable = can_tell > 0
    return NearestReal(
        images=pictures,
        labels=np.array(labels, np.int64).reshape(shape),
        predicted=np.array(answers, np.int64).reshape(shape),
        error=error,
        error_of_all=float(wrong.mean()),
        seen=_seen(p_values, testable),
        testable=testable,
        error_of_label=of_label,
    )


def _outcomes(wrong: Bool, tracks: I64 | None) -> Bool:
    """Return whether each track is wrong, that is most of its images, in the order in which (n,) images name them.

    `wrong` itself where images have no tracks.
    """
    if tracks is None:
        return wrong
    _, first, track = np.unique(tracks, return_index=True, return_inverse=True)
    most: Bool = 2 * np.bincount(track, wrong) > np.bincount(track)
    return most[np.argsort(first)]


def _error_nearby(wrong: Bool) -> tuple[float, float, bool]:
    """Return the error on the nearest of n images or tracks, its p-value, and whether any error could be significant.

    `wrong` (n,) is in order of distance. In a class without errors none could be. The test against the error of all n
    is hypergeometric, since the nearest are a part of all. It cannot detect a class that fails as a whole, so an error
    over LEAST_REAL_ERROR is enough, too.
    """
    count = len(wrong)
    tested = wrong[: max(1, min(NEAREST_TESTED, count // 4))]
    if not len(tested):
        return float("nan"), 1.0, False
    hits, of_all = int(tested.sum()), int(wrong.sum())

    def p_value(hits: int) -> float:
        over_all = hypergeometric_tail(hits, len(tested), of_all, count)
        over_least = float(binomial_tail(hits, len(tested), LEAST_REAL_ERROR))
        return min(1.0, 2 * min(over_all, over_least))  # Bonferroni: either of two tests is enough

    testable = p_value(min(of_all, len(tested))) < SIGNIFICANT
    return float(tested.mean()), p_value(hits), testable


def _seen(p_values: F64, testable: Bool) -> Bool:
    """Return which scenarios are significant among those that could be, (A,), at a false discovery rate."""
    seen = np.zeros(len(testable), np.bool_)
    seen[testable] = discoveries(p_values[testable], SIGNIFICANT)
    return seen
