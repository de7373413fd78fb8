"""Files and folders: written whole or not at all, locked, and errors of the file system in one line.

First those of a store, then those that people name by an option of a command, and digests; last, items that are read
ahead in threads.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import itertools
import os
import secrets
import shutil
import stat
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TextIO, TypeVar

from defuse_core.errors import InputError, NoAnswerError, StoreError, StoreSettingsError

A = TypeVar("A")
B = TypeVar("B")

READ_AHEAD = 8  # objects of a store that are read at once
OPENED_AHEAD = 32  # files that are looked at side by side: a mounted bucket takes long to answer
UNFINISHED = ".unfinished"  # suffix of what is being written
CREATING = ".creating"  # locked while a key is created, on file systems without hard links
NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS}  # errors of exFAT, FAT and some network folders
FULL_DISK = {errno.ENOSPC, errno.EDQUOT}
# of a network folder whose server is away, a disk that fails to read, or a process that has too much open for now
NO_ANSWER = {
    errno.EAGAIN,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EIO,
    errno.EMFILE,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENFILE,
    errno.ENOTCONN,
    getattr(errno, "EREMOTEIO", errno.EIO),  # Linux alone has it
    errno.ESTALE,
    errno.ETIMEDOUT,
}
# of a path that no folder can have, or where a file is in the place of a folder or the other way round
WRONG_PLACE = {errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR}
OWN_FILES = (  # whose folder Defuse reads again: what it is, and files that it has
    ("run", ("run.yaml", "settings.json")),
    ("run", ("run.yaml", "manifest.json")),  # whose settings.json was damaged and deleted
    ("suite", ("suite.json", "suite.safetensors")),
    ("registry", ("changes/000001.json",)),
)


def is_file(path: Path) -> bool:
    """Whether it is a file. Unlike Path.is_file since Python 3.14, raises OSError where that cannot be seen."""
    return stat.S_ISREG(_mode(path))


def is_folder(path: Path) -> bool:
    """Whether it is a folder, or a link to where this process may not look."""
    with store_errors(path), contextlib.suppress(PermissionError):
        return stat.S_ISDIR(_mode(path))
    return True


def _mode(path: Path) -> int:
    """Return the mode of a file or folder; 0 where there is none, or a link that leads nowhere."""
    try:
        return path.stat().st_mode
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
            return 0
        raise


def locked_at_once(handle: TextIO, how: int = fcntl.LOCK_EX) -> bool:
    """Lock an open file; False where another one has it."""
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_current(handle: TextIO, path: Path) -> bool:
    """Whether the open file is the one at `path`, which can be deleted or replaced meanwhile."""
    with contextlib.suppress(FileNotFoundError), store_errors(path):
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    return False


@contextlib.contextmanager
def store_errors(path: Path) -> Iterator[None]:
    """Raise errors of the file system as StoreError, in one line; a missing file stays a FileNotFoundError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in WRONG_PLACE or (isinstance(error, FileExistsError) and path.is_file()):
            raise StoreSettingsError(f"{path}: {error.strerror}; choose another folder or name") from error
        kind = NoAnswerError if error.errno in NO_ANSWER else StoreError
        raise kind(
            f"{path}: {error.strerror}; free space or fix access, then run again to continue"
        ) from error


def expect_gone(error: OSError) -> None:
    """Raise the error of a folder that cannot be listed, unless it is gone: only such a folder counts as empty."""
    if not isinstance(error, FileNotFoundError):
        with store_errors(Path(error.filename)):
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


