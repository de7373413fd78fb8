"""Classifiers that are hardly better than guessing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from defuse_core.artifacts import Health
from defuse_core.evaluation.undecided import never_right, why_guessing, why_undecided
from defuse_core.intervals import only_guesses
from tests.sample_components import FIT
from tests.sample_findings import sample_findings, sample_spec


@pytest.mark.parametrize(
    ("balanced", "classes", "told"),
    [
        ({"train": 1.0, "validation": 0.9, "test": 0.11}, 10, "on 11.0 % on average over their 10 classes"),
        (
            {"train": 1.0, "validation": 0.18},
            10,
            "validation images, and on 18.0 % on average over their 10 ",
        ),
        ({"train": 1.0, "validation": 0.1, "test": 0.2}, 10, None),
        ({"test": 0.54}, 2, "of 500 test images, and on 54.0 % on average over their 2 classes"),
        ({"test": 0.56}, 2, None),
        ({"test": 0.05}, 1000, None),
        ({"test": 0.0025}, 1000, None),  # over twice as often right as by chance
        ({"train": 0.1}, 10, None),
    ],
)
def test_a_classifier_that_guesses_is_told_first(balanced, classes: int, told):
    found, _ = sample_findings(4, 0)
    poor = Health(1000, 0.1, 0.1, 0.6, 3, 0.6, 0, 16, "poor")
    names = tuple(map(str, range(classes)))
    accuracy = dict.fromkeys(balanced, 0.97)  # of very unequal classes the largest says nothing
    each = {part: np.full(classes, share) for part, share in balanced.items()}
    counts = {part: np.full(classes, max(1, n // classes)) for part, n in found.models.images.items()}
    models = dataclasses.replace(
        found.models,
        health=poor,
        images={part: int(of_each.sum()) for part, of_each in counts.items()},
        accuracy=accuracy,
        class_accuracy=each,
        class_images=counts,
        classes=names,
    )
    text = why_undecided(sample_spec(), dataclasses.replace(found, models=models))
    assert text is not None and text.startswith("the classifier" if told else "the β-VAE")
    assert (told or "") in text


def test_a_constant_answer_is_a_guess_where_some_classes_have_no_images_too():
    found, _ = sample_findings(4, 0)
    right = np.array([1.0, *[0.0] * 39, *[np.nan] * 60])  # 100 classes, 40 of them with test images
    classes = tuple(map(str, range(100)))
    models = dataclasses.replace(
        found.models,
        health=FIT,
        class_accuracy={"test": right},
        class_images={"test": np.where(np.isfinite(right), 12, 0)},
        classes=classes,
    )
    text = why_undecided(sample_spec(), dataclasses.replace(found, models=models))
    assert text is not None and "on 2.5 % on average over their 40 classes" in text


@pytest.mark.parametrize(
    ("right", "images", "classes", "told"),
    [
        (1, 2, 2, None),
        (10, 20, 2, "right on 50.0 % of 20 test images, and on 50.0 % on average over their 2 classes"),
        (1, 10, 10, "right on 10.0 % of 10 test images"),
        (0, 1, 10, None),
        (0, 4, 10, "right on 0.0 % of 4 test images"),
    ],
)
def test_images_of_which_a_good_classifier_may_get_as_few_right_do_not_tell_a_guess(
    right: int, images: int, classes: int, told: str | None
):
    share, models = right / images, sample_findings(4, 0)[0].models
    counts = {
        part: np.bincount(np.arange(count) % classes, minlength=classes)
        for part, count in (("validation", 60), ("test", images))
    }
    known = dataclasses.replace(
        models,
        images={"validation": 60, "test": images},
        accuracy={"validation": 1.0, "test": share},
        class_accuracy={
            "validation": np.ones(classes),
            "test": np.where(counts["test"] > 0, share, np.nan),
        },
        class_images=counts,
    )
    text = why_guessing(known)
    assert (text is None) is (told is None) and (told or "") in (text or "")


@pytest.mark.parametrize(
    ("train", "validation", "told"),
    [
        (
            [0.9, 0.0, 1.0],
            [0.5, 0.0, np.nan],
            "is right on none of 45 images of hen, so many scenarios may show",
        ),
        ([0.9, 0.0, 0.0], [0.5, 0.0, np.nan], "is right on none of 85 images of hen, cow, so"),
        ([0.9, 0.1, 1.0], [0.5, 0.0, np.nan], None),  # a few validation images may be wrong by chance
        ([0.9, 1.0, 1.0], [0.5, 1.0, np.nan], None),  # without a validation image
    ],
)
def test_classes_of_which_no_image_is_right_are_told(train, validation, told):
    accuracy = {"train": np.array(train), "validation": np.array(validation)}
    images = {"train": np.array([40, 40, 40]), "validation": np.array([5, 5, 0])}
    text = never_right(accuracy, images, ("cat", "hen", "cow"))
    assert (text is None) is (told is None) and (told or "") in (text or "")


def test_images_of_a_single_class_do_not_tell_a_guess():
    found, _ = sample_findings(4, 0)
    right = np.full(len(found.models.classes), np.nan)
    right[1] = 0.98
    counts = np.where(np.isfinite(right), 500, 0)
    models = dataclasses.replace(
        found.models, health=FIT, class_accuracy={"test": right}, class_images={"test": counts}
    )
    assert why_guessing(models) is None


@pytest.mark.parametrize(
    ("right", "counts", "guesses"),
    [
        ([0.99, 0.0], [1000, 1], False),  # the only image of its class is wrong
        ([0.99, 0.0], [1000, 3], False),
        ([0.99, 0.0], [1000, 8], True),
        ([1.0, 0.0, 0.0], [500, 1, 2], False),
        ([1.0] + [0.0] * 9, [3] * 10, True),
        ([1.0] + [0.0] * 9, [500] + [1] * 9, True),  # of nine classes the only image
        ([0.5, 0.5], [1000, 1000], True),
    ],
)
def test_a_class_of_one_or_few_images_makes_no_good_classifier_a_guessing_one(right, counts, guesses):
    models, images = sample_findings(4, 0)[0].models, {"test": np.array([*counts, 0])}
    accuracy = {"test": 0.99}
    known = dataclasses.replace(
        models,
        images={"test": sum(counts)},
        accuracy=accuracy,
        class_accuracy={"test": np.array([*right, np.nan])},
        class_images=images,
    )
    assert (why_guessing(known) is not None) is guesses


def test_many_images_of_each_class_show_that_a_poor_classifier_does_not_guess():
    right, counts = np.array([0.7, 0.6]), np.array([1000, 1000])
    assert not only_guesses(right, counts) and only_guesses(right - 0.15, counts)
