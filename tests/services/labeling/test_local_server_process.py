"""What is given to the program of the local server, and that nothing of it is left: with programs of a few lines."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from defuse_core.errors import ServiceError
from services.labeling import local_server
from services.labeling.local_server import (
    Installation,
    LocalServer,
    _is_label_studio,
    _port_in_use,
    running_server,
    start,
    stop,
)
from tests.ports import free_port
from tests.waiting import wait_until

KNOWN = LocalServer("http://127.0.0.1:1", 1, 2**22 + 1, "admin", "own password", "own token")
Program = Callable[[str], Installation]


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """Return program(script): an installation whose server is this shell script."""

    def written(script: str) -> Installation:
        installation = Installation(tmp_path)
        installation.folder.mkdir(parents=True)
        installation.python, installation.program = Path("/bin/sh"), tmp_path / "label-studio-program"
        installation.program.write_text(script)
        return installation

    return written


def interrupt(line: str) -> None:
    raise KeyboardInterrupt


def group_of(server: LocalServer) -> bool:
    """Whether any process of the server's group is left. One that has ended may wait for the machine's init."""
    try:
        os.killpg(server.pid, 0)
    except ProcessLookupError:
        return False
    if sys.platform != "linux":
        return True
    states = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # of a process that ends meanwhile
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
            states += [state] if int(group) == server.pid else []
    return any(state != "Z" for state in states)


def test_the_program_gets_the_login_and_the_data_folder_but_no_secret_of_the_user(
    program: Program, monkeypatch: pytest.MonkeyPatch
):
    installation = program(
        'pwd > "$LABEL_STUDIO_BASE_DATA_DIR/where"; env > env; echo "$@" > arguments; exit 1'
    )
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of the user")
    port = free_port()
    with pytest.raises(ServiceError, match="did not start"):
        start(installation, port, KNOWN)
    data = installation.data
    assert (data / "where").read_text().strip() == str(data)
    given = dict(line.split("=", 1) for line in (data / "env").read_text().splitlines())
    assert (
        given["LABEL_STUDIO_PASSWORD"] == "own password" and given["LABEL_STUDIO_USER_TOKEN"] == "own token"
    )
    assert given["LABEL_STUDIO_HOST"] == f"http://127.0.0.1:{port}"
    assert "AWS_SECRET_ACCESS_KEY" not in given
    arguments = (data / "arguments").read_text().split()
    assert arguments == ["start", "--no-browser", "--internal-host", "127.0.0.1", "--port", str(port)]
    kept = installation.read_server()
    assert kept is not None and (kept.password, kept.token, kept.port) == ("own password", "own token", port)


def test_each_process_that_the_program_started_is_ended(program: Program, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(local_server, "REPORT_EVERY_S", 1)
    installation = program("sleep 60 & sleep 61")
    with pytest.raises(KeyboardInterrupt):
        start(installation, free_port(), None, interrupt)
    server = installation.read_server()
    assert server is not None
    wait_until(lambda: not group_of(server), lambda: "a process of the group is left", within_s=20)


def test_a_program_that_does_not_end_when_asked_is_killed(program: Program, monkeypatch: pytest.MonkeyPatch):
    wait = local_server._wait_until
    monkeypatch.setattr(local_server, "REPORT_EVERY_S", 1)
    monkeypatch.setattr(local_server, "_wait_until", lambda holds, timeout_s: wait(holds, min(timeout_s, 1)))
    installation = program("trap '' TERM; while :; do sleep 0.1; done")
    with pytest.raises(KeyboardInterrupt):
        start(installation, free_port(), None, interrupt)
    server = installation.read_server()
    assert server is not None and not _is_label_studio(server.pid)


HOLDS_ITS_PORT = """
import signal, socket, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), sys.exit()))
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
time.sleep(600)
"""


def test_a_stopped_server_has_left_its_port(
    program: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(local_server, "REPORT_EVERY_S", 1)
    monkeypatch.setattr(LocalServer, "is_healthy", lambda server: False)
    (tmp_path / "child.py").write_text(HOLDS_ITS_PORT)
    port = free_port()
    installation = program(f"{sys.executable} {tmp_path}/child.py {port} & wait")

    def interrupt_once_it_listens(line: str) -> None:
        wait_until(lambda: _port_in_use(port))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(installation, port, None, interrupt_once_it_listens)
    assert not _port_in_use(port)


def test_stopping_a_server_that_is_gone_does_nothing() -> None:
    stop(replace(KNOWN, port=free_port()))


def test_another_program_that_has_the_number_of_the_server_is_not_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(LocalServer, "is_healthy", lambda server: True)
    Installation(tmp_path).folder.mkdir(parents=True)
    Installation(tmp_path).write_server(replace(KNOWN, pid=os.getpid()))
    assert running_server(tmp_path) is None


def test_one_install_start_or_stop_waits_for_another(tmp_path: Path) -> None:
    inside, entered = Installation(tmp_path), threading.Event()

    def enter() -> None:
        with Installation(tmp_path).lock():
            entered.set()

    waiting = threading.Thread(target=enter)
    with inside.lock():
        waiting.start()
        assert not entered.wait(0.3)
    assert entered.wait(60)
    waiting.join()