@contextlib.contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Turn an error of the file system into an InputError that names the option and its path.

    Raises InputError for a path inside a run, a suite or a registry, where it could replace one of their files.
    """
    expect_no_own_folder(option, path)
    try:
        yield
    except OSError as error:
        # a new folder whose place a file has
        reason = (
            os.strerror(errno.ENOTDIR) if isinstance(error, FileExistsError) else error.strerror or str(error)
        )
        if error.filename and Path(error.filename) != path and UNFINISHED not in str(error.filename):
            reason = f"{error.filename}: {reason}"
        raise InputError(f"{option} {path}: cannot be written ({reason}); choose another place") from error


def expect_no_own_folder(option: str, path: Path) -> None:
    """Raise InputError for a path inside a run, a suite or a registry."""
    for folder in Path(os.path.realpath(path)).parents:
        for kind, names in OWN_FILES:
            if all(os.path.lexists(folder / name) for name in names):
                raise InputError(
                    f"{option} {path}: is inside the {kind} {folder}, which it could damage; choose another place"
                )


def expect_writable(option: str, path: Path) -> None:
    """Raise InputError for a file that cannot be written, before the work whose result it gets."""
    with writing(option, path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():  # a pipe or a device, which a file would replace
            raise OSError(errno.EINVAL, "no ordinary file")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def expect_new_file(option: str, path: Path) -> None:
    """Raise InputError for a file that exists."""
    with writing(option, path):
        exists = path.is_file()
    if exists:
        raise InputError(f"{option} {path}: exists; choose another file, or replace it with --force")


def replace_file(option: str, path: Path, data: bytes) -> None:
    """Write a file whole, or leave what was there. Where `path` is a link, that is the file that it leads to."""
    target = Path(os.path.realpath(path))
    # without its own name, which may have the greatest length
    temporary = target.with_name(f".{secrets.token_hex(3)}{UNFINISHED}")
    with writing(option, path):
        try:
            with temporary.open("wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def expect_new_folder(option: str, folder: Path) -> None:
    """Raise InputError for a folder that is not empty, or is none."""
    with writing(option, folder):
        if folder.exists() and (
            not folder.is_dir() or not all(path.match(f".*{UNFINISHED}") for path in folder.iterdir())
        ):
            raise InputError(
                f"{option} {folder}: expected an empty or new folder, found files; choose another one"
            )


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Yield whether this process alone holds the folder inside, until it is killed at the latest."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)  # a pipe would be waited for
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held, or a file system without locks
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _remove_abandoned(folder: Path) -> None:
    """Remove what a command that was killed was writing."""
    # it is gone, no folder, or another person's
    with (
        contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError),
        _held(folder) as is_abandoned,
    ):
        if is_abandoned:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[str]:
    """Yield a new temporary folder, which is removed at the end. Remove those of its prefix that killed processes left.

    Only names as tempfile makes them are removed, since a person may have given others. An empty folder is left:
    another process may be about to hold it.
    """
    names = prefix + "[a-z0-9_]" * 8
    for path in {inside.parent for inside in Path(tempfile.gettempdir()).glob(f"{names}/*")}:
        _remove_abandoned(path)
    with tempfile.TemporaryDirectory(prefix=prefix) as folder, _held(Path(folder)):
        yield folder


@contextlib.contextmanager
def filling(option: str, folder: Path) -> Iterator[Path]:
    """Yield a new folder, whose content is moved to `folder` at the end, and deleted after an error.

    It is inside `folder`, which may be the working directory or the root of a volume, so that the same command can be
    given again. Raises InputError where the file system refuses something, and where another command was faster.
    """
    unfinished = folder / f".{secrets.token_hex(3)}{UNFINISHED}"
    moved: list[Path] = []
    with writing(option, folder), contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob(f".*{UNFINISHED}"):
                _remove_abandoned(path)
            unfinished.mkdir()
            held.enter_context(_held(unfinished))
            yield unfinished
            expect_new_folder(option, folder)
            for path in sorted(unfinished.iterdir()):
                moved.append(path.rename(folder / path.name))
        except BaseException:
            for path in moved:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def weights_in(folder: Path) -> list[Path]:
    """Return the files of weights in a folder of Hugging Face's: one, or its parts in their order."""
    return list(folder.glob("model.safetensors")) or sorted(folder.glob("model-*-of-*.safetensors"))


def is_special_file(path: Path) -> bool:
    """Whether it is a pipe, a device or a socket: reading it may wait, or read on, without end."""
    mode = _mode(path)
    return bool(mode) and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def expect_no_special_file(path: Path) -> None:
    """Raise OSError for a path that `is_special_file`."""
    if is_special_file(path):
        raise OSError(errno.EINVAL, "a pipe, a device or a socket", str(path))


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file, or over the digests of config.json and `weights_in` a folder.

    Raises OSError.
    """
    expect_no_special_file(path)
    if path.is_dir():
        inside = "".join(map(digest_of, (path / "config.json", *weights_in(path))))
        return hashlib.sha256(inside.encode()).hexdigest()
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@functools.cache
def source_digest(root: Path) -> str:
    """Return eight digits of a digest of the packages' sources in `root`: a version can name many commits."""
    digest, packages = hashlib.sha256(), ("cluster", "defuse_core", "services")
    found = (file for package in packages for file in (root / package).rglob("*.py"))
    for file in sorted(file for file in found if file.is_file()):  # Emacs locks a file by a link to nothing
        digest.update(f"{file.relative_to(root).as_posix()} {file.stat().st_size} ".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


def map_ahead(function: Callable[[A], B], items: Iterable[A], ahead: int = READ_AHEAD) -> Iterator[B]:
    """Yield function(item) of each item, in order, while threads work on the next `ahead` items.

    So many results are in memory at most. Raises what the function raises, once its item is due.
    """
    left = iter(items)
    with ThreadPoolExecutor(ahead, "defuse-read") as pool:
        due = deque(pool.submit(function, item) for item in itertools.islice(left, ahead))
        while due:
            result = due.popleft().result()
            due.extend(pool.submit(function, item) for item in itertools.islice(left, 1))
            yield result
