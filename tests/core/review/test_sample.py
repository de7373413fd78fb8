"""Further draws of components in doubt are labelled as the gallery is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from defuse_core.artifacts import Anchors, ComponentFailures, Scenarios
from defuse_core.progress import silent
from defuse_core.review.sample import sample_more_images
from tests.conftest import TINY, recommended


def test_further_images_have_the_majoritys_label_as_those_of_the_gallery(tiny_models, references):
    two = np.full(2, 0.5)
    scenarios = Scenarios(two, np.zeros((2, 4)), np.stack([np.eye(4)] * 2), two, 100, True, 5, -1.0)
    first = references.models[0]
    contrary = {  # the same model, which answers the next class: never of one mind with the other two
        name: np.roll(array, 1, axis=0) if name.startswith("net.27") else array
        for name, array in first.items()
    }
    models = replace(references, models=(first, first, contrary))
    reference = TINY["review"]["reference"] | {"min_confidence": 0.0}
    spec = recommended(review={"tau": 0.1, "reference": reference})
    doubtful = np.array([True, False])
    more = sample_more_images(spec, tiny_models, models, scenarios, doubtful, progress=silent)
    assert more.drawn.tolist() == more.labelled.tolist() == [spec.review.more_images, 0]


def test_further_images_know_the_training_images_or_tracks_that_they_show(tiny_models, references):
    one, rng = np.ones(1), np.random.default_rng(0)
    pixels = rng.integers(256, size=(6, 1, 16, 16)).astype(np.uint8)
    anchors = Anchors(pixels, 100 + np.arange(6), np.arange(6) % 2 == 1)  # 100, 102 and 104 are reviewed
    failures = ComponentFailures(rng.normal(size=(1, 6, 4)).astype(np.float32), np.arange(6)[None], anchors)
    scenarios = Scenarios(one, np.zeros((1, 4)), np.eye(4)[None], one, 6, True, 5, -1.0, failures=failures)
    spec = recommended(review={"tau": 0.1, "more_images": 20})
    more = sample_more_images(spec, tiny_models, references, scenarios, np.array([True]), progress=silent)
    assert set(more.unit[0].tolist()) == {100, 102, 104}
    assert (more.outcome[0] >= 0).sum() == more.labelled[0]
    assert (more.outcome[0] == 1).sum() == more.misclassified[0]
    tracks = replace(failures, anchors=replace(anchors, track=np.repeat([7, 8], 3)))
    of_tracks = replace(scenarios, failures=tracks)
    more = sample_more_images(spec, tiny_models, references, of_tracks, np.array([True]), progress=silent)
    assert set(more.unit[0].tolist()) == {7, 8}
