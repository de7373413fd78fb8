"""The checks of section `check` that a corrected classifier must pass before it is promoted."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from torch import nn

from defuse_core.artifacts import F64, I64, Bool, Corrections, Models, Sweep, Weights
from defuse_core.config import CheckSection, RunFile
from defuse_core.correct import overflowed
from defuse_core.data import Images, Splits
from defuse_core.device import cpu_threads
from defuse_core.errors import ModelError
from defuse_core.evaluation import expect_same_accuracy
from defuse_core.evaluation.evidence import BEFORE, DEFUSE, Evidence
from defuse_core.evaluation.undecided import are_worse, compared_part, why_guessing, worse_on_average
from defuse_core.formatting import first_few, percent
from defuse_core.intervals import MANY_CLASSES, ROUNDING, class_loss
from defuse_core.models import StoredVae, load_classifier, predict
from defuse_core.tuning_data import held_out_images

log = logging.getLogger("defuse")
AT_MOST = {"clean accuracy", "every class", "regressions"}  # checks of a loss; the others are of a gain
NO_GUESS = "classifier before the correction: nothing shows that it only guesses"


@dataclass(frozen=True)
class Check:
    """One check of section `check` and its result."""

    name: str
    passed: bool
    line: str  # what was checked, the value found and the limit
    # the accuracy, gain, loss or share in the line, as a fraction of 1; a loss below 0 is a gain
    found: float | None = None
    limit: float | None = None  # what the line compares it with; None where no single figure decides

    @property
    def at(self) -> str | None:
        """Whether `found` may be `limit` at "least" or at "most"; an improvement is more than 0. None without limit."""
        if self.limit is None:
            return None
        return "most" if self.name in AT_MOST else "least"


@dataclass(frozen=True, eq=False)
class CandidateReport:
    """Which answers of both classifiers are right: on clean images, and on held-out images of each scenario."""

    split: str  # the clean images: test, validation or train
    classes: tuple[str, ...]
    labels: I64  # (N,)
    right_before: Bool  # (N,)
    right_after: Bool  # (N,)
    scenario: I64  # (A,) number of each scenario
    scenario_before: F64  # (A,)
    scenario_after: F64  # (A,)
    not_finite: tuple[str, ...]  # tensors of the corrected classifier with NaN or infinity
    dependence: str = ""  # what the correction has seen of the clean images; empty where nothing
    guessing: str | None = None  # that the classifier before hardly does more; None where it does
    own_label: Check | None = None  # None without judges, and with worse ones
    by_own_label: F64 | None = None  # (A, 2) as own_label_accuracies
    fingerprint: str = ""  # of the clean images; empty where the classifier has probably seen them
    tracks: I64 | None = None  # (N,) of the clean images

    def scenario_accuracies(self) -> tuple[F64, F64, Bool]:
        """Return each scenario's accuracy before and after, and whether judges measured both, (A,) each.

        By the judges' labels, as in the report's first sentences; else by the scenario's label.
        """
        if self.by_own_label is None:
            return self.scenario_before, self.scenario_after, np.zeros(len(self.scenario), np.bool_)
        before, after = self.by_own_label.T
        judged: Bool = np.isfinite(before) & np.isfinite(after)
        before = np.where(judged, before, self.scenario_before)
        return before, np.where(judged, after, self.scenario_after), judged

    def checks(self, limits: CheckSection) -> list[Check]:
        """Return every check of section `check`, in the order in which they are shown."""
        if self.not_finite:
            return [Check("finite", False, f"weights: {self.not_finite[0]} has NaN or infinity")]
        return [
            Check("finite", True, "weights: all finite"),
            Check("classifier", self.guessing is None, self.guessing or NO_GUESS),
            self._mean_scenario_accuracy(limits.min_scenario_accuracy),
            self._worst_scenario_accuracy(limits.min_each_scenario),
            self._improvement(),
            *([] if self.own_label is None else [self.own_label]),
            self._clean_accuracy(limits.max_loss),
            self._class_accuracy(limits.max_class_loss),
            self._regressions(limits.max_regressions),
        ]

    def _mean_scenario_accuracy(self, least: float) -> Check:
        found = float(self.scenario_after.mean())
        line = f"scenario accuracy by the scenarios' labels: {percent(found, 2)}, expected at least {percent(least, 2)}"
        return Check("scenario accuracy", found >= least - ROUNDING, line, found, least)

    def _worst_scenario_accuracy(self, least: float) -> Check:
        worst = int(self.scenario_after.argmin())
        found = float(self.scenario_after[worst])
        line = f"worst scenario by its label: {self.scenario[worst]}, {percent(found, 2)}, "
        line += f"expected at least {percent(least, 2)}"
        return Check("worst scenario", found >= least - ROUNDING, line, found, least)

    def _improvement(self) -> Check:
        before, after = float(self.scenario_before.mean()), float(self.scenario_after.mean())
        line = f"improvement by the scenarios' labels: {percent(before, 2)} to {percent(after, 2)}"
        return Check("improvement", after > before, line, after - before, 0.0)

    def _clean_accuracy(self, most: float) -> Check:
        before, after = float(self.right_before.mean()), float(self.right_after.mean())
        line = f"clean accuracy: {percent(before, 2)} to {percent(after, 2)} on {self.split} images, "
        line += f"expected a loss of at most {100 * most:.2f} points"
        if self.dependence:
            line += f" (not independent: {self.dependence})"
        return Check("clean accuracy", before - after <= most + ROUNDING, line, before - after, most)

    def _class_accuracy(self, most: float) -> Check:
        count = len(self.classes)
        loss = class_loss(self.right_before, self.right_after, self.labels, self.tracks, count)
        measured, worst = np.isfinite(loss), int(np.nanargmax(loss))
        certain = " for certain" if count > MANY_CLASSES else ""
        lost = f"class {self.classes[worst]} lost {100 * loss[worst]:.2f} points{certain}"
        if loss[worst] <= 0:
            lost = f"no class lost accuracy{certain}"
        line = f"every class: {lost}, expected at most {100 * most:.2f} points"
        if not measured.all():
            unknown = [self.classes[number] for number in np.flatnonzero(~measured)]
            line += f"; not measured, since no {self.split} image shows them: {first_few(unknown)}"
        return Check("every class", float(loss[worst]) <= most + ROUNDING, line, float(loss[worst]), most)

    def _regressions(self, most: float) -> Check:
        found = float((self.right_before & ~self.right_after).mean())
        line = f"regressions: {percent(found, 2)} of clean images were right and are wrong now, "
        line += f"expected at most {percent(most, 2)}"
        return Check("regressions", found <= most + ROUNDING, line, found, most)


def evaluate_candidate(
    spec: RunFile,
    models: Models,
    corrections: Corrections,
    sweep: Sweep,
    splits: Splits,
    evidence: Evidence | None,
) -> CandidateReport:
    """Return which answers are right before and after the correction."""
    candidates = (("test", splits.test), ("validation", splits.validation), ("train", splits.train))
    split, clean = next((name, images) for name, images in candidates if images is not None)
    not_finite = tuple(overflowed(models.classifier, sweep.weights))
    corrected = models.classifier if not_finite else sweep.weights
    with cpu_threads(spec.resources.train_threads):
        scenario = held_out_images(StoredVae(spec, models.vae), corrections)
        before, after = (
            _right(spec, w, len(models.classes), (clean, scenario)) for w in (models.classifier, corrected)
        )
    expect_same_accuracy(models, split, float(before[0].mean()))
    part = compared_part(models)
    if evidence is not None and (worse := worse_on_average(evidence.judges_by_class, models)) is not None:
        log.warning("own label is not checked, since the best judge is %s", worse)
    return CandidateReport(
        split=split,
        classes=models.classes,
        labels=clean.labels,
        right_before=before[0],
        right_after=after[0],
        scenario=corrections.scenario,
        scenario_before=before[1].reshape(len(corrections.labels), -1).mean(axis=1),
        scenario_after=after[1].reshape(len(corrections.labels), -1).mean(axis=1),
        not_finite=not_finite,
        dependence=_dependence(spec, models, split),
        guessing=why_guessing(models),
        own_label=own_label_check(corrections, evidence, models),
        by_own_label=own_label_accuracies(evidence, models),
        fingerprint=splits.fingerprint(split) if split == part else "",
        tracks=clean.tracks,
    )


def own_label_accuracies(evidence: Evidence | None, models: Models) -> F64 | None:
    """Return the accuracy before and after on each scenario, (A, 2), by the label that most judges give each image.

    nan where judges label no image of the scenario. None without judges, and where they are worse than the classifier
    on real images: what they say of its answers is not reliable then.
    """
    if evidence is None or worse_on_average(evidence.judges_by_class, models):
        return None
    part = compared_part(models)
    images = None if part is None else models.images[part]
    if are_worse(evidence.judges.tolist(), evidence.before_test, images):
        return None
    return evidence.scenario_own_label[:, [BEFORE, DEFUSE]]


def own_label_check(corrections: Corrections, evidence: Evidence | None, models: Models) -> Check | None:
    """Return whether no scenario is significantly worse by the label that most judges give each held-out image.

    It names the worst one. Before and after are compared picture by picture; those of one photograph or track count
    once. None where judges label no scenario, or own_label_accuracies returns none.
    """
    accuracies = own_label_accuracies(evidence, models)
    if evidence is None or accuracies is None:
        return None
    before, after = accuracies.T
    rows = np.flatnonzero(np.isfinite(before) & np.isfinite(after))
    if not len(rows):
        return None
    is_worse = evidence.worse_than_before[rows]
    worst = rows[np.lexsort((after[rows] - before[rows], ~is_worse))[0]]
    loss = float(before[worst] - after[worst])
    line = "judges' labels: no scenario is less often right"
    if loss > 0:
        verdict = "significant, and none may be" if is_worse.any() else "not significant"
        change = f"{percent(before[worst], 2)} to {percent(after[worst], 2)}"
        line = (
            f"largest loss by the judges' labels: scenario {corrections.scenario[worst]}, {change}, {verdict}"
        )
    return Check("own label", not is_worse.any(), line, found=max(0.0, loss))


def _dependence(spec: RunFile, models: Models, split: str) -> str:
    """Return what the correction has seen of the images of one part; empty where nothing."""
    if split == "train":
        return "the classifier was trained on these images"
    if split == "validation" and models.validation_from_training:
        return "the classifier has probably seen these images"
    chosen = split == "validation" and spec.correct.choose_by in ("tune", "validation")
    return "λ was chosen on these images" if chosen else ""


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
