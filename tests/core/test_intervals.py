import numpy as np
import pytest
from scipy.stats import binomtest

from defuse_core.intervals import lower_bound, probability_not_over, significantly_over, wilson


@pytest.mark.parametrize(("hits", "total"), [(0, 5), (3, 10), (10, 10), (61, 64)])
def test_bounds_are_wilsons(hits, total):
    expected = binomtest(hits, total).proportion_ci(0.9, method="wilson")
    low, high = wilson(np.array([hits]), np.array([total]), 0.9)
    assert (low[0], high[0]) == pytest.approx((expected.low, expected.high))
    assert lower_bound(np.array([hits]), np.array([total]))[0] == pytest.approx(expected.low)


def test_nothing_seen_bounds_nothing():
    low, high = wilson(np.array([0]), np.array([0]))
    assert (low[0], high[0]) == (0, 1)


def test_a_share_that_is_over_by_chance_is_not_significant():
    hits, total = np.array([10, 6, 0]), np.array([10, 10, 0])
    assert significantly_over(hits, total, 0.5, 0.05).tolist() == [True, False, False]


def test_at_most_the_wanted_share_of_discoveries_is_false():
    rng = np.random.default_rng(0)
    shares = np.repeat([0.5, 0.95], [800, 200])  # true shares; 800 are not over a half
    false, found = 0, 0
    for _ in range(20):
        over = significantly_over(rng.binomial(20, shares), np.full(1000, 20), 0.5, 0.1)
        false, found = false + int(over[:800].sum()), found + int(over.sum())
    assert found > 0.8 * 20 * 200
    assert false / found < 0.1


def test_the_chance_that_a_share_is_not_over_falls_with_its_hits():
    chance = probability_not_over(np.array([5, 9, 10]), np.array([10, 10, 10]), 0.5)
    assert chance[0] == pytest.approx(0.5)
    assert chance[0] > chance[1] > chance[2] == pytest.approx(0.5**11)


def test_no_components_are_no_discoveries():
    none = np.zeros(0, np.int64)
    assert significantly_over(none, none, 0.5, 0.05).shape == (0,)
