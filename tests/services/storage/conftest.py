"""Stores in a folder and in a bucket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from buckets import KEYS
from s3_servers import moto_server, one_loader

from defuse_core.store import FolderStore, Store
from services.storage import open_store, s3


@pytest.fixture(autouse=True)
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Credentials of nobody in particular, and no client left from the test before."""
    monkeypatch.setattr("botocore.session.create_loader", one_loader)
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    s3._forget_clients()
    yield monkeypatch
    s3._forget_clients()


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    with moto_server() as address:
        client = boto3.client(
            "s3",
            endpoint_url=address,
            region_name="us-east-1",
            aws_access_key_id="a",
            aws_secret_access_key="b",
        )
        client.create_bucket(Bucket="bucket")
        yield address


@pytest.fixture
def bucket(moto: str, aws: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Store:
    """A store in a bucket, below a prefix of this test's own."""
    aws.setenv("AWS_ENDPOINT_URL", moto)
    name = request.node.name.replace("[", "/").strip("]")
    return open_store(f"s3://bucket/{request.path.stem}/{name}")


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return FolderStore(tmp_path / "runs") if request.param == "folder" else request.getfixturevalue("bucket")
