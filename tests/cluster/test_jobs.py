"""Jobs: `defuse submit` and `defuse jobs` from outside, on a real head that asks for a token."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import jobs
from defuse_core.errors import ComputeError, InputError
from tests.command_line import call
from tests.conftest import ROOT, TINY
from tests.ports import free_port
from tests.waiting import WAIT_S, wait_until

BIN = Path(sys.executable).parent
TOKEN = os.environ["RAY_AUTH_TOKEN"]  # also of commands in this process, where Ray reads it once
SECRET = "never-to-be-seen-anywhere"
NETWORK = """
from torch import nn

def build() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
"""


def environment(**changes: str) -> dict[str, str]:
    """Return a shell's environment with the cluster's token, this Python first and nothing of these tests' own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))}
    own = {"PATH": f"{BIN}:{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"}
    return kept | own | {"RAY_AUTH_TOKEN": TOKEN} | changes


@pytest.fixture(scope="module")
def gcs_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def head(short_folder: Path, gcs_port: int) -> Iterator[str]:
    """A head of two CPUs, told nothing of Defuse; yields the address of its dashboard."""
    folder, port = short_folder, free_port()
    ports = [
        f"--port={gcs_port}",
        f"--dashboard-port={port}",
        "--min-worker-port=0",
        "--max-worker-port=0",
    ]
    agent = free_port()
    agents = [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={free_port()}"]
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={folder / 't'}"]
    command += [*ports, *agents, f"--metrics-export-port={free_port()}", "--node-ip-address=127.0.0.1"]
    command += ["--object-store-memory=100000000"]
    with (folder / "log").open("wb") as out:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment(RAY_worker_niceness="0"),  # as in tests/conftest.py
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        yield answering(f"http://127.0.0.1:{port}", agent, folder / "log")
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def told(head: str, path: str = "") -> Any:
    """Return what the dashboard tells of its jobs to whoever has the token."""
    request = urllib.request.Request(f"{head}/api/jobs/{path}", headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def answering(address: str, agent: int, log: Path) -> str:
    """Return the address once the dashboard answers, and the agent that it hands jobs to listens at its port."""

    def answers() -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", agent)).close()
            return told(address) == []
        return False

    wait_until(answers, lambda: f"the head does not answer: {log.read_text()[-2000:]}")
    return address


def defuse(*words: str, cwd: Path = ROOT, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run one command as a person does."""
    return subprocess.run(
        [str(BIN / "defuse"), *words],
        cwd=cwd,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """ask(*words): run `defuse jobs WORDS` in this process, and return exit code, stdout and stderr."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # which Ray's client replaces
    return lambda *words: call(monkeypatch, capsys, "jobs", *words)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run file that brings its own classifier, as code beside it."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "job_nets.py").write_text(NETWORK)
    classifier = {"architecture": "custom", "import_path": "job_nets:build", "epochs": 2, "batch_size": 32}
    tree = TINY | {"classifier": classifier, "vae": {**TINY["vae"], "epochs": 1}}
    (folder / "own.yaml").write_text(yaml.safe_dump(tree))
    return folder


def submit(head: str, place: Path, *words: str, **changes: str) -> subprocess.CompletedProcess[str]:
    where = ["--address", head, "--store", "runs", "--until", "train"]
    return defuse("submit", "own.yaml", *where, *words, cwd=place, **changes)


@pytest.fixture(scope="module")
def followed(head: str, place: Path) -> subprocess.CompletedProcess[str]:
    """A run submitted with its own name, followed to its end, while a secret stood in the environment."""
    return submit(
        head,
        place,
        "--name",
        "first",
        AWS_SECRET_ACCESS_KEY=SECRET,
        AWS_ENDPOINT_URL=f"http://u:{SECRET}@here",
    )


def test_a_submitted_run_is_followed_to_its_end_and_brings_its_own_code(
    followed: subprocess.CompletedProcess[str], place: Path
) -> None:
    assert followed.returncode == 0, followed.stdout + followed.stderr
    assert "first: done until train" in followed.stdout
    assert f"store {place / 'runs'}: must be the same shared folder on every node" in followed.stderr
    assert list((place / "runs" / "first").rglob("models*"))


def test_no_credentials_travel_with_a_job(followed: subprocess.CompletedProcess[str], head: str) -> None:
    assert followed.returncode == 0
    said = json.dumps(told(head)) + followed.stdout + followed.stderr
    assert "run run.yaml --name first" in said
    assert SECRET not in said
    assert TOKEN not in said


@pytest.mark.usefixtures("followed")
def test_a_detached_job_prints_its_id_alone_and_what_only_it_can_find_wrong_ends_in_2(
    head: str, place: Path, ask: Ask
) -> None:
    detached = submit(head, place, "--name", "first", "--set", "classifier.epochs=3", "--detach")
    assert detached.returncode == 0, detached.stderr
    (job,) = detached.stdout.split()
    code, followed, err = ask("logs", job, "--follow", "--address", head)
    assert code == 2, followed + err
    assert "classifier.epochs" in followed
    code, again, _ = ask("logs", job, "--address", head)
    assert (code, again) == (0, followed)


def test_a_bad_run_file_is_refused_before_it_is_submitted(
    head: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    changed = ["--set", "classifier.epochs=many"]
    code, _, err = call(
        monkeypatch, capsys, "submit", "own.yaml", "--address", head, "--store", "runs", *changed
    )
    assert code == 2
    assert err.startswith("defuse: ")
    assert "classifier.epochs" in err
    assert err.count("\n") == 1


@pytest.mark.usefixtures("followed")
def test_ray_job_submit_runs_the_installed_defuse_as_well_which_refuses_a_store_that_ray_deletes(
    head: str, place: Path
) -> None:
    """One job with both: the folder of a job, in which it runs, is deleted at its end."""
    run = "defuse run own.yaml --name first --until train"
    both = f"{run}; test $? = 2 && {run} --store {shlex.quote(str(place / 'runs'))}"
    done = subprocess.run(
        [BIN / "ray", "job", "submit", "--address", head, "--working-dir", place, "--", "bash", "-c", both],
        env=environment(),
        cwd=place,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--store runs: expected s3://bucket/prefix or an absolute folder" in done.stdout
    assert "first: done until train" in done.stdout + done.stderr


def test_a_job_goes_on_when_its_follower_leaves_and_ends_when_stopped(
    head: str, place: Path, ask: Ask
) -> None:
    where = ["--address", head, "--store", str(place / "runs"), "--name", "long"]
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a child inherits that it is ignored, as under nohup
    follower = subprocess.Popen(
        [str(BIN / "defuse"), "submit", "own.yaml", *where, "--set", "vae.epochs=9999"],
        cwd=place,
        env=environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    job = job_of(follower)
    await_status(head, job, "RUNNING")
    follower.send_signal(signal.SIGINT)
    assert f"`defuse jobs stop {job} --address {head}` stops it" in follower.communicate(timeout=WAIT_S)[1]
    assert follower.returncode == 130
    heading, *rows = (line.split() for line in ask("list", "--address", head)[1].splitlines())
    assert heading == ["id", "status", "started", "took", "run"]
    (row,) = (row for row in rows if row[0] == job)
    assert (row[1], row[-1]) == ("RUNNING", "long")
    assert ask("stop", job, "--address", head)[0] == 0
    code, _, err = ask("logs", job, "--follow", "--address", head)
    assert code == 4
    assert "stopped" in err


def job_of(follower: subprocess.Popen[str]) -> str:
    assert follower.stderr is not None
    for line in follower.stderr:
        if line.startswith("job "):
            return line.split()[1].rstrip(":")
    pytest.fail("the command ended without a job")


def await_status(head: str, job: str, status: str) -> None:
    wait_until(lambda: told(head, job)["status"] == status, lambda: f"{job} is {told(head, job)['status']}")


@pytest.mark.parametrize(
    "changes", [{"RAY_AUTH_TOKEN": "wrong" * 8}, {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}]
)
def test_without_the_right_token_one_line_says_what_to_set(head: str, changes: dict[str, str]) -> None:
    refused = defuse("jobs", "list", "--address", head, cwd=ROOT, **changes)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in refused.stderr
    assert "wrong" * 8 not in refused.stderr


@pytest.mark.usefixtures("head")
@pytest.mark.parametrize(
    "changes", [{"RAY_AUTH_TOKEN": "wrong" * 8}, {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}]
)
def test_joining_without_the_right_token_says_so_soon(
    gcs_port: int, place: Path, changes: dict[str, str]
) -> None:
    begun = time.monotonic()
    refused = defuse("run", "own.yaml", "--address", f"127.0.0.1:{gcs_port}", cwd=place, **changes)
    assert refused.returncode == 2, refused.stderr
    assert "requires another token than this process has: set RAY_AUTH_MODE=token and" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert time.monotonic() - begun < WAIT_S


@pytest.mark.parametrize(
    ("address", "exit_code", "says"),
    [
        ("http://127.0.0.1:1", 4, "no Ray dashboard answers at http://127.0.0.1:1"),
        ("http://ana:secret@127.0.0.1:1", 4, "no Ray dashboard answers at http://***@127.0.0.1:1 ("),
        ("ray://ana:secret@head", 2, "--address ray://***@head: expected the address of Ray's dashboard"),
        ("127.0.0.1:6379", 2, "expected the address of Ray's dashboard"),
    ],
)
def test_an_address_without_a_dashboard_is_one_line(
    ask: Ask, address: str, exit_code: int, says: str
) -> None:
    code, _, err = ask("list", "--address", address)
    assert code == exit_code
    assert err.count("\n") == 1
    assert says in err


def test_an_address_that_does_not_answer_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    assert jobs.ANSWER_WITHIN_S == 20
    monkeypatch.setattr(jobs, "ANSWER_WITHIN_S", 2.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        begun = time.monotonic()
        with pytest.raises(ComputeError, match=rf"no Ray dashboard answers at {address} \(ReadTimeout\)"):
            jobs.Jobs(address)
    assert time.monotonic() - begun < 18  # less than by default


@pytest.mark.parametrize(("unproxied", "is_named"), [("", True), ("head", False)])
def test_a_dashboard_behind_a_proxy_that_does_not_reach_it_is_named_for_no_proxy(
    unproxied: str, is_named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, unproxied)
    with pytest.raises(ComputeError, match=r"no Ray dashboard answers at http://head:8265 \(") as failure:
        jobs.Jobs("http://head:8265")
    assert str(failure.value).endswith("does not reach it, add head to NO_PROXY") is is_named


def test_a_job_that_the_dashboard_finds_too_large_is_bad_input(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # which Ray's client replaces
    (tmp_path / "weights").write_bytes(os.urandom(101 * 2**20))
    with pytest.raises(InputError, match=rf"{head} does not take a job of this size \(413\); run"):
        jobs.Jobs(head).submit("true", tmp_path, "large", {})


@pytest.mark.parametrize("words", [["logs"], ["logs", "--follow"], ["stop"]])
def test_an_unknown_job_is_one_line(head: str, ask: Ask, words: list[str]) -> None:
    code, _, err = ask(*words, "nope", "--address", head)
    assert code == 2
    assert err.count("\n") == 1
    assert f"no job nope at {head}; see `defuse jobs list --address {head}`" in err
