"""What workers report reaches the driver: not too often, whole, and once. Without Ray: calls are made at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import GetTimeoutError

from cluster import progress
from cluster.progress import ProgressActor, ProgressListener, ProgressReporter, reporting

log = logging.getLogger("defuse")


class Here:
    """Stands for the handle of an actor: `handle.method.remote(...)` calls the method in this process."""

    def __init__(self, actor: object) -> None:
        self.actor = actor

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.actor, name))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """Return wait(seconds), which moves the time that the module sees."""
    now = [1000.0]

    def wait(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    yield wait


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch, clock: object) -> ProgressListener:
    """A listener to an actor in this process; `told` has what it showed."""
    found = ProgressListener.__new__(ProgressListener)
    told: list[tuple[str, int, int, str]] = []
    found.progress, found.polled_at = lambda *update: told.append(update), 0.0
    found.actor = Here(ProgressActor({}))
    monkeypatch.setattr(ray, "get", lambda reply, timeout: reply)
    return found


def test_a_worker_reports_each_activity_a_few_times_a_second_and_its_end_at_once(
    clock: Callable[[float], None],
) -> None:
    sent: list[tuple[int, tuple[str, int, int, str]]] = []
    report = ProgressReporter(Here(SimpleNamespace(update=lambda *call: sent.append(call))), task=3)
    for done in range(1, 6):
        report("epochs", done, 9, "epochs")
        clock(0.1)
    report("images", 1, 2, "images")  # another activity
    report("images", 2, 2, "images")
    assert [(task, update[:2]) for task, update in sent] == [
        (3, ("epochs", 1)),
        (3, ("epochs", 4)),
        (3, ("images", 1)),
        (3, ("images", 2)),
    ]
    report.flush()
    report.flush()
    assert sent[4:] == [(3, ("epochs", 5, 9, "epochs"))]


def test_the_driver_is_shown_each_update_and_line_once_and_whether_there_was_any(
    listener: ProgressListener, clock: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    told: list[object] = []

    # not those of a server of an earlier test, which ends when it is collected
    def lines() -> list[tuple[int, str]]:
        return [(record.levelno, record.message) for record in caplog.records if record.name == "defuse"]

    listener.progress = lambda *update: told.append(update)
    actor = listener.actor.actor
    assert not listener.poll()
    clock(1.0)
    actor.update(0, ("epochs", 1, 8, "epochs"))
    actor.update(1, ("epochs", 2, 8, "epochs"))
    actor.update(0, ("epochs", 3, 8, "epochs"))
    assert listener.poll() and told == [("epochs", 5, 8, "epochs")]
    actor.log(logging.WARNING, "half")
    assert not listener.poll() and not lines()  # too soon
    clock(progress.POLL_EVERY_S)
    assert listener.poll() and lines() == [(logging.WARNING, "half")]
    assert not listener.flush() and (len(told), len(lines())) == (1, 1)
    listener.begin()
    actor.update(1, ("epochs", 1, 8, "epochs"))
    assert listener.flush() and told[1:] == [("epochs", 1, 8, "epochs")]


def test_a_driver_that_lost_the_actor_goes_on(
    listener: ProgressListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object, **__: object) -> None:
        raise GetTimeoutError("no answer")

    for call in ("get", "kill"):
        monkeypatch.setattr(ray, call, lost)
    assert not listener.flush()
    listener.begin()
    listener.close()


@pytest.mark.parametrize("fails", [False, True])
def test_a_worker_sends_its_lines_and_last_update_and_leaves_the_logger_as_it_was(
    fails: bool, monkeypatch: pytest.MonkeyPatch, clock: object
) -> None:
    arrived: list[object] = []
    monkeypatch.setattr(ray, "get", lambda reply, timeout: arrived.append("all"))
    calls = {name: lambda *call: arrived.append(call) for name in ("update", "log")}
    actor = Here(SimpleNamespace(flush=lambda: None, compare=lambda *_: None, **calls))
    level, handlers = log.level, list(log.handlers)
    try:
        with reporting(actor, task=2) as report:
            report("epochs", 1, 9, "epochs")
            report("epochs", 2, 9, "epochs")
            log.debug("kept %d", 5)
            log.warning("odd")
            if fails:
                raise KeyError("epoch")
    except KeyError:
        assert fails
    assert (log.level, log.handlers) == (level, handlers)
    assert arrived == [
        (2, ("epochs", 1, 9, "epochs")),
        (logging.DEBUG, "kept 5"),
        (logging.WARNING, "odd"),
        (2, ("epochs", 2, 9, "epochs")),
        "all",
    ]
