"""A whole run on Ray whose store is a bucket: every worker writes there itself."""

from __future__ import annotations

import json
import os
import signal
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

from defuse_core.artifacts import Models
from defuse_core.config import load_run_file
from defuse_core.local import LocalCompute
from defuse_core.pipeline import run_defuse
from defuse_core.runs import ReachedStep, Run
from defuse_core.store import FolderStore
from defuse_core.training.reference_models import ReferenceAnnotators
from services.storage import open_store
from tests.conftest import ROOT, TINY
from tests.s3_servers import moto_server
from tests.waiting import WAIT_S

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
def runfile(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run file; this process can reach the bucket."""
    for name, value in (KEYS | {"AWS_ENDPOINT_URL": server}).items():
        monkeypatch.setenv(name, value)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


PLAIN = "from services.cli import main; main()"
HASTY = f"from services.storage import lease; lease.BEAT_S, lease.LEASE_S = 0.5, 3.0\n{PLAIN}"


def start(runfile: Path, where: str, store: str, server: str, code: str = PLAIN) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, "run", str(runfile), "--on", where, "--store", store],
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


def begin(runfile: Path, folder: Path, models: Models, until: str) -> None:
    """Begin the run in the bucket, and the same in `folder`, with all that comes before and with `until`."""
    run = Run.start(FolderStore(folder), "tiny", load_run_file(runfile), until=until)
    run.once("train", Models, lambda: models)
    compute = LocalCompute()
    with pytest.raises(ReachedStep):
        run_defuse(run, compute, ReferenceAnnotators(run, compute))
    target = open_store("s3://bucket/runs/tiny")
    for key in run.store.list():
        target.write(key, run.store.read(key))


def test_a_run_on_ray_in_a_bucket_gives_the_local_report_and_keeps_a_second_driver_out(
    runfile: Path, bucket: Any, server: str, tmp_path: Path, tiny_models: Models
) -> None:
    begin(runfile, tmp_path / "runs", tiny_models, until="train")
    with start(runfile, "ray", "s3://bucket/runs", server) as first:
        wait_for(bucket, "runs/tiny/.lease.json", first)
        with start(
            runfile, "local", "s3://bucket/runs", server
        ) as second:  # the lease is taken before Ray starts
            said = second.communicate(timeout=240)[1]
        assert (second.returncode, first.poll()) == (4, None), said
        assert f"process {first.pid} on " in said.splitlines()[-1]
        told = first.communicate(timeout=240)[1]
    assert first.returncode == 0, told
    with start(runfile, "local", str(tmp_path / "runs"), server) as whole:
        assert whole.wait(240) == 0
    report = bucket.get_object(Bucket="bucket", Key="runs/tiny/report.json")["Body"].read()
    assert without_clock(report) == without_clock((tmp_path / "runs" / "tiny" / "report.json").read_bytes())


def test_a_driver_that_is_paused_while_another_takes_over_changes_nothing_and_ends(
    runfile: Path, bucket: Any, server: str, tmp_path: Path, tiny_models: Models
) -> None:
    """The split brain: the paused driver's trials, in processes of their own, go on all the while."""
    runfile.write_text(yaml.safe_dump(TINY | {"correct": {**TINY["correct"], "epochs": 30}}))
    begin(runfile, tmp_path / "runs", tiny_models, until="review")
    with start(runfile, "ray", "s3://bucket/runs", server, HASTY) as paused:
        wait_for(bucket, "runs/tiny/trials/baseline/lam-0.001.safetensors", paused)
        paused.send_signal(signal.SIGSTOP)
        with start(runfile, "local", "s3://bucket/runs", server, HASTY) as second:
            said = second.communicate(timeout=240)[1]
        assert second.returncode == 0, said
        report = bucket.get_object(Bucket="bucket", Key="runs/tiny/report.json")["Body"].read()
        paused.send_signal(signal.SIGCONT)
        resumed = time.monotonic()
        told = paused.communicate(timeout=WAIT_S)[1]
    assert paused.returncode == 4, told
    assert "took the run over" in told.splitlines()[-1]
    assert time.monotonic() - resumed < WAIT_S
    with start(runfile, "local", str(tmp_path / "runs"), server) as whole:
        assert whole.wait(240) == 0
    assert without_clock(report) == without_clock((tmp_path / "runs" / "tiny" / "report.json").read_bytes())
    again = bucket.get_object(Bucket="bucket", Key="runs/tiny/report.json")["Body"].read()
    assert again == report
