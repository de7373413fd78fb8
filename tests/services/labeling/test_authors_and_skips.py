"""Annotators whose accounts are deleted, and tasks that annotators skip."""

from __future__ import annotations

import secrets
from collections import Counter

import httpx
import pytest
from digits_review import answers_of, truth_of
from label_studio_live import digits_gallery, invitation_to, sign_up

from defuse_core.errors import LabelsPending

ONE_SCENARIO = digits_gallery(labels=(8,))


def delete_account(review, server, account):
    user = account.http.get("/api/current-user/whoami").json()["id"]
    token = {"Authorization": f"Token {server.token}"}
    httpx.delete(f"{server.address}/api/users/{user}", headers=token, trust_env=False).raise_for_status()


def temporary_account(server, name):
    email = f"{name}-{secrets.token_hex(4)}@example.org"
    return sign_up(server.address, invitation_to(server), email)


def test_answers_of_a_deleted_account_stay_those_of_one_annotator(make_review, server, accounts):
    review = make_review(gallery=ONE_SCENARIO, answers_per_task=2)
    review.annotators.push(review.gallery)
    leaving = temporary_account(server, "leaving")
    tasks = review.tasks()
    for task in tasks.values():
        leaving.answer(task.id, "image", truth_of(review.subject(task)))
    second = leaving.answer(tasks["s000-i00"].id, "image", "3")  # replaces the first answer
    before = review.annotators.status(review.gallery)
    delete_account(review, server, leaving)
    accounts[0].answer(tasks["s000-i00"].id, "image", "8")
    after = review.annotators.status(review.gallery)
    assert second not in [discarded.annotation for discarded in after.pulled.discarded]
    assert before.per_annotator() == {"annotator-1": 3}
    assert after.per_annotator() == {"annotator-1": 3, "annotator-2": 1}
    assert answers_of(after.votes, 0, 0) == {"annotator-1": 3, "annotator-2": 8}


def test_a_deleted_account_that_was_never_seen_counts_as_one_annotator_and_drives_out_nobody(
    make_review, server, accounts
):
    review = make_review(answers_per_task=2)
    review.annotators.push(review.gallery)
    leaving = temporary_account(server, "unseen")
    task = review.tasks()["s000-i00"].id
    for choice in "333":
        leaving.answer(task, "image", choice)
    delete_account(review, server, leaving)
    accounts[0].answer(task, "image", "8")
    status = review.annotators.status(review.gallery)
    assert answers_of(status.votes, 0, 0) == {"annotator-1": 3, "annotator-2": 8}
    assert {discarded.reason for discarded in status.pulled.discarded} == {
        "may be of the same person as a later answer: the account was deleted"
    }


def test_votes_name_the_annotators_as_the_other_commands_do_that_ran_during_a_poll(
    make_review, accounts, monkeypatch
):
    review = make_review(gallery=digits_gallery(labels=(8,), images=4), answers_per_task=1)
    review.annotators.push(review.gallery)
    first, second, *others = review.tasks().values()
    accounts[0].answer(first.id, "image", "8")

    def another_command_sees_a_skip_first(_):
        accounts[1].submit(second.id, [], was_cancelled=True)
        review.through(review.api.address).status(review.gallery)
        accounts[2].answer(second.id, "image", "8")
        for task in others:
            accounts[1].answer(task.id, "image", "8")

    monkeypatch.setattr("services.labeling.annotators.sleep", another_command_sees_a_skip_first)
    review.annotators.wait = True
    votes = review.annotators.review(review.gallery)
    counts = dict(Counter(votes.annotators[annotator] for annotator in votes.annotator))
    assert counts == {"annotator-1": 1, "annotator-2": 2, "annotator-3": 1}
    assert review.annotators.status(review.gallery).per_annotator() == counts


def test_a_skip_is_listed_while_its_task_lacks_answers_and_a_repair_hands_the_task_out_again(
    make_review, accounts
):
    review = make_review(gallery=ONE_SCENARIO, answers_per_task=1)
    number = review.annotators.push(review.gallery).number
    for key, task in review.tasks().items():
        if key != "s000-i02":
            accounts[0].answer(task.id, "image", truth_of(review.subject(task)))
    last = review.tasks()["s000-i02"].id
    accounts[0].submit(last, [], was_cancelled=True)
    status = review.annotators.status(review.gallery)
    assert [(skip.task, status.name_of(skip)) for skip in status.blocking_skips()] == [(last, "annotator-1")]
    assert accounts[0].next_task(number) is None
    with pytest.raises(LabelsPending, match="1 skipped or not readable, see `defuse review status"):
        review.annotators.review(review.gallery)
    review.annotators.push(review.gallery, repair=True)
    assert accounts[0].next_task(number)["id"] == last
    accounts[0].answer(last, "image", "8")
    assert review.annotators.status(review.gallery).outstanding == 0


def test_an_answer_that_cannot_be_read_does_not_keep_its_task_from_the_only_annotator_for_ever(
    make_review, accounts
):
    review = make_review(gallery=ONE_SCENARIO, answers_per_task=1)
    number = review.annotators.push(review.gallery).number
    for key, task in review.tasks().items():
        accounts[0].answer(task.id, "image", "seven" if key == "s000-i02" else truth_of(review.subject(task)))
    status = review.annotators.status(review.gallery)
    assert accounts[0].next_task(number) is None
    (blocking,) = status.blocking_skips()
    assert blocking.reason == "the choice 'seven' is not one of the classes"
    review.annotators.push(review.gallery, repair=True)
    assert accounts[0].next_task(number)["meta"]["sample_key"] == "s000-i02"
    accounts[0].answer(blocking.task, "image", "8")
    assert review.annotators.status(review.gallery).outstanding == 0


def test_answers_that_vanish_are_said_once_until_a_repair_accepts_that(make_review, accounts, caplog):
    review = make_review(gallery=ONE_SCENARIO)
    review.annotators.push(review.gallery)
    review.everyone_answers(accounts[:2], truth_of)
    review.annotators.status(review.gallery)
    for task in list(review.tasks().values())[:2]:
        review.api.delete_annotation(task.annotations[0].id)
    for _ in range(2):
        review.annotators.status(review.gallery)
    (warning,) = (text for text in caplog.messages if "has lost" in text)
    assert "has lost 2 answers (annotator-" in warning and "--repair" in warning
    review.annotators.push(review.gallery, repair=True)
    status = review.through(review.api.address).status(review.gallery)
    assert status.given == 4 and caplog.text.count("has lost") == 1


def test_a_skip_of_a_task_that_others_answered_blocks_nothing(make_review, accounts):
    review = make_review(answers_per_task=1)
    review.annotators.push(review.gallery)
    task = review.tasks()["s000-i00"].id
    accounts[0].submit(task, [], was_cancelled=True)
    accounts[1].answer(task, "image", "8")
    status = review.annotators.status(review.gallery)
    assert len(status.pulled.skips) == 1 and status.blocking_skips() == []


def test_control_characters_in_an_annotators_name_do_not_reach_the_terminal(make_review, server):
    review = make_review(real_names=True)
    review.annotators.push(review.gallery)
    account = temporary_account(server, "escape")
    user = account.http.get("/api/current-user/whoami").json()["id"]
    account.http.patch(f"/api/users/{user}/", json={"first_name": "Ana\x1b[2J"}).raise_for_status()
    account.answer(review.tasks()["s000-i00"].id, "image", "8")
    status = review.annotators.status(review.gallery)
    assert list(status.per_annotator()) == ["Ana\\x1b[2J"]
