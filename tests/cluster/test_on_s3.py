"""A whole run on Ray whose store is a bucket: every worker writes there itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from botocore.exceptions import ClientError

from tests.conftest import ROOT, TINY
from tests.s3_servers import moto_server

KEYS = {
    "AWS_ACCESS_KEY_ID": "somebody",
    "AWS_SECRET_ACCESS_KEY": "hush-hush-hush",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture
def server() -> Iterator[str]:
    with moto_server() as address:
        yield address


@pytest.fixture
def bucket(server: str) -> Any:
    """A client of a server whose bucket is called `bucket`."""
    client = boto3.client(
        "s3",
        endpoint_url=server,
        region_name="us-east-1",
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
    )
    client.create_bucket(Bucket="bucket")
    return client


@pytest.fixture
def runfile(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def start(runfile: Path, where: str, store: str, server: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "services.cli", "run", str(runfile), "--on", where, "--store", store],
        cwd=ROOT,
        env=os.environ | KEYS | {"AWS_ENDPOINT_URL": server},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def exists(bucket: Any, key: str) -> bool:
    try:
        bucket.head_object(Bucket="bucket", Key=key)
    except ClientError:
        return False
    return True


def wait_for(bucket: Any, key: str, driver: subprocess.Popen[str]) -> None:
    """Return once `key` is there, with the driver still at work."""
    while not exists(bucket, key):
        assert driver.poll() is None, driver.communicate()[1]
        time.sleep(0.05)


def without_clock(report: bytes) -> dict[str, object]:
    found: dict[str, object] = json.loads(report)
    found.pop("provenance")
    return found


def test_a_run_on_ray_in_a_bucket_gives_the_local_report_and_keeps_a_second_driver_out(
    runfile: Path, bucket: Any, server: str, tmp_path: Path
) -> None:
    with start(runfile, "ray", "s3://bucket/runs", server) as first:
        wait_for(bucket, "runs/tiny/.lease.json", first)
        with start(runfile, "ray", "s3://bucket/runs", server) as second:
            said = second.communicate(timeout=120)[1]
        assert (second.returncode, first.poll()) == (4, None), said
        assert f"process {first.pid} on " in said.splitlines()[-1]
        told = first.communicate(timeout=240)[1]
    assert first.returncode == 0, told
    with start(runfile, "local", str(tmp_path / "runs"), server) as whole:
        assert whole.wait(120) == 0
    report = bucket.get_object(Bucket="bucket", Key="runs/tiny/report.json")["Body"].read()
    assert without_clock(report) == without_clock((tmp_path / "runs" / "tiny" / "report.json").read_bytes())
