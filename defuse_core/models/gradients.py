"""Whether a gradient flows through a network of the user's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gradients_of(output: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the gradient of the sum of `output` for each of `inputs`; None where none flows to it."""
    if not output.requires_grad:
        return [None] * len(inputs)
    return list(torch.autograd.grad(output.sum(), inputs, allow_unused=True))
