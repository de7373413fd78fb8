"""Waiting for people: progress is logged, and an edit is noticed up to the end."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from label_studio_live import digits_gallery
from proxy import Reply

from defuse_core.errors import (
    DamagedError,
    InputError,
    LabelsPending,
    ServiceError,
    StoreError,
    StoreSettingsError,
)
from defuse_core.review.overrides import override_verdict
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from services.labeling.project import ReviewProject
from services.labeling.records import Task


def test_every_answer_that_comes_while_waiting_is_logged(make_review, accounts, monkeypatch, caplog):
    review = make_review(gallery=digits_gallery(labels=(8,)), answers_per_task=1)
    review.annotators.push(review.gallery)
    review.annotators.wait, left = True, list(review.tasks().values())
    monkeypatch.setattr("services.labeling.annotators.PAUSE_PER_PULL", 0)
    monkeypatch.setattr(
        "services.labeling.annotators.sleep", lambda _: accounts[0].answer(left.pop().id, "image", "8")
    )
    caplog.set_level("INFO", "defuse")
    assert len(review.annotators.review(review.gallery).answer) == 3
    told = [line.partition(" are still")[0] for line in caplog.messages if "waiting for people" in line]
    assert told == [f"waiting for people: {n} answers are in and {3 - n}" for n in range(3)]


def test_a_review_that_too_few_people_answer_ends_with_their_answers(make_review, accounts):
    review = make_review(gallery=digits_gallery(labels=(8,)), answers_per_task=3)
    review.annotators.push(review.gallery)
    review.everyone_answers(accounts[:2], lambda _: "8")
    with pytest.raises(
        LabelsPending, match=r"nobody can still answer; .*--set review\.answers_per_task=2` ends"
    ):
        review.annotators.review(review.gallery)
    fewer = review.run.spec.with_fields("review", answers_per_task=2)
    review.run = Run.start(FolderStore(review.run.store.folder.parent), review.run.name, fewer)
    votes = review.through(review.api.address).review(review.gallery)
    assert len(votes.answer) == 6 and set(votes.answer.tolist()) == {8}


def test_a_page_in_the_place_of_the_server_and_a_store_that_is_away_do_not_end_a_wait(
    make_review, proxy, monkeypatch, accounts, caplog
):
    review = make_review(gallery=digits_gallery(labels=(8,), images=1), answers_per_task=1)
    annotators = review.through(proxy.address)
    annotators.push(review.gallery)
    annotators.wait, task, read = True, review.tasks()["s000-i00"].id, annotators.run.store.read
    turns = itertools.count()

    def fail(key: str) -> bytes:
        raise StoreError("no answer from the bucket")

    def sleep(_: float) -> None:
        turn = next(turns)
        if turn == 0:
            proxy.answer(Reply(404, "404 page not found", "text/plain"))
        elif turn == 1:
            proxy.rule = lambda method, path: None
            monkeypatch.setattr(annotators.run.store, "read", fail)
        else:
            monkeypatch.setattr(annotators.run.store, "read", read)
            accounts[0].answer(task, "image", "8")

    monkeypatch.setattr("services.labeling.annotators.sleep", sleep)
    caplog.set_level("INFO", "defuse")
    assert annotators.review(review.gallery).answer.tolist() == [8]
    told = [
        text for text in caplog.messages if "no answer" in text or "web page" in text or "goes on" in text
    ]
    assert "a web page (404)" in told[0]
    assert told[1:] == ["review: no answer from the bucket", "review: the wait goes on"]


@pytest.mark.parametrize(
    ("failure", "outage_s"), [(DamagedError, 9), (StoreSettingsError, 9), (StoreError, -1)]
)
def test_a_store_that_waiting_does_not_mend_ends_a_wait(make_review, monkeypatch, failure, outage_s):
    def pull(*_: object) -> None:
        raise failure("look at it")

    review = make_review(gallery=digits_gallery(labels=(8,), images=1))
    review.annotators.push(review.gallery)
    status = review.annotators.status(review.gallery)
    monkeypatch.setattr(review.annotators, "_pull", pull)
    monkeypatch.setattr("services.labeling.annotators.sleep", lambda _: None)
    monkeypatch.setattr("services.labeling.annotators.STORE_OUTAGE_S", outage_s)
    with pytest.raises(failure, match="look at it"):
        review.annotators._poll(review.gallery, status)


def test_an_outage_of_label_studio_is_no_part_of_the_outage_of_the_store(make_review, monkeypatch):
    review, failures, now = make_review(), [StoreError, ServiceError, StoreError], [1.0]
    review.annotators.push(review.gallery)
    status = review.annotators.status(review.gallery)

    def pull(*_: object):
        if failures:
            raise failures.pop()("no answer")
        return status

    def sleep(_: float) -> None:
        now[0] += 4000

    monkeypatch.setattr(review.annotators, "_pull", pull)
    monkeypatch.setattr("services.labeling.annotators.sleep", sleep)
    monkeypatch.setattr("services.labeling.annotators.monotonic", lambda: now[0])
    unanswered = SimpleNamespace(state=status.state, given=-1)
    assert review.annotators._poll(review.gallery, unanswered) is status
    assert not failures


def test_an_outage_after_the_last_answer_ends_no_wait(make_review, accounts, monkeypatch, caplog):
    review = make_review(gallery=digits_gallery(labels=(8,), images=1), answers_per_task=1)
    review.annotators.push(review.gallery)
    review.annotators.wait, task = True, review.tasks()["s000-i00"].id
    pulls, pull = itertools.count(1), ReviewProject.pull

    def fail_after_the_last_answer(project: ReviewProject) -> Iterator[Task]:
        if next(pulls) == 3:
            raise ServiceError("no answer")
        return pull(project)

    monkeypatch.setattr(ReviewProject, "pull", fail_after_the_last_answer)
    monkeypatch.setattr(
        "services.labeling.annotators.sleep", lambda _: accounts[0].answer(task, "image", "8")
    )
    assert review.annotators.review(review.gallery).answer.tolist() == [8]
    assert "review: no answer" in caplog.messages


def test_an_edit_during_the_last_pull_ends_the_review(make_review, monkeypatch):
    review = make_review()
    number = review.annotators.push(review.gallery).number
    for scenario in range(4):
        override_verdict(review.run, scenario, None, author="Ada", reason="not a digit")
    pushed = review.api.project(number).settings.label_config

    def edit(*_: object) -> None:
        review.api.update_project(number, label_config=pushed.replace('value="7"', 'value="7" alias="3"'))

    monkeypatch.setattr("services.labeling.annotators.update_queue", edit)
    with pytest.raises(InputError, match="labelling interface was edited"):
        review.annotators.review(review.gallery)
