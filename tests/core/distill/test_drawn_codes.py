"""How codes are spread around means and failures, compared with covariances, quantiles and counts by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import mahalanobis

from defuse_core.artifacts import Anchors, ComponentFailures, Failures, Scenarios
from defuse_core.data import Images
from defuse_core.distill.draws import (
    FAILURES_KEPT,
    IMAGES_KEPT,
    Draws,
    component_failures,
    distances_from,
    draw_codes,
    gaussian_codes,
    in_region,
    smoothed,
    spread_draws,
    stacked,
    truncated_codes,
)
from defuse_core.seeds import generator
from tests.conftest import tiny
from tests.sample_components import sample_failures, sample_scenarios

SPEC = tiny()
MEAN, COVARIANCE = np.array([3.0, -2.0]), np.array([[4.0, 1.8], [1.8, 1.0]])
TAU = 0.25


def component(failures: ComponentFailures | None = None, taus: bool = False) -> Scenarios:
    """One component with a covariance that is not diagonal, so that a root is not its own transpose."""
    one = np.ones(1)
    plain = sample_scenarios(one, MEAN[None], COVARIANCE[None], one, 9, True, 1, 0.0, failures=failures)
    return replace(plain, taus=np.array([TAU])) if taus else plain


def anchored(held_out: list[bool]) -> ComponentFailures:
    """A failure at each of so many images."""
    images = np.arange(len(held_out))
    codes = generator(0, "test").normal(size=(1, len(images), 2)).astype(np.float32)
    pixels = np.zeros((len(images), 1, 4, 4), np.uint8)
    return ComponentFailures(codes, images[None], Anchors(pixels, images, np.array(held_out)))


def test_codes_have_the_covariance_of_the_component_times_tau():
    codes = gaussian_codes(component(), 0, 50_000, TAU, generator(0, "a"))
    np.testing.assert_allclose(np.cov(codes.T), TAU * COVARIANCE, atol=0.02)
    np.testing.assert_allclose(codes.mean(axis=0), MEAN, atol=0.02)


def test_truncated_codes_fill_the_ellipsoid_of_nine_tenths_and_no_more():
    normal = generator(0, "a").standard_normal((5000, 2))
    for codes, covariance in (
        (truncated_codes(MEAN, COVARIANCE, normal), COVARIANCE),
        (draw_codes(SPEC, component(taus=True), 0, 5000, generator(0, "b")).codes, TAU * COVARIANCE),
    ):
        inverse = np.linalg.inv(covariance)
        square = np.array([mahalanobis(code, MEAN, inverse) ** 2 for code in codes])
        # within the ellipsoid the χ² distribution is as it was, but for the tenth that is cut off
        share = stats.chi2(2).cdf(square) / 0.9
        assert share.max() <= 1 + 1e-4
        assert stats.kstest(share.clip(0, 1), "uniform").pvalue > 0.001


@pytest.mark.parametrize("taus", [False, True])
def test_a_draw_near_a_failure_is_moved_towards_the_mean_and_has_the_noise_of_the_component(taus):
    failures = anchored([False, True])
    rows, scenarios = np.array([1, 0, 1]), component(failures, taus)
    still = smoothed(scenarios, 0, rows, TAU, np.full((3, 2), 1e-9), truncated=taus)
    expected = MEAN + np.sqrt(1 - TAU) * (failures.codes[0, rows] - MEAN)
    np.testing.assert_allclose(still.codes, expected, atol=1e-6)
    assert still.anchors.tolist() == [1, 0, 1]
    noise = smoothed(
        scenarios,
        0,
        np.zeros(50_000, np.int64),
        TAU,
        generator(0, "a").normal(size=(50_000, 2)),
        truncated=taus,
    )
    found = np.cov(noise.codes.T)
    np.testing.assert_allclose(found / found[1, 1], COVARIANCE, atol=0.15)
    assert (found[1, 1] == pytest.approx(TAU, abs=0.01)) is not taus  # less where it is truncated


def test_with_a_tau_over_one_a_draw_forgets_its_failure():
    still = smoothed(component(anchored([False])), 0, np.array([0]), 2.0, np.zeros((1, 2)), truncated=False)
    np.testing.assert_allclose(still.codes[0], MEAN)


@pytest.mark.parametrize("held_out", [False, True])
def test_draws_are_at_the_images_of_the_half_that_is_asked_for(held_out):
    halves = [True, False, False, True, True]
    scenarios = component(anchored(halves))
    rng = generator(0, "a")
    for draws in (
        draw_codes(SPEC, scenarios, 0, 60, rng, held_out=held_out),
        draw_codes(SPEC, scenarios, 0, 60, rng, held_out=held_out, factor=4.0),
    ):
        assert set(draws.anchors) == {row for row, half in enumerate(halves) if half is held_out}


def of_sources(source: np.ndarray) -> Failures:  # type: ignore[type-arg]
    labels = np.zeros(len(source), np.int64)
    return sample_failures(np.stack([source, source], axis=1).astype(np.float32), source, labels, labels)


def kept_of(source: np.ndarray, images: int) -> np.ndarray:  # type: ignore[type-arg]
    """Return how many of the failures that are kept come from each image, (images,)."""
    train = Images(np.zeros((images, 1, 2, 2), np.uint8), np.zeros(images, np.int64))
    kept = component_failures([of_sources(source)], train, 0)
    np.testing.assert_array_equal(kept.codes[0, :, 0], kept.anchors.source[kept.anchor[0]])
    return np.bincount(kept.anchors.source[kept.anchor[0]], minlength=images)


def test_each_image_gives_as_many_failures_as_the_others_where_it_has_so_many():
    counts = kept_of(np.repeat([0, 1, 2, 3], [1, 30, 1000, 1000]), 4)
    assert counts[:2].tolist() == [1, 30]
    assert sorted(counts[2:]) == [112, 113] and counts.sum() == FAILURES_KEPT


def test_failures_of_few_codes_are_repeated_in_turn():
    assert sorted(kept_of(np.arange(3), 3)) == [85, 85, 86]


def test_of_many_images_as_many_as_are_kept_are_drawn_from_all():
    images = 4 * IMAGES_KEPT
    used = np.flatnonzero(kept_of(np.repeat(np.arange(images), 8), images))
    assert len(used) == IMAGES_KEPT
    assert used.min() < images / 8 and used.max() > images * 7 / 8


def test_components_with_the_same_failures_keep_others_of_them():
    images = 4 * IMAGES_KEPT
    train = Images(np.zeros((images, 1, 2, 2), np.uint8), np.zeros(images, np.int64))
    kept = component_failures([of_sources(np.arange(images))] * 2, train, 0)
    one, other = (set(kept.anchors.source[anchor].tolist()) for anchor in kept.anchor)
    assert len(one) == len(other) == IMAGES_KEPT and len(one & other) < IMAGES_KEPT / 2


def test_another_seed_keeps_other_failures_and_holds_out_other_images():
    images = 4 * IMAGES_KEPT
    train = Images(np.zeros((images, 1, 2, 2), np.uint8), np.zeros(images, np.int64))
    many, few = (
        [component_failures([of_sources(np.arange(count))], train, seed).anchors for seed in (0, 1)]
        for count in (images, 20)
    )
    assert many[0].source.tolist() != many[1].source.tolist()
    assert few[0].source.tolist() == few[1].source.tolist() == list(range(20))
    assert few[0].held_out.tolist() != few[1].held_out.tolist()


def test_failures_that_are_kept_of_an_image_are_drawn_from_all_of_its_own():
    codes, source = np.arange(2000, dtype=np.float32).reshape(1000, 2), np.zeros(1000, np.int64)
    train = Images(np.zeros((1, 1, 2, 2), np.uint8), np.zeros(1, np.int64))
    kept = component_failures([sample_failures(codes, source, source, source)], train, 0).codes[0, :, 0]
    assert len(np.unique(kept)) == FAILURES_KEPT and kept.min() < 200 and kept.max() > 1800


def test_the_region_of_a_component_holds_99_of_100_of_its_codes():
    scenarios = component()
    inverse = np.linalg.inv(COVARIANCE)
    codes = gaussian_codes(scenarios, 0, 2000, 1.0, generator(0, "a"))
    expected = np.array([mahalanobis(code, MEAN, inverse) for code in codes.astype(np.float64)])
    np.testing.assert_allclose(distances_from(scenarios, 0, codes), expected, rtol=1e-9)
    inside = in_region(scenarios, 0, codes)
    np.testing.assert_array_equal(inside, expected**2 <= stats.chi2(2).ppf(0.99))
    assert 0.98 < inside.mean() < 1


def test_draws_keep_the_image_of_each_code_where_they_are_taken_joined_and_stacked():
    first = Draws(np.array([[1.0], [2.0]], np.float32), np.array([10, 20]))
    other = Draws(np.array([[3.0]], np.float32), np.array([30]))
    joined = first.joined(other)
    assert (joined.codes[:, 0].tolist(), joined.anchors.tolist()) == ([1, 2, 3], [10, 20, 30])
    taken = joined.take(np.array([2, 0]))
    assert (taken.codes[:, 0].tolist(), taken.anchors.tolist()) == ([3, 1], [30, 10])
    codes, anchors = stacked([first, taken], 2, 1)
    assert (codes[..., 0].tolist(), anchors.tolist()) == ([[1, 2], [3, 1]], [[10, 20], [30, 10]])
    plain = Draws(first.codes)
    assert plain.joined(plain).anchors is None and plain.take(np.array([0])).anchors is None
    assert stacked([plain], 2, 1)[1] is None


def test_each_component_is_reviewed_in_an_order_of_its_own():
    plain, failures = component(), anchored([False] * 12)
    both = replace(
        plain.take(np.array([0, 0])),
        failures=ComponentFailures(
            failures.codes.repeat(2, axis=0), failures.anchor.repeat(2, axis=0), failures.anchors
        ),
    )
    orders = [spread_draws(SPEC, both, number, 12, generator(0, "a")).anchors.tolist() for number in (0, 1)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == list(range(12))
    other = spread_draws(SPEC.model_copy(update={"seed": 1}), both, 0, 12, generator(0, "a"))
    assert other.anchors.tolist() != orders[0]
