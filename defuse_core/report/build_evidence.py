"""Compute the evidence of a report, and the figures of its watch, from the artefacts of its run.

Axes, beside those of artifacts/__init__.py: P plain trainings.
"""

from __future__ import annotations

import math
from typing import Literal, cast

import numpy as np

from defuse_core.artifacts import F64, I64, Bool
from defuse_core.config import ServeSection
from defuse_core.evaluation import Findings
from defuse_core.evaluation.controls import has_known_confusion
from defuse_core.evaluation.evidence import BEFORE, CLASSIFIERS, DEFUSE, IN_EACH, PLAIN, WIDER, Evidence
from defuse_core.evaluation.undecided import are_worse, worse_on_average
from defuse_core.formatting import with_bounds
from defuse_core.intervals import (
    SIGNIFICANT,
    auroc,
    is_testable,
    least_favourable,
    mcnemar,
    pairs_of,
    share_of_units,
    swapped,
)
from defuse_core.report.evidence_schema import (
    AgainstBaseline,
    AgainstPlain,
    DetectionFigures,
    EvidenceFigures,
    FourShares,
    Judges,
    LeftOutScenarios,
    LeftOutShares,
    MethodFigures,
    Pairs,
    ScenarioEvidence,
    Share,
    WatchFigures,
    WiderDraws,
)
from defuse_core.review.verdicts import most_common_errors
from defuse_core.watch import MIN_ANSWERS, FailureWatch

ECE_BINS = 15  # bins of equally many images: most failure probabilities are near 0
ENOUGH_IMAGES = 600  # of a bin: a share of them has a standard error of at most 0.02
UNKNOWN = Share(value=None, low=None, high=None)


def evidence_figures(found: Findings, evidence: Evidence) -> EvidenceFigures:
    """Return the figures over all scenarios."""
    part = "test" if "test" in found.models.accuracy else "validation"
    references = None if found.references is None else getattr(found.references, part)
    errors = most_common_errors(found.gallery, found.verdicts, found.fixes.scenario)
    known = has_known_confusion(found, errors)
    corrected = found.sweep.has_correction
    test_images = found.models.images.get("test")
    worse_by_class = worse_on_average(evidence.judges_by_class, found.models)
    return EvidenceFigures(
        judges=Judges(
            count=len(evidence.judges),
            accuracy=_values(evidence.judges),
            reference_models=() if references is None else _values(references),
            classifier=finite_or_none(evidence.before_test),
            worse=worse_by_class is not None
            or are_worse(
                _values(evidence.judges), finite_or_none(evidence.before_test), found.models.images.get(part)
            ),
            worse_by_class=worse_by_class,
            labelled=finite_or_none(evidence.labelled),
        ),
        purity=share_of(evidence.purity),
        own_label=_four(evidence, "own_label", corrected),
        one_label=_four(evidence, "one_label", corrected),
        left_out=_left_out_shares(evidence),
        left_out_known_confusion=_left_out(evidence, known),
        left_out_new_confusion=_left_out(evidence, ~known),
        wider=tuple(
            WiderDraws(
                factor=factor,
                before=share_of(before),
                defuse=share_of(defuse) if corrected else UNKNOWN,
                plain=share_of(plain),
            )
            for factor, (before, defuse, plain) in zip(WIDER, evidence.wider, strict=True)
        ),
        real_failures=_real_failures(evidence, corrected),
        real_failure_images=evidence.real_failure_images,
        screen_recall=share_of(evidence.screen_recall),
        against_plain=_against_plain(found, evidence),
        against_baseline=_against_baseline(found, evidence),
        plain_against_before=_pairs(evidence.test_pairs_with_before[:1], "image", test_images),
        defuse_against_before=_pairs(evidence.test_pairs_with_before[1:], "image", test_images),
        krippendorff=finite_or_none(evidence.krippendorff),
    )


def _left_out_shares(evidence: Evidence) -> LeftOutShares:
    before, defuse, plain = map(share_of, evidence.left_out)
    return LeftOutShares(
        before=before, defuse=defuse, plain=plain, plain_each=_plain_each(evidence, "left_out")
    )


def _plain_each(evidence: Evidence, figure: str) -> tuple[float | None, ...]:
    return _values(evidence.plain_each[IN_EACH.index(figure)])


def _real_failures(evidence: Evidence, corrected: bool) -> FourShares:
    shares = _four(evidence, "real_failures", corrected)
    value = shares.before.value
    return shares.model_copy(update={"before": Share(value=value, low=None, high=None)})


