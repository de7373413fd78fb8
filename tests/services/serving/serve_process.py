"""`defuse serve` as a process of its own, and the sockets of processes as /proc shows them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.ports import free_port
from tests.waiting import wait_until

TOKEN = "a-long-secret"
STOP_S = 200.0  # for the end of a whole Ray on a busy machine; a controller that has gone is waited for twice as long
ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class ServeProcess:
    """A running `defuse serve` that answers."""

    process: subprocess.Popen[bytes]
    port: int
    http: httpx.Client  # without the token
    log: Path

    def output(self) -> str:
        return self.log.read_text()

    def stop(self) -> int:
        """Return the exit code after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_S)

    def stop_group(self) -> int:
        """Return the exit code after SIGTERM to Ray's processes too, as systemd and `timeout` send it."""
        os.killpg(self.process.pid, signal.SIGTERM)
        return self.process.wait(STOP_S)


@contextlib.contextmanager
def serve_process(
    folder: Path, *arguments: str, forked: bool = False, **environment: str
) -> Iterator[ServeProcess]:
    """Run `defuse serve ARGUMENTS` on a free port of loopback, with a token and Ray's authentication.

    With `forked`, its workers are those of `forked_workers.py`, else as at users'.
    """
    port, log = free_port(), folder / "log"
    code = f"from cluster import ray_compat; ray_compat.SERVE_SHUTDOWN_S = {2 * STOP_S}; "
    code += "from services.cli import main; main()"
    if forked:
        code = f"from tests.start_forked_worker import fork_workers; fork_workers(); {code}"
    command = [sys.executable, "-c", code, "serve", *arguments]
    variables = {**os.environ, "DEFUSE_SERVE_TOKEN": TOKEN, "PYTHONPATH": str(ROOT), **environment}
    for name in {"RAY_ADDRESS", "RAY_AUTH_MODE"} - environment.keys():
        variables.pop(name, None)
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            env=variables,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    running = ServeProcess(process, port, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60), log)
    try:
        wait_until(lambda: is_ready(running), running.output, within_s=240, every_s=0.2)
        yield running
    finally:
        if process.poll() is None:
            running.stop()


def is_ready(running: ServeProcess) -> bool:
    assert running.process.poll() is None, running.output()
    with contextlib.suppress(httpx.HTTPError):
        return running.http.get("/readyz").status_code in (200, 503) and "serving on" in running.output()
    return False


def listening_addresses(port: int) -> set[str]:
    """Return the addresses, in the hexadecimal notation of /proc, of the sockets that listen on `port`."""
    return {address for address, at, _ in _listening_sockets() if at == port}


def listening_ports(pid: int) -> set[tuple[str, int]]:
    """Return address and port of the TCP sockets that a process listens on; none of a process that has ended."""
    inodes = set()
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if found := re.fullmatch(r"socket:\[(\d+)\]", str(descriptor.readlink())):
                    inodes.add(found[1])
    return {(address, port) for address, port, inode in _listening_sockets() if inode in inodes}


def listening(command: str, port: int) -> list[int]:
    """Return the processes with `command` in their command line that listen on `port`."""
    return [pid for pid in processes_with(command) if any(at == port for _, at in listening_ports(pid))]


def _listening_sockets() -> Iterator[tuple[str, int, str]]:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            row = line.split()
            if row[3] == "0A":
                address, port = row[1].split(":")
                yield address, int(port, 16), row[9]


def processes_with(text: str) -> list[int]:
    """Return the processes whose command line contains `text`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if text.encode() in (folder / "cmdline").read_bytes().replace(b"\0", b" "):
                found.append(int(folder.name))
    return found
