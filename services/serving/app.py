"""The Ray Serve application: `serve run services.serving.app:build run=NAME`, or deploy/serve.yaml."""

from __future__ import annotations

import logging
import math
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig

from cluster.resources import hide_other_gpus
from defuse_core.config import ServeSection
from defuse_core.errors import InputError
from defuse_core.runs import Run
from services.serving.active_versions import InitialModel
from services.serving.api import build_api
from services.serving.arguments import ServeArgs, resolve_settings
from services.serving.candidate import Candidate, prepare_candidate
from services.serving.deployment import ClassifierDeployment
from services.serving.limits import MAX_UPLOADS
from services.serving.registry import DamagedVersionError, Registry
from services.serving.registry_state import RegistryState
from services.storage import open_store

log = logging.getLogger("defuse")
MIN_SHUTDOWN_S = 30.0  # a stopping replica gets at least this time to finish its requests


class ClassifierIngress(ClassifierDeployment):
    """The deployment with its HTTP interface."""

    def __init__(self, *args: Any) -> None:
        hide_other_gpus()
        super().__init__(*args)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self)


def build(args: ServeArgs | dict[str, Any]) -> Application:
    """Return the application, one deployment. Raises InputError for invalid settings or a run without a model.

    `serve deploy` and `serve run` pass a dict: Ray cannot see the type behind a postponed annotation.
    """
    args = ServeArgs.model_validate(args)
    settings = resolve_settings(args)
    store = open_store(args.store)
    registry, initial = Registry(store), InitialModel()
    if args.run is not None:
        key, candidate = prepare_candidate(Run.open(store, args.run))
        initial = InitialModel(f"{args.run}/{key}", registry.state(), args.pin)
        if not args.pin:
            _warn_of_other_version(initial.state, candidate)
    else:
        _warn_of_damage(registry)
    application: Application = classifier_deployment(settings).bind(
        store.address, initial, settings, args.settings, args.require_token
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


def _warn_of_damage(registry: Registry) -> None:
    """Warn where the version in production is damaged or missing."""
    number = registry.state().production
    try:
        if number is not None:
            registry.load(number)
    except DamagedVersionError as error:
        log.warning("%s; requests are answered 503 until then", error)


def classifier_deployment(settings: ServeSection) -> Any:
    """Return the deployment with the replicas and resources of the settings."""
    options: dict[str, Any] = {
        "ray_actor_options": {
            "num_cpus": settings.cpus_per_replica,
            "num_gpus": _gpus_per_replica(settings),
        },
        "max_ongoing_requests": settings.max_ongoing + settings.max_queued + MAX_UPLOADS,
        "max_queued_requests": settings.max_queued,
        "backpressure_config": BackpressureConfig(retry_after_s=settings.retry_after_s),
        "graceful_shutdown_timeout_s": max(MIN_SHUTDOWN_S, 2 * settings.timeout_s),
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
    return serve.deployment(serve.ingress()(ClassifierIngress), name="classifier", **options)


def _gpus_per_replica(settings: ServeSection) -> float:
    """Return the GPUs of a replica; auto is 1 where the cluster has any."""
    if settings.device == "cpu":
        return 0.0
    if settings.gpus_per_replica != "auto":
        return settings.gpus_per_replica
    resources: dict[str, float] = ray.cluster_resources() if ray.is_initialized() else {}  # type: ignore[no-untyped-call]
    return 1.0 if resources.get("GPU", 0) >= 1 else 0.0


def require_gpus(settings: ServeSection) -> None:
    """Raise InputError where the embedded Ray lacks the GPUs of the replicas: Serve would wait for them forever."""
    needed = settings.min_replicas * _gpus_per_replica(settings)
    available = ray.cluster_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
    if needed > available:
        raise InputError(
            f"serve.gpus_per_replica: expected {settings.min_replicas} x {_gpus_per_replica(settings):g} GPU on this "
            f"machine, found {available:g}"
        )


def total_cpus(settings: ServeSection) -> int:
    """Return the CPUs that all replicas together reserve."""
    return math.ceil(settings.max_replicas * settings.cpus_per_replica)
