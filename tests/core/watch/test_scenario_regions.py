"""Regions of scenarios in latent space."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial import distance

from defuse_core.artifacts import Corrections
from defuse_core.data import open_splits
from defuse_core.device import cpu_threads
from defuse_core.export.compare import share_inside
from defuse_core.models import encode_images, load_classifier, load_vae, predict
from defuse_core.watch import _answers, scenario_regions
from defuse_core.watch.scenario_regions import (
    VARIANCE_FLOOR,
    class_gaussians,
    fit_regions,
    mahalanobis,
    own_distances,
    training_codes,
)


def test_a_scenario_with_a_single_image_has_a_region(tiny_spec, tiny_models):
    vae = load_vae(tiny_spec, tiny_models.vae)
    ordinary, _ = training_codes(tiny_spec, vae, open_splits(tiny_spec.data, tiny_spec.seed).train)
    single = np.zeros((1, 1, ordinary.shape[1]), np.float32)
    regions = fit_regions(vae, Corrections(np.array([0]), np.array([3]), single, single), ordinary)
    spread = VARIANCE_FLOOR**2 * ordinary.var(axis=0).mean()  # a share of a small share of that of all images
    np.testing.assert_allclose(regions.covariances[0], spread * np.eye(4), rtol=1e-5)
    assert regions.recall[0, -1] == 1  # the image it is fitted on


def test_of_the_training_images_a_share_of_each_level_is_as_near_to_a_scenario(tiny_spec, tiny_models):
    vae = load_vae(tiny_spec, tiny_models.vae)
    ordinary, _ = training_codes(tiny_spec, vae, open_splits(tiny_spec.data, tiny_spec.seed).train)
    codes = np.random.default_rng(0).standard_normal((2, 9, 4)).astype(np.float32)
    regions = fit_regions(vae, Corrections(np.arange(2), np.array([3, 5]), codes, codes), ordinary)
    near = mahalanobis(ordinary, regions.means, regions.covariances)[..., None] <= regions.distances
    levels = np.broadcast_to(regions.levels, (2, len(regions.levels)))
    np.testing.assert_allclose(near.mean(axis=0), levels, atol=1.5 / len(ordinary))
    assert (regions.levels[0], regions.levels[-1]) == (0, 1)


def test_a_single_picture_is_inside_itself_alone():
    one = np.ones((1, 3), np.float32)
    assert share_inside(np.concatenate([one, one + 1]), one) == 0.5


def test_codes_that_are_all_equal_have_a_region(tiny_spec, tiny_models):
    vae = load_vae(tiny_spec, tiny_models.vae)
    alike = np.ones((40, 4), np.float32)  # of a β-VAE whose encoder ignores the image
    means, covariances = class_gaussians(alike, np.arange(40) % 10, 10)
    assert (mahalanobis(alike, means, covariances) == 0).all()
    single = np.zeros((1, 1, 4), np.float32)
    regions = fit_regions(vae, Corrections(np.array([0]), np.array([3]), single, single), alike)
    assert np.isfinite(regions.distances).all()


def test_a_class_gaussian_needs_one_image_of_each_class():
    codes = np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32)
    means, covariances = class_gaussians(codes, np.arange(10), 10)
    found = mahalanobis(codes, means, covariances)
    assert np.isfinite(found).all() and (found.argmin(axis=1) == np.arange(10)).all()


def test_the_gaussian_of_a_class_counts_twice_z_images_of_all_classes():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [4, 200])
    codes = (rng.standard_normal((204, 3)) * np.where(labels == 0, 3, 1)[:, None]).astype(np.float32)
    means, covariances = class_gaussians(codes, labels, 3)
    few, many = (np.cov(codes[labels == label].T, bias=True) for label in (0, 1))
    within = (4 * few + 200 * many) / 204
    floor = VARIANCE_FLOOR * np.trace(within) / 3 * np.eye(3)
    np.testing.assert_allclose(covariances[0], (4 * few + 6 * within) / 10 + floor, atol=1e-5)
    np.testing.assert_allclose(covariances[1], (200 * many + 6 * within) / 206 + floor, atol=1e-5)
    np.testing.assert_allclose(covariances[2], within + floor, atol=1e-5)
    np.testing.assert_allclose(means[2], codes.mean(axis=0), atol=1e-5)


def test_what_an_answer_is_measured_by_does_not_know_its_label(tiny_spec, tiny_models):
    splits = open_splits(tiny_spec.data, tiny_spec.seed)
    vae = load_vae(tiny_spec, tiny_models.vae)
    classifier = load_classifier(tiny_spec, tiny_models.classifier, 10)
    codes, labels = training_codes(tiny_spec, vae, splits.train)
    gaussians = class_gaussians(codes, labels, 10)
    test = splits.test
    found = _answers(classifier, vae, test, gaussians)
    assert 0 < found.wrong.sum() < len(found.labels)
    latent, predicted = encode_images(vae, test.batch()), predict(classifier, test)
    for row in (0, *np.flatnonzero(found.wrong)[:3]):
        mean, covariance = (part[predicted[row]] for part in gaussians)
        expected = distance.mahalanobis(latent[row], mean, np.linalg.inv(covariance))
        assert found.distance[row] == pytest.approx(expected, rel=1e-3)


def test_each_code_is_measured_from_its_own_component_alone_and_as_among_all(monkeypatch):
    rng, measured = np.random.default_rng(0), list[int]()
    codes, owners = rng.standard_normal((60, 5)).astype(np.float32), rng.integers(1, 30, 60)
    means, roots = rng.standard_normal((30, 5)), rng.standard_normal((30, 5, 9))
    covariances = roots @ roots.transpose(0, 2, 1)
    assert (np.bincount(owners) == 1).any()
    with cpu_threads(1):
        expected = mahalanobis(codes, means, covariances)[np.arange(60), owners]

        def counting(codes, means, covariances):  # type: ignore[no-untyped-def]
            measured.append(len(codes) * len(means))
            return mahalanobis(codes, means, covariances)

        monkeypatch.setattr(scenario_regions, "mahalanobis", counting)
        np.testing.assert_array_equal(own_distances(codes, owners, means, covariances), expected)
    assert sum(measured) <= 2 * 60 and len(measured) == len(np.unique(owners))
