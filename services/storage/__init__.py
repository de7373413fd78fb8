"""Stores of runs: a folder, or an S3 bucket."""

from __future__ import annotations

from defuse_core.errors import InputError
from defuse_core.store import FolderStore, Store


def open_store(address: str) -> Store:
    """Return the store at `address`: a folder, or s3://bucket/prefix.

    Raises InputError for another kind of address, StoreError if a bucket does not answer.
    """
    if address.startswith("s3://"):
        from services.storage.s3 import open_s3

        return open_s3(address)
    if "://" in address:
        raise InputError(f"--store {address}: expected a folder or s3://bucket/prefix")
    return FolderStore(address)
