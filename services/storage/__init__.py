"""Stores of runs: a folder, or an S3 bucket."""

from __future__ import annotations

import re
from pathlib import Path

from defuse_core.errors import DamagedError, InputError, StoreError
from defuse_core.store import Store, folder_store

URL = re.compile(r"[a-z][a-z0-9+.-]*:/|s3[an]?:|s3//|.*://", re.IGNORECASE)  # gs://x, s3:/x, S3:x
BUCKET = re.compile(r"s3://([a-z0-9][a-z0-9._-]{1,61}[a-z0-9])(?:/+(.*))?")  # AWS allows no _
COPIES_OF_RAY = "working_dir_files"  # Ray's folder of the working directories of jobs


def open_store(address: str) -> Store:
    """Return the store at `address`: a folder, or s3://bucket/prefix.

    Raises InputError for another kind of address or a file, StoreError if a bucket does not answer.
    """
    if address.startswith("s3://"):
        from services.storage.s3 import open_s3

        return open_s3(address)
    return folder_store(store_folder(address))


def bucket_and_prefix(address: str) -> tuple[str, str]:
    """Return the two parts of s3://bucket/prefix. Raises InputError where there is no bucket, or none of a valid name.

    The prefix is empty or ends with /.
    """
    match = BUCKET.fullmatch(address)
    if match is None:
        raise InputError(
            f"--store {address}: expected s3://bucket/prefix; a bucket's name has 3 to 63 characters: a-z, 0-9, dots, "
            "hyphens, underscores"
        )
    prefix = (match[2] or "").strip("/")
    return match[1], f"{prefix}/" if prefix else ""


def store_folder(address: str) -> Path:
    """Return the folder that an address names; ~ is the user's home, which shells leave alone in --store=~/runs.

    Raises InputError for another kind of address, or a misspelled one, which would become a folder; ./s3:/x is one.
    Likewise for a folder in the copy that Ray makes of a job's working directory, since Ray deletes it.
    """
    if URL.match(address):
        raise InputError(f"--store {address}: expected s3://bucket/prefix or a folder")
    try:
        folder = Path(address).expanduser().absolute()
    except RuntimeError as error:
        raise InputError(f"--store {address}: expected the home of an existing user after ~") from error
    if COPIES_OF_RAY in folder.parts:
        raise InputError(
            f"--store {address}: expected s3://bucket/prefix or an absolute folder; Ray deletes the folder of this job"
        )
    return folder


def is_store_failure(error: BaseException) -> bool:
    """Whether the store itself failed, also by its settings, and may recover; a damaged file in it stays damaged."""
    return isinstance(error, StoreError) and not isinstance(error, DamagedError)
