"""What only a bucket can do, and how it refuses."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from buckets import KEYS
from s3_servers import rclone_server

from defuse_core.artifacts import Psi
from defuse_core.codec import decode, encode
from defuse_core.errors import InputError, StoreError
from defuse_core.store import Store
from services.storage import open_store, s3


def test_more_keys_than_fit_on_a_page_are_all_listed(bucket: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "LIST_PAGE", 3)
    for number in range(10):
        bucket.write(f"{number}", b"")
    assert bucket.list() == [f"{number}" for number in range(10)]


def test_empty_objects_by_which_other_programs_mark_a_folder_are_no_keys(bucket: Store) -> None:
    assert isinstance(bucket, s3.S3Store)
    for marker in ("", "overrides/"):
        bucket._client.put_object(Bucket="bucket", Key=bucket.prefix + marker, Body=b"")
    bucket.write("overrides/1.json", b"{}")
    assert bucket.list() == bucket.list("overrides/") == ["overrides/1.json"]
    bucket.delete_all()
    assert bucket._client.list_objects_v2(Bucket="bucket", Prefix=bucket.prefix)["KeyCount"] == 0


def test_parts_of_an_object_that_a_killed_driver_left_are_dropped_by_the_next_one(bucket: Store) -> None:
    assert isinstance(bucket, s3.S3Store)
    here = {"Bucket": "bucket", "Prefix": bucket.prefix}
    bucket._client.create_multipart_upload(Bucket="bucket", Key=bucket.prefix + "models.safetensors")
    assert len(bucket._client.list_multipart_uploads(**here)["Uploads"]) == 1
    with bucket.lock():
        assert "Uploads" not in bucket._client.list_multipart_uploads(**here)


def test_a_large_object_goes_in_parts(bucket: Store, moto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "LARGE_BYTES", 5 * 2**20)
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    data = os.urandom(11 * 2**20)
    with bucket.lock():
        bucket.write("large", data[::-1])
        bucket.write("large", data)
    assert bucket.read("large") == data
    assert isinstance(bucket, s3.S3Store)
    etag = bucket._client.head_object(Bucket="bucket", Key=bucket.prefix + "large")["ETag"]
    assert etag.strip('"').endswith("-3")


def test_altered_bytes_are_noticed_by_the_digest_in_the_artefact(bucket: Store) -> None:
    counts = np.array([3, 4])
    bucket.write("psi.safetensors", encode(Psi(counts, 10, 40, 3, 1, 0.5)))
    bucket.write("psi.safetensors", bucket.read("psi.safetensors").replace(counts.tobytes(), bytes(16)))
    with pytest.raises(
        StoreError, match="its bytes changed since they were written; delete it and run again"
    ):
        decode(Psi, bucket.read("psi.safetensors"), "psi.safetensors")


def test_an_object_that_another_tool_wrote_is_read(bucket: Store) -> None:
    assert isinstance(bucket, s3.S3Store)
    bucket._client.put_object(Bucket="bucket", Key=bucket.prefix + "notes.json", Body=b"[]")
    assert bucket.read("notes.json") == b"[]"


def _refused(aws: pytest.MonkeyPatch, address: str = "s3://bucket/run") -> str:
    s3._forget_clients()
    with pytest.raises(StoreError) as refused:
        open_store(address).write("a", b"1")
    line = str(refused.value)
    assert "\n" not in line
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in line and "wrong-secret" not in line
    return line


def test_every_way_to_be_refused_says_what_to_do(tmp_path: Path, aws: pytest.MonkeyPatch) -> None:
    (tmp_path / "bucket").mkdir()
    with rclone_server(tmp_path, *KEYS.values()) as endpoint:
        aws.setenv("AWS_ENDPOINT_URL", endpoint)
        open_store("s3://bucket/run").write("a", b"1")
        assert "has no such bucket; create it" in _refused(aws, "s3://other/run")
        aws.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
        assert "refused the credentials (SignatureDoesNotMatch: " in _refused(aws)
        aws.setenv("AWS_ACCESS_KEY_ID", "nobody")
        assert "refused the credentials" in _refused(aws)
        aws.delenv("AWS_SECRET_ACCESS_KEY")
        assert "no complete AWS credentials found" in _refused(aws)
        aws.delenv("AWS_ACCESS_KEY_ID")
        assert "no complete AWS credentials found" in _refused(aws)
        aws.setenv("AWS_PROFILE", "nobody's")
        assert "check AWS_PROFILE" in _refused(aws)
    assert (tmp_path / "bucket" / "run" / "a").read_bytes() == b"1"


@pytest.mark.parametrize("settings", [{}, {"AWS_PROFILE": "nobody's"}, {"AWS_ACCESS_KEY_ID": "half"}])
def test_missing_credentials_are_a_wrong_setting_that_no_repetition_mends(
    aws: pytest.MonkeyPatch, settings: dict[str, str]
) -> None:
    for name in KEYS:
        aws.delenv(name, raising=False)
    for name, value in settings.items():
        aws.setenv(name, value)
    aws.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3._forget_clients()
    with pytest.raises(StoreError) as refused:
        open_store("s3://bucket/run")
    assert refused.value.exit_code == 2


def test_an_endpoint_that_is_down_is_said_at_once(aws: pytest.MonkeyPatch) -> None:
    aws.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    begun = time.monotonic()
    assert "no answer from http://127.0.0.1:9" in _refused(aws)
    assert time.monotonic() - begun < 60
    aws.setenv("AWS_ENDPOINT_URL", "http://ana:secret@127.0.0.1:9")
    assert "no answer from http://***@127.0.0.1:9 (" in _refused(aws)


class CountingServer(ThreadingHTTPServer):
    connections = 0

    def get_request(self) -> tuple[socket.socket, Any]:
        self.connections += 1
        return super().get_request()


@pytest.mark.parametrize("speaks_tls", [True, False])
def test_a_server_that_cannot_be_trusted_is_a_wrong_setting_and_is_asked_once(
    speaks_tls: bool, tmp_path: Path, aws: pytest.MonkeyPatch
) -> None:
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    subprocess.run([*made, "-keyout", key, "-out", certificate], capture_output=True, check=True)
    with CountingServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        if speaks_tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, key)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        aws.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{server.server_port}")
        with pytest.raises(
            StoreError, match="certificate of https.* set AWS_CA_BUNDLE .* AWS_ENDPOINT_URL"
        ) as refused:
            open_store("s3://bucket/run")
        assert (refused.value.exit_code, server.connections) == (2, 1)
        server.shutdown()


@pytest.mark.parametrize(
    ("name", "reason"),
    [("missing.pem", "No such file"), ("", "Is a directory"), ("empty.pem", "NO_CERTIFICATE")],
)
def test_a_file_of_certificates_that_cannot_be_read_is_named_at_once(
    name: str, reason: str, tmp_path: Path, aws: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty.pem").write_text("")
    aws.setenv("AWS_CA_BUNDLE", str(tmp_path / name))
    with CountingServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        aws.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{server.server_port}")
        with pytest.raises(StoreError, match=f"AWS_CA_BUNDLE .* can be read .*{reason}") as refused:
            open_store("s3://bucket/run")
        assert refused.value.exit_code == 2 and server.connections <= 1
        server.shutdown()


@pytest.mark.parametrize("address", ["minio:9000", "ana:sup3r@minio:9000", "http://ana:sup3r@my_minio:9000"])
def test_an_endpoint_that_is_no_address_is_said_without_its_password(
    aws: pytest.MonkeyPatch, address: str
) -> None:
    aws.setenv("AWS_ENDPOINT_URL", address)
    with pytest.raises(InputError, match="expected such as http://host:9000") as refused:
        open_store("s3://bucket/runs")
    assert "sup3r" not in "".join(traceback.format_exception(refused.value))


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN"])
def test_a_key_with_a_line_break_is_a_wrong_setting_and_is_not_shown(
    aws: pytest.MonkeyPatch, name: str
) -> None:
    aws.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    aws.setenv(name, "of-a-file\n")
    with pytest.raises(StoreError, match=f"{name}.* holds a line break") as refused:
        open_store("s3://bucket/runs")
    assert refused.value.exit_code == 2
    assert "of-a-file" not in "".join(traceback.format_exception(refused.value))


def test_a_region_that_is_none_is_named_and_not_the_endpoint(aws: pytest.MonkeyPatch) -> None:
    aws.setenv("AWS_DEFAULT_REGION", "eu west 1")
    with pytest.raises(InputError, match="AWS_DEFAULT_REGION.*eu west 1"):
        open_store("s3://bucket/runs")
