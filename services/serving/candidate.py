"""A candidate: a corrected classifier, the results of its checks, and all that a server needs of it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from defuse_core.artifacts import F64, I64, Bool, Weights
from defuse_core.codec import artefact_digest, decode, encode
from defuse_core.config import RunFile, ServeSection, first_problem, parse_run_file
from defuse_core.correct import NO_LAMBDA_REMEDY
from defuse_core.data import reopen_splits
from defuse_core.device import cpu_threads
from defuse_core.errors import CheckFailed, InputError, StoreError
from defuse_core.evaluation import Findings, expect_same_code
from defuse_core.evaluation.evidence import Evidence
from defuse_core.evaluation.undecided import why_undecided
from defuse_core.export import why_not_corrected
from defuse_core.export.finished import components_digest
from defuse_core.formatting import first_few, percent
from defuse_core.intervals import ROUNDING
from defuse_core.local import local_device
from defuse_core.models import load_vae
from defuse_core.models.adapters import CODE_ELSEWHERE
from defuse_core.protocols import Progress, silent
from defuse_core.report.build_evidence import watch_figures
from defuse_core.report.evidence_schema import WatchFigures
from defuse_core.review.verdicts import most_common_errors, scenario_name
from defuse_core.runs import CONTINUES, Run, utc_now
from defuse_core.store import GONE
from defuse_core.watch import FailureWatch, watch_classifier
from defuse_core.watch.scenario_regions import fit_regions, training_codes
from services.serving.checks import CandidateReport, Check, evaluate_candidate
from services.serving.inputs import InputSpec

log = logging.getLogger("defuse")
FORMAT = 14  # format of the stored candidate, and part of its key: one of another format is made again
MAKE_AGAIN = "delete it, and give the command again, which makes it again"
# The rest of section serve is the server's.
VERSION_FIELDS = ("resize", "watch", "watch_share", "failure_threshold", "failure_recall", "precision")
# Fields that say with which code the weights make networks, what these receive and what they return.
NETWORK_FIELDS = {
    "classifier": {"architecture", "import_path", "timm_model", "input_range", "outputs", "class_order"},
    "vae": {"architecture", "import_path"},
}
# Fields that only describe a candidate; `after` and `judged` decide which scenarios are fixed.
NOT_SERVED = ("run", "spec", "summary", "checks", "digest", "before", "components_digest")


class NothingCorrected(InputError):  # noqa: N818 - an outcome, and a good one for `defuse check`
    """A finished run without a failure scenario: it has no corrected classifier."""


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
    # fingerprint of the clean images, of their pixels and labels wherever they are stored; empty where the classifier
    # was probably trained on them
    clean_images: str


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
    digest: str  # of all that is served; candidates with equal digests are one version
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
    failures: FailureWatch  # finds failing inputs
    components_digest: str  # of the run that `scenario` counts in, also with another λ
    judged: Bool  # (A,) whether `before` and `after` are by the judges' labels; else they are by the scenario's label

    def run_file(self) -> RunFile:
        return parse_run_file(self.spec, f"{self.run}/run.yaml")

    @property
    def interface(self) -> tuple[int, int, tuple[str, ...]]:
        """What its clients rely on: channels and edge of the images, and the names of the classes."""
        data = self.run_file().data
        return data.channels, data.image_size, tuple(self.classes)

    def interface_error(self, current: Candidate) -> str | None:
        """Return, as a line, why clients of `current`, which is in production, could not use it; None if they can."""
        if self.interface != current.interface:
            pairs = itertools.zip_longest(current.classes, self.classes)
            differ = next((number for number, (one, other) in enumerate(pairs) if one != other), 0)
            begin = max(0, differ - 1)
            expected, found = (
                f"{channels}x{size}x{size} pixels and {len(classes)} classes ({'..., ' if begin else ''}"
                f"{first_few(classes[begin:], most=20)})"
                for channels, size, classes in (current.interface, self.interface)
            )
            return f"interface: expected {expected} as in production, found {found}"
        theirs, ours = (InputSpec.of(spec, spec.serve) for spec in (current.run_file(), self.run_file()))
        if ours.resize or not (theirs.resize or theirs.sizes - ours.sizes):
            return None
        others = ", and converts others" if theirs.resize else ""
        return (
            f"interface: production accepts images of {theirs}{others}; this version accepts {ours} only, without "
            "`serve.resize: true` in its run file"
        )

    def why_not_compared(self, current: Candidate) -> str | None:
        """Return why its clean accuracy cannot be compared with that of `current`, which is in production.

        None if both were measured on the same images, on which neither classifier was trained.
        """
        ours, theirs = self.summary.clean_images, current.summary.clean_images
        if not ours or not theirs:
            return "it was measured on images on which a classifier was probably trained"
        return None if ours == theirs else "it was measured on other images"

    def accuracy_error(self, current: Candidate, number: int) -> str | None:
        """Return that it is less accurate than `current`, version `number` in production, by more than check.max_loss.

        None otherwise. Expects two that can be compared: `why_not_compared` says which.
        """
        ours, theirs, most = self.summary, current.summary, self.run_file().check.max_loss
        loss = theirs.clean_after - ours.clean_after
        if loss <= most + ROUNDING:
            return None
        change = f"{percent(theirs.clean_after, 2)} (version {number}) to {percent(ours.clean_after, 2)}"
        return (
            f"accuracy in production: {change} on the same {ours.clean_split} images, expected a loss of at most "
            f"{100 * most:.2f} points"
        )

    def failed_checks(self) -> list[str]:
        return [check.line for check in self.checks if not check.passed]

    def scenario_names(self) -> list[str]:
        """Return the name of each failure scenario: `8 read as 3 (scenario 12)`."""
        rows = zip(self.labels, self.most_common_error, self.scenario, strict=True)
        return [scenario_name(self.classes[label], self.classes[error], n) for label, error, n in rows]

    def watch_figures(self, section: ServeSection) -> WatchFigures:
        """Return how well failing inputs are found with these fields."""
        return watch_figures(self.failures, section)


def with_settings(section: ServeSection, settings: Mapping[str, Any]) -> ServeSection:
    """Return the section with `settings`. Raises InputError naming the first invalid field."""
    try:
        return ServeSection.model_validate(section.model_dump() | dict(settings))
    except ValidationError as error:
        raise InputError(f"serve.{first_problem(error, ServeSection)}") from error


def prepare_candidate(
    run: Run, progress: Progress = silent, *, must_store: bool = True
) -> tuple[str, Candidate]:
    """Return the key of the run's candidate in its store, and the candidate, made and checked at the first call.

    Raises InputError where the run has no corrected classifier yet or its code has changed, and StoreError where the
    candidate cannot be stored; without `must_store`, a warning says that it will be made again.
    """
    found, evidence = _load_corrected(run)
    if run.spec.classifier.architecture in CODE_ELSEWHERE:  # a stored candidate is of the code as it was
        with local_device(run.spec.resources.gpus_per_worker):
            expect_same_code(run.spec, found.models, found.gallery, progress=progress)
    key = _key(run.spec, found, evidence)
    try:
        candidate = decode(Candidate, run.store.read(key), f"{run.store.address}/{key}", MAKE_AGAIN)
    except FileNotFoundError:
        with local_device(run.spec.resources.gpus_per_worker):
            candidate = _make(run, found, evidence, progress)
    else:
        if candidate.run == run.name:
            return key, candidate
        candidate = dataclasses.replace(candidate, run=run.name)  # renamed since
    try:
        if not run.exists():  # a write would begin a deleted one again in a bucket
            raise StoreError(f"{run.store.address}: {GONE}")
        run.store.write(key, encode(candidate))
    except StoreError as error:
        if must_store:
            raise
        log.warning("the checks will be made again next time, since the store cannot be written: %s", error)
    return key, candidate


@contextlib.contextmanager
def locked_for_promotion(run: Run, key: str) -> Iterator[None]:
    """Hold the run's lock, as `defuse delete` and `defuse review` do, to promote its candidate of this key.

    Raises InputError where the run was deleted meanwhile or has another candidate now.
    Without the lock, and with a warning, where the store of the run cannot be written.
    """
    with contextlib.ExitStack() as stack:
        _require_existing(run)  # before the lock, which would make the folder again
        try:
            stack.enter_context(run.store.lock())
        except StoreError as error:
            log.warning(
                "run %s is promoted without a lock; do not delete or change it meanwhile: %s", run.name, error
            )
        _require_existing(run)
        now = None  # without a corrected classifier
        with contextlib.suppress(InputError, CheckFailed):
            reopened = Run.open(run.runs, run.name)
            now = _key(reopened.spec, *_load_corrected(reopened))
        if now != key:
            raise InputError(
                f"run {run.name} was changed meanwhile; it is not promoted; {CONTINUES}; then promote it again"
            )
        yield


def _require_existing(run: Run) -> None:
    if not run.exists():
        raise InputError(f"run {run.name} was deleted meanwhile; it is not promoted")


def require_corrected(run: Run) -> None:
    """Raise InputError or CheckFailed, as `prepare_candidate`, where `run` has no corrected classifier."""
    _load_corrected(run)


def _load_corrected(run: Run) -> tuple[Findings, Evidence | None]:
    """Return what the run found, and its evidence, None without judges."""
    found = Findings.load(run)
    if not found.sweep.has_correction:
        raise _nothing_to_serve(run, found)
    # a check by the judges' labels that is not made would count as one that passes
    return found, run.require(Evidence) if run.spec.judges.count else run.load(Evidence)


def _nothing_to_serve(run: Run, found: Findings) -> CheckFailed | NothingCorrected:
    """Return why a finished run has no corrected classifier."""
    accepted = len(found.verdicts.accepted)
    if accepted:
        return CheckFailed(
            f"run {run.name}: nothing was corrected, since {why_not_corrected(run)}; {NO_LAMBDA_REMEDY}"
        )
    undecided = why_undecided(run.spec, found)
    if undecided is not None:
        return CheckFailed(
            f"run {run.name}: could not tell whether the classifier has failure scenarios: {undecided}; run it under "
            "another --name"
        )
    return NothingCorrected(
        f"run {run.name} corrected nothing (no failure scenario was accepted), so it has no model to serve"
    )


def _key(spec: RunFile, found: Findings, evidence: Evidence | None) -> str:
    """Return where the run's store has the candidate of these artefacts and run-file fields, of this FORMAT.

    Equal weights do not make equal candidates: with λ = 0 they are the same whatever was accepted.
    """
    parts = (found.sweep.weights, found.fixes, found.verdicts, evidence)
    made_from = f"{[artefact_digest(part) for part in parts]}{_version_fields(spec)}{FORMAT}"
    return f"candidates/{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.safetensors"


def _version_fields(spec: RunFile) -> str:
    """Return the run-file fields that belong to a version."""
    fields = spec.serve.model_dump(mode="json", include=set(VERSION_FIELDS))
    networks = spec.model_dump_json(include=NETWORK_FIELDS)
    return f"{spec.check.model_dump_json()}{json.dumps(fields, sort_keys=True)}{networks}"


def _digest(candidate: Candidate) -> str:
    """Return a SHA-256, in hex, of FORMAT and all that a server takes from the candidate."""
    served = {name: value for name, value in vars(candidate).items() if name not in NOT_SERVED}
    fields = _version_fields(candidate.run_file())
    return hashlib.sha256(encode({**served, "settings": fields, "format": FORMAT})).hexdigest()


def _make(run: Run, found: Findings, evidence: Evidence | None, progress: Progress) -> Candidate:
    spec, corrections = run.spec, found.fixes
    splits = reopen_splits(spec, found.models.data_fingerprint)
    progress("checking the corrected classifier", 0, 2, "steps")
    report = evaluate_candidate(spec, found.models, corrections, found.sweep, splits, evidence)
    progress("checking the corrected classifier", 1, 2, "steps")
    failures = watch_classifier(spec, found.models, found.sweep.weights, splits)
    with cpu_threads(spec.resources.train_threads):
        vae = load_vae(spec, found.models.vae)
        regions = fit_regions(vae, corrections, training_codes(spec, vae, splits.train)[0])
    progress("checking the corrected classifier", 2, 2, "steps")
    before, after, judged = report.scenario_accuracies()
    candidate = Candidate(
        run=run.name,
        spec=spec.model_dump(mode="json"),
        classes=found.models.classes,
        classifier=found.sweep.weights,
        vae=found.models.vae,
        summary=_summary(found, report),
        checks=tuple(report.checks(spec.check)),
        digest="",
        scenario=corrections.scenario,
        labels=corrections.labels,
        most_common_error=most_common_errors(found.gallery, found.verdicts, corrections.scenario),
        before=before,
        after=after,
        judged=judged,
        failures=failures,
        components_digest=components_digest(found.gallery),
        **vars(regions),
    )
    return dataclasses.replace(candidate, digest=_digest(candidate))


def _summary(found: Findings, report: CandidateReport) -> CorrectionSummary:
    chosen = found.sweep.chosen
    return CorrectionSummary(
        lam=None if chosen is None else chosen.lam,
        epoch=None if chosen is None else chosen.epoch,
        clean_split=report.split,
        clean_before=float(report.right_before.mean()),
        clean_after=float(report.right_after.mean()),
        scenario_before=float(report.scenario_before.mean()),
        scenario_after=float(report.scenario_after.mean()),
        annotators=found.votes.answered_by,
        made=utc_now(),
        clean_images=report.fingerprint,
    )
