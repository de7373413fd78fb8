"""The working directory of a job: the run file, the weights and code that it names, and Defuse itself."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import shutil
import sys
from pathlib import Path

from cluster.connection import require_absolute_root
from cluster.jobs import WITHOUT_UPLOAD
from defuse_core.config import RunFile, dump_run_file, model_sections, with_weights
from defuse_core.errors import InputError, ModelError, RunFileError

PACKAGES = ("defuse_core", "cluster", "services")
ROOT = Path(__file__).parents[1]
RUN_FILE = "run.yaml"
# Ray would leave out what ignore files name
SKIPPED = shutil.ignore_patterns("__pycache__", "*.pyc", ".git", ".gitignore", ".rayignore")
MOST_MB = 99  # Ray's dashboard takes 100 MiB at most


def build_working_dir(spec: RunFile, folder: Path) -> None:
    """Fill `folder` with all that `defuse run run.yaml` needs, apart from the dependencies that nodes have installed.

    Raises RunFileError for a relative data.root and for weights or code that cannot be read, ModelError for missing
    code, InputError for more than Ray takes.
    """
    require_absolute_root(spec.data.root)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=SKIPPED)
    for name, section in model_sections(spec).items():
        if section.import_path:
            _copy_module(f"{name}.import_path", section.import_path, folder)
    (folder / RUN_FILE).write_text(dump_run_file(_with_weights(spec, folder)), encoding="utf-8")
    _expect_uploadable(folder)


def _expect_uploadable(folder: Path) -> None:
    files = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    largest = max(files, key=lambda path: files[path])
    if sum(files.values()) > MOST_MB * 2**20:
        raise InputError(
            f"the job is {sum(files.values()) / 2**20:.0f} MiB, of which {largest.relative_to(folder)} is "
            f"{files[largest] / 2**20:.0f}, and Ray takes {MOST_MB + 1}: {WITHOUT_UPLOAD}"
        )


def _with_weights(spec: RunFile, folder: Path) -> RunFile:
    """Copy the weights that the run file names, and return it with their paths in the working directory."""
    copies = {}
    for name, section in model_sections(spec).items():
        if section.weights is not None:
            copies[name] = Path("weights") / f"{name}{section.weights.suffix}"
            _copy(section.weights, folder / copies[name], f"{name}.weights")
    return with_weights(spec, copies)


def _copy(source: Path, target: Path, field: str, *, dangling_links: bool = True) -> None:
    """Copy a file or folder. Raises RunFileError for what cannot be read, such as a link to nothing, if these count."""
    target.parent.mkdir(exist_ok=True)
    try:
        if source.is_dir():
            shutil.copytree(source, target, ignore=SKIPPED, ignore_dangling_symlinks=not dangling_links)
        else:
            shutil.copyfile(source, target)
    except OSError as error:
        # copytree raises one error for all files: source, target and reason of each
        reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror
        raise RunFileError(f"{field} {source}: cannot be read ({reason})") from error


def _copy_module(field: str, import_path: str, folder: Path) -> None:
    """Copy the top-level package or module of a user's model, unless it is in site-packages or copied already."""
    name = import_path.partition(":")[0].partition(".")[0]
    if name in PACKAGES:
        raise ModelError(f"{field} {import_path}: {name} is a package of Defuse; rename yours")
    found = importlib.machinery.PathFinder.find_spec(name, [str(Path.cwd()), *sys.path])
    if found is None and name != "__main__":
        with contextlib.suppress(ValueError):  # a module that has no spec
            found = importlib.util.find_spec(name)  # by the finders that editable installs have
    if found is None or not (found.has_location or found.submodule_search_locations):
        raise ModelError(f"{field} {import_path}: no module {name} in this folder or on PYTHONPATH")
    if found.submodule_search_locations:
        source = Path(next(iter(found.submodule_search_locations)))
        target = folder / name
    else:
        source = Path(str(found.origin))
        target = folder / source.name
    if "site-packages" in source.parts or target.exists():
        return
    _copy(source, target, field, dangling_links=False)  # Emacs locks a file by a link to nothing
