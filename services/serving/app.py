"""The Ray Serve application: `serve run services.serving.app:build run=NAME`, or deploy/serve.yaml.

`defuse serve` runs it with `serve_until_stopped`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import socket
from collections.abc import Callable, Iterator
from functools import partial
from time import sleep
from typing import Any

import ray
from fastapi import FastAPI
from pydantic import ValidationError
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig, HTTPOptions
from ray.serve.exceptions import RayServeException

from cluster.connection import connection, explained_line
from cluster.ray_compat import deployment_version, log_folder, serve_address, shut_down_serve, uses_haproxy
from cluster.resources import hide_other_gpus
from defuse_core.config import ServeSection
from defuse_core.errors import ComputeError, InputError, StoreError
from defuse_core.formatting import escape_control_characters
from defuse_core.runs import Run
from services import ignore_signals
from services.serving.active_versions import InitialModel
from services.serving.api import build_api
from services.serving.candidate import Candidate, prepare_candidate
from services.serving.deployment import ClassifierDeployment, when_store_answers
from services.serving.launch import (
    Proxy,
    ServeArgs,
    is_loopback,
    require_free_port,
    serve_section,
    warn_of_production,
)
from services.serving.limits import MAX_UPLOADS, RETRY_AFTER_S
from services.serving.monitoring import LivenessCheck, log_to_stderr
from services.serving.registry import POLL_S, Registry
from services.serving.registry_state import NO_VERSION, RegistryState, registry_command
from services.storage import open_store

log = logging.getLogger("defuse")
APPLICATION = "defuse"  # its name in Ray Serve
MAX_INT32 = 2**31 - 1  # in a message of Serve
TARGET_ONGOING = 16  # requests in flight per replica that autoscaling aims at
MIN_SHUTDOWN_S = 30.0  # a stopping replica gets at least this time to finish its requests


class ClassifierIngress(ClassifierDeployment):
    """The deployment with its HTTP interface."""

    def __init__(self, *args: Any, require_model: bool = False) -> None:
        log_to_stderr()
        hide_other_gpus()
        super().__init__(*args)
        # Serve gives up after a few constructors that raise
        while self.active.is_outage and (require_model or _is_application_answering()):
            sleep(POLL_S)
            self.active = self.watcher.load_initial()
        if self.active.error is not None and require_model:
            raise ComputeError(self.active.error)
        if self.active.error is not None and _is_application_answering():
            raise ComputeError(f"{self.active.error}; others answer until Serve has started this one again")

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self)


def _is_application_answering() -> bool:
    """Return whether this replica is one more, or replaces another, of an application that has started."""
    application = serve.status().applications.get(serve.get_replica_context().app_name)
    deployments = application.deployments.values() if application is not None else ()
    return any(one.status != "UPDATING" and "RUNNING" in one.replica_states for one in deployments)


def build(args: ServeArgs | dict[str, Any]) -> Application:
    """Return the application, one deployment, once the store answers.

    Raises InputError for invalid settings or a run without a model. `serve deploy` and `serve run` pass a dict: Ray
    cannot see the type behind a postponed annotation.
    """
    log_to_stderr()
    return when_store_answers(partial(_application, ServeArgs.model_validate(args)))


def _application(args: ServeArgs) -> Application:
    section, store = serve_section(args), open_store(args.store)
    registry, initial = Registry(store), InitialModel()
    if args.run is not None:
        key, candidate = prepare_candidate(Run.open(store, args.run))
        for line in candidate.failed_checks():
            log.warning("run %s is served although a check failed: %s", args.run, line)
        initial = InitialModel(f"{args.run}/{key}", registry.state(), args.pin)
        if not args.pin:
            _warn_of_other_version(initial.state, candidate)
    else:
        warn_of_production(registry, section, args.settings)
    application: Application = classifier_deployment(section).bind(
        store.address, initial, section, args.settings, args.require_token, require_model=args.require_model
    )
    return application


def _warn_of_other_version(state: RegistryState, candidate: Candidate) -> None:
    """Warn where the registry has another model in production than the candidate, which is served."""
    number = state.production
    if number is None or number not in state.versions or state.versions[number].digest == candidate.digest:
        return
    log.warning(
        "version %d (run %s) is in production, and this server answers with run %s until the next promotion; without "
        "RUN it answers with the version in production",
        number,
        state.versions[number].run,
        candidate.run,
    )


def classifier_deployment(section: ServeSection) -> Any:
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": section.cpus_per_replica, "num_gpus": _gpus_per_replica(section)},
        "max_ongoing_requests": min(section.max_ongoing + section.max_queued + MAX_UPLOADS, MAX_INT32),
        "max_queued_requests": max(1, section.max_queued),  # Serve refuses 0; RequestSlots holds the limit
        "backpressure_config": BackpressureConfig(retry_after_s=RETRY_AFTER_S),
        "graceful_shutdown_timeout_s": max(MIN_SHUTDOWN_S, 2 * section.timeout_s),
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 30.0,
    }
    if section.min_replicas == section.max_replicas:
        options["num_replicas"] = section.min_replicas
    else:
        options["autoscaling_config"] = AutoscalingConfig(
            min_replicas=section.min_replicas,
            max_replicas=section.max_replicas,
            target_ongoing_requests=TARGET_ONGOING,
        )
    return serve.deployment(serve.ingress()(ClassifierIngress), name="classifier", **options)


def _gpus_per_replica(section: ServeSection) -> float:
    """Return the GPUs of a replica; auto is 1 where the cluster has any."""
    if section.device == "cpu":
        return 0.0
    if section.gpus_per_replica != "auto":
        return section.gpus_per_replica
    resources: dict[str, float] = ray.cluster_resources() if ray.is_initialized() else {}  # type: ignore[no-untyped-call]
    return 1.0 if resources.get("GPU", 0) >= 1 else 0.0


def require_gpus(section: ServeSection, *, embedded: bool) -> None:
    """Raise InputError where no replica could start: each needs a GPU and gets none, or Serve would wait for ever.

    The embedded Ray has the GPUs of this machine alone; a cluster may get those that are missing.
    """
    if section.device == "cuda" and not _gpus_per_replica(section):
        if section.gpus_per_replica == 0:
            why = "serve.gpus_per_replica is 0; leave that to auto, or set serve.device to auto or cpu"
        elif embedded:
            why = "Ray finds no GPU on this machine; set it to auto or cpu"
        else:
            why = (
                "the cluster has no GPU; set it to auto or cpu, or serve.gpus_per_replica to 1 where nodes with GPUs "
                "join later"
            )
        raise InputError(f"serve.device: cuda, but {why}")
    needed = section.min_replicas * _gpus_per_replica(section)
    available = ray.cluster_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
    if embedded and needed > available:
        raise InputError(
            f"serve.gpus_per_replica: expected {section.min_replicas} x {_gpus_per_replica(section):g} GPU on this "
            f"machine, found {available:g}"
        )


def serve_until_stopped(
    args: ServeArgs,
    section: ServeSection,
    address: str | None,
    host: str,
    port: int,
    proxy: Proxy,
    show: Callable[[str], None],
) -> None:
    """Serve on the cluster at `address`, or on an embedded Ray, until a signal arrives.

    `show` is called with a line at the start, and one for each change of the registry.
    """
    cpus = math.ceil(section.max_replicas * section.cpus_per_replica)  # what all replicas reserve
    with contextlib.ExitStack() as ending, connection(address, cpus):
        require_gpus(section, embedded=address is None)
        running = running_application(args, host, port, proxy)
        with contextlib.suppress(KeyboardInterrupt), running as url, contextlib.ExitStack() as served:
            served.callback(ignore_signals)
            # Serve's controller ends during a call, which a thread of Ray prints as a failed task
            served.callback(ending.enter_context, contextlib.redirect_stdout(io.StringIO()))
            show(
                f"serving on {url} (API page: {url}/docs; logs of replicas: {log_folder()}); Ctrl-C stops it"
            )
            for line in registry_changes(
                Registry(open_store(args.store)),
                check=LivenessCheck(url, _deployed if proxy is Proxy.CLUSTER else None),
                has_model=args.run is not None,
            ):
                show(line)


@contextlib.contextmanager
def running_application(args: ServeArgs, host: str, port: int, proxy: Proxy) -> Iterator[str]:
    """Serve while the block runs; yields the address. The environment of `proxy` is set before.

    On a running cluster other applications are left alone. Raises InputError where one has the name of this, unless
    `args` has this one replace it: it goes on until this one is made.
    """
    shared = proxy is Proxy.CLUSTER
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
    if shared and not args.replace and APPLICATION in serve.status().applications:
        raise InputError(
            f"the cluster already serves an application named {APPLICATION}; change its model with `defuse promote`, "
            "stop the command that started it, or, where that was killed, add --replace to this one"
        )
    own = before = _deployed()  # the one to replace, until this one has started
    try:
        deploy(args)
        own = _deployed()
        yield f"http://{_url_host(actual_host)}:{actual_port}"
    finally:
        if not shared:
            shut_down_serve()
        else:
            _delete_own(own, before)


def _delete_own(own: str | None, before: str | None) -> None:
    """Delete the application `own`; not that of another program, and not the one `before` if it was not replaced."""
    now = _deployed()
    if own not in (before, now):
        log.warning("another program deleted the application or deployed it anew; nothing is deleted here")
    elif now is None or now != before:
        serve.delete(APPLICATION)


def _deployed() -> str | None:
    """Return the name of what is deployed on this cluster, which nothing deployed earlier or later has."""
    return deployment_version(APPLICATION, "classifier")


def _require_reachable_replicas(host: str) -> None:
    """Raise InputError where a cluster's HAProxy would ask replicas on other nodes that listen on loopback only."""
    listening, _ = serve_address() or (host, 0)
    if not uses_haproxy() or not is_loopback(listening):
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


