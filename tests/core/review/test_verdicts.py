import json
from dataclasses import asdict

import numpy as np
import pytest
from scipy.stats import binom

from defuse_core.artifacts import NONE_OF_THE_ABOVE, Gallery, MoreImages, Override, Verdicts, Votes
from defuse_core.errors import StoreError
from defuse_core.intervals import binomial_tail, significantly_over, wilson
from defuse_core.review.overrides import OVERRIDES, read_overrides
from defuse_core.review.verdicts import (
    decide_verdicts,
    doubtful,
    most_common,
    most_common_error,
    most_common_errors,
)
from defuse_core.review.verdicts import tested_counts as counts_of  # pytest would collect its own name
from defuse_core.store import FolderStore
from tests.conftest import recommended
from tests.sample_components import review_section

NO = NONE_OF_THE_ABOVE
WHEN = "2026-01-01T00:00:00Z"


def verdicts(
    answers, predicted, rho=0.5, overrides=(), *, classes=tuple("0123456789"), source=None, track=None, **rule
) -> Verdicts:
    """Judge one component: answers[annotator][image], predicted[image], and the unit of each image, if any."""
    answers, predicted = np.array(answers), np.array([predicted])
    images = predicted.shape[1]
    gallery = Gallery(
        np.zeros((1, images, 1, 2, 2), np.float32),
        np.zeros((1, images, 2), np.float32),
        predicted,
        classes,
        source=None if source is None else np.array([source]),
        track=None if track is None else np.array([track]),
    )
    annotator, image = (axis.ravel() for axis in np.indices(answers.shape))
    zeros = np.zeros(answers.size, np.int64)
    names = tuple(f"annotator {n}" for n in range(len(answers)))
    votes = Votes(zeros, image, annotator, answers.ravel(), zeros.astype(float), names, "people", {})
    section = review_section(rho, rule.pop("max_false", None))
    return decide_verdicts(section, gallery, votes, overrides, **rule)


def test_half_wrong_is_not_more_than_half():
    assert verdicts([[8, 8]] * 5, predicted=[8, 3]).labels[0] == NO


def test_more_than_rho_wrong_is_a_failure_scenario_under_the_majority_label():
    verdict = verdicts([[8, 8, 3]] * 5, predicted=[1, 1, 3])
    assert verdict.labels[0] == 8
    assert verdict.misclassified[0] == pytest.approx(2 / 3)
    assert verdict.purity[0] == pytest.approx(2 / 3)


def test_an_image_takes_the_majority_of_its_annotators():
    assert verdicts([[8], [8], [3]], predicted=[1]).image_labels.tolist() == [[8]]


def test_a_tied_image_has_no_label_and_is_counted():
    verdict = verdicts([[8, 4], [3, 4]], predicted=[1, 1])
    assert verdict.image_labels.tolist() == [[NO, 4]]
    assert (verdict.ties, verdict.no_class_chosen) == (1, 0)
    assert verdict.labels[0] == 4


def test_none_of_the_above_is_discarded_before_the_majority_and_the_share():
    verdict = verdicts([[NO, NO], [8, NO], [8, NO]], predicted=[1, 1])
    assert verdict.image_labels.tolist() == [[8, NO]]
    assert verdict.misclassified[0] == 1.0
    assert verdict.agreement[0, 0] == 1.0
    assert np.isnan(verdict.agreement[0, 1])
    assert (verdict.ties, verdict.no_class_chosen) == (0, 1)


def test_the_most_common_error_is_no_answer_that_is_right_by_the_images_own_label():
    predicted, own = np.array([1, 1, 1, 3, 3, 8]), np.array([1, 1, 1, 8, 8, 8])  # three clear 1s among 8s
    assert most_common_error(predicted, 8, own) == 3


def test_the_most_common_error_is_never_the_scenarios_own_label():
    assert (
        most_common_error(np.array([8, 8, 3]), 8, np.array([1, 1, 8])) == 3
    )  # right by the label, wrong by their own


