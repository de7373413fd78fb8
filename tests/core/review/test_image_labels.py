"""The labels of images, what a verdict stores about them, and which components remain in doubt."""

from __future__ import annotations

import numpy as np
import pytest

from defuse_core.artifacts import NONE_OF_THE_ABOVE, Gallery, Override, Verdicts, Votes
from defuse_core.config.base import fewest_units
from defuse_core.intervals import significantly_over
from defuse_core.review.verdicts import (
    Consensus,
    crowdlab_consensus,
    decide_verdicts,
    doubtful,
    majority,
    most_common,
)
from tests.conftest import recommended
from tests.sample_components import review_section

NO = NONE_OF_THE_ABOVE


def judge(
    answers: list[list[list[int]]],
    predicted: list[list[int]],
    max_false: float | None = None,
    **given: object,
) -> Verdicts:
    """Judge components by answers[annotator][component][image] and predicted[component][image]."""
    answered, shown = np.array(answers), np.array(predicted)
    pixels, codes = np.zeros((*shown.shape, 1, 2, 2), np.float32), np.zeros((*shown.shape, 2), np.float32)
    annotator, scenario, image = (axis.ravel() for axis in np.indices(answered.shape))
    names = tuple(f"annotator {n}" for n in range(len(answered)))
    votes = Votes(scenario, image, annotator, answered.ravel(), np.zeros(answered.size), names, "people", {})
    gallery = Gallery(pixels, codes, shown, tuple("0123456789"))
    return decide_verdicts(review_section(max_false=max_false), gallery, votes, **given)


def test_without_a_vote_there_is_no_majority_also_of_a_single_class():
    assert majority(np.array([[0], [2]])).tolist() == [NO, 0]


def test_the_first_class_counts_as_any_other_in_the_most_common_label():
    assert most_common(np.array([NO, 0, 0, 7])) == 0


def test_of_a_tied_image_one_of_its_classes_counts_as_the_majority():
    found = judge([[[8, 4]], [[3, 4]]], [[1, 1]])
    np.testing.assert_array_equal(found.agreement, [[0.5, 1.0]])


def test_no_image_has_the_label_of_a_component_whose_labels_are_tied():
    found = judge([[[8, 3, NO]]], [[1, 1, 1]])
    assert found.purity.tolist() == [0.0]
    assert found.reasons[0].endswith("but labels are tied")


def test_a_verdict_holds_the_decisions_that_it_was_made_with():
    decision = Override(0, 5, "ada", "a 5", "2026-01-01T00:00:00Z")
    assert judge([[[8]]], [[1]], overrides=[decision]).overrides == (decision,)


def test_the_share_that_is_expected_to_be_false_is_a_mean_over_the_accepted_components():
    found = judge([[[8] * 10] * 2], [[1] * 10, [1] * 9 + [8]], max_false=0.05)
    assert found.labels.tolist() == [8, 8]
    few = (0.5**11, 12 * 0.5**11)  # of Beta(11, 1) and Beta(10, 2), under a half
    assert found.false_share == pytest.approx(sum(few) / 2)


@pytest.mark.parametrize(("overridden", "false"), [([], 0.5**11), ([1], 0.5**11), ([0, 1], 0.0)])
def test_the_share_that_is_expected_to_be_false_leaves_out_what_people_decided_above_the_vote(
    overridden, false
):
    decisions = [Override(row, (None, 5)[row], "ada", "seen", "2026-01-01T00:00:00Z") for row in overridden]
    found = judge([[[8] * 10] * 2], [[1] * 10, [8] * 10], overrides=decisions, max_false=0.05)
    assert found.labels.tolist() == [NO if 0 in overridden else 8, 5 if 1 in overridden else NO]
    assert found.false_share == pytest.approx(false)


def test_given_labels_of_images_replace_the_majority_and_are_stored():
    given = np.array([[8, 8, NO]])
    found = judge([[[1, 1, 1]]] * 3, [[1, 1, 1]], consensus=Consensus(given, given, given))
    assert found.labels.tolist() == [8] and found.misclassified.tolist() == [1.0]
    np.testing.assert_array_equal(found.image_labels, given)


def test_the_reason_counts_a_single_labelled_image_in_the_singular():
    assert "0 % of 1 labelled image is misclassified" in judge([[[8, NO]]], [[8, 8]]).reasons[0]


def test_a_component_without_a_label_is_in_doubt():
    none = judge([[[NO, NO]]], [[1, 1]], max_false=0.05)
    assert doubtful(none, 0.5).tolist() == [True]


def test_only_a_lower_bound_has_a_rate_and_only_models_decide_twice():
    def review(**fields: object):
        return recommended(review={"max_false": 0.2, **fields}).review

    assert review(accept="share").false_discovery_rate is None and not review(accept="share").decides_twice
    people = review(annotators="label-studio")
    assert not people.decides_twice and people.false_discovery_rate == 0.2


@pytest.mark.parametrize(("rho", "max_false"), [(0.0, 0.05), (0.1, 0.5), (0.5, 0.05), (0.9, 0.05)])
def test_the_fewest_units_are_the_first_number_of_which_all_fail_by_chance_rarely_enough(rho, max_false):
    assert fewest_units(rho, max_false) == next(n for n in range(1, 99) if rho**n <= max_false * (1 + 1e-9))


@pytest.mark.parametrize(
    ("rho", "max_false"), [(0.2, 0.04), (0.1, 0.01), (0.1, 0.0001), (0.2, 0.0016), (0.5, 0.05)]
)
def test_the_fewest_units_are_accepted_where_all_fail_and_one_fewer_is_not(rho, max_false):
    units = np.array([fewest_units(rho, max_false)])
    assert significantly_over(units, units, rho, max_false).all()
    assert not significantly_over(units - 1, units - 1, rho, max_false).any()


def test_an_annotator_who_never_chose_a_class_changes_no_label():
    rng = np.random.default_rng(0)
    answers = np.concatenate([rng.integers(3, size=(2, 12)), np.full((1, 12), NO)])
    annotator, image = (axis.ravel() for axis in np.indices(answers.shape))
    times = np.zeros(answers.size)
    votes = Votes(times.astype(int), image, annotator, answers.ravel(), times, ("a", "b", "c"), "people", {})
    two = annotator < 2
    columns = (votes.scenario[two], image[two], annotator[two], votes.answer[two], times[two])
    probabilities = rng.dirichlet(np.ones(3), (1, 12)).astype(np.float32)
    without = crowdlab_consensus(Votes(*columns, ("a", "b"), "people", {}), probabilities[None]).labels
    np.testing.assert_array_equal(crowdlab_consensus(votes, probabilities[None]).labels, without)
