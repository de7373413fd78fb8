"""Workers of Ray that need not import torch and Defuse: each is forked from a process that has done so.

Ray starts a worker by a command. Within `forked_workers()` that command is `start_forked_worker.py`, which asks the
process of `serve` for the worker. The worker is Ray's own from then on, and imports Ray as ever. Not so the workers of
a Ray that a command of the tests starts in a process of its own: unless it calls `fork_workers`, these start as they do
at users'.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import start_forked_worker

# Without Ray, whose C++ part reads the environment of a worker when it is imported.
IMPORTED = (
    "colorful",
    "defuse_core.pipeline",
    "defuse_core.report.figures",
    "fastapi",
    "filelock",
    "fsspec",
    "google.protobuf.descriptor_pb2",
    "hypothesis",
    "jsonschema",
    "moto.server",
    "opentelemetry.sdk.metrics",
    "pandas",
    "prometheus_client",
    "pyarrow.fs",
    "pyarrow.parquet",
    "requests",
    "services.serving.model",
    "sklearn.mixture",
    "tenacity",
    "torch._dynamo",
    "torch.export._trace",
    "torchvision",
    "uvicorn",
)


POSSIBLE = sys.platform == "linux"  # elsewhere torch may not be forked, or the kind of socket is unknown


@contextlib.contextmanager
def fork_server() -> Iterator[None]:
    """Start the process of `serve` for this process and those that it starts inside."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="w"))
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(path := f"{folder}/workers")
            listener.listen(100)
            command = [sys.executable, "-m", "tests.forked_workers", str(listener.fileno())]
            stack.enter_context(
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,  # whose end, also by this process's death, ends `serve`
                    pass_fds=[listener.fileno()],
                    cwd=Path(__file__).parents[1],
                )
            )
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv(start_forked_worker.ADDRESS, path)
        yield


@contextlib.contextmanager
def forked_workers() -> Iterator[None]:
    """Have the workers of each Ray that this process starts inside forked."""
    if not POSSIBLE:
        yield
        return
    from ray._private import ray_constants

    from cluster.ray_compat import without_unused_processes

    with contextlib.ExitStack() as stack:
        if start_forked_worker.ADDRESS not in os.environ:  # else that of `make test` serves all
            stack.enter_context(fork_server())
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(ray_constants, "SETUP_WORKER_FILENAME", start_forked_worker.__file__)
        stack.enter_context(without_unused_processes())
        yield


def serve(listener: socket.socket) -> None:
    """Fork a worker for each that asks for one, until standard input ends."""
    gc.disable()  # nothing that is imported is garbage
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a worker that looked for garbage there would copy it all
    gc.enable()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # else each worker stays as a zombie
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, whose end ends this process
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        asking, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            become_worker(asking)
            return
        asking.close()


def become_worker(asking: socket.socket) -> None:
    """Run the command that was asked for as this process, with its environment, folder and streams."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    streams = start_forked_worker.STREAMS
    asked, passed, _, _ = socket.recv_fds(asking, start_forked_worker.LONGEST, len(streams))
    sys.argv, environment, folder, own_group = json.loads(asked)
    if own_group:
        os.setpgrp()
    for stream, own in zip(passed, streams, strict=True):
        os.dup2(stream, own)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
