"""S3 servers for tests, each a process of its own."""

from __future__ import annotations

import contextlib
import functools
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import botocore.loaders

from tests.ports import free_port
from tests.waiting import wait_until

BIN = Path(sys.executable).parent
# In place of botocore.session.create_loader: a client reads the description of its service, for most of a second, where
# it is not in its loader.
one_loader = functools.cache(botocore.loaders.create_loader)
# moto looks at a condition and then writes, in threads: as in S3 no other request may come in between, so threads take
# turns only where they wait
MOTO = "import sys; sys.setswitchinterval(60); from moto.server import main; main()"


@contextlib.contextmanager
def moto_server() -> Iterator[str]:
    """Run moto's S3 and yield its address. It heeds conditional writes and checks no keys."""
    port = free_port()
    with _serving([sys.executable, "-c", MOTO, "--port", str(port)], port):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def rclone_server(folder: Path, key: str, secret: str, port: int | None = None) -> Iterator[str]:
    """Serve `folder` as S3 and yield its address: buckets are its folders. It checks keys and ignores conditions."""
    port = port or free_port()
    command = [
        str(BIN / "rclone"),
        "serve",
        "s3",
        "--auth-key",
        f"{key},{secret}",
        "--addr",
        f"127.0.0.1:{port}",
        str(folder),
    ]
    with _serving(command, port):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def _serving(command: list[str], port: int) -> Iterator[None]:
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _await(server, port)
            yield
        finally:
            server.kill()


def _await(server: subprocess.Popen[bytes], port: int) -> None:
    def answers() -> bool:
        assert server.poll() is None, f"{server.args!r} ended with {server.returncode}"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
            return True
        return False

    wait_until(answers, lambda: f"{server.args!r} does not answer on port {port}")