def _against_plain(found: Findings, evidence: Evidence) -> AgainstPlain:
    if not found.sweep.has_correction or not np.isfinite(evidence.own_label[PLAIN, 0]):
        return AgainstPlain(scenarios=None, left_out=None, real_failures=None, test=None)
    return AgainstPlain(
        scenarios=_scenario_pairs(evidence.scenario_own_label[:, DEFUSE], evidence.scenario_plain),
        left_out=_scenario_pairs(evidence.scenario_left_out, evidence.scenario_plain),
        real_failures=_pairs(evidence.real_failure_pairs, "draw", evidence.real_failure_images),
        test=_pairs(evidence.test_pairs, "image", found.models.images.get("test")),
    )


def _against_baseline(found: Findings, evidence: Evidence) -> AgainstBaseline:
    if not found.sweep.has_correction:
        return AgainstBaseline(scenarios=None, real_failures=None)
    _, baseline, _, defuse = evidence.scenario_own_label.T
    pairs = evidence.real_failure_pairs_with_baseline[None]
    return AgainstBaseline(
        scenarios=_scenario_pairs(defuse, baseline[None]),
        real_failures=_pairs(pairs, "draw", evidence.real_failure_images),
    )


def _scenario_pairs(right: F64, others: F64) -> Pairs | None:
    """Return how many scenarios of (A,) accuracies, nan left out, are more and less often right than (P, A) others."""
    rows = [pairs_of(right, other, np.arange(len(right))) for other in others]
    return _pairs(np.stack(rows), "scenario")


def _pairs(pairs: I64, pair: Literal["scenario", "draw", "image"], images: int | None = None) -> Pairs | None:
    """Return the figures of (P, 3) `pairs_of`, those of the strongest training; None without any pair.

    Fewer pairs than `images` are tracks of these.
    """
    count, better, worse = map(int, least_favourable(pairs))
    if not count:
        return None
    # of the training that is most favourable to the correction
    _, least_worse, most_better = map(int, least_favourable(swapped(pairs)))
    return Pairs(
        pair=pair if images is None or count == images else "track",
        better=better,
        worse=worse,
        p_value=mcnemar(better, worse),
        worse_than_each=least_worse > most_better and mcnemar(most_better, least_worse) < SIGNIFICANT,
    )


def _left_out(evidence: Evidence, which: Bool) -> LeftOutScenarios:
    # the judges may agree on no image of a scenario
    which = which & np.isfinite(evidence.scenario_left_out)
    if not which.any():
        return LeftOutScenarios(count=0)
    right = evidence.scenario_left_out
    before, plain = (
        finite_or_none(evidence.scenario_own_label[which, column].mean()) for column in (BEFORE, PLAIN)
    )
    return LeftOutScenarios(
        count=int(which.sum()),
        before=before,
        plain=plain,
        defuse=float(right[which].mean()),
        against_plain=_scenario_pairs(np.where(which, right, np.nan), evidence.scenario_plain),
    )


def scenario_evidence(found: Findings, evidence: Evidence, column: int) -> ScenarioEvidence:
    """Return the figures of the accepted scenario at place `column` of the accepted ones."""
    number, real = int(found.fixes.scenario[column]), evidence.real
    units, confirmed, worse, worse_than_before = None, None, None, None
    if found.sweep.has_correction:
        units = int(evidence.units[column])
        if is_testable(np.array(units)):
            confirmed, worse = bool(evidence.confirmed[column]), bool(evidence.worse[column])
        if is_testable(evidence.pairs_with_before[column, 0]):
            worse_than_before = bool(evidence.worse_than_before[column])
    right = dict(zip(CLASSIFIERS, map(finite_or_none, evidence.scenario_own_label[column]), strict=True))
    return ScenarioEvidence(
        name=evidence.names[column],
        purity=finite_or_none(evidence.scenario_purity[column]),
        before=right["before"],
        baseline=right["baseline"],
        plain=right["plain"],
        defuse=right["defuse"] if found.sweep.has_correction else None,
        left_out=finite_or_none(evidence.scenario_left_out[column]),
        confirmed=confirmed,
        worse=worse,
        worse_than_before=worse_than_before,
        plain_each=_values(evidence.scenario_plain[:, column]),
        independent_images=units,
        at_fault=cast(Literal["classifier", "β-VAE", "unclear"], evidence.at_fault[column]),
        support=int(found.scenarios.support[number]),
        real_error=finite_or_none(real.error[column]),
        real_error_of_class=finite_or_none(real.error_of_label[column]),
        real_error_of_all=finite_or_none(real.error_of_all),
        seen_in_real_data=bool(real.seen[column]) if real.testable[column] else None,
    )


