"""review.consensus: crowdlab with stop_early: images whose label is sure are not asked about, the others are."""

from __future__ import annotations

import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from digits_review import TRUTH, model_answers, truth_of
from label_studio_live import change, digits_gallery, review_run
from planted_review import STATE, annotation, task_of
from rich.console import Console

from defuse_core.artifacts import ReferenceSet
from defuse_core.errors import LabelsPending
from defuse_core.training.reference_models import Prelabels
from services.cli.review_tables import print_status
from services.labeling.annotations import read_annotations
from services.labeling.records import choice_result
from services.labeling.status import review_status, update_queue
from services.labeling.tasks import ReviewTasks

CROWDLAB = {"consensus": "crowdlab", "stop_early": True, "answers_per_task": 5}
SPLIT, DOUBTED = "s000-i01", "s001-i02"  # two people disagree; they agree, and the models do not


def answer_of(person, subject):
    """The answer of a person, right except on the images in doubt."""
    if subject.key == SPLIT:
        return "83889"[person]
    return "7" if subject.key == DOUBTED else truth_of(subject)


def planted(folder, people=2, choice=answer_of, stored=True, **review):
    """The status after so many people answered every task."""
    gallery = digits_gallery()
    tasks = ReviewTasks(gallery, review_run(folder, gallery, **CROWDLAB | review).spec.review)
    found = [
        task_of(
            tasks,
            index,
            *(annotation(10 * index + n, n + 1, choice(n, tasks.subject(index))) for n in range(people)),
            overlap=9,
        )
        for index in range(len(tasks))
    ]
    names = {n: f"annotator-{n}" for n in range(1, 6)}
    models = model_answers().probabilities if stored else None
    return review_status(tasks, read_annotations(found, tasks), STATE, names, (), models)


def test_only_images_in_doubt_are_asked_about_and_the_numbers_add_up(tmp_path):
    status = planted(tmp_path)
    open_tasks = [status.tasks.subject(index).key for index in np.flatnonzero(status.wanted_per_task)]
    assert open_tasks == [SPLIT, DOUBTED]
    assert (status.requested, status.given, status.outstanding, status.saved) == (60, 24, 6, 30)
    assert status.missing.sum(axis=1).tolist() == [3, 3, 0, 0]
    assert status.decided.tolist() == [False, False, True, True] and int(status.sure.sum()) == 10


@pytest.mark.parametrize(
    ("review", "stored"),
    [
        ({"stop_early": False}, True),
        ({"consensus": "majority"}, True),
        ({"certainty": 1.0}, True),
        ({}, False),
    ],
)
def test_otherwise_every_answer_is_asked_for(tmp_path, review, stored):
    status = planted(tmp_path, stored=stored, accept="lower-bound", rho=0.3, **review)
    assert (status.outstanding, status.saved, bool(status.sure.any())) == (36, 0, False)


def test_one_person_decides_nothing(tmp_path):
    assert planted(tmp_path, people=1).outstanding == 48


def test_the_review_ends_when_every_image_is_sure_or_has_all_answers(tmp_path):
    nobody_agrees = planted(
        tmp_path, 5, lambda n, subject: str(n) if subject.key == SPLIT else truth_of(subject)
    )
    assert not nobody_agrees.sure[0, 1] and nobody_agrees.outstanding == 0 and nobody_agrees.decided.all()
    all_agree = planted(tmp_path, 2, lambda n, subject: truth_of(subject))
    assert all_agree.sure.all() and (all_agree.outstanding, all_agree.saved) == (0, 36)


def test_a_page_is_asked_about_while_one_of_its_images_is_in_doubt(tmp_path):
    gallery = digits_gallery()
    tasks = ReviewTasks(gallery, review_run(tmp_path, gallery, **CROWDLAB, form="scenario").spec.review)
    pages = [
        [annotation(10 * n + person, person, str(label), target="page") for person in (1, 2)]
        for n, label in enumerate(TRUTH)
    ]
    apart = [*pages[0][1].result, choice_result("label_1", "image_1", "3")]
    pages[0][1] = replace(pages[0][1], result=apart)
    found = [task_of(tasks, n, *page) for n, page in enumerate(pages)]
    names, models = {1: "a", 2: "b"}, model_answers().probabilities
    status = review_status(tasks, read_annotations(found, tasks), STATE, names, (), models)
    assert status.sure[0].tolist() == [True, False, True] and status.sure[1:].all()
    assert status.wanted_per_task.tolist() == [3, 0, 0, 0] and (status.outstanding, status.saved) == (3, 9)


def targets(status):
    """The overlap and whether it is out of the queue, of each task that the queue is changed for."""
    calls = {}
    client = SimpleNamespace(set_overlap=lambda task, *target: calls.update({task - 100: target}))
    update_queue(client, status)
    return calls


def test_sure_images_leave_the_queue_and_those_in_doubt_are_open_for_all_other_answers(tmp_path):
    expected = dict.fromkeys(range(12), (2, True))
    expected[1] = expected[5] = (5, False)
    assert targets(planted(tmp_path)) == expected


@pytest.mark.parametrize("people", [0, 1])
def test_at_first_an_image_is_open_for_two_answers(tmp_path, people):
    assert targets(planted(tmp_path, people)) == dict.fromkeys(range(12), (2, False))


