"""The local server: one command starts it with its data, one stops it."""

from __future__ import annotations

import contextlib
import sqlite3
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner
from label_studio_live import digits_gallery, live_home, review_run, settings_for

from defuse_core.errors import InputError, ServiceError
from services.cli import defuse
from services.labeling.annotators import LabelStudioAnnotators
from services.labeling.local_server import (
    Installation,
    _is_label_studio,
    _run,
    down,
    install,
    running_server,
    start,
    up,
)
from services.labeling.records import choice_result
from tests.conftest import ROOT
from tests.ports import free_port


@pytest.fixture
def cache(server, tmp_path):
    """A cache of this test's own with a stopped server: installed, and with a copy of the session's data."""
    home = Installation(tmp_path)
    home.data.mkdir(parents=True)
    home.env.symlink_to(live_home().env)
    with (
        contextlib.closing(sqlite3.connect(live_home().data / "label_studio.sqlite3")) as source,
        contextlib.closing(sqlite3.connect(home.data / "label_studio.sqlite3")) as copy,
    ):
        source.backup(copy)
    home.write_server(replace(server, port=free_port(), address="http://127.0.0.1:1", pid=2**22 + 1))
    return tmp_path


def test_up_starts_it_in_wal_mode_and_down_keeps_what_is_in_it(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("DEFUSE_CACHE", str(cache))
    port = str(free_port())
    try:
        first = CliRunner().invoke(defuse, ["label-studio", "up", "--port", port])
        assert (
            f"Label Studio runs at http://127.0.0.1:{port}" in first.output
            and "with password" in first.output
        )
        assert "starting Label Studio: some seconds" in first.output
        local = running_server(cache)
        assert local is not None and up(cache, int(port)) == local
        gallery = digits_gallery(labels=(8,), images=1)
        annotators = LabelStudioAnnotators(review_run(tmp_path / "runs", gallery), settings_for(local))
        number = annotators.push(gallery).number
        made, (task,) = annotators.client.project(number), annotators.client.tasks(number)
        answered = httpx.post(
            f"{local.address}/api/tasks/{task.id}/annotations/",
            json={"result": [choice_result("label", "image", "8")]},
            headers={"Authorization": f"Token {local.token}"},
            timeout=60,
            trust_env=False,
        )
        assert down(cache) and running_server(cache) is None and not down(cache)
        again = up(cache, int(port))
        assert again.token == local.token and again.pid != local.pid
        assert made is not None and annotators.client.project(number) == made
        assert annotators.push(gallery).number == number
        (task,) = annotators.client.tasks(number)
        assert [annotation.id for annotation in task.annotations] == [answered.json()["id"]]
    finally:
        CliRunner().invoke(defuse, ["label-studio", "down"])
    with contextlib.closing(sqlite3.connect(Installation(cache).data / "label_studio.sqlite3")) as database:
        assert database.execute("pragma journal_mode").fetchone() == ("wal",)
    assert stat.S_IMODE((Installation(cache).folder / "server.json").stat().st_mode) == 0o600


def test_a_taken_port_is_named(cache, server):
    with pytest.raises(InputError, match=f"port {server.port} of this machine is in use"):
        up(cache, server.port)


def test_a_taken_port_is_named_before_anything_is_installed(server, tmp_path):
    with pytest.raises(InputError, match=f"port {server.port} of this machine is in use"):
        up(tmp_path, server.port)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cache", ["/proc/cache", "/etc/passwd"])
@pytest.mark.parametrize("command", ["up", "down"])
def test_a_cache_that_cannot_be_written_is_named(command, cache, monkeypatch):
    monkeypatch.setenv("DEFUSE_CACHE", cache)
    ended = CliRunner().invoke(
        defuse, ["label-studio", command, *["--port", str(free_port())] * (command == "up")]
    )
    assert isinstance(ended.exception, InputError)
    assert str(ended.exception).startswith(f"{cache}/label-studio: ")
    assert str(ended.exception).endswith("; set DEFUSE_CACHE to a folder that you can write")


def test_a_server_that_does_not_start_leads_to_its_log(cache):
    program = cache / "broken"
    program.write_text("echo no >&2; exit 1")
    home = Installation(cache)
    home.python, home.program = Path("/bin/sh"), program
    with pytest.raises(ServiceError, match=f"its log is {home.log}"):
        start(home, free_port(), None)


def test_a_slow_start_is_reported_while_it_lasts(cache, monkeypatch):
    monkeypatch.setattr("services.labeling.local_server.REPORT_EVERY_S", 1)
    program = cache / "slow"
    program.write_text(f"until [ -e {cache}/end ]; do sleep 0.1; done; exit 1")
    installation, lines = Installation(cache), []
    installation.python, installation.program = Path("/bin/sh"), program

    def report(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            (cache / "end").touch()

    with pytest.raises(ServiceError, match="did not start"):
        start(installation, free_port(), None, report)
    assert lines[:2] == [f"still starting after {n} s; its log is {installation.log}" for n in (1, 2)]


def test_an_interrupted_start_leaves_no_server(cache, monkeypatch):
    monkeypatch.setattr("services.labeling.local_server.REPORT_EVERY_S", 1)
    program = cache / "label-studio-program"
    program.write_text("sleep 600")
    installation = Installation(cache)
    installation.python, installation.program = Path("/bin/sh"), program

    def interrupt(line: str) -> None:
        assert _is_label_studio(installation.read_server().pid)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(installation, free_port(), None, interrupt)
    assert not _is_label_studio(installation.read_server().pid)


STARTING = """
import http.server, sys, time
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
print(flush=True)
sys.stdin.readline()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), Health).serve_forever()
"""


def test_up_waits_for_a_server_that_is_starting(cache, server, monkeypatch):
    """As one whose first `up` was killed: a second server would use the same database."""
    monkeypatch.setattr("services.labeling.local_server.REPORT_EVERY_S", 1)
    port, installation = free_port(), Installation(cache)
    command = [sys.executable, "-c", STARTING, "label-studio", str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        begun = replace(server, port=port, address=f"http://127.0.0.1:{port}", pid=process.pid)
        installation.write_server(begun)

        def report(line: str) -> None:
            assert line.startswith("still starting")
            print(file=process.stdin, flush=True)

        try:
            assert up(cache, port, report) == begun
        finally:
            process.kill()


def test_a_server_is_recognised_without_the_program_ps(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    waiting = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
    for name, recognised in (("label-studio", True), ("other", False)):
        with subprocess.Popen([*waiting, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            process.stdout.readline()  # it runs
            assert _is_label_studio(process.pid) is recognised
            process.stdin.close()
            process.wait()
            assert not _is_label_studio(process.pid)


def test_a_python_that_is_too_new_is_named_before_anything_is_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 14, 0, "final", 0))
    with pytest.raises(InputError, match="has no release for this Python; install Defuse with Python 3.13"):
        install(tmp_path)
    assert not Installation(tmp_path).env.exists()


def test_a_failed_installation_says_what_pip_said():
    with pytest.raises(ServiceError, match=r"installing Label Studio failed: .* failed with: no such thing"):
        _run("sh", "-c", "echo no such thing >&2; exit 1")


def test_the_installation_is_imported_before_any_package_is_there():
    """As `make test` does, which installs Label Studio beside its own environment."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import services.labeling.local_server, services.settings"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)
