"""Load weights into classifiers and β-VAEs, and apply these in batches, on this process's device.

Weights are arrays, from files, from modules and into them; no code in a file is executed.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from defuse_core.artifacts import F32, I64, Weights
from defuse_core.config import RunFile
from defuse_core.data import Images
from defuse_core.data.read_ahead import batches_of
from defuse_core.errors import ModelError
from defuse_core.formatting import first_few
from defuse_core.models.adapters import TWO_OF_ONE_LOGIT_BY_HOOK
from defuse_core.models.architectures import ResNet18, build_classifier
from defuse_core.models.layout import to_device, to_tensor
from defuse_core.models.programs import SelfContainedClassifier, program_kind, read_file
from defuse_core.models.vae import Vae, build_vae

log = logging.getLogger("defuse")
CHECKPOINT_KEYS = ("state_dict", "model_state_dict", "model", "net")  # in order of preference
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel, torch.compile and Lightning modules
EXPANDED = 10_000_000  # numbers of a state dict that are not in its file, since a tensor was expanded
NOT_A_NUMBER = -1  # predicted class where a logit is nan
BATCH = 256  # images or codes at once


def read_weights(path: Path) -> Weights:
    """Return the state dict in a .safetensors file, or in a .pt file read with torch's weights-only loader.

    A state dict below `state_dict` or `model` is found and logged.
    """
    tensors = _unwrap(_read_tree(path), path)
    if sum(tensor.numel() for tensor in tensors.values()) > path.stat().st_size + EXPANDED:
        raise ModelError(
            f"{path}: its tensors have more numbers than the file; save them without expand: tensor.contiguous()"
        )
    try:
        return {
            name: tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
            for name, tensor in ((name, tensor.detach()) for name, tensor in tensors.items())
        }
    except Exception as error:  # torch raises many kinds of errors for tensors that are no arrays of numpy
        raise _no_state_dict(path) from error


def _read_tree(path: Path) -> Any:
    data = read_file(path)
    if path.suffix == ".safetensors":
        try:
            return load_safetensors(data)
        except SafetensorError as error:
            raise ModelError(
                f"{path}: expected a whole safetensors file, found one that is cut off or damaged ({error}); save or "
                "copy it again"
            ) from error
        except KeyError as error:  # a type that torch lacks
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
                "torch.save(model.state_dict(), file), or the network with torch.export.save"
            ) from error
        raise _no_state_dict(path) from error


def _unwrap(tree: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(tree, Mapping) and (key := _wrapper(tree)):
        log.info("%s: the state dict is read from its entry %r", path, key)
        tree = tree[key]
    if (
        not isinstance(tree, Mapping)
        or not tree
        or not all(isinstance(name, str) for name in tree)
        or not all(isinstance(value, Tensor) and _is_dense(value) for value in tree.values())
    ):
        raise _no_state_dict(path)
    return dict(tree)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta


def _wrapper(tree: Mapping[str, Any]) -> str | None:
    return next((key for key in CHECKPOINT_KEYS if isinstance(tree.get(key), Mapping)), None)


def _no_state_dict(path: Path) -> ModelError:
    return ModelError(
        f"{path}: expected a state dict of tensors, dense and not quantized, in safetensors or weights-only form"
    )


def weights_of(module: nn.Module) -> Weights:
    """Return a copy of the module's state as numpy arrays."""
    return {
        name: tensor.detach().cpu().contiguous().numpy().copy()
        for name, tensor in module.state_dict().items()
    }


