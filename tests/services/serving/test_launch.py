"""Starting and stopping `defuse serve`, on an embedded Ray and on a running cluster."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import httpx
import pytest
import ray
from click import UsageError
from serve_process import TOKEN, listening, listening_addresses, serve_process

from cluster.connection import connection
from defuse_core.errors import ComputeError, InputError
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from services import stopping_on_signals
from services.cli.serve import serve as serve_command
from services.serving.app import (
    _require_reachable_replicas,
    _url_host,
    deploy,
    registry_changes,
    running_application,
    serve_until_stopped,
)
from services.serving.candidate import prepare_candidate
from services.serving.launch import Proxy, ServeArgs, serve_section
from services.serving.registry import Registry, promote
from services.serving.registry_state import PromotionRequest
from tests.waiting import wait_until


def test_defuse_serve_listens_on_loopback_requires_the_token_replaces_a_killed_replica_and_stops_on_a_signal(
    own_store, short_folder
):
    options = ("--store", own_store.address, "--set", "serve.cpus_per_replica=0.5")
    with serve_process(short_folder, "first", *options) as running:
        _check_authentication(running.http)
        assert listening_addresses(running.port) == {"0100007F"}
        _check_reported_changes(running, Registry(own_store))
        _check_that_a_killed_replica_answers_on_the_same_port_again(running)
        assert running.stop() == 0
    assert TOKEN not in running.output()
    assert "graceful_shutdown" not in running.output()  # Ray's name for its own end, which is no failure


def _check_reported_changes(running, registry):
    """What happens to a canary is of interest to the person who watches the server."""
    for name in ("second", "swapped"):
        candidate = prepare_candidate(Run.open(registry_store(registry), name))[1]
        request = PromotionRequest(
            "ana", "a drill", force="a drill", canary=0.5 if name == "swapped" else None
        )
        promote(registry, candidate, request)
    registry.end_canary(2, "defuse serve", "60 of 1000 images failed")
    wait_until(
        lambda: "ended the canary of version 2 (60 of 1000 images failed)" in running.output(), running.output
    )
    assert "ana: version 2 as canary for 50 % (a drill; forced: a drill)" in running.output()
    logs = logs_of(running)  # of replicas, where the changes stand at once
    wait_until(lambda: any("INFO registry change" in log.read_text() for log in logs.glob("worker-*.err")))


def _check_that_a_killed_replica_answers_on_the_same_port_again(running):
    (replica,) = listening("ServeReplica", running.port)
    own_priority = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, replica) == own_priority  # Ray lowers that of its workers
    with socket.create_connection(("127.0.0.1", running.port)):  # of a client that does not notice
        os.kill(replica, signal.SIGKILL)
        wait_until(lambda: answers(running.http), running.output, every_s=0.2)
    assert listening("ServeReplica", running.port) != [replica]
    started = list(logs_of(running).glob("serve/replica_*.log"))
    assert len(started) == 2  # so the first one that replaced it could listen


def logs_of(running):
    return Path(re.search(r"logs of replicas: (.*)\);", running.output())[1])


def answers(http):
    try:
        return http.get("/healthz").status_code == 200
    except httpx.HTTPError:
        return False


def registry_store(registry):
    return FolderStore(Path(registry.store.address).parent)


def test_defuse_serve_does_not_start_a_ray_without_authentication(own_store, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("DEFUSE_UNAUTHENTICATED_RAY", raising=False)
    monkeypatch.setattr(
        "cluster.connection.ray.is_initialized", lambda: False
    )  # whatever other tests started
    with pytest.raises(InputError, match="could run code in its Ray"), connection(None, 1):
        pass


def test_a_port_in_use_is_an_error_before_anything_starts(planted):
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        port = used.getsockname()[1]
        started = running_application(ServeArgs(store=planted.address), "127.0.0.1", port, Proxy.RAY)
        with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1:{port}"), started:
            pass


STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize("first", STOPS)
def test_a_signal_ends_the_command_in_order_and_further_ones_do_not_cut_off_the_end(
    own_store, monkeypatch, first
):
    before, ended, shown = {number: signal.getsignal(number) for number in STOPS}, [], []

    @contextlib.contextmanager
    def running(*_):
        try:
            yield "http://127.0.0.1:1"
        finally:
            for number in STOPS:
                signal.raise_signal(number)
            ended.append(True)

    monkeypatch.setattr("services.serving.app.connection", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr("services.serving.app.log_folder", lambda: "logs")
    monkeypatch.setattr("services.serving.app.running_application", running)
    monkeypatch.setattr("services.serving.app.LivenessCheck", lambda *_: lambda: signal.raise_signal(first))
    args = ServeArgs(store=own_store.address)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which `nohup` ignores
        with stopping_on_signals():
            serve_until_stopped(args, serve_section(args), "head:6379", "", 1, Proxy.CLUSTER, shown.append)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert ended and len(shown) == 1 and "Ctrl-C stops it" in shown[0]


def test_on_a_shared_cluster_a_second_application_is_an_error_and_the_first_goes_on(planted, serve_port):
    from ray import serve as ray_serve

    args = ServeArgs(store=planted.address, run="first", pin=True, settings={"cpus_per_replica": 0.1})
    with running_application(args, "127.0.0.1", 1, proxy=Proxy.CLUSTER) as address:
        assert address == f"http://127.0.0.1:{serve_port}"  # where Serve listened already
        again = running_application(
            args.model_copy(update={"run": "second"}), "127.0.0.1", serve_port, proxy=Proxy.CLUSTER
        )
        with pytest.raises(InputError, match="already serves an application named defuse"), again:
            pass
        assert httpx.get(f"{address}/v1/model", timeout=60).json()["run"] == "first"
    assert "defuse" not in ray_serve.status().applications


@pytest.fixture
def no_ray(monkeypatch):
    """Let the start of Ray fail the test."""

    def started(*args: object) -> None:
        pytest.fail("Ray was started")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("services.serving.app.connection", started)


def test_serve_refuses_an_unfinished_run_before_ray_is_started(no_ray, good_spec, tmp_path):
    Run.start(FolderStore(tmp_path), "begun", good_spec)
    for options in ((), ("--address", "127.0.0.1:1")):
        with pytest.raises(
            InputError,
            match="run begun is not finished; the `defuse run` command that began it, without --until, or in Python",
        ):
            serve_command.main(["begun", "--store", str(tmp_path), *options], standalone_mode=False)


def test_serve_refuses_a_port_in_use_before_ray_is_started(no_ray, planted):
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        port = str(used.getsockname()[1])
        with pytest.raises(
            InputError, match=f"cannot listen on 127.0.0.1:{port} .*; choose another --host or --port"
        ):
            serve_command.main(["first", "--store", planted.address, "--port", port], standalone_mode=False)


@pytest.mark.parametrize("options", [("--address", "head:6379"), ()], ids=["address", "RAY_ADDRESS"])
def test_a_proxy_for_a_cluster_that_has_its_own_is_refused(options, planted, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    words = ["first", "--store", planted.address, *options, "--proxy", "ray"]
    with pytest.raises(UsageError, match="the cluster of --address or RAY_ADDRESS has its own"):
        serve_command.main(words, standalone_mode=False)


def test_only_on_a_cluster_can_serve_replace_an_application(planted, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    words = ["first", "--store", planted.address, "--replace"]
    with pytest.raises(InputError, match="--replace needs a cluster: --address or RAY_ADDRESS"):
        serve_command.main(words, standalone_mode=False)


def test_the_application_gets_the_options_of_serve_and_whether_there_is_a_token(planted, monkeypatch):
    started, where = [], ("--store", planted.address, "--address", "head:6379")
    monkeypatch.setattr("services.serving.app.serve_until_stopped", lambda args, *_: started.append(args))
    monkeypatch.setenv("DEFUSE_SERVE_TOKEN", TOKEN)
    options = ("--pin", "--set", "serve.reservoir=50", "--replace")
    serve_command.main(["first", *where, *options], standalone_mode=False)
    monkeypatch.delenv("DEFUSE_SERVE_TOKEN")
    serve_command.main(where, standalone_mode=False)
    given = {
        "run": "first",
        "pin": True,
        "require_token": True,
        "settings": {"reservoir": 50},
        "replace": True,
    }
    assert started == [ServeArgs(store=planted.address, **given), ServeArgs(store=planted.address)]


def test_an_application_that_a_killed_command_left_answers_until_the_one_that_replaces_it_is_made(
    planted, serve_port
):
    from ray import serve as ray_serve

    args = ServeArgs(store=planted.address, run="first", pin=True, settings={"cpus_per_replica": 0.1})

    def again(**changed: object) -> AbstractContextManager[str]:
        return running_application(args.model_copy(update=changed), "127.0.0.1", serve_port, Proxy.CLUSTER)

    def served() -> str:
        return httpx.get(f"http://127.0.0.1:{serve_port}/v1/model", timeout=60).json()["run"]

    deploy(args)
    with pytest.raises(InputError, match="where that was killed, add --replace"), again():
        pass
    with pytest.raises(InputError, match="no run called absent"), again(run="absent", replace=True):
        pass
    assert served() == "first"
    with again(run="second", replace=True, settings={"cpus_per_replica": 0.2, "max_queued": 7}):
        assert served() == "second"
    assert "defuse" not in ray_serve.status().applications


def test_an_application_that_another_program_deployed_meanwhile_is_left(planted, serve_port, caplog):
    from ray import serve as ray_serve

    args = ServeArgs(store=planted.address, run="first", pin=True, settings={"cpus_per_replica": 0.1})
    with running_application(args, "127.0.0.1", serve_port, proxy=Proxy.CLUSTER):
        deploy(args)
    try:
        assert "defuse" in ray_serve.status().applications
        assert "another program deleted the application or deployed it anew" in caplog.text
    finally:
        ray_serve.delete("defuse")


def test_on_a_cluster_with_haproxy_replicas_of_several_nodes_do_not_listen_on_loopback(
    planted, serve_port, monkeypatch
):
    monkeypatch.setattr("ray.serve._private.constants.RAY_SERVE_ENABLE_HA_PROXY", True)
    other = {"NodeID": "another", "Alive": True, "Resources": {"CPU": 2.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [other])
    started = running_application(
        ServeArgs(store=planted.address), "127.0.0.1", serve_port, proxy=Proxy.CLUSTER
    )
    with pytest.raises(InputError, match=r"^--host 127\.0\.0\.1: .* use --host 0\.0\.0\.0"), started:
        pass
    for harmless in ({"Alive": False}, {"Resources": {}}):  # no replica starts on such a node
        monkeypatch.setattr(ray, "nodes", lambda node=other | harmless: [node])
        _require_reachable_replicas("127.0.0.1")


def test_the_error_of_a_replica_that_cannot_start_is_reported(planted, serve_port):
    args = ServeArgs(store=planted.address, run="first", settings={"device": "cuda", "gpus_per_replica": 0})
    started = running_application(args, "127.0.0.1", serve_port, proxy=Proxy.CLUSTER)
    with pytest.raises(ComputeError, match=r"did not start: .*serve.device: cuda, but"), started:
        pass


def _check_authentication(http):
    assert http.get("/healthz").status_code == 200
    for path in ("/v1/model", "/metrics", "/nothing"):
        reply = http.get(path)
        assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
        assert set(reply.json()) == {"error"}
    assert http.post("/v1/predict", content=b"?").status_code == 401
    assert http.get("/v1/model", headers={"Authorization": "Bearer another"}).status_code == 401
    for scheme in ("Bearer", "bearer", "BEARER"):
        assert http.get("/v1/model", headers={"Authorization": f"{scheme} a-long-secret"}).status_code == 200
    _check_browser_login(http)


def _check_browser_login(http):
    """A browser shows its login dialog for a Basic challenge, and sends the password with the next requests."""
    for path in ("/docs", "/openapi.json"):
        assert http.get(path).headers["www-authenticate"] == 'Basic realm="Defuse"'
        assert http.get(path, auth=("anyone", "another")).status_code == 401
        assert http.get(path, headers={"Authorization": "Basic ???"}).status_code == 401
        assert http.get(path, auth=("anyone", "a-long-secret")).status_code == 200
    assert http.get("/v1/model", auth=("anyone", "a-long-secret")).status_code == 401
    assert "Bearer $DEFUSE_SERVE_TOKEN" in http.get("/docs", auth=("anyone", "a-long-secret")).text
    described = http.get("/openapi.json", auth=("anyone", "a-long-secret")).json()
    assert described["components"]["securitySchemes"]["token"] == {"type": "http", "scheme": "bearer"}


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("::1", "[::1]"),
        ("::", "[::1]"),
        ("head", "head"),
    ],
)
def test_an_address_of_ipv6_has_brackets(host, address):
    assert _url_host(host) == address


def lines_until_stopped(registry, monkeypatch, *steps: Callable[[], object], has_model: bool) -> list[str]:
    """Return the lines of as many polls as there are steps, which happen between them, and of one more."""
    left, lines = iter(steps), []

    def pause(_: float) -> None:
        step = next(left, None)
        if step is None:
            raise KeyboardInterrupt
        step()

    monkeypatch.setattr("services.serving.app.sleep", pause)
    with pytest.raises(KeyboardInterrupt):
        lines.extend(registry_changes(registry, check=lambda: None, has_model=has_model))
    return lines


def test_a_change_that_another_program_wrote_cannot_act_on_the_servers_terminal(tmp_path, monkeypatch):
    registry = Registry(FolderStore(tmp_path))
    change = partial(registry.change, "a change", "eve\x1b[2J", "a\nb", lambda state: {})
    (line,) = lines_until_stopped(registry, monkeypatch, change, has_model=True)
    assert r"eve\x1b[2J: a change (a\nb)" in line


def test_a_server_without_a_version_in_production_says_that_it_answers_503_and_until_when(
    tmp_path, monkeypatch
):
    registry = Registry(FolderStore(tmp_path))

    def lines(has_model: bool, **updates: int) -> list[str]:
        change = partial(registry.change, "a change", "ana", "", lambda state: updates)
        return lines_until_stopped(registry, monkeypatch, change, has_model=has_model)

    first, second = lines(has_model=False)
    promotion = f"`defuse promote RUN --store {tmp_path}`"
    assert first == f"no version is in production: requests are answered with 503 until {promotion}"
    assert second.endswith(" ana: a change; no version is in production")
    (promoted,) = lines(has_model=True, production=3)
    assert promoted.endswith("; version 3 is in production")
    assert len(lines(has_model=False)) == 1


def test_a_registry_that_went_back_is_one_line_and_a_lost_one_is_one_warning(tmp_path, monkeypatch, caplog):
    registry = Registry(FolderStore(tmp_path))
    for action in ("first", "second"):
        registry.change(action, "ana", "", lambda state: {})
    lines = lines_until_stopped(
        registry,
        monkeypatch,
        lambda: registry.store.delete("changes/000002.json"),
        lambda: registry.store.delete("changes/000001.json"),
        lambda: None,
        lambda: None,
        lambda: registry.change("anew", "bo", "", lambda state: {}),
        has_model=True,
    )
    replaced = "the registry was restored from a backup or made again: the last change was number"
    assert [line for line in lines if replaced in line] == [
        f"{replaced} 2, and is number 1 now",
        f"{replaced} 1, and is number 1 now",
    ]
    assert [line.split(": ")[1] for line in lines[1::2]] == [
        f"{a}; no version is in production" for a in ("first", "anew")
    ]
    assert [record.getMessage() for record in caplog.records] == [
        f"the registry cannot be read: {tmp_path}/registry: the registry is gone; restore it, or promote a run with "
        f"`defuse promote RUN --store {tmp_path}`"
    ]
