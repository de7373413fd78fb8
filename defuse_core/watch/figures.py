"""How well the watch finds failing inputs, as report.json, GET /v1/model and the registry show it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from defuse_core.artifacts import F64, I64, Bool
from defuse_core.config import ServeSection
from defuse_core.intervals import ROUNDING, auroc, share_of_units

if TYPE_CHECKING:
    from defuse_core.watch.failure_detector import FailureWatch, MeasuredDetector

ECE_BINS = 15  # of equally many images: most failure probabilities are near 0
REGION = "scenario distance"


class FigureModel(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, use_attribute_docstrings=True
    )


class Share(FigureModel):
    """A share with its 95 % interval, fractions of 1; null where it could not be measured."""

    value: float | None
    low: float | None
    high: float | None


class DetectionFigures(FigureModel):
    """How well failing inputs are found among the real images of one part of the data.

    Intervals count the images of one track once.
    """

    images: int
    errors: int
    """Images that the classifier gets wrong."""
    auroc: Share
    """Chance that a wrong answer gets a higher failure probability than a right one; 0.5 is chance."""
    average_precision: float | None
    flagged: int | None
    """Images whose failure probability reaches the threshold."""
    precision: Share
    """Share of the flagged images that are wrong."""
    recall: Share
    """Share of the wrong images that are flagged."""
    calibration_error: float | None
    """Expected calibration error of the failure probability, in bins of equally many images."""


class MethodFigures(FigureModel):
    """One way to find failing inputs, for comparison."""

    method: str
    log_loss: float | None
    """Cross-validated on validation images, nats; the choice goes by it."""
    validation: Share
    """AUROC."""
    test: Share
    """AUROC; chooses nothing."""


class WatchFigures(FigureModel):
    """The detector of failing inputs, chosen and calibrated on validation images."""

    method: str | None = Field(description="the chosen one; null where none gives a failure probability")
    verdict: str
    """One sentence: how well failing inputs are found, or that and why they are not."""
    threshold: float | None
    """Failure probability from which on an input is flagged."""
    validation: DetectionFigures | None
    """Each image is measured by a detector that was not fitted on it. Null without such images, or without a method.
    Precision and recall are null where the threshold was chosen on these images (serve.failure_threshold null)."""
    test: DetectionFigures | None
    methods: tuple[MethodFigures, ...]
    """All methods, and the distance from the nearest failure scenario."""


def failure_threshold(watch: FailureWatch, chosen: MeasuredDetector, settings: ServeSection) -> float:
    """Return `serve.failure_threshold`, or the largest at which `serve.failure_recall` of the errors are flagged."""
    if settings.failure_threshold is not None:
        return settings.failure_threshold
    errors = np.sort(chosen.validation[watch.validation_wrong])[::-1]
    return float(errors[max(1, math.ceil(settings.failure_recall * len(errors) - ROUNDING)) - 1])


def watch_figures(watch: FailureWatch, settings: ServeSection, codes: bool = True) -> WatchFigures:
    """Return the figures of the best method; without `codes`, of the best one that needs no encoder."""
    best = watch.best(codes)
    problem = watch.objection(best)
    if best is None:
        return WatchFigures(
            method=None, verdict=problem, threshold=None, validation=None, test=None, methods=_methods(watch)
        )
    threshold = None if problem else failure_threshold(watch, best, settings)
    validation = _detection(best.validation, watch.validation_wrong, watch.validation_tracks, threshold)
    if validation is not None and settings.failure_threshold is None:
        unknown = share_of(np.full(3, np.nan))
        validation = validation.model_copy(update={"precision": unknown, "recall": unknown})
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
    told = "" if area.value is None else f" AUROC {area.value:.2f} ({area.low:.2f}–{area.high:.2f}), and"
    found = f"; on {part} images{told} {figures.flagged:,} of {figures.images:,} are flagged"
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


def calibration_error(probability: F64, wrong: Bool) -> float:
    """Return the expected calibration error of (n,) probabilities, in ECE_BINS bins of equally many images."""
    order = np.argsort(probability, kind="stable")
    bins = [rows for rows in np.array_split(order, ECE_BINS) if len(rows)]
    gaps = [abs(float(probability[rows].mean()) - float(wrong[rows].mean())) * len(rows) for rows in bins]
    return sum(gaps) / len(wrong)


def _methods(watch: FailureWatch) -> tuple[MethodFigures, ...]:
    rows = [
        MethodFigures(
            method=one.detector.method,
            log_loss=float(one.losses(watch.validation_wrong).mean()),
            validation=share_of(auroc(one.validation, watch.validation_wrong, watch.validation_tracks)),
            test=share_of(auroc(one.test, watch.test_wrong, watch.test_tracks)),
        )
        for one in watch.methods
    ]
    region = MethodFigures(
        method=REGION,
        log_loss=None,
        validation=share_of(auroc(watch.validation_region, watch.validation_wrong, watch.validation_tracks)),
        test=share_of(auroc(watch.test_region, watch.test_wrong, watch.test_tracks)),
    )
    return (*rows, region)


def share_of(row: F64) -> Share:
    """Return value, low and high, (3,), nan as None."""
    value, low, high = (float(number) if math.isfinite(number) else None for number in row)
    return Share(value=value, low=low, high=high)
