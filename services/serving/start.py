"""Starting the application on this machine, or on a cluster that runs already."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from defuse_core.errors import ComputeError, InputError

log = logging.getLogger("defuse")
NAME = "defuse"  # of the application

FAST_PROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",  # a prediction may be asked for twice
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",  # one HAProxy on one machine hears of a change at once
}


def use_fast_proxy() -> None:
    """Let HAProxy stand in front of the replicas, in Ray processes that this one starts from now on.

    Call it before ray.serve is imported, which reads these names once. The replicas then listen on a port of their
    own on every interface, so it suits machines behind a firewall.
    """
    os.environ.update(FAST_PROXY)


@contextlib.contextmanager
def ray_for(address: str | None, cpus: int) -> Iterator[None]:
    """Hold a connection to the cluster at `address`, or an embedded Ray that has `cpus` CPUs at least."""
    import ray

    from cluster.connection import connect, protect_embedded_ray

    if address:
        connect(address)
    else:
        protect_embedded_ray()
        count = max(os.cpu_count() or 1, cpus)
        with _explained("Ray did not start on this machine"):
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
def application(args: dict[str, Any], host: str, port: int, shared: bool) -> Iterator[str]:
    """Serve inside the block; yields the address. `args` are those of app.ServeArgs.

    On a `shared` cluster other applications stay as they are. Raises InputError where one is called as this.
    """
    from ray import serve
    from ray.serve.config import HTTPOptions

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with _explained("Serve did not start"):
        serve.start(
            http_options=HTTPOptions(host=host, port=port), logging_config={"enable_access_log": False}
        )
    found, port = _listening(host, port)
    if not args.get("require_token"):
        _mind_the_door(host, found)
    if shared and NAME in serve.status().applications:
        raise InputError(
            f"the cluster serves an application called {NAME} already; `defuse promote` gives it another model, "
            "and it ends with the command that started it (or with `serve shutdown`, which ends all of them)"
        )
    try:
        deploy(args)
        yield f"http://{'127.0.0.1' if found == '0.0.0.0' else found}:{port}"
    finally:
        if shared:
            serve.delete(NAME)
        else:
            serve.shutdown()  # type: ignore[no-untyped-call]


def _listening(host: str, port: int) -> tuple[str, int]:
    """Return where Serve listens: as asked, unless it ran already and listens elsewhere."""
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    options = client.http_config if client is not None else None
    if options is None or (options.host, options.port) == (host, port):
        return host, port
    log.warning("Serve runs on this cluster already, so --host and --port are those that it began with")
    return str(options.host), int(options.port)


def mind_the_replicas(host: str) -> None:
    """Raise InputError where replicas behind HAProxy could be reached from elsewhere though nobody asked for that."""
    if is_loopback(host):
        raise InputError(
            "--haproxy lets every replica listen on every interface of this machine: set DEFUSE_SERVE_TOKEN, or let "
            "anybody who reaches it ask with `--host 0.0.0.0`"
        )


def _mind_the_door(asked: str, found: str) -> None:
    """Say that anybody may ask. Raises InputError where the user asked for loopback and it is open all the same."""
    if is_loopback(found):
        return
    if is_loopback(asked):
        raise InputError(
            f"Serve runs on this cluster already and listens on {found}, which can be reached from elsewhere: set "
            f"DEFUSE_SERVE_TOKEN, or let anybody ask with `--host {found}`"
        )
    log.warning("%s can be reached from elsewhere, and DEFUSE_SERVE_TOKEN is not set: anybody may ask", found)


def deploy(args: dict[str, Any]) -> None:
    """Start the application, or bring the one that runs to other arguments, on a Serve that runs already."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    from cluster.errors import one_line
    from services.serving.app import ServeArgs, build

    with _explained("the application did not start"):
        built = build(ServeArgs.model_validate(args))
        try:
            serve.run(built, name=NAME, logging_config={"enable_access_log": False})
        except (RuntimeError, RayError, RayServeException) as error:
            raise ComputeError(f"the application did not start: {_cause() or one_line(error)}") from error


def _cause() -> str | None:
    """Return what the replicas that do not start say, in one line."""
    from ray import serve

    application = serve.status().applications.get(NAME)
    deployments = application.deployments.values() if application is not None else ()
    said = (line.strip() for deployment in deployments for line in deployment.message.splitlines())
    lines = [line for line in said if line]
    return lines[-1] if lines else None


class Ending:
    """Ctrl-C or SIGTERM. It interrupts what is under way, and ends `wait`.

    Ray takes both signals when it starts, so this is made after.
    """

    def __init__(self) -> None:
        self.asked, self.waiting = threading.Event(), False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, *_: object) -> None:
        if not self.waiting:
            raise KeyboardInterrupt
        self.asked.set()

    def wait(self) -> None:
        """Return when this process is asked to end."""
        self.waiting = True
        self.asked.wait()


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        raise InputError(f"{what}: {error.errors()[0]['msg']}") from error
    except (RuntimeError, ConnectionError, OSError, TimeoutError, ValueError) as error:
        raise ComputeError(f"{what}: {error}") from error
