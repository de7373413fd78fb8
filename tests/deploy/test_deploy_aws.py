"""deploy/ray-cluster.yaml, taken by Ray's own code for `ray up` as far as an AWS of moto goes."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_NODE_NAME, TAG_RAY_USER_NODE_TYPE
from shipped import DEPLOY, load

from tests.s3_servers import one_loader


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    filled: dict[str, Any] = prepare_config(load(DEPLOY / "ray-cluster.yaml"))
    return filled


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An AWS on loopback with the instance profile that the file names; keys go to a home of their own."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setattr("botocore.session.create_loader", one_loader)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        import boto3

        iam = boto3.client("iam", region_name="us-west-2")
        iam.create_instance_profile(InstanceProfileName="defuse-ray")
        yield
    server.stop()


def test_ray_accepts_the_file(config: dict[str, Any]) -> None:
    validate_config(config)
    with pytest.raises(Exception, match="max_worker"):
        validate_config({**config, "max_worker": 1})


def test_ray_up_would_make_the_two_kinds_of_machines(config: dict[str, Any], aws: None) -> None:
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    whole = bootstrap_aws(copy.deepcopy(config))
    provider = AWSNodeProvider(whole["provider"], whole["cluster_name"])
    for kind in ("head", "gpu"):
        role = "head" if kind == "head" else "worker"
        tags = {TAG_RAY_NODE_KIND: role, TAG_RAY_USER_NODE_TYPE: kind, TAG_RAY_NODE_NAME: kind}
        provider.create_node(whole["available_node_types"][kind]["node_config"], tags, 1)
        (node,) = provider.non_terminated_nodes({TAG_RAY_USER_NODE_TYPE: kind})
        machine = provider.ec2.meta.client.describe_instances(InstanceIds=[node])["Reservations"][0][
            "Instances"
        ][0]
        assert machine["InstanceType"] == config["available_node_types"][kind]["node_config"]["InstanceType"]
        assert machine["IamInstanceProfile"]["Arn"].endswith("/defuse-ray")


def test_ray_knows_the_gpu_of_a_worker_and_leaves_the_head_to_drivers(
    config: dict[str, Any], aws: None
) -> None:
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    types = AWSNodeProvider.fillout_available_node_types_resources(copy.deepcopy(config))[
        "available_node_types"
    ]
    assert types["gpu"]["resources"]["GPU"] == 1 and types["gpu"]["resources"]["CPU"] == 4
    assert types["head"]["resources"]["CPU"] == 0 and "GPU" not in types["head"]["resources"]


def test_workers_come_and_go(config: dict[str, Any]) -> None:
    gpu = config["available_node_types"]["gpu"]
    assert 1 == gpu["min_workers"] < gpu["max_workers"] == config["max_workers"]
    assert config["idle_timeout_minutes"] > 0


def test_every_node_asks_for_the_token_and_is_given_it(config: dict[str, Any]) -> None:
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert {"/home/defuse/.ray": "~/.ray"}.items() <= config["file_mounts"].items()


def test_the_dashboard_is_reached_through_ssh_alone(config: dict[str, Any]) -> None:
    (start,) = (line for line in config["head_start_ray_commands"] if "--head" in line)
    assert "--dashboard-host=127.0.0.1" in shlex.split(start)


def test_disks_are_encrypted_and_the_metadata_service_wants_a_session(config: dict[str, Any]) -> None:
    for kind in config["available_node_types"].values():
        node = kind["node_config"]
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"])
