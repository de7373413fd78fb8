"""The scenario watch: distances, calibration and recall."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis as reference

from defuse_core.config import ServeSection
from defuse_core.models import load_vae
from defuse_core.scenario_regions import mahalanobis
from services.serving.model import LoadedModel
from services.serving.watch import Watch


def test_distances_are_mahalanobis_distances_from_each_component(candidate, good_spec, pixels):
    vae = load_vae(good_spec, candidate.vae)
    images = torch.from_numpy(pixels[:7])
    with torch.inference_mode():
        codes = vae.encode(images)[0].numpy()
        found = Watch(vae, candidate.means, candidate.covariances)(images).numpy()
    inverses = [np.linalg.inv(c) for c in candidate.covariances]
    expected = [[reference(c, m, i) for m, i in zip(candidate.means, inverses, strict=True)] for c in codes]
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    np.testing.assert_allclose(
        mahalanobis(codes, candidate.means, candidate.covariances), expected, rtol=1e-6
    )


@pytest.mark.parametrize("share", [0.01, 0.05])
def test_the_configured_share_of_training_images_is_inside_a_scenario(candidate, splits, share):
    served = LoadedModel(candidate, ServeSection(watch_share=share))
    inside = served.predict(splits.train.batch(slice(0, len(splits.train)))).inside
    np.testing.assert_allclose(inside.mean(axis=0), share, atol=0.003)


def test_nearly_all_held_out_images_of_a_scenario_are_inside_it(candidate):
    recall = [np.interp(0.02, candidate.levels, recall) for recall in candidate.recall]
    assert min(recall) > 0.9
