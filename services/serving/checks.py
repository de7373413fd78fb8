"""What a corrected classifier must pass before it is promoted: section `check` of the run file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from defuse_core.artifacts import F64, I64, Bool, Corrections, Models, Sweep, Weights
from defuse_core.config import CheckSection, RunFile
from defuse_core.correct import held_out_images
from defuse_core.data import Images, Splits
from defuse_core.device import cpu_threads
from defuse_core.models import load_classifier, load_vae, predict

ROUNDING = 1e-9  # 0.963 - 0.958 is a little more than 0.005


@dataclass(frozen=True)
class Check:
    """One question and its answer."""

    name: str
    passed: bool
    line: str  # what was asked, found and allowed

    def row(self) -> dict[str, Any]:
        return {"name": self.name, "passed": self.passed, "line": self.line}


@dataclass(frozen=True, eq=False)
class Examined:
    """What both classifiers get right: on clean images, and on the held-out images of each failure scenario."""

    split: str  # which clean images: test, validation or train
    classes: tuple[str, ...]
    labels: I64  # (N,)
    right_before: Bool  # (N,)
    right_after: Bool  # (N,)
    scenario_before: F64  # (A,)
    scenario_after: F64  # (A,)
    unfinite: tuple[str, ...]  # tensors of the corrected classifier with NaN or infinity

    def checks(self, limits: CheckSection) -> list[Check]:
        """Return every check of the suite, in the order in which they are shown."""
        if self.unfinite:
            return [Check("finite", False, f"weights: {self.unfinite[0]} has NaN or infinity")]
        return [
            Check("finite", True, "weights: all finite"),
            self._scenarios(limits.min_scenario_accuracy),
            self._each_scenario(limits.min_each_scenario),
            self._improved(),
            self._clean(limits.max_loss),
            self._classes(limits.max_class_loss),
            self._regressions(limits.max_regressions),
        ]

    def _scenarios(self, least: float) -> Check:
        found = float(self.scenario_after.mean())
        return Check(
            "scenario accuracy",
            found >= least,
            f"scenario accuracy: {found:.2%}, at least {least:.2%} is asked",
        )

    def _each_scenario(self, least: float) -> Check:
        worst = int(self.scenario_after.argmin())
        found = float(self.scenario_after[worst])
        return Check(
            "worst scenario",
            found >= least,
            f"worst scenario: {found:.2%}, at least {least:.2%} is asked of each",
        )

    def _improved(self) -> Check:
        before, after = float(self.scenario_before.mean()), float(self.scenario_after.mean())
        return Check(
            "improvement", after > before, f"improvement: scenario accuracy {before:.2%} -> {after:.2%}"
        )

    def _clean(self, most: float) -> Check:
        before, after = float(self.right_before.mean()), float(self.right_after.mean())
        return Check(
            "clean accuracy",
            before - after <= most + ROUNDING,
            f"clean accuracy: {before:.2%} -> {after:.2%} on {self.split} images, a loss of {most:.2%} is allowed",
        )

    def _classes(self, most: float) -> Check:
        counts = np.bincount(self.labels, minlength=len(self.classes))
        lost = self.right_before.astype(np.int64) - self.right_after
        loss = np.bincount(self.labels, lost, minlength=len(self.classes)) / np.maximum(counts, 1)
        worst = int(loss.argmax())
        return Check(
            "every class",
            float(loss[worst]) <= most + ROUNDING,
            f"every class: class {self.classes[worst]} lost {loss[worst]:.2%}, at most {most:.2%} is allowed",
        )

    def _regressions(self, most: float) -> Check:
        found = float((self.right_before & ~self.right_after).mean())
        return Check(
            "regressions",
            found <= most + ROUNDING,
            f"regressions: {found:.2%} of clean images were right and are wrong now, at most {most:.2%} is allowed",
        )


def examine(spec: RunFile, models: Models, fixes: Corrections, sweep: Sweep, splits: Splits) -> Examined:
    """Return what the classifier gets right before and after its correction."""
    name, clean = next(
        (name, images)
        for name, images in (
            ("test", splits.test),
            ("validation", splits.validation),
            ("train", splits.train),
        )
        if images is not None
    )
    unfinite = tuple(name for name, array in sweep.weights.items() if not np.isfinite(array).all())
    corrected = models.classifier if unfinite else sweep.weights
    with cpu_threads(spec.resources.train_threads):
        scenario = held_out_images(load_vae(spec, models.vae), fixes)
        before, after = (
            _right(spec, w, len(models.classes), (clean, scenario)) for w in (models.classifier, corrected)
        )
    return Examined(
        split=name,
        classes=models.classes,
        labels=clean.labels,
        right_before=before[0],
        right_after=after[0],
        scenario_before=before[1].reshape(len(fixes.labels), -1).mean(axis=1),
        scenario_after=after[1].reshape(len(fixes.labels), -1).mean(axis=1),
        unfinite=unfinite,
    )


def _right(spec: RunFile, weights: Weights, classes: int, parts: tuple[Images, ...]) -> list[Bool]:
    classifier = load_classifier(spec, weights, classes)
    return [predict(classifier, images) == images.labels for images in parts]
