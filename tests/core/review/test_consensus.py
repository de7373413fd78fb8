"""Majority and CROWDLAB votes: whose answers count for how much, and which label they give."""

import sys

import numpy as np
import pytest

from defuse_core.artifacts import NONE_OF_THE_ABOVE, Votes
from defuse_core.errors import RunFileError
from defuse_core.review.verdicts import Consensus, count_not_majority, crowdlab_consensus, majority, tally

CLASSES, SHAPE = 4, (5, 20)
RELIABLE, GUESSING = 0.95, 0.4


def crowd(seed=0, per_image=3) -> tuple[Votes, np.ndarray, np.ndarray]:
    """Votes, a model's probabilities, and the truth (S, R): each image is answered by a few of five people.

    Two of them are reliable, and three mostly guess.
    """
    rng = np.random.default_rng(seed)
    truth = rng.integers(CLASSES, size=SHAPE)
    skill = np.array([RELIABLE, RELIABLE, GUESSING, GUESSING, GUESSING])[:, None, None]
    guesses = rng.integers(CLASSES, size=(5, *SHAPE))
    answers = np.where(rng.random((5, *SHAPE)) < skill, truth, guesses)
    asked = rng.random(answers.shape).argsort(axis=0) < per_image
    answers = np.where(asked, answers, NONE_OF_THE_ABOVE)
    annotator, scenario, image = (axis.ravel() for axis in np.indices(answers.shape))
    names = tuple("abcde")
    votes = Votes(scenario, image, annotator, answers.ravel(), np.zeros(answers.size), names, "people", {})
    seen = np.where(rng.random(SHAPE) < 0.85, truth, rng.integers(CLASSES, size=SHAPE))
    probabilities = np.full((*SHAPE, CLASSES), 0.1, np.float32)
    np.put_along_axis(probabilities, seen[..., None], 0.7, axis=2)
    return votes, probabilities, truth


def test_where_several_classes_have_two_votes_it_is_right_more_often_than_the_majority():
    votes, probabilities, truth = crowd(per_image=5)
    by_majority = (majority(tally(votes, SHAPE, CLASSES)) == truth).mean()
    assert (crowdlab_consensus(votes, probabilities[None]).labels == truth).mean() > by_majority + 0.02


def unanimous_but_for_the_models(people=5):
    """All people choose class 3 on the first image, where the models are sure of class 0, and agree elsewhere."""
    votes, probabilities, truth = crowd(per_image=5)
    votes.answer[:] = truth[votes.scenario, votes.image]
    votes.answer[(votes.scenario == 0) & (votes.image == 0)] = 3
    votes.answer[votes.annotator >= people] = NONE_OF_THE_ABOVE
    probabilities[:] = np.eye(CLASSES)[truth] * 0.97 + 0.01
    probabilities[0, 0] = [0.97, 0.01, 0.01, 0.01]
    return votes, probabilities


@pytest.mark.parametrize("people", [2, 5])
def test_sure_models_do_not_overrule_people_who_all_give_the_same_answer(people):
    votes, probabilities = unanimous_but_for_the_models(people)
    consensus = crowdlab_consensus(votes, probabilities[None])
    assert (consensus.labels[0, 0], consensus.chosen[0, 0]) == (3, people)
    assert consensus.quality[0, 0] < consensus.quality.ravel()[1:].min()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("per_image", [1, 2, 3, 5])
def test_no_image_has_a_label_that_too_few_people_chose(seed, per_image):
    rng = np.random.default_rng(seed)
    votes, _, _ = crowd(seed, per_image)
    votes.answer[rng.random(len(votes.answer)) < 0.1] = NONE_OF_THE_ABOVE
    given = tally(votes, SHAPE, CLASSES)
    probabilities = rng.dirichlet(np.full(CLASSES, 0.05), SHAPE).astype(np.float32)  # sure, and of anything
    labels = crowdlab_consensus(votes, probabilities[None]).labels
    chosen = np.where(
        labels == NONE_OF_THE_ABOVE, 0, np.take_along_axis(given, labels[..., None], axis=2)[..., 0]
    )
    few = (labels != NONE_OF_THE_ABOVE) & (chosen < 2)
    np.testing.assert_array_equal(labels[few], majority(given)[few])
    assert (given.sum(axis=2)[few] == 1).all() and (chosen > 0)[labels != NONE_OF_THE_ABOVE].all()
    np.testing.assert_array_equal(labels != NONE_OF_THE_ABOVE, chosen > 0)


def test_labels_that_are_not_the_majority_are_counted_ties_that_are_broken_as_well():
    votes, _, _ = crowd(per_image=5)
    given = majority(tally(votes, SHAPE, CLASSES))
    labels = given.copy()
    assert count_not_majority(labels, votes, CLASSES) == 0
    tied, clear = np.argwhere(given == NONE_OF_THE_ABOVE)[0], np.argwhere(given == 1)[:2]
    labels[tuple(tied)] = 2
    labels[tuple(clear[0])] = 3
    labels[tuple(clear[1])] = NONE_OF_THE_ABOVE
    assert count_not_majority(labels, votes, CLASSES) == 2


def test_an_image_for_which_nobody_chose_a_class_has_no_label():
    votes, probabilities, truth = crowd(per_image=5)
    votes.answer[:] = truth[votes.scenario, votes.image]
    votes.answer[(votes.scenario == 2) & (votes.image == 3)] = NONE_OF_THE_ABOVE
    labels = crowdlab_consensus(votes, probabilities[None]).labels
    assert labels[2, 3] == NONE_OF_THE_ABOVE
    assert (labels != NONE_OF_THE_ABOVE).sum() == labels.size - 1


