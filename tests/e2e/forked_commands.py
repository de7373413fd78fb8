"""Commands and calls in processes that need not import torch: they are forked from a process that has done so."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

IMPORTED = [
    "defuse_core.local",
    "defuse_core.pipeline",
    "defuse_core.report.html",
    "services.cli",
    "sklearn.mixture",
    "torch._dynamo",
    "tests.e2e.frozen",  # the last
]
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(IMPORTED)


def start(words: Sequence[str], log: Path, *before: Callable[[], object]) -> BaseProcess:
    """Start `defuse WORDS` after the calls `before`."""
    return start_calls(log, *before, partial(_command, words))


def start_calls(log: Path, *calls: Callable[[], object]) -> BaseProcess:
    """Start a process in a session of its own, with its output in `log`, that makes these calls."""
    process = context.Process(target=_run, args=(log, dict(os.environ), calls), daemon=True)
    process.start()
    return process


def no_figures() -> None:
    """Write the report without its figures."""
    from defuse_core.report import figures

    figures.draw_figures = lambda *_: {}


def hasty_leases() -> None:
    """Take a bucket over from whoever is silent for 3 s."""
    from services.storage import lease

    lease.BEAT_S, lease.LEASE_S = 0.5, 3.0


def _command(words: Sequence[str]) -> None:
    from services.cli import main

    sys.argv = ["defuse", *words]
    main()


def _run(log: Path, environment: dict[str, str], calls: Sequence[Callable[[], object]]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output, stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    for call in calls:
        call()