def _free_port() -> int:
    with socket.socket() as test:
        test.bind(("127.0.0.1", 0))
        return int(test.getsockname()[1])


def _listening_address(host: str, port: int) -> tuple[str, int]:
    """Return host and port of Serve: the given ones, unless Serve was already running with others."""
    found = serve_address() or (host, port)
    if found != (host, port):
        log.warning("Serve is already running on this cluster; --host and --port are those of its start")
    return found


def _check_exposure(requested: str, actual: str) -> None:
    """Warn that anyone can send requests. Raises InputError where loopback was requested and is not in effect."""
    if is_loopback(actual):
        return
    if is_loopback(requested):
        raise InputError(
            f"Serve is already running on this cluster and listens on {actual}, which other machines can reach: set "
            f"DEFUSE_SERVE_TOKEN, or allow requests from everywhere with `--host {actual}`"
        )
    log.warning("anyone who reaches %s can send requests, since DEFUSE_SERVE_TOKEN is not set", actual)


def deploy(args: ServeArgs) -> None:
    """Start the application on a running Serve, or update the running application to other arguments."""
    with _translate_errors("the application did not start"):
        application = _application(args)  # a store that does not answer ends the command, with its reason
        try:
            serve.run(application, name=APPLICATION, logging_config={"enable_access_log": False})
        except (RuntimeError, RayError, RayServeException) as error:
            why = _replica_error() or explained_line(error)
            raise ComputeError(f"the application did not start: {why}") from error


