"""Credentials that a file, a program or a login gives: what is said where these fail, and that no key seems absent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from buckets import KEYS

from defuse_core.errors import StoreError
from services.storage import open_store, s3
from services.storage.lease import Lease, LeaseInBucket

OLD_KEYS = (
    '{"Version": 1, "AccessKeyId": "a", "SecretAccessKey": "b", "SessionToken": "c", '
    '"Expiration": "2020-01-01T00:00:00Z"}'
)


@pytest.fixture
def store(aws: pytest.MonkeyPatch) -> s3.S3Store:
    for name in KEYS:
        aws.delenv(name)
    return s3.S3Store("bucket", "run/", "http://127.0.0.1:9", "us-east-1")


@pytest.mark.parametrize(
    "use",
    [
        lambda store: store.exists("a"),
        lambda store: store.read("a"),
        lambda store: store.write("a", b"1"),
        lambda store: store.delete("a"),
        lambda store: store.is_locked(),
        lambda store: Lease(LeaseInBucket(store), "ana").beat(),
    ],
    ids=["exists", "read", "write", "delete", "is_locked", "heartbeat"],
)
def test_a_token_whose_file_is_missing_is_a_wrong_setting_and_no_missing_key(
    use: Callable[[s3.S3Store], Any], store: s3.S3Store, aws: pytest.MonkeyPatch
) -> None:
    aws.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/nonexistent/token")
    aws.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/x")
    with pytest.raises(StoreError, match="credentials found .*/nonexistent/token: No such file") as refused:
        use(store)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("script", "exit_code", "words"),
    [
        (None, 2, "no complete AWS credentials found .*process.sh: No such file or directory"),
        ("echo vault is locked >&2; exit 1", 4, "no complete AWS credentials found .*vault is locked"),
        (
            "echo Please log in",
            4,
            "Expecting value: .* check what gives AWS credentials, such as credential_p",
        ),
        (f"echo '{OLD_KEYS}'", 4, "the refreshed credentials are still expired; check what gives AWS"),
    ],
    ids=["missing", "fails", "no JSON", "expired"],
)
def test_a_program_that_gives_no_credentials_is_reported_with_its_reason(
    script: str | None, exit_code: int, words: str, store: s3.S3Store, aws: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program, config = tmp_path / "process.sh", tmp_path / "config"
    if script is not None:
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    config.write_text(f"[default]\ncredential_process = {program}\n")
    aws.setenv("AWS_CONFIG_FILE", str(config))
    with pytest.raises(StoreError, match=f"^s3://bucket/run/a: .*{words}") as refused:
        store.exists("a")
    assert refused.value.exit_code == exit_code
    with pytest.raises(StoreError, match=words):  # and not the endpoint, which opening looks at first
        open_store("s3://bucket/run")


def test_a_login_that_is_missing_is_a_wrong_setting_and_says_how_to_log_in(
    store: s3.S3Store, aws: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    login = {
        "start_url": "https://x.example/start",
        "region": "us-east-1",
        "account_id": "1",
        "role_name": "x",
    }
    lines = "".join(f"sso_{name} = {value}\n" for name, value in login.items())
    (tmp_path / "config").write_text(f"[default]\n{lines}")
    aws.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    aws.setenv("HOME", str(tmp_path))
    with pytest.raises(StoreError, match="log in with `aws sso login`") as refused:
        store.exists("a")
    assert refused.value.exit_code == 2
