"""A whole run on Ray whose store is a bucket: every worker writes there itself."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from botocore.exceptions import ClientError

from defuse_core.artifacts import Models
from defuse_core.codec import decode
from defuse_core.config import RunFile, load_run_file
from defuse_core.local import LocalCompute
from defuse_core.pipeline import run_defuse
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from defuse_core.training.reference_models import ReferenceAnnotators
from services.storage import open_store
from tests.conftest import TINY, trained_run
from tests.e2e import forked_commands
from tests.s3_servers import moto_server
from tests.start_forked_worker import fork_workers
from tests.waiting import WAIT_S

KEYS = {
    "AWS_ACCESS_KEY_ID": "somebody",
    "AWS_SECRET_ACCESS_KEY": "hush-hush-hush",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with moto_server() as address:
        yield address


@pytest.fixture(scope="module")
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


@contextlib.contextmanager
def driver(
    runfile: Path, where: str, store: str, log: Path, *before: Callable[[], None]
) -> Iterator[BaseProcess]:
    """Run the run file; the driver is killed at the end of the block if it has not ended."""
    words = ["run", str(runfile), "--on", where, "--store", store]
    process = forked_commands.start(words, log, *([fork_workers] if where == "ray" else []), *before)
    try:
        yield process
    finally:
        process.kill()
        process.join()


def ended(process: BaseProcess, log: Path, within_s: float = 240) -> tuple[int | None, str]:
    """Return the exit code of a driver, None where it goes on, and what it said."""
    process.join(within_s)
    return process.exitcode, log.read_text()


def exists(bucket: Any, key: str) -> bool:
    try:
        bucket.head_object(Bucket="bucket", Key=key)
    except ClientError:
        return False
    return True


def wait_for(bucket: Any, key: str, process: BaseProcess, log: Path) -> None:
    """Return once `key` is there, with the driver still at work."""
    while not exists(bucket, key):
        assert process.is_alive(), log.read_text()
        time.sleep(0.05)


def without_clock(report: bytes) -> dict[str, object]:
    found: dict[str, object] = json.loads(report)
    found.pop("provenance")
    return found


def copy(folder: Path, store: str) -> None:
    """Copy the run in `folder` into the bucket."""
    source, target = FolderStore(folder), open_store(f"{store}/tiny")
    for key in source.list():
        target.write(key, source.read(key))


def finish(folder: Path, spec: RunFile) -> None:
    """Compute the run in `folder` in this process."""
    run, compute = Run.start(FolderStore(folder), "tiny", spec), LocalCompute()
    run_defuse(run, compute, ReferenceAnnotators(run, compute))


def test_a_run_on_ray_in_a_bucket_gives_the_local_report_and_keeps_a_second_driver_out(
    runfile: Path, bucket: Any, tmp_path: Path, finished_run: Path
) -> None:
    whole = finished_run / "runs" / "tiny"
    models = decode(Models, (whole / "models.safetensors").read_bytes(), "models")
    trained_run(FolderStore(tmp_path), "tiny", load_run_file(runfile), models)
    copy(tmp_path / "tiny", "s3://bucket/one")
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    with driver(runfile, "ray", "s3://bucket/one", logs[0], forked_commands.no_figures) as first:
        wait_for(bucket, "one/tiny/.lease.json", first, logs[0])
        # the lease is taken before Ray starts
        with driver(runfile, "local", "s3://bucket/one", logs[1]) as second:
            code, said = ended(second, logs[1])
            assert (code, first.exitcode) == (4, None), said
        assert f"process {first.pid} on " in said.splitlines()[-1]
        code, told = ended(first, logs[0])
    assert code == 0, told
    report = bucket.get_object(Bucket="bucket", Key="one/tiny/report.json")["Body"].read()
    assert without_clock(report) == without_clock((whole / "report.json").read_bytes())


def test_a_driver_that_is_paused_while_another_takes_over_changes_nothing_and_ends(
    runfile: Path, bucket: Any, tmp_path: Path, finished_run: Path, no_figures: None
) -> None:
    """The split brain: the paused driver's trials, in processes of their own, go on all the while."""
    runfile.write_text(yaml.safe_dump(TINY | {"correct": {**TINY["correct"], "epochs": 8}}))
    spec = load_run_file(runfile)
    Run.start(FolderStore(tmp_path), "tiny", spec)
    for name in ("models", "references", "psi", "scenarios", "gallery", "votes", "verdicts"):
        shutil.copy(finished_run / "runs" / "tiny" / f"{name}.safetensors", tmp_path / "tiny")
    shutil.copytree(finished_run / "runs" / "tiny" / "psi", tmp_path / "tiny" / "psi")
    copy(tmp_path / "tiny", "s3://bucket/two")
    logs = [tmp_path / "paused.log", tmp_path / "second.log"]
    before = (forked_commands.no_figures, forked_commands.hasty_leases)
    with driver(runfile, "ray", "s3://bucket/two", logs[0], *before) as paused:
        wait_for(bucket, "two/tiny/trials/baseline/lam-0.001.safetensors", paused, logs[0])
        assert paused.pid is not None
        os.kill(paused.pid, signal.SIGSTOP)
        with driver(runfile, "local", "s3://bucket/two", logs[1], *before) as second:
            code, said = ended(second, logs[1])
            assert code == 0, said
        report = bucket.get_object(Bucket="bucket", Key="two/tiny/report.json")["Body"].read()
        os.kill(paused.pid, signal.SIGCONT)
        resumed = time.monotonic()
        code, told = ended(paused, logs[0], WAIT_S)
    assert code == 4, told
    assert re.search("took the run over|holds it now", told.splitlines()[-1])
    assert time.monotonic() - resumed < WAIT_S
    finish(tmp_path, spec)
    assert without_clock(report) == without_clock((tmp_path / "tiny" / "report.json").read_bytes())
    again = bucket.get_object(Bucket="bucket", Key="two/tiny/report.json")["Body"].read()
    assert again == report
