"""The artefacts: what one step stores and another one reads.

Axis letters, used in every shape comment of the project:

    N images   C classes   H, W height and width   Z latent dimensions   Q draws per image
    F failures (codes in Psi)   K mixture components   S components kept (candidate scenarios)
    R review images per scenario   A accepted scenarios   G shards of the training set   V votes
    W reference models (or judges)   D components dropped before review
    M training images that codes are anchored at   L failures kept of each component
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from defuse_core.anchors import Anchors, ComponentFailures
from defuse_core.arrays import F32, F64, I64, NO_SCENARIO, NONE_OF_THE_ABOVE, U8, Bool, Weights, expect_shapes


@dataclass(frozen=True)
class Health:
    """How well the β-VAE draws the training images that f is judged on. Shares are fractions of `images`."""

    images: int  # training images measured
    originals_right: float  # share that f gets right
    reconstructions_right: float  # share whose plain reconstruction f gets right
    kept_right: float  # among images that f gets right: share whose reconstruction it gets right too
    most_common_answer: int  # class that f gives most reconstructions
    most_common_share: float  # share of reconstructions that get it
    collapsed: int  # latent dimensions with a KL to the prior near 0
    dimensions: int  # Z
    verdict: str  # fit, poor or blind
    anchored: bool = False  # vae.decode: anchored, where a reconstruction is the image as the noise moves it
    judged_by: str = "classifier"  # who is right above: the classifier, or the reference models


@dataclass(frozen=True)
class ClassifierEpoch:
    """One epoch of training the classifier."""

    epoch: int  # from 1
    loss: float  # mean cross-entropy, nats per image
    validation: float | None = None  # accuracy; None where the data set has no validation images


@dataclass(frozen=True)
class VaeEpoch:
    """One epoch of training the β-VAE: the two terms of its loss in nats per image, and β after the epoch."""

    epoch: int  # from 1
    reconstruction: float
    kl: float
    beta: float
    class_loss: float | None = None  # cross-entropy of the class head on the codes; None without one
    guide_loss: float | None = None  # the same of the reference models on decodings; None without


@dataclass(frozen=True, eq=False)
class Models:
    """The classifier f and the β-VAE (encoder q, decoder p) as weights, with the figures of their training.

    How to build the modules is in the run file; `load_classifier` and `load_vae` of models put both together.
    """

    classifier: Weights
    vae: Weights
    classes: tuple[str, ...]  # C names
    images: dict[str, int]  # split -> N
    data_fingerprint: str  # of the data set trained on; later steps refuse to work on another
    accuracy: dict[str, float]  # split -> accuracy; a split that the data set lacks is absent
    classifier_history: tuple[ClassifierEpoch, ...]  # empty where a pretrained classifier is used
    vae_history: tuple[VaeEpoch, ...]  # likewise
    reconstruction: float  # mean squared error per pixel of decoding mu, on training images
    reconstruction_flips: float  # share of training images whose plain reconstruction f gets wrong
    kl_per_dimension: F64  # (Z,) mean KL to the prior in nats; near 0 means a collapsed dimension
    device: str = "cpu"  # that they were trained on
    health: Health | None = None  # of the β-VAE; None in runs of versions that did not measure it


@dataclass(frozen=True)
class MeasuredPrecision:
    """What `resources.precision: auto` measured, once per run: seconds of a step of each kind, and the choice."""

    chosen: dict[str, str]  # kind of computation (a field of PrecisionSection) -> "f32" or "bf16"
    f32_seconds: dict[str, float]
    bf16_seconds: dict[str, float]  # inf where bf16 is not possible


@dataclass(frozen=True, eq=False)
class ReferenceSet:
    """Independent classifiers: the reference models, which take part in the method, or the judges, which do not."""

    models: tuple[Weights, ...]  # (W,)
    train_images: int  # that each was trained on
    validation: F64  # (W,) accuracy on validation images; nan without any
    test: F64  # (W,) accuracy on test images; nan without any


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A classifier or β-VAE in the middle of its training, after a whole epoch."""

    weights: Weights
    moments: Weights  # of the optimiser
    history: tuple[ClassifierEpoch, ...] | tuple[VaeEpoch, ...]  # one row per finished epoch
    best: Weights  # of the best epoch so far, where one is kept; else empty
    data_fingerprint: str  # of the images that it is trained on


