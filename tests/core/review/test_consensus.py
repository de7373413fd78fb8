import numpy as np
import pytest

from defuse_core.artifacts import NONE_OF_THE_ABOVE, Votes
from defuse_core.errors import RunFileError
from defuse_core.review.consensus import crowdlab_consensus
from defuse_core.review.verdicts import majority, tally

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


def test_with_few_answers_per_image_it_is_right_more_often_than_the_majority():
    votes, probabilities, truth = crowd()
    by_majority = (majority(tally(votes, SHAPE, CLASSES)) == truth).mean()
    assert (crowdlab_consensus(votes, probabilities).labels == truth).mean() > by_majority + 0.02


def test_an_image_for_which_nobody_chose_a_class_has_no_label():
    votes, probabilities, _ = crowd()
    votes.answer[(votes.scenario == 2) & (votes.image == 3)] = NONE_OF_THE_ABOVE
    labels = crowdlab_consensus(votes, probabilities).labels
    assert labels[2, 3] == NONE_OF_THE_ABOVE
    assert (labels != NONE_OF_THE_ABOVE).sum() == labels.size - 1


def test_without_any_answer_there_is_no_label():
    votes, probabilities, _ = crowd()
    votes.answer[:] = NONE_OF_THE_ABOVE
    assert (crowdlab_consensus(votes, probabilities).labels == NONE_OF_THE_ABOVE).all()


def test_a_tie_of_votes_and_probabilities_has_the_same_label_in_every_process():
    answers = np.array([[0, 1], [1, 0], [2, 3], [3, 2]])
    image, annotator = (axis.ravel() for axis in np.indices(answers.shape))
    nothing = np.zeros(answers.size)
    scenario = nothing.astype(np.int64)
    votes = Votes(scenario, image, annotator, answers.ravel(), nothing, ("a", "b"), "people", {})
    probabilities = np.zeros((1, 4, CLASSES + 1), np.float32)
    probabilities[..., CLASSES] = 1.0
    found = []
    for seed in range(4):
        np.random.seed(seed)  # the global generator, which must not matter
        found.append(crowdlab_consensus(votes, probabilities).labels)
    assert all(np.array_equal(labels, found[0]) for labels in found)


@pytest.mark.parametrize("asked", [[0], [0, 1]])
def test_where_no_image_has_two_answers_each_has_its_own(asked):
    votes, probabilities, truth = crowd(per_image=5)
    votes.answer[votes.annotator != np.array(asked)[(votes.scenario + votes.image) % len(asked)]] = (
        NONE_OF_THE_ABOVE
    )
    labels = crowdlab_consensus(votes, probabilities).labels
    np.testing.assert_array_equal(labels, majority(tally(votes, SHAPE, CLASSES)))
    assert (labels == truth).mean() > 0.9


def test_without_its_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    votes, probabilities, _ = crowd()
    with pytest.raises(RunFileError, match=r"pip install 'defuse\[crowdlab\]'"):
        crowdlab_consensus(votes, probabilities)


def test_an_image_on_which_people_and_model_agree_is_surer_than_one_on_which_they_do_not():
    votes, probabilities, truth = crowd()
    votes.answer[votes.annotator > 1] = NONE_OF_THE_ABOVE
    pairs = tally(votes, SHAPE, CLASSES)
    agreed = (pairs.max(axis=2) == 2) & (pairs.argmax(axis=2) == probabilities.argmax(axis=2))
    split = (pairs.sum(axis=2) == 2) & (pairs.max(axis=2) == 1)
    consensus = crowdlab_consensus(votes, probabilities)
    assert agreed.sum() > 10 and split.any()
    assert consensus.quality[agreed].min() > consensus.quality[split].max()
    assert (consensus.labels == truth)[agreed].all()


def test_a_model_and_one_person_are_never_sure_nor_is_anybody_where_no_image_has_two_answers():
    votes, probabilities, _ = crowd()
    one = np.flatnonzero(votes.image == 0)
    votes.answer[one[votes.annotator[one] > 0]] = NONE_OF_THE_ABOVE
    sure = crowdlab_consensus(votes, probabilities).sure(1e-9)
    assert not sure[:, 0].any() and sure[:, 1:].mean() > 0.5
    votes.answer[votes.annotator > 0] = NONE_OF_THE_ABOVE
    assert not crowdlab_consensus(votes, probabilities).quality.any()


def test_a_label_that_the_models_and_one_of_two_people_choose_is_not_sure():
    votes, probabilities, _ = crowd()
    votes.answer[votes.annotator > 1] = NONE_OF_THE_ABOVE
    given = tally(votes, SHAPE, CLASSES)
    consensus = crowdlab_consensus(votes, probabilities)
    chosen = np.take_along_axis(given, consensus.labels[..., None], axis=2)[..., 0]
    split = (given.sum(axis=2) == 2) & (chosen < 2)
    assert split.any() and consensus.quality[split].max() > 0.2
    np.testing.assert_array_equal(consensus.chosen, chosen)
    np.testing.assert_array_equal(consensus.sure(0.2), (chosen == 2) & (consensus.quality >= 0.2))


def test_the_order_of_the_votes_changes_neither_labels_nor_quality():
    votes, probabilities, _ = crowd()
    order = np.random.default_rng(1).permutation(len(votes.answer))
    columns = (votes.scenario, votes.image, votes.annotator, votes.answer, votes.when)
    mixed = Votes(*(column[order] for column in columns), votes.annotators, "people", {})
    one, other = (crowdlab_consensus(each, probabilities) for each in (votes, mixed))
    np.testing.assert_array_equal(one.labels, other.labels)
    np.testing.assert_array_equal(one.quality, other.quality)
