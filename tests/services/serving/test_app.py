"""The Ray Serve application: its arguments, settings and resources."""

from __future__ import annotations

import dataclasses
import functools
import io
import logging
import os
import re
import sys

import pytest
import ray
import yaml
from click.testing import CliRunner
from ray.serve.schema import ServeDeploySchema
from ray.serve.scripts import cli as serve_command

from defuse_core.artifacts import Gallery
from defuse_core.codec import encode
from defuse_core.config import ServeSection
from defuse_core.errors import ComputeError, DamagedError, InputError, NoAnswerError, StoreError
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from services.serving.active_versions import InitialModel
from services.serving.app import (
    ClassifierIngress,
    build,
    classifier_deployment,
    require_gpus,
    running_application,
)
from services.serving.candidate import prepare_candidate
from services.serving.deployment import ClassifierDeployment
from services.serving.launch import Proxy, ServeArgs, serve_section
from services.serving.registry import Registry, promote
from services.serving.registry_state import PromotionRequest


def test_a_replica_that_was_granted_no_gpu_sees_none(planted, ray_session):
    @ray.remote
    def visible_gpus(store: str) -> str:
        ClassifierIngress(store, InitialModel(), ServeSection(), {}, False)
        return os.environ.get("CUDA_VISIBLE_DEVICES", "all")

    assert ray.get(visible_gpus.remote(planted.address)) == ""


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch": 3}, r"serve\.batch: "),
        ({"batch_size": 0}, r"serve\.batch_size: "),
        ({"min_replicas": 3}, "exceeds max_replicas"),
    ],
)
def test_an_invalid_setting_is_named(planted, settings, words):
    with pytest.raises(InputError, match=words):
        serve_section(ServeArgs(store=planted.address, run="first", settings=settings))


@pytest.fixture
def promoted(own_store):
    """A store with run `first` in production."""
    promote(
        Registry(own_store), prepare_candidate(Run.open(own_store, "first"))[1], PromotionRequest("ana", "")
    )
    return own_store


def test_settings_of_the_server_come_from_the_run_file_of_the_version_in_production_as_it_is_now(
    promoted, good_spec
):
    serve = good_spec.serve.model_copy(update={"max_images": 7, "reservoir": 50})
    Run.start(promoted, "first", good_spec.model_copy(update={"serve": serve}))
    settings = serve_section(ServeArgs(store=promoted.address))
    assert (settings.max_images, settings.reservoir) == (7, 50)
    promoted.delete("first/run.yaml")  # the version's copy is left
    assert serve_section(ServeArgs(store=promoted.address)) == good_spec.serve


def test_settings_of_the_server_do_not_come_from_another_run_that_has_the_name_of_the_versions_run(
    promoted, good_spec
):
    run = Run.start(promoted, "first", good_spec.with_fields("serve", max_images=7))
    drawn = run.require(Gallery)
    run.store.write("gallery.safetensors", encode(dataclasses.replace(drawn, codes=drawn.codes + 1)))
    assert serve_section(ServeArgs(store=promoted.address)) == good_spec.serve


@pytest.mark.parametrize("key", ["settings.json", "gallery.safetensors"])
def test_settings_of_the_server_are_the_versions_own_where_its_run_is_damaged(key, promoted, good_spec):
    Run.start(promoted, "first", good_spec.with_fields("serve", max_images=7))
    promoted.write(f"first/{key}", b"cut")
    assert serve_section(ServeArgs(store=promoted.address)) == good_spec.serve


def test_a_server_starts_beside_a_damaged_version_and_warns(promoted, caplog):
    promoted.write("registry/versions/000001.safetensors", b"cut")
    promoted.delete("first/run.yaml")
    assert serve_section(ServeArgs(store=promoted.address)) == ServeSection()
    build(ServeArgs(store=promoted.address))
    assert "promote its run again, or restore the file; requests are answered 503 until then" in caplog.text


