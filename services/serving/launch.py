"""Starting the application on an embedded Ray, or on a running cluster."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from defuse_core.errors import ComputeError, InputError

if TYPE_CHECKING:
    from services.serving.app import ServeArgs

log = logging.getLogger("defuse")
APPLICATION = "defuse"

HAPROXY_ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",  # a prediction is safe to repeat
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",  # one HAProxy on one machine learns of a change at once
}


def enable_haproxy() -> None:
    """Put HAProxy before the replicas, in Ray processes that this process starts from now on.

    Call it before ray.serve is imported, which reads these variables once. Every replica then has a port of its own.
    """
    os.environ.update(HAPROXY_ENVIRONMENT)


@contextlib.contextmanager
def ray_connection(address: str | None, cpus: int) -> Iterator[None]:
    """Connect to the cluster at `address`, or start an embedded Ray with at least `cpus` CPUs, for the block."""
    import ray

    from cluster.session import connect, protect_embedded

    if address:
        connect(address)
    else:
        protect_embedded()
        count = max(os.cpu_count() or 1, cpus)
        with _translate_errors("Ray did not start on this machine"):
            ray.init(
                address="local",
                num_cpus=count,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def running_application(args: ServeArgs, host: str, port: int, shared: bool) -> Iterator[str]:
    """Serve while the block runs; yields the address.

    On a `shared` cluster other applications are left alone. Raises InputError where one has the name of this.
    """
    from ray import serve
    from ray.serve.config import HTTPOptions

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with _translate_errors("Serve did not start"):
        serve.start(
            http_options=HTTPOptions(host=host, port=port), logging_config={"enable_access_log": False}
        )
    actual_host, port = _listening_address(host, port)
    if not args.require_token:
        _check_exposure(host, actual_host)
    if shared and APPLICATION in serve.status().applications:
        raise InputError(
            f"the cluster already serves an application named {APPLICATION}; change its model with `defuse promote`, "
            "or stop the command that started it (`serve shutdown` stops all applications)"
        )
    try:
        deploy(args)
        yield f"http://{'127.0.0.1' if actual_host == '0.0.0.0' else actual_host}:{port}"
    finally:
        if shared:
            serve.delete(APPLICATION)
        else:
            serve.shutdown()  # type: ignore[no-untyped-call]


def _listening_address(host: str, port: int) -> tuple[str, int]:
    """Return host and port of Serve: the given ones, unless Serve was already running with others."""
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    options = client.http_config if client is not None else None
    if options is None or (options.host, options.port) == (host, port):
        return host, port
    log.warning("Serve is already running on this cluster; --host and --port are those of its start")
    return str(options.host), int(options.port)


def require_token_for_haproxy(host: str) -> None:
    """Raise InputError where replicas behind HAProxy would be open to the network without a request for that."""
    if is_loopback(host):
        raise InputError(
            "--haproxy lets every replica listen on every interface of this machine: set DEFUSE_SERVE_TOKEN, or allow "
            "requests from everywhere with `--host 0.0.0.0`"
        )


def _check_exposure(requested: str, actual: str) -> None:
    """Warn that anyone can send requests. Raises InputError where loopback was requested and is not in effect."""
    if is_loopback(actual):
        return
    if is_loopback(requested):
        raise InputError(
            f"Serve is already running on this cluster and listens on {actual}, which other machines can reach: set "
            f"DEFUSE_SERVE_TOKEN, or allow requests from everywhere with `--host {actual}`"
        )
    log.warning(
        "other machines can reach %s, and DEFUSE_SERVE_TOKEN is not set: anyone can send requests", actual
    )


def deploy(args: ServeArgs) -> None:
    """Start the application on a running Serve, or update the running application to other arguments."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    from cluster.faults import one_line
    from services.serving.app import build

    with _translate_errors("the application did not start"):
        application = build(args)
        try:
            serve.run(application, name=APPLICATION, logging_config={"enable_access_log": False})
        except (RuntimeError, RayError, RayServeException) as error:
            raise ComputeError(
                f"the application did not start: {_replica_error() or one_line(error)}"
            ) from error


def _replica_error() -> str | None:
    """Return the last line of the status of replicas that do not start."""
    from ray import serve

    application = serve.status().applications.get(APPLICATION)
    deployments = application.deployments.values() if application is not None else ()
    lines = (line.strip() for deployment in deployments for line in deployment.message.splitlines())
    return next((line for line in reversed(list(lines)) if line), None)


class ShutdownSignal:
    """Ctrl-C or SIGTERM: raises KeyboardInterrupt during startup, and ends `wait` afterwards.

    Create it after Ray has started: Ray installs handlers for both signals.
    """

    def __init__(self) -> None:
        self._received, self._waiting = threading.Event(), False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, *_: object) -> None:
        if not self._waiting:
            raise KeyboardInterrupt
        self._received.set()

    def wait(self) -> None:
        """Return when a signal arrives."""
        self._waiting = True
        self._received.wait()


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextlib.contextmanager
def _translate_errors(context: str) -> Iterator[None]:
    """Raise pydantic's errors as InputError, and those of Ray and of the system as ComputeError."""
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        raise InputError(f"{context}: {error.errors()[0]['msg']}") from error
    except (RuntimeError, ConnectionError, OSError, TimeoutError, ValueError) as error:
        raise ComputeError(f"{context}: {error}") from error
