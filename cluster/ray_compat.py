"""Every private or undocumented part of Ray that Defuse relies on, but for `_do_request` in cluster/jobs.py.

tests/cluster/test_ray_compat.py checks each.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.tune import ResultGrid, Tuner
    from ray.tune.trainable import Trainable

KEPT_WORKING_DIR = {"RAY_CHDIR_TO_TRIAL_DIR": "0"}  # else workers find no relative path, such as of weights
TUNE_ENVIRONMENT = KEPT_WORKING_DIR | {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # else Tune handles Ctrl-C in place of the driver
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints a table whatever the verbosity
}
RESOLVED_AFTER_S = 1.0  # time until a submitted task is known; some 0.3 s were seen on a busy machine
MEMORY_RETRIES = 4  # retries of a task whose process was killed since its node ran out of memory
HEAD_AWAY_S = 600  # KubeRay's workers wait as long
SERVE_SHUTDOWN_S = 30.0  # time for the requests in progress
# bytes: a socket of Ray in it has a path of up to 68 more, and Linux takes 107
MAX_TEMPORARY_FOLDER = 39
TUNE_LOGGERS = ("ray.tune", "ray.train", "ray._private")
UNUSED_PROCESSES = ("start_api_server", "start_monitor", "start_log_monitor")  # methods of Ray's Node
DASHBOARD = "ray.dashboard.modules"
JOB_LOGGERS = (f"{DASHBOARD}.dashboard_sdk", f"{DASHBOARD}.job.sdk", "ray._private.runtime_env.packaging")

# variables of authentication that the Ray of this process brought into its environment
_added: set[str] = set()


@contextlib.contextmanager
def quiet_tune() -> Iterator[None]:
    """Keep Tune from writing log files, printing and handling Ctrl-C, and its trials in their working directory.

    At the end what tune.with_parameters holds of Ray's store is released.
    """
    loggers = [logging.getLogger(name) for name in TUNE_LOGGERS]
    levels = [logger.level for logger in loggers]
    withhold_credentials()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with _environment(TUNE_ENVIRONMENT), _released_parameters():
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _released_parameters() -> Iterator[None]:
    """Remove the hooks by which Ray keeps what was passed to tune.with_parameters inside until the process ends."""
    from ray._private import worker
    from ray.tune.registry import _ParameterRegistry

    before = list(worker._post_init_hooks)
    try:
        yield
    finally:
        worker._post_init_hooks[:] = [
            hook
            for hook in worker._post_init_hooks
            if hook in before or not isinstance(getattr(hook, "__self__", None), _ParameterRegistry)
        ]


def fit(tuner: Tuner) -> ResultGrid:
    """Run all trials. Ctrl-C ends them and releases what they hold of the cluster; Tune does so for an Exception alone.

    They end once Tune's objects are collected, which the frames of a traceback prevent: a notebook keeps the last one.
    """
    try:
        return tuner.fit()
    except KeyboardInterrupt as interrupted:
        interrupted.__traceback__ = None
        gc.collect()
        raise


def kept_working_dir() -> AbstractContextManager[None]:
    """Keep workers that Ray Train starts inside in their working directory, in place of a folder of its own."""
    return _environment(KEPT_WORKING_DIR)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set these environment variables inside, and put back those from before."""
    before = {name: os.environ[name] for name in values if name in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]
        os.environ.update(before)


def withhold_credentials() -> None:
    """Keep AWS_* variables out of the description of Tune's actors, which Ray logs and its dashboard shows."""
    from ray.tune.execution import class_cache  # imports pandas and more, which no other worker needs

    propagated = class_cache.ENV_VARS_TO_PROPAGATE
    propagated.difference_update({name for name in propagated if name.startswith("AWS_")})


def named_trainable(function: Callable[..., Any], name: str) -> type[Trainable]:
    """Return `function` as a trainable whose actors and processes are shown under `name`."""
    from ray.tune.trainable import wrap_function

    trainable = wrap_function(function, name=name)
    trainable.__name__ = trainable.__qualname__ = name
    return trainable


PROBE = """
import signal, sys
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray._raylet import GcsClient
signal.setitimer(signal.ITIMER_REAL, float(sys.argv[2]))
try:
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    GcsClient(address=canonicalize_bootstrap_address_or_die(sys.argv[1]))
except Exception as error:
    sys.exit(" ".join(str(error).split()))
"""