def _replica_error() -> str | None:
    """Return the last line of the status of replicas that do not start."""
    application = serve.status().applications.get(APPLICATION)
    deployments = application.deployments.values() if application is not None else ()
    lines = (line.strip() for deployment in deployments for line in deployment.message.splitlines())
    return next((line for line in reversed(list(lines)) if line), None)


def registry_changes(
    registry: Registry,
    *,
    check: Callable[[], None],
    has_model: bool,  # of a run, which answers until a version is promoted
) -> Iterator[str]:
    """Yield a line for each change of the registry, for ever. Calls `check` at each poll."""
    known: RegistryState | None = None
    reported = ""  # why the registry could not be read at the last poll
    while True:
        check()
        try:
            if known is None:
                known = registry.state()
                if known.production is None and not has_model:
                    promotion = registry_command("promote RUN", registry.store)
                    yield f"{NO_VERSION}: requests are answered with 503 until `{promotion}`"
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
        sleep(POLL_S)


@contextlib.contextmanager
def _translate_errors(context: str) -> Iterator[None]:
    """Raise pydantic's errors as InputError, and those of Ray and of the system as ComputeError."""
    try:
        yield
    except ValidationError as error:
        raise InputError(f"{context}: {error.errors()[0]['msg']}") from error
    except (RayError, RuntimeError, OSError, ValueError) as error:
        raise ComputeError(f"{context}: {explained_line(error)}") from error
