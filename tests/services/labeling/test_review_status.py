"""Stopping early is held against decide_verdicts() itself, over every way in which the missing answers can come."""

import io
import time
from itertools import combinations_with_replacement, product

import numpy as np
import pytest
from planted_review import STATE, blank_review
from rich.console import Console

from defuse_core.artifacts import NONE_OF_THE_ABOVE, Gallery, Votes
from defuse_core.review.verdicts import decide_verdicts, majority, tally
from services.cli.review_tables import print_status
from services.labeling.annotations import read_annotations
from services.labeling.status import reachable_labels, review_status, verdict_is_final
from tests.sample_components import review_section


def outcomes(given, missing, predicted, rho, classes):
    """The labels of decide_verdicts() over all completions, and whether it rejects one for its tied labels alone.

    Each completion is one scenario of one gallery.
    """
    choices = [*range(classes), NONE_OF_THE_ABOVE]
    ways = [
        [tuple(answers) + tuple(more) for more in combinations_with_replacement(choices, count)]
        for answers, count in zip(given, missing, strict=True)
    ]
    completions = list(product(*ways))
    rows = [
        (scenario, image, annotator, answer)
        for scenario, completion in enumerate(completions)
        for image, answers in enumerate(completion)
        for annotator, answer in enumerate(answers)
    ]
    gallery = _gallery(np.tile(predicted, (len(completions), 1)), classes)
    verdicts = decide_verdicts(review_section(rho), gallery, _votes(rows))
    tied = (verdicts.labels == NONE_OF_THE_ABOVE) & (verdicts.misclassified > rho)
    return set(verdicts.labels.tolist()), bool(tied.any())


def _gallery(predicted, classes):
    shape = predicted.shape
    names = tuple(str(label) for label in range(classes))
    images, codes = np.zeros((*shape, 1, 1, 1), np.float32), np.zeros((*shape, 1), np.float32)
    return Gallery(images, codes, predicted, names)


def _votes(rows):
    columns = np.array(rows, np.int64).reshape(-1, 4).T
    return Votes(*columns, np.zeros(len(rows)), ("a",), "people", {})


def random_case(rng):
    images, classes = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    given = [tuple(rng.integers(-1, classes, rng.integers(0, 5))) for _ in range(images)]
    missing = rng.integers(0, 3, images) * rng.integers(0, 2, images)
    return given, missing, rng.integers(0, classes, images), rng.choice([0.0, 0.3, 0.5, 2 / 3]), classes


def counts_of(given, classes):
    rows = [(0, image, 0, answer) for image, answers in enumerate(given) for answer in answers]
    return tally(_votes(rows), (1, len(given)), classes)[0]


@pytest.mark.parametrize("seed", range(4))
def test_decided_means_that_no_completion_changes_verdict_or_label_and_that_no_tie_of_labels_rejects(seed):
    rng, seen = np.random.default_rng(seed), {True: 0, False: 0}
    for _ in range(100):
        given, missing, predicted, rho, classes = random_case(rng)
        found = verdict_is_final(counts_of(given, classes), missing, predicted, rho)
        labels, tied = outcomes(given, missing, predicted, rho, classes)
        assert found == (len(labels) == 1 and not tied), (given, missing, predicted, rho)
        seen[found] += 1
    assert min(seen.values()) >= 10


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_reachable_labels_are_those_of_some_completion(classes):
    rng = np.random.default_rng(classes)
    for _ in range(50):
        counts, missing = rng.integers(0, 4, (1, classes)), rng.integers(0, 4, 1)
        more = combinations_with_replacement([*range(classes), NONE_OF_THE_ABOVE], int(missing[0]))
        final = [counts[0] + np.bincount([n for n in ways if n >= 0], minlength=classes) for ways in more]
        ended = {int(label) for label in majority(np.array(final, np.int64))}
        labels, unlabelled = reachable_labels(counts, missing)
        assert set(np.flatnonzero(labels[0]).tolist()) == ended - {NONE_OF_THE_ABOVE}
        assert bool(unlabelled[0]) is (NONE_OF_THE_ABOVE in ended)


def test_without_answers_nothing_is_decided():
    counts = np.zeros((10, 10), np.int64)
    assert not verdict_is_final(counts, np.full(10, 5), np.full(10, 3), 0.5)


def test_three_of_five_agreeing_on_seven_of_ten_images_settle_the_scenario_and_on_six_do_not():
    """At rho 0.6: seven of ten are over it whatever the other three become, six of ten need not be."""
    counts = np.zeros((10, 10), np.int64)
    counts[:7, 8] = 3
    assert verdict_is_final(counts, np.array([2] * 7 + [5] * 3), np.full(10, 3), 0.6)
    counts[6, 8] = 0
    assert not verdict_is_final(counts, np.array([2] * 6 + [5] * 4), np.full(10, 3), 0.6)


def test_a_scenario_whose_images_are_right_or_without_a_label_is_rejected_for_good():
    counts = np.array([[0, 1], [0, 2]])
    assert verdict_is_final(counts, np.array([1, 2]), np.array([1, 1]), 0.5)
    assert not verdict_is_final(counts, np.array([2, 2]), np.array([1, 1]), 0.5)


def test_forty_three_classes_take_less_than_a_second_per_scenario():
    rng = np.random.default_rng(0)
    started = time.perf_counter()
    for _ in range(20):
        verdict_is_final(rng.integers(0, 2, (10, 43)), np.full(10, 2), rng.integers(0, 43, 10), 0.5)
    assert time.perf_counter() - started < 20


def test_a_review_of_no_scenarios_is_complete(tmp_path):
    _, tasks = blank_review(tmp_path, 0)
    status = review_status(tasks, read_annotations([], tasks), STATE, {}, ())
    assert (status.requested, status.given, status.outstanding, status.saved) == (0, 0, 0, 0)
    assert len(status.final_votes().answer) == 0


@pytest.mark.parametrize("consensus", ["majority", "crowdlab"])
def test_verdicts_that_the_run_will_decide_with_crowdlab_are_said_to_be_by_majority(tmp_path, consensus):
    run, tasks = blank_review(tmp_path, 1, consensus=consensus)
    console = Console(width=200, file=io.StringIO())
    print_status(run, review_status(tasks, read_annotations([], tasks), STATE, {}, ()), console)
    assert ("decides with review.consensus: crowdlab" in console.file.getvalue()) is (consensus == "crowdlab")
