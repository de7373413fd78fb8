"""The fields of KubeRay's ray.io/v1 (1.5.1 and 1.6) that the manifests use; any other field is an error."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel


class Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


class Metadata(Form):
    name: str = Field(
        pattern=r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$"
    )  # KubeRay: a DNS label, and room for its suffixes


class AuthOptions(Form):
    mode: Literal["token", "disabled"]


class AutoscalerOptions(Form):
    idle_timeout_seconds: int = Field(60, ge=1)
    upscaling_mode: Literal["Default", "Aggressive", "Conservative"] = "Default"
    resources: dict[str, dict[str, str]] = {}
    security_context: dict[str, Any] = {}


class HeadGroup(Form):
    ray_start_params: dict[str, str]
    template: dict[str, Any]  # a core/v1 PodTemplateSpec


class WorkerGroup(Form):
    group_name: str
    replicas: int = Field(0, ge=0)
    min_replicas: int = Field(0, ge=0)
    max_replicas: int = Field(2**31 - 1, ge=1)
    ray_start_params: dict[str, str]
    template: dict[str, Any]


class RayClusterSpec(Form):
    ray_version: str
    auth_options: AuthOptions
    enable_in_tree_autoscaling: bool = False
    autoscaler_options: AutoscalerOptions | None = None
    head_group_spec: HeadGroup
    worker_group_specs: list[WorkerGroup]


class RayJobSpec(Form):
    entrypoint: str
    submission_mode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] = "K8sJobMode"
    backoff_limit: int = Field(0, ge=0)
    shutdown_after_job_finishes: bool = False
    ttl_seconds_after_finished: int = Field(0, ge=0)
    ray_cluster_spec: RayClusterSpec


class RayServiceSpec(Form):
    serve_config_v2: str
    ray_cluster_config: RayClusterSpec


class Resource(Form):
    api_version: Literal["ray.io/v1"]
    metadata: Metadata


class RayCluster(Resource):
    kind: Literal["RayCluster"]
    spec: RayClusterSpec


class RayJob(Resource):
    kind: Literal["RayJob"]
    spec: RayJobSpec


class RayService(Resource):
    kind: Literal["RayService"]
    spec: RayServiceSpec


FORMS: dict[str, type[Resource]] = {"RayCluster": RayCluster, "RayJob": RayJob, "RayService": RayService}