def test_without_a_misclassified_image_the_most_common_error_is_any_answer_but_the_label():
    assert most_common_error(np.array([1, 1, 3]), 8, np.array([1, 1, NO])) == 1  # accepted by an override
    assert most_common_error(np.array([8, 8]), 8, np.array([8, 8])) is None


def test_each_accepted_component_has_its_most_common_error_or_its_label():
    predicted = np.array([[1, 1, 3, 3, 3], [4, 4, 4, 4, 4]])
    gallery = Gallery(
        np.zeros((2, 5, 1, 2, 2), np.float32),
        np.zeros((2, 5, 2), np.float32),
        predicted,
        tuple("0123456789"),
    )
    own = np.array([[8, 8, 3, 3, 3], [4, 4, 4, 4, 4]])
    scenario, image = (axis.ravel() for axis in np.indices(own.shape))
    zeros = np.zeros(own.size, np.int64)
    votes = Votes(scenario, image, zeros, own.ravel(), zeros.astype(float), ("a",), "people", {})
    overrides = [Override(0, 8, "ann", "they are 8s", WHEN), Override(1, 4, "ann", "as voted", WHEN)]
    verdict = decide_verdicts(review_section(), gallery, votes, overrides)
    assert most_common_errors(gallery, verdict, verdict.accepted).tolist() == [1, 4]


def test_a_component_without_any_label_is_rejected():
    verdict = verdicts([[NO, NO]], predicted=[1, 1])
    assert verdict.labels[0] == NO
    assert "no image has a label" in verdict.reasons[0]


def test_a_tie_between_labels_of_images_accepts_nothing():
    verdict = verdicts([[8, 3]] * 3, predicted=[1, 1])
    assert verdict.labels[0] == NO
    assert "tied" in verdict.reasons[0]


def test_where_only_further_images_have_labels_the_reason_says_so():
    more = MoreImages(np.array([40]), np.array([38]), np.array([37]))
    verdict = verdicts([[NO, NO]], predicted=[1, 1], max_false=0.05, more=more)
    assert verdict.labels[0] == NO
    assert verdict.reasons[0].endswith(
        "97 % of 38 labelled images (38 of them drawn in doubt) are misclassified, but no reviewed image has a label"
    )


def test_agreement_is_the_share_of_votes_for_the_majority():
    verdict = verdicts([[8], [8], [8], [3], [NO]], predicted=[1])
    assert verdict.agreement[0, 0] == pytest.approx(3 / 4)


def test_a_single_vote_agrees_with_nobody():
    verdict = verdicts([[8, 8], [NO, 8]], predicted=[1, 1])
    assert verdict.image_labels.tolist() == [[8, 8]]
    np.testing.assert_array_equal(verdict.agreement, [[np.nan, 1.0]])


def test_purity_counts_unlabelled_images_against_the_scenario():
    assert verdicts([[8, 8, NO, 8]] * 3, predicted=[1, 1, 1, 1]).purity[0] == pytest.approx(3 / 4)


def test_purity_leaves_out_images_that_nobody_was_asked_about():
    first = verdicts(
        [[8] * 6] * 5, predicted=[1] * 10
    )  # final after these, so that the other four are not asked about
    assert (first.purity[0], first.no_class_chosen) == (1.0, 4)
    nothing = verdicts(np.zeros((5, 0), np.int64), [1] * 10, overrides=[Override(0, 8, "ann", "8s", WHEN)])
    assert np.isnan(nothing.purity[0])


def test_six_of_ten_wrong_are_accepted_by_the_paper_and_are_in_doubt_by_the_lower_bound():
    answers, predicted = [[8] * 10] * 3, [1] * 6 + [8] * 4
    assert verdicts(answers, predicted).labels[0] == 8
    careful = verdicts(answers, predicted, max_false=0.05)
    assert careful.labels[0] == NO
    assert "60 % of 10 labelled images are misclassified, not significantly over 50 %" in careful.reasons[0]
    assert doubtful(careful, 0.5).tolist() == [True]


def test_all_of_ten_wrong_are_beyond_doubt():
    careful = verdicts([[8] * 10] * 3, [1] * 10, max_false=0.05)
    assert careful.labels[0] == 8
    assert careful.false_share < 0.001
    assert not doubtful(careful, 0.5).any()


