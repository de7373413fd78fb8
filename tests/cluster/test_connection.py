"""Joining a cluster, or starting Ray in this process."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import psutil  # type: ignore[import-untyped]
import pytest
import ray
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, ObjectStoreFullError, OutOfDiskError, RayTaskError

from cluster import connection
from cluster.compute import RayCompute
from cluster.connection import (
    INSIST,
    as_defuse_error,
    connect,
    disconnect,
    explained_line,
    nothing_left_of_a_failed_start,
    prepare_embedded_ray,
    ray_errors,
)
from defuse_core.errors import ComputeError, DataError, InputError
from tests.conftest import tiny
from tests.ports import free_port


@pytest.fixture(autouse=True)
def not_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.connection.ray.is_initialized", lambda: False)


@pytest.mark.parametrize(
    "address",
    [
        "http://head:8265",
        "ray://ana:secret@head:10001",
        "head",
        "head:",
        ":6379",
        "head:gcs",
        "local",
        "::1:6379",
    ],
)
def test_an_address_of_another_kind_is_refused_with_what_to_do(address: str) -> None:
    with pytest.raises(InputError, match="expected HOST:PORT .* `defuse submit`") as refused:
        connect(address)
    assert "secret" not in str(refused.value)


def test_it_takes_20_seconds_to_give_an_address_up() -> None:
    assert connection.CONNECT_WITHIN_S == 20


@pytest.mark.parametrize("silent", [False, True], ids=["nothing listens", "nothing answers"])
def test_an_address_without_a_cluster_is_one_line_soon(silent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CONNECT_WITHIN_S", 5.0)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1] if silent else free_port()}"
        begun = time.monotonic()
        with pytest.raises(
            ComputeError, match=rf"^no Ray cluster answers at {address} \(no answer within 5 s\)"
        ):
            connect(address)
    assert time.monotonic() - begun < 18  # less than by default


def test_a_driver_waits_ten_minutes_for_the_head_of_its_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr("cluster.connection.connection_error", lambda *_: None)
    monkeypatch.setattr("cluster.connection.ray.init", lambda **_: None)
    assert connect("head:6379")
    assert ("RAY_gcs_rpc_server_reconnect_timeout_s", "600") in os.environ.items()


@pytest.mark.parametrize("address", ["auto", "head-1.example:6379", "10.0.0.9:6379", "[::1]:6379"])
def test_an_address_of_a_cluster_is_asked(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.connection.connection_error", lambda *_: "nothing listens")
    with pytest.raises(ComputeError, match="no Ray cluster answers at .* \\(nothing listens\\); check"):
        connect(address)


def test_a_process_that_has_joined_another_ray_is_told_that_it_computes_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    joined = SimpleNamespace(gcs_address="10.0.0.9:6379")
    monkeypatch.setattr("cluster.connection.ray.is_initialized", lambda: True)
    monkeypatch.setattr("cluster.connection.ray.get_runtime_context", lambda: joined)
    for address in None, "auto", "10.0.0.9:6379", "head:6379":
        assert not connect(address)
    assert caplog.messages == [
        "this process has joined the Ray at 10.0.0.9:6379, and computes there; is that head:6379?"
    ]


@pytest.mark.parametrize(
    "text",
    [
        "Version mismatch: The cluster was started with:\n    Ray: 2.60.0\n    Python: 3.11.9\nThis process on ...",
        "No node info found matching attributes: '' when trying to resolve node to connect to.",
    ],
)
def test_a_cluster_that_answers_and_cannot_be_joined_from_here_is_a_wrong_setting(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(**_: object) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr("cluster.connection.connection_error", lambda *_: None)
    monkeypatch.setattr("cluster.connection.ray.init", refused)
    with pytest.raises(
        InputError,
        match=rf"^this process cannot join the cluster at head:6379 .*{text[:16]}.* `defuse submit`$",
    ):
        connect("head:6379")


@pytest.mark.parametrize("start", [lambda: connect(None), lambda: connection.connection(None, 1).__enter__()])
def test_a_ray_that_does_not_start_on_this_machine_is_one_line(
    start: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed_out(**_: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr("cluster.connection.prepare_embedded_ray", lambda: None)
    monkeypatch.setattr("cluster.connection.ray.init", timed_out)
    with pytest.raises(
        ComputeError,
        match=r"^Ray did not start on this machine \(Exception: The .* timed out .*\) in 3 attempts; .*`defuse run ",
    ):
        start()


def test_a_ray_that_does_not_start_in_time_is_started_again_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    outcomes = iter([Exception("The current node timed out during startup."), None])

    def second_time(**_: object) -> None:
        if error := next(outcomes):
            raise error

    monkeypatch.setattr("cluster.connection.prepare_embedded_ray", lambda: None)
    monkeypatch.setattr("cluster.connection.ray.init", second_time)
    assert connect(None)
    assert next(outcomes, "both used") == "both used"
    assert caplog.messages == [
        "Ray did not start on this machine (Exception: The current node timed out during startup.); starting it again"
    ]


@pytest.mark.parametrize(("reserved", "started"), [(0, 1), (1, 1), (3, 3)])
def test_an_embedded_ray_has_the_cpus_that_this_process_may_use_or_what_replicas_reserve(
    reserved: int, started: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = dict[str, object]()
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0}, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("cluster.connection.prepare_embedded_ray", lambda: None)
    monkeypatch.setattr("cluster.connection.ray.init", lambda **options: found.update(options))
    connect(None, reserved)
    assert found["num_cpus"] == started
    assert ("RAY_num_workers_soft_limit", str(8 + started)) in os.environ.items()


def test_the_hangup_of_a_terminal_ends_none_of_the_processes_of_an_embedded_ray(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start(**_: object) -> None:
        started.append(subprocess.Popen(["sleep", "300"]))

    monkeypatch.setattr("cluster.connection.prepare_embedded_ray", lambda: None)
    monkeypatch.setattr("cluster.connection.ray.init", start)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    connect(None)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    with started[0] as process:
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2)
        process.kill()


def test_a_start_that_fails_leaves_none_of_rays_processes() -> None:
    words = [sys.executable, "-c", "import time; time.sleep(300)"]
    with subprocess.Popen([*words, "other"]) as other:
        with pytest.raises(TimeoutError), nothing_left_of_a_failed_start():
            left = subprocess.Popen([*words, "/ray/raylet"])
            raise TimeoutError
        assert not psutil.pid_exists(left.pid)
        assert other.poll() is None
        other.kill()


@pytest.mark.parametrize(
    "error",
    [
        OSError("validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: /scratch"),
        PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/scratch/ray"),
        PermissionError("/scratch/ray"),
        OSError(errno.EROFS, os.strerror(errno.EROFS), "/scratch/ray"),
        NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), "/scratch/ray"),
        OSError(errno.ELOOP, os.strerror(errno.ELOOP), "/scratch/ray"),
        FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), "/scratch/ray"),
        OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), "/scratch/ray"),
    ],
)
def test_a_temporary_folder_that_ray_cannot_use_is_a_wrong_setting(
    error: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(**_: object) -> None:
        raise error

    monkeypatch.setattr("cluster.connection.prepare_embedded_ray", lambda: None)
    monkeypatch.setattr("cluster.connection.ray.init", refused)
    with pytest.raises(
        InputError, match=r"^Ray did not start .*/scratch.*; set RAY_TMPDIR .* at most 39 characters"
    ):
        connect(None)


def test_a_full_disk_is_named_when_ray_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/ray")

    monkeypatch.setattr("cluster.connection.prepare_embedded_ray", lambda: None)
    monkeypatch.setattr("cluster.connection.ray.init", refused)
    with pytest.raises(ComputeError, match=r"^Ray did not start .*; free space on the disk of Ray's folder"):
        connect(None)


@pytest.mark.parametrize("mode", ["disabled", "", "tokens"])
def test_an_embedded_ray_without_authentication_is_refused(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.delenv(INSIST, raising=False)
    with pytest.raises(InputError, match=f"^RAY_AUTH_MODE={mode}: expected `token` .* could run code"):
        connect(None)


def test_who_insists_on_a_ray_without_authentication_is_warned_in_capitals(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv(INSIST, "1")
    with caplog.at_level(logging.WARNING):
        prepare_embedded_ray()
    assert "WHOEVER REACHES THIS MACHINE CAN RUN CODE ON IT" in caplog.text


def test_an_embedded_ray_has_a_token_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    prepare_embedded_ray()
    assert len(os.environ.pop("RAY_AUTH_TOKEN")) == 64


@pytest.mark.parametrize("own", [None, "of-the-user"])
def test_the_token_of_an_embedded_ray_is_forgotten_with_it_and_that_of_the_user_is_not(
    own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    if own is not None:
        monkeypatch.setenv("RAY_AUTH_TOKEN", own)
    monkeypatch.setattr("cluster.connection.ray.shutdown", lambda: None)
    # else the Ray of later tests would find no authentication in this process
    monkeypatch.setattr("ray._raylet.Config", SimpleNamespace(initialize=lambda _: None))
    prepare_embedded_ray()
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # as ray.init does
    disconnect()
    assert os.environ.get("RAY_AUTH_TOKEN") == own
    assert "RAY_AUTH_MODE" not in os.environ


def test_no_signal_cuts_off_the_end_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def shut_down() -> None:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        done.append("all of it")

    monkeypatch.setattr("cluster.connection.ray.shutdown", shut_down)
    monkeypatch.setattr("cluster.connection.forget_private_token", lambda: None)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
    try:
        with pytest.raises(KeyboardInterrupt):
            disconnect()
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == ["all of it"]


def test_ray_is_left_also_where_ctrl_c_cuts_off_the_end_of_its_progress(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    left: list[str] = []
    monkeypatch.setattr("cluster.compute.disconnect", lambda: left.append("Ray"))
    found = RayCompute(None, tiny())
    monkeypatch.setattr(found, "listener", SimpleNamespace(close=interrupt))
    found.connected_here = True
    with pytest.raises(KeyboardInterrupt), found:
        pass
    assert left == ["Ray"] and not found.connected_here


def test_a_worker_that_died_is_explained_by_its_node_and_the_cause() -> None:
    lost = ActorDiedErrorContext(
        error_message="The actor died because its node has died. Node Id: ab\n\tterminated: preempted",
        class_name="W", actor_id=bytes(16), pid=3, name="identify-0", node_ip_address="10.0.0.7",
    )  # fmt: skip
    assert explained_line(ActorDiedError(lost)) == (
        "its worker process on 10.0.0.7 died (The actor died because its node has died. Node Id: ab terminated: "
        "preempted)"
    )
    assert explained_line(ActorDiedError()) == (
        "its worker process died (The actor died unexpectedly before finishing this task.)"
    )
    waiting = RayTaskError(
        "train", "ray.exceptions.ActorDiedError", ActorDiedError(), "ray::train", 4, "10.0.0.8"
    )
    assert explained_line(waiting) == explained_line(ActorDiedError())


def test_a_node_without_the_code_is_named_for_tasks_and_workers() -> None:
    text = 'Traceback (most recent call last):\n  File "a.py", line 1\n'
    cause = ModuleNotFoundError("No module named 'cluster'")
    failed = RayTaskError("W", f"{text}ModuleNotFoundError: {cause}", cause, "ray::W", 3, "10.0.0.7")
    install = "install it on every node, or use `defuse submit`, which uploads it"
    for error in failed, failed.as_instanceof_cause():
        assert explained_line(error) == f"No module named 'cluster' on 10.0.0.7; {install}"
    assert explained_line(ActorDiedError(failed)) == (
        f"its worker process on 10.0.0.7 died (ModuleNotFoundError: No module named 'cluster'; {install})"
    )


def test_an_error_of_another_node_names_it_and_one_of_this_node_does_not() -> None:
    here = ray.util.get_node_ip_address()
    cause = DataError("data.root: /data does not exist")
    for node, told in (("10.0.0.7", f"{cause} (on 10.0.0.7)"), (here, str(cause))):
        text = f'Traceback (most recent call last):\n  File "a.py", line 1\nDataError: {cause}'
        failed = RayTaskError("load", text, cause, "ray::load", 3, node)
        for error in failed, failed.as_instanceof_cause():
            found = as_defuse_error(error, "train")
            assert type(found) is DataError and str(found) == told
        needed_by = RayTaskError("use", str(failed), cause, "ray::use", 4, "10.0.0.8")
        assert str(as_defuse_error(needed_by, "train")) == told
    assert as_defuse_error(cause, "train") is cause


def test_a_full_disk_or_store_of_ray_is_named_with_its_node_and_what_to_do() -> None:
    full = OutOfDiskError("Local disk is full")
    assert explained_line(full) == (
        "Local disk is full; free space on the disk of Ray's folder (/tmp/ray, or RAY_TMPDIR): Ray uses it until it is "
        "95 % full"
    )
    text = f'Traceback (most recent call last):\n  File "a.py", line 1\nray.exceptions.OutOfDiskError: {full}'
    failed = RayTaskError("f", text, full, "ray::f", 3, "10.0.0.7")
    assert explained_line(failed).startswith("Local disk is full on 10.0.0.7; free space")
    assert explained_line(ObjectStoreFullError("Failed to put object 12")).startswith(
        "Failed to put object 12; use nodes with more memory"
    )


def test_a_full_disk_below_the_files_of_this_process_is_an_error_of_the_machine_and_other_errors_stay() -> (
    None
):
    full = OSError(errno.ENOSPC, "No space left on device", "/tmp/ray/state.json")
    with (
        pytest.raises(
            ComputeError, match=r"^correct: .*No space left on device: '/tmp/ray/state.json'; free space"
        ),
        ray_errors("correct"),
    ):
        raise full
    with pytest.raises(FileNotFoundError), ray_errors("correct"):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "net.py")
