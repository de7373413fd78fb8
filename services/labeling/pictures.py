"""The pictures that annotators see: small ones inline in their task, large ones in the run's bucket."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from defuse_core.artifacts import F32
from defuse_core.errors import InputError
from defuse_core.store import Store

if TYPE_CHECKING:
    from services.storage.s3 import S3Store

FOLDER = "pictures"


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


def bucket_storage(store: S3Store, title: str) -> dict[str, Any]:
    """Return the fields of the Label Studio storage that shows the run's pictures, with this process's credentials."""
    import boto3

    fields = {
        "title": title,
        "bucket": store.bucket,
        "prefix": f"{store.prefix}{FOLDER}",
        "s3endpoint": store.endpoint,
        "region_name": store.region,
        "presign": False,  # Label Studio proxies the pictures, so the bucket needs no CORS
        "use_blob_urls": True,
    }
    credentials = boto3.Session().get_credentials()
    if credentials is not None:
        frozen = credentials.get_frozen_credentials()
        fields |= {"aws_access_key_id": frozen.access_key, "aws_secret_access_key": frozen.secret_key}
        fields |= {"aws_session_token": frozen.token or ""}  # an empty one replaces an old one
    return {name: value for name, value in fields.items() if value is not None}


def png(image: F32) -> bytes:
    """Return one image, (channels, H, W) in [0, 1], as PNG."""
    pixels = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    shown = Image.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1))
    buffer = io.BytesIO()
    shown.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