@dataclass(frozen=True, eq=False)
class Failures:
    """Latent codes whose decoding the classifier gets wrong: the paper's Ψ (§3.2.1)."""

    codes: F32  # (F, Z)
    source: I64  # (F,) index into the training set
    truth: I64  # (F,) label of the source image
    predicted: I64  # (F,) never equal to truth
    source_wrong: Bool | None = None  # (F,) whether f gets the source image itself wrong; None where unknown

    def __post_init__(self) -> None:
        expect_shapes(self, {"codes": "F Z", "source": "F", "truth": "F", "predicted": "F"})

    def __len__(self) -> int:
        return len(self.codes)

    def take(self, rows: I64 | Bool) -> Failures:
        """Return the failures of `rows`."""
        wrong = None if self.source_wrong is None else self.source_wrong[rows]
        return Failures(self.codes[rows], self.source[rows], self.truth[rows], self.predicted[rows], wrong)

    @staticmethod
    def concatenate(parts: Sequence[Failures]) -> Failures:
        """Return the failures of all parts, in order; source_wrong is None where a part with failures lacks it."""
        held = [part.source_wrong for part in parts if len(part)]
        wrong = [of_part for of_part in held if of_part is not None]
        return Failures(
            np.concatenate([part.codes for part in parts]),
            np.concatenate([part.source for part in parts]),
            np.concatenate([part.truth for part in parts]),
            np.concatenate([part.predicted for part in parts]),
            np.concatenate(wrong) if wrong and len(wrong) == len(held) else None,
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


@dataclass(frozen=True, eq=False)
class Scenarios:
    """Components of the Dirichlet-process mixture with weight over ε: the paper's Λ (§3.2.2)."""

    weights: F64  # (S,)
    means: F64  # (S, Z)
    covariances: F64  # (S, Z, Z)
    all_weights: F64  # (K,) before the cut at ε
    codes_used: int  # rows of Ψ that the mixture was fitted on
    converged: bool
    iterations: int
    lower_bound: float | None  # of the fit's likelihood; None where it is not finite
    cells: I64 | None = None  # (S, 2) class of the source images, answer of f; -1 each for a single mixture
    support: I64 | None = None  # (S,) distinct training images that the codes of a component come from
    source_error: F64 | None = None  # (S,) share of these that f gets wrong in the image itself
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
        per_component = {
            name: value[rows]
            for name in ("weights", "means", "covariances", "cells", "support", "source_error", "taus")
            if (value := getattr(self, name)) is not None
        }
        failures = None if self.failures is None else self.failures.take(rows)
        return replace(self, **per_component | {"failures": failures} | changed)


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

    def __post_init__(self) -> None:
        expect_shapes(self, {"images": "S R c H W", "codes": "S R Z", "predicted": "S R"})

    def __len__(self) -> int:
        return len(self.images)

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
    """Further images of components whose verdict is in doubt, as reference models label them (counts only)."""

    drawn: I64  # (S,) 0 where the gallery settles the verdict
    labelled: I64  # (S,) of those, the images with a majority label
    misclassified: I64  # (S,) of those, the images that f gets wrong

    def __post_init__(self) -> None:
        expect_shapes(self, {"drawn": "S", "labelled": "S", "misclassified": "S"})


@dataclass(frozen=True, eq=False)
class Verdicts:
    """Per component: is it a failure scenario, and which label is right there (§4.1)."""

    labels: I64  # (S,) label of an accepted scenario, NONE_OF_THE_ABOVE for a rejected one
    misclassified: F64  # (S,) share of the labelled images that f gets wrong; nan where none has a label
    purity: F64  # (S,) share of the reviewed images whose own label is the scenario's (majority) label
    image_labels: I64  # (S, R) majority over annotators; NONE_OF_THE_ABOVE where tied or no class chosen
    agreement: F64  # (S, R) share of votes, none-of-the-above left out, for the majority label (§4.4); nan where none
    ties: int  # images without a label because their vote was tied
    no_class_chosen: int  # images without a label since nobody chose a class: none-of-the-above, or no answer
    reasons: tuple[str, ...]  # (S,) one line each: why accepted or rejected
    overrides: tuple[Override, ...]  # oldest first
    labelled: I64 | None = None  # (S,) images that the share rests on, further draws included
    lower: F64 | None = None  # (S,) lower 95 % bound (Wilson) of the share misclassified
    false_share: float = 0.0  # expected share of accepted scenarios whose true share is at most rho

    def __post_init__(self) -> None:
        expect_shapes(
            self,
            {"labels": "S", "misclassified": "S", "purity": "S", "image_labels": "S R", "agreement": "S R"},
        )

    @property
    def accepted(self) -> I64:
        """(A,) indices of the failure scenarios among the components."""
        return np.flatnonzero(self.labels != NONE_OF_THE_ABOVE).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Corrections:
    """D_f as latent codes: per accepted scenario, codes to tune on and others to test on (§3.2.3)."""

    scenario: I64  # (A,) index into Scenarios
    labels: I64  # (A,)
    tune: F32  # (A, n_tune, Z)
    test: F32  # (A, n_test, Z)
    kept: F64 | None = None  # (A,) share of the draws that correct.filter keeps; None without the filter
    anchors: Anchors | None = None  # with vae.decode: anchored; None where codes are decoded plainly
    tune_anchor: I64 | None = None  # (A, n_tune) index into anchors
    test_anchor: I64 | None = None  # (A, n_test) likewise; other images, where a scenario has several

    def __post_init__(self) -> None:
        expect_shapes(self, {"scenario": "A", "labels": "A", "tune": "A n Z", "test": "A m Z"})

    def take(self, rows: I64) -> Corrections:
        """Return the corrections of the accepted scenarios `rows`."""
        per_scenario = {
            name: value[rows]
            for name in ("scenario", "labels", "tune", "test", "kept", "tune_anchor", "test_anchor")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **per_scenario)


@dataclass(frozen=True)
class SweepRow:
    """One epoch of fine-tuning with one λ. Accuracies are None where the data set has no such images."""

    lam: float
    epoch: int  # from 1
    loss: float
    train: float
    validation: float | None
    test: float | None
    tune: float  # accuracy on the scenario images tuned on
    scenario: float  # accuracy on the held-out scenario images


@dataclass(frozen=True)
class FailedTrial:
    """A λ that the sweep leaves out, and the error that ended its trial."""

    lam: float
    cause: str


@dataclass(frozen=True, eq=False)
class Trial:
    """Fine-tuning with one λ after some epochs: enough to resume it, and to choose from."""

    lam: float
    rows: tuple[SweepRow, ...]  # one per finished epoch
    weights: Weights  # after the last finished epoch
    moments: Weights  # of the optimiser, likewise; empty once the trial is done
    best: Weights  # after the epoch that the rule of choice picks
    best_epoch: int
    done: bool


@dataclass(frozen=True, eq=False)
class Sweep:
    """Fine-tuning over λ: one row per λ and epoch, and the weights that the rule of choice picks."""

    rows: tuple[SweepRow, ...]
    chosen: SweepRow | None  # the row whose weights these are; None where nothing was tuned
    weights: Weights  # of the classifier; empty where nothing was tuned
    failed: tuple[FailedTrial, ...]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The figures of §4 that need a model or a fit; `report.build_report` turns them and the rest into the report.

    Models are in the order before, baseline, defuse. A figure that does not exist is nan.
    """

    accuracy: F64  # (3, 3) model x (validation, test, scenario)
    per_class: F64  # (3, C) accuracy on the test images of each class
    per_class_images: I64  # (C,) test images of each class
    scenario: F64  # (3, A) accuracy on the held-out images of each accepted scenario
    gallery_after: I64  # (S, R) answers of the corrected classifier on the reviewed images
    points: F32  # (P, 2) t-SNE of training codes, then codes of Psi, then component means
    point_kind: I64  # (P,) 0 training image, 1 code of Psi, 2 accepted scenario, 3 rejected component
    point_component: I64  # (P,) class of a training image; likeliest component of a Psi code; else itself
