"""On which images the classifier is compared with other models."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from defuse_core.artifacts import ReferenceSet
from defuse_core.review.undecided import are_worse, compared_images, why_undecided
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
        compared_images(dataclasses.replace(models, accuracy=accuracy, validation_from_training=known))
        == part
    )


@pytest.mark.parametrize("seen", [True, False])
def test_reference_models_are_not_worse_on_images_that_the_classifier_alone_has_seen(seen: bool) -> None:
    found, _ = sample_findings(4, 0)
    accuracy = {"train": 1.0, "validation": 0.995}
    models = dataclasses.replace(found.models, health=FIT, accuracy=accuracy, validation_from_training=seen)
    references = ReferenceSet(({},), 1000, np.array([0.9]), np.array([np.nan]))
    known = {"references": references, "psi": found.psi, "scenarios": None}
    text = why_undecided(sample_spec(), found.gallery, found.verdicts, models=models, **known)
    assert (text is None) is seen  # else: the reference models are right on fewer validation images


def test_few_images_do_not_show_that_reference_models_are_worse() -> None:
    found, _ = sample_findings(4, 0)
    references = ReferenceSet(({},), 1000, np.array([0.943]), np.array([0.943]))
    for images, told in ((50, False), (200, True)):  # one standard error is 3.3 points, and 1.6
        models = dataclasses.replace(found.models, health=FIT, images={"test": images})
        known = {"models": models, "references": references, "psi": found.psi, "scenarios": None}
        text = why_undecided(sample_spec(), found.gallery, found.verdicts, **known)
        assert (text is not None) is told


def test_the_difference_is_compared_with_the_errors_of_both() -> None:
    for images, worse in ((64, False), (71, True)):  # with the error of one alone 43 would do
        assert are_worse([0.8], 0.9, images) is worse


@pytest.mark.parametrize(("images", "worse"), [(1, False), (10, True), (0, False), (None, True)])
def test_a_single_image_does_not_show_that_models_are_worse(images: int | None, worse: bool) -> None:
    assert are_worse([0.0], 1.0, images) is worse
    assert not are_worse([0.0], float("nan"), images)