def test_a_replica_that_requires_a_model_starts_before_the_first_promotion_and_not_beside_a_damaged_version(
    own_store, monkeypatch
):
    monkeypatch.setattr("services.serving.app.hide_other_gpus", lambda: None)
    bound = build(ServeArgs(store=own_store.address, require_model=True))._bound_deployment
    start = functools.partial(ClassifierIngress, *bound.init_args, **bound.init_kwargs)
    assert start().active.production is None
    promote(
        Registry(own_store), prepare_candidate(Run.open(own_store, "first"))[1], PromotionRequest("ana", "")
    )
    assert start().active.names() == {"production": "1"}
    own_store.write("registry/versions/000001.safetensors", b"cut")
    with pytest.raises(ComputeError, match="^the version in production is damaged or missing"):
        start()


def test_a_replica_that_requires_a_model_waits_for_a_store_that_does_not_answer(promoted, monkeypatch):
    monkeypatch.setattr("services.serving.app.hide_other_gpus", lambda: None)
    monkeypatch.setattr("services.serving.app.POLL_S", 0.01)
    state_after = Registry.state_after
    errors: list[Exception] = [NoAnswerError("no answer"), NoAnswerError("no answer")]

    def answer_later(registry, known):
        if errors:
            raise errors.pop()
        return state_after(registry, known)

    bound = build(ServeArgs(store=promoted.address, require_model=True))._bound_deployment
    monkeypatch.setattr(Registry, "state_after", answer_later)
    active = ClassifierIngress(*bound.init_args, **bound.init_kwargs).active
    assert (active.names(), active.error, errors) == ({"production": "1"}, None, [])
    errors.append(StoreError("wrong credentials"))  # nothing to wait for
    with pytest.raises(ComputeError, match="cannot be loaded"):
        ClassifierIngress(*bound.init_args, **bound.init_kwargs)


def test_a_replica_logs_each_record_on_one_line_with_date_time_and_level(
    promoted, monkeypatch, capsys, caplog
):
    log, root = logging.getLogger("defuse"), logging.getLogger()
    for logger in (log, root):  # as Ray leaves them
        monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.WARNING, "defuse")  # restored after the test
    monkeypatch.setattr("services.serving.app.hide_other_gpus", lambda: None)
    monkeypatch.setattr("sys.__stderr__", sys.stderr)
    monkeypatch.setattr("sys.stderr", io.StringIO())  # as Serve leaves it
    for _ in range(2):
        ClassifierIngress(promoted.address, InitialModel(), ServeSection(), {}, False)
        root.addHandler(logging.StreamHandler())  # by the user's code
    log.error("lost: %s", "one\n  two\x1b[2J")
    *changes, lost = capsys.readouterr().err.splitlines()
    line = r"2\d{3}-\d\d-\d\d \d\d:\d\d:\d\d "
    assert len(changes) == 2 and all(
        re.match(f"{line}INFO registry change 2: ", change) for change in changes
    )
    assert re.fullmatch(line + r"ERROR lost: one two\\x1b\[2J", lost)


def test_a_replica_without_its_required_token_does_not_start(own_store, monkeypatch):
    monkeypatch.setattr("services.serving.app.hide_other_gpus", lambda: None)
    monkeypatch.delenv("DEFUSE_SERVE_TOKEN", raising=False)
    bound = build(ServeArgs(store=own_store.address, require_token=True))._bound_deployment
    with pytest.raises(InputError, match="DEFUSE_SERVE_TOKEN is required, and not set"):
        ClassifierIngress(*bound.init_args, **bound.init_kwargs)


@pytest.fixture
def no_answer_at_first(monkeypatch):
    """Let the store give no answer to its next three openings; returns the errors that are left."""
    monkeypatch.setattr("services.serving.deployment.POLL_S", 0.01)
    errors: list[Exception] = [NoAnswerError(f"no answer {number}") for number in (3, 2, 1)]

    def open_later(address):
        if errors:
            raise errors.pop()
        return FolderStore(address)

    for module in ("app", "launch", "deployment"):
        monkeypatch.setattr(f"services.serving.{module}.open_store", open_later)
    return errors


WAITING = "the store does not answer, waiting for it: no answer 1"
ANYONE = "anyone who reaches 0.0.0.0 can send requests, since DEFUSE_SERVE_TOKEN is not set"


