"""Finished runs without their steps: a briefly trained classifier as the corrected one, a damaged copy as original."""

from __future__ import annotations

import dataclasses
import io
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from defuse_core.artifacts import (
    Gallery,
    Models,
    Psi,
    Scenarios,
    Sweep,
    SweepRow,
    Verdicts,
    Votes,
    Weights,
)
from defuse_core.codec import encode
from defuse_core.config import RunFile
from defuse_core.data import Splits
from defuse_core.distill.draws import gaussian_codes
from defuse_core.models import accuracy, decode_codes, encode_images, load_classifier, load_vae, predict
from defuse_core.review.sample import sample_corrections
from defuse_core.runs import Run
from defuse_core.store import FolderStore, Store
from services.serving.candidate import Candidate
from services.serving.registry import Registry
from services.serving.registry_state import PromotionRequest, RegistryState
from tests.sample_components import sample_scenarios


def copied_store(store: FolderStore, folder: Path) -> FolderStore:
    """Return a copy of the store in an empty folder."""
    shutil.copytree(store.folder, folder, dirs_exist_ok=True)
    return FolderStore(folder)


def make_run(
    store: Store, name: str, spec: RunFile, models: Models, splits: Splits, corrected: Weights
) -> Run:
    """Return a finished run whose corrected classifier has the weights `corrected`; where empty, nothing was corrected.

    Its two accepted scenarios are Gaussians of the training images of two classes, which the original confuses.
    """
    vae = load_vae(spec, models.vae)
    codes = encode_images(vae, splits.train)
    scenarios = _components(codes, splits.train.labels, (3, 8, 1))
    weights = swap_classes(models.classifier, (3, 8))
    original = load_classifier(spec, weights, 10)
    right = {part: accuracy(original, images) for part, images in splits.parts().items()}
    before = dataclasses.replace(models, classifier=weights, accuracy=right)
    drawn = np.stack([_drawn(scenarios, component) for component in range(3)])
    images = decode_codes(vae, drawn.reshape(-1, drawn.shape[2]))
    predicted = predict(original, images).reshape(drawn.shape[:2])
    shaped = images.reshape(*drawn.shape[:2], *images.shape[1:])
    verdicts = _verdicts(np.array([3, 8, -1]), drawn.shape[1])
    run = Run.start(store, name, spec)
    for artefact in (
        before,
        Psi(np.array([300, 216]), 1000, 50_000, 120, 70, 5.0),
        scenarios,
        Gallery(shaped, drawn, predicted, models.classes),
        _votes(),
        verdicts,
        sample_corrections(spec, scenarios, verdicts),
        Sweep((), SweepRow(1.0, 2, 0.1, 0.99, 0.98, 0.98, 1.0, 0.95) if corrected else None, corrected, ()),
    ):
        run.store.write(f"{type(artefact).__name__.lower()}.safetensors", encode(artefact))
    run.store.write("baseline.safetensors", encode(Sweep((), None, {}, ())))
    return run


def _components(codes: np.ndarray, labels: np.ndarray, classes: tuple[int, ...]) -> Scenarios:
    groups = [codes[labels == label].astype(np.float64) for label in classes]
    covariances = np.stack([np.cov(group.T) * 0.3 + 1e-3 * np.eye(codes.shape[1]) for group in groups])
    weights = np.full(len(classes), 1 / len(classes))
    return sample_scenarios(
        weights, np.stack([g.mean(0) for g in groups]), covariances, weights, len(codes), True, 1, 0.0
    )


def _drawn(scenarios: Scenarios, component: int) -> np.ndarray:
    return gaussian_codes(scenarios, component, 5, 0.3, np.random.default_rng(component))


def _votes() -> Votes:
    none = np.zeros(0, np.int64)
    return Votes(none, none, none, none, np.zeros(0), (), "reference models", {})


def _verdicts(labels: np.ndarray, images: int) -> Verdicts:
    count = len(labels)
    ones = np.ones((count, images))
    return Verdicts(
        labels=labels.astype(np.int64),
        misclassified=np.ones(count),
        purity=np.ones(count),
        image_labels=np.repeat(labels[:, None], images, axis=1).astype(np.int64),
        agreement=ones,
        ties=0,
        no_class_chosen=0,
        reasons=("planted",) * count,
        overrides=(),
        labelled=np.full(count, images),
    )


def swap_classes(weights: Weights, pair: tuple[int, int]) -> Weights:
    """Return the weights of a classifier that confuses the two classes of the pair."""
    swapped = {name: array.copy() for name, array in weights.items()}
    last = sorted(name.removesuffix(".bias") for name in weights if name.endswith(".bias"))[-1]
    for kind in ("weight", "bias"):
        swapped[f"{last}.{kind}"][list(pair)] = weights[f"{last}.{kind}"][list(pair[::-1])]
    return swapped


def perturb_weights(weights: Weights, seed: int) -> Weights:
    """Return weights that differ, and answer almost always alike."""
    rng = np.random.default_rng(seed)
    return {name: (a + 1e-4 * rng.standard_normal(a.shape)).astype(a.dtype) for name, a in weights.items()}


def overflow_weights(weights: Weights) -> Weights:
    """Return finite weights whose answers are finite for a black image only."""
    first = {"0.weight": np.full_like(weights["0.weight"], 1e38), "0.bias": np.zeros_like(weights["0.bias"])}
    return weights | first


def png(pixels: np.ndarray) -> bytes:
    """Return (1 or 3, H, W) in [0, 1] as a PNG file."""
    levels = np.round(pixels * 255).astype(np.uint8)
    picture = Image.fromarray(levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def assign(registry: Registry, number: int, request: PromotionRequest) -> RegistryState:
    """Give a version its role, as after checks that all passed."""
    return registry.assign(number, request, (), registry.state())


def unverified(_: Candidate) -> None:
    """Accept any version for a rollback."""
