"""Artefacts of training: the classifier, the β-VAE and the independent models."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from defuse_core.artifacts.arrays import F64, Weights


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
    health: Health  # of the β-VAE
    device: str = "cpu"  # that they were trained on
    # split -> (C,) share of the images of each class that the classifier gets right; nan for a class without images
    class_accuracy: dict[str, F64] = field(default_factory=dict)

    @property
    def balanced_accuracy(self) -> dict[str, float]:
        """Mean of each part's class accuracies: 1/C where the answers do not depend on the image."""
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


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A classifier or β-VAE in the middle of its training, after a whole epoch."""

    weights: Weights
    moments: Weights  # of the optimiser
    history: tuple[ClassifierEpoch, ...] | tuple[VaeEpoch, ...]  # one row per finished epoch
    best: Weights  # of the best epoch so far, where one is kept; else empty
    data_fingerprint: str  # of the images that it is trained on
