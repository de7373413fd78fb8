"""What Defuse relies on in Ray without a promise of Ray's: a test that fails names the part that moved."""

from __future__ import annotations

import faulthandler
import gc
import importlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import requests
from ray import tune
from ray._private import utils, worker
from ray.job_submission import JobSubmissionClient
from ray.tune.execution import class_cache
from ray.tune.experimental.output import get_air_verbosity

from cluster import ray_compat
from cluster.jobs import job_client
from cluster.ray_compat import (
    JOB_LOGGERS,
    RESOLVED_AFTER_S,
    cancel_all,
    embedded_ray_has_ended,
    is_unauthenticated,
    log_folder,
    named_trainable,
    own_node_has_ended,
    quiet_tune,
    signals_wait_for_ray,
    uses_haproxy,
)
from defuse_core.device import usable_cpus
from tests.cluster import programs
from tests.conftest import tiny
from tests.e2e import forked_commands
from tests.start_forked_worker import fork_workers
from tests.waiting import WAIT_S

PRIVATE = re.compile(r"\bray(\.\w+)*(\.| import )_\w|_get_global_client")


def test_private_parts_of_ray_are_used_in_one_module() -> None:
    root = Path(ray_compat.__file__).parent.parent
    files = (file for name in ("defuse_core", "cluster", "services") for file in (root / name).rglob("*.py"))
    found = [file for file in files if PRIVATE.search(file.read_text(encoding="utf-8"))]
    assert found == [Path(ray_compat.__file__)]


class Trainable:
    """Stands for a trial."""


def source(module: str) -> str:
    """Return the source of a module of Ray."""
    file = importlib.import_module(module).__file__
    assert file is not None
    return Path(file).read_text(encoding="utf-8")


def run_program(log: Path, program: Callable[[], None]) -> tuple[int | None, str]:
    """Return the exit code and the output of a program in a process of its own: this one is in another Ray."""
    process = forked_commands.start_calls(log, faulthandler.enable, fork_workers, program)
    process.join(3 * WAIT_S)
    process.kill()
    return process.exitcode, log.read_text()


def test_tune_does_not_describe_its_actors_with_the_keys_of_the_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "never-to-be-seen")
    with quiet_tune():
        described = class_cache._ActorClassCache().get(Trainable)._default_options["runtime_env"]
    assert "PL_DISABLE_FORK" in described["env_vars"]  # this is where Tune puts what it passes on
    assert not [name for name in described["env_vars"] if name.startswith("AWS_")]
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == "never-to-be-seen"


def test_tune_passes_on_the_variables_in_a_set_that_can_be_changed() -> None:
    assert isinstance(class_cache.ENV_VARS_TO_PROPAGATE, set)


def test_tune_reads_the_variables_that_keep_it_quiet() -> None:
    code = "".join(map(source, ("ray.tune.tune", "ray.tune.utils.callback", "ray.tune.experimental.output")))
    assert [name for name in ray_compat.TUNE_ENVIRONMENT if name not in code] == []
    with quiet_tune():
        assert get_air_verbosity(0) is None  # the new output, which prints whatever the verbosity, is off


def test_the_parameters_of_a_sweep_are_released_at_its_end(ray_session: None) -> None:
    before = list(worker._post_init_hooks)
    with quiet_tune():
        tune.with_parameters(lambda config, images: None, images=ray.put("images"))
        (hook,) = [hook for hook in worker._post_init_hooks if hook not in before]
        holder = weakref.ref(hook.__self__)
    del hook
    gc.collect()
    assert worker._post_init_hooks == before
    assert holder() is None


def pids_of_four_tasks(folder: Path) -> set[int]:
    """Return the processes of four tasks that run at the same time; there are two CPUs."""
    folder.mkdir()

    @ray.remote(num_cpus=0.5)
    def pid() -> int:
        (folder / str(os.getpid())).touch()
        while len(list(folder.iterdir())) < 4:
            time.sleep(0.05)
        return os.getpid()

    return set(ray.get([pid.remote() for _ in range(4)], timeout=WAIT_S))


