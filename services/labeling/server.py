"""A Label Studio server on this machine, for trying it out and for the tests.

It lives below the user's cache: its own environment (`env`), its data with SQLite in WAL mode (`data`), a
log, and `server.json` with address, login and token, readable by the user alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from defuse_core.errors import InputError, ServiceError

VERSIONS = "label-studio>=1.23,<1.24"
USERNAME = "admin@defuse.local"
START_TIMEOUT_S = 300.0  # the first start migrates an empty database: some 30 s on two idle cores


@dataclass(frozen=True)
class LocalServer:
    """A server that `up` made: where it is, and how to log in."""

    address: str
    port: int
    pid: int  # also of its process group
    username: str
    password: str = field(repr=False)
    token: str = field(repr=False)

    def answers(self) -> bool:
        """Whether it is up and healthy."""
        with contextlib.closing(HTTPConnection("127.0.0.1", self.port, timeout=5.0)) as connection:
            try:
                connection.request("GET", "/health")
                return connection.getresponse().status == 200
            except (OSError, HTTPException):
                return False


class Home:
    """Where the local server lies: its environment below the user's cache, its data there or in `folder`."""

    def __init__(self, cache: Path, folder: Path | None = None) -> None:
        self.env = cache.expanduser() / "label-studio" / "env"
        self.folder = folder or self.env.parent
        self.program = self.env / "bin" / "label-studio"
        self.data = self.folder / "data"
        self.log = self.folder / "server.log"

    def recorded(self) -> LocalServer | None:
        """Return the server that was started last, running or not."""
        try:
            return LocalServer(**json.loads((self.folder / "server.json").read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def record(self, server: LocalServer) -> None:
        """Keep address, login and token where only this user reads them."""
        target = self.folder / "server.json"
        with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as handle:
            json.dump(asdict(server), handle)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One install, start or stop at a time."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self.folder / ".lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def install(cache: Path) -> Home:
    """Install the server in its own environment, once: about 1 GB and a minute.

    Raises ServiceError if pip fails.
    """
    home = Home(cache)
    done = home.env / ".installed"
    with home.lock():
        if not (done.is_file() and done.read_text() == VERSIONS):
            _call(sys.executable, "-m", "venv", "--clear", str(home.env))
            _call(
                str(home.env / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", VERSIONS
            )
            done.write_text(VERSIONS)
    return home


def up(cache: Path, port: int = 8080) -> LocalServer:
    """Return the running local server, installed and started first where it is not.

    Raises ServiceError, InputError.
    """
    home = install(cache)
    with home.lock():
        known = home.recorded()
        if known is not None and known.answers() and _is_ours(known.pid):
            return known
        return start(home, port, known)


def start(home: Home, port: int, known: LocalServer | None, **environment: str) -> LocalServer:
    """Start the server on loopback and return it once it is healthy.

    `known` keeps login and token of a former start.
    """
    if _taken(port):
        raise InputError(f"port {port} of this machine is taken; choose another with --port")
    _prepare_database(home.data)
    password, token = (
        (known.password, known.token) if known else (secrets.token_urlsafe(12), secrets.token_hex(20))
    )
    address = f"http://127.0.0.1:{port}"
    with home.log.open("ab") as log:
        process = subprocess.Popen(
            [home.program, "start", "--no-browser", "--internal-host", "127.0.0.1", "--port", str(port)],
            env=_environment(home, address, password, token) | environment,
            cwd=home.data,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    server = LocalServer(address, port, process.pid, USERNAME, password, token)
    home.record(server)
    _wait_until_healthy(server, process, home.log)
    return server


def down(cache: Path) -> bool:
    """Stop the local server; False if it was not running. Its projects and answers stay for the next `up`."""
    home = Home(cache)
    with home.lock():
        server = home.recorded()
        if server is None or not _is_ours(server.pid):
            return False
        stop(server)
        return True


def stop(server: LocalServer) -> None:
    """End the server's process group and wait until it is gone and its port is free."""
    for end, patience_s in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, end)
        limit = time.monotonic() + patience_s
        while time.monotonic() < limit:
            if not _is_ours(server.pid) and not _taken(server.port):
                return
            time.sleep(0.1)


def running(cache: Path) -> LocalServer | None:
    """Return the local server if it is up."""
    server = Home(cache).recorded()
    return server if server is not None and server.answers() and _is_ours(server.pid) else None


def _environment(home: Home, address: str, password: str, token: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}
    return kept | {
        "LABEL_STUDIO_BASE_DATA_DIR": str(home.data),
        "LABEL_STUDIO_HOST": address,
        "LABEL_STUDIO_USERNAME": USERNAME,
        "LABEL_STUDIO_PASSWORD": password,
        "LABEL_STUDIO_USER_TOKEN": token,
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "LABEL_STUDIO_DISABLE_SIGNUP_WITHOUT_LINK": "true",
        "COLLECT_ANALYTICS": "0",
        "SENTRY_DSN": "",
        "FRONTEND_SENTRY_DSN": "",
        "LATEST_VERSION_CHECK": "0",
    }


def _prepare_database(data: Path) -> None:
    """Put SQLite in WAL mode, before the server opens it: else it takes but 4-9 answers a second."""
    data.mkdir(parents=True, exist_ok=True, mode=0o700)
    with contextlib.closing(sqlite3.connect(data / "label_studio.sqlite3")) as database:
        database.execute("pragma journal_mode=wal")


def _wait_until_healthy(server: LocalServer, process: subprocess.Popen[bytes], log: Path) -> None:
    limit = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < limit:
        if server.answers():
            return
        if process.poll() is not None:
            break
        time.sleep(0.25)
    stop(server)
    raise ServiceError(f"Label Studio did not start on {server.address}; its log is {log}")


def _taken(port: int) -> bool:
    with contextlib.closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _is_ours(pid: int) -> bool:
    """Whether `pid` is a running Label Studio server, not another program that took over the number."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    found = subprocess.run(
        ["ps", "-o", "stat=,command=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return "label-studio" in found.stdout and not found.stdout.startswith("Z")


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        cause = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise ServiceError(f"installing Label Studio failed: `{' '.join(command[:3])} ...` said: {cause[0]}")
