"""deploy/kubernetes: KubeRay's form and Kubernetes' own, what the pods may do, and what Ray makes of it."""

from __future__ import annotations

import copy
import json
import re
import shlex
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kuberay import FORMS
from pydantic import ValidationError
from shipped import DEPLOY, arguments, document, documents, load, pods, ray_specs

PODS = pytest.mark.parametrize(("where", "pod"), pods(), ids=[where for where, _ in pods()])
SPECS = pytest.mark.parametrize(("kind", "spec"), ray_specs(), ids=[kind for kind, _ in ray_specs()])
GPU = "nvidia.com/gpu"


def ray_container(pod: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = pod["containers"][0]  # KubeRay: the first one is Ray's
    return container


def validate_pod(pod: dict[str, Any]) -> None:
    whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod}
    kubernetes_validate.validate(whole, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize(("name", "tree"), documents(), ids=[f"{n}-{t['kind']}" for n, t in documents()])
def test_each_document_has_the_form_that_kubernetes_or_kuberay_takes(name: str, tree: dict[str, Any]) -> None:
    if tree["kind"] in FORMS:
        FORMS[tree["kind"]].model_validate(tree)
    else:
        kubernetes_validate.validate(tree, kubernetes_validate.latest_version(), strict=True)


def test_the_ray_documents_have_different_names_since_kuberay_names_services_and_secrets_after_them() -> None:
    names = [tree["metadata"]["name"] for _, tree in documents() if tree["kind"] in FORMS]
    assert len(set(names)) == len(names) == 3
    comments = (DEPLOY / "kubernetes" / "ray-cluster.yaml").read_text(encoding="utf-8")
    name = document("RayCluster")["metadata"]["name"]
    assert f"service/{name}-head-svc" in comments and f"get secret {name} " in comments


def test_a_field_that_kuberay_does_not_know_is_found() -> None:
    tree = document("RayCluster")
    tree["spec"]["workerGroupSpec"] = []
    with pytest.raises(ValidationError, match="workerGroupSpec"):
        FORMS["RayCluster"].model_validate(tree)


@PODS
def test_each_pod_has_the_form_that_kubernetes_takes(where: str, pod: dict[str, Any]) -> None:
    validate_pod(pod)
    wrong = copy.deepcopy(pod)
    ray_container(wrong)["resorces"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        validate_pod(wrong)


@PODS
def test_each_container_is_limited_and_may_not_become_root(where: str, pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        context = container["securityContext"]
        assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        limits = container["resources"]["limits"]
        assert {"cpu", "memory"} <= set(limits)
        assert (
            container["resources"]["requests"] == limits
        )  # Ray plans with the limits, so they must be there


@PODS
def test_all_pods_run_as_the_account_that_settings_makes_and_only_autoscalers_may_ask_kubernetes(
    where: str, pod: dict[str, Any]
) -> None:
    """Without a name, KubeRay makes an account for each head that has the autoscaler, which no role is bound to."""
    assert pod["serviceAccountName"] == document("ServiceAccount")["metadata"]["name"]
    scales = where in {"RayCluster head", "RayService head"}
    assert pod.get("automountServiceAccountToken", True) == scales


@PODS
def test_each_container_is_the_cuda_image_of_this_version(where: str, pod: dict[str, Any]) -> None:
    image = load(DEPLOY / "compose.gpu.yaml")["services"]["ray-worker"]["image"]
    assert ray_container(pod)["image"] == f"registry.example.com/{image}"
    assert load(DEPLOY / "ray-cluster.yaml")["docker"]["image"] == ray_container(pod)["image"]


@SPECS
def test_workers_have_a_gpu_and_the_head_has_none(kind: str, spec: dict[str, Any]) -> None:
    head = ray_container(spec["headGroupSpec"]["template"]["spec"])
    assert GPU not in head["resources"]["limits"]
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        assert ray_container(pod)["resources"]["limits"][GPU] == 1
        assert {"key": GPU, "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]


@PODS
def test_probes_ask_what_this_kind_of_node_answers(where: str, pod: dict[str, Any]) -> None:
    from ray._private import ray_constants as constants
    from ray.serve._private.constants import PROXY_MIN_DRAINING_PERIOD_S

    kind, role = where.split()
    raylet = f"http://localhost:{constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT}/api/local_raylet_healthz"
    gcs = f"http://localhost:{constants.DEFAULT_DASHBOARD_PORT}/api/gcs_healthz"
    proxy = "http://localhost:8000/-/healthz"
    ready = {raylet, gcs} if role == "head" else {raylet, proxy} if kind == "RayService" else {raylet}
    container = ray_container(pod)
    assert asked(container["readinessProbe"]) == ready
    assert asked(container["livenessProbe"]) == ready - {proxy}
    assert container["livenessProbe"]["failureThreshold"] > container["readinessProbe"]["failureThreshold"]
    if proxy in ready:  # a Service must have left the pod before its proxy ends
        failing_s = (
            container["readinessProbe"]["failureThreshold"] * container["readinessProbe"]["periodSeconds"]
        )
        assert failing_s < PROXY_MIN_DRAINING_PERIOD_S / 2


def asked(probe: dict[str, Any]) -> set[str]:
    command = probe["exec"]["command"]
    assert command[:2] == ["bash", "-c"] and len(command) == 3
    return {word for word in shlex.split(command[2]) if word.startswith("http")}


def test_secrets_and_settings_come_by_reference_alone() -> None:
    text = json.dumps([tree for _, tree in documents()])
    assert '"kind": "Secret"' not in text
    assert not re.search(r'"name": "\w*(TOKEN|SECRET|PASSWORD|KEY)\w*", "value"', text)
    settings = document("ConfigMap")
    for where, pod in pods():
        sources = [next(iter(source.values()))["name"] for source in ray_container(pod)["envFrom"]]
        assert sources == [settings["metadata"]["name"], "defuse-secrets"], where
    comments = (DEPLOY / "kubernetes" / "settings.yaml").read_text(encoding="utf-8")
    assert "kubectl create secret generic defuse-secrets" in comments


@PODS
def test_every_mounted_volume_is_there_and_the_data_of_runs_is_the_claim_that_settings_makes(
    where: str, pod: dict[str, Any]
) -> None:
    mounted = {mount["name"]: mount["mountPath"] for mount in ray_container(pod)["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(mounted) == set(volumes)
    claim = document("PersistentVolumeClaim")["metadata"]["name"]
    if where.startswith("RayService"):  # serving reads the store alone
        assert set(volumes) == {"ray-logs"}
    else:
        assert volumes["data"]["persistentVolumeClaim"]["claimName"] == claim
    assert mounted["ray-logs"] == "/tmp/ray"  # KubeRay's autoscaler reads the logs from a volume of this name


@SPECS
def test_ray_reads_the_resources_off_each_group(kind: str, spec: dict[str, Any]) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    cluster = {"metadata": {"name": "x", "namespace": "default"}, "spec": {"autoscalerOptions": {}} | spec}
    types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0  # nothing but drivers runs there
    assert types["gpu"]["resources"] | {"memory": 0} == {"CPU": 4, "GPU": 1, "memory": 0}
    group = spec["workerGroupSpecs"][0]
    assert types["gpu"]["max_workers"] == group["maxReplicas"] >= group["replicas"] >= 1


@SPECS
def test_nobody_gets_in_without_a_token(kind: str, spec: dict[str, Any]) -> None:
    assert spec["authOptions"] == {"mode": "token"}


def test_a_run_file_is_in_the_image_where_the_job_looks_for_it() -> None:
    entrypoint = shlex.split(document("RayJob")["spec"]["entrypoint"])
    file = entrypoint[entrypoint.index("run") + 1]
    assert (DEPLOY.parent / file).is_file() and file.startswith("deploy/runs/")
    assert "VARIANT" in arguments()  # the image that has it is this Dockerfile's


def test_the_service_serves_what_serve_yaml_serves() -> None:
    ours = yaml.safe_load(document("RayService")["spec"]["serveConfigV2"])
    theirs = load(DEPLOY / "serve.yaml")
    # `auto` is 0 where Serve is configured before the nodes with GPUs have joined, as on Kubernetes
    settings = ours["applications"][0]["args"].pop("settings")
    # only KubeRay has a cluster to keep
    assert ours["applications"][0]["args"].pop("require_model") is True
    worker = document("RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]
    limits = worker["containers"][0]["resources"]["limits"]
    assert settings == {"gpus_per_replica": limits["nvidia.com/gpu"]}
    for application in (*ours["applications"], *theirs["applications"]):
        assert application["args"].pop("require_token") is True
        application["args"].pop("store")
    assert ours == theirs