def test_more_idle_workers_than_cpus_are_kept_for_the_next_tasks(ray_session: None, tmp_path: Path) -> None:
    first = pids_of_four_tasks(tmp_path / "first")
    time.sleep(3)  # by default those beyond two would be gone
    assert pids_of_four_tasks(tmp_path / "second") <= first


@pytest.mark.parametrize("quota", [100_000, 150_000, 200_000, 1_250_000])
def test_ray_counts_the_cpus_of_a_container_as_an_embedded_ray_has_them(
    quota: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (limit := tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
    monkeypatch.setattr("defuse_core.device.CGROUP", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    absent = ["/absent"] * 3  # files of cgroup v1
    monkeypatch.setattr(utils, "_get_docker_cpus", partial(utils._get_docker_cpus, *absent, str(limit)))
    assert utils.get_num_cpus() == usable_cpus()


def test_one_process_starts_two_clusters_of_a_token_each_also_where_tmpdir_is_long(tmp_path: Path) -> None:
    """Ray keeps the token that it has read, and puts sockets, of which paths are short, into TMPDIR."""
    long = tmp_path / ("x" * ray_compat.MAX_TEMPORARY_FOLDER)
    long.mkdir()
    code, said = run_program(tmp_path / "log", partial(programs.start_two_clusters, tiny(), long))
    assert code == 0, said
    first, second = re.findall("^HELP (.*)$", said, re.MULTILINE)
    assert first != second
    started = re.findall("^processes (.*)$", said, re.MULTILINE)
    assert started == ["gcs_server raylet"] * 2  # none that without_unused_processes leaves out


def test_a_task_that_runs_out_of_memory_again_and_again_is_an_error(tmp_path: Path) -> None:
    program = partial(programs.sleep_in_full_memory, tiny(), tmp_path / "pid")
    _, said = run_program(tmp_path / "log", program)
    # which of Ray's sentences it is depends on what its monitor saw first
    assert re.search("ComputeError: train: .*memory.*; use nodes with more memory", said, re.IGNORECASE)


def test_ray_waits_so_long_for_the_head_of_a_cluster_as_it_was_asked_to(tmp_path: Path) -> None:
    """And ends the process then, whatever that does."""
    code, said = run_program(tmp_path / "log", programs.go_on_without_head)
    assert code == 1
    assert "Failed to connect to GCS within 3 seconds" in said


def test_a_driver_that_asks_for_nodes_waits_as_long_for_their_head(tmp_path: Path) -> None:
    """By default the client that ray.nodes asks with has read the limit before this process raised it."""
    _, said = run_program(tmp_path / "log", programs.outlast_the_usual_wait_for_a_head)
    assert "Failed to connect to GCS" not in said
    assert said.endswith("outlasted\n")


def test_a_step_ends_soon_after_the_embedded_ray(tmp_path: Path) -> None:
    program = partial(programs.sleep_in_ray_that_ends, tiny(), tmp_path / "pid")
    _, said = run_program(tmp_path / "log", program)
    assert "ComputeError: Ray has ended on this machine" in said
    assert "Failed to connect to GCS" not in said  # Ray's C++ part did not end it


def test_the_environment_and_the_loggers_are_put_back() -> None:
    names, loggers = ray_compat.TUNE_ENVIRONMENT, [logging.getLogger(n) for n in ray_compat.TUNE_LOGGERS]
    before = [os.environ.get(name) for name in names], [logger.level for logger in loggers]
    with quiet_tune():
        assert all(logger.level == logging.CRITICAL for logger in loggers)
    assert ([os.environ.get(name) for name in names], [logger.level for logger in loggers]) == before


def test_a_trainable_is_shown_under_its_name() -> None:
    trainable = named_trainable(lambda config: None, "correct")
    assert (trainable.__name__, trainable.__qualname__) == ("correct", "correct")


@pytest.mark.parametrize("name", JOB_LOGGERS)
def test_the_client_of_jobs_logs_through_a_logger_that_is_silenced(name: str) -> None:
    module = importlib.import_module(name)
    found = getattr(module, "logger", None) or module.default_logger
    assert found.name == name


def test_the_client_of_jobs_prefers_its_own_variable_to_ray_address(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.dashboard.utils import get_address_for_submission_client

    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:1")
    monkeypatch.setattr(JobSubmissionClient, "_check_connection_and_version", lambda *_, **__: None)
    job_client("http://head:8265", 20)
    assert get_address_for_submission_client("http://head:8265") == "http://head:8265"


def test_ray_s_client_of_jobs_waits_so_long_for_all_but_uploads_and_submissions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits = []

    def request(method: str, url: str, *, timeout: float | None, **_: object) -> requests.Response:
        waits.append((method, url.removeprefix("http://head:8265/api/"), timeout))
        raise requests.ReadTimeout

    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # which the client sets
    monkeypatch.setattr(requests, "request", request)
    with pytest.raises(requests.ReadTimeout):
        job_client("http://head:8265", 20)
    monkeypatch.setattr(JobSubmissionClient, "_check_connection_and_version", lambda *_, **__: None)
    client = job_client("http://head:8265", 20)
    calls = [client.list_jobs, partial(client.stop_job, "j1"), partial(client.submit_job, entrypoint="true")]
    for call in [*calls, partial(client._do_request, "PUT", "/api/packages/gcs/a.zip", data=b"")]:
        with pytest.raises(requests.ReadTimeout):
            call()
    assert waits == [
        ("GET", "version", 20),
        ("GET", "jobs/", 20),
        ("POST", "jobs/j1/stop", 20),
        ("POST", "jobs/", None),
        ("PUT", "packages/gcs/a.zip", None),
    ]


@pytest.mark.usefixtures("ray_session")
def test_a_cluster_that_answers_is_found_where_importing_ray_takes_longer(monkeypatch) -> None:
    monkeypatch.setattr(ray_compat, "PROBE", f"import time; time.sleep(5)\n{ray_compat.PROBE}")
    assert ray_compat.connection_error(ray.get_runtime_context().gcs_address, 5) is None


IS_DISABLED = """
import os, sys
from ray._private.authentication import authentication_token_setup as setup
from ray._raylet import AuthenticationMode, Config, get_authentication_mode
for mode in sys.argv[1:]:
    if os.fork() == 0:
        if mode != "none":
            os.environ["RAY_AUTH_MODE"] = mode
        Config.initialize("")  # reads the variable
        setup.enable_token_auth_by_default()
        print(get_authentication_mode() == AuthenticationMode.DISABLED, flush=True)
        os._exit(0)
    os.wait()
"""


def test_ray_agrees_on_which_modes_leave_it_without_authentication(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE")
    modes = ["none", "token", "TOKEN", "Token", "disabled", "", "tokens"]
    done = subprocess.run(
        [sys.executable, "-c", IS_DISABLED, *modes], capture_output=True, text=True, check=True
    )
    found = []
    for mode in modes:
        if mode != "none":
            monkeypatch.setenv("RAY_AUTH_MODE", mode)
        found.append(str(is_unauthenticated()))
    assert found == done.stdout.split()
    assert found == ["False"] * 4 + ["True"] * 3


def test_a_cluster_of_ray_start_has_no_token_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cluster/README.md says so; `ray start` calls this function."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    asked = (
        "from ray._private.authentication import authentication_token_setup as setup\n"
        "print(setup.maybe_enable_token_auth_if_token_available())"
    )
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_programs_own_handler_of_sigterm_is_kept_and_rays_where_it_has_none():
    def own(*_: object) -> None: ...

    def of_ray(*_: object) -> None: ...

    before = signal.getsignal(signal.SIGTERM)
    try:
        for handler, kept in ((own, own), (signal.SIG_DFL, of_ray)):
            signal.signal(signal.SIGTERM, handler)
            with signals_wait_for_ray(again_interrupts=True):
                utils.set_sigterm_handler(of_ray)  # as ray.init does
            assert signal.getsignal(signal.SIGTERM) is kept
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture(params=[signal.SIGINT, signal.SIGHUP])
def interrupting(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """A signal that interrupts; a shell has its background jobs ignore SIGINT."""
    before = signal.signal(request.param, signal.default_int_handler)
    yield request.param
    signal.signal(request.param, before)


def test_a_signal_waits_for_the_start_of_ray_and_a_second_one_does_not(interrupting: signal.Signals):
    done = []
    with pytest.raises(KeyboardInterrupt), signals_wait_for_ray(again_interrupts=True):
        signal.raise_signal(interrupting)
        done.append("the start")
    assert done == ["the start"]
    with pytest.raises(KeyboardInterrupt), signals_wait_for_ray(again_interrupts=True):
        signal.raise_signal(interrupting)
        signal.raise_signal(interrupting)
        done.append("unreachable")
    assert done == ["the start"]


def test_ctrl_c_while_ray_starts_ends_what_was_started_and_no_process_of_it_is_left(tmp_path: Path) -> None:
    code, said = run_program(tmp_path / "log", programs.interrupt_a_start)
    assert (code, said.strip()) == (0, "interrupted after the start, False []")


@ray.remote
def asleep(_: object) -> None:
    time.sleep(600)


@pytest.mark.usefixtures("ray_session")
def test_a_task_is_not_cancelled_before_its_arguments_are_resolved_which_can_end_the_driver(
    monkeypatch,
) -> None:
    cancelled_at, cancel = list[float](), ray.cancel
    monkeypatch.setattr(
        ray, "cancel", lambda *a, **k: cancelled_at.append(time.monotonic()) or cancel(*a, **k)
    )
    submitted_at, number = time.monotonic(), ray.put(1)
    tasks = [asleep.remote(number) for _ in range(3)]
    cancel_all(tasks)
    assert len(cancelled_at) == 3
    assert min(cancelled_at) - submitted_at >= RESOLVED_AFTER_S
    with pytest.raises(ray.exceptions.RayError):
        ray.get(tasks, timeout=WAIT_S)
    cancel_all([])


@ray.remote
def return_now() -> int:
    return 1


@pytest.mark.usefixtures("ray_session")
def test_a_task_that_has_just_ended_is_not_cancelled_which_can_end_the_driver(monkeypatch) -> None:
    cancelled, cancel = list[object](), ray.cancel
    monkeypatch.setattr(ray, "cancel", lambda task, **k: cancelled.append(task) or cancel(task, **k))
    quick, slow = return_now.remote(), asleep.remote(None)
    ray.wait([quick], timeout=WAIT_S)
    cancel_all([quick, slow])
    assert cancelled == [slow]
    assert ray.get(quick) == 1


@pytest.mark.usefixtures("ray_session")
def test_a_ray_that_runs_has_not_ended_and_one_of_whose_processes_is_gone_has(monkeypatch) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    info = SimpleNamespace(process=ended)
    monkeypatch.setitem(worker._global_node.all_processes, "dashboard", [info])  # goes on without
    assert not embedded_ray_has_ended()
    monkeypatch.setitem(worker._global_node.all_processes, "gcs_server", [info])
    assert embedded_ray_has_ended()


@pytest.mark.usefixtures("ray_session")
def test_a_node_has_ended_whose_raylet_no_more_listens(monkeypatch, tmp_path: Path) -> None:
    assert not any(own_node_has_ended() for _ in range(3))
    assert ray.get(return_now.remote()) == 1  # its raylet goes on
    left = tmp_path / "raylet"
    monkeypatch.setattr(worker._global_node, "_raylet_socket_name", str(left))
    assert own_node_has_ended()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(left))
        listening.listen()
        assert not own_node_has_ended()
    assert own_node_has_ended()


def test_the_folder_of_the_logs_has_those_of_rays_processes(ray_session: None) -> None:
    assert list(Path(log_folder()).glob("raylet*"))


def test_serve_says_whether_it_uses_haproxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for said in (True, False):
        monkeypatch.setattr("ray.serve._private.constants.RAY_SERVE_ENABLE_HA_PROXY", said)
        assert uses_haproxy() is said
