"""A Label Studio server on this machine, for trying it out and for the tests.

Its files are below the user's cache: its own environment (`env`), its data with SQLite in WAL mode (`data`), a
log, and `server.json` with address, login and token, readable by the user alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import secrets
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from time import monotonic, sleep

from defuse_core.errors import InputError, ServiceError

VERSIONS = "label-studio>=1.23,<1.24"
NEWEST_PYTHON = (3, 13)  # it needs numpy below 2.3, which is not built for a later one
USERNAME = "admin@defuse.local"
REPORT_EVERY_S = 10
START_TIMEOUT_S = 300  # the first start migrates an empty database: some 30 s on two idle cores


@dataclass(frozen=True)
class LocalServer:
    """A server that `up` started: its address, and how to log in."""

    address: str
    port: int
    pid: int  # also of its process group
    username: str
    password: str = field(repr=False)
    token: str = field(repr=False)
    host: str = ""  # the machine that it was started on; empty once it was stopped

    def is_healthy(self) -> bool:
        """Whether it runs and reports that it is healthy."""
        with contextlib.closing(HTTPConnection("127.0.0.1", self.port, timeout=5.0)) as connection:
            try:
                connection.request("GET", "/health")
                return connection.getresponse().status == 200
            except (OSError, HTTPException):
                return False


class Installation:
    """The files of the local server: its environment below the user's cache, its data there or in `folder`.

    Raises InputError for a cache below a home folder that is not known.
    """

    def __init__(self, cache: Path, folder: Path | None = None) -> None:
        try:
            self.env = cache.expanduser() / "label-studio" / "env"
        except RuntimeError as error:
            raise InputError(
                f"{cache}: this machine knows no such home folder ({error}); set DEFUSE_CACHE, XDG_CACHE_HOME or HOME "
                "to a folder"
            ) from error
        self.folder = folder or self.env.parent
        self.python, self.program = self.env / "bin" / "python", self.env / "bin" / "label-studio"
        self.data = self.folder / "data"
        self.log = self.folder / "server.log"

    def is_installed(self) -> bool:
        """Whether it has these versions, a program that no power cut has emptied, and its Python, which can be gone."""
        try:
            versions, program = (self.env / ".installed").read_text(), self.program.read_text()
        except FileNotFoundError:
            return False
        return versions == VERSIONS and bool(program) and self.python.exists()

    def read_server(self) -> LocalServer | None:
        """Return the server that was started last, running or not. Raises InputError where its file cannot be read.

        Another login would not be that of the users in its data.
        """
        file = self.folder / "server.json"
        try:
            stored = file.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._inaccessible(error) from error
        # late: a first installation does without it, and `make test` begins with one
        from pydantic import TypeAdapter, ValidationError

        try:
            return TypeAdapter(LocalServer).validate_json(stored)
        except ValidationError as error:
            raise InputError(
                f"{file}: expected address and login of Label Studio, found something else; restore it, or move it and "
                f"{self.data} away to begin with an empty server"
            ) from error

    def write_server(self, server: LocalServer) -> None:
        """Store address, login and token so that only this user can read them."""
        target, new = self.folder / "server.json", self.folder / "server.json.new"
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as handle:
            json.dump(asdict(server), handle)
            handle.flush()
            os.fsync(handle.fileno())
        new.replace(target)  # the only copy of the login is never half written

    def expect_this_machine(self, server: LocalServer | None) -> None:
        """Raise InputError for a server of another machine that shares the folder: SQLite allows one at a time."""
        if server is not None and server.host not in ("", platform.node()):
            raise InputError(
                f"Label Studio in {self.folder} was started on {server.host}: if it runs there, end it there (`defuse "
                "label-studio down`), or set DEFUSE_CACHE to a folder of this machine; else make `host` empty in "
                f"{self.folder / 'server.json'}"
            )

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One install, start or stop at a time. Raises InputError where this user cannot write the folder."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle = (self.folder / ".lock").open("w")
        except OSError as error:
            raise self._inaccessible(error) from error
        with handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _inaccessible(self, error: OSError) -> InputError:
        return InputError(f"{self.folder}: {error.strerror}; set DEFUSE_CACHE to a folder that you can write")


def _silent(line: str) -> None:
    """Report no progress."""


def install(cache: Path, report: Callable[[str], None] = _silent) -> Installation:
    """Install the server in its own environment, once: about 1 GB and a minute.

    Raises ServiceError if pip fails, and InputError where a server runs in the environment to be replaced.
    """
    installation = Installation(cache)
    with installation.lock():
        if not installation.is_installed():
            known = installation.read_server()
            installation.expect_this_machine(known)
            if known is not None and _is_label_studio(known.pid):
                raise InputError(
                    f"Label Studio runs in {installation.env}, which has to be installed again; `defuse label-studio "
                    "down` ends it, then repeat this command"
                )
            if sys.version_info[:2] > NEWEST_PYTHON:
                newest = ".".join(map(str, NEWEST_PYTHON))
                raise InputError(
                    f"{VERSIONS} has no release for this Python; install Defuse with Python {newest}"
                )
            report(f"installing Label Studio in {installation.env}: about 1 GB, a minute")
            _run(sys.executable, "-m", "venv", "--clear", str(installation.env))
            _run(
                str(installation.env / "bin" / "pip"),
                "install",
                "--quiet",
                "--no-compile",  # of 11,000 files: a start compiles those that it imports, some quarter
                "--disable-pip-version-check",
                VERSIONS,
            )
            (installation.env / ".installed").write_text(VERSIONS)
    return installation


def up(cache: Path, port: int = 8080, report: Callable[[str], None] = _silent) -> LocalServer:
    """Return the running local server, installed and started first if necessary, once it is healthy.

    Raises ServiceError, InputError.
    """
    installation = Installation(cache)
    known = installation.read_server()
    if known is None or not _is_label_studio(known.pid):
        _expect_free(port)
        install(cache, report)
    with installation.lock():
        known = installation.read_server()
        if known is not None and _is_label_studio(known.pid):
            running = known.pid  # an `up` that was killed may have left it starting
            _wait_until_healthy(known, lambda: not _is_label_studio(running), installation.log, report)
            return known
        installation.expect_this_machine(known)
        report("starting Label Studio: some seconds, or about half a minute the first time")
        return start(installation, port, known, report)


def start(
    installation: Installation,
    port: int,
    known: LocalServer | None,
    report: Callable[[str], None] = _silent,
) -> LocalServer:
    """Start the server on loopback and return it once it is healthy.

    It keeps the login and token of `known`, an earlier start. Where this is interrupted, the server is stopped.
    """
    _expect_free(port)
    _prepare_database(installation.data)
    password, token = (
        (known.password, known.token) if known else (secrets.token_urlsafe(12), secrets.token_hex(20))
    )
    address = f"http://127.0.0.1:{port}"
    with installation.log.open("ab") as log:
        process = subprocess.Popen(
            [
                installation.python,  # the program names an old path of it where the folder was moved
                installation.program,
                "start",
                "--no-browser",
                "--internal-host",
                "127.0.0.1",
                "--port",
                str(port),
            ],
            env=_environment(installation, address, password, token),
            cwd=installation.data,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    server = LocalServer(address, port, process.pid, USERNAME, password, token, platform.node())
    try:
        installation.write_server(server)
        _wait_until_healthy(server, lambda: process.poll() is not None, installation.log, report)
    except BaseException:  # Ctrl-C, too: a second server on the same database would follow
        stop(server)
        raise
    return server


def down(cache: Path) -> bool:
    """Stop the local server; False if it was not running. Its projects and answers stay for the next `up`."""
    installation = Installation(cache)
    with installation.lock():
        server = installation.read_server()
        if server is None or not _is_label_studio(server.pid):
            installation.expect_this_machine(server)
            return False
        stop(server)
        installation.write_server(replace(server, host=""))
        return True


def stop(server: LocalServer) -> None:
    """End the server's process group and wait until it is gone and its port is free."""
    for end, patience_s in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, end)
        if _wait_until(
            lambda: not _is_label_studio(server.pid) and not _port_in_use(server.port), patience_s
        ):
            return