def watch_figures(watch: FailureWatch, section: ServeSection) -> WatchFigures:
    """Return the figures of the best method; without `serve.watch`, of the best one that needs no encoder."""
    best = watch.best(section.watch)
    problem = watch.objection(best)
    if best is None:
        return WatchFigures(
            method=None, verdict=problem, threshold=None, validation=None, test=None, methods=_methods(watch)
        )
    threshold = None if problem else watch.threshold(best, section)
    validation = _detection(best.validation, watch.validation_wrong, watch.validation_tracks, threshold)
    if validation is not None and section.failure_threshold is None:
        validation = validation.model_copy(update={"precision": UNKNOWN, "recall": UNKNOWN})
    test = _detection(best.test, watch.test_wrong, watch.test_tracks, threshold)
    method = best.detector.method
    return WatchFigures(
        method=None if problem else method,
        verdict=problem
        or f"Finds failing inputs by {method}{_found('validation', validation)}{_found('test', test)}.",
        threshold=threshold,
        validation=validation,
        test=test,
        methods=_methods(watch),
    )


def _found(part: str, figures: DetectionFigures | None) -> str:
    """Return what was found among the images of one part, as a clause; empty where nothing is wrong there."""
    if figures is None or not figures.errors or figures.flagged is None:
        return ""
    area = figures.auroc
    area_text = ""
    if area.value is not None and area.low is not None and area.high is not None:
        area_text = f" AUROC {with_bounds(area.value, area.low, area.high, 2)}, and"
    found = f"; on {part} images{area_text} {figures.flagged:,} of {figures.images:,} are flagged"
    if figures.recall.value is None:
        return found
    right = round(figures.recall.value * figures.errors)
    return f"{found}, among them {right} of the {figures.errors} wrong ones"


def _detection(
    probability: F64, wrong: Bool, tracks: I64 | None, threshold: float | None
) -> DetectionFigures | None:
    """Return the figures of failure probabilities (n,); None for no images."""
    if not len(wrong):
        return None
    from sklearn.metrics import average_precision_score  # late: its import takes a second

    flagged = np.zeros(len(wrong), np.bool_) if threshold is None else probability >= threshold
    hits = int((flagged & wrong).sum())
    return DetectionFigures(
        images=len(wrong),
        errors=int(wrong.sum()),
        auroc=share_of(auroc(probability, wrong, tracks)),
        average_precision=float(average_precision_score(wrong, probability)) if wrong.any() else None,
        flagged=None if threshold is None else int(flagged.sum()),
        precision=share_of(share_of_units(hits, flagged, tracks)),
        recall=share_of(share_of_units(hits, wrong & (threshold is not None), tracks)),
        calibration_error=None if threshold is None else calibration_error(probability, wrong),
    )


def calibration_error(probability: F64, wrong: Bool) -> float | None:
    """Return the expected calibration error of (n,) probabilities, in at most ECE_BINS bins of equally many images.

    A bin holds MIN_ANSWERS wrong and as many right answers on average, or ENOUGH_IMAGES; in fewer, chance makes a gap.
    None for too few images to fill two: a single bin compares the means alone, which calibration makes equal.
    """
    rarer = min(int(wrong.sum()), int((~wrong).sum()))
    bins = min(ECE_BINS, max(rarer // MIN_ANSWERS, len(wrong) // ENOUGH_IMAGES))
    if bins < 2:
        return None
    parts = np.array_split(np.argsort(probability, kind="stable"), bins)
    gaps = [abs(float(probability[rows].mean()) - float(wrong[rows].mean())) * len(rows) for rows in parts]
    return sum(gaps) / len(wrong)


def _methods(watch: FailureWatch) -> tuple[MethodFigures, ...]:
    return tuple(
        MethodFigures(
            method=one.detector.method,
            log_loss=float(one.losses(watch.validation_wrong).mean()),
            validation=share_of(auroc(one.validation, watch.validation_wrong, watch.validation_tracks)),
            test=share_of(auroc(one.test, watch.test_wrong, watch.test_tracks)),
        )
        for one in watch.methods
    )


def share_of(row: F64) -> Share:
    """Return value, low and high, (3,), nan as None."""
    value, low, high = (float(number) if math.isfinite(number) else None for number in row)
    return Share(value=value, low=low, high=high)


def finite_or_none(value: float | None) -> float | None:
    """Return the value, or None where it is missing, nan or infinite."""
    return None if value is None or not math.isfinite(value) else float(value)


def _values(values: F64) -> tuple[float | None, ...]:
    return tuple(finite_or_none(value) for value in values.tolist())


def _four(
    evidence: Evidence, figure: Literal["own_label", "one_label", "real_failures"], corrected: bool
) -> FourShares:
    table: F64 = getattr(evidence, figure)
    shares = {name: share_of(row) for name, row in zip(CLASSIFIERS, table, strict=True)}
    if not corrected:
        shares["defuse"] = UNKNOWN
    return FourShares(**shares, plain_each=_plain_each(evidence, figure))
