"""Array types; the artefacts of identify, distill and review: failing codes, the components that they form,
the images that people label, their answers, and the verdicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]
Weights = dict[str, npt.NDArray[Any]]  # a torch state dict as arrays

NO_SCENARIO = -1  # takes the place of a component's number
SAMPLE_INDEX = -1  # takes the place of a shard's number
NONE_OF_THE_ABOVE = -1  # an answer, and also "no label" wherever a label is expected


def expect_shapes(owner: object, axes: dict[str, str]) -> None:
    """Bind each axis letter to the first length seen and raise ValueError where a later one differs."""
    bound: dict[str, int] = {}
    for name, letters in axes.items():
        shape = getattr(owner, name).shape
        expected = letters.split()
        if len(shape) != len(expected):
            raise ValueError(f"{type(owner).__name__}.{name}: expected axes ({letters}), found shape {shape}")
        for letter, length in zip(expected, shape, strict=True):
            if bound.setdefault(letter, length) != length:
                raise ValueError(
                    f"{type(owner).__name__}.{name}: axis {letter} has length {length}, elsewhere {bound[letter]}"
                )


def rows_of(owner: Any, rows: slice | I64 | Bool) -> dict[str, Any]:
    """Return `rows` of each array of an artefact, by the names of its fields; fields that are None are left out."""
    values = {each.name: getattr(owner, each.name) for each in fields(owner)}
    return {name: value[rows] for name, value in values.items() if value is not None}


@dataclass(frozen=True, eq=False)
class Anchors:
    """Training images that codes are decoded at (vae.decode: anchored)."""

    pixels: U8 | F32  # (M, channels, H, W), uint8 0 to 255 or float32 in [0, 1], as in Images
    source: I64  # (M,) index into the training set, ascending
    held_out: Bool  # (M,) whether held-out draws are anchored there
    track: I64 | None = None  # (M,) as Images.tracks; None where they have none

    def __post_init__(self) -> None:
        expect_shapes(self, {"pixels": "M c H W", "source": "M", "held_out": "M"})

    @property
    def unit(self) -> I64:
        """(M,) the track of each image, or its index into the training set where images have no tracks."""
        return self.source if self.track is None else self.track

    def take(self, rows: I64) -> Anchors:
        """Return the images `rows`."""
        return replace(self, **rows_of(self, rows))


@dataclass(frozen=True, eq=False)
class ComponentFailures:
    """Failures of each component, L of each (repeated where it has fewer): what its draws are anchored at."""

    codes: F32  # (S, L, Z)
    anchor: I64  # (S, L) index into anchors
    anchors: Anchors

    def __post_init__(self) -> None:
        expect_shapes(self, {"codes": "S L Z", "anchor": "S L"})

    def take(self, rows: I64) -> ComponentFailures:
        """Return the failures of the components `rows`, with the images that they need."""
        used, anchor = np.unique(self.anchor[rows], return_inverse=True)
        shape = self.anchor[rows].shape
        return ComponentFailures(self.codes[rows], anchor.reshape(shape), self.anchors.take(used))

    def held_out_anchors(self, rows: I64) -> Anchors:
        """Return the images that held-out draws of the components `rows` may be anchored at."""
        anchors = self.take(rows).anchors
        return anchors.take(np.flatnonzero(anchors.held_out))


@dataclass(frozen=True, eq=False)
class Failures:
    """Latent codes whose decoding the classifier gets wrong: the paper's Ψ (§3.2.1)."""

    codes: F32  # (F, Z)
    source: I64  # (F,) index into the training set
    truth: I64  # (F,) label of the source image
    predicted: I64  # (F,) never equal to truth
    source_wrong: Bool  # (F,) whether f gets the source image itself wrong
    source_track: I64 | None = None  # (F,) track of the source image; None without tracks

    def __post_init__(self) -> None:
        names = ("source", "truth", "predicted", "source_wrong")
        expect_shapes(self, {"codes": "F Z"} | dict.fromkeys(names, "F"))

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def unit(self) -> I64:
        """(F,) as Anchors.unit, of the source images."""
        return self.source if self.source_track is None else self.source_track

    def take(self, rows: slice | I64 | Bool) -> Failures:
        """Return the failures of `rows`."""
        return replace(self, **rows_of(self, rows))

    @classmethod
    def none(cls, width: int) -> Failures:
        """Return no failures of codes of `width` dimensions."""
        nothing: I64 = np.zeros(0, np.int64)
        return cls(np.zeros((0, width), np.float32), nothing, nothing, nothing, np.zeros(0, np.bool_))

    @staticmethod
    def concatenate(parts: Sequence[Failures]) -> Failures:
        """Return the failures of all parts, in order; source_track is None where a part with failures lacks it."""
        held = [part for part in parts if len(part)] or list(parts)
        track = [part.source_track for part in held if part.source_track is not None]
        names = ("codes", "source", "truth", "predicted", "source_wrong")
        return Failures(
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names},
            source_track=np.concatenate(track) if track and len(track) == len(held) else None,
        )


