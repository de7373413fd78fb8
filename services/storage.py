"""Where runs lie: a folder, or an S3 bucket."""

from defuse_core.errors import InputError
from defuse_core.runs import FolderStore, Store


def open_store(address: str) -> Store:
    """Return the store at `address`: a folder, or s3://bucket/prefix."""
    if "://" in address:
        raise InputError(f"--store {address}: expected a folder or s3://bucket/prefix")
    return FolderStore(address)
