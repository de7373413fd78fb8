"""Packages that single features need, and the releases of each that Defuse works with."""

import sys
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from defuse_core.errors import InputError
from defuse_core.formatting import one_line

# as in the extras of pyproject.toml
RELEASES = {
    "cleanlab": ">=2.8",
    "httpx": ">=0.27",
    "label-studio-sdk": ">=2.1,<2.2",
    "mlflow-skinny": ">=3.2",
    "mlxtend": ">=0.23",
    "onnx": ">=1.17",
    "onnxruntime": ">=1.20",
    "onnxscript": ">=0.6",
    "timm": ">=1.0.26",
    "transformers": ">=5",
}
# what pip can install them with: label-studio-sdk 2.1 needs numpy below 2.3, which is not built for a later Python
NEWEST_PYTHON = {"label-studio-sdk": (3, 13)}
# those of another name than their package
MODULES = {"label-studio-sdk": "label_studio_sdk", "mlflow-skinny": "mlflow"}


def expect_packages(who: str, *names: str, error: type[InputError] = InputError) -> None:
    """Raise `error` where `who` needs a package that is not installed, or another release than RELEASES says.

    Nothing is imported.
    """
    found = {name: _release(name) for name in names}
    wanting = [name for name, release in found.items() if release is None or _is_unfit(name, release)]
    for name in wanting:
        if sys.version_info[:2] > NEWEST_PYTHON.get(name, sys.version_info):
            newest = ".".join(map(str, NEWEST_PYTHON[name]))
            raise error(
                f"{who} needs {name}, which has no release for this Python; install Defuse with Python {newest}"
            )
    if wanting:
        needed = " and ".join(f"{name}{RELEASES[name]} (found {found[name] or 'none'})" for name in wanting)
        remedy = " ".join(f"'{name}{RELEASES[name]}'" for name in wanting)
        raise error(f"{who} needs {needed}; pip install {remedy}")


def import_package(who: str, name: str, *others: str, error: type[InputError] = InputError) -> Any:
    """Return the module of the package `name`, which `who` needs with `others`. Raises `error` if one is unusable."""
    expect_packages(who, name, *others, error=error)
    try:
        for package in (*others, name):  # its own last
            module = import_module(MODULES.get(package, package))
    except ImportError as cause:
        raise error(f"{who} needs {package}, which cannot be imported here ({one_line(cause)})") from cause
    return module


def _release(name: str) -> str | None:
    """Return the installed release; empty where it has another name, as onnxruntime-gpu, None without the package."""
    if find_spec(MODULES.get(name, name)) is None:
        return None
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _is_unfit(name: str, release: str) -> bool:
    """Whether a release is out of bounds. A release candidate or development version counts as what it becomes."""
    try:
        return Version(release).base_version not in SpecifierSet(RELEASES[name])
    except InvalidVersion:
        return False
