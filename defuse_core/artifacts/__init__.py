"""The artefacts: what one step stores and another one reads.

Axis letters, used in every shape comment of the project:

    N images   C classes   H, W height and width   Z latent dimensions   Q draws per image
    F failures (codes in Psi)   K mixture components   S components kept (candidate scenarios)
    R review images per scenario   A accepted scenarios   G shards of the training set   V votes
    W reference models (or judges)   D components dropped before review
    M training images that codes are anchored at   L failures kept of each component

Those of identify, distill and review are in scenarios.py, beside the array types. Those of training and of correct are
here: the models, the codes to tune on, the sweep over λ, and what the models are worth after it. Stored as well, but
defined where they are made: Evidence (evaluation), FailureWatch (watch), Prelabels and TrainedClassifier
(training/reference_models), SuitePictures (export), Candidate and SampledInput (services/serving).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from defuse_core.artifacts.scenarios import (
    F32,
    F64,
    I64,
    NO_SCENARIO,
    NONE_OF_THE_ABOVE,
    SAMPLE_INDEX,
    U8,
    Anchors,
    Bool,
    Cause,
    ComponentFailures,
    DroppedComponent,
    Failures,
    Gallery,
    MoreImages,
    Override,
    Psi,
    Scenarios,
    Shard,
    Verdicts,
    Votes,
    Weights,
    expect_shapes,
    rows_of,
)


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
    # mean of kept_right over the classes, where this decides the verdict, and the class that is kept least often there
    kept_on_average: float | None = None
    least_kept: int | None = None

    @property
    def kept(self) -> float:
        """The share that the verdict rests on."""
        return self.kept_right if self.kept_on_average is None else self.kept_on_average


@dataclass(frozen=True)
class ClassifierEpoch:
    """One epoch of training the classifier."""

    epoch: int  # from 1
    loss: float  # mean cross-entropy, nats per image
    validation: float | None = None  # accuracy; None where the data set has no validation images
    guesses: bool = False  # hardly more on these images, by the mean over the classes


@dataclass(frozen=True)
class VaeEpoch:
    """One epoch of training the β-VAE: the two terms of its loss in nats per image, and β after the epoch."""

    epoch: int  # from 1
    reconstruction: float
    kl: float
    beta: float
    class_loss: float | None = None  # cross-entropy of the class head on the codes; None without one


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
    health: Health  # of the β-VAE
    device: str = "cpu"  # that they were trained on
    # split -> (C,) share of the images of each class that the classifier gets right; nan for a class without images
    class_accuracy: dict[str, F64] = field(default_factory=dict)
    # the validation images were held out of those that a classifier may know that the run did not train
    validation_from_training: bool = False
    class_images: dict[str, I64] = field(kw_only=True)  # split -> (C,) images of each class

    @property
    def balanced_accuracy(self) -> dict[str, float]:
        """Mean of each part's class accuracies, of classes with images there; 1/classes where answers are constant."""
        return {part: float(np.nanmean(each)) for part, each in self.class_accuracy.items()}


@dataclass(frozen=True)
class MeasuredPrecision:
    """What `resources.precision: auto` measured, once per run."""

    chosen: dict[str, str]  # kind of computation (a field of PrecisionSection) -> "f32" or "bf16"


