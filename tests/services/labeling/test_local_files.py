"""The local server's files and health, without a start of it."""

from __future__ import annotations

import platform
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from label_studio_live import digits_gallery, review_run

from defuse_core.errors import InputError, ServiceError
from defuse_core.protocols import silent
from services.labeling.local_server import (
    VERSIONS,
    Installation,
    LocalServer,
    down,
    install,
    running_server,
    up,
)
from services.labeling.records import read_state, write_state
from services.labeling.simulate import simulate

SERVER = LocalServer("http://127.0.0.1:1", 1, 2**22 + 1, "admin@defuse.local", "password", "token")
THROUGH_SH = "/bin/sh\n'''exec' \"{}\" \"$0\" \"$@\"\n' '''"  # pip's first line where the path has a space


@pytest.fixture
def home(tmp_path):
    made = Installation(tmp_path)
    made.env.mkdir(parents=True)
    return made


def write_installation(home):
    """Write what an installation ends with."""
    home.program.parent.mkdir()
    home.program.write_text("import label_studio")
    home.python.symlink_to(sys.executable)
    (home.env / ".installed").write_text(VERSIONS)


def test_an_older_server_is_replaced_and_the_same_one_is_left_alone(home, tmp_path, monkeypatch):
    write_installation(home)
    monkeypatch.setattr(sys, "executable", "false")  # no environment can be made
    assert install(tmp_path).env == home.env
    (home.env / ".installed").write_text("label-studio>=1.22,<1.23")
    with pytest.raises(ServiceError, match="installing Label Studio failed"):
        install(tmp_path)


def test_a_server_whose_python_is_gone_is_installed_again(home, tmp_path, monkeypatch):
    write_installation(home)
    monkeypatch.setattr(sys, "executable", "false")
    assert install(tmp_path).env == home.env
    home.python.unlink()
    home.python.symlink_to(tmp_path / "removed")
    with pytest.raises(ServiceError, match="installing Label Studio failed"):
        install(tmp_path)


def test_nothing_is_installed_below_a_server_that_runs(home, tmp_path, monkeypatch):
    monkeypatch.setattr("services.labeling.local_server._is_label_studio", lambda pid: True)
    monkeypatch.setattr("services.labeling.local_server._wait_until_healthy", lambda *_: None)
    home.write_server(SERVER)
    assert up(tmp_path) == SERVER
    with pytest.raises(InputError, match=r"runs in .*env, which has to be installed again; `defuse label"):
        install(tmp_path)


def test_a_program_that_a_power_cut_has_emptied_is_installed_again(home):
    write_installation(home)
    assert home.is_installed()
    home.program.write_text("")
    assert not home.is_installed()


def test_the_login_is_readable_by_its_user_alone(home):
    assert home.read_server() is None
    home.write_server(SERVER)
    assert home.read_server() == SERVER
    assert stat.S_IMODE((home.folder / "server.json").stat().st_mode) == 0o600


@pytest.mark.parametrize("text", ["", "{}"], ids=["after a power cut", "edited"])
def test_a_server_whose_login_cannot_be_read_is_not_started_with_another_one(home, tmp_path, text):
    write_installation(home)
    (home.folder / "server.json").write_text(text)
    with pytest.raises(
        InputError, match=r"server\.json: expected address and login .*; restore it, or move it and"
    ):
        up(tmp_path)


@pytest.mark.parametrize("step", ["json.dump", "os.fsync"])
def test_a_login_that_cannot_be_written_leaves_the_one_that_is_there(home, monkeypatch, step):
    home.write_server(SERVER)

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(f"services.labeling.local_server.{step}", full)
    with pytest.raises(OSError, match="no space"):
        home.write_server(replace(SERVER, port=2))
    assert home.read_server() == SERVER


@pytest.mark.parametrize("command", [up, down])
def test_a_server_that_another_machine_started_in_a_shared_folder_is_neither_started_nor_taken_for_stopped(
    home, tmp_path, monkeypatch, command
):
    write_installation(home)
    monkeypatch.setattr("services.labeling.local_server.start", lambda *_: SERVER)
    home.write_server(replace(SERVER, host="login-2"))
    with pytest.raises(InputError, match="was started on login-2: if it runs there, end it there"):
        command(tmp_path)
    for host in ("", platform.node()):
        home.write_server(replace(SERVER, host=host))
        assert command(tmp_path) == (SERVER if command is up else False)


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (500, False)])
def test_a_server_runs_if_it_says_that_it_is_healthy(home, tmp_path, status, healthy):
    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Log nothing."""

    waiting = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()", "label-studio"]
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), Health) as listener,
        subprocess.Popen(waiting, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process,
    ):
        process.stdout.readline()
        threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.05}).start()
        port = listener.server_port
        begun = LocalServer(f"http://127.0.0.1:{port}", port, process.pid, "admin", "password", "token")
        home.write_server(begun)
        assert running_server(tmp_path) == (begun if healthy else None)
        listener.shutdown()
        process.stdin.close()
    assert not begun.is_healthy() and running_server(tmp_path) is None


@pytest.mark.parametrize("state", [{}, {"project": 5, "address": "https://labels.example.org"}])
def test_only_a_review_on_the_local_server_is_simulated(tmp_path, state):
    gallery = digits_gallery()
    run = review_run(tmp_path, gallery)
    write_state(run.store, replace(read_state(run.store, gallery), **state))
    with pytest.raises(InputError, match="is not in the local Label Studio"):
        simulate(SimpleNamespace(run=run), gallery, SERVER, SimpleNamespace(), silent)
    assert not read_state(run.store, gallery).simulated