@dataclass(frozen=True, eq=False)
class Shard:
    """The result of identification on one shard, which is a range of consecutive blocks of training images."""

    failures: Failures
    images: int
    decodings: int
    images_with_any: int  # images with at least one failing draw
    zero_noise_flips: int  # images that f gets wrong when mu itself is decoded
    seconds: float
    failing: int = 0  # failing draws before screening; `failures` holds those kept
    wrong: int = 0  # images that f gets wrong themselves
    wrong_decoded: int = 0  # of these, those that it gets wrong when mu is decoded as well
    wrong_kept: int = 0  # of those that f gets wrong, the ones with a code in `failures`
    index: int = SAMPLE_INDEX  # which shard of the training set this is; SAMPLE_INDEX: a sample of all
    fingerprint: str = ""  # of the models, noise and images that it was made with


@dataclass(frozen=True, eq=False)
class Psi:
    """The record of identification: how many codes each shard holds. The codes stay in the store, shard by shard.

    Of all shards, or, as a worker returns it, of one (G = 1).
    """

    codes: I64  # (G,) |Ψ| of each shard, in the order of the training set
    images: int
    decodings: int
    images_with_any: int
    zero_noise_flips: int
    worker_seconds: float  # summed over workers
    failing: int = 0  # failing draws before screening; without it and without a cap the same as total
    wrong: int = 0  # as in Shard, and so are the next two
    wrong_decoded: int = 0
    wrong_kept: int = 0
    fingerprint: str = ""  # of every shard

    @property
    def total(self) -> int:
        return int(self.codes.sum())


Cause = Literal[
    "few codes",  # too few for a component or a scenario, of images or tracks enough for one
    "few images",  # the training images, or tracks, that its codes come from are too few for a scenario
    "undivided",  # its photographs cannot be parted into those to review and those to hold out
    "uncertain",  # so few photographs or tracks to review that no verdict could be certain
    "unclear",  # at every tau its draws are of several classes, or f is right on too many of them
    "right",  # its draws are of one class and f is right on them, at every tau
]


@dataclass(frozen=True)
class DroppedComponent:
    """A component of weight over ε, or a cell (or many together) too small for one, that reviewers do not see."""

    weight: float  # share of all codes
    source: int  # class of its source images, NONE_OF_THE_ABOVE for a single mixture and for many cells
    answer: int  # of f, likewise
    support: int  # distinct training images that its codes come from; of many cells the sum
    cause: Cause
    reason: str  # the cause in words, for people

    @property
    def small(self) -> bool:
        """Whether its codes, or the training images that they come from, are too few for a scenario."""
        return self.cause in ("few codes", "few images")