@dataclass(frozen=True, eq=False)
class ReferenceSet:
    """Independent classifiers: the reference models, which take part in the method, or the judges, which do not."""

    models: tuple[Weights, ...]  # (W,)
    train_images: int  # that each was trained on
    validation: F64  # (W,) accuracy on validation images; nan without any
    test: F64  # (W,) accuracy on test images; nan without any
    class_accuracy: dict[str, F64] = field(default_factory=dict)  # validation, test -> (W, C) as of Models


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A classifier or β-VAE in the middle of its training, after a whole epoch."""

    weights: Weights
    moments: Weights  # of the optimiser
    history: tuple[ClassifierEpoch, ...] | tuple[VaeEpoch, ...]  # one row per finished epoch
    best: Weights  # of the best epoch so far, where one is kept; else empty
    data_fingerprint: str  # of the images that it is trained on


@dataclass(frozen=True, eq=False)
class Corrections:
    """D_f as latent codes: per accepted scenario, codes to tune on and others to test on (§3.2.3).

    The corrected classifier is in Sweep.
    """

    scenario: I64  # (A,) index into Scenarios
    labels: I64  # (A,)
    tune: F32  # (A, n_tune, Z)
    test: F32  # (A, n_test, Z)
    kept: F64 | None = None  # (A,) share of the draws that correct.filter keeps; None without the filter
    anchors: Anchors | None = None  # with vae.decode: anchored; None where codes are decoded plainly
    tune_anchor: I64 | None = None  # (A, n_tune) index into anchors
    test_anchor: I64 | None = None  # (A, n_test) likewise; other images, where a scenario has several
    # (M,) training images that held-out draws may be anchored at, in `test` or elsewhere; None with plain decoding
    held_out: I64 | None = None
    unreviewed: Failures | None = None  # codes of Ψ to tune on, too; None without correct.unreviewed

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

    def sources(self) -> tuple[I64, I64]:
        """Return the training images at which only held-out scenario images may be anchored, and those of D_f.

        Both are empty with plain decoding.
        """
        none = np.zeros(0, np.int64)
        if self.anchors is None or self.tune_anchor is None:
            return none, none
        tuned: I64 = np.unique(self.anchors.source[self.tune_anchor])
        held_out = np.union1d(self.anchors.source, none if self.held_out is None else self.held_out)
        return np.setdiff1d(held_out, tuned), tuned


@dataclass(frozen=True)
class SweepRow:
    """One epoch of fine-tuning with one λ.

    An accuracy is None where the data set has no such images. All are None, and class_loss is 0, after an epoch that
    the rule of choice cannot pick (correct.schedule, choose_by): scoring takes as long as a third of its training.
    """

    lam: float
    epoch: int  # from 1
    loss: float
    train: float | None = None
    validation: float | None = None
    test: float | None = None
    tune: float | None = None  # accuracy on the scenario images tuned on
    scenario: float | None = None  # accuracy on the held-out scenario images
    class_loss: float = 0.0  # accuracy that some class has certainly lost on training or on validation images

    @property
    def is_scored(self) -> bool:
        return self.train is not None


@dataclass(frozen=True)
class FailedTrial:
    """A λ that the sweep leaves out, and the error that ended its trial."""

    lam: float
    cause: str


@dataclass(frozen=True, eq=False)
class Trial:
    """Fine-tuning with one λ after some epochs: enough to resume it, and to choose from.

    A trial of Ray Tune is of a stack of λ.
    """

    lam: float
    rows: tuple[SweepRow, ...]  # one per finished epoch
    weights: Weights  # after the last finished epoch; empty once the trial is done
    moments: Weights  # of the optimiser, likewise; empty once the trial is done
    best: Weights  # after the epoch that the rule of choice picks
    best_epoch: int  # from 1; 0 before an epoch is scored
    done: bool


@dataclass(frozen=True, eq=False)
class Sweep:
    """Fine-tuning over λ: one row per λ and epoch, and the weights that the rule of choice picks."""

    rows: tuple[SweepRow, ...]
    chosen: SweepRow | None  # whose weights these are; None: nothing was tuned, or no λ is within max_loss
    weights: Weights  # of the classifier; empty where `chosen` is None
    failed: tuple[FailedTrial, ...]

    @property
    def has_correction(self) -> bool:
        return self.chosen is not None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The figures of §4 that need a model or a fit; `report.build_report` turns them and the rest into the report.

    Models are in the order before, baseline, defuse. A figure that does not exist is nan.
    The t-SNE has P points.
    """

    accuracy: F64  # (3, 3) model x (validation, test, scenario)
    per_class: F64  # (3, C) accuracy on the test images of each class
    per_class_images: I64  # (C,) test images of each class
    scenario: F64  # (3, A) accuracy on the held-out images of each accepted scenario
    gallery_after: I64  # (S, R) answers of the corrected classifier on the reviewed images
    points: F32  # (P, 2) t-SNE of training codes, then codes of Psi, then component means
    point_kind: I64  # (P,) 0 training image, 1 code of Psi, 2 accepted scenario, 3 rejected component
    point_component: I64  # (P,) class of a training image; likeliest component of a Psi code; else itself
    # (C,) accuracy that each class certainly lost on test images; None with few classes, for which per_class is enough
    class_loss: F64 | None = None
