"""The classifier that the plants are trained into, brought to Defuse by its import path as anyone's own would be."""

from __future__ import annotations

from torch import nn


def build_mnist() -> nn.Sequential:
    """Return the untrained classifier of MNIST's population: (n, 1, 32, 32) -> logits (n, 10)."""
    return _network(1, 16, 10)


def build_signs() -> nn.Sequential:
    """Return the untrained classifier of the signs' population: (n, 3, 32, 32) -> logits (n, 43)."""
    return _network(3, 32, 43)


def build_spotcheck() -> nn.Sequential:
    """Return the untrained classifier of SpotCheck's images: (n, 3, 32, 32) -> logits (n, 2)."""
    return _network(3, 16, 2)


def _network(channels_in: int, channels: int, classes: int) -> nn.Sequential:
    """Three 3x3 convolutions with batch normalisation, which learn in few epochs, and two dense layers."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2 * channels, 4 * channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(4 * channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * channels * 16, 8 * channels),
        nn.ReLU(),
        nn.Linear(8 * channels, classes),
    )
