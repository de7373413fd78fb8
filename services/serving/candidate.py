"""A corrected classifier made ready to be checked, promoted and served: everything a server needs, in one artefact."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import ValidationError

from defuse_core.artifacts import (
    F64,
    I64,
    Corrections,
    Gallery,
    Models,
    Sweep,
    Verdicts,
    Votes,
    Weights,
)
from defuse_core.codec import decode, encode
from defuse_core.config import RunFile, ServeSection, first_problem, parse_run_file
from defuse_core.data import reopen_splits
from defuse_core.errors import InputError
from defuse_core.judge import most_common_error
from defuse_core.models import load_vae
from defuse_core.progress import Progress, silent
from defuse_core.runs import Run
from services.serving.checks import Examined, examine
from services.serving.watch import calibrate

OF_THE_VERSION = ("resize", "watch", "watch_share", "precision")  # of section serve; the rest is the server's


class NothingCorrected(InputError):  # noqa: N818 - a finding, for `defuse check` a good one
    """A finished run without a failure scenario: there is no other classifier than the one before."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """The corrected classifier of one run, the β-VAE that watches its inputs, and what is known of both."""

    run: str
    spec: dict[str, Any]  # the run file
    classes: tuple[str, ...]  # (C,)
    classifier: Weights
    vae: Weights
    facts: dict[str, Any]  # lam, epoch, accuracies before and after, when it was made
    checks: tuple[dict[str, Any], ...]  # rows of checks.Check
    digest: str  # of the weights and of what travels with them; equal candidates are one version
    scenario: I64  # (A,) index of each failure scenario among the run's components
    labels: I64  # (A,) what is right there
    read_as: I64  # (A,) what the classifier before said there most often
    means: F64  # (A, Z) of the codes of its pictures, as in watch.Calibration
    covariances: F64  # (A, Z, Z)
    before: F64  # (A,) accuracy on the held-out images before the correction
    after: F64  # (A,) and after it
    levels: F64  # (L,) shares of the training images, 0 to 1
    distances: F64  # (A, L) Mahalanobis distance that so many training images stay below
    recall: F64  # (A, L) share of the held-out scenario images that stay below the same distance

    def run_file(self) -> RunFile:
        return parse_run_file(self.spec, f"{self.run}/run.yaml")

    def serve_section(self, changes: Mapping[str, Any]) -> ServeSection:
        """Return section `serve` of the run file with `changes`. Raises InputError naming the first that is wrong."""
        return with_settings(self.run_file().serve, changes)

    def failed(self) -> list[str]:
        """Return the checks that did not pass, one line each."""
        return [row["line"] for row in self.checks if not row["passed"]]

    def names(self) -> list[str]:
        """Return what each failure scenario is called: `8 read as 3 (scenario 12)`."""
        rows = zip(self.labels, self.read_as, self.scenario, strict=True)
        return [
            f"{self.classes[label]} read as {self.classes[read]} (scenario {s})" for label, read, s in rows
        ]


def with_settings(recorded: ServeSection, changes: Mapping[str, Any]) -> ServeSection:
    """Return the section with `changes`. Raises InputError naming the first field that is wrong."""
    try:
        return ServeSection.model_validate(recorded.model_dump() | dict(changes))
    except ValidationError as error:
        raise InputError(f"serve.{first_problem(error, ServeSection)}") from error


def prepare(run: Run, progress: Progress = silent) -> tuple[str, Candidate]:
    """Return the run's candidate and the key it lies under in the run, made and checked if that was not done yet.

    Raises InputError where the run has not got as far as a corrected classifier.
    """
    found = _Found.of(run)
    key = f"candidates/{_digest(run.spec, found.sweep.weights)[:16]}.safetensors"
    try:
        return key, decode(Candidate, run.store.read(key), key)
    except FileNotFoundError:
        candidate = _make(run, found, progress)
        run.store.write(key, encode(candidate))
        return key, candidate


@dataclass(frozen=True, eq=False)
class _Found:
    models: Models
    gallery: Gallery
    votes: Votes
    verdicts: Verdicts
    fixes: Corrections
    sweep: Sweep

    @classmethod
    def of(cls, run: Run) -> _Found:
        kinds = (Models, Gallery, Votes, Verdicts, Corrections, Sweep)
        parts: list[Any] = []
        for kind in kinds:
            parts.append(run.load(kind))
            if parts[-1] is None:
                raise InputError(
                    f"run {run.name} has no corrected classifier yet ({kind.__name__.lower()} is missing); "
                    f"finish it with `defuse run`"
                )
        found = cls(*parts)
        if not found.sweep.weights:
            raise NothingCorrected(
                f"run {run.name} corrected nothing (no failure scenario was accepted), so there is nothing to serve"
            )
        return found


def weights_digest(weights: Weights) -> str:
    """Return a SHA-256, in hex, over names, types, shapes and bytes."""
    sha = hashlib.sha256()
    for name in sorted(weights):
        array = np.ascontiguousarray(weights[name])
        sha.update(f"{name}{array.dtype}{array.shape}".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def _digest(spec: RunFile, weights: Weights) -> str:
    """Name a candidate by its weights and by the fields of its run file that travel with it."""
    travels = spec.serve.model_dump(mode="json", include={*OF_THE_VERSION, "watch_images"})
    settings = f"{spec.check.model_dump_json()}{json.dumps(travels, sort_keys=True)}"
    return hashlib.sha256((weights_digest(weights) + settings).encode()).hexdigest()


def _make(run: Run, found: _Found, progress: Progress) -> Candidate:
    spec, accepted = run.spec, found.fixes.scenario
    splits = reopen_splits(spec.data, spec.seed, found.models.data_fingerprint)
    progress("checking the corrected classifier", 0, 2, "steps")
    examined = examine(spec, found.models, found.fixes, found.sweep, splits)
    progress("checking the corrected classifier", 1, 2, "steps")
    calibration = calibrate(spec, load_vae(spec, found.models.vae), splits.train, found.fixes)
    progress("checking the corrected classifier", 2, 2, "steps")
    return Candidate(
        run=run.name,
        spec=spec.model_dump(mode="json"),
        classes=found.models.classes,
        classifier=found.sweep.weights,
        vae=found.models.vae,
        facts=_facts(found, examined),
        checks=tuple(check.row() for check in examined.checks(spec.check)),
        digest=_digest(spec, found.sweep.weights),
        scenario=accepted,
        labels=found.fixes.labels,
        read_as=_read_as(found.gallery, accepted, found.fixes.labels),
        before=examined.scenario_before,
        after=examined.scenario_after,
        **vars(calibration),
    )


def _facts(found: _Found, examined: Examined) -> dict[str, Any]:
    chosen = found.sweep.chosen
    return {
        "lam": None if chosen is None else chosen.lam,
        "epoch": None if chosen is None else chosen.epoch,
        "clean_split": examined.split,
        "clean_before": float(examined.right_before.mean()),
        "clean_after": float(examined.right_after.mean()),
        "scenario_before": float(examined.scenario_before.mean()),
        "scenario_after": float(examined.scenario_after.mean()),
        "annotators": found.votes.answered_by,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _read_as(gallery: Gallery, accepted: I64, labels: I64) -> I64:
    """Return the wrong answer that the classifier gave most often in each accepted scenario; the label if none."""
    answers = labels.copy()
    for row, (component, label) in enumerate(zip(accepted, labels, strict=True)):
        wrong = most_common_error(gallery.predicted[component], label)
        answers[row] = label if wrong is None else wrong
    return answers
