"""Artefacts of review: the images that people label, their answers, and the verdicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from defuse_core.artifacts.arrays import F32, F64, I64, NONE_OF_THE_ABOVE, expect_shapes


@dataclass(frozen=True, eq=False)
class Gallery:
    """What reviewers see: R images drawn from each component (Algorithm 2), with the classifier's answer."""

    images: F32  # (S, R, channels, H, W) in [0, 1]
    codes: F32  # (S, R, Z)
    predicted: I64  # (S, R)
    classes: tuple[str, ...]  # (C,)
    numbers: tuple[int, ...] = ()  # (S,) which of the run's components these are, or NO_SCENARIO; empty: all
    failure: F64 | None = None  # (S, R) failure probability, nan for none; None unless inputs from traffic
    source: I64 | None = None  # (S, R) training image that each is anchored at; None where decoded plainly
    track: I64 | None = None  # (S, R) track of that image; None where it has none

    def __post_init__(self) -> None:
        expect_shapes(self, {"images": "S R c H W", "codes": "S R Z", "predicted": "S R"})

    def __len__(self) -> int:
        return len(self.images)

    @property
    def unit(self) -> I64 | None:
        """(S, R) as Anchors.unit, of the training image that each is anchored at; None where decoded plainly."""
        return self.source if self.track is None else self.track

    def number(self, scenario: int) -> int:
        """Return the number under which people see the component at index `scenario`."""
        return self.numbers[scenario] if self.numbers else scenario


@dataclass(frozen=True, eq=False)
class Votes:
    """One row per answer. An answer for a whole scenario is stored as one row per image."""

    scenario: I64  # (V,)
    image: I64  # (V,) position within the scenario, 0..R-1
    annotator: I64  # (V,) index into annotators
    answer: I64  # (V,) class, or NONE_OF_THE_ABOVE
    when: F64  # (V,) seconds since 1970; 0 where a model answered
    annotators: tuple[str, ...]  # names or stable pseudonyms
    answered_by: str  # "reference models" or "people"
    notes: dict[str, Any]  # notes for the report: discarded answers, answers saved, ...

    def __post_init__(self) -> None:
        expect_shapes(self, {"scenario": "V", "image": "V", "annotator": "V", "answer": "V", "when": "V"})


@dataclass(frozen=True)
class Override:
    """A person's decision on one component, which replaces the verdict of the vote."""

    scenario: int  # index of the component
    label: int | None  # class; None rejects the component
    author: str
    reason: str
    when: str  # ISO 8601, UTC


@dataclass(frozen=True, eq=False)
class MoreImages:
    """Further images of components whose verdict is in doubt, as reference models label them (no pixels)."""

    drawn: I64  # (S,) 0 where the gallery settles the verdict
    labelled: I64  # (S,) of those, the images with a majority label
    misclassified: I64  # (S,) of those, the images that f gets wrong
    unit: I64 | None = None  # (S, M) as Gallery.unit; None where decoded plainly
    outcome: I64 | None = None  # (S, M) with unit: 1 misclassified, 0 right, -1 without a label or not drawn

    def __post_init__(self) -> None:
        expect_shapes(self, {"drawn": "S", "labelled": "S", "misclassified": "S"})


@dataclass(frozen=True, eq=False)
class Verdicts:
    """Per component: is it a failure scenario, and which label is right there (§4.1)."""

    labels: I64  # (S,) label of an accepted scenario, NONE_OF_THE_ABOVE for a rejected one
    misclassified: F64  # (S,) share of the labelled images that f gets wrong; nan where none has a label
    purity: F64  # (S,) share of the reviewed images whose own label is the scenario's (majority) label
    image_labels: I64  # (S, R) by review.consensus; NONE_OF_THE_ABOVE where tied or no class chosen
    agreement: F64  # (S, R) share of votes for the majority or a tied label (§4.4); nan with fewer than two
    ties: int  # images without a label because their vote was tied
    no_class_chosen: int  # images without a label since nobody chose a class: none-of-the-above, or no answer
    reasons: tuple[str, ...]  # (S,) one line each: why accepted or rejected
    overrides: tuple[Override, ...]  # oldest first
    labelled: I64  # (S,) images that the share rests on, further draws included
    false_share: float = 0.0  # expected share of accepted scenarios whose true share is at most rho
    # images that the labelled ones are anchored at, or their tracks; None where decoded plainly
    units: I64 | None = None  # (S,)
    failing_units: I64 | None = None  # (S,) of those, the ones whose images are misclassified in over rho

    def __post_init__(self) -> None:
        expect_shapes(
            self,
            {"labels": "S", "misclassified": "S", "purity": "S", "image_labels": "S R", "agreement": "S R"},
        )

    @property
    def accepted(self) -> I64:
        """(A,) indices of the failure scenarios among the components."""
        return np.flatnonzero(self.labels != NONE_OF_THE_ABOVE).astype(np.int64)
