"""What a user's classifier expects and returns, translated: pixel range, outputs, order of the classes; and, where it
fails on images, why: one line with what its code said and with what to do.

Translations are hooks of the module, so its state dict keeps its own names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from defuse_core.config import ClassifierSection
from defuse_core.errors import ModelError
from defuse_core.formatting import count_of, one_line, value_text

EXTERNAL = ("custom", "program", "transformers", "timm")  # architectures whose code is not Defuse's
CODE_ELSEWHERE = {*EXTERNAL} - {"program"}  # those whose code is not stored either
IMAGENET_MEAN, IMAGENET_SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INPUT_RANGES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {  # (x - shift) / factor, per channel
    "0..1": ((0.0,), (1.0,)),
    "-1..1": ((0.5,), (0.5,)),
    "imagenet": (IMAGENET_MEAN, IMAGENET_SD),
    "0..255": ((0.0,), (1 / 255,)),
}
# of a network of one logit, which is that of the second of two classes against the first
TWO_OF_ONE_LOGIT = "torch.cat([torch.zeros_like(z), z], 1)"
_BY_HOOK = (
    "with architecture: custom, let a function build the network with its one logit and register a hook, which leaves "
    "the names in the file of weights as they are: net.register_forward_hook(lambda module, inputs, "
)
TWO_OF_ONE_LOGIT_BY_HOOK = f"{_BY_HOOK}z: {TWO_OF_ONE_LOGIT})"
# of a Hugging Face model, which returns its logits in an object
TWO_OF_ONE_OUTPUT_BY_HOOK = f"{_BY_HOOK}y: torch.cat([torch.zeros_like(y.logits), y.logits], 1))"
OWN_RANGES = {"cnn": "0..1", "resnet18": "imagenet"}  # fixed ranges of Defuse's own networks


def plain_section(section: ClassifierSection) -> ClassifierSection:
    """Return the section with what the network itself gets and returns, without the translation of its wrapper."""
    if section.architecture in EXTERNAL:
        return section
    own = {"input_range": OWN_RANGES[section.architecture], "outputs": "logits"}
    return section.model_copy(update=own)


def with_stated_range(section: dict[str, Any] | None) -> tuple[dict[str, Any] | None, list[str]]:
    """Return section `classifier` with the input range that a Hugging Face folder states, and a note of it."""
    if section is None or section.get("architecture") != "transformers" or "input_range" in section:
        return section, []
    file = Path(section["weights"], "preprocessor_config.json")
    try:
        stated = json.loads(file.read_text()) if file.is_file() else {}  # a pipe would be waited for
        mean, sd = (np.array(stated[name], dtype=float) for name in ("image_mean", "image_std"))
        if np.isnan([*mean.flat, *sd.flat]).any():  # null
            return section, []
        if not (stated.get("do_normalize", True) and stated.get("do_rescale", True)):
            return section, []
        for name, (shift, factor) in INPUT_RANGES.items():
            if np.allclose(mean, shift, atol=1e-3) and np.allclose(sd, factor, atol=1e-3):
                return {**section, "input_range": name}, [
                    f"classifier.input_range is set to {name}, as {file} states"
                ]
    # none, or another library's
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return section, []
    return section, [
        f"{file} states mean {mean.tolist()} and standard deviation {sd.tolist()}, for which there is no "
        "classifier.input_range; with architecture: custom, a function can normalise with these"
    ]


def adapt(module: nn.Module, section: ClassifierSection, classes: int) -> nn.Module:
    """Return `module` itself, from now on called with pixels in [0, 1] and returning logits (n, C).

    A TorchScript module takes no hooks: it is returned in a module around it.
    """
    if isinstance(module, torch.jit.ScriptModule):
        module = nn.Sequential(module)
    order = section.class_order
    if order is not None:
        _expect_order(order, classes)
    if section.input_range != "0..1":
        module.register_forward_pre_hook(partial(_before, section.input_range), prepend=True)
    module.register_forward_hook(partial(_after, section.outputs, order))
    return module


def reorder(module: nn.Module, order: tuple[int, ...], classes: int) -> nn.Module:
    """Return `module`, which returns logits (n, C), itself; from now on they are in the order of the classes."""
    _expect_order(order, classes)
    module.register_forward_hook(partial(_after, "logits", order))
    return module


def is_adapted(module: nn.Module) -> bool:
    """Whether `adapt` or `reorder` translates what the module, or one that it is a copy of, gets or returns."""
    before = [hook for hook in module._forward_pre_hooks.values() if _is_of(hook, _before)]
    after = [hook for hook in module._forward_hooks.values() if _is_of(hook, _after)]
    return bool(before) or any(hook.args != ("logits", None) for hook in after)


def _is_of(hook: object, function: object) -> TypeGuard[partial[object]]:
    return isinstance(hook, partial) and hook.func is function


def _expect_order(order: tuple[int, ...], classes: int) -> None:
    if sorted(order) != list(range(classes)):
        found = value_text(list(order))
        raise ModelError(
            f"classifier.class_order: expected each of the logits 0 to {classes - 1} once, found {found}"
        )


def _before(name: str, _module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (to_range(arguments[0], name), *arguments[1:])


def _after(
    outputs: str, order: tuple[int, ...] | None, _module: nn.Module, _arguments: Any, returned: Any
) -> Tensor:
    return as_logits(returned, outputs, order)


def to_range(images: Tensor, name: str) -> Tensor:
    """Return images in [0, 1] in another of INPUT_RANGES; grey images are normalised by ImageNet's mean colour."""
    if name == "0..1":
        return images
    return scaled(images, *(images.new_tensor(values) for values in INPUT_RANGES[name]))