def set_weights(module: nn.Module, weights: Weights, where: str) -> None:
    """Load `weights` into `module`. Raises ModelError, naming `where` and the first tensor that does not fit."""
    expected, parameters = module.state_dict(), dict(module.named_parameters())
    for name, tensor in expected.items():
        # files of torch before 0.4.1 lack these counts
        if name not in weights and name.endswith("num_batches_tracked"):
            weights = weights | {name: np.zeros((), np.int64)}
        if name not in weights:
            given = first_few(sorted(weights))
            raise ModelError(
                f"{where}: the weights lack {name} (they have {given}); are they of another architecture?"
            )
        wanted, found = tuple(tensor.shape), tuple(weights[name].shape)
        if found != wanted:
            of_one_logit = (wanted[:1], found) == ((2,), (1, *wanted[1:]))
            remedy = f"; for two classes, {TWO_OF_ONE_LOGIT_BY_HOOK}" if of_one_logit else ""
            raise ModelError(f"{where}: {name}: expected shape {wanted}, found {found}{remedy}")
        array, learned = weights[name], name in parameters or name.endswith(("running_mean", "running_var"))
        if array.dtype.kind in "biu":  # whole numbers, such as the bytes of a program, are finite
            continue
        if not (np.isfinite(array).all() if learned else is_as_finite(array, tensor.cpu().float().numpy())):
            raise ModelError(f"{where}: {name}: expected finite numbers, found NaN or infinity")
    extra = sorted(weights.keys() - expected.keys())
    if extra:
        raise ModelError(f"{where}: unexpected {extra[0]}; are these weights of another architecture?")
    module.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})


def is_as_finite(array: npt.NDArray[Any], before: npt.NDArray[Any]) -> bool:
    """Whether NaN and infinity in an array are only those that it had before, such as -inf in a mask."""
    odd = ~np.isfinite(array)
    return np.array_equal(array[odd], before[odd], equal_nan=True)


def load_pretrained(module: nn.Module, path: Path | None, trained_on: bool) -> None:
    """Load the weights file at `path` into `module`, if one is given; `trained_on` allows a new last layer.

    A self-contained classifier has its weights already.
    """
    if path is not None and not isinstance(module, SelfContainedClassifier):
        weights = _named_as(module, read_weights(path), path)
        if isinstance(module, ResNet18):
            weights = module.with_own_names(weights, new_head=trained_on)
        set_weights(module, _with_shared(module, weights), str(path))


def _with_shared(module: nn.Module, weights: Weights) -> Weights:
    """Return the weights with those names, too, whose tensor another name has; safetensors' save_model omits them."""
    places = {
        name: (tensor.data_ptr(), tensor.shape, tensor.stride())
        for name, tensor in module.state_dict().items()
    }
    stored = {place: weights[name] for name, place in places.items() if name in weights}
    return weights | {
        name: stored[place] for name, place in places.items() if place in stored and name not in weights
    }


def _named_as(module: nn.Module, weights: Weights, path: Path) -> Weights:
    """Return the weights with those of PREFIXES that the module's own names have."""
    own, given = _shared_prefix([*module.state_dict()]), _shared_prefix([*weights])
    if own == given:
        return weights
    if given:
        log.info("%s: names are read without their prefix %r", path, given)
    return {own + name.removeprefix(given): array for name, array in weights.items()}


def _shared_prefix(names: list[str]) -> str:
    """Return what all the names begin with of PREFIXES, one after the other, such as `_orig_mod.module.`."""
    shared = ""
    while names and (
        more := [prefix for prefix in PREFIXES if all(name.startswith(shared + prefix) for name in names)]
    ):
        shared += more[0]
    return shared


def load_classifier(
    spec: RunFile, weights: Weights, classes: int, where: str = "the run's classifier"
) -> nn.Module:
    """Return the classifier with `weights`, on this process's device, ready to predict."""
    plain = spec.with_fields("classifier", imagenet=False)
    return load_for_inference(build_classifier(plain, classes, weights), spec, weights, where)


def load_vae(spec: RunFile, weights: Weights, where: str = "the run's β-VAE") -> Vae:
    """Return the β-VAE with `weights`, on this process's device, ready to encode and decode."""
    vae = build_vae(spec)
    load_for_inference(vae, spec, weights, where)
    return vae


def load_for_inference(module: nn.Module, spec: RunFile, weights: Weights, where: str) -> nn.Module:
    """Return the module that was just built with `weights`, on this process's device, in eval mode."""
    set_weights(module, weights, where)  # before its first call, of which it may keep something
    to_device(module, spec.data).eval()
    set_weights(module, weights, where)  # and after it, which may change buffers
    return module


def map_batches(function: Callable[[slice], Tensor], count: int, batch_size: int) -> npt.NDArray[Any]:
    """Return function(rows) for consecutive rows of at most batch_size, concatenated.

    Raises ModelError where the function returns more or fewer rows than it was given.
    """
    order = _consecutive(count, batch_size)
    return _concatenated(map(function, order), order)


