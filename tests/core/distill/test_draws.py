"""Images that draws for review are anchored at."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from defuse_core.artifacts import Scenarios
from defuse_core.codec import decode, encode
from defuse_core.data import Images
from defuse_core.distill.draws import component_failures, draw_codes, spread_draws
from defuse_core.seeds import generator
from tests.conftest import tiny
from tests.sample_components import sample_failures, sample_scenarios

SPEC = tiny()


def one_component(images: int, tracks: int | None) -> Scenarios:
    """One component with failures of so many images, which belong to tracks by turns."""
    source = np.repeat(np.arange(images), 3)
    codes = generator(0, "test").normal(size=(len(source), 3)).astype(np.float32)
    of_track = None if tracks is None else np.arange(images) % tracks
    train = Images(np.zeros((images, 1, 4, 4), np.uint8), np.zeros(images, np.int64), of_track)
    failures = component_failures(
        [sample_failures(codes, source, *np.zeros((2, len(source)), np.int64))], train, 0
    )
    one = np.ones(1)
    return sample_scenarios(
        one, np.zeros((1, 3)), np.eye(3)[None], one, len(codes), True, 1, 0.0, failures=failures
    )


@pytest.mark.parametrize("tracks", [None, 4])
def test_no_image_is_reviewed_twice_before_all_were_and_tracks_take_turns(tracks):
    scenarios = one_component(16, tracks)
    anchors = scenarios.failures.anchors
    shown = spread_draws(SPEC, scenarios, 0, 10, generator(0, "a")).anchors
    more = spread_draws(SPEC, scenarios, 0, 6, generator(0, "b"), after=10).anchors
    reviewed = np.flatnonzero(~anchors.held_out).tolist()
    assert len(reviewed) == 8
    assert sorted(shown[:8]) == reviewed
    assert sorted([*shown[8:], *more]) == reviewed
    if tracks is not None:
        assert len(set(anchors.track[shown[:2]])) == 2  # two of four tracks are held out


def test_draws_for_review_at_one_image_are_of_all_its_failures():
    # an image to review and one that is held out, with three failures each
    scenarios = one_component(2, None)
    still = replace(scenarios, covariances=1e-12 * scenarios.covariances)
    shown = spread_draws(SPEC, still, 0, 40, generator(0, "a"))
    assert len(np.unique(shown.anchors)) == 1 and len(np.unique(shown.codes.round(3), axis=0)) == 3


def test_plain_draws_for_review_are_those_of_the_component():
    one = np.ones(1)
    plain = sample_scenarios(one, np.zeros((1, 3)), np.eye(3)[None], one, 5, True, 1, 0.0)
    for_review = spread_draws(SPEC, plain, 0, 10, generator(0, "a"))
    np.testing.assert_array_equal(for_review.codes, draw_codes(SPEC, plain, 0, 10, generator(0, "a")).codes)


def test_wide_draws_have_a_multiple_of_the_reviewed_covariance_and_are_not_truncated():
    one = np.ones(1)
    plain = sample_scenarios(one, np.ones((1, 3)), 2 * np.eye(3)[None], one, 5, True, 1, 0.0)
    for scenarios, tau in (
        (plain, SPEC.review.tau),
        (plain.take(np.array([0]), taus=np.array([0.25])), 0.25),
    ):
        codes = draw_codes(SPEC, scenarios, 0, 20_000, generator(0, "a"), factor=4.0).codes
        np.testing.assert_allclose(np.cov(codes.T), 4 * tau * 2 * np.eye(3), atol=0.1 * tau * 8)
        np.testing.assert_allclose(codes.mean(axis=0), 1, atol=0.05)


@pytest.mark.parametrize("tau", [None, 0.25])
def test_wide_draws_near_failures_have_wider_noise_and_keep_their_failures(tau):
    scenarios = one_component(16, None)
    failures = replace(scenarios.failures, codes=np.full_like(scenarios.failures.codes, 5))
    scenarios = replace(scenarios, failures=failures, taus=None if tau is None else np.array([tau]))
    used = SPEC.review.tau if tau is None else tau
    codes = draw_codes(SPEC, scenarios, 0, 20_000, generator(0, "a"), factor=4.0).codes
    np.testing.assert_allclose(codes.mean(axis=0), 5 * np.sqrt(1 - used), atol=0.05)
    np.testing.assert_allclose(np.cov(codes.T), 4 * used * np.eye(3), atol=0.2 * used)


def test_the_tracks_of_anchors_are_stored():
    scenarios = one_component(16, 4)
    stored = decode(Scenarios, encode(scenarios), "scenarios").failures.anchors
    np.testing.assert_array_equal(stored.track, stored.source % 4)
    np.testing.assert_array_equal(stored.take(np.array([3])).track, [3])