def scaled(images: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
    """Return (images - shift) / factor, both of which are per channel; for grey images the mean of each."""
    shift, factor = (values.view(1, -1, 1, 1) for values in (shift, factor))
    if images.shape[1] == 1:
        shift, factor = shift.mean(dim=1, keepdim=True), factor.mean(dim=1, keepdim=True)
    return (images - shift) / factor


def raw_output(classifier: nn.Module, images: Tensor, input_range: str) -> object:
    """Return what the network itself returns for images in [0, 1], with its own hooks, without those of `adapt`."""
    before, after = classifier._forward_pre_hooks, classifier._forward_hooks
    first = {key: hook for key, hook in before.items() if _is_of(hook, _before)}
    last = {key: hook for key, hook in after.items() if _is_of(hook, _after)}
    try:
        for hooks, of_adapt in ((before, first), (after, last)):
            for key in of_adapt:
                del hooks[key]
        returned: object = classifier(to_range(images, input_range))
    finally:
        own = dict(before)  # a hook may have removed itself
        before.clear()
        before.update(first | own)
        after.update(last)
    return returned


def as_logits(returned: Any, outputs: str, order: Sequence[int] | Tensor | None) -> Tensor:
    """Return logits (n, C), in the order of the data set's classes, of whatever a classifier returned."""
    logits = find_logits(returned)[0]
    if logits.is_complex():
        raise ModelError(
            "the classifier: expected logits of real numbers, found complex ones; return their .real"
        )
    logits = logits.float()  # which autocast in a network leaves in bfloat16
    if outputs == "probabilities":
        logits = logits.clamp_min(torch.finfo(logits.dtype).tiny).log()
    return logits if order is None else logits[:, order if isinstance(order, Tensor) else list(order)]


def find_logits(returned: Any) -> tuple[Tensor, str]:
    """Return the logits in an output, and where they are: a tensor, .logits, ["logits"], or the first of a tuple.

    Raises ModelError for anything else.
    """
    if isinstance(returned, Tensor):
        return returned, "a tensor"
    if isinstance(getattr(returned, "logits", None), Tensor):
        return returned.logits, ".logits"
    if isinstance(returned, Mapping):
        tensors = [key for key, value in returned.items() if isinstance(value, Tensor)]
        key = "logits" if "logits" in tensors else tensors[0] if len(tensors) == 1 else None
        if key is not None:
            return returned[key], f"[{key!r}]"
        found = f"a dict with {', '.join(map(str, returned)) or 'nothing'}"
    elif isinstance(returned, tuple | list) and returned and isinstance(returned[0], Tensor):
        return returned[0], f"the first of a {type(returned).__name__} of {len(returned)}"
    else:
        found = type(returned).__name__
    raise ModelError(
        f"the classifier: expected logits as a tensor, as .logits, ['logits'] or the first of a tuple, found {found}; "
        "wrap it in a module that returns them"
    )


# Batches that are tried: a network is often traced with one image. Larger ones take long at each size that is tried.
FIXED_SIZES = (1, 2)


def classifier_failure(classifier: nn.Module, images: Tensor, error: Exception) -> ModelError:
    """Return the error of a classifier that fails on images (n, channels, H, W)."""
    otherwise = "check the size and the channels of the images (settings: data.channels)"
    return ModelError(failure_line(classifier, images, error, otherwise))


def failure_line(classifier: nn.Module, images: Tensor, error: Exception, otherwise: str) -> str:
    """Return what a classifier that fails on images (n, channels, H, W) said, and the cause that is found by trying.

    `otherwise` is what to do where none is found.
    """
    remedy = _other_floats(classifier) or _fixed_batch(classifier, images) or otherwise
    return f"the classifier fails on images of shape {tuple(images.shape)}: {reason_of(error)}; {remedy}"


def reason_of(error: Exception) -> str:
    """Return an error's message in one line, its type where it has none; of TorchScript's the last line alone.

    That one quotes the code twice.
    """
    text = str(error).strip() or type(error).__name__
    if "TorchScript interpreter" in text or "Traceback of TorchScript" in text:
        text = text.splitlines()[-1]
    return one_line(text, 300)


def expect_full_precision(network: nn.Module, what: str, trained: bool) -> None:
    """Raise ModelError for weights that cannot be stored (bfloat16) or, where they are `trained`, are of 16 bits."""
    for tensor in (*network.parameters(), *network.state_dict().values()):
        small = tensor.is_floating_point() and tensor.dtype.itemsize < 4
        if small and (tensor.dtype != torch.float16 or (trained and tensor.requires_grad)):
            found = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(f"{what} has weights of {found}, expected float32: convert it with .float()")


def _other_floats(classifier: nn.Module) -> str | None:
    """Return what to do where a parameter is of another kind of floats than the images."""
    for parameter in classifier.parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            found = str(parameter.dtype).removeprefix("torch.")
            return f"it has parameters of {found}, and images are float32: convert it with .float()"
    return None


def _fixed_batch(classifier: nn.Module, images: Tensor) -> str | None:
    """Return what to do where batches of one size alone are answered, as by code with a view(1, -1)."""
    for size in FIXED_SIZES:
        if size != len(images) and _answers(classifier, images[:1].expand(size, -1, -1, -1).contiguous()):
            return (
                f"it answers a batch of {count_of(size, 'image')}, so let it accept batches of any size (flatten(1), "
                "not a number of images in view or reshape)"
            )
    return None


def _answers(classifier: nn.Module, images: Tensor) -> bool:
    """Whether the classifier returns one row for each image."""
    try:
        with torch.inference_mode():
            return len(find_logits(classifier(images))[0]) == len(images)
    except Exception:  # whatever the user's code raises
        return False
