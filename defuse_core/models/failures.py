"""Why a classifier fails on images: one line with what its code said and with what to do."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from defuse_core.errors import ModelError, count_of, one_line
from defuse_core.models.adapters import find_logits

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


def reason_of(error: Exception, limit: int = 300) -> str:
    """Return an error's message in one line; of TorchScript's, which quotes the code twice, the last line alone."""
    text = str(error).strip()
    if "TorchScript interpreter" in text or "Traceback of TorchScript" in text:
        text = text.splitlines()[-1]
    return one_line(text, limit)


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
