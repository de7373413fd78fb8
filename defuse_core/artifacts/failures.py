"""Artefacts of identify and distill: failing codes, and the components that they form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from defuse_core.artifacts.arrays import F32, F64, I64, U8, Bool, expect_shapes


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
        track = None if self.track is None else self.track[rows]
        return Anchors(self.pixels[rows], self.source[rows], self.held_out[rows], track)


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

    def take(self, rows: I64 | Bool) -> Failures:
        """Return the failures of `rows`."""
        track = None if self.source_track is None else self.source_track[rows]
        return Failures(
            self.codes[rows],
            self.source[rows],
            self.truth[rows],
            self.predicted[rows],
            self.source_wrong[rows],
            track,
        )

    @staticmethod
    def concatenate(parts: Sequence[Failures]) -> Failures:
        """Return the failures of all parts, in order; source_track is None where a part with failures lacks it."""
        held = [part for part in parts if len(part)] or list(parts)
        track = [part.source_track for part in held if part.source_track is not None]
        return Failures(
            np.concatenate([part.codes for part in parts]),
            np.concatenate([part.source for part in parts]),
            np.concatenate([part.truth for part in parts]),
            np.concatenate([part.predicted for part in parts]),
            np.concatenate([part.source_wrong for part in parts]),
            np.concatenate(track) if track and len(track) == len(held) else None,
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
    index: int = -1  # which shard of the training set this is
    fingerprint: str = ""  # of the models, noise and images that it was made with


@dataclass(frozen=True, eq=False)
class Psi:
    """The record of identification: how many codes each shard holds. The codes stay in the store, shard by shard."""

    codes: I64  # (G,) |Ψ| of each shard, in the order of the training set
    images: int
    decodings: int
    images_with_any: int
    zero_noise_flips: int
    worker_seconds: float  # summed over workers
    failing: int = 0  # failing draws before screening; without it and without a cap the same as total
    fingerprint: str = ""  # of every shard

    @property
    def total(self) -> int:
        return int(self.codes.sum())


@dataclass(frozen=True)
class DroppedComponent:
    """A component of weight over ε, or a cell too small for one, that reviewers do not see."""

    weight: float  # share of all codes
    source: int  # class of its source images, NONE_OF_THE_ABOVE for a single mixture
    answer: int  # of f, likewise
    support: int  # distinct training images that its codes come from
    reason: str
    right: bool  # its draws are of one class and f is right on them, at every tau
    small: bool  # its codes, or the training images that they come from, are too few for a scenario


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

    def dropped_component(self, row: int, reason: str, *, right: bool = False) -> DroppedComponent:
        """Return the component of one row, large enough for a scenario, as one that is dropped for `reason`."""
        source, answer = self.cells[row].tolist()
        return DroppedComponent(
            float(self.weights[row]),
            source,
            answer,
            int(self.support[row]),
            reason,
            right=right,
            small=False,
        )