def running_server(cache: Path) -> LocalServer | None:
    server = Installation(cache).read_server()
    return server if server is not None and server.is_healthy() and _is_label_studio(server.pid) else None


def _expect_free(port: int) -> None:
    if _port_in_use(port):
        raise InputError(f"port {port} of this machine is in use; choose another with --port")


def _environment(installation: Installation, address: str, password: str, token: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}
    return kept | {
        "LABEL_STUDIO_BASE_DATA_DIR": str(installation.data),
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
        "TASK_LOCK_TTL": "3600",  # seconds for which who opens an image keeps it from others, else a day
    }


def _prepare_database(data: Path) -> None:
    """Put SQLite in WAL mode, before the server opens it: otherwise it accepts only 4 to 9 answers a second."""
    data.mkdir(parents=True, exist_ok=True, mode=0o700)
    with contextlib.closing(sqlite3.connect(data / "label_studio.sqlite3")) as database:
        database.execute("pragma journal_mode=wal")


def _wait_until_healthy(
    server: LocalServer, has_ended: Callable[[], bool], log: Path, report: Callable[[str], None]
) -> None:
    """Return once the server is healthy. Raises ServiceError, after stopping it, where it is not in START_TIMEOUT_S."""
    for waited_s in range(0, START_TIMEOUT_S, REPORT_EVERY_S):
        if _wait_until(lambda: server.is_healthy() or has_ended(), REPORT_EVERY_S):
            break
        report(f"still starting after {waited_s + REPORT_EVERY_S} s; its log is {log}")
    if has_ended() or not server.is_healthy():
        stop(server)
        raise ServiceError(f"Label Studio did not start on {server.address}; its log is {log}")


def _wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    end = monotonic() + timeout_s
    while not condition():
        if monotonic() >= end:
            return False
        sleep(0.2)
    return True


def _port_in_use(port: int) -> bool:
    with contextlib.closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _is_label_studio(pid: int) -> bool:
    """Whether `pid` is a running Label Studio server, not another program that reuses the number."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    if Path("/proc/self/cmdline").exists():  # slim containers have no `ps`
        try:
            # empty for a process that has ended
            return b"label-studio" in Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False
    found = subprocess.run(
        ["ps", "-o", "stat=,command=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return "label-studio" in found.stdout and not found.stdout.startswith("Z")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        cause = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise ServiceError(
            f"installing Label Studio failed: `{' '.join(command[:3])} ...` failed with: {cause[0]}"
        )