def connection_error(address: str, timeout_s: float) -> str | None:
    """Return why no cluster can be joined at `address`, None where one can.

    In a process of its own, since ray.init and its client retry for minutes and cannot be interrupted. Its limit is a
    signal, which counts from where Ray is imported, and ends Ray's C++ part as well.
    """
    done = subprocess.run(
        [sys.executable, "-c", PROBE, address, str(timeout_s)], capture_output=True, text=True, check=False
    )
    if done.returncode == -signal.SIGALRM:
        return f"no answer within {timeout_s:.0f} s"
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return lines[-1] if done.returncode else None


def is_unauthenticated() -> bool:
    """Whether a Ray that this process starts would serve anyone who reaches its ports.

    Ray authenticates by token when RAY_AUTH_MODE is unset; any value but `token` turns that off, also a misspelt one.
    """
    mode = os.environ.get("RAY_AUTH_MODE")
    return mode is not None and mode.lower() != "token"


def set_private_token() -> None:
    """Give a Ray that this process starts a token of its own; then Ray neither needs nor writes ~/.ray/auth_token."""
    _added.update({"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} - os.environ.keys())  # the mode by Ray itself
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def forget_private_token() -> None:
    """Forget the token of a Ray that has ended, which another cluster does not know."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    for name in _added:
        os.environ.pop(name, None)
    _added.clear()
    Config.initialize("")  # reads RAY_AUTH_MODE again
    AuthenticationTokenLoader.instance().reset_cache()


def shorten_socket_paths() -> None:
    """Let a Ray that this process starts use /tmp where the path in TMPDIR is too long for those of its sockets."""
    if len(os.fsencode(os.environ.get("TMPDIR", ""))) > MAX_TEMPORARY_FOLDER:
        os.environ.setdefault("RAY_TMPDIR", "/tmp")


@contextlib.contextmanager
def without_unused_processes() -> Iterator[None]:
    """Let a Ray that this process starts inside leave out processes that no embedded Ray needs.

    They are the API server, which has no dashboard there, the autoscaler, and the reader of logs that go nowhere. Each
    imports Ray: half of the CPU time of a start.
    """
    from ray._private.node import Node

    started = {name: getattr(Node, name) for name in UNUSED_PROCESSES if hasattr(Node, name)}
    for name in started:
        setattr(Node, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for name, start in started.items():
            setattr(Node, name, start)


def cancel_all(tasks: Sequence[Any]) -> None:
    """End tasks that run or wait, given as ObjectRefs.

    Ray ends the driver with a stack dump where a task is cancelled while its arguments are resolved
    (submitted_task_ref_count > 0), which happens just after it was submitted: so it is given a moment first. And where
    one is cancelled whose result has just come (submissible_tasks_.end()): so what has ended is left alone.
    """
    import ray

    running = list(tasks)
    # else it would take the place of the error that ends them
    with contextlib.suppress(ray.exceptions.RayError):
        if tasks:
            _, running = ray.wait(
                running, num_returns=len(tasks), timeout=RESOLVED_AFTER_S, fetch_local=False
            )
    for task in running:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.cancel(task, force=True)


@contextlib.contextmanager
def signals_wait_for_ray(*, again_interrupts: bool) -> Iterator[None]:
    """Let handlers of SIGINT, SIGTERM and SIGHUP run after the block, a start or an end of Ray.

    With `again_interrupts`, a signal that comes again is handled at once. A process whose start of Ray is interrupted
    ends with SIGSEGV, at the end of Ray with exit code 1 as soon as an ObjectRef is freed. ray.init also replaces the
    program's handler of SIGTERM by one that exits with 15, and Ray's C++ part by another, which dumps its stack.
    """
    from ray._private import utils

    is_main = threading.current_thread() is threading.main_thread()
    held = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if is_main else ()
    own: dict[int, Any] = {each: found for each in held if callable(found := signal.getsignal(each))}
    arrived, set_handler = list[int](), utils.set_sigterm_handler

    def note(number: int, _: object) -> None:
        arrived.append(number)
        if again_interrupts:
            signal.signal(number, own[number])

    if signal.SIGTERM in own:
        utils.set_sigterm_handler = lambda _: None
    for number in own:
        signal.signal(number, note)
    try:
        yield
    finally:
        utils.set_sigterm_handler = set_handler
        for number, handler in own.items():
            signal.signal(number, handler)
        for number in arrived[:1]:
            signal.raise_signal(number)


def _serve_client() -> Any:
    """Return the client of this cluster's Serve; None without it."""
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False)


def serve_address() -> tuple[str, int] | None:
    """Return host and port that this cluster's Serve listens on; None without it."""
    client = _serve_client()
    return None if client is None else (str(client.http_config.host), int(client.http_config.port))


def uses_haproxy() -> bool:
    """Whether a Serve that this process starts puts HAProxy before its replicas."""
    from ray.serve._private import constants

    return bool(constants.RAY_SERVE_ENABLE_HA_PROXY)


def deployment_version(application: str, deployment: str) -> str | None:
    """Return the random name that Serve gives each deployment of a program; None without it, or without Serve."""
    from ray.exceptions import ActorDiedError

    client = _serve_client()
    if client is None:
        return None
    with contextlib.suppress(KeyError, ActorDiedError):
        return str(client.get_deployment_info(deployment, application)[0].version)
    return None


def shut_down_serve() -> None:
    """Shut Serve down, unless the Ray of this program ends first, as by a signal to its whole process group.

    serve.shutdown alone waits 30 s for a controller that has ended with its Ray, and then prints a warning.
    """
    import ray
    from ray import serve

    client = None if embedded_ray_has_ended() else _serve_client()
    if client is None:
        return
    client.shutdown_cached_handles()
    ending, give_up = client._controller.graceful_shutdown.remote(), time.monotonic() + SERVE_SHUTDOWN_S
    while not ray.wait([ending], timeout=0.2)[0]:
        if embedded_ray_has_ended() or time.monotonic() > give_up:
            return
    serve.shutdown()  # type: ignore[no-untyped-call] # forgets the controller


def reuse_addresses() -> None:
    """Let Serve's HTTP servers in this process listen on a port with connections of another that was killed.

    Serve sets no SO_REUSEADDR, so a replica with a fixed port could not be replaced within a minute.
    """
    from ray.serve._private import http_util

    class ReusingSocket(socket.socket):
        def bind(self, address: Any) -> None:
            self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            super().bind(address)

    vars(http_util)["socket"] = SimpleNamespace(**vars(socket) | {"socket": ReusingSocket})


def embedded_ray_has_ended(*kinds: str) -> bool:
    """Return whether the GCS or the raylet of the Ray that this program started has ended; False beside a cluster.

    With `kinds`, such as gcs_server, whether one of these processes has.
    """
    from ray._private import worker

    node: Any = worker._global_node
    asked = kinds or ("gcs_server", "raylet")
    return node is not None and any(kind in asked for kind, _ in node.dead_processes())


def own_node_has_ended() -> bool:
    """Return whether the raylet of this process's node has ended; a driver that waits for its head outlives it."""
    from ray._private import worker

    node: Any = worker._global_node
    if node is None:
        return False
    with socket.socket(socket.AF_UNIX) as test:
        test.setblocking(False)  # else it waits for a raylet that is paused
        return test.connect_ex(str(node.raylet_socket_name)) in (errno.ECONNREFUSED, errno.ENOENT)


def log_folder() -> str:
    """Return the folder with the logs of Ray's processes on this node, once this process is connected."""
    from ray._private import worker

    node: Any = worker._global_node
    return str(node.get_logs_dir_path())


def count_restarts(actor: Any) -> int:
    """Return how often Ray has started the process of an actor again."""
    from ray._private import state

    return int(state.actors(actor._actor_id.hex()).get("NumRestarts", 0))


def keep_idle_workers(cpus: int) -> None:
    """Let a Ray of `cpus` CPUs that this process starts keep the idle workers of finished tasks, 8 more than CPUs.

    By default it ends those beyond one a CPU after a second, and each new one imports torch again, 2 to 4 seconds.
    """
    os.environ.setdefault("RAY_num_workers_soft_limit", str(8 + cpus))


def limit_memory_retries() -> None:
    """Let tasks that this process starts fail when memory runs out once too often; by default Ray retries without end.

    Ray counts these retries apart from a task's max_retries, and reads the variable when this process connects.
    """
    os.environ.setdefault("RAY_task_oom_retries", str(MEMORY_RETRIES))


def wait_for_absent_head() -> None:
    """Let this process wait for the head of its cluster, such as while another machine takes its place.

    By default Ray's C++ part ends the process after a minute, with exit code 1 and whatever the process does. It has
    read its variables where it was imported, and reads them again too late for the client that ray.nodes asks with.
    """
    from ray._raylet import Config  # type: ignore[attr-defined]

    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(HEAD_AWAY_S))
    Config.initialize("")
