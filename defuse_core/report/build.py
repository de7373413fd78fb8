"""Compute the figures of a report from the artefacts of its run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from defuse_core.artifacts import (
    F64,
    NONE_OF_THE_ABOVE,
    Bool,
    Evaluation,
    Override,
    Psi,
    Scenarios,
    Sweep,
    SweepRow,
    Verdicts,
)
from defuse_core.config import RunFile
from defuse_core.correct import ChoiceRule
from defuse_core.distill.components import certain_source_error
from defuse_core.evaluation import Findings
from defuse_core.evaluation.describe import LEAST_REAL_ERROR
from defuse_core.evaluation.evidence import BEFORE, PLAIN, Evidence
from defuse_core.evaluation.undecided import doubts_about_models, not_reviewed, why_undecided
from defuse_core.intervals import ROUNDING
from defuse_core.report.build_evidence import (
    evidence_figures,
    finite_or_none,
    scenario_evidence,
    watch_figures,
)
from defuse_core.report.caveats import caveats_of, headline, images_without_tracks, unreviewed_classes
from defuse_core.report.schema import (
    VERSION,
    Accuracies,
    Accuracy,
    Agreement,
    Artefact,
    ChosenRow,
    ClassAccuracy,
    Decision,
    HealthFigures,
    Mean,
    Mixture,
    OwnLabels,
    Provenance,
    PsiFigures,
    Report,
    RunFigures,
    Scenario,
    ScenarioSummary,
    SweepFailure,
    TradeOff,
    VaeFigures,
    VoteFigures,
)
from defuse_core.review.verdicts import count_not_majority, is_misclassified, most_common_error
from defuse_core.runs import CONTROL_NAMES, Run
from defuse_core.watch import FailureWatch


class FinishedRun(NamedTuple):
    """Everything that a finished run holds."""

    found: Findings
    evaluation: Evaluation
    evidence: Evidence | None  # None with judges.count 0
    watch: FailureWatch | None  # None where the report step has not made it yet


def build_report(run: Run, finished: FinishedRun) -> Report:
    """Return all figures of the run. Writes nothing and runs no model."""
    if not finished.found.sweep.has_correction:
        finished = finished._replace(evaluation=_without_correction(finished.evaluation))
    found, evaluation, evidence, watch = finished
    models, psi, verdicts = found.models, found.psi, found.verdicts
    report = Report(
        version=VERSION,
        headline="",
        caveats=(),
        run=_run_figures(run.name, run.spec, found),
        annotators=found.votes.answered_by,
        accuracy=_accuracies(evaluation.accuracy, evidence),
        scenarios=_scenarios(run.spec, finished),
        agreement=_agreement(run.spec, verdicts),
        tradeoff=_tradeoff(ChoiceRule(run.spec.correct, models.accuracy), found.sweep),
        chosen=_choice(found.sweep.chosen),
        baseline_chosen=_choice(found.baseline.chosen),
        psi=_psi(run.spec, psi),
        vae=VaeFigures(
            reconstruction=models.reconstruction,
            reconstruction_flips=models.reconstruction_flips,
            kl_per_dimension=tuple(models.kl_per_dimension.tolist()),
            collapsed=models.health.collapsed,
            health=HealthFigures.model_validate(models.health, from_attributes=True),
        ),
        mixture=Mixture(
            converged=found.scenarios.converged,
            iterations=found.scenarios.iterations,
            codes_used=found.scenarios.codes_used,
            lower_bound=finite_or_none(found.scenarios.lower_bound),
            last_change=finite_or_none(found.scenarios.last_change),
            weights=tuple(np.sort(found.scenarios.all_weights)[::-1].tolist()),
        ),
        votes=_votes(found),
        overrides=tuple(_decision(override, models.classes) for override in verdicts.overrides),
        evidence=None if evidence is None else evidence_figures(found, evidence),
        watch=None if watch is None else watch_figures(watch, run.spec.serve),
        per_class=_per_class(models.classes, evaluation, run.spec.check.max_class_loss),
        failed_trials=_failed_trials(run, found),
        provenance=_provenance(run, found),
    )
    doubts = [
        *doubts_about_models(run.spec, models, found.references),
        not_reviewed(found.scenarios),
        unreviewed_classes(found.scenarios, models.classes, run.spec.distill),
        images_without_tracks(found.scenarios, watch),
    ]
    words = {
        "headline": headline(report, run.spec.correct),
        "caveats": tuple(caveats_of(report, run.spec.correct, [doubt for doubt in doubts if doubt])),
    }
    return report.model_copy(update=words)


def _without_correction(evaluation: Evaluation) -> Evaluation:
    """Return the evaluation with nan after the correction: where nothing is corrected, it scores f there again."""
    tables = {name: getattr(evaluation, name).copy() for name in ("accuracy", "per_class", "scenario")}
    for table in tables.values():
        table[-1] = np.nan
    return replace(evaluation, **tables)


def _psi(spec: RunFile, psi: Psi) -> PsiFigures:
    return PsiFigures(
        codes=psi.total,
        images=psi.images,
        decodings=psi.decodings,
        images_with_any=_ratio(psi.images_with_any, psi.images),
        zero_noise_flip_rate=_ratio(psi.zero_noise_flips, psi.images),
        failing_draws=psi.failing,
        kept_share=_ratio(psi.total, psi.failing),
        screened=spec.identify.screen == "reference-models",
        wrong=psi.wrong,
        wrong_decoded=psi.wrong_decoded,
        wrong_kept=psi.wrong_kept,
    )


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _mean(values: F64) -> float | None:
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if len(defined) else None


def _decision(override: Override, classes: tuple[str, ...]) -> Decision:
    label = None if override.label is None else classes[override.label]
    return Decision(**vars(override) | {"label": label})


def _run_figures(name: str, spec: RunFile, found: Findings) -> RunFigures:
    return RunFigures(
        name=name,
        seed=spec.seed,
        dataset=spec.data.name,
        classes=len(found.models.classes),
        images=dict(found.models.images),
        validation_from_training=found.models.validation_from_training,
        data_fingerprint=found.models.data_fingerprint,
    )


def _accuracies(table: F64, evidence: Evidence | None) -> Accuracies:
    rows = [
        Accuracy(validation=finite_or_none(v), test=finite_or_none(t), scenario=finite_or_none(s))
        for v, t, s in table
    ]
    plain = None
    if evidence is not None:
        validation, test = map(_mean, evidence.plain_clean)
        plain = Accuracy(
            validation=validation, test=test, scenario=finite_or_none(evidence.one_label[PLAIN, 0])
        )
    return Accuracies(before=rows[0], baseline=rows[1], plain=plain, defuse=rows[2])


def _scenarios(spec: RunFile, finished: FinishedRun) -> ScenarioSummary:
    found, evaluation, evidence, _ = finished
    accepted = found.verdicts.accepted
    place = {int(number): column for column, number in enumerate(accepted)}
    rows = tuple(_scenario(finished, n, place.get(n)) for n in range(len(found.scenarios)))
    return ScenarioSummary(
        components=len(rows),
        accepted=len(accepted),
        purity=_mean(found.verdicts.purity[accepted]),
        own_labels=_own_labels(found, evaluation, tuned_on=spec.vae.decode == "anchored"),
        list=rows,
        expected_false_share=found.verdicts.false_share or None,  # 0: none accepted by the vote
        tuning_agreement=None if found.fixes.kept is None else _mean(found.fixes.kept),
        unreviewed_images=0 if found.fixes.unreviewed is None else len(found.fixes.unreviewed),
        false_by_judges=None if evidence is None else _false_by_judges(evidence, spec.review.rho),
        undecided=why_undecided(spec, found),
    )


def _false_by_judges(evidence: Evidence, rho: float) -> int | None:
    """Return on how many scenarios the classifier before is wrong on at most rho of the held-out images with a judges'
    label; None where no image has one."""
    right = evidence.scenario_own_label[:, BEFORE]
    return int((1 - right <= rho).sum()) if np.isfinite(right).any() else None


def _own_labels(found: Findings, evaluation: Evaluation, *, tuned_on: bool) -> OwnLabels:
    accepted = found.verdicts.accepted
    labels = found.verdicts.image_labels[accepted]
    labelled = labels != NONE_OF_THE_ABOVE
    images = int(labelled.sum())
    before, after = (
        _ratio(int((labelled & (answers[accepted] == labels)).sum()), images)
        for answers in (found.gallery.predicted, evaluation.gallery_after)
    )
    corrected = found.sweep.has_correction
    return OwnLabels(before=before, defuse=after if corrected else None, images=images, tuned_on=tuned_on)


def _scenario(finished: FinishedRun, number: int, column: int | None) -> Scenario:
    found, evaluation, evidence, _ = finished
    verdicts, scenarios, classes = found.verdicts, found.scenarios, found.models.classes
    held_out = (
        (None, None, None) if column is None else tuple(map(finite_or_none, evaluation.scenario[:, column]))
    )
    mistaken = (
        None
        if column is None
        else most_common_error(
            found.gallery.predicted[number], verdicts.labels[number], verdicts.image_labels[number]
        )
    )
    return Scenario(
        number=number,
        weight=float(scenarios.weights[number]),
        source_images=int(scenarios.support[number]),
        source_error=float(scenarios.source_error[number]),
        source_tracks=None if scenarios.source_tracks is None else int(scenarios.source_tracks[number]),
        seen_in_training_images=bool(seen_in_training_images(scenarios)[number]),
        accepted=column is not None,
        label=None if column is None else classes[verdicts.labels[number]],
        reason=verdicts.reasons[number],
        misclassified=finite_or_none(verdicts.misclassified[number]),
        purity=finite_or_none(verdicts.purity[number]),
        agreement=_mean(verdicts.agreement[number]),
        mistaken_for=None if mistaken is None else classes[mistaken],
        before=held_out[0],
        baseline=held_out[1],
        defuse=held_out[2],
        evidence=None if evidence is None or column is None else scenario_evidence(found, evidence, column),
        tuning_agreement=None
        if column is None or found.fixes.kept is None
        else finite_or_none(found.fixes.kept[column]),
    )


def _agreement(spec: RunFile, verdicts: Verdicts) -> Agreement:
    inside = verdicts.labels != NONE_OF_THE_ABOVE
    shares = verdicts.agreement
    # one answer for all images of a scenario is one observation
    whole = spec.review.annotators == "label-studio" and spec.review.form == "scenario"
    return Agreement(
        scenario=_spread(shares[inside], whole),
        other=_spread(shares[~inside], whole),
        all=_spread(shares, whole),
    )


def _spread(shares: F64, whole: bool) -> Mean:
    """Mean and standard error, sd (ddof 1) / sqrt(n), of (S, R) shares over images, or, if `whole`, over scenarios."""
    known = np.isfinite(shares)
    means = [row[of].mean() for row, of in zip(shares, known, strict=True) if of.any()]
    values: F64 = np.array(means, np.float64) if whole else shares[known]
    n = len(values)
    error = float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else None
    return Mean(mean=float(values.mean()) if n else None, standard_error=error, images=int(known.sum()))


def _tradeoff(rule: ChoiceRule, sweep: Sweep) -> tuple[TradeOff, ...]:
    return tuple(
        TradeOff(
            lam=row.lam,
            epoch=row.epoch,
            train=finite_or_none(row.train),
            validation=finite_or_none(row.validation),
            test=finite_or_none(row.test),
            tune=finite_or_none(row.tune),
            scenario=finite_or_none(row.scenario),
            chosen=row == sweep.chosen,
        )
        for row in rule.best_rows(sweep.rows)
    )


def _choice(chosen: SweepRow | None) -> ChosenRow | None:
    return None if chosen is None else ChosenRow.model_validate(chosen, from_attributes=True)


def _votes(found: Findings) -> VoteFigures:
    votes, labels = found.votes, found.verdicts.image_labels
    labelled = int((labels != NONE_OF_THE_ABOVE).sum())
    return VoteFigures(
        annotators=len(np.unique(votes.annotator)),  # some may have given discarded answers alone
        answers=len(votes.answer),
        images=labels.size,
        labelled=labelled,
        misclassified=_ratio(int(is_misclassified(found.gallery.predicted, labels).sum()), labelled),
        ties=found.verdicts.ties,
        more_images=int(found.verdicts.labelled.sum()) - labelled,
        no_class_chosen=found.verdicts.no_class_chosen,
        not_majority=count_not_majority(labels, votes, len(found.models.classes)),
        notes=votes.notes,
    )


def _per_class(classes: Iterable[str], evaluation: Evaluation, max_loss: float) -> tuple[ClassAccuracy, ...]:
    if not evaluation.per_class_images.any():
        return ()
    before, _, after = evaluation.per_class
    loss = before - after if evaluation.class_loss is None else evaluation.class_loss
    columns = zip(
        classes, evaluation.per_class_images.tolist(), evaluation.per_class.T, loss.tolist(), strict=True
    )
    return tuple(
        ClassAccuracy(
            name=name,
            images=n,
            before=finite_or_none(b),
            baseline=finite_or_none(u),
            defuse=finite_or_none(d),
            loses_too_much=lost > max_loss + ROUNDING,
        )
        for name, n, (b, u, d), lost in columns
    )


def _failed_trials(run: Run, found: Findings) -> tuple[SweepFailure, ...]:
    """Return the fine-tunings that failed, with those that only evidence needs."""
    failed = [("baseline", found.baseline.failed), ("defuse", found.sweep.failed)]
    controls = ((name, run.load(Sweep, name)) for name in CONTROL_NAMES)
    failed += [(name, sweep.failed) for name, sweep in controls if sweep is not None]
    return tuple(
        SweepFailure(sweep=name, lam=trial.lam, cause=trial.cause)
        for name, trials in failed
        for trial in trials
    )


def _provenance(run: Run, found: Findings) -> Provenance:
    manifest = run.manifest()
    entries = manifest.get("artefacts", {}).items()
    known = set(Artefact.model_fields)
    artefacts = (Artefact(name=key, **{k: v for k, v in e.items() if k in known}) for key, e in entries)
    return Provenance(
        device=manifest.get("device"),
        artefacts=tuple(artefacts),
        versions=manifest.get("versions", {}),
        worker_seconds=found.psi.worker_seconds,
        decodings_per_second=_ratio(found.psi.decodings, found.psi.worker_seconds),
    )


def seen_in_training_images(scenarios: Scenarios) -> Bool:
    """Return the components whose source images f certainly gets wrong itself, (S,): more than LEAST_REAL_ERROR.

    Images of one track count once. f fails on the others in decodings alone, which may be a fault of the β-VAE.
    """
    seen: Bool = certain_source_error(scenarios) > LEAST_REAL_ERROR
    return seen
