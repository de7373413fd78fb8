"""The Ray Serve application: `serve run services.serving.app:build run=NAME`, or deploy/serve.yaml."""

from __future__ import annotations

import math
from typing import Any

import ray
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig

from defuse_core.config import ServeSection
from defuse_core.errors import InputError
from defuse_core.runs import Run
from services.serving.candidate import prepare, with_settings
from services.serving.lineup import Source
from services.serving.registry import Registry
from services.serving.server import Server
from services.storage import open_store

ACROSS_NODES_S = 30.0  # a replica that is told to stop finishes what it has within this time


class ServeArgs(BaseModel):
    """What the application is built from."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    store: str = "runs"
    """Folder or s3://bucket/prefix that holds the runs and the registry; reachable from every node."""
    run: str | None = None
    """Answer with this run's corrected model until a version is promoted; without it, with what is in production."""
    pin: bool = False
    """Stay with `run`, whatever is promoted."""
    require_token: bool = False
    """Refuse to start a replica that has no DEFUSE_SERVE_TOKEN in its environment."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Fields of section `serve` that differ from the run file's."""


def build(args: ServeArgs | dict[str, Any]) -> Application:
    """Return the application, one deployment. Raises InputError for settings or a run that cannot be served.

    `serve deploy` and `serve run` pass a dict: Ray cannot see the type behind a postponed annotation.
    """
    args = ServeArgs.model_validate(args)
    settings = plan(args.model_dump())
    store = open_store(args.store)
    source = Source()
    if args.run is not None:
        key, _ = prepare(Run.open(store, args.run))
        source = Source(f"{args.run}/{key}", Registry(store).standing(), args.pin)
    bound: Application = deployment(settings).bind(
        store.address, source, settings, args.settings, args.require_token
    )
    return bound


def plan(args: dict[str, Any]) -> ServeSection:
    """Return the settings that the application of these arguments will have. Raises InputError."""
    checked = ServeArgs.model_validate(args)
    if checked.pin and checked.run is None:
        raise InputError("--pin stays with one run, so name it")
    store = open_store(checked.store)
    if checked.run is not None:
        recorded = Run.open(store, checked.run).spec.serve
    else:
        registry = Registry(store)
        recorded = _recorded(registry, registry.standing().production)
    return with_settings(recorded, checked.settings)


def _recorded(registry: Registry, production: int | None) -> ServeSection:
    if production is None:
        return ServeSection()
    return registry.load(production).run_file().serve


def deployment(settings: ServeSection) -> Any:
    """Return the deployment for the load and the machines that the settings name."""
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": settings.cpus_per_replica, "num_gpus": _gpus(settings)},
        "max_ongoing_requests": settings.max_ongoing,
        "max_queued_requests": settings.max_queued,
        "backpressure_config": BackpressureConfig(retry_after_s=settings.retry_after_s),
        "graceful_shutdown_timeout_s": max(ACROSS_NODES_S, 2 * settings.timeout_s),
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 30.0,
    }
    if settings.min_replicas == settings.max_replicas:
        options["num_replicas"] = settings.min_replicas
    else:
        options["autoscaling_config"] = AutoscalingConfig(
            min_replicas=settings.min_replicas,
            max_replicas=settings.max_replicas,
            target_ongoing_requests=settings.target_ongoing,
        )
    return serve.deployment(serve.ingress()(Server), name="classifier", **options)


def _gpus(settings: ServeSection) -> float:
    """Return the GPUs of a replica: auto takes one where the cluster has any."""
    if settings.device == "cpu":
        return 0.0
    if settings.gpus_per_replica != "auto":
        return settings.gpus_per_replica
    resources: dict[str, float] = ray.cluster_resources() if ray.is_initialized() else {}  # type: ignore[no-untyped-call]
    return 1.0 if resources.get("GPU", 0) >= 1 else 0.0


def expect_gpus(settings: ServeSection) -> None:
    """Raise InputError where this machine has not got the GPUs that the replicas ask for: Serve would wait for ever."""
    needed = settings.min_replicas * _gpus(settings)
    has = ray.cluster_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
    if needed > has:
        raise InputError(
            f"serve.gpus_per_replica: {settings.min_replicas} x {_gpus(settings):g} GPU asked for, and Ray finds "
            f"{has:g} on this machine"
        )


def cpus_needed(settings: ServeSection) -> int:
    """Return the CPUs that all replicas together reserve."""
    return math.ceil(settings.max_replicas * settings.cpus_per_replica)
