"""Store: named bytes in a folder (here) or an S3 bucket (services/storage)."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from defuse_core.errors import RunBusyError, StoreError

UNFINISHED = ".unfinished"  # suffix of a file that is being written
UNFINISHED_S = 600.0


class Store(Protocol):
    """Named bytes. Keys are relative paths with `/`; a key is either whole or absent, whatever dies when."""

    @property
    def address(self) -> str:
        """How a person would find it again: a folder or an s3:// address."""

    def within(self, prefix: str) -> Store:
        """The same store, seen from below `prefix`."""

    def exists(self, key: str) -> bool: ...

    def read(self, key: str) -> bytes:
        """The bytes under `key`. Raises FileNotFoundError."""

    def write(self, key: str, data: bytes) -> None:
        """Put `data` under `key`, replacing what was there, all or nothing."""

    def create(self, key: str, data: bytes) -> bool:
        """Put `data` under `key` only if nothing is there; False where something is."""

    def list(self, prefix: str = "") -> list[str]:
        """All keys that start with `prefix`, sorted."""

    def delete(self, key: str) -> None:
        """Forget `key`; nothing happens if it is absent."""

    def lock(self) -> AbstractContextManager[None]:
        """Hold this store for one driver. Raises RunBusyError, naming the holder, if another has it."""


class FolderStore:
    """A Store in a folder of the file system."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).absolute()

    @property
    def address(self) -> str:
        return str(self.folder)

    def within(self, prefix: str) -> FolderStore:
        return FolderStore(self.folder / prefix)

    def exists(self, key: str) -> bool:
        return (self.folder / key).is_file()

    def read(self, key: str) -> bytes:
        with _explained(self.folder / key):
            return (self.folder / key).read_bytes()

    def write(self, key: str, data: bytes) -> None:
        target = self.folder / key
        with _explained(target), _synced_temporary(target, data) as temporary:
            temporary.replace(target)

    def create(self, key: str, data: bytes) -> bool:
        target = self.folder / key
        with _explained(target), _synced_temporary(target, data) as temporary:
            try:
                os.link(temporary, target)
            except FileExistsError:
                return False
        return True

    def list(self, prefix: str = "") -> list[str]:
        found = (path for path in self.folder.rglob("*") if path.is_file() and not path.name.startswith("."))
        keys = (path.relative_to(self.folder).as_posix() for path in found)
        return sorted(key for key in keys if key.startswith(prefix))

    def delete(self, key: str) -> None:
        with _explained(self.folder / key):
            (self.folder / key).unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder through the operating system, which lets go by itself when the driver dies."""
        with _explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = (self.folder / ".lock").open("a+")
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                handle.seek(0)
                raise RunBusyError(
                    f"{self.folder}: {handle.read() or 'another driver'} is writing this run"
                ) from error
            except OSError as error:
                raise StoreError(
                    f"{self.folder}: this file system cannot lock a file ({error.strerror}), which keeps a second "
                    "driver out; take a folder elsewhere, or an S3 store"
                ) from error
            handle.truncate(0)
            handle.write(f"process {os.getpid()} on {platform.node()}")
            handle.flush()
            self._sweep()
            yield

    def _sweep(self) -> None:
        """Remove what writers that were killed left behind; a living one writes its file in seconds."""
        for path in self.folder.rglob(f".*{UNFINISHED}"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > UNFINISHED_S:
                    path.unlink()


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what the file system says into one line; a missing file stays a FileNotFoundError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreError(
            f"{path}: {error.strerror}; free space or fix access, then run again to go on"
        ) from error


@contextlib.contextmanager
def _synced_temporary(target: Path, data: bytes) -> Iterator[Path]:
    """Write `data` beside `target`, on the disk for good, and clean up if it was not renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(UNFINISHED, f".{target.name}.", target.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.chmod(0o644)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
