"""Store: named bytes in a folder (here) or an S3 bucket (services/storage)."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import platform
import re
import secrets
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from operator import not_
from pathlib import Path
from typing import Protocol, TextIO

from defuse_core.errors import InputError, RunBusyError, StoreError
from defuse_core.files import (
    FULL_DISK,
    NO_HARD_LINKS,
    UNFINISHED,
    expect_gone,
    is_current,
    is_file,
    is_folder,
    locked_at_once,
    renamed_if_absent,
    store_errors,
    synced_temporary,
)

RESERVED = {"registry", "traffic"}  # folders that the store keeps for versions and kept inputs
UNFINISHED_S = 600.0
SHARED_STORE = "the store (--store) must be one that all nodes share: s3://bucket/prefix, or a shared folder"
GONE = "this run is gone; was its folder moved or deleted?"
LOCK = ".lock"
LOOK_S = 0.2  # time in which a process that asks whether a folder is locked lets go of it again
GATE = ".writers"  # locked, shared, by whoever writes; and alone by a driver that takes the run over
GATE_S = 20.0
DELETED = ".deleted"  # suffix of a folder that is being deleted


def checked_name(name: str) -> str:
    """Return the name of a run if it can name a folder everywhere. Raises InputError."""
    if name.lower() in RESERVED:  # one folder where the file system ignores case
        raise InputError(
            f"run name {name}: expected another name, since the store keeps versions or traffic under it"
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise InputError(
            f"run name {name!r}: expected letters (a to z), digits, dots, dashes and underscores, at most 100, the "
            "first a letter or digit"
        )
    return name


def command_text(words: Sequence[str], address: str) -> str:
    """Return `defuse WORDS` as it is typed, with --store unless `address` is that of the default store."""
    where = [] if address == str(Path("runs").absolute()) else ["--store", address]
    return shlex.join(["defuse", *words, *where])


class Store(Protocol):
    """Named bytes. Keys are relative paths with `/`; a key is either whole or absent, whatever dies when."""

    @property
    def address(self) -> str:
        """How a person would find it again: a folder or an s3:// address."""

    def within(self, prefix: str) -> Store:
        """The same store, seen from below `prefix`."""

    def exists(self, key: str) -> bool: ...

    def version(self, key: str) -> str | None:
        """What changes where other bytes are put under `key`; None if it is absent. Costs as little as `exists`."""

    def read(self, key: str) -> bytes:
        """The bytes under `key`. Raises FileNotFoundError."""

    def write(self, key: str, data: bytes, unless: Callable[[bytes], bool] | None = None) -> None:
        """Put `data` under `key`, replacing what was there, all or nothing; not where `unless(what was there)`.

        Inside `lock`, here and in workers that this store is sent to: raises RunBusyError once another driver holds the
        run, and never replaces what that driver wrote.
        """

    def create(self, key: str, data: bytes) -> bool:
        """Put `data` under `key` only if `key` is absent; False where it exists."""

    def list(self, prefix: str = "") -> list[str]:
        """All keys that start with `prefix`, sorted; without hidden ones, which the store keeps for itself."""

    def folders(self) -> Sequence[str]:
        """The first parts of all keys that have more than one, sorted; as in `list` without hidden ones."""

    def delete(self, key: str) -> None:
        """Forget `key`; nothing happens if it is absent."""

    def delete_all(self) -> None:
        """Forget every key, hidden ones too. Inside `lock` the lock is held until its end, and then gone as well.

        Killed in between, `run.yaml` is either left, or everything is gone for a reader.
        """

    def remove_unfinished(self) -> None:
        """Remove what writers that were killed left behind, once no living one can still write it."""

    def lock(self) -> AbstractContextManager[None]:
        """Hold this store for one driver. Raises RunBusyError, naming the holder, if another has it."""

    def require_lock(self) -> None:
        """Raise RunBusyError if this process held the lock and another driver holds it now."""

    def is_locked(self) -> bool:
        """Whether a living driver holds this store, here or elsewhere, for people: no write may rely on it."""


