"""Credentials that a file, a program or a login gives: what is said where these fail, and that no key seems absent."""

from __future__ import annotations

import errno
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from botocore import exceptions as aws_errors
from buckets import KEYS

from defuse_core.errors import StoreError
from services.storage import open_store, s3
from services.storage.lease import Lease, LeaseObject
from services.storage.s3_errors import translated_errors

OLD_KEYS = (
    '{"Version": 1, "AccessKeyId": "a", "SecretAccessKey": "b", "SessionToken": "c", '
    '"Expiration": "2020-01-01T00:00:00Z"}'
)
ADDRESS = "http://ana:sup3r@vault.example/aws"


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
        lambda store: Lease(LeaseObject(store), "ana").beat(),
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
            r"Expecting value: .* if a program gives AWS credentials \(credential_process\), check it",
        ),
        (f"echo '{OLD_KEYS}'", 4, "the refreshed credentials are still expired; if a program gives"),
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


def test_a_program_is_asked_for_credentials_once_by_all_clients_and_threads(
    store: s3.S3Store, aws: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program, config, asked = tmp_path / "process.sh", tmp_path / "config", tmp_path / "asked"
    keys = '{"Version": 1, "AccessKeyId": "a", "SecretAccessKey": "b"}'
    program.write_text(f"#!/bin/sh\necho asked >> {asked}\necho '{keys}'\n")
    program.chmod(0o755)
    config.write_text(f"[default]\ncredential_process = {program}\n")
    aws.setenv("AWS_CONFIG_FILE", str(config))

    def sign(attempts: int) -> None:
        client = s3._client(store.endpoint, store.region, attempts, 10.0)
        client.generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "a"})

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(sign, range(1, 5)))
    assert asked.read_text() == "asked\n"


def test_credentials_that_come_later_are_found(
    store: s3.S3Store, aws: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    aws.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    with pytest.raises(StoreError, match="no complete AWS credentials found; set"):
        store.exists("a")
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = KEY\naws_secret_access_key = b\n")
    signed = store._client.generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "a"})
    assert "KEY" in signed


@pytest.mark.filterwarnings("ignore::getpass.GetPassWarning")
def test_a_profile_that_asks_for_a_code_without_a_terminal_is_a_wrong_setting(
    store: s3.S3Store, aws: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def read_nothing(*_: object, **__: object) -> str:
        raise EOFError

    role, keys = "arn:aws:iam::123456789012", "aws_access_key_id = a\naws_secret_access_key = b"
    profile = f"role_arn = {role}:role/x\nsource_profile = default\nmfa_serial = {role}:mfa/ana"
    (tmp_path / "config").write_text(f"[default]\n{keys}\n[profile role]\n{profile}\n")
    for name, value in (("CONFIG_FILE", str(tmp_path / "config")), ("PROFILE", "role")):
        aws.setenv(f"AWS_{name}", value)
    aws.setenv("AWS_DEFAULT_REGION", "us-east-1")
    aws.setattr("getpass._raw_input", read_nothing)
    with pytest.raises(StoreError, match="asks for an MFA code, .* `eval .*--format env") as refused:
        store.exists("a")
    assert refused.value.exit_code == 2


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


@pytest.mark.parametrize("before", ["", "a" * 168 + " "], ids=["whole", "cut"])
@pytest.mark.parametrize(
    "error",
    [
        lambda text: aws_errors.CredentialRetrievalError(provider="custom-process", error_msg=text),
        lambda text: aws_errors.ClientError({"Error": {"Code": "AccessDenied", "Message": text}}, "X"),
        lambda text: aws_errors.ClientError({"Error": {"Code": "X", "Message": f"{'b' * 300} {text}"}}, "X"),
        lambda text: aws_errors.SSOTokenLoadError(error_msg=text),
        RuntimeError,
    ],
    ids=["program", "refusal", "answer", "login", "old keys"],
)
def test_no_reason_shows_the_password_of_an_address_not_even_where_it_is_cut(
    error: Callable[[str], Exception], before: str
) -> None:
    with pytest.raises(StoreError) as raised, translated_errors("s3://b/k", None):
        raise error(f"{before}no answer from {ADDRESS}")
    assert "sup3" not in str(raised.value)


@pytest.mark.parametrize(
    ("error", "exit_code", "words"),
    [
        (
            OSError(errno.EMFILE, "Too many open files", "cacert.pem"),
            4,
            "cacert.pem: Too many open files; run again to continue",
        ),
        (OSError(errno.ESTALE, "Stale file handle", "token"), 4, "token: Stale file handle; run again"),
        (
            OSError(errno.EACCES, "Permission denied", "token"),
            2,
            r"\(token: Permission denied\); check AWS_A",
        ),
        (
            OSError(errno.ENOEXEC, "Exec format error", "login.sh"),
            2,
            r"\(login.sh: Exec format error\); check",
        ),
    ],
)
def test_a_file_that_cannot_be_read_for_the_moment_is_no_missing_credentials(
    error: OSError, exit_code: int, words: str
) -> None:
    with pytest.raises(StoreError, match=words) as raised, translated_errors("s3://b/k", None):
        raise error
    assert raised.value.exit_code == exit_code


@pytest.mark.parametrize(
    ("error", "remedies"),
    [
        ("UnauthorizedSSOTokenError", 1),
        ("SSOTokenLoadError", 1),
        ("LoginRefreshRequired", 0),
        ("LoginTokenLoadError", 0),
    ],
)
def test_a_login_that_has_expired_names_its_command_once(error: str, remedies: int) -> None:
    if not hasattr(aws_errors, error):
        pytest.skip("this botocore does not know `aws login`")
    with pytest.raises(StoreError) as raised, translated_errors("s3://b/k", None):
        raise getattr(aws_errors, error)(error_msg="no file")
    assert raised.value.exit_code == 2
    assert str(raised.value).count("aws sso login") == remedies
    assert str(raised.value).count("aws login") == 1 - remedies
