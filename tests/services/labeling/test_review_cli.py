"""`defuse review ...` and `defuse label-studio ...` as typed."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace

import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from label_studio_live import change, digits_gallery, review_run, write_into_cache

from defuse_core.artifacts import Gallery, Verdicts, Votes
from defuse_core.errors import InputError, StoreError
from defuse_core.review.verdicts import decide_verdicts
from defuse_core.store import FolderStore
from defuse_core.training.reference_models import Prelabels, votes_of_models
from services.cli import defuse
from services.labeling.records import read_state, write_state
from tests.sample_components import review_section

TRUTH = (8, 3, 0, 1)


def no_scenario() -> Gallery:
    """Return the gallery of a run without a candidate scenario."""
    full = digits_gallery()
    return replace(full, images=full.images[:0], codes=full.codes[:0], predicted=full.predicted[:0])


@pytest.fixture
def cli(monkeypatch, server, tmp_path):
    monkeypatch.setenv("LABEL_STUDIO_URL", server.address)
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", server.token)

    def call(*words, store=tmp_path):
        done = CliRunner().invoke(defuse, [*words, "--store", str(store)])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done

    return call


def test_push_names_the_address_and_status_the_answers_so_far(cli, make_review, accounts, server):
    review = make_review(answers_per_task=3, stop_early=True)
    name = review.run.name
    pushed = cli("review", "push", name).output
    link, invitation = pushed.splitlines()
    assert link == f"label at {server.address}/projects/{review.state.number}/data?labeling=1"
    signup = httpx.get(invitation.removeprefix("annotators get an account at "), timeout=60, trust_env=False)
    assert signup.status_code == 200 and "password" in signup.text
    for account in accounts[:2]:
        for key, task in review.tasks().items():
            if key < "s001":
                account.answer(task.id, "image", "8")
    unreadable = review.tasks()["s003-i00"].id
    accounts[2].submit(unreadable, [])
    shown = " ".join(cli("review", "status", name).output.split())
    assert "6 of 36 answers are in; 27 are still wanted." in shown
    assert "3 more are not needed" in shown
    assert "annotator-1: 3" in shown and "annotator-2: 3" in shown and "annotator-3: 0" in shown
    assert "Agreement so far: 100.0 %" in shown
    assert "0 3 accepted as 8: 100 % of 3 labelled images are misclassified" in shown
    assert "Not counted: annotator-3 on scenario 3, image 0: no label was chosen" in shown
    assert link.removeprefix("label at ") in shown and invitation.split(" at ")[1] in shown
    found = json.loads(cli("review", "status", name, "--json").stdout)
    first, *_, last = found.pop("scenarios")
    assert found == {
        "run": name,
        "closed": False,
        "given": 6,
        "wanted": 27,
        "annotators": {"annotator-1": 3, "annotator-2": 3, "annotator-3": 0},
        "agreement": 1.0,
        "label_at": link.removeprefix("label at "),
        "invitation": invitation.split(" at ")[1],
        "not_counted": 1,
        "skipped": [review.api.task_url(review.state.number, unreadable)],
        "changes": {},
        "problem": None,
    }
    reason = "accepted as 8: 100 % of 3 labelled images are misclassified"
    assert first | {"reason": first["reason"][: len(reason)]} == {
        "scenario": 0,
        "accepted": True,
        "label": "8",
        "reason": reason,
        "decided": True,
        "final": True,
        "missing": 0,
    }
    assert (last["accepted"], last["label"], last["decided"], last["missing"]) == (False, None, False, 9)


def test_what_annotators_typed_is_shown_as_it_is(cli, make_review, accounts):
    review = make_review()
    cli("review", "push", review.run.name)
    accounts[0].answer(review.tasks()["s001-i00"].id, "image", "[/bold] [red]")
    shown = " ".join(cli("review", "status", review.run.name).output.split())
    assert "'[/bold] [red]' is not one of the classes" in shown


def test_a_run_that_asks_models_is_not_pushed(cli, make_review):
    review = make_review(annotators="reference-models")
    with pytest.raises(InputError, match="nobody would read people's answers"):
        cli("review", "push", review.run.name)


@pytest.mark.parametrize("command", [("review", "status"), ("label-studio", "simulate")])
def test_a_run_that_asks_models_is_not_sent_to_label_studio(cli, make_review, command):
    review = make_review(annotators="reference-models")
    with pytest.raises(
        InputError,
        match=f"{review.run.name} asks .* answer within `defuse run`; to ask people, start another run",
    ):
        cli(*command, review.run.name)


def test_stored_votes_are_shown_without_the_client_of_label_studio(cli, make_review, monkeypatch):
    review = make_review(annotators="reference-models")
    votes = votes_of_models(np.full((3, *review.gallery.predicted.shape, 10), 0.1, np.float32), 0.0)
    review.run.once("review", Votes, lambda: votes)
    review.run.once("review", Verdicts, lambda: decide_verdicts(review_section(), review.gallery, votes))
    for name in [name for name in sys.modules if name.startswith("services.labeling")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "label_studio_sdk", None)
    shown = cli("review", "status", review.run.name).output
    assert "votes of reference models stored" in shown and "Voting is closed" in shown


def test_a_label_from_an_unset_variable_is_refused(cli):
    shown = " ".join(cli("review", "set", "mine", "0", "--label", "", "--reason", "seen").output.split())
    assert "'--label': expected a value, found an empty one; is the variable set?" in shown


def test_status_before_a_push_says_what_to_type(cli, make_review):
    review = make_review()
    with pytest.raises(InputError, match=f"`defuse review push {review.run.name} --store /.*` does"):
        cli("review", "status", review.run.name)


def test_set_records_a_decision_that_status_shows(cli, make_review):
    review = make_review()
    name = review.run.name
    cli("review", "push", name)
    done = cli("review", "set", name, "2", "--label", "8", "--reason", "seen on paper", "--author", "Ada")
    assert done.output == "scenario 2 is a failure: 8; `defuse run` continues with it\n"
    assert json.loads(review.run.store.read("overrides/0001.json"))["author"] == "Ada"
    assert "2 9 accepted as 8 by Ada: seen on paper" in " ".join(cli("review", "status", name).output.split())
    decided = json.loads(cli("review", "status", name, "--json").stdout)["scenarios"][2]
    assert (decided["accepted"], decided["label"], decided["decided"]) == (True, "8", True)
    assert decided["missing"] == 0 and "seen on paper" in decided["reason"]


def test_a_decision_needs_a_reason(cli):
    done = cli("review", "set", "any", "2", "--reject")
    assert done.exit_code == 2 and "Missing option '--reason'" in done.output


@pytest.mark.parametrize("choice", [[], ["--label", "8", "--reject"]])
def test_set_wants_either_a_label_or_a_rejection(cli, make_review, choice):
    done = cli("review", "set", make_review().run.name, "2", *choice, "--reason", "why")
    assert done.exit_code == 2 and "either --label NAME_OR_INDEX or --reject" in done.output


@pytest.mark.parametrize("option", ["--author", "--reason"])
def test_set_refuses_text_that_acts_on_other_peoples_terminals(cli, option):
    done = cli("review", "set", "any", "2", "--reject", "--reason", "why", option, "a\x1b[2J")
    assert done.exit_code == 2 and r"found 'a\x1b[2J'" in done.output


def test_a_run_without_images_says_how_far_it_is(cli, make_review):
    review = make_review()
    review.run.store.delete("gallery.safetensors")
    with pytest.raises(InputError, match="no images to review yet"):
        cli("review", "push", review.run.name)


def test_the_local_server_is_found_without_any_setting(monkeypatch, tmp_path, server):
    monkeypatch.delenv("LABEL_STUDIO_URL", raising=False)
    monkeypatch.setenv("DEFUSE_CACHE", str(tmp_path))
    assert CliRunner().invoke(defuse, ["label-studio", "status"]).output.startswith("not running")
    assert CliRunner().invoke(defuse, ["label-studio", "down"]).output == "it was not running\n"
    write_into_cache(tmp_path)
    shown = CliRunner().invoke(defuse, ["label-studio", "status"]).output
    assert server.address in shown and server.username in shown and server.token not in shown


def answer_all(review, account):
    for task in review.tasks().values():
        account.answer(task.id, "image", str(TRUTH[review.subject(task).scenario]))


def test_after_the_votes_are_stored_status_says_so_and_reopen_takes_later_answers_in(
    cli, make_review, accounts
):
    review = make_review(gallery=digits_gallery(images=1), answers_per_task=2, real_names=True)
    name = review.run.name
    cli("review", "push", name)
    answer_all(review, accounts[0])
    with pytest.raises(InputError, match="is still open"):
        cli("review", "reopen", name)
    answer_all(review, accounts[1])
    review.run.once("review", Votes, lambda: review.annotators.review(review.gallery))
    assert "Voting is closed" in cli("review", "status", name).output
    tasks = review.tasks()
    changed = tasks["s000-i00"].annotations[0].id
    change(accounts[0], changed, "3")
    shown = " ".join(cli("review", "status", name).output.split())
    assert "1 changed since then, not counted" in shown and "Label at" not in shown
    found = json.loads(cli("review", "status", name, "--json").stdout)
    assert (found["closed"], found["given"], found["wanted"]) == (True, 8, 0)
    assert found["changes"] == {"added": 0, "changed": 1, "deleted": 0} and found["label_at"] is None
    (proposed,) = re.findall(f"`defuse (review reopen {name} --store .*?)`", shown)
    assert "is open again" in CliRunner().invoke(defuse, proposed.split()).output
    assert review.run.load(Votes) is None
    votes = review.annotators.review(review.gallery)
    here = (votes.scenario == 0) & (votes.image == 0)
    assert sorted(votes.answer[here].tolist()) == [3, 8]


def close_vote(review, accounts):
    """Push a review of one image a scenario, let the accounts answer it, and store the votes and the verdicts."""
    review.annotators.push(review.gallery)
    for account in accounts:
        answer_all(review, account)
    votes = review.run.once("review", Votes, lambda: review.annotators.review(review.gallery))
    review.run.once("review", Verdicts, lambda: decide_verdicts(review_section(), review.gallery, votes))


@pytest.mark.parametrize("loss", ["the project", "an answer"])
def test_votes_are_not_reopened_where_label_studio_has_lost_their_answers(cli, make_review, accounts, loss):
    review = make_review(gallery=digits_gallery(images=1), answers_per_task=1)
    close_vote(review, accounts[:1])
    name, number = review.run.name, review.state.number
    if loss == "the project":
        review.api._sdk.projects.delete(id=number)
        gone = rf"--discard gives up: project {number} was deleted from .*the stored votes of run {name} hold"
        with pytest.raises(
            InputError, match=f"`defuse review reopen {name} --discard --store .*` deletes the votes"
        ):
            cli("review", "push", name, "--repair")
        assert review.state.number == number
    else:
        assert f"only after `defuse review reopen {name} --store " in cli("review", "push", name).output
        review.api.delete_annotation(review.tasks()["s000-i00"].annotations[0].id)
        gone = "1 answer of the votes were deleted in Label Studio"
        assert f"`defuse review reopen {name} --discard --store " in " ".join(
            cli("review", "status", name).output.split()
        )
    with pytest.raises(InputError, match=gone):
        cli("review", "reopen", name)
    assert review.run.load(Votes) is not None and review.run.load(Verdicts) is not None
    assert "is open again" in cli("review", "reopen", name, "--discard").output
    assert review.run.load(Votes) is None
    cli("review", "push", name, "--repair")
    assert (review.state.number != number) == (loss == "the project")


@pytest.mark.parametrize("asked", [3, 4])
def test_a_closed_review_changes_no_queue(cli, make_review, accounts, asked):
    review = make_review(gallery=digits_gallery(images=1), answers_per_task=3, stop_early=True)
    close_vote(review, accounts[:2])
    number = review.state.number
    review.api.update_project(number, maximum_annotations=asked)  # as another run of this project may ask
    task = review.tasks()["s000-i00"]
    change(accounts[0], task.annotations[0].id, "3")  # now it is a tie

    def queue():
        tasks = {key: (task.overlap, task.labeled) for key, task in review.tasks().items()}
        return tasks, review.api.project(number).settings.maximum_annotations

    before = queue()
    assert "1 changed since then" in cli("review", "status", review.run.name).output
    assert queue() == before


def test_a_closed_review_is_shown_where_the_store_can_only_be_read(cli, make_review, accounts, monkeypatch):
    review = make_review(gallery=digits_gallery(images=1), answers_per_task=2)
    close_vote(review, accounts[:2])
    answer_all(review, accounts[2])

    def refuse(*_):
        raise StoreError("the store can only be read")

    monkeypatch.setattr(FolderStore, "write", refuse)
    shown = " ".join(cli("review", "status", review.run.name).output.split())
    assert "8 votes of people stored" in shown and "0 accepted as 8" in shown
    assert "It is unknown whether answers have come since then: the store can only be read" in shown


@pytest.mark.parametrize("consensus", ["majority", "crowdlab"])
def test_after_a_redo_status_shows_the_verdicts_of_the_stored_votes_without_a_server(
    tmp_path, monkeypatch, consensus
):
    monkeypatch.delenv("LABEL_STUDIO_URL", raising=False)
    monkeypatch.setenv("DEFUSE_CACHE", str(tmp_path / "cache"))
    gallery = digits_gallery(images=1)
    run = review_run(tmp_path, gallery, consensus=consensus)
    write_state(run.store, replace(read_state(run.store, gallery), project=1))
    answers = np.array([[8, 8, 3, 3], *np.repeat([[8], [0], [1]], 4, axis=1)])  # of four people to each image
    scenario, annotator = (axis.ravel() for axis in np.indices(answers.shape))
    people = ("ana", "ben", "cem", "dee")
    when, image = np.zeros(answers.size), np.zeros(answers.size, np.int64)
    votes = Votes(scenario, image, annotator, answers.ravel(), when, people, "people", {})
    run.once("review", Votes, lambda: votes)
    run.once("review", Verdicts, lambda: decide_verdicts(review_section(), gallery, votes))
    models = np.full((3, 4, 1, 10), 0.01, np.float32)
    for number, label in enumerate(TRUTH):
        models[:, number, 0, label] = 0.91
    run.once("review", Prelabels, lambda: Prelabels(models))
    words = ["--store", str(tmp_path)]
    decision = ["2", "--label", "8", "--reason", "seen", "--author", "Ada", "--redo"]
    assert CliRunner().invoke(defuse, ["review", "set", run.name, *decision, *words]).exit_code == 0
    done = CliRunner().invoke(defuse, ["review", "status", run.name, "--json", *words])
    found = json.loads(done.stdout)
    assert (found["closed"], found["given"], found["annotators"]) == (True, 16, dict.fromkeys(people, 4))
    assert "no Label Studio" in found["problem"] and found["changes"] == {}
    tied = "8" if consensus == "crowdlab" else None
    assert [scenario["label"] for scenario in found["scenarios"]] == [tied, "8", "8", None]


def test_status_shows_skips_with_the_task_and_what_resolves_them(cli, make_review, accounts):
    review = make_review(answers_per_task=1)
    name = review.run.name
    cli("review", "push", name)
    task = review.tasks()["s001-i02"].id
    accounts[0].submit(task, [], was_cancelled=True)
    shown = " ".join(cli("review", "status", name).output.split())
    assert (
        f"Skipped: annotator-1 on scenario 1, image 2, {review.api.task_url(review.state.number, task)}"
        in shown
    )
    assert re.search(f"`defuse review push {name} --repair --store /[^ ]+` deletes the skips", shown)


def test_the_address_for_annotators_can_be_another_than_that_of_the_api(cli, make_review, monkeypatch):
    monkeypatch.setenv("LABEL_STUDIO_HOST", "https://labels.example.org/")
    review = make_review()
    link, invitation = cli("review", "push", review.run.name).output.splitlines()
    assert link.startswith("label at https://labels.example.org/projects/")
    assert invitation.startswith("annotators get an account at https://labels.example.org/user/signup/")


def test_a_run_without_a_candidate_scenario_has_nothing_to_label_and_gets_no_project(cli, make_review):
    review = make_review(gallery=no_scenario())
    name, before = review.run.name, review.run.store.list()
    with pytest.raises(
        InputError, match=f"^run {name} has no candidate scenario, so there is nothing to label$"
    ):
        cli("review", "push", name)
    votes = review.annotators.review(review.gallery)
    assert (len(votes.answer), votes.annotators, votes.answered_by) == (0, (), "people")
    assert review.run.store.list() == before
    review.run.once("review", Votes, lambda: votes)
    shown = json.loads(cli("review", "status", name, "--json").stdout)
    assert (shown["closed"], shown["scenarios"], shown["problem"]) == (True, [], None)
