"""A run: named artefacts in a store, each made once. The same command again goes on where the last one stopped."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, TypeVar

from defuse_core.artifacts import Models, Votes, decode, encode
from defuse_core.config import STEPS, RunFile, drift, dump_run_file, parse_run_file
from defuse_core.errors import DriftError, InputError, RunBusyError, RunFileError, StoreError

log = logging.getLogger("defuse")
T = TypeVar("T")
WEIGHTS = "weights.json"  # SHA-256 of the files of weights that the run file brought
UNFINISHED = ".unfinished"  # the end of the name of a file that is being written
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


def _weights_digests(spec: RunFile) -> dict[str, str]:
    """Return the SHA-256 of the files of weights that the run file brings, of those that are there."""
    brought = {"classifier.weights": spec.classifier.weights, "vae.weights": spec.vae.weights}
    digests = {}
    for field, path in brought.items():
        with contextlib.suppress(OSError):  # who reads the weights says it
            if path is not None:
                with path.open("rb") as handle:
                    digests[field] = hashlib.file_digest(handle, "sha256").hexdigest()
    return digests


class ReachedStep(Exception):  # noqa: N818 - not an error: --until was reached
    """Everything up to --until is done."""


class Run:
    """One run in a store: `run.yaml`, `manifest.json`, one safetensors file per artefact, and the report."""

    def __init__(self, store: Store, name: str, spec: RunFile, until: str = STEPS[-1]) -> None:
        self.name, self.spec, self.until = name, spec, until
        self.store = store.within(name)

    @classmethod
    def start(cls, store: Store, name: str, spec: RunFile, until: str = STEPS[-1]) -> Run:
        """Return the run called `name`, new or to go on with. Hold its lock before.

        Raises DriftError if its run file was another one in a field that changes results; a run that has made
        nothing yet takes the new one, and so does every run where no result changes. Weights that the run file
        brings are known by what is in their files.
        """
        run = cls(store, name, spec, until)
        if run.store.create("run.yaml", dump_run_file(spec).encode()):
            run._note_weights()
            return run
        recorded = cls.open(store, name).spec
        if not any(key.endswith(".safetensors") for key in run.store.list()):
            run._note_weights()
        elif changed := drift(recorded, spec) or run._other_weights():
            raise DriftError(f"run {name}: {changed}; choose another --name, or undo the change to resume")
        if recorded != spec:
            run.store.write("run.yaml", dump_run_file(spec).encode())
        return run

    def _note_weights(self) -> None:
        if digests := _weights_digests(self.spec):
            self.store.write(WEIGHTS, json.dumps(digests, indent=1).encode())

    def _other_weights(self) -> str | None:
        """Return which weights file is another one than when the run began, or None; one that is gone is not asked."""
        known = json.loads(self.store.read(WEIGHTS)) if self.store.exists(WEIGHTS) else {}
        for field, digest in _weights_digests(self.spec).items():
            if known.get(field, digest) != digest:
                return f"{field}: its file holds other weights than when the run began"
        return None

    @classmethod
    def open(cls, store: Store, name: str) -> Run:
        """Return the existing run called `name`, with its recorded run file. Raises InputError if there is none."""
        import yaml

        try:
            text = store.within(name).read("run.yaml")
        except FileNotFoundError as error:
            raise InputError(
                f"no run called {name} in {store.address}; `defuse status` lists the runs"
            ) from error
        try:
            tree = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RunFileError(f"{name}/run.yaml: expected what Defuse wrote there, found no YAML") from error
        return cls(store, name, parse_run_file(tree, f"{name}/run.yaml"))

    def once(self, step: str, kind: type[T], make: Callable[[], T], key: str | None = None) -> T:
        """Return the artefact of `kind`: the one stored, or else what `make` returns, stored first.

        Raises ReachedStep before a step that comes after --until.
        """
        key = key or kind.__name__.lower()
        if STEPS.index(step) > STEPS.index(self.until):
            raise ReachedStep(self.until)
        stored = self.load(kind, key)
        if stored is not None:
            return stored
        started = time.time()
        artefact = make()
        data = encode(artefact)
        # the manifest first, so that no artefact is ever without its entry
        self._note(step, key, started, data, _of_the_whole_run(artefact))
        self.store.write(f"{key}.safetensors", data)
        log.info("%s: %s made in %.1f s", step, key, time.time() - started)
        return decode(kind, data, key)

    def load(self, kind: type[T], key: str | None = None) -> T | None:
        """Return the stored artefact of `kind`, or None where it has not been made yet."""
        name = f"{key or kind.__name__.lower()}.safetensors"
        try:
            data = self.store.read(name)
        except FileNotFoundError:
            return None
        return decode(kind, data, f"{self.store.address}/{name}")

    def manifest(self) -> dict[str, Any]:
        """Return how the run was made: versions, seed, device, data, annotators, each artefact's step and digest."""
        try:
            manifest: dict[str, Any] = json.loads(self.store.read("manifest.json"))
        except FileNotFoundError:
            return {"name": self.name, "seed": self.spec.seed, "artefacts": {}}
        return manifest

    def _note(self, step: str, key: str, started: float, data: bytes, origin: dict[str, str]) -> None:
        manifest = self.manifest() | origin
        seconds = time.time() - started
        made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started + seconds))
        sha256 = hashlib.sha256(data).hexdigest()
        entry = {
            "step": step,
            "made": made,
            "seconds": round(seconds, 3),
            "bytes": len(data),
            "sha256": sha256,
        }
        manifest["artefacts"][key] = entry
        manifest["versions"] = versions()
        self.store.write("manifest.json", json.dumps(manifest, indent=1).encode())


def _of_the_whole_run(artefact: object) -> dict[str, str]:
    """Return what the manifest says beside its entries, as soon as this artefact is made."""
    if isinstance(artefact, Models):
        return {"device": artefact.device, "data_fingerprint": artefact.data_fingerprint}
    return {"annotators": artefact.answered_by} if isinstance(artefact, Votes) else {}


def versions() -> dict[str, str]:
    """Return what the run was made with: Python, the platform and the packages whose numerics matter."""
    packages = ("defuse", "torch", "torchvision", "numpy", "scikit-learn", "ray")
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
