"""The failure scenarios of two runs side by side: which persist, are fixed, back again, broken, new, or found."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from torch import nn

from defuse_core.artifacts import F32, I64, Models, Weights
from defuse_core.data import Images
from defuse_core.device import ieee_f32
from defuse_core.distill.mixture import sample_covariance
from defuse_core.errors import InputError
from defuse_core.evaluation import Findings
from defuse_core.evaluation.undecided import why_guessing, why_undecided
from defuse_core.export.finished import both_classifiers
from defuse_core.formatting import class_difference
from defuse_core.intervals import chi2_quantile
from defuse_core.models import StoredVae, accuracy, encode_images, load_vae
from defuse_core.models.programs import SOURCE
from defuse_core.review.verdicts import most_common_errors
from defuse_core.runs import Run
from defuse_core.tuning_data import by_scenario, held_out_images
from defuse_core.watch.scenario_regions import mahalanobis

log = logging.getLogger("defuse")
State = Literal[
    "persisting", "fixed", "back again", "was right", "broken by B", "new", "broken by A", "found now"
]
INSIDE = 0.999  # share of a scenario's own pictures within the distance that counts as inside
MATCHING_SHARE = 0.5  # share of one scenario's pictures that are inside another one that it matches
RIDGE = 1e-3  # share of the mean variance that is added to each: the β-VAE may not use a dimension


@dataclass(frozen=True)
class ComparedScenario:
    """One scenario of either run. Accuracies are on its held-out pictures, by its label."""

    state: State
    label: str
    mistaken_for: str
    number_a: int | None  # in run A
    number_b: int | None  # in run B
    before_a: float  # classifier that run A debugged
    after_a: float  # and its correction
    before_b: float
    after_b: float


@dataclass(frozen=True, eq=False)
class _Side:
    """One run as the comparison sees it."""

    run: Run
    found: Findings
    pictures: list[Images]  # held-out ones of each scenario
    before: nn.Module
    after: nn.Module

    @property
    def labels(self) -> I64:
        return self.found.fixes.labels

    @cached_property
    def errors(self) -> I64:
        return most_common_errors(self.found.gallery, self.found.verdicts, self.found.fixes.scenario)

    def confusion(self, row: int) -> tuple[str, str]:
        """Return the label of a scenario, and what it was mistaken for."""
        classes = self.found.models.classes
        return classes[int(self.labels[row])], classes[int(self.errors[row])]


@ieee_f32()
def compare_runs(a: Run, b: Run) -> tuple[list[ComparedScenario], list[str | None], list[str | None]]:
    """Return the accepted scenarios of run A, and then those of B that match none of A's, with doubts about both runs.

    The doubts are, for A and B each: why the run could not tell whether its classifier has failure scenarios, and that
    its classifier is hardly better than guessing; None where there is no such doubt.

    A classifier is right on a scenario if it reaches check.min_scenario_accuracy of B on its pictures, by its label.
    Original is the classifier that a run debugged, corrected the one after its correction.

    - broken by B: B's original is right, B's corrected is not; for a scenario of A
    - was right: both originals are right, and B's corrected
    - fixed: B's original is right, and B's corrected; A's original is not
    - back again: B's original is wrong, is not the same as A's, and A's corrected is right
    - persisting: any other scenario of A
    - broken by A: A's original is right, A's corrected is not; for a scenario of B alone
    - new: A's original is right, and A's corrected
    - found now: A's original is wrong, so the failure is not new

    Scenarios match if they have the same label, and if most pictures of one are inside the ellipsoid of the other's in
    the latent space of B; anchored ones seldom do unless they show the same photographs. Raises InputError for
    unfinished runs and for other classes or images.
    """
    _expect_comparable(a, b)
    side_a, side_b = _load(a), _load(b)
    undecided = [why_undecided(side.run.spec, side.found) for side in (side_a, side_b)]
    guessing = [why_guessing(side.found.models) for side in (side_a, side_b)]
    for run, reason, guess in zip((a, b), undecided, guessing, strict=True):
        if reason:
            log.warning(
                "run %s could not tell whether its classifier has failure scenarios: %s; so it does not mean "
                "that there are none",
                run.name,
                reason,
            )
        elif guess:
            log.warning("run %s: %s; what is fixed, broken or new says nothing then", run.name, guess)
    same_classifier = _is_same_classifier(side_a.found.models.classifier, side_b.found.models.classifier)
    fixed_at = b.spec.check.min_scenario_accuracy
    matches = _matches(side_a, side_b)
    numbers_a, numbers_b = side_a.found.fixes.scenario.tolist(), side_b.found.fixes.scenario.tolist()
    rows = []
    for row, number in enumerate(numbers_a):
        scores = _scores(side_a, side_b, side_a.pictures[row])
        state = _state(scores, fixed_at, same_classifier)
        number_b = numbers_b[matches[row]] if row in matches else None
        rows.append(ComparedScenario(state, *side_a.confusion(row), number, number_b, *scores))
    for row, number in enumerate(numbers_b):
        if row not in matches.values():
            scores = _scores(side_a, side_b, side_b.pictures[row])
            state = _state_of_b_alone(scores, fixed_at)
            rows.append(ComparedScenario(state, *side_b.confusion(row), None, number, *scores))
    return rows, undecided, guessing


def _state(scores: tuple[float, float, float, float], fixed_at: float, same_classifier: bool) -> State:
    """Return the state of a scenario of A by its accuracies."""
    before_a, after_a, before_b, after_b = scores
    if before_b >= fixed_at:
        if after_b < fixed_at:
            return "broken by B"
        return "was right" if before_a >= fixed_at else "fixed"
    return "back again" if after_a >= fixed_at and not same_classifier else "persisting"


def _state_of_b_alone(scores: tuple[float, float, float, float], fixed_at: float) -> State:
    """Return the state of a scenario of B that matches none of A, by its accuracies."""
    before_a, after_a, _, _ = scores
    if before_a >= fixed_at:
        return "new" if after_a >= fixed_at else "broken by A"
    return "found now"


def _load(run: Run) -> _Side:
    found = Findings.load(run)
    fixes = found.fixes
    images = held_out_images(StoredVae(run.spec, found.models.vae), fixes)
    return _Side(run, found, by_scenario(images, len(fixes.labels)), *both_classifiers(run.spec, found))


def _expect_comparable(a: Run, b: Run) -> None:
    """Raise InputError where the runs have other classes, or images of another shape, or no models yet."""
    failed = f"runs {a.name} and {b.name} cannot be compared"
    for field in ("image_size", "channels"):
        one, other = (getattr(run.spec.data, field) for run in (a, b))
        if one != other:
            raise InputError(f"{failed}: data.{field} is {one} in one, {other} in the other")
    first, second = (run.require(Models).classes for run in (a, b))
    if first != second:
        raise InputError(
            f"{failed}, since their classes differ: {class_difference(first, second, a.name, b.name)}"
        )


def _is_same_classifier(first: Weights, second: Weights) -> bool:
    """Whether two runs debugged the same weights; a program's source holds its first images, too, and is no weight."""
    names = {*first, *second} - {SOURCE}
    return all(
        name in first and name in second and np.array_equal(first[name], second[name]) for name in names
    )


