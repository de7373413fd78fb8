"""A human decision above the vote."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shlex
from functools import partial

import numpy as np
import pytest
from click.testing import CliRunner
from label_studio_live import digits_gallery, review_run

from defuse_core.artifacts import Corrections, Override, Verdicts, Votes
from defuse_core.errors import InputError, RunBusyError
from defuse_core.review.overrides import (
    class_index,
    override_verdict,
    read_overrides,
    reopen_vote,
)
from defuse_core.review.verdicts import decide_verdicts
from defuse_core.runs import FROM_VERDICTS
from services.cli import defuse
from services.cli.review import set_
from tests.sample_components import review_section


@pytest.fixture
def run(tmp_path):
    return review_run(tmp_path, digits_gallery())


def judged_verdicts() -> Verdicts:
    nobody = np.zeros(0, np.int64)
    votes = Votes(nobody, nobody, nobody, nobody, np.zeros(0), (), "people", {})
    return decide_verdicts(review_section(), digits_gallery(), votes)


@pytest.fixture
def judged(run):
    nobody = np.zeros(0, np.int64)
    votes = Votes(nobody, nobody, nobody, nobody, np.zeros(0), (), "people", {})
    run.once("review", Votes, lambda: votes)
    run.once("review", Verdicts, judged_verdicts)
    codes = np.zeros((0, 1, 2), np.float32)
    run.once("correct", Corrections, lambda: Corrections(nobody, nobody, codes, codes))
    run.store.write("trials/defuse/0.safetensors", b"x")
    for key in ("report.json", "report.html"):
        run.store.write(key, b"{}")
    return run


def test_a_decision_is_recorded_with_author_reason_and_time(run):
    assert (
        override_verdict(run, 2, "8", author="Ada", reason="looks like\nan eight")
        == "scenario 2 is a failure: 8"
    )
    assert override_verdict(run, 1, None, author="Bob", reason="blurred") == "scenario 1 is rejected"
    first, second = read_overrides(run.store)
    assert first == Override(2, 8, "Ada", "looks like an eight", first.when)
    assert second.label is None and first.when.endswith("Z")


def test_the_decision_stands_above_the_vote(run):
    override_verdict(run, 2, "8", author="Ada", reason="checked")
    nobody = np.zeros(0, np.int64)
    votes = Votes(nobody, nobody, nobody, nobody, np.zeros(0), (), "people", {})
    verdicts = decide_verdicts(review_section(), digits_gallery(), votes, read_overrides(run.store))
    assert verdicts.labels.tolist() == [-1, -1, 8, -1]
    assert verdicts.reasons[2] == "accepted as 8 by Ada: checked"


@pytest.mark.parametrize(
    "scenario, label, reason, words",
    [
        (9, "8", "why", "scenarios 0 to 3"),
        (4, "8", "why", "scenarios 0 to 3"),
        (-1, "8", "why", "scenarios 0 to 3"),
        (0, "eleven", "why", "expected a class or its index"),
        (0, "10", "why", "expected a class or its index"),
        (0, "²", "why", "expected a class or its index"),
        (0, "8", "  ", "--reason"),
    ],
)
def test_what_cannot_be_decided_is_said(run, scenario, label, reason, words):
    with pytest.raises(InputError, match=words):
        override_verdict(run, scenario, label, author="Ada", reason=reason)
    assert read_overrides(run.store) == ()


def test_after_the_verdicts_a_decision_is_refused_and_changes_nothing(judged):
    before = {key: judged.store.read(key) for key in judged.store.list()}
    with pytest.raises(InputError, match="--redo"):
        override_verdict(judged, 2, "8", author="Ada", reason="checked")
    assert {key: judged.store.read(key) for key in judged.store.list()} == before


def test_a_decision_that_a_driver_took_in_before_it_was_withdrawn_is_kept(run, monkeypatch):
    """The driver judges without it, reads it, and judges again with it, while its author withdraws it."""
    deleted = run.store.delete

    def judge_again(key: str) -> None:
        verdicts = dataclasses.replace(judged_verdicts(), overrides=read_overrides(run.store))
        deleted(key)
        deleted("verdicts.safetensors")
        run.once("review", Verdicts, lambda: verdicts)

    stored = run.store.create

    def judge_first(key: str, data: bytes) -> bool:
        created = stored(key, data)
        run.once("review", Verdicts, judged_verdicts)
        return created

    monkeypatch.setattr(run.store, "create", judge_first)
    monkeypatch.setattr(run.store, "delete", judge_again)
    override_verdict(run, 2, "8", author="Ada", reason="checked")
    assert read_overrides(run.store) == run.load(Verdicts).overrides != ()


def test_a_decision_that_is_withdrawn_while_decisions_are_read_is_none(run, monkeypatch):
    override_verdict(run, 2, "8", author="Ada", reason="checked")
    (kept,) = read_overrides(run.store)
    keys = run.store.list("overrides/")
    monkeypatch.setattr(run.store, "list", lambda _: [*keys, "overrides/9999.json"])
    assert read_overrides(run.store) == (kept,)


def test_redo_forgets_the_verdicts_and_what_follows_and_keeps_the_votes(judged):
    override_verdict(judged, 2, "8", author="Ada", reason="checked", redo=True)
    left = judged.store.list()
    assert not [key for key in left if key.startswith(("trials", "report", *FROM_VERDICTS))]
    assert "votes.safetensors" in left and "gallery.safetensors" in left
    assert set(json.loads(judged.store.read("manifest.json"))["artefacts"]) == {"votes"}
    assert read_overrides(judged.store)[0].label == 8


def test_a_decision_that_is_recorded_again_after_files_were_deleted_is_the_newest(run):
    for label in ("8", "3", "1"):
        override_verdict(run, 2, label, author="Ada", reason="checked")
    for number in (1, 2):
        run.store.delete(f"overrides/{number:04d}.json")
    override_verdict(run, 2, "0", author="Bob", reason="checked again")
    assert [decision.label for decision in read_overrides(run.store)] == [1, 0]


def test_two_decisions_at_once_both_count(run, monkeypatch):
    override_verdict(run, 2, "8", author="Ada", reason="checked")
    monkeypatch.setattr(run.store, "list", lambda prefix="": [])  # as it was before the other's
    override_verdict(run, 1, None, author="Bob", reason="blurred")
    monkeypatch.undo()
    assert [decision.author for decision in read_overrides(run.store)] == ["Ada", "Bob"]


def test_a_decision_that_the_verdicts_were_made_without_is_told(judged, monkeypatch):
    found = itertools.chain(
        [None], itertools.repeat(judged.load(Verdicts))
    )  # the driver judges after one look
    load = judged.load
    monkeypatch.setattr(judged, "load", lambda kind: next(found) if kind is Verdicts else load(kind))
    with pytest.raises(InputError, match="has its verdicts already"):
        override_verdict(judged, 2, "8", author="Ada", reason="checked")
    monkeypatch.undo()
    assert not read_overrides(judged.store)  # else it would be taken in one day, and nobody would expect that


def test_a_redo_that_ends_early_records_no_decision_beside_the_verdicts_made_without_it(judged, monkeypatch):
    deleted = judged.store.delete

    def delete(key):
        deleted(key)
        if key.startswith("corrections"):
            raise KeyboardInterrupt

    monkeypatch.setattr(judged.store, "delete", delete)
    with pytest.raises(KeyboardInterrupt):
        override_verdict(judged, 2, "8", author="Ada", reason="checked", redo=True)
    monkeypatch.undo()
    assert judged.load(Verdicts) is not None and not read_overrides(judged.store)
    override_verdict(judged, 2, "8", author="Ada", reason="checked", redo=True)
    assert judged.load(Verdicts) is None and read_overrides(judged.store)[0].label == 8


def test_redo_waits_for_no_driver_that_is_writing(judged):
    with judged.store.lock(), pytest.raises(RunBusyError):
        override_verdict(judged, 2, "8", author="Ada", reason="checked", redo=True)
    assert judged.load(Verdicts) is not None


@pytest.mark.parametrize(
    "delete",
    [
        reopen_vote,
        partial(override_verdict, scenario=2, label="8", author="Ada", reason="checked", redo=True),
    ],
    ids=["reopen", "redo"],
)
def test_a_check_that_fails_while_the_run_is_held_keeps_all_that_would_be_deleted(judged, delete):
    before = {key: judged.store.read(key) for key in judged.store.list()}

    def check():
        assert judged.store.is_locked()
        raise InputError("in production")

    with pytest.raises(InputError, match="in production"):
        delete(judged, check=check)
    assert {key: judged.store.read(key) for key in judged.store.list()} == before


def test_a_run_without_scenarios_says_how_far_it_is(run):
    run.store.delete("gallery.safetensors")
    with pytest.raises(InputError, match="no scenarios yet"):
        override_verdict(run, 0, "8", author="Ada", reason="why")


def test_a_class_is_found_by_its_name_before_its_index():
    assert [class_index(label, ("1", "0", "cat")) for label in ("1", "0", "cat", "2")] == [0, 1, 2, 2]


def test_a_reopened_vote_forgets_the_votes_and_what_follows_and_keeps_the_images(judged):
    reopen_vote(judged)
    left = judged.store.list()
    assert not [key for key in left if key.startswith(("trials", "report", "votes", *FROM_VERDICTS))]
    assert "gallery.safetensors" in left and judged.load(Votes) is None
    assert not judged.manifest()["artefacts"]
    with pytest.raises(InputError, match="is still open"):
        reopen_vote(judged)


def test_a_vote_whose_file_is_gone_is_reopened_where_verdicts_followed_from_it(judged):
    judged.store.delete("votes.safetensors")
    reopen_vote(judged)
    assert judged.load(Verdicts) is None


def test_a_vote_is_not_reopened_beside_a_driver_nor_where_models_gave_it(judged, tmp_path):
    with judged.store.lock(), pytest.raises(RunBusyError):
        reopen_vote(judged)
    assert judged.load(Votes) is not None
    asks_models = review_run(tmp_path, digits_gallery(), annotators="reference-models")
    asks_models.store.write("votes.safetensors", judged.store.read("votes.safetensors"))
    with pytest.raises(InputError, match="asks reference models"):
        reopen_vote(asks_models)
    assert asks_models.store.exists("votes.safetensors")


@pytest.mark.parametrize("line", re.findall("defuse (review set .*)", str(set_.help)))
def test_each_example_of_the_help_works_on_a_run_that_has_its_verdicts(line, judged, tmp_path):
    line = re.sub(r"digits \d", f"{judged.name} 2", line)
    done = CliRunner().invoke(defuse, [*shlex.split(line), "--store", str(tmp_path)])
    assert (done.exit_code, done.exception) == (0, None)
    assert "`defuse run` continues with it" in done.output
