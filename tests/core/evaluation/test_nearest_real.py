"""Whether the classifier fails on the real images nearest to a scenario more often than on its class."""

from __future__ import annotations

import numpy as np
import pytest

from defuse_core.evaluation.nearest_real import _error_nearby, _outcomes


def in_order(near: int, far: int, images: int) -> np.ndarray:  # type: ignore[type-arg]
    """Return which images are wrong, in order of distance: the `near` nearest and the `far` farthest."""
    wrong = np.zeros(images, np.bool_)
    wrong[:near] = wrong[images - far :] = True
    return wrong


@pytest.mark.parametrize(
    ("near", "far", "images", "seen"),
    [
        (12, 0, 30, True),  # the errors are around the scenario, of a class with few images
        (12, 8, 50, True),
        (0, 12, 50, False),
        (6, 0, 80, True),
        (30, 0, 1000, True),
    ],
)
def test_errors_around_a_scenario_are_seen_in_real_data_in_small_classes_too(near, far, images, seen):
    assert _error_nearby(in_order(near, far, images))[1:] == (seen, True)


def test_errors_that_are_spread_over_the_class_are_not_around_the_scenario():
    wrong = np.arange(400) % 10 == 0
    assert _error_nearby(wrong) == (0.1, False, True)


def test_errors_of_a_class_that_fails_as_a_whole_are_seen_around_each_of_its_scenarios():
    assert _error_nearby(np.arange(200) % 5 != 0) == (
        0.8,
        True,
        True,
    )  # 80 % of the class, 80 % of the nearest
    assert _error_nearby(np.ones(200, np.bool_))[1:] == (True, True)
    assert _error_nearby(np.arange(200) % 4 == 0)[1] is False  # 26 % of 50 may be 20 %
    assert _error_nearby(np.ones(4, np.bool_))[1:] == (False, False)  # one image tells nothing


def test_a_chance_of_five_percent_is_kept_where_the_scenario_has_nothing_to_do_with_the_errors():
    rng = np.random.default_rng(0)
    seen = [_error_nearby(rng.permutation(in_order(9, 0, 60)))[1] for _ in range(1000)]
    assert np.mean(seen) <= 0.05


@pytest.mark.parametrize(
    ("near", "images", "testable"),
    [(1, 30, False), (1, 3, False), (0, 5, False), (0, 100, True), (0, 0, False)],
)
def test_no_error_of_the_nearest_can_be_significant_with_few_errors_or_images(near, images, testable):
    assert _error_nearby(in_order(near, 0, images))[1:] == (False, testable)


def test_frames_of_one_sign_count_once_where_the_nearest_of_them_is():
    # track 7 is the nearest, with three of four frames wrong; 5 has one of two wrong, which is not most of them
    tracks = np.array([7, 5, 7, 2, 7, 7, 5])
    wrong = np.array([True, True, False, False, True, True, False])
    assert _outcomes(wrong, tracks).tolist() == [True, False, False]
    assert _outcomes(wrong, None) is wrong


def test_thirty_wrong_frames_of_one_sign_do_not_show_the_failures_of_a_scenario():
    tracks = np.repeat(np.arange(20), 30)
    wrong = tracks == 0
    assert _error_nearby(wrong)[1:] == (True, True)
    assert _error_nearby(_outcomes(wrong, tracks))[1:] == (False, False)
