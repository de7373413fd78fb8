"""Credentials of nobody, and a driver that takes over the lease of another."""

from __future__ import annotations

from defuse_core.store import Store
from services.storage import lease, s3

KEYS = {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "hush-hush-hush"}


THIEF = b'{"holder": "a thief", "token": "of the thief", "generation": 2}'


def steal(bucket: Store, prefix: str = "") -> None:
    """Put another driver's lease in place, as one does that has waited long enough."""
    assert isinstance(bucket, s3.S3Store)
    bucket._client.put_object(Bucket="bucket", Key=f"{bucket.prefix}{prefix}{lease.KEY}", Body=THIEF)
