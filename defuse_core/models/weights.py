"""Weights as arrays: from files, from modules and into them. Nothing is unpickled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from defuse_core.artifacts import Weights
from defuse_core.config import RunFile
from defuse_core.errors import ModelError
from defuse_core.models.architectures import ResNet18, build_classifier
from defuse_core.models.inference import to_device
from defuse_core.models.programs import SelfContainedClassifier
from defuse_core.models.state_dicts import read_weights
from defuse_core.models.vae import Vae, build_vae


def weights_of(module: nn.Module) -> Weights:
    """Return a copy of the module's state as numpy arrays."""
    return {
        name: tensor.detach().cpu().contiguous().numpy().copy()
        for name, tensor in module.state_dict().items()
    }


def set_weights(module: nn.Module, weights: Weights, where: str) -> None:
    """Load `weights` into `module`. Raises ModelError, naming `where` and the first tensor that does not fit."""
    expected = module.state_dict()
    for name, tensor in expected.items():
        # files of torch before 0.4.1 lack these counts
        if name not in weights and name.endswith("num_batches_tracked"):
            weights = weights | {name: np.zeros((), np.int64)}
        if name not in weights:
            raise ModelError(f"{where}: the weights lack {name}; are they of another architecture?")
        if tuple(weights[name].shape) != tuple(tensor.shape):
            raise ModelError(
                f"{where}: {name}: expected shape {tuple(tensor.shape)}, found {tuple(weights[name].shape)}"
            )
        if not np.isfinite(weights[name]).all():
            raise ModelError(f"{where}: {name}: expected finite numbers, found NaN or infinity")
    extra = sorted(weights.keys() - expected.keys())
    if extra:
        raise ModelError(f"{where}: unexpected {extra[0]}; are these weights of another architecture?")
    module.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})


def load_pretrained(module: nn.Module, path: Path | None, trained_on: bool) -> None:
    """Load the weights file at `path` into `module`, if one is given; `trained_on` allows a new last layer.

    A self-contained classifier has its weights already.
    """
    if path is not None and not isinstance(module, SelfContainedClassifier):
        weights = read_weights(path)
        if isinstance(module, ResNet18):
            weights = module.with_own_names(weights, new_head=trained_on)
        set_weights(module, weights, str(path))


def load_classifier(
    spec: RunFile, weights: Weights, classes: int, where: str = "the run's classifier"
) -> nn.Module:
    """Return the classifier with `weights`, on this process's device, ready to predict."""
    plain = spec.model_copy(update={"classifier": spec.classifier.model_copy(update={"imagenet": False})})
    return _ready(build_classifier(plain, classes, weights), weights, where)


def load_vae(spec: RunFile, weights: Weights, where: str = "the run's β-VAE") -> Vae:
    """Return the β-VAE with `weights`, on this process's device, ready to encode and decode."""
    vae = build_vae(spec)
    _ready(vae, weights, where)
    return vae


def _ready(module: nn.Module, weights: Weights, where: str) -> nn.Module:
    set_weights(module, weights, where)
    return to_device(module).eval()