def test_a_share_is_in_doubt_up_to_its_upper_bound_of_95_percent():
    found = [
        verdicts([[8] * 10] * 3, [1] * wrong + [8] * (10 - wrong), max_false=0.05) for wrong in (2, 3)
    ]  # Wilson's bounds of 2/10 and 3/10: 0.45 and 0.55
    assert [doubtful(verdict, 0.5).item() for verdict in found] == [False, True]


def test_a_component_of_two_photographs_is_in_doubt_however_many_pictures_are_right():
    verdict = verdicts([[8] * 40], [8] * 40, source=[1, 2] * 20, max_false=0.05)
    assert doubtful(verdict, 0.5).tolist() == [True]
    failing = verdicts([[8] * 40], [1] * 40, source=[1, 2] * 20, max_false=0.05)
    assert [(one.failing_units.tolist(), one.units.tolist()) for one in (verdict, failing)] == [
        ([0], [2]),
        ([2], [2]),
    ]


def test_the_share_that_is_expected_to_be_false_is_that_of_the_accepted_components():
    predicted = np.array([[1] * 10, [8] * 10])  # accepted, and rejected
    gallery = Gallery(
        np.zeros((2, 10, 1, 2, 2), np.float32),
        np.zeros((2, 10, 2), np.float32),
        predicted,
        tuple("0123456789"),
    )
    scenario, image = (axis.ravel() for axis in np.indices(predicted.shape))
    zeros = np.zeros(20, np.int64)
    votes = Votes(scenario, image, zeros, zeros + 8, zeros.astype(float), ("a",), "people", {})
    found = decide_verdicts(review_section(0.5, max_false=0.05), gallery, votes)
    assert found.labels.tolist() == [8, NO]
    assert found.false_share == pytest.approx(0.5**11)  # of Beta(11, 1), under a half


def test_none_of_ten_wrong_is_rejected_beyond_doubt():
    assert not doubtful(verdicts([[8] * 10] * 3, [8] * 10, max_false=0.05), 0.5).any()


def test_more_images_decide_a_doubtful_verdict():
    answers, predicted = [[8] * 10] * 3, [1] * 6 + [8] * 4
    more = MoreImages(np.array([40]), np.array([38]), np.array([30]))
    verdict = verdicts(answers, predicted, max_false=0.05, more=more)
    assert verdict.labels[0] == 8
    assert verdict.labelled[0] == 48
    assert verdict.misclassified[0] == pytest.approx(36 / 48)


def test_what_follows_a_name_of_right_to_left_letters_stays_behind_it():
    reasons = verdicts([[1] * 3], predicted=[0] * 3, classes=("כלב", "עז")).reasons
    assert reasons[0].startswith("accepted as עז\N{LEFT-TO-RIGHT MARK}: 100 % of 3 labelled images")


def test_pictures_of_one_photograph_are_one_piece_of_evidence():
    answers, predicted = [[8] * 10] * 3, [1] * 10
    one, six = [7] * 10, [1, 2, 3, 4, 5, 6, 1, 2, 3, 4]
    alone = verdicts(answers, predicted, source=one, max_false=0.025)
    assert alone.labels[0] == NO
    assert alone.reasons[0] == (
        "rejected: 100 % of 10 labelled images of 1 photograph are misclassified, not significantly over 50 %, "
        "for which at least 6 photographs are needed"
    )
    assert (alone.units[0], alone.failing_units[0]) == (1, 1)
    assert doubtful(alone, 0.5).tolist() == [True]
    accepted = verdicts(answers, predicted, source=six, max_false=0.025)
    assert accepted.reasons == (
        "accepted as 8: 100 % of 10 labelled images of 6 photographs are misclassified",
    )
    assert accepted.false_share == pytest.approx(0.5**7)
    tracks = verdicts(answers, predicted, source=six, track=[1, 1, 1, 2, 2, 2, 1, 1, 1, 2], max_false=0.025)
    assert tracks.labels[0] == NO
    assert "of 2 tracks are misclassified" in tracks.reasons[0]
    assert verdicts(answers, predicted, source=one).labels[0] == 8  # review.accept: share


