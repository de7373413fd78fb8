"""Jobs whose dashboard falls silent, as behind a dead network or tunnel."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from aiohttp import web

from cluster import jobs
from cluster.jobs import Jobs
from defuse_core.errors import ComputeError, InputError
from tests.command_line import call
from tests.conftest import ROOT
from tests.ports import free_port

LOG = "first line\nlast line\n"
SILENCE_S = 30.0  # then it answers, so that whoever waits without limit fails a test in place of hanging


OF_JOB: list[Callable[..., object]] = [Jobs.get, Jobs.logs, Jobs.stop, partial(Jobs.follow, show=print)]


class Head:
    """The routes of a dashboard that Ray's client asks for one job, behind a proxy that passes no websocket."""

    def __init__(self) -> None:
        self.status, self.exit_code, self.is_silent, self.is_unreadable = "RUNNING", 0, False, False
        self.log, self.reads = LOG[:11], 0
        self.ends = False  # the job writes its last line and ends, right after somebody has read its log
        self.is_new = False  # a head that was started again without its jobs
        self.refusals = 0  # questions that it answers with 403, as a proxy before a head that starts again
        self.address = f"http://127.0.0.1:{free_port()}"

    async def start(self) -> web.AppRunner:
        app = web.Application()
        answers: dict[str, Callable[[], Any]] = {
            "/api/version": lambda: {"version": "4", "ray_version": "2.50.0", "ray_commit": ""},
            "/api/jobs/": list,
            "/api/jobs/j1": lambda: (
                {"type": "SUBMISSION", "entrypoint": "", "status": self.status}
                | {"submission_id": "j1", "driver_exit_code": self.exit_code}
            ),
            "/api/jobs/j1/logs": lambda: self.fail_to_read() if self.is_unreadable else self._read(),
        }
        for path, answer in answers.items():
            app.router.add_get(path, lambda _, answer=answer: self._answer(answer))
        app.router.add_post("/api/jobs/j1/stop", lambda _: asyncio.sleep(SILENCE_S, web.json_response({})))
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", int(self.address.rpartition(":")[2])).start()
        return runner

    async def _answer(self, answer: Callable[[], Any]) -> web.Response:
        end = time.monotonic() + SILENCE_S
        while self.is_silent and time.monotonic() < end:
            await asyncio.sleep(0.05)
        if self.refusals:
            self.refusals -= 1
            return web.json_response({}, status=403)
        if self.is_new:
            raise web.HTTPNotFound
        return web.json_response(answer())

    def _read(self) -> dict[str, str]:
        self.reads += 1
        answer = {"logs": self.log}
        if self.ends:
            self.end()
        return answer

    def end(self) -> None:
        self.log, self.status = LOG, "SUCCEEDED"

    def fail_to_read(self) -> dict[str, str]:
        """Answer 500, as Ray does for a log with bytes of another encoding."""
        self.end()
        raise web.HTTPInternalServerError(text="'utf-8' codec can't decode byte 0xff")


