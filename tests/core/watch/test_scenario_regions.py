"""Regions of scenarios in latent space."""

from __future__ import annotations

import numpy as np

from defuse_core.artifacts import Corrections
from defuse_core.data import open_splits
from defuse_core.export.compare import share_inside
from defuse_core.models import load_vae
from defuse_core.watch.scenario_regions import fit_regions, training_codes


def test_a_scenario_with_a_single_image_has_a_region(tiny_spec, tiny_models):
    vae = load_vae(tiny_spec, tiny_models.vae)
    ordinary, _ = training_codes(tiny_spec, vae, open_splits(tiny_spec.data, tiny_spec.seed).train)
    single = np.zeros((1, 1, ordinary.shape[1]), np.float32)
    regions = fit_regions(vae, Corrections(np.array([0]), np.array([3]), single, single), ordinary)
    assert np.isfinite(regions.covariances).all()
    assert regions.recall[0, -1] == 1  # the image it is fitted on
    shares = regions.nearer_share(ordinary)
    assert np.isfinite(shares).all() and shares.max() > 0.9


def test_a_single_picture_is_inside_itself_alone():
    one = np.ones((1, 3), np.float32)
    assert share_inside(np.concatenate([one, one + 1]), one) == 0.5