def test_an_application_is_built_once_the_store_answers_and_one_line_says_that_it_waits(
    promoted, no_answer_at_first, caplog
):
    build(ServeArgs(store=promoted.address))
    assert (no_answer_at_first, caplog.messages) == ([], [WAITING])


def test_a_replica_starts_once_the_store_answers(promoted, no_answer_at_first, caplog):
    active = ClassifierDeployment(promoted.address, InitialModel(), ServeSection(), {}, False).active
    assert (active.names(), no_answer_at_first) == ({"production": "1"}, [])
    assert [line for line in caplog.messages if "does not answer" in line] == [WAITING]


def test_an_application_does_not_wait_for_other_credentials(promoted, no_answer_at_first):
    no_answer_at_first.append(StoreError("wrong credentials"))
    with pytest.raises(StoreError, match="wrong credentials"):
        build(ServeArgs(store=promoted.address))


def test_a_replica_waits_for_its_run_where_the_store_does_not_answer_and_not_where_it_is_gone(
    own_store, monkeypatch
):
    monkeypatch.setattr("services.serving.deployment.POLL_S", 0.01)
    initial = InitialModel(f"first/{prepare_candidate(Run.open(own_store, 'first'))[0]}")
    start = functools.partial(ClassifierDeployment, own_store.address, initial, ServeSection(), {}, False)
    read, errors = FolderStore.read, [NoAnswerError("no answer")]
    monkeypatch.setattr(FolderStore, "read", lambda *at: failing(errors) or read(*at))
    assert start().active.names() == {"production": "first"} and not errors
    own_store.delete(initial.key)
    with pytest.raises(DamagedError, match="the model that this server was started with is missing"):
        start()


def failing(errors: list[Exception]) -> None:
    """Raise the last of the errors, once."""
    if errors:
        raise errors.pop()


def test_another_replica_waits_for_the_store_and_says_so_once_while_others_answer(
    promoted, monkeypatch, caplog
):
    monkeypatch.setattr("services.serving.app.hide_other_gpus", lambda: None)
    monkeypatch.setattr("services.serving.app._is_application_answering", lambda: True)
    monkeypatch.setattr("services.serving.app.POLL_S", 0.01)
    state_after, errors = Registry.state_after, [NoAnswerError("no answer"), NoAnswerError("no answer")]
    monkeypatch.setattr(Registry, "state_after", lambda *known: failing(errors) or state_after(*known))
    started = ClassifierIngress(promoted.address, InitialModel(), ServeSection(), {}, False)
    assert (started.active.names(), errors) == ({"production": "1"}, [])
    assert caplog.messages == ["the registry's version cannot be loaded: no answer"]


def test_a_server_warns_of_each_setting_that_counts_only_from_the_next_promotion_on(
    promoted, good_spec, caplog
):
    build(ServeArgs(store=promoted.address))
    serve = good_spec.serve.model_copy(update={"failure_threshold": 0.4, "resize": True, "max_images": 7})
    Run.start(promoted, "first", good_spec.model_copy(update={"serve": serve}))
    build(ServeArgs(store=promoted.address, settings={"resize": True}))
    assert caplog.messages == [
        "version 1 keeps serve.failure_threshold null, with which it was promoted; promote run first again for 0.4"
    ]


def test_a_server_of_a_run_warns_of_another_version_in_production(promoted, caplog):
    build(ServeArgs(store=promoted.address, run="first"))
    build(ServeArgs(store=promoted.address, run="second", pin=True))
    assert "in production" not in caplog.text
    build(ServeArgs(store=promoted.address, run="second"))
    assert "version 1 (run first) is in production, and this server answers with run second" in caplog.text


def test_a_server_of_a_run_warns_of_each_check_that_failed(planted, caplog):
    build(ServeArgs(store=planted.address, run="first"))
    assert "check failed" not in caplog.text
    failed = prepare_candidate(Run.open(planted, "swapped"))[1].failed_checks()
    build(ServeArgs(store=planted.address, run="swapped"))
    warned = [one.getMessage() for one in caplog.records if "check failed" in one.getMessage()]
    assert failed and warned == [f"run swapped is served although a check failed: {line}" for line in failed]


