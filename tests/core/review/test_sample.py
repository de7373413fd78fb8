"""Further draws of components in doubt are labelled as the gallery is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from defuse_core.artifacts import (
    I64,
    NONE_OF_THE_ABOVE,
    Anchors,
    ComponentFailures,
    Corrections,
    Scenarios,
    Verdicts,
)
from defuse_core.local import LocalCompute
from defuse_core.protocols import silent
from defuse_core.review import sample
from defuse_core.review.sample import (
    Examiner,
    filter_corrections,
    sample_corrections,
    sample_gallery,
    sample_more_images,
    with_used_anchors,
)
from tests.conftest import TINY, recommended
from tests.sample_components import sample_scenarios


def test_further_images_have_the_majoritys_label_as_those_of_the_gallery(tiny_models, references):
    two = np.full(2, 0.5)
    scenarios = sample_scenarios(two, np.zeros((2, 4)), np.stack([np.eye(4)] * 2), two, 100, True, 5, -1.0)
    first = references.models[0]
    contrary = {  # the same model, which answers the next class: never of one mind with the other two
        name: np.roll(array, 1, axis=0) if name.startswith("net.27") else array
        for name, array in first.items()
    }
    models = replace(references, models=(first, first, contrary))
    reference = TINY["review"]["reference"] | {"min_confidence": 0.0}
    spec = recommended(review={"tau": 0.1, "reference": reference})
    doubtful = np.array([True, False])
    more = sample_more_images(Examiner(spec, tiny_models, models, scenarios), doubtful, progress=silent)
    assert more.drawn.tolist() == more.labelled.tolist() == [spec.review.more_images, 0]
    reference = TINY["review"]["reference"] | {"min_confidence": 0.9999}
    sure = recommended(review={"tau": 0.1, "reference": reference})
    unsure = sample_more_images(Examiner(sure, tiny_models, models, scenarios), doubtful, progress=silent)
    assert unsure.labelled[0] < unsure.drawn[0]


def anchored_component(track: I64 | None = None) -> Scenarios:
    """Return one component with six failures at training images 100 to 105, of which the even ones are reviewed."""
    one, rng = np.ones(1), np.random.default_rng(0)
    pixels = rng.integers(256, size=(6, 1, 16, 16)).astype(np.uint8)
    anchors = Anchors(pixels, 100 + np.arange(6), np.arange(6) % 2 == 1, track)
    failures = ComponentFailures(rng.normal(size=(1, 6, 4)).astype(np.float32), np.arange(6)[None], anchors)
    return sample_scenarios(one, np.zeros((1, 4)), np.eye(4)[None], one, 6, True, 5, -1.0, failures=failures)


def test_further_images_know_the_training_images_or_tracks_that_they_show(tiny_models, references):
    scenarios = anchored_component()
    spec = recommended(review={"tau": 0.1, "more_images": 20})
    more = sample_more_images(
        Examiner(spec, tiny_models, references, scenarios), np.array([True]), progress=silent
    )
    assert set(more.unit[0].tolist()) == {100, 102, 104}
    assert (more.outcome[0] >= 0).sum() == more.labelled[0]
    assert (more.outcome[0] == 1).sum() == more.misclassified[0]
    of_tracks = anchored_component(track=np.repeat([7, 8], 3))
    more = sample_more_images(
        Examiner(spec, tiny_models, references, of_tracks), np.array([True]), progress=silent
    )
    assert set(more.unit[0].tolist()) == {7, 8}


def two_components(**changes) -> Scenarios:
    two = np.full(2, 0.5)
    means = np.stack([np.zeros(4), np.ones(4)])
    return sample_scenarios(two, means, np.stack([np.eye(4)] * 2), two, 100, True, 5, -1.0, **changes)


def test_further_draws_are_none_of_those_that_were_reviewed(tiny_models, references, monkeypatch):
    draws, spread = [], sample.spread_draws

    def kept(*args, **options):
        draws.append(spread(*args, **options))
        return draws[-1]

    monkeypatch.setattr(sample, "spread_draws", kept)
    spec, scenarios = recommended(review={"tau": 0.1, "more_images": 3}), two_components()
    gallery = sample_gallery(spec, tiny_models, scenarios, progress=silent)
    examiner = Examiner(spec, tiny_models, references, scenarios)
    more = sample_more_images(examiner, np.array([True, True]), progress=silent)
    assert more.unit is None and more.outcome is None  # decoded plainly
    np.testing.assert_array_equal(np.stack([one.codes for one in draws[:2]]), gallery.codes)
    assert not np.isclose(gallery.codes[0], gallery.codes[1] - 1).any()  # each has a seed of its own
    every = np.concatenate([one.codes for one in draws])
    assert len(np.unique(every, axis=0)) == len(every) == 2 * (spec.review.images + 3)


def test_further_draws_are_at_other_training_images_than_the_gallery(tiny_models, references):
    scenarios = anchored_component()
    spec = recommended(review={"tau": 0.1, "images": 2, "more_images": 1})
    gallery = sample_gallery(spec, tiny_models, scenarios, progress=silent)
    more = sample_more_images(
        Examiner(spec, tiny_models, references, scenarios), np.array([True]), progress=silent
    )
    shown = [*gallery.source[0].tolist(), *more.unit[0].tolist()]
    assert sorted(shown) == [100, 102, 104] and gallery.track is None
    of_tracks = anchored_component(track=10 + np.arange(6))
    gallery = sample_gallery(spec, tiny_models, of_tracks, progress=silent)
    np.testing.assert_array_equal(gallery.track, gallery.source - 90)


def test_images_that_are_drawn_at_none_are_dropped_and_the_others_keep_their_own():
    pixels = np.arange(6, dtype=np.uint8)[:, None, None, None]
    anchors = Anchors(pixels, 100 + np.arange(6), np.zeros(6, bool))
    tune, test = np.array([[5, 1, 1]]), np.array([[3, 5]])
    codes = np.zeros((1, 3, 4), np.float32), np.zeros((1, 2, 4), np.float32)
    fixes = Corrections(
        np.array([0]), np.array([8]), *codes, anchors=anchors, tune_anchor=tune, test_anchor=test
    )
    found = with_used_anchors(fixes)
    assert found.anchors.source.tolist() == [101, 103, 105]
    assert found.anchors.source[found.tune_anchor].tolist() == (100 + tune).tolist()
    assert found.anchors.source[found.test_anchor].tolist() == (100 + test).tolist()


def test_a_scenario_whose_label_nobody_sees_is_named_and_tuned_on_draws_as_wide_as_the_reviewed_ones(
    tiny_models, references, caplog
):
    spec = recommended(identify={"min_probability": 1.0}, review={"tau": 0.01}, correct={"widen": 100.0})
    far = np.random.default_rng(0).normal(scale=9, size=(1, 24, 4)).astype(np.float32)
    drawn = Corrections(np.array([1]), np.array([3]), far, far)
    examiner = Examiner(spec, tiny_models, references, two_components())
    kept = filter_corrections(examiner, drawn, LocalCompute())
    assert kept.kept.tolist() == [0.0]
    assert "the label of scenario 1 in 0 % of the images" in caplog.text
    assert np.abs(kept.tune - 1).max() < 6 * np.sqrt(0.01)  # around its mean, at tau alone
    np.testing.assert_array_equal(kept.test, far)


@pytest.mark.parametrize("anchored", [False, True])
def test_corrections_have_the_label_of_their_own_component_and_test_on_held_out_images(anchored):
    rng, labels = np.random.default_rng(0), np.array([NONE_OF_THE_ABOVE, 7])
    pixels = rng.integers(256, size=(8, 1, 16, 16)).astype(np.uint8)
    anchors = Anchors(pixels, 100 + np.arange(8), np.arange(8) % 2 == 1)
    codes = rng.normal(size=(2, 8, 4)).astype(np.float32)
    failures = ComponentFailures(codes, np.stack([np.arange(8)] * 2), anchors) if anchored else None
    shares, own = np.ones(2), np.full((2, 5), 7)
    verdicts = Verdicts(labels, shares, shares, own, np.ones((2, 5)), 0, 0, ("no", "yes"), (), np.full(2, 5))
    spec = recommended(review={"tau": 0.1})
    fixes = sample_corrections(spec, two_components(failures=failures), verdicts)
    assert (fixes.scenario.tolist(), fixes.labels.tolist()) == ([1], [7])
    assert len(fixes.tune[0]) == spec.correct.tune_images and len(fixes.test[0]) == spec.correct.test_images
    if anchored:
        assert not (fixes.tune_anchor % 2).any() and (fixes.test_anchor % 2).all()
