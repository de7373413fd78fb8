"""State dicts in files of users: safetensors, or torch's weights-only form, also inside training checkpoints."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from defuse_core.artifacts import Weights
from defuse_core.errors import ModelError
from defuse_core.models.programs import is_program

log = logging.getLogger("defuse")
WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
)  # keys of training checkpoints, in order of preference
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile


def read_file(path: Path) -> bytes:
    """Return the bytes of a file of weights. Raises ModelError."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ModelError(f"{path}: expected a file of weights, found none") from error
    except IsADirectoryError as error:
        raise ModelError(
            f"{path}: expected a file of weights, found a folder; a folder of Hugging Face's needs "
            "classifier.architecture: transformers"
        ) from error
    except PermissionError as error:
        raise ModelError(f"{path}: may not be read; fix access") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error


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
    if is_program(data):
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