async def end(runner: web.AppRunner) -> None:
    """End the server, and what it still does: asyncio would log that in a later test, when it is collected."""
    await runner.cleanup()
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[Head]:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # which the client replaces
    assert jobs.PAUSE_S >= 2
    monkeypatch.setattr(jobs, "PAUSE_S", 0.05)
    found, loop = Head(), asyncio.new_event_loop()
    runner = loop.run_until_complete(found.start())
    server = threading.Thread(target=loop.run_forever)
    server.start()
    yield found
    asyncio.run_coroutine_threadsafe(end(runner), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    server.join()
    loop.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give an answer up after a second; long enough for one that comes, on a machine that does other work."""
    monkeypatch.setattr(jobs, "ANSWER_WITHIN_S", 1.0)


def test_a_followed_job_is_shown_to_its_end_where_no_websocket_passes(head: Head) -> None:
    head.ends = True
    shown: list[str] = []
    job = Jobs(head.address).follow("j1", shown.append)
    assert (job.status, job.driver_exit_code, shown) == ("SUCCEEDED", 0, [LOG[:11], LOG[11:]])


def test_an_ended_job_whose_log_cannot_be_read_is_returned_with_a_warning(
    head: Head, caplog: pytest.LogCaptureFixture
) -> None:
    head.is_unreadable, head.exit_code = True, 3
    job = Jobs(head.address).follow("j1", print)
    assert (job.status, job.driver_exit_code) == ("SUCCEEDED", 3)
    assert "job j1: it has ended, and its log cannot be read (" in caplog.text


def test_refusals_after_the_first_contact_are_a_lost_connection_for_a_while(
    head: Head, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shown: list[str] = []

    def show(text: str) -> None:
        shown.append(text)
        head.refusals = 20
        head.end()

    assert Jobs(head.address).follow("j1", show).status == "SUCCEEDED"
    assert shown == [LOG[:11], LOG[11:]]
    lost = f"job j1: lost the connection to {head.address} ("
    (line,) = [line for name, _, line in caplog.record_tuples if name == "defuse"]
    assert line.startswith(lost) and line.endswith("; trying again for 5 minutes")

    def show_no_more(_: str) -> None:
        head.refusals = 10**6

    monkeypatch.setattr(jobs, "GIVE_UP_AFTER_S", 1.0)
    head.status, head.refusals = "RUNNING", 0
    with pytest.raises(ComputeError, match=r"\(.* requires another token") as raised:
        Jobs(head.address).follow("j1", show_no_more)
    assert str(raised.value).startswith(lost)
    assert str(raised.value).endswith(
        f"; the job may go on, and `defuse jobs logs j1 --follow --address {head.address}` follows it again"
    )
    head.refusals = 1
    with pytest.raises(InputError, match="requires another token"):
        Jobs(head.address).follow("j1", print)


def test_a_job_that_a_new_head_does_not_know_is_given_up(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "FORGOTTEN_AFTER_S", 0.3)

    def start_again(_: str) -> None:
        head.is_new = True

    with pytest.raises(
        ComputeError, match="^job j1: .* has no such job, as where its head was started anew; submit"
    ):
        Jobs(head.address).follow("j1", start_again)


@pytest.mark.parametrize(
    ("job_code", "code", "ending"),
    [(1, 4, "look at the job's log"), (127, 4, "job's log"), (2, 2, "code 2\n")],
)
def test_only_the_exit_codes_of_a_run_are_passed_on(
    head: Head,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    job_code: int,
    code: int,
    ending: str,
) -> None:
    """A missing dependency ends Python with 1, which a pipeline would read as a check that failed."""
    head.status, head.exit_code = "FAILED", job_code
    ended, _, err = call(monkeypatch, capsys, "jobs", "logs", "j1", "--follow", "--address", head.address)
    assert ended == code
    assert f"job j1: exit code {job_code}" in err and ending in err


@pytest.mark.usefixtures("impatient")
def test_a_dashboard_that_falls_silent_is_a_lost_connection(
    head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "GIVE_UP_AFTER_S", 1.0)

    def show(_: str) -> None:
        head.is_silent = True

    with pytest.raises(ComputeError, match=r"job j1: lost the connection to .*ReadTimeout"):
        Jobs(head.address).follow("j1", show)


@pytest.mark.parametrize("ask", [Jobs.list, *(partial(of_job, job_id="j1") for of_job in OF_JOB)])
@pytest.mark.usefixtures("impatient")
def test_a_question_that_a_dashboard_does_not_answer_is_given_up_soon(
    head: Head, ask: Callable[[Jobs], object]
) -> None:
    asked = Jobs(head.address)
    head.is_silent = True
    with pytest.raises(ComputeError, match=rf"^no Ray dashboard answers at {head.address} \(ReadTimeout\)"):
        ask(asked)


@pytest.mark.usefixtures("impatient")
def test_a_stop_that_a_dashboard_does_not_answer_is_given_up_soon(head: Head) -> None:
    with pytest.raises(ComputeError, match=r"^no Ray dashboard answers at .*ReadTimeout"):
        Jobs(head.address).stop("j1")


FOLLOW = """
import signal, sys
from cluster import jobs
signal.signal(signal.SIGINT, signal.default_int_handler)  # which the process of the tests may ignore
jobs.ANSWER_WITHIN_S, jobs.PAUSE_S = 60, 0.05
jobs.Jobs(sys.argv[1]).follow("j1", lambda text: print(text, flush=True))
"""


def test_ctrl_c_ends_the_following_of_a_dashboard_that_is_silent_at_once(head: Head) -> None:
    words = [sys.executable, "-c", FOLLOW, head.address]
    with subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as follower:
        assert follower.stdout is not None
        follower.stdout.readline()
        head.is_silent = True
        time.sleep(1)  # it waits for an answer now
        begun = time.monotonic()
        follower.send_signal(signal.SIGINT)
        _, errors = follower.communicate(timeout=60)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert time.monotonic() - begun < SILENCE_S / 2  # it does not wait for the answer


def test_a_log_that_cannot_be_printed_is_not_a_lost_connection(head: Head) -> None:
    def show(_: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        Jobs(head.address).follow("j1", show)
    assert head.reads == 1


def test_a_followed_job_whose_log_nobody_reads_is_left_as_after_ctrl_c(head: Head) -> None:
    read, write = os.pipe()
    os.close(read)
    words = ["-m", "services.cli", "jobs", "logs", "j1", "--follow", "--address", head.address]
    left = subprocess.run(
        [sys.executable, *words],
        stdout=write,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(write)
    follow, stop = (
        f"`defuse jobs {words} --address {head.address}`" for words in ("logs j1 --follow", "stop j1")
    )
    line = f"job j1 continues: {follow} follows it again, {stop} stops it"
    assert (left.returncode, left.stderr.strip()) == (130, line)
