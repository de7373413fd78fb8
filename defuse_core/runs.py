"""A run: named artefacts in a store, each made once. The same command again goes on where the last one stopped."""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import platform
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import yaml

from defuse_core.artifacts import Models, Votes
from defuse_core.codec import decode, encode
from defuse_core.config import (
    RunFile,
    added_lambdas,
    changed_field,
    dump_run_file,
    model_sections,
    parse_run_file,
    parse_yaml,
)
from defuse_core.errors import (
    ANOTHER_NAME,
    OTHER_FORMAT_REMEDY,
    DamagedError,
    InputError,
    RunFileError,
    RunMismatchError,
    StoreError,
)
from defuse_core.files import digest_of, source_digest
from defuse_core.formatting import first_few
from defuse_core.steps import STEPS
from defuse_core.store import GONE, Store, command_text

log = logging.getLogger("defuse")
T = TypeVar("T")
CONTINUES = (
    "the `defuse run` command that began it, without --until, or in Python the same call, continues it"
)
UNFINISHED = f"is not finished; {CONTINUES}"
SHOWN_S = 0.05  # the log does not name what was made sooner
RUN_AGAIN = "delete it and run again with the run file that this run was started with"
# The trainings with λ = 0; the place of each is the repetition that it is. One training alone is no measure: another
# order of the minibatches may turn half of a scenario's images.
PLAIN_NAMES = ("plain", "plain_1", "plain_2")
CONTROL_NAMES = (*PLAIN_NAMES, "left_out_0", "left_out_1")  # classifiers that only evidence needs
# Artefacts that follow from the verdicts, in the order in which they are made; the rest of a run stays.
FROM_VERDICTS = (
    "moreimages", "verdicts", "corrections", "baseline", "sweep", *CONTROL_NAMES, "evaluation", "failurewatch",
    "evidence",
)  # fmt: skip
# What a run stores, in the order in which it is made: each follows from those before it. Trials are those of a sweep.
CREATION_ORDER = (
    "measuredprecision", "models", "references", "judges", "health", "psi", "scenarios", "gallery", "labeling",
    "annotation_authors", "prelabels", "votes", "overrides", *FROM_VERDICTS, "trials", "report",
)  # fmt: skip
FROM_SWEEP = FROM_VERDICTS[FROM_VERDICTS.index("baseline") :]  # the baseline has every λ, too
REPORT_FILES = ("report.json", "report.html")
IMAGES = "inputs/images.npz"  # those that `debug` was given in memory; data.root of its run names them
WEIGHTS = "weights.json"  # SHA-256 of the files of weights that the run file names
KEPT_IN = {"review.reference.weights": "references", "judges.weights": "judges"}  # others in models
RECORDED_FIELDS = "settings.json"  # the fields of run.yaml as Defuse wrote them: people can edit run.yaml
# Fields of section review that say how people are asked; free until their votes are stored.
UNTIL_VOTES = ("answers_per_task", "stop_early", "certainty", "real_names")
MEASURED_PRECISION = "measuredprecision.safetensors"  # made before anything can follow from the weights


def has_made_something(store: Store) -> bool:
    """Whether the run in `store` has stored what follows from its run file, apart from its measured precision."""
    return any(key.endswith(".safetensors") and key != MEASURED_PRECISION for key in store.list())


def _weights_digests(spec: RunFile) -> dict[str, str]:
    """Return the SHA-256 of the files of weights that the run file names, of those that exist."""
    digests = {}
    for name, section in model_sections(spec).items():
        with contextlib.suppress(OSError):  # the code that reads the weights raises it
            if section.weights is not None:
                digests[f"{name}.weights"] = digest_of(section.weights)
    return digests


def _parse_recorded(tree: dict[str, Any], where: str) -> RunFile:
    try:
        return parse_run_file(tree, where)
    except RunFileError as error:
        raise RunFileError(f"{error}; undo what was edited there, or {OTHER_FORMAT_REMEDY}") from error


def no_such_run(store: Store, name: str) -> InputError:
    """Return the error of a name that no run in the store has, with the names that there are, a like one first."""
    runs = list[str]()
    with contextlib.suppress(StoreError):  # a store that gives a run need not list them
        runs = [found for found in store.folders() if store.exists(f"{found}/run.yaml")]
    known = list(dict.fromkeys([*difflib.get_close_matches(name, runs, n=1), *runs]))
    has = first_few(known) if known else "no runs; give another store with --store (store= in Python)"
    return InputError(f"no run called {name} in {store.address}, which has {has}")