@pytest.mark.parametrize(
    ("host", "token", "ends_with", "warnings"),
    [
        ("127.0.0.1", False, r"which other machines can reach: .* with `--host 0\.0\.0\.0`$", 0),
        ("0.0.0.0", False, "no run called absent", 1),
        ("127.0.0.1", True, "no run called absent", 0),
    ],
)
def test_a_serve_that_other_machines_reach_needs_a_token_or_the_host_that_allows_that(
    planted, serve_port, monkeypatch, caplog, host, token, ends_with, warnings
):
    monkeypatch.setattr("services.serving.app._listening_address", lambda *_: ("0.0.0.0", serve_port))
    args = ServeArgs(store=planted.address, run="absent", require_token=token)
    started = running_application(args, host, serve_port, Proxy.CLUSTER)
    with pytest.raises(InputError, match=ends_with), started:
        pass
    assert caplog.messages.count(ANYONE) == warnings


def test_serve_build_writes_the_application(planted, tmp_path, monkeypatch):
    module = f"from services.serving.app import ServeArgs, build\napp = build(ServeArgs(store={planted.address!r}))\n"
    (tmp_path / "built.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    written = tmp_path / "built.yaml"
    done = CliRunner().invoke(serve_command, ["build", "built:app", "-o", str(written)])
    assert done.exit_code == 0, done.output
    found = ServeDeploySchema.model_validate(yaml.safe_load(written.read_text()))
    assert found.applications[0].deployments[0].name == "classifier"


def test_replicas_follow_the_load_between_their_bounds_and_share_a_gpu():
    settings = ServeSection(min_replicas=2, max_replicas=5, gpus_per_replica=0.25, max_queued=7)
    asked = classifier_deployment(settings)
    scaling = asked._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 5, 16)
    assert asked.ray_actor_options["num_gpus"] == 0.25 and asked.max_queued_requests == 7


def test_a_server_where_no_request_waits_can_be_started():
    assert classifier_deployment(ServeSection(max_queued=0)).max_queued_requests == 1


def test_a_server_that_limits_no_requests_can_be_started():
    most = 2**31 - 1
    asked = classifier_deployment(ServeSection(max_ongoing=most, max_queued=most))
    assert asked.max_ongoing_requests == asked.max_queued_requests == most
    asked._deployment_config.to_proto()  # as for the controller: no number is out of range


@pytest.mark.parametrize(
    ("settings", "embedded", "words"),
    [
        (
            {"device": "cuda"},
            True,
            "device: cuda, but Ray finds no GPU on this machine; set it to auto or cpu$",
        ),
        (
            {"device": "cuda"},
            False,
            "device: cuda, but the cluster has no GPU; .* where nodes with GPUs join later$",
        ),
        (
            {"device": "cuda", "gpus_per_replica": 0},
            False,
            "device: cuda, but serve.gpus_per_replica is 0; leave",
        ),
        ({"gpus_per_replica": 0.5}, True, "gpus_per_replica: expected 1 x 0.5 GPU on this machine, found 0$"),
    ],
)
def test_gpus_that_no_replica_gets_are_a_wrong_setting(settings, embedded, words, ray_session):
    with pytest.raises(InputError, match=f"^serve.{words}"):
        require_gpus(ServeSection(**settings), embedded=embedded)


def test_a_cluster_may_get_the_gpus_of_replicas_later(ray_session):
    require_gpus(ServeSection(device="cuda", gpus_per_replica=1), embedded=False)
    require_gpus(ServeSection(device="cpu", gpus_per_replica=1), embedded=True)


@pytest.mark.parametrize(
    ("settings", "gpus", "words"),
    [
        ({"gpus_per_replica": 2.0}, 1, "expected 1 x 2 GPU on this machine, found 1$"),
        ({"min_replicas": 2, "max_replicas": 2}, 1, "expected 2 x 1 GPU on this machine, found 1$"),
    ],
)
def test_a_machine_with_too_few_gpus_for_its_replicas_is_a_wrong_setting(settings, gpus, words, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": gpus})
    with pytest.raises(InputError, match=words):
        require_gpus(ServeSection(**settings), embedded=True)
