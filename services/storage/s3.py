"""S3Store: a run in an S3 bucket, at AWS or at another server that speaks its protocol."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import logging
import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import boto3
from boto3.s3.transfer import TransferConfig
from botocore import exceptions as aws
from botocore.config import Config

from defuse_core.errors import InputError, StoreError
from services.storage.lease import KEY, Lease, hold

log = logging.getLogger("defuse")
LARGE_BYTES = 64 * 2**20  # sent in parts from here on
PART_BYTES = 16 * 2**20
LIST_PAGE = 1000
LOOK_AGAIN_S = 0.1
PATIENCE = 10  # attempts with exponential back-off: about a minute without an answer
READ_PAUSES_S = (0.2, 0.5, 1.0)  # before a body that broke off or arrived altered is fetched again
ADDRESS = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/+(.*))?")
BROKEN = (aws.ResponseStreamingError, aws.IncompleteReadError, aws.FlexibleChecksumError)
CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
DENIED = {
    "403",
    "AccessDenied",
    "ExpiredToken",
    "Forbidden",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "Unauthorized",
}
NO_ANSWER = (
    aws.HTTPClientError,
    aws.EndpointConnectionError,
    aws.ConnectionError,
    aws.ResponseStreamingError,
)


def open_s3(address: str) -> S3Store:
    """Return the store at s3://bucket/prefix; InputError, or StoreError at once if no bucket answers.

    Endpoint, region and credentials come the usual AWS ways (AWS_ENDPOINT_URL, AWS_PROFILE, ...).
    """
    match = ADDRESS.fullmatch(address)
    if match is None:
        raise InputError(f"--store {address}: expected s3://bucket/prefix")
    prefix = (match[2] or "").strip("/")
    logging.getLogger("botocore").setLevel(
        logging.WARNING
    )  # at INFO it logs its credentials' origin each time
    with translated_errors(address, None):
        session = boto3.Session()
        try:
            endpoint = session.client("s3").meta.endpoint_url
        except ValueError as error:  # "Invalid endpoint: minio:9000"
            raise InputError(f"AWS_ENDPOINT_URL: expected such as http://host:9000 ({error})") from error
    at_aws = endpoint.endswith((".amazonaws.com", ".amazonaws.com.cn"))
    store = S3Store(
        match[1], f"{prefix}/" if prefix else "", None if at_aws else endpoint, session.region_name
    )
    store.check()
    return store


class S3Store:
    """A Store below s3://bucket/prefix. Holds no secret and no connection, so that it may travel to workers.

    Every object carries the SHA-256 of its bytes, which is checked on every read.
    """

    def __init__(
        self, bucket: str, prefix: str, endpoint: str | None = None, region: str | None = None
    ) -> None:
        """`prefix` is empty or ends with /; `endpoint` None is AWS."""
        self.bucket, self.prefix, self.endpoint, self.region = bucket, prefix, endpoint, region
        self.leases: dict[
            str, Lease
        ] = {}  # prefix -> what this process holds there; shared with stores below

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Store, (self.bucket, self.prefix, self.endpoint, self.region)

    @property
    def address(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def within(self, prefix: str) -> S3Store:
        below = S3Store(self.bucket, f"{self.prefix}{prefix.strip('/')}/", self.endpoint, self.region)
        below.leases = self.leases
        return below

    def check(self) -> None:
        """Raise StoreError if the bucket cannot be listed; does not wait long for an answer."""
        with self._errors():
            _client(self.endpoint, self.region, 2).list_objects_v2(
                Bucket=self.bucket, Prefix=self.prefix, MaxKeys=1
            )

    def exists(self, key: str) -> bool:
        with contextlib.suppress(FileNotFoundError), self._errors(key):
            self._client.head_object(**self._at(key))
            return True
        return False

    def read(self, key: str) -> bytes:
        with self._errors(key):
            for pause in READ_PAUSES_S:
                with contextlib.suppress(_AlteredError, *BROKEN):
                    return self._fetch(key)
                time.sleep(pause)
            return self._fetch(key)

    def write(self, key: str, data: bytes) -> None:
        self._check_lease()
        with self._errors(key):
            if len(data) >= LARGE_BYTES:
                self._write_in_parts(key, data)
            else:
                self._client.put_object(**self._at(key), Body=data, Metadata=_digest(data))

    def create(self, key: str, data: bytes) -> bool:
        """Put `data` only if nothing is there. Two of these may race where a server ignores conditions.

        A refusal may be the echo of a write that went through, whose answer was lost and that was sent twice.
        """
        self._check_lease()
        if self.exists(key):
            return False
        if self._put_if(key, data, IfNoneMatch="*") is not None:
            return True
        with contextlib.suppress(FileNotFoundError):  # another write was under way, and nothing is there yet
            return self.read(key) == data
        return False

    def list(self, prefix: str = "") -> list[str]:
        asked = {
            "Bucket": self.bucket,
            "Prefix": self.prefix + prefix,
            "PaginationConfig": {"PageSize": LIST_PAGE},
        }
        with self._errors():
            pages = self._client.get_paginator("list_objects_v2").paginate(**asked)
            keys = [
                found["Key"].removeprefix(self.prefix) for page in pages for found in page.get("Contents", [])
            ]
        return sorted(key for key in keys if not key.rpartition("/")[2].startswith("."))

    def delete(self, key: str) -> None:
        self._check_lease()
        with contextlib.suppress(FileNotFoundError), self._errors(key):
            self._client.delete_object(**self._at(key))

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold a lease on this prefix, kept fresh meanwhile, which ends by itself if the driver dies.

        Raises RunBusyError if another driver holds it; takes LEASE_S to find out that a holder is dead.
        """
        with hold(_Slot(self)) as lease:
            self.leases[self.prefix] = lease
            try:
                yield
            finally:
                del self.leases[self.prefix]

    @property
    def _client(self) -> Any:
        return _client(self.endpoint, self.region, PATIENCE)

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + key}

    def _errors(self, key: str = "") -> AbstractContextManager[None]:
        return translated_errors(f"{self.address}/{key}".rstrip("/"), self.endpoint)

    def _check_lease(self) -> None:
        for prefix, lease in self.leases.items():
            if self.prefix.startswith(prefix):
                lease.check()

    def _fetch(self, key: str) -> bytes:
        answer = self._client.get_object(**self._at(key))
        data: bytes = answer["Body"].read()
        expected = answer["Metadata"].get("sha256")
        if expected not in {None, _digest(data)["sha256"]}:
            found = f"{self.address}/{key}: its bytes changed since they were written"
            raise _AlteredError(f"{found}; delete it and run again to remake it")
        return data

    def _write_in_parts(self, key: str, data: bytes) -> None:
        parts = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES)
        self._client.upload_fileobj(
            io.BytesIO(data), **self._at(key), ExtraArgs={"Metadata": _digest(data)}, Config=parts
        )

    def _put_if(self, key: str, data: bytes, **condition: str) -> str | None:
        """Return the new ETag, or None if the condition did not hold."""
        asked = {**self._at(key), "Body": data, "Metadata": _digest(data)}
        with self._errors(key):
            try:
                return str(self._client.put_object(**asked, **condition)["ETag"])
            except aws.ClientError as error:
                if _status_of(error) in {409, 412} or _code_of(error) == "NoSuchKey":
                    return None
                if _status_of(error) != 501:
                    raise
            return str(self._client.put_object(**asked)["ETag"])


