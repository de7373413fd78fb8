"""What each answer of a server means, whichever server gives it: botocore's stub in place of one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from botocore import exceptions as aws
from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from botocore.stub import Stubber
from buckets import KEYS

from defuse_core.errors import NoAnswerError, StoreError, StoreSettingsError
from services.storage import open_store, s3
from services.storage.s3_errors import translated_errors

AT = {"Bucket": "bucket", "Key": "run/a"}
OLD, NEW = '"old"', '"new"'


@pytest.fixture
def store(aws: pytest.MonkeyPatch) -> s3.S3Store:
    # one client for all requests, which the stub replaces
    aws.setattr(s3, "SEND_TIMEOUT_S", s3.READ_TIMEOUT_S)
    return s3.S3Store("bucket", "run/", "http://127.0.0.1:9", "us-east-1")


@pytest.fixture
def server(store: s3.S3Store) -> Iterator[Stubber]:
    """Expects the calls that are added to it, in this order, and no others."""
    with Stubber(store._client) as server:
        yield server
        server.assert_no_pending_responses()


def refuse(server: Stubber, call: str, status: int, code: str, **asked: Any) -> None:
    server.add_client_error(call, code, http_status_code=status, expected_params=AT | asked)


@pytest.mark.parametrize(
    ("status", "code"),
    [(412, "PreconditionFailed"), (409, "ConditionalRequestConflict"), (404, "NoSuchKey")],
)
@pytest.mark.parametrize(("version", "condition"), [(OLD, {"IfMatch": OLD}), (None, {"IfNoneMatch": "*"})])
def test_a_condition_that_does_not_hold_is_no_error(store, server, status, code, version, condition):
    refuse(server, "put_object", status, code, Body=b"1", **condition)
    assert store.write_if("a", b"1", version) is None


@pytest.mark.parametrize("status", [403, 400], ids=["refused", "expired"])  # a HEAD gets no more than that
def test_credentials_of_a_profile_are_read_again_after_they_were_refused(status, aws, tmp_path):
    def write(key: str) -> None:
        lines = f"[nightly]\naws_access_key_id = {key}\naws_secret_access_key = secret\n"
        (tmp_path / "credentials").write_text(lines)

    def used() -> str:
        return str(store._client.generate_presigned_url("get_object", Params=AT))

    for name in KEYS:
        aws.delenv(name, raising=False)
    aws.setenv("AWS_PROFILE", "nightly")
    aws.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    write("OLD")
    store = s3.S3Store("bucket", "run/", "http://127.0.0.1:9", "us-east-1")
    with Stubber(store._client) as server:
        write("NEW")
        assert "OLD" in used()
        refuse(server, "head_object", status, str(status))
        with pytest.raises(StoreError, match="refused the credentials"):
            store.exists("a")
    assert "NEW" in used()


def test_a_server_that_knows_no_conditions_is_asked_without_them(store, server):
    refuse(server, "put_object", 501, "NotImplemented", Body=b"1", IfMatch=OLD)
    server.add_response("put_object", {"ETag": NEW}, AT | {"Body": b"1"})
    assert store.write_if("a", b"1", OLD) == NEW
    refuse(server, "delete_object", 501, "NotImplemented", IfMatch=OLD)
    server.add_response("delete_object", {}, AT)
    assert store.delete_if("a", OLD)


def test_another_error_of_a_conditional_write_is_an_error_and_not_tried_without_the_condition(store, server):
    refuse(server, "put_object", 403, "AccessDenied", Body=b"1", IfMatch=OLD)
    with pytest.raises(StoreError, match="refused the credentials"):
        store.write_if("a", b"1", OLD)


def test_another_error_of_a_conditional_deletion_is_an_error(store, server):
    refuse(server, "delete_object", 403, "AccessDenied", IfMatch=OLD)
    with pytest.raises(StoreError, match="refused the credentials"):
        store.delete_if("a", OLD)


@pytest.mark.parametrize(
    ("status", "code", "gone"),
    [
        (412, "PreconditionFailed", False),
        (409, "ConditionalRequestConflict", False),
        (404, "NoSuchKey", True),
    ],
)
def test_an_object_that_another_one_replaced_is_not_deleted(store, server, status, code, gone):
    refuse(server, "delete_object", status, code, IfMatch=OLD)
    assert store.delete_if("a", OLD) is gone


def test_a_value_that_others_always_replace_is_given_up_and_says_so(store, server, aws):
    aws.setattr(s3, "WRITE_PAUSE_S", 0.0)
    aws.setattr(s3, "WRITE_ATTEMPTS", 3)
    aws.setattr(s3.S3Store, "read", lambda store, key: b"theirs")
    for _ in range(3):
        server.add_response("head_object", {"ETag": OLD}, AT)
        refuse(server, "put_object", 412, "PreconditionFailed", Body=b"ours", IfMatch=OLD)
    with pytest.raises(StoreError, match=r"s3://bucket/run/a: other writers replace it all the time"):
        store.write("a", b"ours", unless=lambda stored: False)


def test_a_value_that_is_deleted_before_it_is_compared_is_written_next(store, server, aws):
    aws.setattr(s3, "WRITE_PAUSE_S", 0.0)
    server.add_response("head_object", {"ETag": OLD}, AT)
    for call, asked in (
        ("get_object", {}),
        ("put_object", {"Body": b"1", "IfMatch": OLD}),
        ("get_object", {}),
    ):
        refuse(server, call, 404, "NoSuchKey", **asked)
    refuse(server, "head_object", 404, "404")
    server.add_response("put_object", {"ETag": NEW}, AT | {"Body": b"1", "IfNoneMatch": "*"})
    store.write("a", b"1", unless=lambda stored: False)


def sent_in_parts(server: Stubber, aws: pytest.MonkeyPatch) -> None:
    """Expect two parts of `b"12345"`, each with a checksum."""
    for name, value in (("LARGE_BYTES", 5), ("PART_BYTES", 3), ("PARTS_AT_ONCE", 1)):
        aws.setattr(s3, name, value)
    server.add_response("create_multipart_upload", {"UploadId": "7"}, AT)
    for number, body in ((1, b"123"), (2, b"45")):
        answer = {"ETag": f'"{number}"', "ChecksumCRC32": f"crc {number}"}
        server.add_response("upload_part", answer, AT | {"UploadId": "7", "PartNumber": number, "Body": body})


PARTS = [{"PartNumber": n, "ETag": f'"{n}"', "ChecksumCRC32": f"crc {n}"} for n in (1, 2)]
COMPLETE = {"UploadId": "7", "MultipartUpload": {"Parts": PARTS}}


def test_a_large_object_is_completed_with_its_checksums_and_on_its_condition(store, server, aws):
    sent_in_parts(server, aws)
    server.add_response("head_object", {"ETag": OLD}, AT)
    server.add_response("complete_multipart_upload", {"ETag": NEW}, AT | COMPLETE | {"IfMatch": OLD})
    assert store.write_if("a", b"12345", OLD) == NEW


def test_a_large_object_that_another_writer_replaced_meanwhile_is_dropped(store, server, aws):
    sent_in_parts(server, aws)
    server.add_response("head_object", {"ETag": NEW}, AT)
    server.add_response("abort_multipart_upload", {}, AT | {"UploadId": "7"})
    assert store.write_if("a", b"12345", OLD) is None


def test_a_large_object_is_stored_where_the_answer_to_its_completion_was_lost(store, server, aws):
    """Asked again, some servers answer that there is no such upload."""
    server.add_response("head_object", {"ETag": OLD}, AT)
    sent_in_parts(server, aws)
    server.add_response("head_object", {"ETag": OLD}, AT)
    refuse(server, "complete_multipart_upload", 404, "NoSuchUpload", **COMPLETE, IfMatch=OLD)
    refuse(server, "abort_multipart_upload", 404, "NoSuchUpload", UploadId="7")
    aws.setattr(s3.S3Store, "read", lambda store, key: b"12345")
    assert store._replace("a", b"12345", None)


def test_the_parts_of_a_large_object_that_cannot_be_completed_are_dropped(store, server, aws):
    sent_in_parts(server, aws)
    refuse(server, "complete_multipart_upload", 403, "AccessDenied", **COMPLETE)
    refuse(
        server, "abort_multipart_upload", 403, "AccessDenied", UploadId="7"
    )  # not told: the first error is
    with pytest.raises(StoreError, match="AccessDenied"):
        store.write("a", b"12345")


@pytest.mark.parametrize(
    ("code", "status", "exit_code", "words"),
    [
        (
            "ExpiredToken",
            400,
            4,
            r"http://\*\*\*@host refused the credentials \(ExpiredToken: too many\); check AWS_ACCESS",
        ),
        ("400", 400, 4, "refused the credentials .* their rights and expiry"),
        ("403", 403, 2, "for a missing object, too, unless s3:ListBucket is allowed on the whole"),
        ("ExpiredTokenException", 400, 4, "refused the credentials"),
        ("Unauthorized", 401, 2, "refused the credentials"),
        ("401", 401, 2, "refused the credentials"),
        ("InvalidIdentityToken", 400, 2, "refused the credentials"),
        ("AllAccessDisabled", 403, 2, r"refused the credentials \(AllAccessDisabled: too many\)"),
        (
            "RequestTimeTooSkewed",
            403,
            2,
            "answered RequestTimeTooSkewed: too many; the clock of this machine",
        ),
        ("QuotaExceeded", 403, 4, "answered QuotaExceeded: too many; free space there"),
        ("XMinioStorageFull", 507, 4, "free space there"),
        ("InvalidObjectState", 403, 2, "is archived: restore it"),
        ("NoSuchBucket", 404, 2, "has no such bucket; create it, or check --store"),
        ("PermanentRedirect", 301, 2, "in another region; set AWS_DEFAULT_REGION"),
        ("301", 301, 2, "in another region"),
        ("AuthorizationHeaderMalformed", 400, 2, "in another region"),
        ("IllegalLocationConstraintException", 400, 2, "in another region"),
        ("InvalidRegionName", 400, 2, "set AWS_DEFAULT_REGION to a region of that server"),
        ("InvalidBucketName", 400, 2, "answered InvalidBucketName: too many; check --store"),
        ("InvalidArgument", 400, 2, "answered InvalidArgument: too many; correct that: check --store, the"),
        ("KMS.DisabledException", 400, 2, "correct that"),
        ("405", 405, 2, "correct that"),
        ("XMinioAdminBucketQuotaExceeded", 400, 4, "free space there"),
        ("BadDigest", 400, 4, "answered BadDigest: too many; run again to continue"),
        ("OperationAborted", 409, 4, "run again to continue"),
        ("502", 502, 4, "answered 502: too many; check AWS_ENDPOINT_URL and the network, then run again"),
        ("SlowDown", 503, 4, r"http://\*\*\*@host answered SlowDown: too many; run again to continue"),
    ],
)
def test_an_answer_that_is_an_error_is_one_line_that_says_what_to_do(code, status, exit_code, words):
    error = aws.ClientError(
        {"Error": {"Code": code, "Message": "too many"}, "ResponseMetadata": {"HTTPStatusCode": status}},
        "HeadObject",
    )
    with (
        pytest.raises(StoreError, match=f"^s3://b/k: .*{words}") as raised,
        translated_errors("s3://b/k", "http://u:p@host"),
    ):
        raise error
    assert raised.value.exit_code == exit_code


@pytest.mark.parametrize(
    ("code", "status", "passes"),
    [
        ("SlowDown", 503, True),
        ("500", 500, True),
        ("TooManyRequests", 429, True),
        ("RequestTimeout", 400, True),
        ("RequestThrottled", 400, True),
        ("TooManyRequestsException", 400, True),
        ("PriorRequestNotComplete", 400, True),
        ("BandwidthLimitExceeded", 400, True),
        ("KMS.ThrottlingException", 400, True),
        ("IDPCommunicationError", 400, True),
        ("ServiceUnavailable", 200, True),
        ("520", 520, True),
        ("530", 530, True),
        ("NotImplemented", 501, False),
        ("XMinioStorageFull", 507, False),
        ("ExpiredToken", 400, False),
        ("400", 400, False),
        ("InvalidBucketName", 400, False),
        ("MethodNotAllowed", 405, False),
    ],
)
def test_only_answers_of_a_server_that_is_busy_or_fails_for_a_while_are_waited_for(code, status, passes):
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    with pytest.raises(StoreError) as raised, translated_errors("s3://b/k", None):
        raise aws.ClientError(answer, "X")
    assert isinstance(raised.value, NoAnswerError) == passes


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (aws.EndpointConnectionError(endpoint_url="http://host"), True),
        (aws.IncompleteReadError(actual_bytes=1, expected_bytes=2), True),
        (aws.CredentialRetrievalError(provider="iam-role", error_msg="no answer"), True),
        (aws.ConfigParseError(path="config", error="no section"), False),
    ],
)
def test_what_no_later_request_mends_is_not_waited_for(error, passes):
    with pytest.raises(StoreError) as raised, translated_errors("s3://b/k", None):
        raise error
    assert isinstance(raised.value, NoAnswerError) == passes


@pytest.mark.parametrize("code", ["NoSuchKey", "404", "NotFound"])
def test_a_missing_object_is_a_missing_file(code):
    with pytest.raises(FileNotFoundError, match="s3://b/k"), translated_errors("s3://b/k", None):
        raise aws.ClientError({"Error": {"Code": code}}, "X")


@dataclass
class Body:
    content: bytes = b""

    def stream(self, **_: object) -> Iterator[bytes]:
        return iter([self.content])


NO_S3 = (
    "; that is no answer of S3: check the scheme of AWS_ENDPOINT_URL, and that its port is the one of the S3"
)
PAGE = b"<html><body><center>nginx</center><hr></body></html>"


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (404, PAGE, f"answered 404: Not Found{NO_S3}"),
        (404, b'{"detail": "Not Found"}', f"answered 404: Not Found{NO_S3}"),
        (404, b"<html><body>nothing here</body></html>", f"answered 404{NO_S3}"),
        (
            404,
            b"<Error><Code>NoSuchKey</Code></Error>",
            "answered NoSuchKey; remove the bucket from AWS_ENDPOINT_URL",
        ),
        (400, b"Client sent an HTTP request to an HTTPS server.", f"answered 400: Bad Request{NO_S3}"),
        (403, PAGE, f"answered 403: Forbidden{NO_S3}"),
        (407, b"", f"answered 407: Proxy Authentication Required{NO_S3}"),
        (308, b"", f"answered 308: Permanent Redirect{NO_S3}"),
        (302, b"", "redirects elsewhere; set AWS_ENDPOINT_URL to the final address"),
        (200, b"<html><body>log in</body></html>", f"answered 200{NO_S3}"),
        (200, b"", f"answered 200{NO_S3}"),
    ],
)
def test_what_answers_in_place_of_an_s3_server_is_a_wrong_address_and_no_wrong_key(
    store, status, body, words
):
    client = s3._client(store.endpoint, store.region, 2, s3.READ_TIMEOUT_S)
    client.meta.events.register(
        "before-send.s3", lambda request, **_: AWSResponse(request.url, status, {}, Body(body))
    )
    with pytest.raises(StoreSettingsError) as raised:
        store.check()
    assert str(raised.value).startswith(f"s3://bucket/run: http://127.0.0.1:9 {words}")


def test_pages_of_a_proxy_while_a_store_is_used_are_told_as_what_they_are(store):
    status = {"GET": 404, "PUT": 413}
    for client in (store._client, store._sending_client):
        client.meta.events.register(
            "before-send.s3",
            lambda request, **_: AWSResponse(request.url, status[request.method], {}, Body(PAGE)),
        )
    with pytest.raises(FileNotFoundError):
        store.read("gone")
    with pytest.raises(
        StoreSettingsError, match=r"413: .*; a proxy before the server refuses so large objects"
    ):
        store.write("large", b"1")


PAGE_OF_A_PROXY = {"Error": {"Code": "404"}, "ResponseMetadata": {"HTTPStatusCode": 404}}
BAD_GATEWAY = {"Error": {"Code": "502"}, "ResponseMetadata": {"HTTPStatusCode": 502}}


@pytest.mark.parametrize(
    "error",
    [
        aws.EndpointConnectionError(endpoint_url="http://host"),
        aws.ClientError(PAGE_OF_A_PROXY, "ListObjectsV2"),
        aws.ClientError(BAD_GATEWAY, "HeadObject"),
        RecursionError(),
    ],
)
@pytest.mark.parametrize(("proxy", "is_named"), [("http://proxy:3128", True), ("", False)])
def test_a_proxy_that_may_have_answered_is_named(monkeypatch, error, proxy, is_named):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises(StoreError) as raised, translated_errors("s3://b/k", "http://u:p@host:9000"):
        raise error
    told = "; if the proxy of the environment does not reach it, add host to NO_PROXY"
    assert str(raised.value).endswith(told) is is_named


PRIVATE = "https://bucket.vpce-1.s3.eu-west-1.vpce.amazonaws.com"  # which the workers must be told, too


@pytest.mark.parametrize(
    ("region", "host", "endpoint"),
    [
        ("eu-west-1", "", None),
        ("cn-north-1", "", None),
        ("eu-west-1", "http://127.0.0.1:9", "http://127.0.0.1:9"),
        ("eu-west-1", "http://amazonaws.com.example", "http://amazonaws.com.example"),
        ("eu-west-1", "https://s3.eu-west-1.amazonaws.com", None),
        ("eu-west-1", PRIVATE, PRIVATE),
    ],
)
def test_a_store_keeps_its_region_and_the_address_of_a_server_that_is_not_the_regions_own(
    aws, region, host, endpoint
):
    aws.setattr(s3.S3Store, "check", lambda store: None)
    aws.setenv("AWS_DEFAULT_REGION", region)
    aws.setenv("AWS_ENDPOINT_URL", host) if host else aws.delenv("AWS_ENDPOINT_URL", raising=False)
    found = open_store("s3://bucket/runs/")
    assert isinstance(found, s3.S3Store)
    assert (found.region, found.endpoint, found.address) == (region, endpoint, "s3://bucket/runs")


@pytest.mark.parametrize(
    ("endpoint", "trailing"),
    [("https://storage.example", False), (PRIVATE, True), (f"{PRIVATE}.cn", True), (None, True)],
)
def test_a_write_over_https_is_a_plain_one_at_a_server_that_is_not_aws(aws, endpoint, trailing):
    """Google's server and others refuse a checksum that follows the body."""

    def answer(request: AWSPreparedRequest, **_: object) -> AWSResponse:
        assert ("aws-chunked" in str(request.headers.get("Content-Encoding"))) == trailing
        return AWSResponse(request.url, 200, {"ETag": NEW}, Body())

    aws.delenv("AWS_ENDPOINT_URL", raising=False)
    store = s3.S3Store("bucket", "run/", endpoint, "eu-west-1")
    store._client.meta.events.register("before-send.s3", answer)
    assert store.write_if("a", b"1", OLD) == NEW
