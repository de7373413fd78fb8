"""The classifiers of a finished run, and which versions in the registry were made from it."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping

from torch import nn

from defuse_core.artifacts import Gallery
from defuse_core.codec import array_digest, decode
from defuse_core.config import RunFile
from defuse_core.errors import DamagedError, InputError
from defuse_core.evaluation import Findings, expect_same_answers
from defuse_core.models import load_classifier
from defuse_core.store import Store


def both_classifiers(spec: RunFile, found: Findings) -> tuple[nn.Module, nn.Module]:
    """Return the classifier before and after the correction; the same where nothing was corrected.

    Raises RunMismatchError where its code has changed since the run began.
    """
    weights = found.models.classifier, found.sweep.weights or found.models.classifier
    before, after = (load_classifier(spec, each, len(found.models.classes)) for each in weights)
    expect_same_answers(spec, before, found.gallery)
    return before, after


def expect_no_version_of(runs: Store, run: str, versions: Mapping[str, tuple[str, str]], remedy: str) -> None:
    """Raise InputError where a version comes from this run, or may: not from another of its name, nor from its copy.

    `versions` are the name and components_digest of each version's run, by the version's number.
    """
    components = stored_components(runs, run) if versions else None
    if made := [
        number
        for number, (name, digest) in versions.items()
        # Where the run of the version's name is another one, this one was renamed; else it is a copy. Names that differ
        # in case alone can be of one folder.
        if (
            components == digest
            and (name.casefold() == run.casefold() or stored_components(runs, name) != digest)
        )
        or (components is None and name == run)
    ]:
        raise InputError(
            f"run {run}: version {made[-1]} in the registry was made from it, and it is that version's record; {remedy}"
        )


def components_digest(gallery: Gallery) -> str:
    """Return a SHA-256, in hex, of the images drawn from a run's components: it tells runs of one name apart."""
    return array_digest({"codes": gallery.codes, "images": gallery.images})


def stored_components(runs: Store, name: str) -> str | None:
    """Return the components_digest of a run; None where it has no components, or they cannot be read."""
    folder = runs.within(name)
    with contextlib.suppress(FileNotFoundError, DamagedError):
        return components_digest(decode(Gallery, folder.read("gallery.safetensors"), folder.address))
    return None


def registered_versions(runs: Store) -> dict[str, tuple[str, str]]:
    """Return the versions after the last change in the registry of services/serving. Raises DamagedError."""
    changes = runs.within("registry/changes")
    keys = [key for key in changes.list() if re.fullmatch(r"\d{6,}\.json", key)]
    last = max(keys, key=lambda key: (len(key), key), default=None)
    if last is None:
        return {}
    try:
        versions = json.loads(changes.read(last))["versions"].items()
        return {number: (str(info["run"]), info["components_digest"]) for number, info in versions}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedError(
            f"{changes.address}/{last}: expected a registry state, found none; restore the file"
        ) from error