class ReachedStep(Exception):  # noqa: N818 - not an error: --until was reached
    """Everything up to --until is done."""


class Run:
    """One run in a store: `run.yaml`, `manifest.json`, one safetensors file per artefact, and the report."""

    def __init__(self, store: Store, name: str, spec: RunFile, until: str = STEPS[-1]) -> None:
        self.name, self.spec, self.until = name, spec, until
        self.runs, self.store = store, store.within(name)  # that of all runs, and of this one
        self.made_s = 0.0  # seconds spent on artefacts so far
        # the given run file, while the λ that it adds are not recorded
        self.with_added: RunFile | None = None

    @classmethod
    def start(
        cls,
        store: Store,
        name: str,
        spec: RunFile,
        until: str = STEPS[-1],
        *,
        check: Callable[[Run], None] = lambda run: None,
    ) -> Run:
        """Return the run called `name`, new or to go on with. Hold its lock before.

        Raises RunMismatchError if its run file was another one in a field that changes results; a run that has made
        nothing yet takes the new one, and so does every run where no result changes; UNTIL_VOTES change none before
        the votes are stored. Weights that the run file names are known by what is in their files. A run that exists
        stays as it is where `check` raises an error for it.
        """
        run = cls(store, name, spec, until)
        if run.store.create("run.yaml", dump_run_file(spec).encode()) and run._read_recorded() is None:
            run._write_weights()
            run._write_recorded(spec)
            return run
        existing = cls._read(store, name)
        recorded = existing._read_recorded()
        before = recorded or existing.spec
        added = added_lambdas(before, spec)
        allowed = before.with_fields("correct", lambdas=spec.correct.lambdas) if added else before
        if not run.store.exists("votes.safetensors"):
            allowed = allowed.with_fields("review", **{key: getattr(spec.review, key) for key in UNTIL_VOTES})
        if not has_made_something(run.store):
            if allowed != spec or run.changed_weights():
                run.store.delete(MEASURED_PRECISION)
            run._write_weights()
        elif changed := changed_field(allowed, spec) or run.changed_weights():
            raise RunMismatchError(f"run {name}: {changed}; choose {ANOTHER_NAME}, or undo the change")
        elif added:
            run.with_added, spec = spec, spec.with_fields("correct", lambdas=before.correct.lambdas)
        check(run)
        if added:
            text = "correct: λ = %s to be added to run.yaml once they can be tuned; the report step is made again"
            log.info(text, ", ".join(f"{lam:g}" for lam in added))
        if not recorded == existing.spec == spec:  # else there is nothing to write
            if any((each.check, each.serve) != (spec.check, spec.serve) for each in (before, existing.spec)):
                for key in REPORT_FILES:  # whose figures follow from them
                    run.store.delete(key)
            run._write_recorded(spec)
            run.store.write("run.yaml", dump_run_file(spec).encode())
        return run

    def add_lambdas(self) -> None:
        """Record the λ that were added, and delete what follows from the sweeps, once it can be made again.

        All trials stay, so that only those of the added λ are run, and controls again only where the choice is another.
        """
        if self.with_added is None:
            return
        spec, self.with_added = self.with_added, None
        self.delete(FROM_SWEEP)
        self._write_recorded(spec)
        self.store.write("run.yaml", dump_run_file(spec).encode())

    def _write_weights(self) -> None:
        if digests := _weights_digests(self.spec):
            self.store.write(WEIGHTS, json.dumps(digests, indent=1).encode())

    def _write_recorded(self, spec: RunFile) -> None:
        self.store.write(RECORDED_FIELDS, spec.model_dump_json(indent=1).encode())

    def _read_recorded(self) -> RunFile | None:
        """Return the run file as `start` wrote it last; None where it was stopped before that, or its file is gone."""
        tree = self._read_json(RECORDED_FIELDS, "the settings in run.yaml are taken as they are now")
        return _parse_recorded(tree, f"{self.store.address}/{RECORDED_FIELDS}") if tree else None

    def changed_weights(self) -> str | None:
        """Return which weights file has changed since the run began, or None; a missing file does not count."""
        known = self._read_json(WEIGHTS, "the weights are taken as they are now")
        for field, digest in _weights_digests(self.spec).items():
            if known.get(field, digest) == digest:
                continue
            way = ""
            if self.store.exists(f"{KEPT_IN.get(field, 'models')}.safetensors"):
                way = " (to go on with those that the run holds, set it to a path without a file)"
            return f"{field}: the weights file has changed since the run began{way}"
        return None

    @classmethod
    def open(cls, store: Store, name: str) -> Run:
        """Return the existing run called `name`, with its recorded run file.

        Raises InputError if there is none, and RunMismatchError where that file was edited in a field that changes
        results: the run's artefacts are of other settings.
        """
        run = cls._read(store, name)
        if edited := changed_field(run._read_recorded() or run.spec, run.spec):
            raise RunMismatchError(
                f"{run.store.address}/run.yaml was edited, or a command was stopped before it wrote it: {edited}; undo "
                "the edit, or give the last `defuse run` command of this run again (in Python its last call)"
            )
        return run

    @classmethod
    def recorded(cls, store: Store, name: str) -> RunFile:
        """Return the run file that the run called `name` was made with, also where `open` refuses its run.yaml."""
        run = cls._read(store, name)
        if changed_field(made_with := run._read_recorded() or run.spec, run.spec) is None:
            return run.spec
        return made_with.with_fields("data", root=run.spec.data.root)

    @classmethod
    def _read(cls, store: Store, name: str) -> Run:
        """Return a run with its run.yaml as it is now."""
        try:
            text = store.within(name).read("run.yaml")
        except FileNotFoundError as error:
            raise no_such_run(store, name) from error
        where = f"{store.address}/{name}/run.yaml"
        damaged = f"{where}: expected what Defuse wrote there, found"
        try:
            tree = parse_yaml(text)
        except (yaml.YAMLError, ValueError) as error:
            raise RunFileError(f"{damaged} no YAML; {RUN_AGAIN}") from error
        if not isinstance(tree, dict):
            raise RunFileError(f"{damaged} {type(tree).__name__}; {RUN_AGAIN}")
        run = cls(store, name, _parse_recorded(tree, where))
        root, own = run.spec.data.root, Path(run.store.address, IMAGES)
        if root is not None and root.as_posix().endswith(f"/{IMAGES}") and own.exists():
            run.spec = run.spec.with_fields("data", root=own)  # its folder may have been moved
        return run

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
        self.manifest()  # a damaged one is reported before the work, not after it
        started, before_s = time.monotonic(), self.made_s
        artefact = make()
        data, origin = encode(artefact), _manifest_fields(artefact)
        del artefact  # which can have gigabytes
        readable = decode(kind, data, key)  # else no later command could read it
        # without the time of artefacts that `make` made, which have entries of their own
        seconds = time.monotonic() - started - (self.made_s - before_s)
        self.made_s += seconds
        # first, so that no artefact is ever without its entry
        self._note(step, key, seconds, data, origin)
        self.store.write(f"{key}.safetensors", data)
        if (total := time.monotonic() - started) >= SHOWN_S:
            log.info("%s: %s made in %.1f s", step, key, total)
        return readable

    def load(self, kind: type[T], key: str | None = None) -> T | None:
        """Return the stored artefact of `kind`, or None where it has not been made yet."""
        name = f"{key or kind.__name__.lower()}.safetensors"
        try:
            data = self.store.read(name)
        except FileNotFoundError:
            return None
        return decode(kind, data, f"{self.store.address}/{name}")

    def require(self, kind: type[T], key: str | None = None) -> T:
        """Return the stored artefact of `kind`. Raises InputError where it has not been made yet."""
        if (artefact := self.load(kind, key)) is None:
            raise self.incomplete_error(UNFINISHED)
        return artefact

    def delete(self, names: Sequence[str], trials: tuple[str, ...] = ()) -> None:
        """Delete artefacts, `trials` and the report; the first artefact last, to be safe to repeat."""
        files = [key for key in self.store.list() if key.startswith((*trials, *REPORT_FILES))]
        for key in (*files, *(f"{name}.safetensors" for name in reversed(names))):
            self.store.delete(key)
        manifest = self.manifest()
        for name in names:
            manifest["artefacts"].pop(name, None)
        self._write_manifest(manifest)

    def exists(self) -> bool:
        """Whether the store still holds the run, which can be moved or deleted after it was opened."""
        return self.store.exists("run.yaml")

    def incomplete_error(self, what: str) -> InputError:
        """Return the error of a run that has not made something yet: `what`, unless the run itself is gone."""
        return InputError(f"run {self.name} {what}" if self.exists() else f"{self.store.address}: {GONE}")

    def command(self, words: str, *options: str) -> str:
        """Return `defuse WORDS RUN OPTIONS`, with --store unless the run is in the default store."""
        store = self.store.address.removesuffix(f"/{self.name}")
        return command_text([*words.split(), self.name, *options], store)

    def manifest(self) -> dict[str, Any]:
        """Return how the run was made: versions, seed, device, data, annotators, artefacts with step, time, size.

        The time of an artefact does not hold that of others that it had made first. Of artefacts that are made
        together, the first has the time of all.
        """
        manifest = self._read_json("manifest.json", "only the times of the steps so far are lost")
        return {"name": self.name, "seed": self.spec.seed, "artefacts": {}} | manifest

    def used_gpus(self) -> bool:
        """Whether the models were trained on a GPU."""
        return not self.manifest().get("device", "cpu").startswith("cpu")

    def _read_json(self, key: str, consequence: str) -> dict[str, Any]:
        """Return a file of the run, empty where there is none. Raises DamagedError for one that is damaged."""
        try:
            found = json.loads(self.store.read(key))
        except FileNotFoundError:
            return {}
        except ValueError:  # no UTF-8, or no JSON
            found = None
        if not isinstance(found, dict) or not _are_entries(found.get("artefacts", {})):
            raise DamagedError(
                f"{self.store.address}/{key}: expected what Defuse wrote there, found damaged JSON; delete it and run "
                f"again: {consequence}"
            )
        return found

    def _note(self, step: str, key: str, seconds: float, data: bytes, origin: dict[str, str]) -> None:
        manifest = self.manifest() | origin
        entry = {"step": step, "made": utc_now(), "seconds": round(seconds, 3), "bytes": len(data)}
        manifest["artefacts"][key] = entry
        manifest["versions"] = _with_current(manifest.get("versions", {}), self.spec)
        self._write_manifest(manifest)

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        self.store.write("manifest.json", json.dumps(manifest, indent=1).encode())


