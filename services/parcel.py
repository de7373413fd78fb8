"""What a job takes along to the cluster: the run file, files that it brings, and the packages themselves."""

from __future__ import annotations

import importlib.machinery
import shutil
import sys
from pathlib import Path

from cluster.session import expect_root_of_nodes
from defuse_core.config import RunFile, dump_run_file
from defuse_core.errors import ModelError, RunFileError

PACKAGES = ("defuse_core", "cluster", "services")
ROOT = Path(__file__).parents[1]
RUN_FILE = "run.yaml"
LEAVE = shutil.ignore_patterns("__pycache__", "*.pyc")


def pack(spec: RunFile, folder: Path) -> None:
    """Put into `folder` all that `defuse run run.yaml` needs there, apart from what the nodes have installed.

    Raises RunFileError for images that the nodes could not find, and for weights that are not here.
    """
    expect_root_of_nodes(spec.data.root)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=LEAVE)
    if spec.classifier.import_path:
        _pack_module(spec.classifier.import_path, folder)
    (folder / RUN_FILE).write_text(dump_run_file(_with_files(spec, folder)), encoding="utf-8")


def _with_files(spec: RunFile, folder: Path) -> RunFile:
    """Copy the weights that the run file brings, and return it with where they lie in the job's folder."""
    sections = {}
    for name in ("classifier", "vae"):
        section = getattr(spec, name)
        if section.weights is not None:
            packed = Path("weights") / f"{name}{section.weights.suffix}"
            _copy(section.weights, folder / packed, f"{name}.weights")
            sections[name] = section.model_copy(update={"weights": packed})
    return spec.model_copy(update=sections)


def _copy(source: Path, target: Path, field: str) -> None:
    target.parent.mkdir(exist_ok=True)
    try:
        if source.is_dir():  # of Hugging Face's
            shutil.copytree(source, target, ignore=LEAVE)
        else:
            shutil.copyfile(source, target)
    except OSError as error:
        raise RunFileError(f"{field} {source}: cannot be read ({error.strerror})") from error


def _pack_module(import_path: str, folder: Path) -> None:
    """Copy the top-level package or module of one's own classifier, unless it is installed as a package is."""
    name = import_path.partition(":")[0].partition(".")[0]
    if name in PACKAGES:
        raise ModelError(f"classifier.import_path {import_path}: {name} is a package of Defuse; rename yours")
    found = importlib.machinery.PathFinder.find_spec(name, [str(Path.cwd()), *sys.path])
    if found is None:
        raise ModelError(
            f"classifier.import_path {import_path}: there is no module {name} here or on PYTHONPATH"
        )
    if found.submodule_search_locations:
        source = Path(next(iter(found.submodule_search_locations)))
    else:
        source = Path(str(found.origin))
    if "site-packages" in source.parts:
        return
    if source.is_dir():
        shutil.copytree(source, folder / source.name, ignore=LEAVE)
    else:
        shutil.copyfile(source, folder / source.name)