def test_without_any_answer_there_is_no_label():
    votes, probabilities, _ = crowd()
    votes.answer[:] = NONE_OF_THE_ABOVE
    assert (crowdlab_consensus(votes, probabilities[None]).labels == NONE_OF_THE_ABOVE).all()


def test_a_tie_of_votes_and_probabilities_has_the_same_label_in_every_process():
    answers = np.array([[0, 0, 1, 1], [1, 1, 0, 0], [2, 3, 2, 3], [3, 2, 3, 2]])
    image, annotator = (axis.ravel() for axis in np.indices(answers.shape))
    nothing = np.zeros(answers.size)
    scenario = nothing.astype(np.int64)
    votes = Votes(scenario, image, annotator, answers.ravel(), nothing, tuple("abcd"), "people", {})
    probabilities = np.zeros((1, 4, CLASSES + 1), np.float32)
    probabilities[..., CLASSES] = 1.0
    found = []
    for seed in range(4):
        np.random.seed(seed)  # the global generator, which must not matter
        found.append(crowdlab_consensus(votes, probabilities[None]).labels)
    assert all(np.array_equal(labels, found[0]) for labels in found)
    assert (found[0] != NONE_OF_THE_ABOVE).all()


@pytest.mark.parametrize("asked", [[0], [0, 1]])
def test_where_no_image_has_two_answers_each_has_its_own(asked):
    votes, probabilities, truth = crowd(per_image=5)
    votes.answer[votes.annotator != np.array(asked)[(votes.scenario + votes.image) % len(asked)]] = (
        NONE_OF_THE_ABOVE
    )
    labels = crowdlab_consensus(votes, probabilities[None]).labels
    np.testing.assert_array_equal(labels, majority(tally(votes, SHAPE, CLASSES)))
    assert (labels == truth).mean() > 0.9


def test_without_its_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    votes, probabilities, _ = crowd()
    with pytest.raises(RunFileError, match="pip install 'cleanlab>="):
        crowdlab_consensus(votes, probabilities[None])


def test_an_image_on_which_people_and_model_agree_is_surer_than_one_on_which_they_do_not():
    votes, probabilities, truth = crowd()
    votes.answer[votes.annotator > 1] = NONE_OF_THE_ABOVE
    pairs = tally(votes, SHAPE, CLASSES)
    agreed = (pairs.max(axis=2) == 2) & (pairs.argmax(axis=2) == probabilities.argmax(axis=2))
    split = (pairs.sum(axis=2) == 2) & (pairs.max(axis=2) == 1)
    consensus = crowdlab_consensus(votes, probabilities[None])
    assert agreed.sum() > 10 and split.any()
    assert consensus.quality[agreed].min() > consensus.quality[split].max()
    assert (consensus.labels == truth)[agreed].all()


def test_a_model_and_one_person_are_never_sure_nor_is_anybody_where_no_image_has_two_answers():
    votes, probabilities, _ = crowd()
    one = np.flatnonzero(votes.image == 0)
    votes.answer[one[votes.annotator[one] > 0]] = NONE_OF_THE_ABOVE
    consensus = crowdlab_consensus(votes, probabilities[None])
    sure = consensus.sure(1e-9)
    assert not sure[:, 0].any() and sure[:, 1:].mean() > 0.5
    alone = consensus.chosen[:, 0] == 1
    assert alone.any() and (consensus.quality[alone, 0] > 0).all()
    votes.answer[votes.annotator > 0] = NONE_OF_THE_ABOVE
    assert not crowdlab_consensus(votes, probabilities[None]).quality.any()


def test_the_models_do_not_decide_between_two_people_who_disagree():
    votes, probabilities, _ = crowd()
    votes.answer[votes.annotator > 1] = NONE_OF_THE_ABOVE
    given = tally(votes, SHAPE, CLASSES)
    consensus = crowdlab_consensus(votes, probabilities[None])
    split = (given.sum(axis=2) == 2) & (given.max(axis=2) == 1)
    assert split.any() and (consensus.labels[split] == NONE_OF_THE_ABOVE).all()
    assert not consensus.quality[split].any() and not consensus.chosen[split].any()
    agreed = given.max(axis=2) == 2
    np.testing.assert_array_equal(consensus.sure(0.2), agreed & (consensus.quality >= 0.2))


def test_each_of_several_models_counts():
    votes, probabilities, _ = crowd()
    other = np.roll(probabilities, 1, axis=2)
    alone, both, turned = (
        crowdlab_consensus(votes, np.stack(models)).quality
        for models in ([probabilities], [probabilities, other], [other, probabilities])
    )
    np.testing.assert_allclose(both, turned, atol=1e-6)
    assert not np.allclose(alone, both, atol=1e-3)


def test_a_label_of_just_the_quality_that_is_asked_for_is_sure():
    one = Consensus(np.array([[3]]), np.array([[0.75]]), np.array([[2]]))
    assert one.sure(0.75).all() and not one.sure(0.76).any()


def test_the_order_of_the_votes_changes_neither_labels_nor_quality():
    votes, probabilities, _ = crowd()
    order = np.random.default_rng(1).permutation(len(votes.answer))
    columns = (votes.scenario, votes.image, votes.annotator, votes.answer, votes.when)
    mixed = Votes(*(column[order] for column in columns), votes.annotators, "people", {})
    one, other = (crowdlab_consensus(each, probabilities[None]) for each in (votes, mixed))
    np.testing.assert_array_equal(one.labels, other.labels)
    np.testing.assert_array_equal(one.quality, other.quality)
