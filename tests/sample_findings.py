"""Constructed findings, for a report without any training."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from defuse_core.artifacts import (
    F32,
    I64,
    NONE_OF_THE_ABOVE,
    ClassifierEpoch,
    Corrections,
    Evaluation,
    Gallery,
    Models,
    Psi,
    Scenarios,
    Sweep,
    SweepRow,
    VaeEpoch,
    Votes,
)
from defuse_core.config import RunFile, parse_run_file
from defuse_core.evaluation import ACCEPTED, FAILURE, REJECTED, TRAINING, Findings
from defuse_core.evaluation.evidence import Evidence
from defuse_core.report import Report
from defuse_core.report.build import FinishedRun, build_report
from defuse_core.review.verdicts import decide_verdicts
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from defuse_core.watch import METHODS, FailureDetector, FailureWatch, MeasuredDetector
from tests.conftest import PAPER_LAMBDAS
from tests.sample_components import FIT, review_section, sample_scenarios

DIGITS = tuple("0123456789")
ANNOTATORS = 5
Sample = tuple[Findings, Evaluation]


def sample_spec(**data: object) -> RunFile:
    """A run file of the digits data."""
    section = {"name": "digits", "channels": 1, "validation_share": 0.2, **data}
    return parse_run_file({"data": section}, "sample")


SAMPLE_CORRECT = sample_spec().correct


def sample_findings(
    scenarios: int = 4,
    accepted: int = 2,
    *,
    classes: tuple[str, ...] = DIGITS,
    images: int = 10,
    channels: int = 1,
    side: int = 32,
    answered_by: str = "reference models",
    seed: int = 0,
) -> Sample:
    """Findings with so many components, of which the first `accepted` are failure scenarios."""
    rng = np.random.default_rng(seed)
    gallery = _gallery(rng, scenarios, images, classes, channels, side)
    votes = _votes(rng, gallery, accepted, answered_by)
    verdicts = decide_verdicts(review_section(), gallery, votes)
    count = len(verdicts.accepted)
    findings = Findings(
        models=_models(classes, rng),
        psi=Psi(np.array([300, 216]), 1000, 50_000, 120, 70, 5.0),
        scenarios=_scenarios(rng, scenarios),
        gallery=gallery,
        votes=votes,
        verdicts=verdicts,
        fixes=Corrections(
            verdicts.accepted,
            verdicts.labels[verdicts.accepted],
            np.zeros((count, 4, 3), np.float32),
            np.zeros((count, 4, 3), np.float32),
        ),
        baseline=_sweep(0.98, 0.62) if count else Sweep((), None, {}, ()),
        sweep=_sweep(0.99, 0.995) if count else Sweep((), None, {}, ()),
    )
    return findings, _evaluation(rng, findings)


def sample_watch(separation: float = 2.0, images: int = 400) -> FailureWatch:
    """A watch of one method whose probabilities separate wrong answers so far, as multiples of their noise."""
    rng = np.random.default_rng(0)
    wrong = rng.random(images) < 0.1
    given = 1 / (1 + np.exp(2 - separation * wrong - rng.standard_normal(images)))
    one = np.ones(1)
    return FailureWatch(
        methods=(MeasuredDetector(FailureDetector(METHODS[0], 1.0, one, one, one, 0.0), given, given),),
        problem="",
        means=np.zeros((10, 3)),
        covariances=np.stack([np.eye(3)] * 10),
        validation_wrong=wrong,
        test_wrong=wrong,
    )


def sample_run(folder: Path) -> Run:
    """A run without artefacts, to write a report into."""
    return Run(FolderStore(folder), "sample", sample_spec())


def finished_run(
    found: Findings,
    evaluation: Evaluation,
    evidence: Evidence | None = None,
    watch: FailureWatch | None = None,
) -> FinishedRun:
    """What a run without judges holds, unless they are given."""
    return FinishedRun(found, evaluation, evidence, watch)


def report_of(sample: Sample, folder: Path) -> Report:
    return build_report(sample_run(folder), finished_run(*sample))


def with_verdicts(sample: Sample, **changes: object) -> Sample:
    """The findings with other verdicts."""
    found, evaluation = sample
    return dataclasses.replace(found, verdicts=dataclasses.replace(found.verdicts, **changes)), evaluation


@functools.cache
def _enlarged_digits(side: int) -> np.ndarray:  # type: ignore[type-arg]
    """All digits of scikit-learn (n, side, side), each pixel as a square: read once, since that takes a while."""
    return np.kron(load_digits().images / 16, np.ones((1, side // 8, side // 8)))


def _gallery(
    rng: np.random.Generator, scenarios: int, images: int, classes: tuple[str, ...], channels: int, side: int
) -> Gallery:
    digits = _enlarged_digits(side)
    rows = rng.integers(len(digits), size=(scenarios, images))
    tint = np.linspace(1, 0.5, channels)[:, None, None]
    pixels = (digits[rows][:, :, None] * tint + (1 - tint) * 0.4).astype(np.float32)
    predicted = rng.integers(len(classes), size=(scenarios, images)).astype(np.int64)
    return Gallery(pixels, np.zeros((scenarios, images, 3), np.float32), predicted, classes)


def _votes(rng: np.random.Generator, gallery: Gallery, accepted: int, answered_by: str) -> Votes:
    """Annotators name one class for 8 in 10 images of an accepted scenario, and agree with f elsewhere."""
    images = gallery.predicted.shape[1]
    classes = len(gallery.classes)
    answers = np.repeat(gallery.predicted[..., None], ANNOTATORS, axis=2)  # (S, R, W)
    for row in range(accepted):
        label = int(rng.integers(classes))
        named = np.where(np.arange(images) % 5 < 4, label, (label + 1) % classes)
        gallery.predicted[row][gallery.predicted[row] == named] += 1
        gallery.predicted[row] %= classes
        answers[row] = named[:, None]
        answers[row, :, 0] = np.where(rng.random(images) < 0.4, NONE_OF_THE_ABOVE, named)
    place = np.indices(answers.shape).reshape(3, -1)
    names = tuple(f"model {i + 1}" for i in range(ANNOTATORS))
    return Votes(*place, answers.ravel(), np.zeros(answers.size), names, answered_by, {})


def _models(classes: tuple[str, ...], rng: np.random.Generator) -> Models:
    return Models(
        classifier={},
        vae={},
        classes=classes,
        images={"train": 1000, "validation": 200, "test": 500},
        data_fingerprint="0",
        accuracy={"train": 0.999, "validation": 0.985, "test": 0.983},
        classifier_history=tuple(
            ClassifierEpoch(e, loss=1 / e**1.5, validation=1 - 0.2 / e) for e in range(1, 6)
        ),
        vae_history=tuple(
            VaeEpoch(e, reconstruction=90 + 60 / e, kl=12 - 4 / e, beta=0.4) for e in range(1, 41)
        ),
        reconstruction=0.012,
        reconstruction_flips=0.07,
        kl_per_dimension=np.array([*(0.3 + 2.2 * rng.random(8)), 0.04, 0.0001]),
        health=FIT,
        class_accuracy={
            "train": np.full(len(classes), 0.999),
            "validation": np.full(len(classes), 0.985),
            "test": np.full(len(classes), 0.983),
        },
        class_images={
            part: np.full(len(classes), images // len(classes))
            for part, images in (("train", 1000), ("validation", 200), ("test", 500))
        },
    )


def _scenarios(rng: np.random.Generator, count: int) -> Scenarios:
    weights = np.sort(rng.dirichlet(np.ones(max(count, 1)) * 3))[::-1][:count] * 0.93
    rest = np.full(100 - count, 0.0007)
    eyes = np.broadcast_to(np.eye(3), (count, 3, 3)).copy()
    means, all_weights = rng.normal(size=(count, 3)), np.concatenate([weights, rest])
    return sample_scenarios(weights, means, eyes, all_weights, 516, True, 62, -14.5)


def _sweep(test: float, scenario: float) -> Sweep:
    """Two epochs per λ; the paper's picture: little happens below 0.1, and test accuracy suffers at 1000."""
    rows = []
    for i, lam in enumerate(PAPER_LAMBDAS):
        for epoch in (1, 2):
            reached = 0.35 + (scenario - 0.35) / (1 + np.exp(-2 * (i - 6))) + 0.0004 * ((7 * i) % 5)
            clean = test + 0.0006 * ((5 * i) % 7) - (0.02 if lam > 50 else 0) - (0.03 if lam > 500 else 0)
            train = clean + 0.001 * epoch
            rows.append(SweepRow(lam, epoch, 0.1, train, clean, clean, tune=reached, scenario=reached))
    chosen = max(rows, key=lambda row: row.train)
    return Sweep(tuple(rows), chosen, {"bias": np.zeros(1, np.float32)}, ())


