"""Model-assisted review: off by default, and stated where it was on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from label_studio_live import digits_gallery
from planted_review import answered_tasks, blank_review

from defuse_core.config import ReviewSection
from defuse_core.training.reference_models import Prelabels
from services.labeling.tasks import ReviewTasks, digest, is_edited, prelabels_by_task

TRUTH = (8, 3, 0, 1)


def probabilities(confidence):
    """Two models that agree on the truth of each image with the given (S, R) confidence."""
    table = np.zeros((2, 4, 3, 10), np.float32)
    table += ((1 - confidence) / 9)[None, :, :, None]
    for scenario, label in enumerate(TRUTH):
        table[:, scenario, :, label] = confidence[scenario]
    return table


CONFIDENCE = np.array([[0.9, 0.8, 0.7], [0.95, 0.2, 0.96], [0.6, 0.99, 0.98], [0.91, 0.92, 0.93]], np.float32)


def tasks_of(gallery, min_confidence=0.5, **review):
    section = ReviewSection(reference={"min_confidence": min_confidence}, **review)
    return ReviewTasks(gallery, section)


def selected(prelabels):
    """The choice and the confidence of each suggestion, by task."""
    return {
        index: (*(result["value"]["choices"][0] for result in one["result"]), one["score"])
        for index, one in prelabels.items()
    }


def test_suggestions_come_least_certain_first_and_none_of_the_above_below_the_bound():
    tasks = tasks_of(digits_gallery())
    found = selected(prelabels_by_task(tasks, probabilities(CONFIDENCE)))
    assert list(found)[:3] == [4, 6, 2]  # of three images in a scenario
    assert found[4][0] == "None of the above"
    assert found[2] == ("8", pytest.approx(0.7))


def test_a_page_gets_one_suggestion_over_its_images():
    tasks = tasks_of(digits_gallery(), form="scenario")
    found = selected(prelabels_by_task(tasks, probabilities(CONFIDENCE)))
    assert list(found) == [1, 0, 2, 3]
    assert [choice for choice, _ in found.values()] == ["3", "8", "0", "1"]
    assert found[0][1] == pytest.approx(0.8)


def test_models_that_disagree_are_averaged_and_the_bound_itself_is_enough():
    table = np.zeros((2, 1, 2, 3), np.float32)
    table[:, 0, 0] = [[0.75, 0.25, 0.0], [0.0, 0.75, 0.25]]
    table[:, 0, 1] = [[0.0, 0.25, 0.75], [0.0, 0.25, 0.75]]
    gallery = replace(digits_gallery(labels=(8,), images=2), classes=("a", "b", "c"))
    images, pages = tasks_of(gallery), tasks_of(gallery, 0.4, form="scenario")
    assert selected(prelabels_by_task(images, table)) == {0: ("b", 0.5), 1: ("c", 0.75)}
    assert selected(prelabels_by_task(pages, table)) == {0: ("c", 0.4375)}


@pytest.mark.parametrize(
    ("shares", "choice"), [((0.75, 0.25), "a"), ((0.25, 0.75), "b"), ((0.5, 0.5), "None of the above")]
)
@pytest.mark.parametrize(("form", "target"), [("image", "image"), ("scenario", "page")])
def test_a_suggestion_selects_the_choice_of_its_answer(shares, choice, form, target):
    gallery = replace(digits_gallery(labels=(8,), images=1), classes=("a", "b"))
    tasks = tasks_of(gallery, 0.75, form=form)
    assert prelabels_by_task(tasks, np.float32([[[shares]]])) == {
        0: {
            "model_version": "reference models",
            "score": max(shares),
            "result": [
                {
                    "from_name": "label",
                    "to_name": target,
                    "type": "choices",
                    "value": {"choices": [choice]},
                }
            ],
        }
    }


def test_a_task_is_edited_if_its_data_key_or_digest_changed_and_not_if_its_fields_moved(tmp_path):
    _, tasks = blank_review(tmp_path, 1, form="scenario")
    (task,) = answered_tasks(tasks, "secret")
    moved = dict(reversed(list((task.data or {}).items())))
    assert list(moved) != list(task.data or {})
    for same in (task, replace(task, data=moved)):
        assert not is_edited(same, "secret")
    changed = {"page": "Other", "samples": []}
    forged = replace(task, data=changed, digest=digest(str(task.key), changed, ""))
    for edited in (
        replace(task, data=changed),
        replace(task, data=None),
        replace(task, key="s001"),
        replace(task, digest=None),
        forged,
    ):
        assert is_edited(edited, "secret")
    assert is_edited(task, "another secret")


@pytest.mark.parametrize("form, first", [("image", "s001-i01"), ("scenario", "s001")])
def test_people_get_the_least_certain_task_first_with_the_models_answer_selected(
    make_review, accounts, form, first
):
    review = make_review(prelabel=True, form=form, answers_per_task=1)
    review.run.once("review", Prelabels, lambda: Prelabels(probabilities(CONFIDENCE)))
    number = review.annotators.push(review.gallery).number
    task = accounts[0].next_task(number)
    assert task["meta"]["sample_key"] == first
    (prediction,) = task["predictions"]
    assert prediction["model_version"] == "reference models"
    expected = "None of the above" if form == "image" else "3"
    assert prediction["result"][0]["value"]["choices"] == [expected]
    assert prediction["score"] == pytest.approx(0.2 if form == "image" else (0.95 + 0.2 + 0.96) / 3, abs=1e-4)


def test_votes_say_when_the_models_answer_was_preselected(make_review, accounts):
    review = make_review(gallery=digits_gallery(images=1), prelabel=True, answers_per_task=1)
    review.run.once("review", Prelabels, lambda: Prelabels(probabilities(CONFIDENCE)[:, :, :1]))
    review.annotators.push(review.gallery)
    review.everyone_answers(accounts[:1], lambda subject: str(TRUTH[subject.scenario]))
    assert "biases a vote" in review.annotators.review(review.gallery).notes["prelabel"]


def test_by_default_nothing_is_preselected_and_nothing_is_said(make_review, accounts):
    review = make_review(gallery=digits_gallery(images=1), answers_per_task=1)
    number = review.annotators.push(review.gallery).number
    assert accounts[0].next_task(number)["predictions"] == []
    review.everyone_answers(accounts[:1], lambda subject: str(TRUTH[subject.scenario]))
    assert "prelabel" not in review.annotators.review(review.gallery).notes


@pytest.mark.parametrize("form", ["image", "scenario"])
def test_every_task_is_found_by_its_key_and_nothing_else_is(tmp_path, form):
    _, tasks = blank_review(tmp_path, 3, form=form)
    indices = range(len(tasks))
    assert [tasks.index_of(tasks.subject(n).key) for n in indices] == list(indices)
    for unknown in (
        None,
        "",
        "s003",
        "s003-i00",
        "s000-i10",
        "s0000",
        "s0000-i00",
        "s001-i1",
        "s001-i001",
        "x",
    ):
        assert tasks.index_of(unknown) is None
    assert tasks.index_of("s001" if form == "image" else "s001-i00") is None