def _are_entries(entries: Any) -> bool:
    """Whether these are what `_note` writes of artefacts."""
    kinds = {"step": str, "made": str, "seconds": int | float, "bytes": int}
    return isinstance(entries, dict) and all(
        isinstance(entry, dict) and all(isinstance(entry.get(key), kinds[key]) for key in kinds)
        for entry in entries.values()
    )


def utc_now() -> str:
    """Return the time as in manifests, candidates and the registry: 2026-01-31T12:00:00Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _manifest_fields(artefact: object) -> dict[str, str]:
    """Return what the manifest says beside its entries, as soon as this artefact is made."""
    if isinstance(artefact, Models):
        return {"device": artefact.device, "data_fingerprint": artefact.data_fingerprint}
    return {"annotators": artefact.answered_by} if isinstance(artefact, Votes) else {}


def _with_current(noted: dict[str, str], spec: RunFile) -> dict[str, str]:
    """Return the versions that a run was made with so far, and where they differ those of this process, too."""
    found = dict(noted)
    for name, version in versions(spec.classifier.architecture).items():
        earlier = found.setdefault(name, version)
        if version in earlier.split(", "):
            continue
        found[name] = f"{earlier}, {version}"
        if name != "platform":  # it names the kernel, too
            text = "so far this run was made with %s %s, and now with %s: its results can differ from those of either"
            log.warning(text, name, earlier, version)
    return found


def versions(architecture: str = "") -> dict[str, str]:
    """Return the versions of now: Python, the platform, packages whose numerics matter, and that of `architecture`."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    own = {"timm", "transformers"} & {architecture}
    for package in ("defuse", "torch", "torchvision", *own, "numpy", "scikit-learn", "ray"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    # of a job the code is uploaded, and need not be installed
    found["defuse"] = f"{found.get('defuse', '')}+{source_digest(Path(__file__).parents[1])}"
    return found
