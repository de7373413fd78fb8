"""S3Store: a run in an S3 bucket, at AWS or at another server that speaks its protocol."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

import boto3
import tenacity
from botocore import exceptions as aws
from botocore.config import Config

from defuse_core.errors import InputError, StoreError
from defuse_core.files import map_ahead
from defuse_core.runs import CREATION_ORDER
from defuse_core.store import is_hidden
from services.storage import bucket_and_prefix
from services.storage.lease import KEY, Lease, LeaseObject, LeaseState, hold
from services.storage.s3_errors import (
    BROKEN,
    CONFLICT,
    WRONG_URL,
    OutageTimer,
    answer_with_body,
    code_of,
    status_of,
    translated_errors,
)

LARGE_BYTES = 64 * 2**20  # smallest object that is sent in parts
PART_BYTES, PARTS_AT_ONCE = 16 * 2**20, 4
UPLOAD_AGE = timedelta(days=1)  # age at which unfinished uploads are deleted, as a slow line may still send
LIST_PAGE = 1000
READ_TIMEOUT_S = 10.0
SEND_TIMEOUT_S = 60.0  # for large objects: a proxy, or the buffers of a slow line, may still hold most of it
SEND_BYTES = 2**20  # smallest object with this timeout
HEARTBEAT_ATTEMPTS, HEARTBEAT_TIMEOUT_S = 2, 5.0  # others take the lease after LEASE_S
READ_PAUSE_S, READ_ATTEMPTS = 0.2, 4  # of a body that broke off, stalled or arrived altered
WRITE_PAUSE_S, WRITE_ATTEMPTS = 0.5, 8  # of an object that others write at the same time
PATIENCE = 14  # attempts, with botocore's pauses: about a minute where the server refuses connections


def open_s3(address: str) -> S3Store:
    """Return the store at s3://bucket/prefix; InputError, or StoreError at once if no bucket answers.

    Endpoint, region and credentials come the usual AWS ways (AWS_ENDPOINT_URL, AWS_PROFILE, ...).
    """
    bucket, prefix = bucket_and_prefix(address)
    logging.getLogger("botocore").setLevel(logging.WARNING)  # at INFO it logs the origin of credentials
    with translated_errors(address, None):
        session = boto3.Session()
        try:
            endpoint = _endpoint(session)
            given = None if endpoint == _endpoint(session, ignore_configured_endpoint_urls=True) else endpoint
        except aws.InvalidRegionError as error:
            where = "AWS_DEFAULT_REGION (or region in AWS's configuration file)"
            raise InputError(f"{where}: {error}") from error
        except ValueError:  # "Invalid endpoint: minio:9000", with a password that the address may hold
            raise InputError(WRONG_URL) from None
    store = S3Store(bucket, prefix, given, session.region_name)
    store.check()
    return store


def _endpoint(session: boto3.Session, **options: Any) -> str:
    """Return the address that a client of the session asks; its credentials are not looked for."""
    keys = {"aws_access_key_id": "none", "aws_secret_access_key": "none"}
    return str(session.client("s3", config=Config(**options), **keys).meta.endpoint_url)


class S3Store:
    """A Store below s3://bucket/prefix. Holds no secret and no connection, so that it may travel to workers.

    A lock is fenced: inside it every write reads the object's version, makes sure that the lease's token is still this
    driver's, and puts on condition that the version is the same; a deletion does likewise. So a driver or worker that
    lost the run replaces and deletes nothing that the next driver wrote.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str,
        endpoint: str | None,
        region: str | None,
        fences: dict[str, LeaseState] | None = None,
    ) -> None:
        """`prefix` is empty or ends with /; `endpoint` None is the one of AWS for the region."""
        self.bucket, self.prefix, self.endpoint, self.region = bucket, prefix, endpoint, region
        # locked prefix -> the lease of its driver when it was taken; shared with the stores below
        self.fences = {} if fences is None else fences
        self.leases: dict[str, Lease] = {}  # likewise, in the driver's process only
        self.attempts, self.timeout_s = PATIENCE, READ_TIMEOUT_S

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Store, (self.bucket, self.prefix, self.endpoint, self.region, dict(self.fences))

    @property
    def address(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def within(self, prefix: str) -> S3Store:
        below = f"{self.prefix}{prefix.strip('/')}/"
        store = S3Store(self.bucket, below, self.endpoint, self.region, self.fences)
        store.leases = self.leases
        return store

    def check(self) -> None:
        """Raise StoreError if the bucket cannot be listed; does not wait long for an answer."""
        with self._errors():
            client = _client(self.endpoint, self.region, 2, READ_TIMEOUT_S)
            listing = client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix, MaxKeys=1)
            if "IsTruncated" not in listing:
                raise aws.ClientError(listing, "ListObjectsV2")

    def exists(self, key: str) -> bool:
        return self.version(key) is not None

    def version(self, key: str) -> str | None:
        with contextlib.suppress(FileNotFoundError), self._errors(key):
            return str(self._client.head_object(**self._at(key))["ETag"])
        return None

    def read(self, key: str) -> bytes:
        return self.read_with_version(key)[1]

    def read_with_version(self, key: str) -> tuple[str, bytes]:
        """Return version and content of an object. Reads a body again that breaks off, stalls or arrives altered."""
        with self._errors(key):
            for attempt in tenacity.Retrying(
                retry=tenacity.retry_if_exception_type(BROKEN),
                wait=tenacity.wait_exponential(multiplier=READ_PAUSE_S),
                stop=tenacity.stop_after_attempt(READ_ATTEMPTS),
                reraise=True,
            ):
                answer = answer_with_body(self._client.get_object, **self._at(key))  # the client retries
                with attempt:
                    data: bytes = answer["Body"].read()
        return str(answer["ETag"]), data

    def age_s(self, key: str) -> float:
        """Return how long ago an object was written, by the server's clock. Raises FileNotFoundError without one."""
        with self._errors(key):
            answer = self._client.head_object(**self._at(key))
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return float((now - answer["LastModified"]).total_seconds())

    def write(self, key: str, data: bytes, unless: Callable[[bytes], bool] | None = None) -> None:
        if unless is None and self._fence() is None:
            with self._errors(key):
                self._put(key, data)
            return
        self._repeat_until_done(key, lambda: self._replace(key, data, unless))

    def _repeat_until_done(self, key: str, change: Callable[[], bool]) -> None:
        """Change an object, again where another writer was faster. Raises StoreError after some attempts."""
        retry = tenacity.Retrying(
            retry=tenacity.retry_if_result(lambda done: not done),
            wait=tenacity.wait_random(0, WRITE_PAUSE_S),
            stop=tenacity.stop_after_attempt(WRITE_ATTEMPTS),
        )
        try:
            retry(change)
        except tenacity.RetryError as error:
            raise StoreError(
                f"{self.address}/{key}: other writers replace it all the time; end them, then run again to continue"
            ) from error

    def create(self, key: str, data: bytes) -> bool:
        """Put `data` only if `key` is absent. Two of these may race where a server ignores conditions."""
        return not self.exists(key) and self._write_fenced(key, data, None)

    def write_if(self, key: str, data: bytes, version: str | None) -> str | None:
        """Write if the version is `version` (None: absent), whoever has the lease; the new version, else None."""
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        with self._errors(key):
            try:
                return self._put(key, data, **condition)
            except aws.ClientError as error:
                if status_of(error) in CONFLICT or code_of(error) in {"NoSuchKey", "NoSuchUpload"}:
                    return None
                if status_of(error) != 501:
                    raise
            return self._put(key, data)

    def list(self, prefix: str = "") -> list[str]:
        """All keys but hidden ones, and but the empty objects by which other programs mark a folder."""
        return [key for key in self._all_keys(prefix) if key and not key.endswith("/") and not is_hidden(key)]

    def _all_keys(self, prefix: str = "") -> Sequence[str]:
        found = self._listed("list_objects_v2", "Contents", prefix, PaginationConfig={"PageSize": LIST_PAGE})
        return sorted(each["Key"].removeprefix(self.prefix) for each in found)

    def folders(self) -> Sequence[str]:
        found = self._listed("list_objects_v2", "CommonPrefixes", Delimiter="/")
        names = (each["Prefix"].removeprefix(self.prefix).rstrip("/") for each in found)
        return sorted(name for name in names if not is_hidden(name))

    def _listed(self, operation: str, field: str, prefix: str = "", **options: Any) -> Iterator[Any]:
        """Yield what a listing below the prefix has in `field`, page after page: one is held at a time."""
        with self._errors():
            pages = self._client.get_paginator(operation)
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix + prefix, **options):
                yield from page.get(field, [])

    def delete(self, key: str) -> None:
        if self._fence() is not None:
            self._repeat_until_done(key, lambda: self._delete_unchanged(key))
            return
        with contextlib.suppress(FileNotFoundError), self._errors(key):
            self._client.delete_object(**self._at(key))

    def delete_if(self, key: str, version: str) -> bool:
        """Delete this version of an object, whoever has the lease; False where the object has another one."""
        with contextlib.suppress(FileNotFoundError), self._errors(key):
            try:
                self._client.delete_object(**self._at(key), IfMatch=version)
            except aws.ClientError as error:
                if status_of(error) in CONFLICT:
                    return False
                if status_of(error) != 501:
                    raise
                self._client.delete_object(**self._at(key))
        return True

    def delete_all(self) -> None:
        """Delete every object and what is left of unfinished uploads; `run.yaml` and then the lease last.

        What a run makes last goes first, lists before their shards: if cut off, it leaves the run at an earlier point.
        """

        def place(key: str) -> tuple[int, bool]:
            name = key.partition("/")[0].partition(".")[0]
            return (CREATION_ORDER.index(name) if name in CREATION_ORDER else -1), "/" not in key

        keys = sorted((key for key in self._all_keys() if key not in {"run.yaml", KEY}), key=place)
        for _, group in itertools.groupby(reversed(keys), place):
            list(map_ahead(self.delete, group))
        self.delete("run.yaml")
        self._abort_uploads()
        if self.prefix in self.leases:
            self.leases[self.prefix].remove = True
        else:
            self.delete(KEY)

    def remove_unfinished(self) -> None:
        self._abort_uploads(lambda upload: datetime.now(UTC) - upload["Initiated"] > UPLOAD_AGE)

    def _abort_uploads(self, chosen: Callable[[Any], bool] = lambda upload: True) -> None:
        """Drop the parts that killed writers left, which no listing shows; some servers do not list them either."""
        with contextlib.suppress(StoreError, FileNotFoundError), self._errors():
            for upload in filter(chosen, list(self._listed("list_multipart_uploads", "Uploads"))):
                at = {"Bucket": self.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                self._client.abort_multipart_upload(**at)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold a lease on this prefix, kept fresh meanwhile, which ends by itself if the driver dies.

        Raises RunBusyError if another driver holds it; takes LEASE_S to find out that a holder is dead.
        """
        beating = S3Store(self.bucket, self.prefix, self.endpoint, self.region)
        beating.attempts, beating.timeout_s = HEARTBEAT_ATTEMPTS, HEARTBEAT_TIMEOUT_S
        with hold(LeaseObject(self), LeaseObject(beating)) as lease:
            self.leases[self.prefix], self.fences[self.prefix] = lease, lease.state
            try:
                self._abort_uploads()  # of earlier drivers and their workers: what they write now is refused
                yield
            finally:
                del self.leases[self.prefix], self.fences[self.prefix]

    def require_lock(self) -> None:
        for prefix, lease in self.leases.items():
            if self.prefix.startswith(prefix):
                lease.require()

    def is_locked(self) -> bool:
        return LeaseObject(self).is_held()

    @property
    def _client(self) -> Any:
        return _client(self.endpoint, self.region, self.attempts, self.timeout_s)

    @property
    def _sending_client(self) -> Any:
        return _client(self.endpoint, self.region, PATIENCE, SEND_TIMEOUT_S)

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + key}

    def _errors(self, key: str = "") -> contextlib.AbstractContextManager[None]:
        return translated_errors(f"{self.address}/{key}".rstrip("/"), self.endpoint, _forget_clients)

    def _fence(self) -> tuple[str, LeaseState] | None:
        """Return the locked prefix that this store is in, and the lease of its driver."""
        return next((fence for fence in self.fences.items() if self.prefix.startswith(fence[0])), None)

    def _require_fence(self) -> None:
        """Raise RunBusyError where another driver than the one for whom this store writes holds the run."""
        if (fence := self._fence()) is not None:
            LeaseObject(S3Store(self.bucket, fence[0], self.endpoint, self.region)).require(fence[1])

    def _replace(self, key: str, data: bytes, unless: Callable[[bytes], bool] | None) -> bool:
        """Put `data` if nobody else writes `key` meanwhile; True if it is stored, or is not wanted."""
        version = self.version(key)
        if unless is not None and version is not None:
            with contextlib.suppress(FileNotFoundError):
                if unless(self.read(key)):
                    return True
        return self._write_fenced(key, data, version)

    def _write_fenced(self, key: str, data: bytes, version: str | None) -> bool:
        """Write if the version is `version` and the lease is not lost; True if `key` holds `data` then."""
        self._require_fence()
        return self.write_if(key, data, version) is not None or self._holds(key, data)

    def _delete_unchanged(self, key: str) -> bool:
        """Delete `key` if nobody else writes it meanwhile; True if it is gone."""
        version = self.version(key)
        self._require_fence()
        return version is None or self.delete_if(key, version)

    def _holds(self, key: str, data: bytes) -> bool:
        """Whether `key` holds `data`: a refusal may follow a write that took effect, whose answer was lost."""
        with contextlib.suppress(FileNotFoundError):
            return self.read(key) == data
        return False

    def _put(self, key: str, data: bytes, **condition: str) -> str | None:
        if len(data) >= LARGE_BYTES:
            return self._put_parts(key, data, condition)
        client = self._sending_client if len(data) >= SEND_BYTES else self._client
        return str(client.put_object(**self._at(key), Body=data, **condition)["ETag"])

    def _put_parts(self, key: str, data: bytes, condition: dict[str, str]) -> str | None:
        """Send a large object in parts, with checks before the last step too. (boto3's upload takes no condition.)"""
        client, at = self._sending_client, self._at(key)
        at["UploadId"] = client.create_multipart_upload(**at)["UploadId"]

        def send(number: int) -> dict[str, Any]:
            body = data[(number - 1) * PART_BYTES : number * PART_BYTES]
            sent = client.upload_part(**at, PartNumber=number, Body=body)
            checksums = {name: value for name, value in sent.items() if name.startswith("Checksum")}
            return {"PartNumber": number, "ETag": sent["ETag"]} | checksums

        try:
            with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
                parts = list(pool.map(send, range(1, -(-len(data) // PART_BYTES) + 1)))
            self._require_fence()
            if condition and self.version(key) != condition.get("IfMatch"):
                client.abort_multipart_upload(**at)
                return None
            done = client.complete_multipart_upload(**at, MultipartUpload={"Parts": parts}, **condition)
        except BaseException:
            with contextlib.suppress(aws.ClientError, aws.BotoCoreError):
                client.abort_multipart_upload(**at)
            raise
        return str(done["ETag"])


_session = functools.cache(boto3.Session)  # its clients share credentials: a program is asked for them once
_one_at_a_time = threading.Lock()  # a session makes a client, and finds credentials, for one thread


def _forget_clients() -> None:
    _client.cache_clear()
    _session.cache_clear()


@functools.cache
def _client(endpoint: str | None, region: str | None, attempts: int, timeout_s: float) -> Any:
    """Return this process's client: thread-safe, with retries that back off until OutageTimer ends them."""
    # AWS knows a checksum that follows the body, as over https; Google's and others' servers refuse each such write
    is_aws = endpoint is None or endpoint.rstrip("/").endswith((".amazonaws.com", ".amazonaws.com.cn"))
    config = Config(
        request_checksum_calculation=None if is_aws else "when_required",
        retries={"mode": "standard", "total_max_attempts": attempts},
        connect_timeout=min(timeout_s, 10.0),  # also of each piece of a body that is sent
        read_timeout=timeout_s,
        response_checksum_validation="when_required",  # else a checksum with an error fails in botocore
        max_pool_connections=16,
    )
    with _one_at_a_time:
        client = _session().client("s3", endpoint_url=endpoint, region_name=region, config=config)
    OutageTimer(client, attempts, timeout_s)
    return client