def _scores(a: _Side, b: _Side, pictures: Images) -> tuple[float, float, float, float]:
    """Return the accuracies of A before and after its correction, and of B, on pictures."""
    scores = [accuracy(net, pictures) for net in (a.before, a.after, b.before, b.after)]
    return scores[0], scores[1], scores[2], scores[3]


def _matches(a: _Side, b: _Side) -> dict[int, int]:
    """Return for rows of A the row of B that matches best; each row of B once."""
    if not len(a.labels) or not len(b.labels):
        return {}
    vae = load_vae(b.run.spec, b.found.models.vae)
    codes_a = [encode_images(vae, pictures) for pictures in a.pictures]
    codes_b = [encode_images(vae, pictures) for pictures in b.pictures]
    shares = {
        (row, other): matching_shares(codes_a[row], codes_b[other], a.confusion(row) == b.confusion(other))
        for row in range(len(a.labels))
        for other in range(len(b.labels))
        if a.labels[row] == b.labels[other]
    }
    matches: dict[int, int] = {}
    for row, other in sorted(shares, key=lambda pair: shares[pair], reverse=True):
        if shares[row, other][0] >= MATCHING_SHARE and row not in matches and other not in matches.values():
            matches[row] = other
    return matches


def matching_shares(codes: F32, others: F32, alike: bool) -> tuple[float, float]:
    """Return the shares of codes (n, Z) and others (m, Z) that are inside the other, the larger first.

    With a smaller τ a scenario fills a part of its ellipsoid. Of scenarios that are not `alike`, which are mistaken for
    other classes, only the codes count.
    """
    inside, around = share_inside(codes, others), share_inside(others, codes) if alike else 0.0
    return max(inside, around), min(inside, around)


def share_inside(codes: F32, others: F32) -> float:
    """Return the share of codes (n, Z) within the ellipsoid of other codes (m, Z)."""
    mean, covariance = others.mean(axis=0, dtype=np.float64), sample_covariance(others.astype(np.float64))
    ridge = RIDGE * max(float(np.trace(covariance)) / len(covariance), 1e-12)
    distances = mahalanobis(codes, mean[None], (covariance + ridge * np.eye(len(covariance)))[None])
    return float((distances**2 <= chi2_quantile(INSIDE, codes.shape[1])).mean())