class FolderStore:
    """A Store in a folder of the file system.

    A lock is fenced: `.lock` names the driver that holds the folder, and whoever writes for another one is refused. A
    driver that is paused keeps its lock, but workers of one that was killed can outlive it.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).absolute()
        self.holders: dict[Path, str] = {}  # locked folder -> its driver; shared with the stores below
        # a folder that existed when this was opened: a write does not make it again
        self.existing = self.folder if is_folder(self.folder) else None

    @property
    def address(self) -> str:
        return str(self.folder)

    def within(self, prefix: str) -> FolderStore:
        below = FolderStore(self.folder / prefix)
        below.holders, below.existing = self.holders, below.existing or self.existing
        return below

    def exists(self, key: str) -> bool:
        with store_errors(self.folder / key):
            return is_file(self.folder / key)

    def version(self, key: str) -> str | None:
        with contextlib.suppress(FileNotFoundError), store_errors(self.folder / key):
            found = (self.folder / key).stat()
            return f"{found.st_ino} {found.st_size} {found.st_ctime_ns}"
        return None

    def read(self, key: str) -> bytes:
        with store_errors(self.folder / key):
            return (self.folder / key).read_bytes()

    def write(self, key: str, data: bytes, unless: Callable[[bytes], bool] | None = None) -> None:
        target = self.folder / key
        self._expect_folder()
        with (
            store_errors(target),
            synced_temporary(target, data) as temporary,
            self._holding(alone=unless is not None),
        ):
            if unless is None or not is_file(target) or not unless(target.read_bytes()):
                temporary.replace(target)

    def create(self, key: str, data: bytes) -> bool:
        target = self.folder / key
        self._expect_folder()
        with store_errors(target), synced_temporary(target, data) as temporary, self._holding():
            try:
                os.link(temporary, target)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in NO_HARD_LINKS:
                    raise
                return renamed_if_absent(temporary, target)
        return True

    def list(self, prefix: str = "") -> list[str]:
        keys = []
        # unlike rglob, os.walk passes over a folder that another process deletes meanwhile
        for folder, folders, names in os.walk(self.folder, onerror=expect_gone):
            folders[:] = [name for name in folders if not is_hidden(name)]
            with store_errors(Path(folder)):
                files = [path for name in names if is_file(path := Path(folder, name))]
            keys += [path.relative_to(self.folder).as_posix() for path in files]
        return sorted(key for key in keys if key.startswith(prefix) and not is_hidden(key))

    def folders(self) -> Sequence[str]:
        with contextlib.suppress(FileNotFoundError), store_errors(self.folder):
            found = filter(is_folder, self.folder.iterdir())
            return sorted(path.name for path in found if not is_hidden(path.name))
        return []

    def delete(self, key: str) -> None:
        with store_errors(self.folder / key), self._holding():
            (self.folder / key).unlink(missing_ok=True)

    def delete_all(self) -> None:
        """Delete the folder. `run.yaml` is the last file, so that a deletion that was killed can be repeated.

        The newest files go first: what a killed deletion leaves is the run at an earlier point, which can go on. At the
        end the folder is renamed before it goes, so that a driver that begins the run again loses no file.
        """
        doomed = self.folder.with_name(f".{self.folder.name}.{secrets.token_hex(3)}{DELETED}")
        with store_errors(self.folder), self._holding(alone=True):
            files = [self.folder / key for key in self.list() if key != "run.yaml"]
            for file in sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True):
                file.unlink(missing_ok=True)
            self.folder.rename(doomed)
        self._remove_deleted()

    def remove_unfinished(self) -> None:
        """Remove what writers that were killed left behind; a living one writes its file in seconds."""
        found = (Path(folder, name) for folder, _, names in os.walk(self.folder) for name in names)
        for path in (path for path in found if path.match(f".*{UNFINISHED}")):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > UNFINISHED_S:
                    path.unlink()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder through the operating system, which releases it by itself when the driver dies."""
        with self._taken() as handle:
            with store_errors(self.folder):
                self._name_holder(
                    handle, f"process {os.getpid()} on {platform.node()} ({secrets.token_hex(3)})"
                )
            try:
                self.remove_unfinished()
                yield
            finally:
                with contextlib.suppress(RunBusyError, OSError):
                    self._name_holder(handle, "")
                self.holders.pop(self.folder, None)
        self._remove_deleted()  # NFS keeps a deleted file until it is closed

    def require_lock(self) -> None:
        with store_errors(self.folder), self._holding():
            pass

    def is_locked(self) -> bool:
        lock = self.folder / LOCK
        with contextlib.suppress(FileNotFoundError), store_errors(self.folder), lock.open() as handle:
            return bool(handle.read()) and not locked_at_once(handle, fcntl.LOCK_SH)
        return False

    def _taken(self) -> TextIO:
        """Return the open lock file of the folder, locked; again where `delete_all` removes both meanwhile."""
        while True:
            with store_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                handle = (self.folder / LOCK).open("a+")
            with contextlib.ExitStack() as opened:
                opened.enter_context(handle)
                self._take(handle)
                if is_current(handle, self.folder / LOCK):
                    opened.pop_all()
                    return handle

    def _take(self, handle: TextIO) -> None:
        try:
            for pause_s in (LOOK_S, 0.0):
                if locked_at_once(handle):
                    return
                time.sleep(pause_s)
        except OSError as error:
            raise StoreError(
                f"{self.folder}: this file system cannot lock a file ({error.strerror}), which keeps a second "
                "driver out; use a folder elsewhere, or an S3 store"
            ) from error
        handle.seek(0)
        holder = handle.read() or "another driver"
        raise RunBusyError(f"{self.folder}: {holder} is writing this run; wait for its end, or end it first")

    def _name_holder(self, handle: TextIO, holder: str) -> None:
        """Write down who holds the folder, while nobody is between asking for that and writing."""
        import tenacity  # late: it imports asyncio

        retry = tenacity.Retrying(
            retry=tenacity.retry_if_result(not_),
            stop=tenacity.stop_after_delay(GATE_S),
            wait=tenacity.wait_fixed(0.05),
        )
        with (self.folder / GATE).open("a+") as gate:
            try:
                retry(locked_at_once, gate)
            except tenacity.RetryError as error:
                raise RunBusyError(
                    f"{self.folder}: a worker of an earlier driver is in the middle of a write; end it and run again"
                ) from error
            handle.truncate(0)
            self.holders.pop(self.folder, None)
            if holder:
                self.holders[self.folder] = _written_name(handle, holder)

    @contextlib.contextmanager
    def _holding(self, alone: bool = False) -> Iterator[None]:
        """Inside, the driver for whom this store writes holds the folder; where nobody locked it, there is no check."""
        folder = self._locked_folder()
        if folder is None:
            yield
            return
        with (folder / GATE).open("a+") as gate:  # NFS shares a lock only of readers
            fcntl.flock(gate, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            found = (folder / LOCK).read_text() if is_file(folder / LOCK) else ""
            if found != self.holders[folder]:
                held, now = self.holders[folder] or "a driver", found or "nobody"
                raise RunBusyError(f"{folder}: {held} held this run; {now} holds it now")
            yield

    def _expect_folder(self) -> None:
        """Raise StoreError where a folder that was there is gone: a write would make another one in its place."""
        if self._locked_folder() is None and self.existing and not is_folder(self.existing):
            raise StoreError(f"{self.existing}: it was moved or deleted meanwhile; put it back to continue")

    def _locked_folder(self) -> Path | None:
        """Return the folder that the driver for whom this store writes locked, if any.

        Raises RunBusyError if the folder is gone, and InputError if the driver locked it on another machine.
        """
        folder = next((folder for folder in self.holders if self.folder.is_relative_to(folder)), None)
        if folder is None or is_file(folder / LOCK):
            return folder
        if not self.holders[folder] or f" on {platform.node()} " in self.holders[folder]:
            raise RunBusyError(f"{folder}: {GONE}; put it back to continue, or run again to begin anew")
        raise InputError(
            f"{folder}: {self.holders[folder]} holds this run, and {platform.node()} does not see its folder; "
            f"{SHARED_STORE} (or was the run deleted?)"
        )

    def _remove_deleted(self) -> None:
        """Remove the folder that `delete_all` renamed, and those whose deletion was killed."""
        for doomed in self.folder.parent.glob(f".{glob.escape(self.folder.name)}.??????{DELETED}"):
            shutil.rmtree(doomed, ignore_errors=True)


def folder_store(folder: Path) -> FolderStore:
    """Return the store in a folder, which need not exist. Raises InputError where a file is in its place, or a link
    that leads nowhere.
    """
    with store_errors(folder):
        blocked = any(at.is_file() for at in (folder, *folder.parents))
        broken = next((at for at in (folder, *folder.parents) if at.is_symlink() and not at.exists()), None)
    if blocked:
        raise InputError(f"store {folder}: expected a folder, found a file in its place")
    if broken is not None:
        raise InputError(
            f"store {folder}: {broken} is a link to {broken.readlink()}, which does not exist; is its disk mounted?"
        )
    return FolderStore(folder)


def is_hidden(key: str) -> bool:
    """Whether a key is one that a store keeps for itself, such as its lock."""
    return any(part.startswith(".") for part in key.split("/"))


def _written_name(handle: TextIO, holder: str) -> str:
    """Write who holds a folder to its empty lock file, and return what the file holds then.

    That is nothing on a full disk, where the lock of the operating system is enough to delete the run.
    """
    try:
        os.write(handle.fileno(), holder.encode())  # in a buffer it would be written again when closed
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        return ""
    return holder