def _evaluation(rng: np.random.Generator, found: Findings) -> Evaluation:
    count, classes = len(found.verdicts.accepted), len(found.models.classes)
    scenario = np.clip(np.array([[0.15], [0.6], [0.99]]) + rng.normal(0, 0.05, (3, count)), 0, 1)
    held_out = scenario.mean(axis=1) if count else np.full(3, np.nan)
    known = [[0.985, 0.983], [0.98, 0.979], [0.988, 0.986]]
    per_class = np.clip(0.98 + rng.normal(0, 0.01, (3, classes)), 0, 1)
    if not count:
        known[1:], per_class[1], per_class[2] = [[np.nan, np.nan], known[0]], np.nan, per_class[0]
    labels = found.verdicts.image_labels
    fixed = (labels != NONE_OF_THE_ABOVE) & (rng.random(labels.shape) < 0.9)
    after = np.where(fixed, labels, found.gallery.predicted)
    points, kind, component = _map(rng, found, classes)
    return Evaluation(
        accuracy=np.column_stack([known, held_out]),
        per_class=per_class,
        per_class_images=np.full(classes, 50),
        scenario=scenario,
        gallery_after=after,
        points=points,
        point_kind=kind,
        point_component=component,
    )


def _map(rng: np.random.Generator, found: Findings, classes: int) -> tuple[F32, I64, I64]:
    count = len(found.scenarios)
    labels = rng.integers(classes, size=2000)
    angle = 2 * np.pi * labels / classes
    training = np.stack([np.cos(angle), np.sin(angle)], axis=1) * 60 + rng.normal(0, 11, (2000, 2))
    means = rng.normal(0, 30, (count, 2))
    owner = rng.integers(max(count, 1), size=200 if count else 0)
    failures = means[owner] + rng.normal(0, 4, (len(owner), 2))
    accepted = np.isin(np.arange(count), found.verdicts.accepted)
    means_kind = np.where(accepted, ACCEPTED, REJECTED)
    kind = np.concatenate([np.full(2000, TRAINING), np.full(len(owner), FAILURE), means_kind])
    points = np.concatenate([training, failures, means]).astype(np.float32)
    return points, kind, np.concatenate([labels, owner, np.arange(count)])
