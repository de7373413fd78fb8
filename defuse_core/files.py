"""Files in folders: written whole or not at all, locked, and errors of the file system in one line."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from defuse_core.errors import StoreError

UNFINISHED = ".unfinished"  # suffix of a file that is being written
CREATING = ".creating"  # locked while a key is created, on file systems without hard links
NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS}  # as exFAT, FAT and some network folders answer
FULL_DISK = {errno.ENOSPC, errno.EDQUOT}


def is_folder(path: Path) -> bool:
    """Whether it is a folder, or a link to where this process may not look."""
    with explained(path), contextlib.suppress(PermissionError):
        return path.is_dir()
    return True


def locked_at_once(handle: TextIO, how: int = fcntl.LOCK_EX) -> bool:
    """Lock an open file; False where another one has it."""
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_current(handle: TextIO, path: Path) -> bool:
    """Whether the open file is the one at `path`, which can be deleted or replaced meanwhile."""
    with contextlib.suppress(FileNotFoundError), explained(path):
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    return False


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn errors of the file system into one line; a missing file stays a FileNotFoundError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreError(
            f"{path}: {error.strerror}; free space or fix access, then run again to continue"
        ) from error


def expect_gone(error: OSError) -> None:
    """Raise the error of a folder that cannot be listed, which must not count as empty; one that is gone is."""
    if not isinstance(error, FileNotFoundError):
        with explained(Path(error.filename)):
            raise error


def renamed_if_absent(temporary: Path, target: Path) -> bool:
    """Rename a file unless its target exists, on file systems without hard links; False where it exists."""
    with (target.parent / CREATING).open("a+") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        if target.exists():
            return False
        temporary.replace(target)
        return True


@contextlib.contextmanager
def synced_temporary(target: Path, data: bytes) -> Iterator[Path]:
    """Write `data` beside `target`, on the disk for good, and clean up if it was not renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(UNFINISHED, f".{target.name}.", target.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        with contextlib.suppress(PermissionError):  # a mount whose files all have one owner, such as of SMB
            temporary.chmod(0o644)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
