"""On which images the classifier is compared with other models."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from defuse_core.artifacts import Models, ReferenceSet
from defuse_core.evaluation.undecided import (
    are_worse,
    compared_part,
    why_undecided,
    worse_on_average,
    worse_references,
)
from tests.sample_components import FIT
from tests.sample_findings import sample_findings, sample_spec


@pytest.mark.parametrize(
    ("parts", "known", "part"),
    [
        (("train", "validation", "test"), True, "test"),
        (("train", "validation", "test"), False, "test"),
        (("train", "validation"), False, "validation"),
        (("train", "validation"), True, None),
        (("train",), False, None),
    ],
)
def test_images_that_the_classifier_may_know_compare_nothing(parts, known: bool, part: str | None) -> None:
    models = sample_findings(1, 0)[0].models
    accuracy = dict.fromkeys(parts, 0.9)
    assert (
        compared_part(dataclasses.replace(models, accuracy=accuracy, validation_from_training=known)) == part
    )


@pytest.mark.parametrize("seen", [True, False])
def test_reference_models_are_not_worse_on_images_that_the_classifier_alone_has_seen(seen: bool) -> None:
    found, _ = sample_findings(4, 0)
    accuracy = {"train": 1.0, "validation": 0.995}
    models = dataclasses.replace(found.models, health=FIT, accuracy=accuracy, validation_from_training=seen)
    references = ReferenceSet(({},), 1000, np.array([0.9]), np.array([np.nan]))
    text = why_undecided(sample_spec(), dataclasses.replace(found, models=models, references=references))
    assert (text is None) is seen  # else: the reference models are right on fewer validation images


def test_few_images_do_not_show_that_reference_models_are_worse() -> None:
    found, _ = sample_findings(4, 0)
    references = ReferenceSet(({},), 1000, np.array([0.943]), np.array([0.943]))
    for images, told in ((50, False), (200, True)):  # one standard error is 3.3 points, and 1.6
        models = dataclasses.replace(found.models, health=FIT, images={"test": images})
        text = why_undecided(sample_spec(), dataclasses.replace(found, models=models, references=references))
        assert (text is not None) is told


def test_the_difference_is_compared_with_the_errors_of_both() -> None:
    for images, worse in ((64, False), (71, True)):  # with the error of one alone 43 would do
        assert are_worse([0.8], 0.9, images) is worse


@pytest.mark.parametrize(("images", "worse"), [(1, False), (10, True), (0, False), (None, True)])
def test_a_single_image_does_not_show_that_models_are_worse(images: int | None, worse: bool) -> None:
    assert are_worse([0.0], 1.0, images) is worse
    assert not are_worse([0.0], float("nan"), images)


def test_models_are_worse_from_over_two_points_on() -> None:
    assert are_worse([0.877], 0.9, None) and not are_worse([0.883], 0.9, None)


def of_two_classes(right: list[float], images: list[int]) -> Models:
    """A classifier that is right on such shares of the images of healthy and of sick ones."""
    counts, share = np.array(images), np.array(right)
    return dataclasses.replace(
        sample_findings(1, 0)[0].models,
        health=FIT,
        classes=("healthy", "sick"),
        images={"test": sum(images)},
        accuracy={"test": float((share * counts).sum() / counts.sum())},
        class_accuracy={"test": share},
        class_images={"test": counts},
    )


def models_of(models: Models, *by_class: list[float]) -> ReferenceSet:
    """Reference models that are right on such shares of the test images of each class."""
    table, counts = np.array(by_class), models.class_images["test"]
    accuracy = (table * counts).sum(axis=1) / counts.sum()
    return ReferenceSet(({},) * len(table), 600, accuracy, accuracy, {"test": table})


ALWAYS_HEALTHY = [1.0, 0.0]


def test_reference_models_that_never_recognise_a_rare_class_are_worse() -> None:
    models = of_two_classes([0.996, 0.725], [2000, 40])
    references = models_of(models, ALWAYS_HEALTHY)
    assert not are_worse(references.test.tolist(), models.accuracy["test"], models.images["test"])
    assert (
        "are at best right on 50.0 % of the test images on average over the classes, and the classifier on 86.1 % "
        "(of sick on 0.0 %, and the classifier on 72.5 %), so they may take one for the other; train better ones"
    ) in (worse_references(sample_spec(), models, references) or "")
    unknown = dataclasses.replace(references, class_accuracy={})  # in a run that does not store them
    assert worse_references(sample_spec(), models, unknown) is None


@pytest.mark.parametrize(
    ("others", "images"),
    [
        ([ALWAYS_HEALTHY, [0.995, 0.7]], [2000, 40]),  # one of them does
        ([ALWAYS_HEALTHY], [2000, 1]),
        ([[0.99, 0.71]], [2000, 40]),
    ],
)
def test_reference_models_that_may_recognise_each_class_as_well_are_not_worse(others, images) -> None:
    models = of_two_classes([0.996, 0.725], images)
    assert worse_references(sample_spec(), models, models_of(models, *others)) is None


def test_classes_that_reference_models_know_better_and_worse_do_not_make_them_worse() -> None:
    """As on the 43 classes of signs, some of them with few images."""
    rng = np.random.default_rng(0)
    counts, names = rng.integers(30, 700, 43), tuple(map(str, range(43)))
    right, theirs = rng.uniform(0.7, 1, 43), rng.uniform(0.7, 1, 43)
    right[3], theirs[3] = 0.95, 0.4
    theirs[7:11] = 1.0
    accuracy = {"test": 0.9}
    models = dataclasses.replace(
        sample_findings(1, 0)[0].models,
        classes=names,
        images={"test": int(counts.sum())},
        accuracy=accuracy,
        class_accuracy={"test": right},
        class_images={"test": counts},
    )
    assert worse_on_average(theirs[None], models) is None
    assert worse_on_average(np.maximum(theirs - 0.1, 0)[None], models) is not None