def test_a_photograph_counts_by_the_share_of_its_labelled_pictures_that_is_misclassified():
    answers = [[8, 8, 8, 8, NO, 8]]
    verdict = verdicts(answers, [1, 1, 8, 8, 1, 1], source=[1, 1, 1, 2, 3, 4], max_false=0.4)
    assert (verdict.units[0], verdict.failing_units[0]) == (3, pytest.approx(2 / 3 + 0 + 1))
    assert verdict.reasons[0].startswith(
        "rejected: 60 % of 5 labelled images of 3 photographs are misclassified, 56 % on average over the photographs, "
        "not significantly over 50 %"
    )


def test_where_there_are_photographs_enough_the_reason_asks_for_no_more():
    verdict = verdicts([[8] * 6], [1] * 5 + [8], source=[1, 2, 3, 4, 5, 6], max_false=0.025)
    assert verdict.reasons[0].endswith("6 photographs are misclassified, not significantly over 50 %")


def test_more_images_count_by_the_photographs_that_they_add():
    answers, predicted = [[8] * 4], [1] * 4
    more = MoreImages(
        *(np.array([n]) for n in (6, 5, 4)),
        unit=np.array([[1, 5, 6, 7, 8, 9]]),
        outcome=np.array([[0, 1, 1, 1, 1, -1]]),
    )
    verdict = verdicts(answers, predicted, source=[1, 1, 2, 3], max_false=0.025, more=more)
    assert (verdict.units[0], verdict.failing_units[0]) == (7, pytest.approx(6 + 2 / 3))
    assert "89 % of 9 labelled images (5 of them drawn in doubt) of 7 photographs" in verdict.reasons[0]
    assert verdict.labels[0] == 8


@pytest.mark.parametrize("alike", [True, False])  # all pictures of one photograph
@pytest.mark.parametrize(
    ("photographs", "images", "rho"), [(1, 10, 0.5), (3, 10, 0.5), (8, 10, 0.5), (12, 48, 0.2), (12, 36, 0.3)]
)
def test_components_just_at_rho_are_seldom_accepted_however_few_photographs_they_have(
    photographs, images, rho, alike
):
    rng, components = np.random.default_rng(0), 200
    source = np.tile(np.arange(images) % photographs, (components, 1))
    wrong = rng.random((components, images)) < rho
    wrong = np.take_along_axis(wrong, source, 1) if alike else wrong
    gallery = Gallery(
        np.zeros((components, images, 1, 2, 2), np.float32),
        np.zeros((components, images, 2), np.float32),
        wrong.astype(np.int64),
        ("a", "b"),
        source=source,
    )
    scenario, image = (axis.ravel() for axis in np.indices(source.shape))
    zeros = np.zeros(source.size, np.int64)
    votes = Votes(scenario, image, zeros, zeros, zeros.astype(float), ("a",), "people", {})
    assert (
        len(decide_verdicts(review_section(rho, max_false=0.05), gallery, votes).accepted)
        <= 0.05 * components
    )


@pytest.mark.parametrize("images", [5, 10, 13, 20])
def test_two_decisions_together_accept_no_more_false_components_than_max_false(images):
    review = recommended(review={"images": images, "more_images": 40}).review
    rate, more, rho = review.false_discovery_rate, review.more_images, review.rho
    assert review.decides_twice
    hits, further = np.arange(images + 1), np.arange(more + 1)
    at_first = np.array([significantly_over(np.array([n]), np.array([images]), rho, rate)[0] for n in hits])
    in_doubt = ~at_first & (wilson(hits, np.full(images + 1, images), 0.9)[1] > rho)
    pooled = hits[:, None] + further
    then = binomial_tail(pooled, np.full(pooled.shape, images + more), rho) <= rate
    chance = binom.pmf(hits, images, rho)[:, None] * binom.pmf(
        further, more, rho
    )  # of a component just at rho
    assert (chance * (at_first[:, None] | (in_doubt[:, None] & then))).sum() <= review.max_false


