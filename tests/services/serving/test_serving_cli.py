"""The commands: check, promote, rollback, and serve with its door."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import yaml
from click.testing import CliRunner
from ray.serve.schema import ServeDeploySchema

from defuse_core.artifacts import Sweep
from defuse_core.codec import encode
from defuse_core.errors import CheckFailed, ComputeError, InputError, RunFileError
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from services.cli.serving import check, promote, rollback, serve
from services.serving.app import plan
from services.serving.registry import Registry
from services.serving.start import Ending, application, is_loopback


def run(command, *args):
    """Return what the command printed. Errors of the tree come through, as they do to `main`."""
    result = CliRunner().invoke(command, args, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.output


def test_check_prints_every_check_and_fails_with_exit_code_1_where_one_failed(planted):
    lines = run(check, "first", "--store", planted.address).splitlines()
    assert len(lines) == 8 and all(line.startswith("ok ") for line in lines[:7])
    assert lines[7].strip() == "its failure scenarios were labelled by reference models"
    result = CliRunner().invoke(check, ["swapped", "--store", planted.address], standalone_mode=False)
    failed = [line for line in result.output.splitlines() if line.startswith("FAILED")]
    assert [line.split()[1] for line in failed] == ["clean", "every", "regressions:"]
    assert isinstance(result.exception, CheckFailed) and result.exception.exit_code == 1
    assert "3 of 7 checks failed" in str(result.exception)


def test_check_as_json_is_one_object(planted):
    found = json.loads(run(check, "first", "--store", planted.address, "--json"))
    assert found["passed"] and len(found["checks"]) == 7


def test_a_classifier_without_failure_scenarios_passes_and_there_is_nothing_to_promote(own_store):
    run_dir = Run.open(own_store, "first")
    run_dir.store.write("sweep.safetensors", encode(Sweep((), None, {}, ())))
    assert run(check, "first", "--store", own_store.address).startswith("ok     run first corrected nothing")
    assert json.loads(run(check, "first", "--store", own_store.address, "--json"))["passed"]
    with pytest.raises(InputError, match="no failure scenario was accepted"):
        run(promote, "first", "--store", own_store.address)


def test_check_of_an_unfinished_run_says_what_is_missing(planted, good_spec, tmp_path):
    Run.start(FolderStore(tmp_path), "begun", good_spec)
    with pytest.raises(InputError, match=r"begun has no corrected classifier yet \(models is missing\)"):
        run(check, "begun", "--store", str(tmp_path))


def test_promote_canary_promote_and_rollback_are_one_command_each(own_store):
    store = ("--store", own_store.address, "--by", "ana")
    assert run(promote, "first", *store, "--why", "first of all") == "version 1 to production\n"
    assert run(promote, "second", *store, "--canary", "5%") == "version 2 as canary for 5.0%\n"
    assert run(promote, "second", *store) == "version 2 to production\n"
    assert run(rollback, *store) == "rolled back from version 2; version 1 is in production\n"
    shown = run(promote, "--store", own_store.address).splitlines()
    assert (
        shown[0].startswith("   1  production   run first, labelled by reference models; by ana")
        and "first of all" in shown[0]
    )
    assert shown[1].startswith("   2               run second") and "rolled back from version 2" in shown[2]


def test_promote_of_a_failing_candidate_needs_a_reason(own_store):
    with pytest.raises(CheckFailed, match="swapped is not promoted"):
        run(promote, "swapped", "--store", own_store.address)
    run(promote, "swapped", "--store", own_store.address, "--force", "a drill")
    assert Registry(own_store).standing().versions[1].forced


@pytest.mark.parametrize(
    "options", [("--set", "serve.watch"), ("--set", "vae.beta=1"), ("--set", "serve.x={")]
)
def test_serve_refuses_fields_that_are_not_of_its_section(planted, options):
    with pytest.raises(RunFileError, match="--set"):
        run(serve, "first", "--store", planted.address, *options)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch": 3}, r"serve\.batch: "),
        ({"batch_size": 0}, r"serve\.batch_size: "),
        ({"min_replicas": 3}, "exceeds max_replicas"),
    ],
)
def test_settings_that_do_not_exist_or_fit_are_named(planted, settings, words):
    with pytest.raises(InputError, match=words):
        plan({"store": planted.address, "run": "first", "settings": settings})


def test_serve_build_writes_the_application_out(planted, tmp_path):
    module = f"from services.serving.app import ServeArgs, build\napp = build(ServeArgs(store={planted.address!r}))\n"
    (tmp_path / "built.py").write_text(module)
    written = tmp_path / "built.yaml"
    command = [sys.executable, "-m", "ray.serve.scripts", "build", "built:app", "-o", str(written)]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path.cwd()}"}
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, capture_output=True)
    found = ServeDeploySchema.model_validate(yaml.safe_load(written.read_text()))
    assert found.applications[0].deployments[0].name == "classifier"


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("example.org", False)],
)
def test_only_loopback_is_taken_for_closed(host, loopback):
    assert is_loopback(host) is loopback


def test_defuse_serve_listens_on_loopback_asks_for_the_token_and_ends_on_a_signal(own_store, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from services.cli import main; main()", "serve", "first"]
    options = ["--store", own_store.address, "--port", str(port), "--set", "serve.cpus_per_replica=0.5"]
    environment = {**os.environ, "DEFUSE_SERVE_TOKEN": "a long secret", "PYTHONPATH": str(Path.cwd())}
    environment.pop("RAY_ADDRESS", None)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, *options], env=environment, stdout=log, stderr=log)
        try:
            http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10)
            _until_ready(http, process)
            _check_the_door(http)
            assert listening_addresses(port) == {"0100007F"}
            _until(lambda: "serving on http://127.0.0.1" in (tmp_path / "log").read_text())
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(30)
    assert code == 0 and "a long secret" not in (tmp_path / "log").read_text()


def test_a_signal_interrupts_the_start_and_ends_the_waiting():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ending = Ending()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        later = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        later.start()
        ending.wait()  # and returns
        later.join()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_on_a_shared_cluster_a_second_server_is_refused_and_the_first_goes_on(planted, serve_port):
    from ray import serve as ray_serve

    args = {"store": planted.address, "run": "first", "pin": True, "settings": {"cpus_per_replica": 0.1}}
    with application(args, "127.0.0.1", 1, shared=True) as address:
        assert address == f"http://127.0.0.1:{serve_port}"  # where Serve listened already
        again = application({**args, "run": "second"}, "127.0.0.1", serve_port, shared=True)
        with pytest.raises(InputError, match="serves an application called defuse already"), again:
            pass
        assert httpx.get(f"{address}/v1/model").json()["run"] == "first"
    assert "defuse" not in ray_serve.status().applications


def test_a_replica_that_cannot_start_says_why(planted, serve_port):
    args = {"store": planted.address, "run": "first", "settings": {"device": "cuda", "gpus_per_replica": 0}}
    started = application(args, "127.0.0.1", serve_port, shared=True)
    with pytest.raises(ComputeError, match=r"did not start: .*serve.device: cuda, but"), started:
        pass


def test_haproxy_opens_no_replica_to_everybody_unless_asked(planted, monkeypatch):
    monkeypatch.delenv("DEFUSE_SERVE_TOKEN", raising=False)
    with pytest.raises(InputError, match="--haproxy lets every replica listen on every interface"):
        run(serve, "first", "--store", planted.address, "--haproxy")


def listening_addresses(port):
    """Return the addresses, in the hexadecimal of /proc, on which somebody listens at `port`."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    places = [row[1].split(":") for row in rows if row[3] == "0A"]
    return {address for address, at in places if int(at, 16) == port}


def _until(true):
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.1)


def _until_ready(http, process):
    for _ in range(240):
        assert process.poll() is None
        try:
            if http.get("/readyz").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.25)
    raise AssertionError("defuse serve did not get ready within a minute")


def _check_the_door(http):
    assert http.get("/healthz").status_code == 200
    for path in ("/v1/model", "/metrics", "/docs", "/openapi.json", "/nothing"):
        reply = http.get(path)
        assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
        assert set(reply.json()) == {"error"}
    assert http.post("/v1/predict", content=b"?").status_code == 401
    assert http.get("/v1/model", headers={"Authorization": "Bearer another"}).status_code == 401
    assert http.get("/v1/model", headers={"Authorization": "Bearer a long secret"}).status_code == 200
