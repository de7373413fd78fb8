"""Regions of latent space: whether an image is where a failure scenario is, and how far it is from its class.

A scenario's region is the Gaussian of the codes mu(x) that the encoder gives to the scenario's own tuning images. The
mixture component would not do: it was fitted on perturbed codes, and an image decoded from one of them encodes
elsewhere. On two runs on scikit-learn's digits such images were some 24 standard deviations away: at 1 % of ordinary
inputs, the component finds 7 % of the scenario's images, the Gaussian of its own images all of them.

The tuning images may be drawn more widely than those reviewed (correct.widen). That widens a region and the distances
that it is compared with alike.

An input is inside a scenario if its Mahalanobis distance is smaller than that of all but a share of the training
images. So that share of ordinary inputs is inside by construction; `recall` measures the scenario's held-out images.

Axis, beside those of artifacts/__init__.py: E levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from defuse_core.artifacts import F32, F64, I64, Corrections
from defuse_core.config import RunFile
from defuse_core.data import Images
from defuse_core.data.splits import random_rows
from defuse_core.distill.mixture import sample_covariance
from defuse_core.models import Decoder, Vae, encode_images
from defuse_core.seeds import generator

# Dense at small shares.
LEVELS = np.unique(np.concatenate([np.linspace(0, 0.1, 201), np.linspace(0.1, 1, 91)]))
WATCH_IMAGES = 10_000  # training images that the distances are calibrated on, at most
VARIANCE_FLOOR = 1e-3  # share of the mean variance that is added to each: unused dimensions have almost none
# Added at least, so that codes that are all equal have a covariance that can be inverted.
LEAST_VARIANCE = 1e-12
SHRINKAGE = 2  # times Z: images of all classes that the covariance of one class counts beside its own


def mahalanobis(codes: F32, means: F64, covariances: F64) -> F64:
    """Return the distance of every code (n, Z) from every component (A, Z), (A, Z, Z): (n, A)."""
    distances = np.zeros((len(codes), len(means)))
    for j, (mean, covariance) in enumerate(zip(means, covariances, strict=True)):
        whitened = np.linalg.solve(np.linalg.cholesky(covariance), (codes - mean).T)  # (Z, n)
        distances[:, j] = np.linalg.norm(whitened, axis=0)
    return distances


def own_distances(codes: F32, owners: I64, means: F64, covariances: F64) -> F64:
    """Return the `mahalanobis` distance of every code (n, Z) from one component, its owner (n,): (n,)."""
    distances = np.zeros(len(codes))
    for owner in np.unique(owners):
        rows = np.flatnonzero(owners == owner)
        # one code alone twice: LAPACK rounds a single one otherwise than each of several
        several = codes[np.resize(rows, max(2, len(rows)))]
        distances[rows] = mahalanobis(several, means[[owner]], covariances[[owner]])[: len(rows), 0]
    return distances


def training_codes(spec: RunFile, vae: Vae, train: Images) -> tuple[F32, I64]:
    """Return codes (n, Z) and labels (n,) of at most WATCH_IMAGES training images, drawn by seed."""
    rng = generator(spec.seed, "watch")
    chosen = train.take(random_rows(len(train), WATCH_IMAGES, rng))
    return encode_images(vae, chosen), chosen.labels


@dataclass(frozen=True, eq=False)
class ScenarioRegions:
    """The Gaussian of every scenario, and the distances of the training images from it."""

    means: F64  # (A, Z)
    covariances: F64  # (A, Z, Z)
    levels: F64  # (E,) shares of the training images, 0 to 1
    distances: F64  # (A, E) quantiles of the training images' distances at those levels
    recall: F64  # (A, E) share of the scenario's held-out images within those distances


def fit_regions(vae: Vae, corrections: Corrections, ordinary: F32) -> ScenarioRegions:
    """Return the regions of A scenarios, calibrated on the codes `ordinary` (n, Z) of training images."""
    decoder = Decoder(vae, corrections.anchors)
    means, covariances = _fit_gaussians(
        decoder, corrections, VARIANCE_FLOOR * float(ordinary.var(axis=0).mean())
    )
    distances = np.quantile(mahalanobis(ordinary, means, covariances), LEVELS, axis=0).T  # (A, E)
    recall = np.zeros_like(distances)
    for j, codes in enumerate(corrections.test):
        held_out = encode_images(vae, decoder.decode(codes, _row(corrections.test_anchor, j)))
        near = mahalanobis(held_out, means[j : j + 1], covariances[j : j + 1])  # (n, 1)
        recall[j] = (near <= distances[j]).mean(axis=0)
    return ScenarioRegions(means, covariances, LEVELS, distances, recall)


def _row(anchors: I64 | None, scenario: int) -> I64 | None:
    """Return the anchors of the pictures of one scenario, (n,); None where they are decoded plainly."""
    return None if anchors is None else anchors[scenario]


def _fit_gaussians(decoder: Decoder, corrections: Corrections, least: float) -> tuple[F64, F64]:
    """Return mean (A, Z) and covariance (A, Z, Z) of the encodings of the scenarios' images to tune on.

    `least` is the smallest mean variance that counts: correct.filter may leave a scenario a single image.
    """
    latent = corrections.tune.shape[2]
    encoded = [
        encode_images(decoder.vae, decoder.decode(codes, _row(corrections.tune_anchor, j))).astype(np.float64)
        for j, codes in enumerate(corrections.tune)
    ]
    means = [codes.mean(axis=0) for codes in encoded]
    covariances = [
        sample_covariance(codes) + _floor(max(codes.var(axis=0).mean(), least), latent) for codes in encoded
    ]
    return np.array(means).reshape(-1, latent), np.array(covariances).reshape(-1, latent, latent)


def _floor(variance: float, latent: int) -> F64:
    """Return what is added to a covariance of this mean variance, (Z, Z), so that it can be inverted."""
    return max(VARIANCE_FLOOR * variance, LEAST_VARIANCE) * np.eye(latent)


def class_gaussians(codes: F32, labels: I64, classes: int) -> tuple[F64, F64]:
    """Return mean (C, Z) and covariance (C, Z, Z) of the codes (n, Z) of each class.

    Covariances are shrunk towards the one within all classes, and a class without images gets the mean of all.
    """
    latent = codes.shape[1]
    means = np.tile(codes.mean(axis=0, dtype=np.float64), (classes, 1))
    for label in np.unique(labels):
        means[label] = codes[labels == label].mean(axis=0, dtype=np.float64)
    centred = codes - means[labels]
    within = centred.T @ centred / len(codes)
    added = SHRINKAGE * latent
    covariances = np.tile(within, (classes, 1, 1))
    for label in np.unique(labels):
        own = centred[labels == label]
        covariances[label] = (own.T @ own + added * within) / (len(own) + added)
    return means, covariances + _floor(np.trace(within) / latent, latent)
