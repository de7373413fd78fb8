"""Answering: what people submit over the real API, and what of it counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from digits_review import TRUTH, answers_of, truth_of
from label_studio_live import change, digits_gallery
from sample_findings import finished_run, sample_findings

from defuse_core.artifacts import NONE_OF_THE_ABOVE
from defuse_core.errors import LabelsPending
from defuse_core.report.build import build_report
from defuse_core.review.overrides import override_verdict
from defuse_core.review.verdicts import decide_verdicts
from services.labeling.annotations import ANSWER_DTYPE, select_counted
from services.labeling.records import choice_result
from services.labeling.tasks import ReviewTasks
from tests.sample_components import review_section


def test_a_finished_review_holds_every_answer_with_who_and_when(make_review, accounts):
    review = make_review(gallery=digits_gallery(images=1))
    review.annotators.push(review.gallery)
    review.everyone_answers(accounts[:3], truth_of)
    votes = review.annotators.review(review.gallery)
    assert votes.annotators == ("annotator-1", "annotator-2", "annotator-3")
    assert votes.answered_by == "people"
    assert len(votes.answer) == 12 and (votes.when > 1.7e9).all()
    assert (votes.answer == np.array(TRUTH)[votes.scenario]).all()
    assert decide_verdicts(review_section(), review.gallery, votes).labels.tolist() == [8, -1, -1, -1]


def test_the_figure_6_table_of_a_known_disagreement_equals_the_one_worked_out_by_hand(make_review, accounts):
    """Image 0 of each scenario: 5 of 5 agree. Image 1: 3 of 5. Image 2: 2 of 4, and one none-of-the-above.

    Scenario 0 alone is a failure. Per image 1.0, 0.6, and 0.5: mean 0.7, standard error sqrt(((0.3)^2 + (0.1)^2 +
    (0.2)^2) / 2) / sqrt(3) = 0.1528 over its three images, and over the other three the same mean.
    """
    review = make_review(gallery=digits_gallery(labels=TRUTH[:2]), answers_per_task=5)
    review.annotators.push(review.gallery)
    plans, tasks = ("TTTTT", "TTTXY", "TTXYN"), review.tasks().values()
    for number, account in enumerate(accounts):
        for task in tasks:
            subject = review.subject(task)
            truth = TRUTH[subject.scenario]
            choices = {"T": truth, "X": (truth + 4) % 10, "Y": (truth + 6) % 10}
            plan = plans[subject.image][number]
            account.answer(task.id, "image", "None of the above" if plan == "N" else str(choices[plan]))
    votes = review.annotators.review(review.gallery)
    verdicts = decide_verdicts(review_section(), review.gallery, votes)
    assert verdicts.labels.tolist() == [8, -1]
    assert np.allclose(verdicts.agreement, [[1.0, 0.6, 0.5]] * 2)
    found, evaluation = sample_findings(2, 1, images=3)
    found = replace(found, gallery=review.gallery, verdicts=verdicts)
    table = build_report(review.run, finished_run(found, evaluation)).agreement
    assert table.scenario.mean == pytest.approx(0.7) and table.other.mean == pytest.approx(0.7)
    assert table.scenario.standard_error == pytest.approx(0.15275, abs=1e-5)
    assert (table.scenario.images, table.other.images, table.all.images) == (3, 3, 6)


def test_skips_and_drafts_do_not_count_and_a_changed_answer_takes_the_newest(make_review, accounts):
    review = make_review(answers_per_task=1)
    review.annotators.push(review.gallery)
    tasks = review.tasks()
    first, second, third = (tasks[f"s000-i0{n}"].id for n in range(3))
    accounts[0].submit(first, [], was_cancelled=True)
    draft = {"result": [choice_result("label", "image", "8")]}
    accounts[0].http.post(f"/api/tasks/{second}/drafts", json=draft).raise_for_status()
    changed = accounts[0].answer(third, "image", "3")
    change(accounts[0], changed, "8")
    status = review.annotators.status(review.gallery)
    assert (status.given, status.outstanding, len(status.pulled.skips)) == (1, 11, 1)
    assert status.votes.answer.tolist() == [8]


def test_what_the_interface_does_not_allow_is_refused_one_by_one(make_review, accounts):
    review = make_review(answers_per_task=2)
    review.annotators.push(review.gallery)
    task = review.tasks()["s000-i00"].id
    eight = choice_result("label", "image", "8")
    accounts[0].submit(task, [choice_result("label", "image", "eleven")])
    accounts[0].submit(task, [eight | {"value": {"choices": [["8"]]}}])
    accounts[0].submit(task, [])
    accounts[1].submit(task, [choice_result("label_0", "image", "8")])
    accounts[1].submit(task, [eight | {"value": {"choices": ["8", "3"]}}])
    accounts[2].submit(task, [eight, eight])
    accounts[2].submit(task, [{"type": "choices"}])
    status = review.annotators.status(review.gallery)
    assert status.given == 0
    assert sorted(discarded.reason for discarded in status.pulled.discarded) == [
        "2 choices for label, not one",
        "an answer for 'label_0', which was not asked",
        "no label was chosen",
        "not an answer of this interface",
        "the choice 'eleven' is not one of the classes",
        "the choice ['8'] is not one of the classes",
        "two answers for label",
    ]
    assert {status.name_of(discarded) for discarded in status.pulled.discarded} == {
        "annotator-1",
        "annotator-2",
        "annotator-3",
    }


def test_a_refused_answer_does_not_keep_the_task_from_others(make_review, accounts):
    review = make_review(answers_per_task=1)
    number = review.annotators.push(review.gallery).number
    first = review.tasks()["s000-i00"].id
    accounts[0].submit(first, [])
    assert accounts[1].next_task(number)["id"] != first
    review.annotators.status(review.gallery)
    assert accounts[2].next_task(number)["id"] == first


def test_an_answer_that_was_refused_and_is_put_right_frees_its_task(make_review, accounts):
    review = make_review(answers_per_task=1)
    number = review.annotators.push(review.gallery).number
    first = review.tasks()["s000-i00"].id
    annotation = accounts[0].submit(first, [])
    review.annotators.status(review.gallery)
    change(accounts[0], annotation, "8")
    review.annotators.status(review.gallery)
    assert accounts[1].next_task(number)["id"] != first


def test_answers_to_a_copy_of_a_task_are_not_asked_for_again(make_review, accounts):
    review = make_review(answers_per_task=3)
    number = review.annotators.push(review.gallery).number
    samples = ReviewTasks(review.gallery, review.run.spec.review)
    review.api.import_tasks(number, [samples.task(0, secret=review.state.secret)])
    both = sorted(task.id for task in review.api.tasks(number) if task.key == "s000-i00")
    for account, task in zip(accounts, both, strict=False):
        account.answer(task, "image", "8")
    status = review.annotators.status(review.gallery)
    assert status.given == 2
    asked = {task.id: (task.overlap, task.labeled) for task in review.api.tasks(number)}
    assert [asked[task] for task in both] == [(2, False), (1, True)]


def test_a_second_answer_of_one_person_and_a_surplus_answer_are_refused(make_review, accounts):
    review = make_review(answers_per_task=2)
    review.annotators.push(review.gallery)
    task = review.tasks()["s000-i00"].id
    for person, choice in zip((0, 0, 1, 2), "3870", strict=True):
        accounts[person].answer(task, "image", choice)
    status = review.annotators.status(review.gallery)
    assert answers_of(status.votes, 0, 0) == {"annotator-1": 8, "annotator-2": 7}
    assert [discarded.reason for discarded in status.pulled.discarded] == [
        "the same person answered again later",
        "2 others had answered before, as many as count",
    ]


def test_a_page_answer_counts_for_every_image_that_got_none_of_its_own(make_review, accounts):
    review = make_review(form="scenario", answers_per_task=1)
    review.annotators.push(review.gallery)
    for task in review.tasks().values():
        subject = review.subject(task)
        own = {1: "None of the above", 2: "3"} if subject.scenario == 0 else {}
        accounts[0].answer(task.id, "page", truth_of(subject), own)
    votes = review.annotators.review(review.gallery)
    assert [votes.answer[(votes.scenario == s)].tolist() for s in range(4)] == [
        [8, NONE_OF_THE_ABOVE, 3],
        [3, 3, 3],
        [0, 0, 0],
        [1, 1, 1],
    ]


def test_all_pages_are_pulled_also_where_the_last_one_is_full(make_review, accounts, monkeypatch):
    review = make_review(answers_per_task=1)
    review.annotators.push(review.gallery)
    review.everyone_answers(accounts[:1], truth_of)
    for page in (5, 12):
        monkeypatch.setattr("services.labeling.client.PAGE_SIZE", page)
        assert len(review.annotators.status(review.gallery).votes.answer) == 12


def test_missing_answers_are_counted_and_the_address_is_named(make_review, accounts):
    review = make_review()
    number = review.annotators.push(review.gallery).number
    accounts[0].answer(review.tasks()["s000-i00"].id, "image", "8")
    with pytest.raises(LabelsPending) as pending:
        review.annotators.review(review.gallery)
    assert pending.value.exit_code == 3
    assert "1 answers are in and 35 are still wanted" in str(pending.value)
    assert f"/projects/{number}/data?labeling=1" in str(pending.value)


def test_pseudonyms_stay_when_others_answer_and_hold_no_address(make_review, accounts):
    review = make_review(gallery=digits_gallery(labels=(8, 3), images=1), answers_per_task=2)
    review.annotators.push(review.gallery)
    accounts[1].answer(review.tasks()["s001-i00"].id, "image", "3")
    with pytest.raises(LabelsPending):
        review.annotators.review(review.gallery)
    review.everyone_answers((accounts[0],), truth_of)
    review.everyone_answers((accounts[1],), lambda _: "7")
    votes = review.annotators.review(review.gallery)
    assert answers_of(votes, 1, 0) == {"annotator-1": 7, "annotator-2": 3}
    stored = b"".join(review.run.store.read(key) for key in review.run.store.list())
    assert b"example.org" not in stored and review.api.address.encode() in stored


def test_real_names_are_kept_when_the_run_file_asks_for_them(make_review, accounts):
    review = make_review(gallery=digits_gallery(labels=(8,), images=1), answers_per_task=1, real_names=True)
    review.annotators.push(review.gallery)
    review.everyone_answers((accounts[2],), truth_of)
    assert review.annotators.review(review.gallery).annotators == ("person3@example.org",)


def test_a_decided_scenario_leaves_the_queue_and_the_answers_saved_are_told(make_review, accounts):
    review = make_review(gallery=digits_gallery(images=2), answers_per_task=3, stop_early=True)
    number, tasks = review.annotators.push(review.gallery).number, review.tasks()
    for account in accounts[:2]:
        for key, task in tasks.items():
            if key < "s002":
                account.answer(task.id, "image", truth_of(review.subject(task)))
    status = review.annotators.status(review.gallery)
    assert status.decided.tolist() == [True, True, False, False]
    assert status.saved == 4
    assert accounts[2].next_task(number)["meta"]["sample_key"].startswith("s002")
    review.everyone_answers(accounts[2:4], truth_of)
    notes = review.annotators.review(review.gallery).notes
    assert notes["answers_saved"] == 4 and notes["decided_early"] == [2, 3]


def test_without_stop_early_every_answer_is_waited_for(make_review, accounts):
    review = make_review(gallery=digits_gallery(images=1), answers_per_task=3, stop_early=False)
    review.annotators.push(review.gallery)
    review.everyone_answers(accounts[:2], truth_of)
    with pytest.raises(LabelsPending, match=" 4 are still wanted"):
        review.annotators.review(review.gallery)


def test_a_changed_answer_opens_a_decided_scenario_again(make_review, accounts):
    review = make_review(answers_per_task=3, stop_early=True)
    number = review.annotators.push(review.gallery).number
    given = [
        accounts[p].answer(t.id, "image", "8")
        for p in (0, 1)
        for k, t in review.tasks().items()
        if k < "s001"
    ]
    assert review.annotators.status(review.gallery).decided[0]
    for annotation in given[:3]:
        change(accounts[0], annotation, "3")
    assert not review.annotators.status(review.gallery).decided[0]
    assert accounts[2].next_task(number)["meta"]["sample_key"].startswith("s000")


def test_a_decision_above_the_vote_needs_no_answers(make_review):
    review = make_review()
    review.annotators.push(review.gallery)
    for scenario in range(4):
        override_verdict(review.run, scenario, None, author="Ada", reason="not a digit")
    votes = review.annotators.review(review.gallery)
    assert len(votes.answer) == 0 and votes.annotators == ()


def test_waiting_goes_on_through_a_restart_and_ends_with_the_last_answer(
    make_review, accounts, proxy, monkeypatch
):
    review = make_review(gallery=digits_gallery(images=1), answers_per_task=1)
    review.annotators.push(review.gallery)
    waiting = review.through(proxy.address)
    waiting.wait, waiting.first_pause_s = True, 0.01
    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 2:
            proxy.cut("GET", "/api/projects", times=9)
        if len(pauses) == 4:
            proxy.rule = lambda method, path: None
            review.everyone_answers(accounts[:1], truth_of)

    monkeypatch.setattr("services.labeling.annotators.PAUSE_PER_PULL", 0)
    monkeypatch.setattr("services.labeling.annotators.sleep", sleep)
    monkeypatch.setattr("label_studio_sdk.core.http_client._retry_timeout_from_retries", lambda retries: 0)
    assert len(waiting.review(review.gallery).answer) == 4
    assert pauses[0] < pauses[1] < pauses[2]


def test_of_two_answers_of_one_annotator_the_newest_counts_and_of_the_annotators_the_first():
    rows = [  # task, labels, annotation, annotator, created, when
        (0, 0, 1, 7, 10.0, 10.0),
        (0, 1, 2, 7, 11.0, 20.0),  # in the place of the first
        (0, 2, 3, 8, 5.0, 5.0),
        (0, 3, 4, 9, 30.0, 30.0),  # the third annotator, where two are wanted
        (1, 4, 5, 7, 1.0, 1.0),
        (2, 5, 6, 7, 1.0, 1.0),
        (2, 6, 7, 8, 10.0, 10.0),
        (2, 7, 8, 9, 11.0, 11.0),
        (2, 8, 9, 7, 20.0, 20.0),  # again, and still the first annotator
    ]
    table = np.array(rows, ANSWER_DTYPE)
    for order in ([0, 1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 2, 1, 0], [2, 4, 8, 0, 6, 3, 1, 7, 5]):
        shuffled = table[order]
        found = [shuffled["annotation"][rows].tolist() for rows in select_counted(shuffled, 2)]
        assert found == [[3, 2, 5, 9, 7], [1, 6], [4, 8]]


def test_waiting_takes_the_server_a_tenth_of_its_time_at_most(make_review, accounts, monkeypatch):
    review = make_review(gallery=digits_gallery(images=1), answers_per_task=1)
    review.annotators.push(review.gallery)
    review.annotators.wait, review.annotators.first_pause_s = True, 0.01
    pauses = []

    def sleep(seconds):
        pauses.append((seconds, review.annotators.pull_s))
        if len(pauses) == 3:
            review.everyone_answers(accounts[:1], truth_of)

    monkeypatch.setattr("services.labeling.annotators.sleep", sleep)
    review.annotators.review(review.gallery)
    assert all(pause >= 9 * pull_s > 0 for pause, pull_s in pauses)
