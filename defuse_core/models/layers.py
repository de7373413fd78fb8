"""What classifiers and β-VAEs are built from: the paper's layers, and modules imported by their path."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator

from torch import nn

from defuse_core.errors import ModelError


def halving_convolutions(channels_in: int, channels: int, stages: int) -> Iterator[nn.Module]:
    """4x4 convolutions of stride 2, each halving height and width (Figures 7, 8, 10, 12)."""
    for stage in range(stages):
        yield nn.Conv2d(channels if stage else channels_in, channels, 4, stride=2, padding=1)
        yield nn.ReLU()


def dense_layers(*widths: int) -> Iterator[nn.Module]:
    """Fully connected layers from width to width, each followed by a ReLU."""
    for width_in, width_out in itertools.pairwise(widths):
        yield nn.Linear(width_in, width_out)
        yield nn.ReLU()


def import_module(field: str, path: str) -> nn.Module:
    """Return what the factory at `package.module:factory` returns. Raises ModelError, naming the run file's field."""
    module_name, _, factory = path.partition(":")
    try:
        module = getattr(importlib.import_module(module_name), factory)()
    except Exception as error:
        raise ModelError(
            f"{field} {path}: calling it failed ({type(error).__name__}: {error}); "
            "expected package.module:factory, importable from here and callable without arguments"
        ) from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"{field} {path}: expected an nn.Module, found {type(module).__name__}")
    return module
