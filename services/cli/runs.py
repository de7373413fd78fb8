"""Names of runs, and what must hold of a run before a command changes or deletes it."""

from __future__ import annotations

import contextlib
import logging
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from defuse_core.errors import InputError, ModelError, RunMismatchError
from defuse_core.store import RESERVED, FolderStore, checked_name

if TYPE_CHECKING:
    from defuse_core.runs import Run
    from defuse_core.store import Store

log = logging.getLogger("defuse")
# what to do with a run that is in the registry
COPY_IT = "copy its folder in the store, and change the copy (`defuse run` continues it with --name)"
# what commands without the run's lock store in it: in a bucket also after `defuse delete`
LEFT_BEHIND = re.compile(
    r"candidates/\w+\.safetensors|overrides/\d+\.json|(labeling|annotation_authors)(-[\w-]+)?\.json|"
    r"(prelabels|measuredprecision)\.safetensors|traffic-\d+/.+"
)
AMBIGUOUS_KEYS = {"manifest.json", "mlflow.json"}  # names that other programs use, too


def run_name(name: str | None, runfile: Path) -> str:
    """Return the name of a run: `name`, else the run file's.

    Raises InputError for one that cannot name a folder, and without `name` for the file of a run that exists.
    """
    if name is not None:
        return checked_name(name)
    run = runfile.absolute().parent
    if runfile.name == "run.yaml" and all(
        (run / file).exists() for file in ("settings.json", "manifest.json")
    ):
        raise InputError(
            f"{runfile} is the file of run {run.name}; to continue it, give `--name {run.name} --store "
            f"{shlex.quote(str(run.parent))}` too, and to begin a new run another --name"
        )
    try:
        return checked_name(runfile.stem)
    except InputError as error:
        raise InputError(f"{error}; this one is the run file's, so choose one with --name") from error


def usable_name(text: str) -> str:
    """Return `text` as the name of a run: dashes for what a name cannot hold, and `images` where nothing is left."""
    with contextlib.suppress(InputError):
        return checked_name(text)
    name = re.sub("[^A-Za-z0-9._-]+", "-", text).strip("._-")[:90] or "images"
    return f"{name}-images" if name.lower() in RESERVED else name


def open_run(name: str, store: str) -> Run:
    """Return the run called `name` in the store at the address `store`. Raises InputError where there is none."""
    from defuse_core.runs import Run
    from services.storage import open_store

    return Run.open(open_store(store), checked_name(name))


def is_left_behind(run: Store) -> bool:
    """Whether all that is there was stored by commands that still ran when the run was deleted from a bucket.

    In a folder that is deleted they store nothing.
    """
    keys = set(run.list()) - AMBIGUOUS_KEYS
    return not isinstance(run, FolderStore) and bool(keys) and all(map(LEFT_BEHIND.fullmatch, keys))


def expect_not_promoted(store: Store, run: str, remedy: str) -> None:
    """Raise InputError where a version in the registry comes from this run, or may: not from another of its name."""
    from defuse_core.export.finished import expect_no_version_of
    from services.serving.registry import Registry

    versions = Registry(store).state().versions.items()
    of_runs = {str(number): (info.run, info.components_digest) for number, info in versions}
    expect_no_version_of(store, run, of_runs, remedy)


def expect_repeatable(run: Run) -> None:
    """Raise InputError where `defuse run` may not or cannot make again what follows from the verdicts.

    A version comes from this run, or its images, weights or code, as far as they are here, are others now.
    """
    from defuse_core.artifacts import Gallery, Models
    from defuse_core.evaluation import expect_same_code
    from defuse_core.models.adapters import CODE_ELSEWHERE
    from defuse_core.pipeline import expect_may_go_on
    from defuse_core.protocols import silent

    expect_not_promoted(run.runs, run.name, COPY_IT)
    # a review of traffic has no models, and nothing follows from it
    if (models := run.load(Models)) is None:
        return
    log.info("checking that the correction can be made again")
    if changed := run.changed_weights():
        raise RunMismatchError(f"run {run.name}: {changed}; undo the change, or begin another run")
    expect_may_go_on(run)
    if run.spec.classifier.architecture in CODE_ELSEWHERE:
        try:
            expect_same_code(run.spec, models, run.require(Gallery), progress=silent)
        except ModelError as error:
            if not isinstance(error.__cause__, ImportError):  # else its code is not here
                raise
