"""Weights as arrays: from files, from modules and into them. Nothing is unpickled."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from defuse_core.artifacts import Weights
from defuse_core.config import RunFile
from defuse_core.errors import ModelError
from defuse_core.models.architectures import ResNet18, build_classifier
from defuse_core.models.inference import to_device
from defuse_core.models.programs import SelfContainedClassifier, program_kind, read_file
from defuse_core.models.vae import Vae, build_vae

log = logging.getLogger("defuse")
# Keys of training checkpoints, in order of preference.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile


def read_weights(path: Path) -> Weights:
    """Return the state dict in a .safetensors file, or in a .pt file read with torch's weights-only loader.

    A state dict below `state_dict` or `model`, and names that begin with `module.`, are found and logged.
    """
    tensors = _unwrap(_read_tree(path), path)
    return {
        name: tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
        for name, tensor in ((name, tensor.detach()) for name, tensor in tensors.items())
    }


def _read_tree(path: Path) -> Any:
    data = read_file(path)
    if path.suffix == ".safetensors":
        try:
            return load_safetensors(data)
        except SafetensorError as error:
            raise _no_state_dict(path) from error
    if program_kind(data) is not None:
        raise ModelError(
            f"{path}: expected a state dict, found a network with its code (TorchScript or torch.export); set "
            "classifier.architecture: program"
        )
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # on what is no such file, torch's loader raises a dozen kinds of errors
        if "Unsupported global" in str(error):
            raise ModelError(
                f"{path}: expected a state dict of tensors, found pickled Python objects, which are never loaded; save "
                "torch.save(model.state_dict(), file), or the network with torch.jit.save or torch.export.save"
            ) from error
        raise _no_state_dict(path) from error


def _unwrap(tree: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(tree, Mapping) and (key := _wrapper(tree)):
        log.info("%s: the state dict is read from its entry %r", path, key)
        tree = tree[key]
    if (
        not isinstance(tree, Mapping)
        or not tree
        or not all(isinstance(value, Tensor) for value in tree.values())
    ):
        raise _no_state_dict(path)
    tensors = dict(tree)
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            log.info("%s: names are read without their prefix %r", path, prefix)
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _wrapper(tree: Mapping[str, Any]) -> str | None:
    return next((key for key in WRAPPERS if isinstance(tree.get(key), Mapping)), None)


def _no_state_dict(path: Path) -> ModelError:
    return ModelError(f"{path}: expected a state dict of tensors in safetensors or weights-only form")


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
    plain = spec.with_fields("classifier", imagenet=False)
    return _ready(build_classifier(plain, classes, weights), spec, weights, where)


def load_vae(spec: RunFile, weights: Weights, where: str = "the run's β-VAE") -> Vae:
    """Return the β-VAE with `weights`, on this process's device, ready to encode and decode."""
    vae = build_vae(spec)
    _ready(vae, spec, weights, where)
    return vae


def _ready(module: nn.Module, spec: RunFile, weights: Weights, where: str) -> nn.Module:
    to_device(module, spec.data).eval()
    set_weights(module, weights, where)
    return module
