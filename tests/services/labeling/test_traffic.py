"""Inputs from traffic in a review of their own: `defuse review push RUN --from-traffic`."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from label_studio_live import digits_gallery, review_run

from defuse_core.artifacts import F32, NO_SCENARIO, Gallery, Verdicts, Votes
from defuse_core.errors import InputError, RunFileError
from defuse_core.export.finished import components_digest
from defuse_core.review.overrides import reopen_vote
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from defuse_core.training.reference_models import votes_of_models
from services.cli import defuse
from services.labeling.client import LabelStudioClient
from services.labeling.records import read_state
from services.serving.traffic import (
    Reservoir,
    SampledInput,
    open_traffic_review,
    set_in_traffic_review,
    traffic_reviews,
)
from tests.ports import free_port

COMPONENTS = components_digest(digits_gallery())


@pytest.fixture
def cli(monkeypatch, server, tmp_path, no_project_stays):
    monkeypatch.setenv("LABEL_STUDIO_URL", server.address)
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", server.token)

    def call(*words: str) -> Result:
        done = CliRunner().invoke(defuse, ["review", *words, "--store", str(tmp_path)])
        if isinstance(done.exception, Exception):
            raise done.exception
        return done

    return call


@pytest.fixture
def served(tmp_path: Path) -> Run:
    """A run with scenarios 0 to 3; four inputs were in its scenario 2, two in its scenario 3."""
    run = review_run(tmp_path, digits_gallery(), answers_per_task=1)
    meet(run, tmp_path, 2, 4)
    meet(run, tmp_path, 3, 2)
    return run


def meet(
    run: Run, folder: Path, scenario: int, count: int, first: int = 0, failure: float | None = None
) -> None:
    reservoir = Reservoir(FolderStore(folder), 10)
    reservoir._kept[f"{run.name}/{COMPONENTS[:16]}/{scenario:03d}"] = taken(first)
    images = digits_gallery(images=10).images[scenario]
    for image in images[first : first + count]:
        reservoir.offer(run.name, sampled_input(image, scenario, failure))
    reservoir._thread.shutdown()


def sampled_input(
    image: F32, scenario: int, failure: float | None = None, components: str = COMPONENTS
) -> SampledInput:
    """An input that the run of `digits_gallery()`, or one with other components, received now."""
    classes = digits_gallery().classes
    return SampledInput(image, scenario, 6, "1", time.time(), classes, components, failure)


def taken(slots: int) -> list[tuple[float, int]]:
    """The state of a reservoir whose first slots are in use."""
    return [(0.0, slot) for slot in range(slots)]


def test_inputs_are_pushed_answered_and_concluded_apart_from_the_run(
    cli, served, accounts, server, tmp_path, monkeypatch
):
    name = f"{served.name}/traffic-1"
    assert (
        f"`defuse review status {name} --store {tmp_path}` shows the answers"
        in cli("push", served.name, "--from-traffic").output
    )
    review = Run.open(FolderStore(tmp_path), name)
    gallery = review.load(Gallery)
    assert gallery is not None and gallery.numbers == (2,) and gallery.predicted.tolist() == [[6, 6, 6]]
    api = LabelStudioClient(server.address, server.token)
    tasks = list(api.tasks(read_state(review.store, gallery).number))
    assert [task.key for task in tasks] == ["s000-i00", "s000-i01", "s000-i02"]
    assert "2 3 unknown open" in " ".join(cli("status", name).output.split())
    for task in tasks:
        accounts[0].answer(task.id, "image", "0")
    concluded = cli("status", name, "--json")
    assert f"all answers are in, and stored in {review.store.address}" in concluded.stderr
    found = json.loads(concluded.stdout)
    assert (found["closed"], found["given"], found["label_at"]) == (True, 3, None)
    scenario = found["scenarios"][0]
    assert (scenario["accepted"], scenario["label"]) == (None, None)
    assert scenario["reason"] == "100 % of 3 labelled images are misclassified"
    votes, verdicts = review.load(Votes), review.load(Verdicts)
    assert votes is not None and votes.answered_by == "people" and votes.answer.tolist() == [0, 0, 0]
    assert verdicts is not None and verdicts.labels.tolist() == [0]
    assert served.load(Votes) is None and not served.store.exists("labeling.json")
    assert "Voting is closed" in (closed := cli("status", name).output) and "unknown whether" not in closed
    review.store.delete("verdicts.safetensors")  # as where the command was killed between both
    monkeypatch.setenv("LABEL_STUDIO_URL", f"http://127.0.0.1:{free_port()}")
    shown = " ".join(cli("status", name).output.split())
    assert "3 votes of people stored. annotator-1: 3" in shown
    assert "2 unknown 100 % of 3 labelled images are misclassified" in shown
    assert "It is unknown whether answers have come since then: Label Studio at http://127.0.0.1" in shown
    assert review.load(Verdicts) is not None


def test_stored_votes_are_concluded_without_the_client_of_label_studio(served, tmp_path, monkeypatch):
    review = open_traffic_review(served, ())
    review.once("review", Votes, lambda: votes_of_models(np.full((1, 1, 3, 10), 0.1, np.float32), 0.0))
    for name in ("annotators", "client"):
        monkeypatch.delitem(sys.modules, f"services.labeling.{name}")
    monkeypatch.setitem(sys.modules, "label_studio_sdk", None)
    done = CliRunner().invoke(defuse, ["review", "status", review.name, "--store", str(tmp_path)])
    assert done.exit_code == 0 and review.load(Verdicts) is not None
    assert "Label Studio's client needs label-studio-sdk" in " ".join(done.output.split())


def test_an_input_that_was_swapped_in_label_studio_is_not_concluded(cli, served, accounts, server, tmp_path):
    cli("push", served.name, "--from-traffic")
    review = Run.open(FolderStore(tmp_path), f"{served.name}/traffic-1")
    gallery = review.load(Gallery)
    assert gallery is not None
    api = LabelStudioClient(server.address, server.token)
    tasks = list(api.tasks(read_state(review.store, gallery).number, with_data=True))
    for task in tasks:
        accounts[0].answer(task.id, "image", "0")
    swapped = dict(tasks[0].data or {}) | {"image": (tasks[1].data or {})["image"] + "AAAA"}
    accounts[0].http.patch(f"/api/tasks/{tasks[0].id}/", json={"data": swapped}).raise_for_status()
    with pytest.raises(InputError, match="was edited in Label Studio"):
        cli("status", review.name)
    assert review.load(Votes) is None


def test_status_shows_how_many_inputs_the_server_expects_to_be_wrong(cli, tmp_path):
    run = review_run(tmp_path, digits_gallery(), answers_per_task=1)
    meet(run, tmp_path, 2, 3, failure=0.42)
    meet(run, tmp_path, NO_SCENARIO, 3, failure=0.9)
    cli("push", run.name, "--from-traffic")
    shown = " ".join(cli("status", f"{run.name}/traffic-1").output.split())
    assert "scenario answers missing expected wrong state" in shown
    assert "2 3 42 % open" in shown and "none 3 90 % open" in shown


def test_the_same_review_goes_on_until_it_is_concluded(cli, served, tmp_path):
    first = cli("push", served.name, "--from-traffic").output
    meet(served, tmp_path, 3, 2, first=2)
    assert cli("push", served.name, "--from-traffic").output == first
    assert cli("push", f"{served.name}/traffic-1").output.splitlines()[0] == first.splitlines()[0]


def test_a_new_review_shows_only_inputs_that_none_has_shown(cli, served, accounts, server, tmp_path):
    cli("push", served.name, "--from-traffic")
    review = Run.open(FolderStore(tmp_path), f"{served.name}/traffic-1")
    gallery = review.load(Gallery)
    assert gallery is not None
    for task in LabelStudioClient(server.address, server.token).tasks(
        read_state(review.store, gallery).number
    ):
        accounts[0].answer(task.id, "image", "0")
    cli("status", review.name)
    with pytest.raises(InputError, match="has 3 inputs that were not reviewed yet, of 6 kept"):
        cli("push", served.name, "--from-traffic")
    meet(served, tmp_path, 3, 2, first=2)
    assert f"{served.name}/traffic-2" in cli("push", served.name, "--from-traffic").output
    second = Run.open(FolderStore(tmp_path), f"{served.name}/traffic-2").load(Gallery)
    assert second is not None and second.numbers == (3,)


def test_a_review_of_traffic_ends_with_the_number_of_answers_that_a_later_push_gives(
    cli, accounts, server, tmp_path
):
    run = review_run(tmp_path, digits_gallery(), annotators="reference-models")  # answers_per_task: 3
    run.once("review", Votes, lambda: votes_of_models(np.full((1, 4, 3, 10), 0.1, np.float32), 0.0))
    meet(run, tmp_path, 2, 3)
    cli("push", run.name, "--from-traffic")
    review = Run.open(FolderStore(tmp_path), f"{run.name}/traffic-1")
    api = LabelStudioClient(server.address, server.token)
    for task in api.tasks(read_state(review.store, review.require(Gallery)).number):
        for account in accounts[:2]:
            account.answer(task.id, "image", "0")
    shown = " ".join(cli("status", review.name).output.split())
    given = "review.answers_per_task=2"
    push, status = (
        f"defuse review {words} --store {tmp_path}"
        for words in (f"push {review.name} --set {given}", f"status {review.name}")
    )
    assert f"`{push}`, then `{status}`, ends the review with fewer answers." in shown
    cli("push", review.name, "--set", given)
    assert "all answers are in, and stored" in cli("status", review.name).output
    meet(run, tmp_path, 3, 3)
    cli("push", run.name, "--from-traffic", "--set", given)
    second = Run.open(FolderStore(tmp_path), f"{run.name}/traffic-2")
    assert second.spec.review.answers_per_task == 2
    cli("reopen", review.name, "--discard")
    cli("push", review.name, "--set", "review.answers_per_task=1")
    assert "all answers are in, and stored" in cli("status", review.name).output
    assert Run.open(FolderStore(tmp_path), review.name).spec.review.answers_per_task == 1
    assert Run.open(FolderStore(tmp_path), second.name).spec.review.answers_per_task == 2
    assert len(review.require(Votes).answer) == 6  # those that were given before still count


def test_a_review_of_traffic_can_set_what_is_free_until_its_votes_and_nothing_else(cli, served, tmp_path):
    store = FolderStore(tmp_path)
    first = open_traffic_review(served, ["review.real_names=true"])
    assert (first.spec.review.real_names, first.spec.review.answers_per_task) == (True, 1)
    again = open_traffic_review(served, ["review.real_names=false", "review.answers_per_task=2"])
    assert again.name == first.name
    assert Run.open(store, first.name).spec.review == again.spec.review
    assert (again.spec.review.real_names, again.spec.review.answers_per_task) == (False, 2)
    with pytest.raises(RunFileError, match="a review of traffic can set review.answers_per_task, "):
        open_traffic_review(served, ["review.rho=0.3"])
    with pytest.raises(RunFileError, match=r"--set: review\.answers_per_task: .* found 0"):
        open_traffic_review(served, ["review.answers_per_task=0"])
    refused = cli("push", served.name, "--set", "review.answers_per_task=2")
    assert refused.exit_code == 2 and "give it to `defuse run`" in refused.output


def test_what_a_review_of_traffic_cannot_set_once_its_votes_are_stored_names_the_command_that_opens_it_again(
    served,
):
    review = open_traffic_review(served, ())
    review.once("review", Votes, lambda: votes_of_models(np.full((1, 1, 3, 10), 0.1, np.float32), 0.0))
    with pytest.raises(
        InputError, match=r"votes of run\d+/traffic-1 are stored.*`defuse review reopen run\d+/tr"
    ):
        set_in_traffic_review(review, ["review.answers_per_task=2"])
    assert set_in_traffic_review(review, ["review.answers_per_task=1"]).spec == review.spec
    reopen_vote(review)
    changed = set_in_traffic_review(review, ["review.answers_per_task=2"])
    assert changed.spec.review.answers_per_task == 2


def test_scenarios_with_too_few_inputs_are_left_out_and_counted(served, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    meet(served, tmp_path, 1, 1)
    gallery = open_traffic_review(served, ()).require(Gallery)
    assert gallery.numbers == (2,) and gallery.predicted.tolist() == [[6, 6, 6]]
    np.testing.assert_array_equal(
        gallery.images, digits_gallery(images=10).images[2:3, 1:4]
    )  # the newest of four
    assert "left out 2 of 3 scenarios, which have fewer than 3 inputs" in caplog.text


def test_nothing_is_said_where_every_scenario_is_shown(served, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    meet(served, tmp_path, 3, 2, first=2)
    assert open_traffic_review(served, ()).require(Gallery).numbers == (2, 3)
    assert "left out" not in caplog.text


def test_an_input_that_came_more_than_once_is_shown_once(cli, served, tmp_path):
    meet(served, tmp_path, 3, 2, first=0)
    again = Reservoir(FolderStore(tmp_path), 10)
    again._kept[f"{served.name}/{COMPONENTS[:16]}/003"] = taken(2)
    image = digits_gallery(images=10).images[3][0]
    for _ in range(3):
        again.offer(served.name, sampled_input(image, 3))
    again._thread.shutdown()
    cli("push", served.name, "--from-traffic")
    gallery = Run.open(FolderStore(tmp_path), f"{served.name}/traffic-1").load(Gallery)
    assert gallery is not None and gallery.numbers == (2,)  # scenario 3 has two inputs, not five


def test_every_input_is_asked_about_however_early_the_verdict_is_sure(
    cli, served, accounts, server, tmp_path
):
    cli("push", served.name, "--from-traffic")
    review = Run.open(FolderStore(tmp_path), f"{served.name}/traffic-1")
    assert not review.spec.review.stop_early
    gallery = review.load(Gallery)
    assert gallery is not None
    tasks = list(
        LabelStudioClient(server.address, server.token).tasks(read_state(review.store, gallery).number)
    )
    for task in tasks[:2]:
        accounts[0].answer(task.id, "image", "6")  # two of three are right: no failure, whatever the third is
    assert "1 are still wanted" in cli("status", review.name).output


def test_people_answer_every_input_plainly_whatever_the_run_file_says(tmp_path):
    told = {"prelabel": True, "stop_early": True, "accept": "lower-bound", "consensus": "crowdlab"}
    told["form"] = "scenario"
    run = review_run(tmp_path, digits_gallery(), rho=0.3, **told)
    meet(run, tmp_path, 2, 3)
    review = open_traffic_review(run, ()).spec.review
    assert (review.annotators, review.prelabel, review.stop_early) == ("label-studio", False, False)
    assert (review.accept, review.consensus, review.rho) == ("share", "majority", run.spec.review.rho)
    assert review.form == "image"


def test_a_review_of_traffic_that_has_begun_keeps_its_form(served, tmp_path):
    store = FolderStore(tmp_path)
    gallery = open_traffic_review(served, ()).require(Gallery)
    served.store.within("traffic-1").delete_all()
    spec = served.spec.with_fields("review", form="scenario")
    Run.start(store, f"{served.name}/traffic-1", spec).once("draw", Gallery, lambda: gallery)
    for given in ([], ["review.answers_per_task=2"]):
        assert open_traffic_review(served, given).spec.review.form == "scenario"


def test_reviews_of_traffic_are_listed_by_their_number_once_they_have_inputs(tmp_path):
    store = FolderStore(tmp_path)
    for key in ("10/gallery.safetensors", "9/gallery.safetensors", "9/votes.safetensors", "11/run.yaml"):
        store.write(f"mnist/traffic-{key}", b"")
    assert traffic_reviews(store, "mnist") == ["mnist/traffic-9", "mnist/traffic-10"]


def test_without_traffic_the_error_says_how_to_get_some(cli, tmp_path):
    run = review_run(tmp_path, digits_gallery())
    with pytest.raises(InputError, match=r"serve\.reservoir"):
        cli("push", run.name, "--from-traffic")


def test_a_review_of_traffic_has_no_vote_to_decide_above(cli, served):
    done = cli("set", f"{served.name}/traffic-1", "2", "--reject", "--reason", "why")
    assert done.exit_code == 2 and "no vote to override" in done.output


def test_inputs_that_another_run_of_the_same_name_received_are_not_reviewed(served, tmp_path, caplog):
    reservoir = Reservoir(FolderStore(tmp_path), 10)
    for image in digits_gallery(images=4).images[1]:
        reservoir.offer(served.name, sampled_input(image, 1, components="of another run"))
    reservoir._thread.shutdown()
    review = open_traffic_review(served, ())
    assert review.require(Gallery).numbers == (2,)  # 1 has four inputs, of the other run
    assert "left out 4 of 10 inputs, which another run of this name received" in caplog.text