def test_the_status_says_how_many_images_are_sure_and_what_may_still_be_wanted(tmp_path):
    def shown(status):
        console = Console(width=200, file=io.StringIO())
        print_status(review_run(tmp_path, digits_gallery()), status, console)
        return console.file.getvalue()

    stored, without = shown(planted(tmp_path)), shown(planted(tmp_path, stored=False))
    assert "24 of 60 answers are in; about 6 are still wanted." in stored
    assert "10 of 12 images are sure (review.certainty: 0.85)." in stored and "by majority" not in stored
    assert "24 of 60 answers are in; 36 are still wanted." in without and "are sure" not in without
    assert "reference models' answers, before which no image is sure." in without


def test_the_verdicts_so_far_are_those_of_crowdlab(tmp_path):
    gallery = digits_gallery(labels=TRUTH[:2])
    run = review_run(tmp_path, gallery, **CROWDLAB)
    tasks = ReviewTasks(gallery, run.spec.review)
    split = [annotation(20 + person, person, "8338"[person - 1]) for person in range(1, 5)]
    found = [task_of(tasks, n, annotation(n, 1, "8"), annotation(9 + n, 2, "8")) for n in range(1, 6)]
    found.insert(0, task_of(tasks, 0, *split))
    pulled, models = read_annotations(found, tasks), model_answers().probabilities[:, :2]
    names = dict(enumerate("abcd", start=1))
    assert review_status(tasks, pulled, STATE, names, ()).verdicts().image_labels[0, 0] == -1  # a tie
    status, terminal = review_status(tasks, pulled, STATE, names, (), models), io.StringIO()
    assert status.verdicts().image_labels[0, 0] == 8 and status.not_majority == 1
    print_status(run, status, Console(file=terminal, width=200))
    assert "CROWDLAB gives 1 image a label that is not the one most people chose" in terminal.getvalue()


@pytest.fixture
def crowdlab_review(make_review):
    review = make_review(**CROWDLAB)
    review.run.once("review", Prelabels, model_answers)
    review.annotators.push(review.gallery)
    return review


def two_people_answer(review, accounts, keys=None):
    """Two people answer the tasks with these keys, or all."""
    tasks = review.tasks()
    for person in range(2):
        for task in (tasks[key] for key in keys or tasks):
            accounts[person].answer(task.id, "image", answer_of(person, review.subject(task)))


def key_of(queued):
    return queued["meta"]["sample_key"]


def open_keys(review):
    return sorted(key for key, task in review.tasks().items() if not task.labeled)


def test_once_a_run_has_its_models_answers_sure_images_leave_the_queue_and_it_ends_without_their_answers(
    make_review, accounts
):
    review = make_review(**CROWDLAB)
    number = review.annotators.push(review.gallery).number
    two_people_answer(review, accounts)
    assert not review.annotators.status(review.gallery).sure.any()
    trained = ReferenceSet(({"weight": np.zeros(1, np.float32)},), 10, np.ones(1), np.ones(1))
    review.run.once("train", ReferenceSet, lambda: trained, "references")
    review.annotators.compute = SimpleNamespace(task=lambda *call: model_answers().probabilities)
    with pytest.raises(
        LabelsPending, match="24 answers are in and about 6 are still wanted, 2 of 4 scenarios"
    ):
        review.annotators.review(review.gallery)
    assert review.run.load(Prelabels) is not None
    assert int(review.annotators.status(review.gallery).sure.sum()) == 10
    assert open_keys(review) == [SPLIT, DOUBTED]
    for account in accounts[2:]:
        while (task := account.next_task(number)) is not None:
            assert key_of(task) in (SPLIT, DOUBTED)
            account.answer(task["id"], "image", "8" if key_of(task) == SPLIT else "3")
    votes = review.annotators.review(review.gallery)
    assert (len(votes.answer), votes.notes["answers_saved"]) == (30, 30)


def test_an_answer_that_is_changed_or_deleted_puts_a_sure_image_back(crowdlab_review, accounts):
    review, changed, deleted = crowdlab_review, "s002-i00", "s003-i00"
    two_people_answer(review, accounts, (SPLIT, DOUBTED, changed, deleted))
    review.annotators.status(review.gallery)
    before = review.tasks()
    assert before[changed].labeled and before[deleted].labeled
    change(accounts[0], before[changed].annotations[0].id, "6")
    review.api.delete_annotation(before[deleted].annotations[0].id)
    review.annotators.status(review.gallery)
    assert {changed, deleted} <= set(open_keys(review))


def test_three_people_at_once_all_get_tasks_and_one_who_leaves_holds_no_image_back(crowdlab_review, accounts):
    review = crowdlab_review
    number = review.state.number
    assert {task.overlap for task in review.tasks().values()} == {2}
    assert None not in [account.next_task(number) for account in accounts[:3]]
    two_people_answer(review, accounts)
    assert accounts[2].next_task(number) is None
    review.annotators.status(review.gallery)
    left = accounts[2].next_task(number)  # opens a task, and leaves
    assert key_of(left) in (SPLIT, DOUBTED)
    for account in accounts[3:]:
        task = account.next_task(number)
        account.answer(task["id"], "image", "3")
        assert {key_of(task), key_of(account.next_task(number))} == {SPLIT, DOUBTED}