def test_a_single_decision_has_all_of_max_false():
    review = recommended(review={"more_images": 0, "max_false": 0.2}).review
    assert review.false_discovery_rate == 0.2
    assert recommended(review={"max_false": 0.2}).review.false_discovery_rate == 0.1


def test_the_most_common_label_leaves_out_images_without_one():
    assert most_common(np.array([NO, NO, 4, 7, 7])) == 7
    assert most_common(np.array([NO])) is None


@pytest.mark.parametrize(("label", "expected"), [(5, 5), (None, NO)])
def test_a_human_decision_stands_above_the_vote_and_says_who_and_why(label, expected):
    override = Override(0, label, "ada", "a 5 with a broken top", WHEN)
    verdict = verdicts([[8, 8, 8]] * 5, predicted=[1, 1, 1], overrides=[override])
    assert verdict.labels[0] == expected
    assert "by ada: a 5 with a broken top" in verdict.reasons[0]


@pytest.mark.parametrize(("label", "purity"), [(5, 1 / 3), (None, 2 / 3)])
def test_purity_is_of_the_label_that_a_person_gave_and_of_the_votes_where_a_person_rejected(label, purity):
    override = Override(0, label, "ada", "a 5 with a broken top", WHEN)
    verdict = verdicts([[8, 8, 5]] * 5, predicted=[1, 1, 1], overrides=[override])
    assert verdict.purity[0] == pytest.approx(purity)


def test_the_newest_of_several_decisions_counts():
    decisions = [Override(0, n, "a", "r", WHEN) for n in (5, 6)]
    assert verdicts([[8]], predicted=[1], overrides=decisions).labels[0] == 6


def test_no_components_give_no_verdicts():
    gallery = Gallery(
        np.zeros((0, 3, 1, 2, 2), np.float32),
        np.zeros((0, 3, 2), np.float32),
        np.zeros((0, 3), np.int64),
        ("a", "b"),
    )
    none = np.zeros(0, np.int64)
    verdict = decide_verdicts(
        review_section(), gallery, Votes(none, none, none, none, none.astype(float), (), "people", {})
    )
    assert len(verdict.labels) == len(verdict.accepted) == 0


def test_decisions_are_read_from_the_run(tmp_path):
    store = FolderStore(tmp_path)
    assert read_overrides(store) == ()
    first, second = Override(1, None, "a", "r", WHEN), Override(1, 4, "b", "s", WHEN)
    for number, decision in ((2, second), (1, first)):
        store.write(f"{OVERRIDES}{number:04}.json", json.dumps(asdict(decision)).encode())
    assert read_overrides(store) == (first, second)


@pytest.mark.parametrize("data", [b"", b"{}", b'{"scenario": "first"}'])
def test_a_file_that_holds_no_decision_is_refused_with_what_to_do(data, tmp_path):
    store = FolderStore(tmp_path)
    store.write(f"{OVERRIDES}0001.json", data)
    with pytest.raises(StoreError, match=r"overrides/0001\.json: expected a decision .* `defuse review set`"):
        read_overrides(store)


def test_a_review_that_decides_twice_has_half_of_max_false_for_each_decision():
    predicted, zeros = np.array([[1] * 3 + [8] * 7]), np.zeros(10, np.int64)  # p = 0.07, where rho is 0.1
    images, codes = np.zeros((1, 10, 1, 2, 2), np.float32), np.zeros((1, 10, 2), np.float32)
    gallery = Gallery(images, codes, predicted, tuple("0123456789"))
    votes = Votes(zeros, np.arange(10), zeros, zeros + 8, zeros.astype(float), ("a",), "people", {})
    once, twice = (
        recommended(review={"images": 10, "more_images": more, "max_false": 0.1}).review for more in (0, 40)
    )
    assert decide_verdicts(once, gallery, votes).labels.tolist() == [8]
    assert decide_verdicts(twice, gallery, votes).labels.tolist() == [NO]


def test_misclassified_images_are_counted_whole_though_their_share_was_rounded():
    verdict = verdicts([[8] * 22], [1] * 15 + [8] * 7)  # 15/22 times 22 is below 15
    assert [counts.tolist() for counts in counts_of(verdict)] == [[15], [22]]