@dataclass(frozen=True, eq=False)
class Scenarios:
    """The paper's Λ (§3.2.2): the components with weight over ε, to be reviewed. `Verdicts` accept some of them."""

    weights: F64  # (S,)
    means: F64  # (S, Z)
    covariances: F64  # (S, Z, Z)
    all_weights: F64  # (K,) before the cut at ε
    codes_used: int  # rows of Ψ that the mixture was fitted on
    converged: bool
    iterations: int
    lower_bound: float | None  # of the fit's likelihood; None where it is not finite
    cells: I64  # (S, 2) class of the source images, answer of f; -1 each for a single mixture
    support: I64  # (S,) distinct training images that the codes of a component come from
    source_error: F64  # (S,) share of these that f gets wrong in the image itself
    all_means: F64  # (K, Z) of all_weights
    all_covariances: F64  # (K, Z, Z)
    source_tracks: I64 | None = None  # (S,) tracks of these images; None without tracks
    wrong_tracks: F64 | None = None  # (S,) how many of these tracks f gets most of these images of wrong
    taus: F64 | None = None  # (S,) tau that each component is drawn with; None: review.tau
    dropped: tuple[DroppedComponent, ...] = ()  # (D,) before review, each with the reason
    failures: ComponentFailures | None = None  # with vae.decode: anchored; None where decoded plainly
    last_change: float | None = None  # of a bound in its last iteration, nats; the largest over the fits

    def __post_init__(self) -> None:
        expect_shapes(self, {"weights": "S", "means": "S Z", "covariances": "S Z Z"})

    def __len__(self) -> int:
        return len(self.weights)

    def take(self, rows: I64, **changed: Any) -> Scenarios:
        """Return the components `rows`, with the fields of `changed` replaced."""
        names = ("weights", "means", "covariances", "cells", "support", "source_error", "taus")
        per_component = {
            name: value[rows]
            for name in (*names, "source_tracks", "wrong_tracks")
            if (value := getattr(self, name)) is not None
        }
        failures = None if self.failures is None else self.failures.take(rows)
        return replace(self, **per_component | {"failures": failures} | changed)

    @classmethod
    def none(cls, width: int, codes: int, dropped: tuple[DroppedComponent, ...] = ()) -> Scenarios:
        """Return no scenarios over so many codes of `width` dimensions."""
        nothing: F64 = np.zeros(0)
        no_means, no_covariances = np.zeros((0, width)), np.zeros((0, width, width))
        return cls(
            weights=nothing,
            means=no_means,
            covariances=no_covariances,
            all_weights=nothing,
            codes_used=codes,
            converged=True,
            iterations=0,
            lower_bound=0.0,
            cells=np.zeros((0, 2), np.int64),
            support=np.zeros(0, np.int64),
            source_error=nothing,
            all_means=no_means,
            all_covariances=no_covariances,
            dropped=dropped,
        )

    def dropped_component(self, row: int, cause: Cause, reason: str) -> DroppedComponent:
        """Return the component of one row as one that is dropped."""
        source, answer = self.cells[row].tolist()
        return DroppedComponent(
            float(self.weights[row]), source, answer, int(self.support[row]), cause, reason
        )


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

    def answered(self, shape: tuple[int, ...]) -> Bool:
        """Return which images of a gallery of this shape have an answer, (S, R), none-of-the-above included."""
        answered: Bool = np.zeros(shape, np.bool_)
        answered[self.scenario, self.image] = True
        return answered


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
    # (S, review.more_images) as Gallery.unit; None where decoded plainly
    unit: I64 | None = None
    # in the shape of `unit`, and None with it: 1 misclassified, 0 right, -1 without a label or not drawn
    outcome: I64 | None = None

    def __post_init__(self) -> None:
        expect_shapes(self, {"drawn": "S", "labelled": "S", "misclassified": "S"})


@dataclass(frozen=True, eq=False)
class Verdicts:
    """Per component: is it a failure scenario, and which label is right there (§4.1)."""

    labels: I64  # (S,) label of an accepted scenario, NONE_OF_THE_ABOVE for a rejected one
    misclassified: F64  # (S,) share of the labelled images that f gets wrong; nan where none has a label
    purity: F64  # (S,) share of the images with an answer whose own label is the scenario's; nan without one
    image_labels: I64  # (S, R) by review.consensus; NONE_OF_THE_ABOVE where tied or no class chosen
    agreement: F64  # (S, R) share of votes for the majority or a tied label (§4.4); nan with fewer than two
    ties: int  # images without a label because their vote was tied
    no_class_chosen: int  # images without a label since nobody chose a class: none-of-the-above, or no answer
    reasons: tuple[str, ...]  # (S,) one line each: why accepted or rejected
    overrides: tuple[Override, ...]  # oldest first
    labelled: I64  # (S,) images that the share rests on, further draws included
    # expected share, of those that the vote alone accepts, whose true share of misclassified images is at most rho
    false_share: float = 0.0
    # images that the labelled ones are anchored at, or their tracks; None where decoded plainly
    units: I64 | None = None  # (S,)
    failing_units: F64 | None = None  # (S,) sum over those of the share of their images that is misclassified

    def __post_init__(self) -> None:
        expect_shapes(
            self,
            {"labels": "S", "misclassified": "S", "purity": "S", "image_labels": "S R", "agreement": "S R"},
        )

    @property
    def accepted(self) -> I64:
        """(A,) indices of the failure scenarios among the components."""
        return np.flatnonzero(self.labels != NONE_OF_THE_ABOVE).astype(np.int64)
