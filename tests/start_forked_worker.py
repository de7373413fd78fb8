"""The command by which Ray starts a worker within `forked_workers()`: it has one forked, and ends with it."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

ADDRESS = "DEFUSE_TESTS_WORKERS"  # the environment variable with the path of the socket to ask at
CONTEXT = "--serialized-runtime-env-context="
STREAMS = (0, 1, 2)
LONGEST = 200_000  # bytes of arguments, environment and folder


def fork_workers() -> None:
    """Have the workers of each Ray that this process starts forked, where it is told of a process that forks."""
    if ADDRESS in os.environ:
        from ray._private import ray_constants

        ray_constants.SETUP_WORKER_FILENAME = __file__


def main(words: list[str]) -> None:
    """Start the worker of these arguments of Ray."""
    context = next((json.loads(w.removeprefix(CONTEXT)) for w in words if w.startswith(CONTEXT)), {})
    variables = context.pop("env_vars", {})
    if any(value not in (None, [], sys.executable) for value in context.values()):  # a folder of its own, say
        from ray._private.workers import setup_worker

        os.execv(sys.executable, [sys.executable, setup_worker.__file__, *words])
    os.environ.update(variables)
    # Ray starts a worker in a group of its own: a raylet kills its worker's group, where that is not its own
    ask_for([word for word in words if not word.startswith((CONTEXT, "--language="))], own_group=True)


def ask_for(words: list[str], *, own_group: bool) -> None:
    """Have a process forked that runs a file with arguments, `words`, in place of this one, and wait for its end.

    It has the environment, folder and streams of this process, and its group unless `own_group` gives it one.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(os.environ[ADDRESS])
        asked = json.dumps([words, dict(os.environ), str(Path.cwd()), own_group])
        socket.send_fds(server, [asked.encode()], STREAMS)
        server.recv(1)  # returns when that process has ended


if __name__ == "__main__":
    main(sys.argv[1:])
