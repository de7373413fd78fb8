"""The pictures that annotators see: small ones inline in their task, large ones in the run's bucket.

Label Studio reads pictures in the bucket with credentials of its own. Every member of its organisation can read what
these can read, so they must be limited to the pictures.
"""

from __future__ import annotations

import base64
import io
import logging
from typing import TYPE_CHECKING

import numpy as np

from defuse_core.artifacts import F32, Gallery
from defuse_core.data.images import to_levels, to_picture
from defuse_core.errors import InputError
from defuse_core.store import Store
from services.labeling.api_types import BucketStorage
from services.settings import BucketAccess

if TYPE_CHECKING:
    from services.storage.s3 import S3Store

log = logging.getLogger("defuse")

FOLDER = "pictures"
# Header, palette and the deflate stream's own bytes, for pictures of any usual size.
PNG_OVERHEAD_BYTES = 1024


class Pictures:
    """Where the pictures of one run are: each task names its pictures by the addresses that `address` returns."""

    def __init__(self, store: Store, inline_kb: int) -> None:
        self.store, self.inline_kb = store, inline_kb

    def address(self, image: F32, key: str) -> str:
        """Return a data: address with the picture itself, or, if it is large, its address in the run's S3 store.

        Raises InputError for a large picture of a run that is not in S3.
        """
        data = png(image)
        if len(data) <= self.inline_kb * 1024:
            return f"data:image/png;base64,{base64.b64encode(data).decode()}"
        if not self.store.address.startswith("s3://"):
            raise InputError(
                f"a picture has {len(data) / 1024:.0f} KB and review.inline_kb is {self.inline_kb}: raise it, or "
                "keep the run in S3 (--store s3://bucket/prefix), which larger pictures are shown from"
            )
        self.store.write(f"{FOLDER}/{key}.png", data)
        return f"{self.store.address}/{FOLDER}/{key}.png"

    def first_in_bucket(self, gallery: Gallery) -> tuple[int, int] | None:
        """Return scenario and image of the first picture that is too large to be inline; None if none is."""
        limit = self.inline_kb * 1024
        scenarios, images, *shape = gallery.images.shape
        if int(np.prod(shape)) + shape[-2] + PNG_OVERHEAD_BYTES <= limit:
            return None  # not even uncompressed
        places = ((scenario, image) for scenario in range(scenarios) for image in range(images))
        return next((place for place in places if len(png(gallery.images[place])) > limit), None)


def bucket_storage(store: S3Store, title: str, access: BucketAccess) -> BucketStorage:
    """Return the Label Studio storage that shows the run's pictures.

    Raises InputError if Label Studio has no credentials of its own, or if they cannot read the pictures.
    """
    access_key, secret_key, token = _key(store, access)
    storage = BucketStorage(
        title=title,
        bucket=store.bucket,
        prefix=f"{store.prefix}{FOLDER}",
        s3endpoint=access.endpoint or store.endpoint,
        region_name=store.region,
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
        aws_session_token=token or "",
    )
    _check_access(store, storage)
    return storage


def _key(store: S3Store, access: BucketAccess) -> tuple[str, str, str | None]:
    """Return the access key, the secret key and the session token with which Label Studio reads the pictures."""
    import boto3

    found = boto3.Session().get_credentials()
    own = None if found is None else found.get_frozen_credentials()
    if access.share_own and own is not None:
        return own.access_key, own.secret_key, own.token
    if access.access_key_id is None or access.secret_access_key is None:
        raise InputError(
            f"pictures over review.inline_kb are in {store.address}/{FOLDER}, and Label Studio has no credentials to "
            "read them: set LABEL_STUDIO_S3_ACCESS_KEY_ID and LABEL_STUDIO_S3_SECRET_ACCESS_KEY to a key that can "
            "read that prefix only, or raise review.inline_kb"
        )
    if own is not None and access.access_key_id == own.access_key:
        raise InputError(
            "LABEL_STUDIO_S3_ACCESS_KEY_ID is this process's own key, and every annotator could read what it can "
            f"read: use a key that can read {store.address}/{FOLDER} only (LABEL_STUDIO_S3_SHARE_CREDENTIALS=1 "
            "shares the own one nonetheless)"
        )
    return access.access_key_id, access.secret_access_key, access.session_token


def _check_access(store: S3Store, storage: BucketStorage) -> None:
    """Raise InputError if the storage's credentials cannot list and read the pictures; warn if they can read more.

    An address that Label Studio alone reaches is left to Label Studio, which connects to it next, with a warning.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError, ConnectTimeoutError, EndpointConnectionError

    client = boto3.client(
        "s3",
        endpoint_url=storage.s3endpoint,
        region_name=store.region,
        aws_access_key_id=storage.aws_access_key_id,
        aws_secret_access_key=storage.aws_secret_access_key,
        aws_session_token=storage.aws_session_token or None,
        config=Config(connect_timeout=10, read_timeout=20, retries={"max_attempts": 2}),
    )
    try:
        listed = client.list_objects_v2(Bucket=store.bucket, Prefix=storage.prefix, MaxKeys=1)
        client.head_object(Bucket=store.bucket, Key=listed["Contents"][0]["Key"])
    except (ClientError, BotoCoreError, KeyError) as error:
        unreachable = isinstance(error, EndpointConnectionError | ConnectTimeoutError)
        if unreachable and storage.s3endpoint != store.endpoint:
            log.warning(
                "%s is not reached from here, so whether Label Studio's credentials can read the pictures, and nothing "
                "else, is left unchecked (LABEL_STUDIO_S3_ENDPOINT)",
                storage.s3endpoint,
            )
            return
        raise InputError(
            f"Label Studio's credentials for the bucket cannot list and read {store.address}/{FOLDER} ({error}): "
            "grant them s3:ListBucket and s3:GetObject there, or correct LABEL_STUDIO_S3_ACCESS_KEY_ID, "
            "LABEL_STUDIO_S3_SECRET_ACCESS_KEY and LABEL_STUDIO_S3_ENDPOINT"
        ) from None
    try:
        client.head_object(Bucket=store.bucket, Key=f"{store.prefix}run.yaml")
    except (ClientError, BotoCoreError):
        return
    log.warning(
        "Label Studio's credentials can read all of %s, and through Label Studio every annotator can; limit them to "
        "its folder %s",
        store.address,
        FOLDER,
    )


def png(image: F32) -> bytes:
    """Return one image, (channels, H, W) in [0, 1], as PNG."""
    buffer = io.BytesIO()
    to_picture(to_levels(image)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
