"""Counts of the images and tracks that codes come from, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from defuse_core.artifacts import Failures
from defuse_core.distill.sources import Sources, certain_error, count_sources
from tests.sample_components import sample_failures


def failures(source: list[int], wrong: list[int] | None = None, track: list[int] | None = None) -> Failures:
    """Failures at these images, of which those of `wrong` are misclassified; image i is of track `track[i]`."""
    found = sample_failures(
        np.zeros((len(source), 2), np.float32), np.array(source), *np.zeros((2, len(source)), np.int64)
    )
    if wrong is not None:
        found = replace(found, source_wrong=np.isin(source, wrong))
    return found if track is None else replace(found, source_track=np.array(track)[source])


TRACK = [0, 0, 0, 1, 1, 2]


def test_an_image_with_many_codes_counts_once():
    counted = count_sources([failures([5, 3, 3, 0, 3], wrong=[3, 5]), failures([1], wrong=[])])
    assert (counted.support.tolist(), counted.wrong.tolist()) == ([3, 1], [2.0, 0.0])
    np.testing.assert_allclose(counted.error(), [2 / 3, 0])


def test_a_track_of_which_just_half_of_the_images_are_wrong_is_not_wrong():
    counted = count_sources([failures([5, 4, 3, 2, 1, 0, 0, 0], wrong=[0, 1, 3], track=TRACK)])
    tracks, wrong = counted.wrong_tracks()  # 2 of 3, 1 of 2 and none of 1
    assert (tracks.tolist(), wrong.tolist()) == ([3], [1.0])


def test_a_component_without_images_has_no_certain_error():
    nothing = Sources(np.array([0]), np.array([0.0]))
    assert np.isnan(nothing.error()).all() and nothing.certain_error().tolist() == [0]


def test_mixtures_have_tracks_only_where_each_has_them():
    tracked = count_sources([failures([0, 1], wrong=[0], track=TRACK), failures([5], wrong=[], track=TRACK)])
    plain = count_sources([failures([2, 3, 4], wrong=[3])])
    together = Sources.of_all([tracked, plain])
    assert (together.support.tolist(), together.wrong.tolist()) == ([2, 1, 3], [1.0, 0.0, 1.0])
    assert together.tracks is None and together.wrong_tracks() is None
    twice = Sources.of_all([tracked, tracked]).wrong_tracks()
    assert twice is not None and twice[0].tolist() == [1, 1, 1, 1]
    mixed = count_sources([failures([0], wrong=[0], track=TRACK), failures([1], wrong=[1])])
    assert mixed.tracks is None


@pytest.mark.parametrize("wrong", range(8))
def test_the_share_of_wrong_images_gives_back_how_many_there_are(wrong):
    exact = certain_error(np.array([49]), np.array([wrong / 49]))
    around = [certain_error(np.array([49]), np.array([(wrong + off) / 49])) for off in (-0.3, 0.3)]
    assert exact.tolist() == around[0].tolist() == around[1].tolist()
