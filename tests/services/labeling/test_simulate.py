"""Simulated annotators: they answer the queue, and their progress is shown."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from label_studio_live import digits_gallery, review_run

from defuse_core.artifacts import MeasuredPrecision, ReferenceSet, Votes
from defuse_core.codec import encode
from defuse_core.errors import InputError, RunBusyError
from defuse_core.local import LocalCompute
from defuse_core.protocols import silent
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from services.labeling.simulate import _answer_queue, _votes_of_models, simulate
from services.labeling.tasks import ReviewTasks


@pytest.mark.parametrize("form", ["image", "scenario"])
def test_a_simulated_annotator_gives_its_models_answers_and_reports_progress(make_review, accounts, form):
    review = make_review(answers_per_task=1, form=form)
    number = review.annotators.push(review.gallery).number
    tasks = ReviewTasks(review.gallery, review.run.spec.review)
    answers = np.array([[8, 8, -1], [3, 3, 3], [0, 0, 0], [1, 1, 7]])
    calls = []
    answered = _answer_queue(accounts[0], number, tasks, answers, lambda *call: calls.append(call))
    total = len(tasks)
    assert answered == total and calls == [(n, total, "tasks") for n in range(1, total + 1)]
    votes = review.annotators.review(review.gallery)
    given = np.full((4, 3), 99)
    given[votes.scenario, votes.image] = votes.answer
    assert given.tolist() == answers.tolist()


def test_models_do_not_answer_beside_people(make_review, accounts, server):
    review = make_review(answers_per_task=2)
    review.annotators.push(review.gallery)
    accounts[0].answer(review.tasks()["s000-i00"].id, "image", "8")
    with pytest.raises(InputError, match="people have answered in the project"):
        simulate(review.annotators, review.gallery, server, LocalCompute(), silent)
    assert not review.state.simulated


def test_tasks_that_defuse_did_not_import_end_the_simulation_with_an_error(make_review, accounts):
    review = make_review(answers_per_task=1)
    number = review.annotators.push(review.gallery).number
    review.api.import_tasks(number, [{"data": {"image": "data:image/png;base64,AAAA"}}])
    tasks = ReviewTasks(review.gallery, review.run.spec.review)
    with pytest.raises(InputError, match="tasks that Defuse did not import"):
        _answer_queue(accounts[0], number, tasks, np.zeros((4, 3), np.int64), lambda *call: None)


@pytest.mark.parametrize(("asked", "missing"), [(2, False), (3, True)])
def test_fewer_models_than_answers_asked_for_are_told(
    asked, missing, make_review, server, monkeypatch, caplog
):
    review = make_review(gallery=digits_gallery(labels=(8, 3), images=1), answers_per_task=asked)
    review.annotators.push(review.gallery)
    annotator, scenario, image = (part.ravel() for part in np.indices((2, 2, 1)))
    votes = Votes(scenario, image, annotator, scenario, np.zeros(4), ("a", "b"), "reference models", {})
    monkeypatch.setattr("services.labeling.simulate._votes_of_models", lambda *_: votes)
    assert simulate(review.annotators, review.gallery, server, LocalCompute(), silent) == 4
    line = "2 reference models answer each task once, and review.answers_per_task is 3: 2 are still wanted"
    assert (line in caplog.messages) == missing
    assert simulate(review.annotators, review.gallery, server, LocalCompute(), silent) == 0
    status = review.annotators.status(review.gallery)
    assert list(status.per_annotator().values()) == [2, 2]


class TrainingError(Exception):
    """A training was asked for."""


def training_ends(step, calls):
    raise TrainingError(calls[0].args[0].resources.arithmetic("reference"))


def test_reference_models_are_not_trained_beside_a_driver_of_the_run(tmp_path):
    gallery = digits_gallery()
    run = review_run(tmp_path, gallery)
    beside = Run.open(FolderStore(tmp_path), run.name)
    with run.store.lock(), pytest.raises(RunBusyError, match="no reference models yet.*; end that driver"):
        _votes_of_models(beside, SimpleNamespace(tasks=training_ends), gallery)


def test_reference_models_that_are_trained_are_asked_beside_a_driver_of_the_run(tmp_path):
    gallery, probabilities = digits_gallery(), np.zeros((1, 4, 3, 10), np.float32)
    probabilities[..., 7] = 1.0
    run = review_run(tmp_path, gallery)
    trained = ReferenceSet(({"weight": np.zeros(1, np.float32)},), 10, np.ones(1), np.ones(1))
    run.once("train", ReferenceSet, lambda: trained, "references")
    beside = Run.open(FolderStore(tmp_path), run.name)
    with run.store.lock():
        votes = _votes_of_models(beside, SimpleNamespace(task=lambda *call: probabilities), gallery)
    assert votes.answer.tolist() == [7] * 12


def test_reference_models_are_trained_in_the_number_format_that_the_run_measured(tmp_path):
    gallery = digits_gallery()
    run = review_run(tmp_path, gallery)
    resources = run.spec.resources.model_copy(update={"precision": "auto"})
    run.spec = run.spec.model_copy(update={"resources": resources})
    measured = MeasuredPrecision({"reference": "bf16"})
    run.store.write("measuredprecision.safetensors", encode(measured))
    with pytest.raises(TrainingError, match="bf16"):
        _votes_of_models(run, SimpleNamespace(tasks=training_ends), gallery)