class _AlteredError(StoreError): ...


class _Slot:
    """The lease of a store as an object."""

    def __init__(self, store: S3Store) -> None:
        self.store = store
        self.address = store.address

    def look(self) -> tuple[str, bytes] | None:
        """Look twice before saying that nothing is there: some servers replace an object in two steps."""
        seen = self._look()
        if seen is None:
            time.sleep(LOOK_AGAIN_S)
            seen = self._look()
        return seen

    def _look(self) -> tuple[str, bytes] | None:
        with contextlib.suppress(FileNotFoundError), self.store._errors(KEY):
            answer = self.store._client.get_object(**self.store._at(KEY))
            return answer["ETag"], answer["Body"].read()
        return None

    def put(self, data: bytes, version: str | None) -> str | None:
        seen = self.look()
        if (seen and seen[0]) != version:  # all that a server without conditional writes can do
            return None
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        return self.store._put_if(KEY, data, **condition)

    def is_conditional(self, data: bytes) -> bool:
        return self.store._put_if(KEY, data, IfNoneMatch="*") is None

    def clear(self) -> None:
        with self.store._errors(KEY):
            self.store._client.delete_object(**self.store._at(KEY))


@functools.cache
def _client(endpoint: str | None, region: str | None, attempts: int) -> Any:
    """Return this process's client: thread-safe, with retries that back off exponentially."""
    config = Config(
        retries={"mode": "standard", "total_max_attempts": attempts},
        connect_timeout=5,
        read_timeout=60,
        max_pool_connections=16,
    )
    return boto3.Session().client("s3", endpoint_url=endpoint, region_name=region, config=config)


def _digest(data: bytes) -> dict[str, str]:
    return {"sha256": hashlib.sha256(data).hexdigest()}


@contextlib.contextmanager
def translated_errors(where: str, endpoint: str | None) -> Iterator[None]:
    """Raise botocore's errors as FileNotFoundError for a missing key, as StoreError in one line for all else."""
    try:
        yield
    except aws.ClientError as error:
        raise _translated(error, where, endpoint) from error
    except (aws.NoCredentialsError, aws.PartialCredentialsError, aws.CredentialRetrievalError) as error:
        raise StoreError(f"{where}: no complete AWS credentials found; set {CREDENTIALS}") from error
    except aws.ProfileNotFound as error:
        raise StoreError(f"{where}: {error}; check AWS_PROFILE") from error
    except NO_ANSWER as error:
        raise StoreError(
            f"{where}: no answer from {endpoint or 'AWS'} ({type(error).__name__}); check AWS_ENDPOINT_URL "
            "and the network, then run again to continue"
        ) from error
    except aws.BotoCoreError as error:
        raise StoreError(f"{where}: {error}") from error


def _code_of(error: aws.ClientError) -> str:
    """Return the server's error code: a name such as NoSuchKey, or the HTTP status where it sent no body."""
    return str(error.response.get("Error", {}).get("Code", ""))


def _status_of(error: aws.ClientError) -> int:
    """Return the HTTP status, 0 where unknown."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _translated(error: aws.ClientError, where: str, endpoint: str | None) -> Exception:
    code, server = _code_of(error), endpoint or "AWS"
    if code == "NoSuchBucket":
        return StoreError(f"{where}: {server} has no such bucket; create it, or check --store")
    if code in {"NoSuchKey", "404", "NotFound"}:
        return FileNotFoundError(where)
    if code in DENIED or _status_of(error) == 403:
        return StoreError(
            f"{where}: {server} refused the credentials ({code}); check {CREDENTIALS} and their rights"
        )
    if code in {"PermanentRedirect", "301", "AuthorizationHeaderMalformed"}:
        return StoreError(f"{where}: the bucket is in another region; set AWS_DEFAULT_REGION to it")
    message = error.response.get("Error", {}).get("Message", "")
    return StoreError(f"{where}: {server} answered {code} {message}; run again to continue")
