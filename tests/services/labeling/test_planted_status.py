"""The status of planted reviews, without a server: what is decided, counted, noted, and left in the queue."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from planted_review import IMAGES, STATE, annotation, blank_review, task_of
from rich.console import Console

from defuse_core.artifacts import NONE_OF_THE_ABOVE, Override
from services.cli.review_tables import print_status, summarize_status
from services.labeling.annotations import AnswerChanges, answer_changes, read_annotations
from services.labeling.records import choice_result
from services.labeling.status import ReviewStatus, review_status, update_queue
from services.labeling.tasks import ReviewTasks


def answers_to(tasks, index, count, choice="8", first=1):
    """One task with answers of so many annotators, numbered from `first`."""
    given = (annotation(10 * index + n, n, choice) for n in range(first, first + count))
    return task_of(tasks, index, *given)


def status_of(tasks, found, names=None, overridden=()) -> ReviewStatus:
    people = names or {n: f"annotator-{n}" for n in range(1, 10)}
    overrides = [
        Override(scenario, None, "Ada", "blurred", "2026-01-31T12:00:00Z") for scenario in overridden
    ]
    return review_status(tasks, read_annotations(found, tasks), STATE, people, overrides)


def test_a_scenario_that_a_person_decided_needs_no_answers_without_stopping_early(tmp_path):
    _, tasks = blank_review(tmp_path, 2, answers_per_task=3)
    status = status_of(tasks, [answers_to(tasks, IMAGES, 1)], overridden=[1])
    assert status.decided.tolist() == [False, True]
    assert (status.requested, status.outstanding, status.saved) == (6 * IMAGES, 3 * IMAGES, 3 * IMAGES - 1)
    assert status.final_votes().notes["decided_early"] == []


@pytest.mark.parametrize(
    ("fields", "final"),
    [
        ({}, True),
        ({"stop_early": False}, False),
        ({"accept": "lower-bound"}, False),
        ({"consensus": "crowdlab"}, False),
    ],
)
def test_only_the_majority_by_share_is_decided_early(tmp_path, fields, final):
    _, tasks = blank_review(tmp_path, 2, **{"answers_per_task": 3, "stop_early": True, **fields})
    counts = [2] * IMAGES + [3] * IMAGES  # two of three agree, and all three
    status = status_of(tasks, [answers_to(tasks, index, count) for index, count in enumerate(counts)])
    assert status.decided.tolist() == [final, True]
    assert status.final_votes().notes["decided_early"] == ([0] if final else [])


@pytest.mark.parametrize(("accept", "label"), [("share", 8), ("lower-bound", NONE_OF_THE_ABOVE)])
def test_the_verdicts_so_far_follow_the_rule_of_the_run_file(tmp_path, accept, label):
    _, tasks = blank_review(tmp_path, 1, accept=accept)
    found = [answers_to(tasks, index, 1, "8" if index < 6 else "0") for index in range(IMAGES)]
    assert status_of(tasks, found).verdicts().labels.tolist() == [label]  # six of ten are misclassified


def test_votes_name_who_gave_them_whatever_the_order_of_the_accounts(tmp_path):
    _, tasks = blank_review(tmp_path, 1)
    first = task_of(tasks, 0, annotation(1, 7, "3", created=5.0), annotation(2, 2, "4", created=6.0))
    second = task_of(tasks, 1, annotation(3, 5, "6", created=1.0))
    status = status_of(tasks, [first, second])
    votes = status.votes
    given = zip(votes.image.tolist(), votes.annotator.tolist(), votes.answer.tolist(), strict=True)
    assert {(image, votes.annotators[who], answer) for image, who, answer in given} == {
        (0, "annotator-7", 3),
        (0, "annotator-2", 4),
        (1, "annotator-5", 6),
    }
    assert status.per_annotator() == {"annotator-5": 1, "annotator-7": 1, "annotator-2": 1}
    one_name = status_of(tasks, [first, second], dict.fromkeys((2, 5, 7), "Ana"))
    assert one_name.per_annotator() == {"Ana": 3}


def test_pages_give_every_image_the_label_that_was_given_to_it(tmp_path):
    _, tasks = blank_review(tmp_path, 2, form="scenario")
    page = annotation(1, 3, "5", target="page")
    page = replace(page, result=[*page.result, choice_result("label_2", "image_2", "7")])
    status = status_of(tasks, [task_of(tasks, 0, page), answers_to(tasks, 1, 1, "4")])
    expected = np.repeat([[5], [4]], IMAGES, axis=1)
    expected[0, 2] = 7
    shown = np.full((2, IMAGES), -9)
    shown[status.votes.scenario, status.votes.image] = status.votes.answer
    np.testing.assert_array_equal(shown, expected)


@pytest.mark.parametrize(
    ("fields", "provisional"),
    [({}, True), ({"accept": "share"}, False), ({"accept": "share", "consensus": "crowdlab"}, True)],
)
def test_a_verdict_that_answers_to_other_scenarios_can_change_is_said_to_be_so_far(
    tmp_path, fields, provisional
):
    fields = {"accept": "lower-bound", "answers_per_task": 1, "form": "scenario", **fields}
    run, tasks = blank_review(tmp_path, 6, **fields)
    found = [task_of(tasks, index, annotation(index, 1, target="page")) for index in range(6)]
    status = status_of(tasks, found[:2], overridden=[1])
    shown = io.StringIO()
    print_status(run, status, Console(file=shown, width=200))
    assert status.provisional.tolist() == [provisional, *[False] * 5]
    assert shown.getvalue().count("its answers are in; so far ") == provisional
    summary = summarize_status("mine", status, str).scenarios
    assert [one.final for one in summary] == [not provisional, True, *[False] * 4]
    assert not status_of(tasks, found).provisional.any()


def test_an_answer_for_a_page_is_counted_and_missed_once_and_not_for_each_of_its_images(tmp_path):
    run, tasks = blank_review(tmp_path, 2, form="scenario", answers_per_task=3)
    status = status_of(tasks, [task_of(tasks, 0, annotation(1, 3, target="page"))])
    shown = io.StringIO()
    print_status(run, status, Console(file=shown, width=100))
    assert "1 of 6 answers are in; 5 are still wanted." in shown.getvalue()
    rows = [line.split() for line in shown.getvalue().splitlines() if line.rstrip().endswith("open")]
    assert rows == [["0", "2", "open"], ["1", "3", "open"]]


@pytest.mark.parametrize(
    ("given", "skipped", "way_out"),
    [
        ({0: [1], 1: [1]}, [], "nobody can still answer; .*answers_per_task=1` ends"),
        ({0: [1, 2], 1: [1]}, [], None),  # 2 can still answer 1, and half of the answers is not there
        # 0 are deleted accounts
        ({0: [0, 1], 1: [1]}, [], "nobody can still answer; .*answers_per_task=1` ends"),
        ({0: [1, 2], 1: [1]}, [2], "nobody can still answer; .*answers_per_task=1` ends"),
        ({0: [1, 2, 3], 1: [1, 2]}, [], "Cem can still answer; .*answers_per_task=2` ends"),
        ({0: [1, 2]}, [], None),  # nobody has answered 1
        ({0: [1, 2, 3], 1: [1, 2, 3]}, [], None),  # all answers are in
    ],
)
def test_the_way_out_is_named_where_those_who_answered_may_not_give_the_missing_answers(
    tmp_path, given, skipped, way_out
):
    run, tasks = blank_review(tmp_path, 2, form="scenario", answers_per_task=3)
    found = [
        task_of(tasks, index, *(annotation(10 * index + n, n, target="page") for n in people))
        for index, people in given.items()
    ]
    found += [task_of(tasks, 1, annotation(99, n, None)) for n in skipped]
    text = status_of(tasks, found, {0: "?", 1: "Ada", 2: "Ben", 3: "Cem"}).way_out(run)
    assert re.search(way_out, text) if way_out else text == ""


@pytest.mark.parametrize(
    ("choices", "fields", "fewer"),
    [
        (["80808"] * 19 + ["8080"], {}, 4),  # the fifth person left one image undone
        (["88"] * 19 + ["8z"], {}, 1),  # z: an answer that is not readable
        # scenario 0 is decided early, with two answers to some of its images
        (["80n88"] * 6 + ["80"] * 4 + ["--80n"] * 10, {"stop_early": True}, 3),
    ],
)
def test_the_way_out_ends_the_review_with_all_answers_that_were_given_and_the_verdicts_so_far(
    tmp_path, choices, fields, fewer
):
    run, tasks = blank_review(tmp_path, 2, **fields)
    named = {"z": "zebra", "n": "None of the above"}
    found = [
        task_of(
            tasks,
            index,
            *(
                annotation(10 * index + n, n, named.get(choice, choice), created=100.0 * n + index)
                for n, choice in enumerate(given, start=1)
                if choice != "-"
            ),
        )
        for index, given in enumerate(choices)
    ]
    before = status_of(tasks, found)
    assert f"with `--set review.answers_per_task={fewer}` ends the review" in before.way_out(run)
    tasks = ReviewTasks(tasks.gallery, tasks.review.model_copy(update={"answers_per_task": fewer}))
    pulled = read_annotations(found, tasks, most_asked=5)
    after = review_status(tasks, pulled, STATE, before.names, [])
    assert (after.outstanding, after.given) == (0, before.given)
    assert after.verdicts().reasons == before.verdicts().reasons


def test_a_skip_blocks_only_where_its_task_lacks_answers_in_a_scenario_that_is_open(tmp_path):
    _, tasks = blank_review(tmp_path, 2, answers_per_task=1)
    skip, answer = annotation(1, 3, None), annotation(2, 4)
    found = [task_of(tasks, 0, skip), task_of(tasks, 1, skip, answer), task_of(tasks, IMAGES, skip)]
    status = status_of(tasks, found, overridden=[1])
    assert [one.task for one in status.blocking_skips()] == [100]
    assert status.final_votes().notes["skips"] == 3


def test_an_unreadable_answer_blocks_where_its_task_lacks_answers_unless_its_author_also_gave_a_readable_one(
    tmp_path,
):
    _, tasks = blank_review(tmp_path, 1, answers_per_task=2)
    odd, valid, other = annotation(1, 3, "zebra"), annotation(2, 3), annotation(3, 4)
    found = [
        task_of(tasks, 0, odd),
        task_of(tasks, 1, odd, valid),
        task_of(tasks, 2, odd, other, annotation(4, 5)),
    ]
    assert [(one.task, one.annotation) for one in status_of(tasks, found).blocking_skips()] == [(100, 1)]


def test_the_reason_shows_a_choice_that_is_no_text_as_it_is(tmp_path):
    _, tasks = blank_review(tmp_path, 1)
    number = annotation(1, 3)
    number = replace(number, result=[{**number.result[0], "value": {"choices": [7]}}])
    (discarded,) = status_of(tasks, [task_of(tasks, 0, number)]).pulled.discarded
    assert discarded.reason == "the choice 7 is not one of the classes"


@pytest.mark.parametrize("form", ["image", "scenario"])
def test_answers_that_were_added_changed_and_deleted_after_the_votes_are_counted(tmp_path, form):
    _, tasks = blank_review(tmp_path, 4, form=form)
    target = "page" if form == "scenario" else "image"

    def given(choices):
        people = ((n, choice) for n, choice in enumerate(choices, start=1) if choice != "-")
        return [annotation(n, n, choice, target=target, changed=9.0) for n, choice in people]

    stored = status_of(tasks, [task_of(tasks, 0, *given("88")), task_of(tasks, 1, *given("833"))]).votes
    now = status_of(tasks, [task_of(tasks, 0, *given("8-1")), task_of(tasks, 1, *given("438"))])
    assert answer_changes(tasks, stored, now.votes) == AnswerChanges(added=1, changed=2, deleted=1)
    assert answer_changes(tasks, now.votes, now.votes) == AnswerChanges() and not str(AnswerChanges())


def status_of_people(tasks, names, *choices) -> ReviewStatus:
    """Of annotators 1, 2, ... under these names, who gave these choices to task 0, task 1, ...; "-" is none."""
    target = "page" if tasks.whole_pages else "image"
    found = [
        task_of(
            tasks,
            task,
            *(
                annotation(10 * task + n, n, choice, target=target)
                for n, choice in enumerate(given, start=1)
                if choice != "-"
            ),
        )
        for task, given in enumerate(choices)
    ]
    return status_of(tasks, found, names)


@pytest.mark.parametrize("form", ["image", "scenario"])
def test_who_gave_an_answer_is_known_by_pseudonym_whatever_the_real_names(tmp_path, form):
    _, tasks = blank_review(tmp_path, 4, form=form, real_names=True)
    state = STATE.with_annotators([1, 2, 3])
    names = {1: "Anna", 2: "Anna", 3: "Ben"}

    def votes(names, *choices):
        return replace(status_of_people(tasks, names, *choices), state=state).final_votes()

    stored = votes(names, "83", "83")
    assert stored.annotators == ("Anna", "Anna")
    for later in (names, {1: "Anna Ng", 2: "deleted account (annotator-2)", 3: "Ben"}):
        assert answer_changes(tasks, stored, votes(later, "83", "83")) == AnswerChanges()
        assert answer_changes(tasks, stored, votes(later, "83", "80")) == AnswerChanges(changed=1)
        assert answer_changes(tasks, stored, votes(later, "83", "8")) == AnswerChanges(deleted=1)
        # another person gave the answers of one who deleted theirs
        taken = votes(later, "8-3", "8-3")
        assert answer_changes(tasks, stored, taken) == AnswerChanges(added=2, deleted=2)


@pytest.mark.parametrize("form", ["image", "scenario"])
def test_the_report_is_told_what_was_discarded_and_who_answered(tmp_path, form):
    _, tasks = blank_review(tmp_path, 1, form=form, prelabel=form == "scenario")
    status = status_of(tasks, [task_of(tasks, len(tasks) - 1, annotation(7, 3, "eleven"))])
    votes = status.final_votes()
    (note,) = votes.notes["discarded_answers"]
    image = None if form == "scenario" else IMAGES - 1
    assert (note["scenario"], note["image"], note["annotator"], note["annotation"]) == (
        0,
        image,
        "annotator-3",
        7,
    )
    assert ("prelabel" in votes.notes) is (form == "scenario")
    assert votes.answered_by == "people"
    simulated = replace(STATE, simulated=True)
    assert replace(status, state=simulated).final_votes().answered_by == "reference models"


def test_the_queue_holds_what_lacks_answers_and_nothing_else(tmp_path):
    _, tasks = blank_review(tmp_path, 2, answers_per_task=2)
    both = (annotation(1, 1), annotation(2, 2))
    found = [
        task_of(tasks, 0, overlap=2),  # as it should be
        task_of(tasks, 1, annotation(1, 1, "eleven"), labeled=True),  # its annotation does not count
        task_of(tasks, 2, *both, overlap=2),
        task_of(tasks, 3, *both, overlap=7, labeled=True),  # out of the queue already
        task_of(tasks, 4, overlap=1),
        task_of(tasks, 5, annotation(3, 1, None), overlap=2),  # a skip
        task_of(tasks, IMAGES, overlap=2),  # of a scenario that a person decided
        task_of(tasks, 0, number=99, overlap=2),  # a copy
    ]
    calls = []
    client = SimpleNamespace(set_overlap=lambda *call: calls.append(call))
    update_queue(client, status_of(tasks, found, overridden=[1]))
    put_back = [(101, 3, False), (104, 2, False)]
    assert sorted(calls) == [(99, 1, True), put_back[0], (102, 2, True), put_back[1], (100 + IMAGES, 1, True)]
