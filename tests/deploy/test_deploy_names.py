"""Each command line, environment name, port and path in deploy/ means something to who gets it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
from shipped import DEPLOY, ROOT, command_lines, compose, document, instructions, load

OTHERS = {  # their owners document them; services/settings.py's and Ray's names are looked up in the code
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL",  # boto3
    "POSTGRES_DB", "POSTGRES_USER", "POSTGRES_PASSWORD_FILE",  # the postgres image
    "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES",  # the NVIDIA container runtime
    "NO_PROXY", "no_proxy",  # HTTP clients
    "HOME", "PATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV",
}  # fmt: skip
LABEL_STUDIO = {
    "DJANGO_DB", "POSTGRE_HOST", "POSTGRE_PORT", "POSTGRE_NAME", "POSTGRE_USER", "POSTGRE_PASSWORD",
    "LABEL_STUDIO_HOST",
    "LABEL_STUDIO_USERNAME", "LABEL_STUDIO_PASSWORD", "LABEL_STUDIO_USER_TOKEN",
    "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN", "LABEL_STUDIO_DISABLE_SIGNUP_WITHOUT_LINK",
    "SECRET_KEY", "COLLECT_ANALYTICS", "SENTRY_DSN", "FRONTEND_SENTRY_DSN", "LATEST_VERSION_CHECK", "TASK_LOCK_TTL",
}  # fmt: skip


def parse(command: click.Command, arguments: Sequence[str], name: str) -> None:
    """Parse a command line as far as click does before it runs anything. Raises click.UsageError."""
    context = command.make_context(name, list(arguments))
    if isinstance(command, click.Group):
        rest = [*context._protected_args, *context.args]
        found, inner, rest = command.resolve_command(context, rest)
        assert inner is not None
        parse(inner, rest, found or "")


DEFUSE = list(command_lines("defuse"))
RAY = [
    *command_lines("ray"),
    *(("compose.yaml", service["command"][1:]) for service in compose()["services"].values()
      if service.get("command", [""])[0] == "ray"),
    *(("Dockerfile", json.loads(rest)[1:]) for word, rest in instructions() if word == "CMD"),
    *(("ray-cluster.yaml", line.split()[1:]) for line in [
        *load(DEPLOY / "ray-cluster.yaml")["head_start_ray_commands"],
        *load(DEPLOY / "ray-cluster.yaml")["worker_start_ray_commands"]]),
]  # fmt: skip


def test_the_files_do_name_commands() -> None:
    assert {"compose.yaml", "ray-cluster.yaml", "ray-job.yaml"} <= {where for where, _ in DEFUSE}
    assert len(RAY) >= 8


@pytest.mark.parametrize(("where", "line"), DEFUSE, ids=[f"{w}: {' '.join(x)}" for w, x in DEFUSE])
def test_each_defuse_command_is_one_that_the_program_has(where: str, line: list[str]) -> None:
    from services.cli import defuse

    parse(defuse, line, "defuse")
    for file in (word for word in line if word.startswith("deploy/")):
        assert (ROOT / file).exists()


def test_a_command_that_is_not_there_is_found() -> None:
    from services.cli import defuse

    with pytest.raises(click.UsageError):
        parse(defuse, ["run", "deploy/runs/digits.yaml", "--onn", "ray"], "defuse")
    with pytest.raises(click.UsageError):
        parse(defuse, ["jobs", "lst"], "defuse")


@pytest.mark.parametrize(("where", "line"), RAY, ids=[f"{w}: {' '.join(x)}" for w, x in RAY])
def test_each_ray_command_is_one_that_ray_has(where: str, line: list[str]) -> None:
    from ray.scripts.scripts import cli

    parse(cli, line, "ray")


@pytest.mark.parametrize("file", sorted((DEPLOY / "runs").glob("*.yaml")), ids=lambda file: file.name)
def test_each_run_file_is_one_that_defuse_reads(file: Path) -> None:
    from defuse_core.config import load_run_file

    load_run_file(file, ("data.root=/data",))


def names_read_by_us() -> set[str]:
    source = (ROOT / "services" / "settings.py").read_text(encoding="utf-8")
    return set(re.findall(r'get\("(\w+)"\)', source))


def names_read_by_ray() -> set[str]:
    modules = (
        "ray._common.usage.usage_constants",
        "ray.serve._private.constants",
        "ray.exceptions",
        "ray.scripts.scripts",
    )
    sources = [Path(str(import_module(module).__file__)).read_text(encoding="utf-8") for module in modules]
    return set(re.findall(r"\bRAY_\w+", "\n".join(sources)))


def given_to_nodes() -> set[str]:
    """Return the names that the image, Compose, Kubernetes and `ray up` give to a Ray node."""
    image = " ".join(rest for word, rest in instructions() if word == "ENV")
    options = " ".join(load(DEPLOY / "ray-cluster.yaml")["docker"]["run_options"])
    secret = (DEPLOY / "kubernetes" / "settings.yaml").read_text(encoding="utf-8")
    return {
        *re.findall(r"(\w+)=", image),
        *re.findall(r"--env (\w+)=", options),
        *re.findall(r"--from-literal=(\w+)=", secret),
        *document("ConfigMap")["data"],
        *compose()["services"]["ray-head"]["environment"],
    }


def test_each_variable_of_a_node_is_read_by_someone() -> None:
    assert given_to_nodes() <= names_read_by_us() | names_read_by_ray() | OTHERS
    assert {
        "LABEL_STUDIO_URL",
        "LABEL_STUDIO_API_KEY",
        "DEFUSE_SERVE_TOKEN",
    } <= given_to_nodes() & names_read_by_us()


def test_serve_has_its_fast_proxy_on_every_cluster() -> None:
    from services.serving.launch import HAPROXY_ENVIRONMENT

    wanted = dict(HAPROXY_ENVIRONMENT)
    del wanted["DEFUSE_FORWARDED_FOR"]  # Ray's own HAProxy adds no address of a client
    del wanted["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"]  # other nodes' proxies hear of changes later
    options = load(DEPLOY / "ray-cluster.yaml")["docker"]["run_options"]
    given = [pair.partition("=")[::2] for option in options for pair in shlex.split(option)[1:]]
    for environment in (
        dict(given),
        document("ConfigMap")["data"],
        compose()["services"]["ray-head"]["environment"],
    ):
        assert wanted.items() <= environment.items()


def test_annotators_get_an_address_that_they_can_open_beside_the_one_of_the_pods() -> None:
    for environment in (document("ConfigMap")["data"], compose()["services"]["ray-head"]["environment"]):
        assert environment["LABEL_STUDIO_URL"] != environment["LABEL_STUDIO_HOST"]


def test_each_variable_of_the_other_services_is_documented() -> None:
    for name, service in compose()["services"].items():
        given = set(service.get("environment", {}))
        rclone = {
            variable for variable in given if variable.startswith("RCLONE_")
        }  # these are tried out elsewhere
        if not name.startswith("ray-"):
            assert given <= OTHERS | LABEL_STUDIO | rclone, name


def test_ports_are_the_ones_that_ray_and_serve_use() -> None:
    from ray._private import ray_constants as constants
    from ray.serve._private.constants import DEFAULT_HTTP_PORT

    head = compose()["services"]["ray-head"]["command"]
    assert f"--port={constants.DEFAULT_PORT}" in head
    assert f"--dashboard-port={constants.DEFAULT_DASHBOARD_PORT}" in head
    exposed = {int(port) for word, rest in instructions() if word == "EXPOSE" for port in rest.split()}
    assert exposed == {constants.DEFAULT_PORT, constants.DEFAULT_DASHBOARD_PORT, DEFAULT_HTTP_PORT}
    (check,) = (rest for word, rest in instructions() if word == "HEALTHCHECK")
    assert f":{constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT}/" in check
    containers = document("RayCluster")["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in containers[0]["ports"]}
    assert (ports["gcs-server"], ports["dashboard"], ports["serve"]) == (6379, 8265, DEFAULT_HTTP_PORT)


def test_serve_yaml_names_an_application_that_can_be_imported() -> None:
    tree: dict[str, Any] = load(DEPLOY / "serve.yaml")
    from ray.serve.schema import ServeDeploySchema

    for application in ServeDeploySchema.model_validate(tree).applications:
        module, _, name = application.import_path.partition(":")
        builder = getattr(import_module(module), name)
        arguments = builder.__globals__["ServeArgs"]
        arguments.model_validate(application.args)