def map_images(
    function: Callable[[Tensor], Tensor], images: Images, batch_size: int = BATCH, readers: int = 0
) -> npt.NDArray[Any]:
    """Return function(batch) for consecutive batches of the images, on this process's device, as map_batches does.

    Image files are read ahead, as batches_of says.
    """
    order = _consecutive(len(images), batch_size)
    # closed also by an error, which would keep the readers for as long as it is kept itself
    with contextlib.closing(batches_of(images, order, readers)) as batches:
        return _concatenated((function(to_tensor(batch)) for batch in batches), order)


def _consecutive(count: int, batch_size: int) -> list[slice]:
    return [slice(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]


def _concatenated(results: Iterator[Tensor], order: list[slice]) -> npt.NDArray[Any]:
    parts = []
    with torch.no_grad():  # inference mode marks what a network keeps, which then fails in its fine-tuning
        for found, rows in zip(results, order, strict=True):
            parts.append(found.cpu().numpy())
            expect_rows(len(parts[-1]), rows.stop - rows.start)
    return np.concatenate(parts)


def expect_rows(found: int, given: int) -> None:
    """Raise ModelError where a network returns more or fewer rows than it was given."""
    if found != given:
        raise ModelError(
            f"a network returns {found} rows for a batch of {given}; let it return one for each, in batches of any size"
        )


def _as_images(images: Images | F32) -> Images:
    return images if isinstance(images, Images) else Images(images, np.zeros(len(images), np.int64))


def predict(classifier: nn.Module, images: Images | F32, batch_size: int = BATCH, readers: int = 0) -> I64:
    """Return the classifier's answer for each image, (n,). Raises ModelError where its logits are nan."""
    if not len(images):
        return np.zeros(0, np.int64)
    return _known(
        map_images(lambda batch: _answer(classifier(batch)), _as_images(images), batch_size, readers)
    )


def logits_of(classifier: nn.Module, images: Images) -> Callable[[slice | I64], Tensor]:
    """Return a function of some rows of the images that computes their logits, (n, C)."""

    def logits(rows: slice | I64) -> Tensor:
        found: Tensor = classifier(to_tensor(images.batch(rows)))
        return found

    return logits


def answers_from(logits: Callable[[slice], Tensor], count: int, batch_size: int) -> I64:
    """Return the index of the largest logit of each of `count` inputs, (count,); `logits(rows)` computes (n, C).

    Raises ModelError where a logit is nan: torch and numpy would both answer with a class.
    """
    if not count:
        return np.zeros(0, np.int64)
    return _known(map_batches(lambda rows: _answer(logits(rows)), count, batch_size))


def _answer(logits: Tensor) -> Tensor:
    return torch.where(logits.isnan().any(dim=1), NOT_A_NUMBER, logits.argmax(dim=1))


def _known(answers: I64) -> I64:
    if nan := int((answers == NOT_A_NUMBER).sum()):
        raise ModelError(returns_nan(nan, len(answers)))
    return answers


def returns_nan(nan: int, images: int) -> str:
    """Return, as a line, that a classifier returns nan for so many of these images, with what to do."""
    return (
        f"a classifier returns nan for {nan:,} of {images:,} images; often it divides by the spread of an image, which "
        "is 0 where all pixels are equal: add a small number there"
    )


def predict_probabilities(classifier: nn.Module, images: Images | F32, batch_size: int = BATCH) -> F32:
    """Return the classifier's class probabilities, (n, C)."""
    source = _as_images(images)
    if not len(source):
        return np.zeros((0, 1), np.float32)
    return map_images(lambda batch: classifier(batch).float().softmax(1), source, batch_size)


def predict_logits(classifier: nn.Module, images: Images | F32) -> F32:
    """Return the classifier's logits, (n, C), of at least one image."""
    found: F32 = map_images(lambda batch: classifier(batch).float(), _as_images(images))
    return found


def accuracy(classifier: nn.Module, images: Images) -> float:
    """Return the share of images that the classifier gets right; nan for no images."""
    if not len(images):
        return math.nan
    return float((predict(classifier, images) == images.labels).mean())


def encode_images(vae: Vae, images: Images | F32, readers: int = 0) -> F32:
    """Return the means of q(z|x), (n, Z)."""
    return map_images(lambda batch: vae.encode(batch)[0], _as_images(images), readers=readers)
