"""A folder of another user, for a test that runs as root, whom no mode keeps out; and a disk that gets full."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from defuse_core.errors import StoreError
from defuse_core.store import FolderStore


def refuse_access(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let the system refuse to list `folder` and to say anything of what is in it."""
    stat, scandir = os.stat, os.scandir

    def refused(path: Any) -> PermissionError:
        return PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    def stat_elsewhere(path: Any, **options: Any) -> os.stat_result:
        if not isinstance(path, int) and folder in Path(path).parents:
            raise refused(path)
        return stat(path, **options)

    def scandir_elsewhere(path: Any) -> Any:
        if Path(path) == folder:
            raise refused(path)
        return scandir(path)

    patch.setattr(os, "stat", stat_elsewhere)
    patch.setattr(os, "scandir", scandir_elsewhere)


def write_all_but_run_file(
    store: FolderStore, key: str, data: bytes, unless: object = None, write: Any = FolderStore.write
) -> None:
    """Write as on a disk that is full once run.yaml is due."""
    if key == "run.yaml":
        raise StoreError("No space left on device")
    write(store, key, data, unless)
