"""Where a data set lies on disk, and what to say when it does not lie there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from defuse_core.config import DataSection
from defuse_core.errors import DataError

DOWNLOADABLE = ("mnist", "signs", "svhn")


def data_root(data: DataSection) -> Path:
    """Return data.root, which is there, or may be made for a download. Raises DataError."""
    if data.root is None:
        raise DataError(f"data.root: must say where the {data.name} images lie (--set data.root=FOLDER)")
    if not data.root.exists() and not data.download:
        remedy = " or set data.download: true" if data.name in DOWNLOADABLE else ""
        raise DataError(f"data.root: there is no {data.root}; say where the {data.name} images lie{remedy}")
    return data.root


@contextlib.contextmanager
def reading(where: Path, expected: str, download: bool) -> Iterator[None]:
    """Turn whatever a reader raises in the block into one DataError that says what was expected."""
    try:
        yield
    except DataError:
        raise
    except (
        Exception
    ) as error:  # readers and downloads raise a dozen kinds of errors on what is missing or broken
        todo = (
            "download failed, so put them there" if download else "put them there or set data.download: true"
        )
        raise DataError(f"data.root: expected {expected} under {where}, found {error}; {todo}") from error
