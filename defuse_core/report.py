"""The report of a run: §4 for this run, as `report.json`, `report.html` and `figures/*.png`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from defuse_core.artifacts import F64, NONE_OF_THE_ABOVE, Bool, Evaluation, Gallery, Models, Sweep, Verdicts
from defuse_core.config import RunFile
from defuse_core.correct import best_rows
from defuse_core.evaluate import Findings
from defuse_core.runs import Run

COLLAPSED_BELOW = 0.1  # nats: a latent dimension with less KL than this says next to nothing about the image


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Accuracy(Part):
    """Fractions of 1; null where the data set has no such images, or nothing was tuned."""

    validation: float | None
    test: float | None
    scenario: float | None
    """On images drawn from the accepted scenarios that no step has trained on or chosen by."""


class Accuracies(Part):
    """Figure 4."""

    before: Accuracy
    baseline: Accuracy
    """Fine-tuned on the reviewed, misclassified images: the paper's "unrestricted adversarial examples"."""
    defuse: Accuracy


class Scenario(Part):
    """One component of the mixture, accepted as a failure scenario or not."""

    number: int
    """Index among the kept components, from 0, as in every artefact."""
    weight: float
    accepted: bool
    label: str | None
    """Class that the annotators gave it; null where rejected."""
    reason: str
    misclassified: float | None
    """Share of its labelled review images that the classifier gets wrong."""
    purity: float | None
    """Share of its review images whose own label is the scenario's."""
    agreement: float | None
    """Mean over its labelled review images of the share of annotators behind the majority."""
    mistaken_for: str | None
    """Most frequent wrong answer of the classifier on its review images."""
    before: float | None
    baseline: float | None
    defuse: float | None
    """Accuracy on its held-out images; null where rejected."""


class OwnLabels(Part):
    """Accuracy on the reviewed images of the accepted scenarios, each judged by its own label: fit for mixed ones."""

    before: float | None
    defuse: float | None
    images: int


class ScenarioSummary(Part):
    components: int
    accepted: int
    purity: float | None
    """Mean over the accepted."""
    own_labels: OwnLabels
    list: tuple[Scenario, ...]


class Mean(Part):
    mean: float | None
    standard_error: float | None
    images: int


class Agreement(Part):
    """Figure 6: share of annotators who voted for an image's majority label, over the labelled images."""

    scenario: Mean
    other: Mean
    all: Mean


class TradeOff(Part):
    """One λ at the epoch that the rule of choice picked for it (Figure 5)."""

    lam: float
    epoch: int
    train: float | None
    validation: float | None
    test: float | None
    tune: float | None
    scenario: float | None
    chosen: bool


class Choice(Part):
    lam: float
    epoch: int


class PsiFigures(Part):
    codes: int
    images: int
    decodings: int
    images_with_any: float | None
    """Share of the images with at least one failing draw."""
    zero_noise_flip_rate: float | None
    """Share of the images that the classifier gets wrong when their own code is decoded, without noise."""


class VaeFigures(Part):
    reconstruction: float
    """Mean squared error per pixel."""
    reconstruction_flips: float
    """Share of training images whose plain reconstruction the classifier gets wrong."""
    kl_per_dimension: tuple[float, ...]
    """Nats."""
    collapsed: int
    """Dimensions with less than 0.1 nats."""


class Mixture(Part):
    converged: bool
    iterations: int
    codes_used: int
    lower_bound: float | None
    weights: tuple[float, ...]
    """All K weights, heaviest first."""


class VoteFigures(Part):
    annotators: int
    answers: int
    images: int
    labelled: int
    misclassified: float | None
    """Share of all labelled review images that the classifier gets wrong; others were seen in vain."""
    ties: int
    refused: int
    notes: dict[str, Any]


class ClassAccuracy(Part):
    name: str = Field(alias="class")
    images: int
    before: float | None
    baseline: float | None
    defuse: float | None


class FailedTrial(Part):
    sweep: Literal["baseline", "defuse"]
    lam: float
    cause: str


class RunFigures(Part):
    name: str
    seed: int
    dataset: str
    classes: int
    images: dict[str, int]


class Artefact(Part):
    name: str
    step: str
    made: str
    seconds: float
    bytes: int


class Making(Part):
    """What differs from one making to the next, and nothing else does."""

    artefacts: tuple[Artefact, ...]
    versions: dict[str, str]
    worker_seconds: float
    """Of identification, summed over workers."""
    decodings_per_second: float | None
    """Per worker."""


