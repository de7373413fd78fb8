import numpy as np
import pytest
from scipy import special, stats
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from defuse_core.artifacts import I64, Bool
from defuse_core.intervals import (
    auroc,
    binomial_tail,
    certain_class_loss,
    certain_loss,
    certain_mean_loss,
    class_accuracy,
    class_loss,
    exact_lower,
    mcnemar,
    mean_with_bounds,
    probability_not_over,
    share_of_units,
    share_with_bounds,
    significantly_over,
    wilson,
    wilson_lower,
)


@pytest.mark.parametrize(("hits", "total"), [(0, 5), (3, 10), (10, 10), (61, 64)])
def test_bounds_are_wilsons(hits, total):
    expected = binomtest(hits, total).proportion_ci(0.9, method="wilson")
    low, high = wilson(np.array([hits]), np.array([total]), 0.9)
    assert (low[0], high[0]) == pytest.approx((expected.low, expected.high))
    assert wilson_lower(np.array([hits]), np.array([total]))[0] == pytest.approx(expected.low)


def test_a_share_lies_within_its_bounds_whatever_was_rounded():
    total = np.arange(1, 2000)
    for hits in (np.zeros_like(total), total // 2, total):
        low, high = wilson(hits, total)
        assert (low >= 0).all() and (low <= hits / total).all()
        assert (high >= hits / total).all() and (high <= 1).all()


@pytest.mark.parametrize(("hits", "total"), [(0, 5), (3, 10), (10, 10), (61, 64)])
def test_chances_are_those_of_the_binomial_distribution(hits, total):
    assert binomial_tail(hits, total, 0.3) == pytest.approx(binomtest(hits, total, 0.3, "greater").pvalue)
    assert mcnemar(hits, total - hits) == pytest.approx(binomtest(hits, total).pvalue)


def test_nothing_seen_is_no_surprise():
    assert binomial_tail(0, 0, 0.3) == 1
    assert mcnemar(0, 0) == 1


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


def test_the_area_under_the_curve_is_that_of_scikit_learn_with_ties():
    rng = np.random.default_rng(0)
    positive = rng.random(300) < 0.2
    scores = np.round(rng.standard_normal(300) + positive, 1)
    assert auroc(scores, positive)[0] == pytest.approx(roc_auc_score(positive, scores))


@pytest.mark.parametrize(("true", "positives"), [(0.6, 25), (0.85, 25), (0.9, 10), (0.95, 10), (0.95, 20)])
def test_the_interval_of_the_area_contains_the_true_area_at_its_confidence(true, positives):
    rng, shift = np.random.default_rng(0), stats.norm.ppf(true) * np.sqrt(2)
    hits = []
    for _ in range(400):
        scores = np.concatenate([rng.standard_normal(400), rng.standard_normal(positives) + shift])
        _, low, high = auroc(scores, np.arange(400 + positives) >= 400)
        hits.append(low <= true <= high)
    assert np.mean(hits) >= 0.92


def test_the_area_of_a_score_that_says_nothing_is_chance_however_many_photographs_a_track_has():
    tracks, covered, claimed = 200, 0, 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        wrong = np.repeat(rng.permutation(tracks) < 8, 30)
        scores = np.repeat(rng.standard_normal(tracks), 30) + 0.5 * rng.standard_normal(30 * tracks)
        _, low, high = auroc(scores, wrong, np.repeat(rng.permutation(tracks), 30))
        covered += low <= 0.5 <= high
        claimed += low > 0.6
    assert covered >= 92 and claimed <= 3


def test_photographs_of_a_track_each_have_the_same_interval_as_photographs_without_tracks():
    rng = np.random.default_rng(0)
    scores, positive = rng.random(200), np.arange(200) >= 160
    np.testing.assert_allclose(auroc(scores, positive, rng.permutation(200)), auroc(scores, positive))


def test_copies_of_each_photograph_in_a_track_change_no_interval():
    rng = np.random.default_rng(0)
    positive = np.arange(40) >= 30
    scores = rng.standard_normal(40) + positive
    copies = auroc(np.repeat(scores, 5), np.repeat(positive, 5), np.repeat(rng.permutation(40), 5))
    np.testing.assert_allclose(copies, auroc(scores, positive))


def logit_interval(area: float, error: float, freedom: int) -> np.ndarray:
    half = stats.t.ppf(0.975, freedom) * error / (area * (1 - area))
    return special.expit(special.logit(area) + np.array([-half, half]))


def test_where_positives_are_spread_widely_the_interval_is_that_of_delong():
    rng = np.random.default_rng(0)
    ones, zeros = np.repeat([-4.0, 4.0], 5) + 0.3 * np.arange(10), rng.standard_normal(60)
    below = (ones[:, None] > zeros).astype(float)  # (10, 60)
    variance = below.mean(axis=1).var(ddof=1) / 10 + below.mean(axis=0).var(ddof=1) / 60
    scores, positive = np.concatenate([ones, zeros]), np.arange(70) < 10
    area, low, high = auroc(scores, positive)
    assert area == pytest.approx(below.mean())
    assert (low, high) == pytest.approx(tuple(logit_interval(area, np.sqrt(variance), 9)))
    assert auroc(-scores, ~positive) == pytest.approx(
        auroc(scores, positive)
    )  # also where negatives are rarer


def test_where_tracks_hold_both_kinds_the_interval_is_that_of_obuchowski():
    rng, tracks, each = np.random.default_rng(0), 12, 4  # in four tracks the order is reversed
    shift = np.repeat(np.where(np.arange(tracks) < 4, -4.0, 4.0), 2 * each)
    units, positive = np.repeat(np.arange(tracks), 2 * each), np.tile(np.arange(2 * each) < each, tracks)
    scores = rng.standard_normal(len(units)) + np.where(positive, shift, -shift)
    below = (scores[positive][:, None] > scores[~positive]).astype(float)
    of_ones, of_zeros = below.mean(axis=1) - below.mean(), below.mean(axis=0) - below.mean()
    ones, zeros = (
        np.array([of[units[kind] == track].sum() / kind.sum() for track in range(tracks)])
        for of, kind in ((of_ones, positive), (of_zeros, ~positive))
    )
    variance = tracks / (tracks - 1) * ((ones + zeros) ** 2).sum()
    area, low, high = auroc(scores, positive, units)
    assert (low, high) == pytest.approx(tuple(logit_interval(area, np.sqrt(variance), tracks - 1)))


def test_where_positives_are_all_alike_the_interval_is_that_of_newcombe():
    scores = np.concatenate([np.arange(200.0), 150.5 + 0.01 * np.arange(15)])
    area, low, high = auroc(scores, np.arange(215) >= 200)
    size = (200 + 15) / 2 - 1
    for bound in (low, high):  # Hanley and McNeil's error in their own form
        squares = bound / (2 - bound) + 2 * bound**2 / (1 + bound) - 2 * bound**2
        error = np.sqrt((bound * (1 - bound) + size * squares) / (200 * 15))
        assert abs(bound - area) == pytest.approx(1.959964 * error, rel=1e-5)


def test_the_interval_of_an_area_among_equal_scores_is_no_point():
    area, low, high = auroc(np.ones(40), np.arange(40) >= 30)
    assert area == 0.5 and low < 0.4 and high > 0.6


def test_a_perfect_order_of_few_is_no_certainty_and_one_kind_alone_has_no_area():
    area, low, high = auroc(np.arange(20.0), np.arange(20) >= 17)
    assert (area, high) == (1.0, 1.0) and low < 0.1
    assert auroc(np.arange(40.0), np.arange(40) >= 20) == pytest.approx([1.0, 1 - 3 / 20, 1.0])
    assert auroc(-np.arange(40.0), np.arange(40) >= 20) == pytest.approx([0.0, 0.0, 3 / 20])
    assert auroc(np.arange(20.0), np.arange(20) == 9) == pytest.approx([9 / 19, 0.0, 1.0])
    assert 0 < auroc(np.arange(20.0), np.isin(np.arange(20), [9, 10]))[1] < 0.01
    for kind in (False, True):
        assert np.isnan(auroc(np.arange(5.0), np.full(5, kind))).all()


@pytest.mark.parametrize("groups", [2, 3, 5, 14])
def test_an_interval_over_groups_holds_the_true_mean_however_few_there_are(groups):
    rng, covered, trials = np.random.default_rng(groups), 0, 400
    for _ in range(trials):
        shares = rng.beta(9, 1, groups)  # the groups differ: 0.9 is the mean of all that there could be
        hits = rng.random((groups, 256)) < shares[:, None]
        _, low, high = mean_with_bounds(hits.mean(axis=1), share_with_bounds(int(hits.sum()), hits.size))
        covered += low <= 0.9 <= high
    assert covered / trials > 0.85  # quantiles of resampled means: 0.49, 0.70, 0.82 and 0.90


def test_an_interval_over_equal_groups_is_no_point():
    of_all = share_with_bounds(512, 512)
    assert mean_with_bounds(np.ones(2), of_all).tolist() == of_all.tolist()
    assert mean_with_bounds(np.ones(1), of_all) is of_all


def test_an_interval_over_groups_is_students_within_0_and_1():
    point = np.full(3, 0.5)
    means = np.array([0.2, 0.4, 0.9])
    expected = stats.t.interval(0.95, 2, means.mean(), stats.sem(means))
    assert mean_with_bounds(0.1 * means + 0.4, point)[1:] == pytest.approx([0.4 + 0.1 * x for x in expected])
    assert mean_with_bounds(np.array([0.5, 1.0]), point).tolist() == [0.75, 0.0, 1.0]


def test_a_share_of_units_has_the_interval_of_as_many_draws_as_its_rows_are_worth():
    rows, units = np.arange(9) < 6, np.array([7, 7, 7, 4, 4, 4, 1, 2, 3])
    assert share_of_units(3, rows, units).tolist() == share_with_bounds(1, 2).tolist()
    assert share_of_units(3, rows, None).tolist() == share_with_bounds(3, 6).tolist()
    assert np.isnan(share_of_units(0, rows & False, units)).all()
    one_large = np.array([0] * 90 + [*range(1, 11)])
    draws = 100**2 / (90**2 + 10)
    found = share_of_units(90, np.ones(100, np.bool_), one_large)
    assert found.tolist() == [0.9, *share_with_bounds(0.9 * draws, draws)[1:]]


@pytest.mark.parametrize("tracks", [20, 100])
def test_the_interval_of_a_share_of_unequal_tracks_holds_the_true_share(tracks: int):
    rng, covered, trials = np.random.default_rng(tracks), 0, 1000
    for _ in range(trials):
        sizes = np.maximum(1, np.exp(rng.normal(2, 1.2, tracks)).round()).astype(int)
        hits = np.repeat(rng.random(tracks) < 0.3, sizes)
        units = np.repeat(np.arange(tracks), sizes)
        _, low, high = share_of_units(hits.sum(), np.ones(len(hits), np.bool_), units)
        covered += low <= 0.3 <= high
    assert covered / trials > 0.93  # with as many draws as tracks: 0.76 and 0.72


def test_the_exact_bound_of_a_share_holds_for_a_single_observation_too():
    hits, total = np.array([1, 2, 3, 0, 0]), np.array([1, 2, 10, 4, 0])
    low = exact_lower(hits, total)
    np.testing.assert_allclose(low[:2], [0.05, 0.05**0.5])
    np.testing.assert_allclose(binomial_tail(hits[:3], total[:3], low[:3]), 0.05)
    assert low[3:].tolist() == [0.0, 0.0]


def test_a_loss_is_certain_by_what_chance_does_not_explain():
    before, after = np.array([0.96, 0.96, 0.9, 0.5]), np.array([0.86, 0.86, 0.95, 0.0])
    lost = certain_loss(before, after, np.array([70, 700, 700, 0]))
    assert 0.01 < lost[0] < 0.03 and 0.07 < lost[1] < 0.08
    assert list(lost[2:]) == [0, 0]


@pytest.mark.parametrize("images", [1, 2, 3, 4, 8])
def test_a_few_images_that_all_became_wrong_are_a_certain_loss_of_less_than_all(images: int):
    (lost,) = certain_loss(np.ones(1), np.zeros(1), np.array([images]))
    by_chance = 0.5**images  # a sign test: of one or two images it may be chance
    assert lost == 0 if images == 1 else 0 < lost < 1 - by_chance
    assert lost > 0.4 or images < 4


def repeated(both: int, lost: int, gained: int, neither: int) -> tuple[Bool, Bool]:
    """Return which of so many images are right before and after."""
    counts = [both, lost, gained, neither]
    return np.repeat([True, True, False, False], counts), np.repeat([True, False, True, False], counts)


def loss_of_pairs(*counts: int, units: I64 | None = None) -> float:
    before, after = repeated(*counts)
    labels = np.ones(len(before), np.int64)
    of_none, loss, *_ = certain_class_loss(before, after, labels, units, 3)
    assert of_none == 0
    return float(loss)


def test_images_that_are_right_both_times_do_not_hide_a_loss():
    assert loss_of_pairs(303, 55, 7, 135) == pytest.approx(0.0708, abs=1e-4)
    (alone,) = certain_loss(np.array([0.716]), np.array([0.62]), np.array([500]))
    assert alone < 0.05
    assert loss_of_pairs(303, 0, 0, 197) == loss_of_pairs(303, 0, 7, 190) == 0
    # the images of 50 tracks
    assert loss_of_pairs(303, 55, 7, 135, units=np.repeat(np.arange(50), 10)) < 0.05


@pytest.mark.parametrize("images", [*range(1, 11), 20])
def test_a_class_that_loses_five_points_is_rarely_found_to_lose_more(images: int):
    tables = [
        (images - lost - gained - neither, lost, gained, neither)
        for lost in range(images + 1)
        for gained in range(images + 1 - lost)
        for neither in range(images + 1 - lost - gained)
    ]
    refused = [counts for counts in tables if loss_of_pairs(*counts) > 0.05]
    assert all(lost > max(1, gained) for _, lost, gained, _ in refused)
    for right in (0.5, 0.72, 0.9):
        for gain in (0.0, 0.01, 0.05):
            shares = right - gain - 0.05, gain + 0.05, gain, 1 - right - gain
            found = stats.multinomial.pmf(refused, images, shares) if refused else np.zeros(1)
            assert found.sum() < 0.05


def changed_by_chance(classes: int, images: int, share: float) -> tuple[Bool, Bool, I64]:
    """Return which images are right before and after, and labels; of so many as become wrong others become right."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), images)
    before, draw = rng.random((2, len(labels)))
    right = before < 0.76
    return right, np.where(right, draw >= share / 0.76, draw < share / 0.24), labels


def test_among_a_thousand_classes_of_which_none_gets_worse_no_loss_is_certain():
    before, after, labels = changed_by_chance(1000, 50, 0.08)
    measured = np.bincount(labels, before.astype(np.int64) - after) / 50
    assert measured.max() > 0.15
    assert class_loss(before, after, labels, None, 1000).max() <= 0.05
    after[:50] = before[:50] & (np.arange(50) >= 40)
    assert class_loss(before, after, labels, None, 1000)[0] > 0.2


def test_bounds_allow_for_the_number_of_classes_from_twenty_on():
    before, after = repeated(303, 55, 7, 135)
    labels = np.zeros(len(before), np.int64)
    of_one, of_twenty, of_more = (
        certain_class_loss(before, after, labels, None, classes)[0] for classes in (1, 20, 21)
    )
    assert of_one == of_twenty > of_more > 0.07
    assert class_loss(before, after, labels, None, 20)[0] == 48 / 500


def test_a_class_without_images_has_no_loss():
    after, labels = np.array([True, False, False]), np.array([0, 0, 1])
    np.testing.assert_array_equal(
        class_loss(np.ones(3, np.bool_), after, labels, None, 3), [0.5, 1.0, np.nan]
    )


def test_class_accuracy_is_the_share_within_each_class():
    right = np.array([1.0, 0, 1, 1])
    found = class_accuracy(right, np.array([0, 0, 2, 2]), 4)
    np.testing.assert_array_equal(found, [0.5, np.nan, 1.0, np.nan])


@pytest.mark.parametrize(
    ("right", "after", "images", "certain"),
    [
        ([0.99, 0.7], [1.0, 0.0], [2000, 40], True),
        ([0.99, 1.0], [1.0, 0.0], [2000, 1], False),  # the only image of its class
        ([0.99, 0.7], [1.0, 0.0], [2000, 5], True),
        ([0.9] * 43, [0.87] * 43, [60] * 43, True),
        ([0.9] * 43, [0.87] * 43, [5] * 43, False),
        ([1.0] * 43, [0.0] * 5 + [1.0] * 38, [1] * 43, False),
        ([0.9, 0.9], [0.95, 0.9], [1000, 1000], False),
    ],
)
def test_the_mean_over_the_classes_falls_for_certain_only_where_their_images_show_it(
    right, after, images, certain
):
    """A class without images says nothing."""
    shares = (np.array([*each, np.nan]) for each in (right, after))
    loss = certain_mean_loss(*shares, np.array([*images, 0]))
    assert (loss > 0) is certain and loss <= max(0.0, np.mean(right) - np.mean(after))


@pytest.mark.parametrize(("classes", "each"), [(2, 20), (10, 8), (43, 4)])
def test_a_mean_over_classes_of_few_images_seldom_falls_for_certain_by_chance(classes: int, each: int):
    rng, images = np.random.default_rng(0), np.array([1000, *[each] * (classes - 1)])
    lost = [
        certain_mean_loss(*(rng.binomial(images, 0.9, (2, classes)) / images), images) for _ in range(500)
    ]
    assert np.mean(np.array(lost) > 0) < 0.05
