"""A biased classifier, the tiny digits and the other arguments of `defuse.debug`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from defuse_core.data import open_splits
from tests.conftest import tiny
from tests.own_classifiers import Net, trained

PREFERRED = 8  # class that the test's classifier sees too often
SETTINGS: dict[str, Any] = {
    "vae": {"epochs": 40, "batch_size": 16, "channels": 8, "latent_dim": 4, "hidden": 64, "beta": 0.3},
    "identify": {"draws": 4, "screen": "none"},
    "distill": {"by": "all", "max_components": 6, "min_support": 1, "max_iterations": 40},
    "review": {
        "images": 5,  # as in defuse_core/README.md
        "tau": 0.1,
        "accept": "share",
        "rho": 0.1,
        "reference": {"count": 2, "channels": 8, "epochs": 8, "batch_size": 32, "train_images": None},
    },
    "judges": {"count": 0},
    "correct": {
        "filter": "none",
        "lambdas": [1.0],
        "epochs": 2,
        "tune_images": 24,
        "test_images": 24,
        "max_loss": 0.2,
    },
    "report": {"tsne_images": 60, "tsne_failures": 40, "perplexity": 10},
    "resources": {"train_threads": 1},
}


def digits() -> tuple[np.ndarray, np.ndarray]:
    """The tiny digits as a user has them: uint8 (N, H, W) and labels."""
    images = open_splits(tiny(data={"train_images": None}).data, 0).train
    return np.asarray(images.pixels)[:600, 0], images.labels[:600]


def biased(by: float = 5.0) -> nn.Module:
    """A trained classifier that takes many images for an 8."""
    net = Net()
    net.load_state_dict(trained().state_dict())
    with torch.no_grad():
        net.body[-1].bias[PREFERRED] += by
    return net


def arguments(store: Path, **changes: Any) -> dict[str, Any]:
    images, labels = digits()
    return {
        "classifier": biased(),
        "train": (images[:400], labels[:400]),
        "test": (images[400:], labels[400:]),
        "store": store,
        "name": "parts",
        "settings": SETTINGS,
    } | changes
