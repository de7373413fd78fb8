"""Images that draws for review are anchored at."""

from __future__ import annotations

import numpy as np
import pytest

from defuse_core.artifacts import Failures, Scenarios
from defuse_core.codec import decode, encode
from defuse_core.data import Images
from defuse_core.distill.draws import component_failures, draw_codes, spread_draws
from defuse_core.seeds import generator
from tests.conftest import tiny

SPEC = tiny()


def one_component(images: int, tracks: int | None) -> Scenarios:
    """One component with failures of so many images, which belong to tracks by turns."""
    source = np.repeat(np.arange(images), 3)
    codes = generator(0, "test").normal(size=(len(source), 3)).astype(np.float32)
    of_track = None if tracks is None else np.arange(images) % tracks
    train = Images(np.zeros((images, 1, 4, 4), np.uint8), np.zeros(images, np.int64), of_track)
    failures = component_failures([Failures(codes, source, *np.zeros((2, len(source)), np.int64))], train, 0)
    one = np.ones(1)
    return Scenarios(one, np.zeros((1, 3)), np.eye(3)[None], one, len(codes), True, 1, 0.0, failures=failures)


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


def test_plain_draws_for_review_are_those_of_the_component():
    one = np.ones(1)
    plain = Scenarios(one, np.zeros((1, 3)), np.eye(3)[None], one, 5, True, 1, 0.0)
    for_review = spread_draws(SPEC, plain, 0, 10, generator(0, "a"))
    np.testing.assert_array_equal(for_review.codes, draw_codes(SPEC, plain, 0, 10, generator(0, "a")).codes)


def test_the_tracks_of_anchors_are_stored():
    scenarios = one_component(16, 4)
    stored = decode(Scenarios, encode(scenarios), "scenarios").failures.anchors
    np.testing.assert_array_equal(stored.track, stored.source % 4)
    np.testing.assert_array_equal(stored.take(np.array([3])).track, [3])
