"""Put networks and images on this process's device, in the memory layout that each network computes in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from defuse_core.artifacts import F32
from defuse_core.config import DataSection
from defuse_core.device import device
from defuse_core.models.vae import Vae


def to_device(module: nn.Module, data: DataSection | None = None) -> nn.Module:
    """Move `module` to this process's device, in the memory layout in which convolutions are fastest.

    With `data`, which has the size of its images, a network of a user's own gets torch's default layout where its code
    takes no other (`use_default_layout_if_needed`).
    """
    if device().type == "cpu":
        for part in module.modules():
            if isinstance(part, nn.Conv2d) and _overruns(part):
                part.register_forward_pre_hook(_crop_for_training)
    module.to(device(), memory_format=torch.channels_last)  # type: ignore[call-overload]
    if data is not None:
        blank = np.zeros((2, data.channels, data.image_size, data.image_size), np.float32)
        use_default_layout_if_needed(module, to_tensor(blank))
    return module


def use_default_layout_if_needed(network: nn.Module, images: Tensor) -> None:
    """Move a classifier or β-VAE back to torch's default layout where its code takes no other; else change nothing.

    Such code is x.view(n, -1) after a convolution. It is looked for with `images`, two or more in the layout of
    to_device. Any other failure is left to the checks, which name it.
    """
    training, entry = network.training, "encode" if isinstance(network, Vae) else "forward"
    network.eval()
    try:
        with torch.no_grad():
            if isinstance(network, Vae):
                network.decode(network.encode(images)[0])
            else:
                network(images)
    except (Exception, SystemExit) as error:
        if "view size is not compatible" in str(error):
            network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload, unused-ignore]
            setattr(network, entry, partial(_of_contiguous, getattr(network, entry)))
    finally:
        network.train(training)


def _of_contiguous(function: Callable[..., Any], images: Tensor, *others: Any, **named: Any) -> Any:
    return function(images.contiguous(), *others, **named)


def _overruns(convolution: nn.Conv2d) -> bool:
    """Whether oneDNN's weight gradient of this convolution can write past the end of its memory on this CPU.

    That of a 1x1 convolution with a stride does in the layout of to_device, where there are fewer channels than numbers
    in a vector register, and the stride divides the image (github.com/uxlfoundation/oneDNN/issues/6035). With one
    channel, or several groups, torch takes another way.
    """
    block = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
    return (
        convolution.kernel_size == (1, 1)
        and max(convolution.stride) > 1
        and convolution.padding in ((0, 0), "valid")
        and convolution.groups == 1
        and 1 < convolution.in_channels < block
    )


def _crop_for_training(convolution: nn.Conv2d, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return images (..., channels, H, W) without a last row and column that the stride passes over anyway.

    The stride then no longer divides the image, and oneDNN computes the gradient in another, correct way.
    """
    if not torch.is_grad_enabled() or not arguments:  # answers stay as they are, to the last bit
        return arguments
    images, *others = arguments
    height, width = (
        side - (stride > 1 and side % stride == 0)
        for side, stride in zip(images.shape[-2:], convolution.stride, strict=True)
    )
    return images[..., :height, :width], *others


def to_tensor(images: F32) -> Tensor:
    """Move (n, channels, H, W) pixels to this process's device, in the memory layout of to_device."""
    return torch.from_numpy(images).to(device()).contiguous(memory_format=torch.channels_last)
