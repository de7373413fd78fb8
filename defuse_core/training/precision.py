"""Computing in bf16, and answers that equal those of f32 all the same."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor, nn

from defuse_core.artifacts import I64
from defuse_core.config import Arithmetic
from defuse_core.data import Images
from defuse_core.data.images import evenly_spaced
from defuse_core.device import device
from defuse_core.models import answers_from, logits_of, map_batches, predict

SAMPLE = 512  # inputs on which the error of bf16 is measured
SAFETY = 2.0  # factor on the largest error that was seen
BATCH = 256  # images of accuracy_as_in_f32 at once
WORTHWHILE = 2048  # inputs from which on measuring the error pays


def autocast(arithmetic: Arithmetic) -> AbstractContextManager[object]:
    """Compute the block's convolutions and matrix products in bf16, or change nothing (f32)."""
    if arithmetic == "f32":
        return contextlib.nullcontext()
    return torch.autocast(device().type, dtype=torch.bfloat16)


def margin_bound(logits: Callable[[I64], Tensor], count: int) -> float:
    """Return the margin between the two largest logits below which an answer in bf16 may differ from that in f32.

    It is SAFETY times the largest error of that margin on at most SAMPLE of the `count` inputs, evenly spaced.
    """
    rows = evenly_spaced(count, SAMPLE)
    with torch.inference_mode():
        exact = logits(rows).float()
        with autocast("bf16"):
            fast = logits(rows).float()
    if fast.shape[1] < 2:
        return 0.0
    first, second = fast.topk(2, dim=1).indices.unbind(1)
    errors = _difference(fast, first, second) - _difference(exact, first, second)
    return SAFETY * float(errors.abs().max())


def _difference(logits: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return logits[i, first[i]] - logits[i, second[i]], (n,)."""
    return (logits.gather(1, first[:, None]) - logits.gather(1, second[:, None]))[:, 0]


def answers_as_in_f32(logits: Callable[[I64], Tensor], count: int, batch_size: int, bound: float) -> I64:
    """Return the largest logit's index for each of `count` inputs, (count,): in bf16, and again in f32 where in doubt.

    `logits(rows)` computes (n, C) for rows of the inputs, in f32 where no autocast is on. `bound` is margin_bound's.
    """

    def fast(rows: slice) -> Tensor:
        found = logits(np.arange(rows.start, rows.stop)).float()
        largest = found.sort(dim=1, descending=True).values[:, :2]
        margin = largest[:, 0] - largest[:, -1]  # 0 for a single class, as its bound is
        return torch.stack([found.argmax(dim=1).float(), margin], dim=1)

    with autocast("bf16"):
        table = map_batches(fast, count, batch_size)
    found: I64 = table[:, 0].astype(np.int64)
    doubtful = np.flatnonzero(~(table[:, 1] >= bound))  # where either is nan as well
    found[doubtful] = answers_from(lambda rows: logits(doubtful[rows]), len(doubtful), batch_size)
    return found


def accuracy_as_in_f32(classifier: nn.Module, images: Images, arithmetic: Arithmetic) -> float:
    """Return the share of images that the classifier gets right, nan for no images: the figure of f32, in either."""
    if not len(images):
        return math.nan
    return float((predict_as_in_f32(classifier, images, arithmetic) == images.labels).mean())


def predict_as_in_f32(classifier: nn.Module, images: Images, arithmetic: Arithmetic) -> I64:
    """Return the classifier's answer to each image, (N,): that of f32, in either arithmetic."""
    if arithmetic == "f32" or len(images) < WORTHWHILE:
        return predict(classifier, images)
    logits = logits_of(classifier, images)
    return answers_as_in_f32(logits, len(images), BATCH, margin_bound(logits, len(images)))
