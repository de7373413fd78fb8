"""What a finished run holds of its scenarios and classifiers, why it may have no scenarios, and versions of it."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from defuse_core.artifacts import (
    Corrections,
    Gallery,
    Models,
    Psi,
    ReferenceSet,
    Scenarios,
    Sweep,
    Verdicts,
)
from defuse_core.codec import array_digest, decode
from defuse_core.config import RunFile
from defuse_core.errors import DamagedError, InputError
from defuse_core.evaluation import expect_same_answers
from defuse_core.evaluation.health import with_measured_health
from defuse_core.models import load_classifier
from defuse_core.review.undecided import why_undecided
from defuse_core.runs import Run
from defuse_core.store import Store


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """What a finished run holds of its scenarios and classifiers."""

    spec: RunFile
    models: Models
    gallery: Gallery
    verdicts: Verdicts
    fixes: Corrections
    sweep: Sweep

    def classifiers(self) -> tuple[nn.Module, nn.Module]:
        """Return the classifier before and after the correction; the same where nothing was corrected.

        Raises RunMismatchError where its code has changed since the run began.
        """
        weights = self.models.classifier, self.sweep.weights or self.models.classifier
        before, after = (load_classifier(self.spec, each, len(self.models.classes)) for each in weights)
        expect_same_answers(self.spec, before, self.gallery)
        return before, after


def load_finished(run: Run) -> FinishedRun:
    """Return what is stored of a finished run. Raises InputError for one that is not finished."""
    return FinishedRun(
        run.spec,
        run.require(Models),
        run.require(Gallery),
        run.require(Verdicts),
        run.require(Corrections),
        run.require(Sweep),
    )


def undecided_of(run: Run) -> str | None:
    """Return why a finished run could not tell whether its classifier has failure scenarios; None where it could."""
    verdicts = run.require(Verdicts)
    if len(verdicts.accepted):
        return None
    return why_undecided(
        run.spec,
        run.require(Gallery),
        verdicts,
        models=with_measured_health(run, run.require(Models)),
        references=run.load(ReferenceSet, "references"),
        psi=run.load(Psi),
        scenarios=run.load(Scenarios),
    )


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
