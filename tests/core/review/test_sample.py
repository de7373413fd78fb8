"""Further draws of components in doubt are labelled as the gallery is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from defuse_core.artifacts import Scenarios
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