class Report(Part):
    """What `report.json` holds. Shares and accuracies are fractions of 1; null: no such figure."""

    run: RunFigures
    annotators: str
    """Who answered: reference models, or people."""
    accuracy: Accuracies
    scenarios: ScenarioSummary
    agreement: Agreement
    tradeoff: tuple[TradeOff, ...]
    chosen: Choice | None
    baseline_chosen: Choice | None
    psi: PsiFigures
    vae: VaeFigures
    mixture: Mixture
    votes: VoteFigures
    overrides: tuple[dict[str, Any], ...]
    """People's decisions above the vote."""
    per_class: tuple[ClassAccuracy, ...]
    """On the test images; empty where there are none."""
    failed_trials: tuple[FailedTrial, ...]
    making: Making


def write_report(run: Run, found: Findings, evaluation: Evaluation) -> Report:
    """Return the report, having written `report.json`, `report.html` and `figures/*.png` into the run."""
    from defuse_core.figures import draw_figures, png
    from defuse_core.html import page

    report = build_report(run, found, evaluation)
    figures = draw_figures(report, found, evaluation)
    for name, figure in figures.items():
        run.store.write(f"figures/{name}.png", png(figure))
    run.store.write("report.html", page(report, run.spec, found, evaluation, figures).encode())
    run.store.write("report.json", (report.model_dump_json(indent=1, by_alias=True) + "\n").encode())
    return report


def build_report(run: Run, found: Findings, evaluation: Evaluation) -> Report:
    """Return every figure of the run; nothing is written and no model is run."""
    models, psi, verdicts = found.models, found.psi, found.verdicts
    return Report(
        run=_run_figures(run.name, run.spec, found),
        annotators=found.votes.answered_by,
        accuracy=_accuracies(evaluation.accuracy),
        scenarios=_scenarios(found, evaluation),
        agreement=_agreement(verdicts),
        tradeoff=_tradeoff(run.spec, models, found.sweep),
        chosen=_choice(found.sweep.chosen),
        baseline_chosen=_choice(found.baseline.chosen),
        psi=PsiFigures(
            codes=psi.total,
            images=psi.images,
            decodings=psi.decodings,
            images_with_any=_ratio(psi.images_with_any, psi.images),
            zero_noise_flip_rate=_ratio(psi.zero_noise_flips, psi.images),
        ),
        vae=VaeFigures(
            reconstruction=models.reconstruction,
            reconstruction_flips=models.reconstruction_flips,
            kl_per_dimension=tuple(models.kl_per_dimension.tolist()),
            collapsed=int((models.kl_per_dimension < COLLAPSED_BELOW).sum()),
        ),
        mixture=Mixture(
            converged=found.scenarios.converged,
            iterations=found.scenarios.iterations,
            codes_used=found.scenarios.codes_used,
            lower_bound=_defined(found.scenarios.lower_bound),
            weights=tuple(np.sort(found.scenarios.all_weights)[::-1].tolist()),
        ),
        votes=_votes(found),
        overrides=tuple(verdicts.overrides),
        per_class=_per_class(models.classes, evaluation),
        failed_trials=_failed("baseline", found.baseline.failed) + _failed("defuse", found.sweep.failed),
        making=_making(run, found),
    )


def _defined(value: float | None) -> float | None:
    """A figure, or None where it is missing, nan or infinite."""
    return None if value is None or not math.isfinite(value) else float(value)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _mean(values: F64) -> float | None:
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if len(defined) else None


def _run_figures(name: str, spec: RunFile, found: Findings) -> RunFigures:
    return RunFigures(
        name=name,
        seed=spec.seed,
        dataset=spec.data.name,
        classes=len(found.models.classes),
        images=dict(found.models.images),
    )


def _accuracies(table: F64) -> Accuracies:
    rows = [Accuracy(validation=_defined(v), test=_defined(t), scenario=_defined(s)) for v, t, s in table]
    return Accuracies(before=rows[0], baseline=rows[1], defuse=rows[2])


def _scenarios(found: Findings, evaluation: Evaluation) -> ScenarioSummary:
    accepted = found.verdicts.accepted
    place = {int(number): column for column, number in enumerate(accepted)}
    rows = tuple(_scenario(found, evaluation, n, place.get(n)) for n in range(len(found.scenarios)))
    purity = _mean(found.verdicts.purity[accepted])
    own = _own_labels(found, evaluation)
    return ScenarioSummary(
        components=len(rows), accepted=len(accepted), purity=purity, own_labels=own, list=rows
    )


def _own_labels(found: Findings, evaluation: Evaluation) -> OwnLabels:
    accepted = found.verdicts.accepted
    labels = found.verdicts.image_labels[accepted]
    labelled = labels != NONE_OF_THE_ABOVE
    images = int(labelled.sum())
    before, after = (
        _ratio(int((labelled & (answers[accepted] == labels)).sum()), images)
        for answers in (found.gallery.predicted, evaluation.gallery_after)
    )
    return OwnLabels(before=before, defuse=after, images=images)


