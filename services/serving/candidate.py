"""A candidate: a corrected classifier, the checks that decide on its promotion, and all that a server needs of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError
from torch import nn

from defuse_core.artifacts import (
    F64,
    I64,
    Bool,
    Corrections,
    Gallery,
    Models,
    Psi,
    Sweep,
    Verdicts,
    Votes,
    Weights,
)
from defuse_core.codec import decode, encode
from defuse_core.config import CheckSection, RunFile, ServeSection, first_problem, parse_run_file
from defuse_core.correct import ROUNDING, held_out_images
from defuse_core.data import Images, Splits, reopen_splits
from defuse_core.device import cpu_threads
from defuse_core.errors import CheckFailed, InputError, ModelError, StoreError
from defuse_core.evaluation.health import with_measured_health
from defuse_core.models import load_classifier, load_vae, predict
from defuse_core.progress import Progress, silent
from defuse_core.review.verdicts import most_common_errors, why_inconclusive
from defuse_core.runs import Run
from defuse_core.watch.failure_detector import FailureWatch, watch_classifier
from defuse_core.watch.figures import WatchFigures, watch_figures

log = logging.getLogger("defuse")
FORMAT = 3  # of the stored candidate; part of its key in the run, so that one of another format is made again
VERSION_SETTINGS = (
    "resize",
    "watch",
    "watch_share",
    "failure_threshold",
    "failure_recall",
    "precision",
)  # the rest of section serve is the server's


class NothingCorrected(InputError):  # noqa: N818 - an outcome, and a good one for `defuse check`
    """A finished run without a failure scenario: it has no corrected classifier."""


@dataclass(frozen=True)
class Check:
    """One check of section `check` and its result."""

    name: str
    passed: bool
    line: str  # what was checked, the value found and the limit


@dataclass(frozen=True)
class CorrectionSummary:
    """The chosen correction, and mean accuracies before and after it."""

    lam: float | None
    epoch: int | None
    clean_split: str  # the clean images: test, validation or train
    clean_before: float
    clean_after: float
    scenario_before: float
    scenario_after: float
    annotators: str  # people, or reference models
    made: str  # time of the checks, 2026-01-31T12:00:00Z


@dataclass(frozen=True, eq=False)
class Candidate:
    """The corrected classifier of one run, the β-VAE that encodes its inputs for the watch, and their measurements."""

    run: str
    spec: dict[str, Any]  # the run file
    classes: tuple[str, ...]  # (C,)
    classifier: Weights
    vae: Weights
    summary: CorrectionSummary
    checks: tuple[Check, ...]
    digest: str  # of the weights and VERSION_SETTINGS; candidates with equal digests are one version
    scenario: I64  # (A,) index of each failure scenario among the run's components
    labels: I64  # (A,) correct class in the scenario
    most_common_error: I64  # (A,) most frequent wrong answer of the classifier before the correction
    means: F64  # (A, Z) of the codes of its images, as in ScenarioRegions
    covariances: F64  # (A, Z, Z)
    before: F64  # (A,) accuracy on the held-out images before the correction
    after: F64  # (A,) and after it
    levels: F64  # (L,) shares of the training images, 0 to 1
    distances: F64  # (A, L) quantiles of the training images' Mahalanobis distances at those levels
    recall: F64  # (A, L) share of the held-out scenario images within those distances
    failures: FailureWatch | None = None  # finds failing inputs; None in versions of an earlier Defuse

    def run_file(self) -> RunFile:
        return parse_run_file(self.spec, f"{self.run}/run.yaml")

    def serve_section(self, changes: Mapping[str, Any]) -> ServeSection:
        """Return section `serve` of the run file with `changes`. Raises InputError naming the first invalid field."""
        return with_settings(self.run_file().serve, changes)

    def failed_checks(self) -> list[str]:
        """Return one line for each check that failed."""
        return [check.line for check in self.checks if not check.passed]

    def scenario_names(self) -> list[str]:
        """Return the name of each failure scenario: `8 read as 3 (scenario 12)`."""
        rows = zip(self.labels, self.most_common_error, self.scenario, strict=True)
        return [f"{self._confusion(label, error)} (scenario {number})" for label, error, number in rows]

    def _confusion(self, label: int, error: int) -> str:
        """Return what is mistaken for what in a scenario; `error` is the label where no answer was wrong."""
        name = self.classes[label]
        return f"{name} misread" if error == label else f"{name} read as {self.classes[error]}"

    def watch_figures(self, settings: ServeSection) -> WatchFigures | None:
        """Return how well failing inputs are found with these settings; None in versions of an earlier Defuse."""
        return None if self.failures is None else watch_figures(self.failures, settings, settings.watch)


def encode_candidate(candidate: Candidate) -> bytes:
    """Return the candidate as bytes of an artefact."""
    plain = [dataclasses.asdict(check) for check in candidate.checks]
    return encode(dataclasses.replace(candidate, checks=plain))  # type: ignore[arg-type]


def decode_candidate(data: bytes, where: str) -> Candidate:
    """Return the candidate in `data`. Raises StoreError, naming `where`, for other, truncated or altered bytes."""
    stored = decode(Candidate, data, where)
    return dataclasses.replace(
        stored,
        summary=TypeAdapter(CorrectionSummary).validate_python(stored.summary),
        checks=TypeAdapter(tuple[Check, ...]).validate_python(stored.checks),
    )


def with_settings(section: ServeSection, changes: Mapping[str, Any]) -> ServeSection:
    """Return the section with `changes`. Raises InputError naming the first invalid field."""
    try:
        return ServeSection.model_validate(section.model_dump() | dict(changes))
    except ValidationError as error:
        raise InputError(f"serve.{first_problem(error, ServeSection)}") from error


def prepare_candidate(
    run: Run, progress: Progress = silent, *, must_store: bool = True
) -> tuple[str, Candidate]:
    """Return the key of the run's candidate in its store, and the candidate, made and checked at the first call.

    Raises InputError where the run has no corrected classifier yet, and StoreError where the candidate cannot be
    stored; without `must_store`, a warning says that it will be made again.
    """
    artifacts = _RunArtifacts.load(run)
    key = f"candidates/{_digest(run.spec, artifacts.sweep.weights, str(FORMAT))[:16]}.safetensors"
    try:
        return key, decode_candidate(run.store.read(key), key)
    except FileNotFoundError:
        candidate = _make(run, artifacts, progress)
        try:
            run.store.write(key, encode_candidate(candidate))
        except StoreError as error:
            if must_store:
                raise
            log.warning(
                "the checks will be made again next time, since the store cannot be written: %s", error
            )
        return key, candidate


@dataclass(frozen=True, eq=False)
class _RunArtifacts:
    models: Models
    gallery: Gallery
    votes: Votes
    verdicts: Verdicts
    corrections: Corrections
    sweep: Sweep

    @classmethod
    def load(cls, run: Run) -> _RunArtifacts:
        loaded: list[Any] = []
        for kind in (Models, Gallery, Votes, Verdicts, Corrections, Sweep):
            loaded.append(run.load(kind))
            if loaded[-1] is None:
                raise InputError(
                    f"run {run.name} has no corrected classifier yet ({kind.__name__.lower()} is missing); "
                    f"finish it with `defuse run`"
                )
        artifacts = cls(*loaded)
        if not artifacts.sweep.weights:
            raise _nothing_to_serve(run, artifacts)
        return artifacts


def _nothing_to_serve(run: Run, artifacts: _RunArtifacts) -> CheckFailed | NothingCorrected:
    """Return why a finished run has no corrected classifier."""
    accepted = len(artifacts.verdicts.accepted)
    if accepted:
        return CheckFailed(
            f"run {run.name}: nothing was corrected, since every λ costs more clean accuracy than correct.max_loss "
            "allows; try smaller values in correct.lambdas, or a larger correct.max_loss"
        )
    health = with_measured_health(run, artifacts.models).health
    psi = run.load(Psi)
    failing, kept = (psi.failing, psi.total) if psi is not None else (0, 0)
    cause = why_inconclusive(accepted, None if health is None else health.verdict, failing, kept)
    if cause == "β-VAE":
        assert health is not None
        pictures = "images moved by the noise" if health.anchored else "reconstructions"
        return CheckFailed(
            f"run {run.name}: could not tell whether the classifier has failure scenarios: none was accepted, and "
            f"its β-VAE is {health.verdict} ({health.kept_right:.0%} of the right answers are kept on "
            f"{pictures}); improve section vae of the run file and run it under another --name"
        )
    if cause == "screen":
        return CheckFailed(
            f"run {run.name}: could not tell whether the classifier has failure scenarios: the reference models "
            "see the class of the image in no failing draw; train better ones, or lower identify.min_probability, "
            "and run it under another --name"
        )
    return NothingCorrected(
        f"run {run.name} corrected nothing (no failure scenario was accepted), so it has no model to serve"
    )


def weights_digest(weights: Weights) -> str:
    """Return a SHA-256, in hex, over names, types, shapes and bytes."""
    sha = hashlib.sha256()
    for name in sorted(weights):
        array = np.ascontiguousarray(weights[name])
        sha.update(f"{name}{array.dtype}{array.shape}".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def _digest(spec: RunFile, weights: Weights, salt: str = "") -> str:
    """Return the digest of the weights and of the run-file fields that belong to a version."""
    fields = spec.serve.model_dump(mode="json", include={*VERSION_SETTINGS, "watch_images"})
    settings = f"{spec.check.model_dump_json()}{json.dumps(fields, sort_keys=True)}"
    return hashlib.sha256((weights_digest(weights) + settings + salt).encode()).hexdigest()


def _make(run: Run, artifacts: _RunArtifacts, progress: Progress) -> Candidate:
    spec, corrections = run.spec, artifacts.corrections
    splits = reopen_splits(spec.data, spec.seed, artifacts.models.data_fingerprint)
    progress("checking the corrected classifier", 0, 2, "steps")
    report = evaluate_candidate(spec, artifacts.models, corrections, artifacts.sweep, splits)
    progress("checking the corrected classifier", 1, 2, "steps")
    regions, failures = watch_classifier(spec, artifacts.models, corrections, artifacts.sweep.weights, splits)
    progress("checking the corrected classifier", 2, 2, "steps")
    return Candidate(
        run=run.name,
        spec=spec.model_dump(mode="json"),
        classes=artifacts.models.classes,
        classifier=artifacts.sweep.weights,
        vae=artifacts.models.vae,
        summary=_summary(artifacts, report),
        checks=tuple(report.checks(spec.check)),
        digest=_digest(spec, artifacts.sweep.weights),
        scenario=corrections.scenario,
        labels=corrections.labels,
        most_common_error=most_common_errors(artifacts.gallery, corrections.scenario, corrections.labels),
        before=report.scenario_before,
        after=report.scenario_after,
        failures=failures,
        **vars(regions),
    )


def _summary(artifacts: _RunArtifacts, report: CandidateReport) -> CorrectionSummary:
    chosen = artifacts.sweep.chosen
    return CorrectionSummary(
        lam=None if chosen is None else chosen.lam,
        epoch=None if chosen is None else chosen.epoch,
        clean_split=report.split,
        clean_before=float(report.right_before.mean()),
        clean_after=float(report.right_after.mean()),
        scenario_before=float(report.scenario_before.mean()),
        scenario_after=float(report.scenario_after.mean()),
        annotators=artifacts.votes.answered_by,
        made=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


@dataclass(frozen=True, eq=False)
class CandidateReport:
    """Which answers of both classifiers are right: on clean images, and on held-out images of each scenario."""

    split: str  # the clean images: test, validation or train
    classes: tuple[str, ...]
    labels: I64  # (N,)
    right_before: Bool  # (N,)
    right_after: Bool  # (N,)
    scenario_before: F64  # (A,)
    scenario_after: F64  # (A,)
    not_finite: tuple[str, ...]  # tensors of the corrected classifier with NaN or infinity

    def checks(self, limits: CheckSection) -> list[Check]:
        """Return every check of section `check`, in the order in which they are shown."""
        if self.not_finite:
            return [Check("finite", False, f"weights: {self.not_finite[0]} has NaN or infinity")]
        return [
            Check("finite", True, "weights: all finite"),
            self._mean_scenario_accuracy(limits.min_scenario_accuracy),
            self._worst_scenario_accuracy(limits.min_each_scenario),
            self._improvement(),
            self._clean_accuracy(limits.max_loss),
            self._class_accuracy(limits.max_class_loss),
            self._regressions(limits.max_regressions),
        ]

    def _mean_scenario_accuracy(self, least: float) -> Check:
        found = float(self.scenario_after.mean())
        line = f"scenario accuracy: {found:.2%}, expected at least {least:.2%}"
        return Check("scenario accuracy", found >= least, line)

    def _worst_scenario_accuracy(self, least: float) -> Check:
        found = float(self.scenario_after.min())
        line = f"worst scenario: {found:.2%}, expected at least {least:.2%} in each"
        return Check("worst scenario", found >= least, line)

    def _improvement(self) -> Check:
        before, after = float(self.scenario_before.mean()), float(self.scenario_after.mean())
        line = f"improvement: scenario accuracy {before:.2%} -> {after:.2%}"
        return Check("improvement", after > before, line)

    def _clean_accuracy(self, most: float) -> Check:
        before, after = float(self.right_before.mean()), float(self.right_after.mean())
        line = f"clean accuracy: {before:.2%} -> {after:.2%} on {self.split} images, a loss of {most:.2%} is allowed"
        return Check("clean accuracy", before - after <= most + ROUNDING, line)

    def _class_accuracy(self, most: float) -> Check:
        counts = np.bincount(self.labels, minlength=len(self.classes))
        lost = self.right_before.astype(np.int64) - self.right_after
        loss = np.bincount(self.labels, lost, minlength=len(self.classes)) / np.maximum(counts, 1)
        worst = int(loss.argmax())
        line = (
            f"every class: class {self.classes[worst]} lost {loss[worst]:.2%}, at most {most:.2%} is allowed"
        )
        return Check("every class", float(loss[worst]) <= most + ROUNDING, line)

    def _regressions(self, most: float) -> Check:
        found = float((self.right_before & ~self.right_after).mean())
        line = f"regressions: {found:.2%} of clean images were right and are wrong now, at most {most:.2%} is allowed"
        return Check("regressions", found <= most + ROUNDING, line)


def evaluate_candidate(
    spec: RunFile, models: Models, corrections: Corrections, sweep: Sweep, splits: Splits
) -> CandidateReport:
    """Return which answers are right before and after the correction."""
    candidates = (("test", splits.test), ("validation", splits.validation), ("train", splits.train))
    split, clean = next((name, images) for name, images in candidates if images is not None)
    not_finite = tuple(name for name, array in sweep.weights.items() if not np.isfinite(array).all())
    corrected = models.classifier if not_finite else sweep.weights
    with cpu_threads(spec.resources.train_threads):
        scenario = held_out_images(load_vae(spec, models.vae), corrections)
        before, after = (
            _right(spec, w, len(models.classes), (clean, scenario)) for w in (models.classifier, corrected)
        )
    return CandidateReport(
        split=split,
        classes=models.classes,
        labels=clean.labels,
        right_before=before[0],
        right_after=after[0],
        scenario_before=before[1].reshape(len(corrections.labels), -1).mean(axis=1),
        scenario_after=after[1].reshape(len(corrections.labels), -1).mean(axis=1),
        not_finite=not_finite,
    )


def _right(spec: RunFile, weights: Weights, classes: int, parts: tuple[Images, ...]) -> list[Bool]:
    classifier = load_classifier(spec, weights, classes)
    return [_right_on(classifier, images) for images in parts]


def _right_on(classifier: nn.Module, images: Images) -> Bool:
    """Return which images the classifier gets right, (n,); none where it returns nan, so that no check passes."""
    try:
        right: Bool = predict(classifier, images) == images.labels
        return right
    except ModelError:
        return np.zeros(len(images), np.bool_)