def _scenario(found: Findings, evaluation: Evaluation, number: int, column: int | None) -> Scenario:
    verdicts, classes = found.verdicts, found.models.classes
    held_out = (None, None, None) if column is None else tuple(map(_defined, evaluation.scenario[:, column]))
    return Scenario(
        number=number,
        weight=float(found.scenarios.weights[number]),
        accepted=column is not None,
        label=None if column is None else classes[verdicts.labels[number]],
        reason=verdicts.reasons[number],
        misclassified=_defined(verdicts.misclassified[number]),
        purity=_defined(verdicts.purity[number]),
        agreement=_mean(verdicts.agreement[number]),
        mistaken_for=_mistaken_for(found.gallery, verdicts, number),
        before=held_out[0],
        baseline=held_out[1],
        defuse=held_out[2],
    )


def _mistaken_for(gallery: Gallery, verdicts: Verdicts, number: int) -> str | None:
    """The class most often answered wrongly; of equally frequent ones the first."""
    wrong = gallery.predicted[number][failing(gallery, verdicts)[number]]
    return gallery.classes[np.bincount(wrong).argmax()] if len(wrong) else None


def failing(gallery: Gallery, verdicts: Verdicts) -> Bool:
    """(S, R) whether the image has a label and the classifier's answer is another."""
    labels = verdicts.image_labels
    wrong: Bool = (labels != NONE_OF_THE_ABOVE) & (labels != gallery.predicted)
    return wrong


def _agreement(verdicts: Verdicts) -> Agreement:
    inside = verdicts.labels != NONE_OF_THE_ABOVE
    shares = verdicts.agreement
    return Agreement(scenario=_spread(shares[inside]), other=_spread(shares[~inside]), all=_spread(shares))


def _spread(shares: F64) -> Mean:
    """Mean and standard error, sd (ddof 1) / sqrt(n), over the labelled images."""
    shares = shares[np.isfinite(shares)]
    n = len(shares)
    error = float(shares.std(ddof=1)) / math.sqrt(n) if n > 1 else None
    return Mean(mean=float(shares.mean()) if n else None, standard_error=error, images=n)


def _tradeoff(spec: RunFile, models: Models, sweep: Sweep) -> tuple[TradeOff, ...]:
    chosen = (sweep.chosen.get("lam"), sweep.chosen.get("epoch"))
    names = ("train", "validation", "test", "tune", "scenario")
    return tuple(
        TradeOff(
            lam=row["lam"],
            epoch=row["epoch"],
            chosen=(row["lam"], row["epoch"]) == chosen,
            **{name: _defined(row.get(name)) for name in names},
        )
        for row in best_rows(spec, models, sweep.rows)
    )


def _choice(chosen: Mapping[str, Any]) -> Choice | None:
    return Choice(lam=chosen["lam"], epoch=chosen["epoch"]) if chosen else None


def _votes(found: Findings) -> VoteFigures:
    votes, labels = found.votes, found.verdicts.image_labels
    labelled = int((labels != NONE_OF_THE_ABOVE).sum())
    return VoteFigures(
        annotators=len(votes.annotators),
        answers=len(votes.answer),
        images=labels.size,
        labelled=labelled,
        misclassified=_ratio(int(failing(found.gallery, found.verdicts).sum()), labelled),
        ties=found.verdicts.ties,
        refused=found.verdicts.refused,
        notes=votes.notes,
    )


def _per_class(classes: Iterable[str], evaluation: Evaluation) -> tuple[ClassAccuracy, ...]:
    if not evaluation.per_class_images.any():
        return ()
    columns = zip(classes, evaluation.per_class_images.tolist(), evaluation.per_class.T, strict=True)
    return tuple(
        ClassAccuracy(name=name, images=n, before=_defined(b), baseline=_defined(u), defuse=_defined(d))
        for name, n, (b, u, d) in columns
    )


def _failed(
    sweep: Literal["baseline", "defuse"], trials: Iterable[Mapping[str, Any]]
) -> tuple[FailedTrial, ...]:
    return tuple(FailedTrial(sweep=sweep, lam=trial["lam"], cause=str(trial["cause"])) for trial in trials)


def _making(run: Run, found: Findings) -> Making:
    manifest = run.manifest()
    entries = manifest.get("artefacts", {}).items()
    known = set(Artefact.model_fields)
    artefacts = (Artefact(name=key, **{k: v for k, v in e.items() if k in known}) for key, e in entries)
    return Making(
        artefacts=tuple(artefacts),
        versions=manifest.get("versions", {}),
        worker_seconds=found.psi.worker_seconds,
        decodings_per_second=_ratio(found.psi.decodings, found.psi.worker_seconds),
    )
