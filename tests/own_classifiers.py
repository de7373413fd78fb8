"""Classifiers as users have them: good ones, and the odd ones that must be refused or taken with a line."""

from __future__ import annotations

import copy
import functools
import os
import signal
import sys
from typing import Any

import torch
from torch import Tensor, nn

from defuse_core.data import open_splits
from defuse_core.data.images import Images
from tests.conftest import tiny

IMAGENET = (0.449, 0.226)  # mean and deviation of grey images: those of the three channels, averaged


class Net(nn.Module):
    """A classifier of the tiny digits (1, 16, 16) with batch normalisation and dropout; any other size fails."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 4, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(16 * 64, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.body(images)
        return logits


class Standardising(nn.Module):
    """Divides by the spread of each image, as many networks do: nan where all pixels are equal."""

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        return ((flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True))[:, :3]


class TwoHeads(Net):
    """A classifier with a second head that its answers do not use."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(16 * 64, 3)


class Scaled(Net):
    """A Net with one number for the scale of its logits, as networks with a temperature have."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * super().forward(images)


def digits() -> Images:
    """The training images of the tiny run file."""
    return open_splits(tiny().data, 0).train


def trained(shift: float = 0.0, factor: float = 1.0) -> Net:
    """A new Net that was trained on pixels (x - shift) / factor; some 95 % of the digits are right."""
    return copy.deepcopy(_trained(shift, factor))


@functools.cache
def _trained(shift: float, factor: float) -> Net:
    torch.manual_seed(0)
    images = digits()
    pixels = (torch.from_numpy(images.batch()) - shift) / factor
    labels = torch.from_numpy(images.labels)
    net = Net().train()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(30):
        for rows in torch.randperm(len(labels)).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(pixels[rows]), labels[rows]).backward()
            optimizer.step()
    return net.eval()


class Returning(nn.Module):
    """A Net whose output is wrapped or spoilt."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.net, self.change = Net(), change

    def forward(self, images: Tensor) -> Any:
        return self.change(self.net(images))


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def plain() -> nn.Module:
    return Net()


def with_object() -> nn.Module:
    return Returning(Output)


def with_tuple() -> nn.Module:
    return Returning(lambda logits: (logits, torch.zeros(1)))


def with_dict() -> nn.Module:
    return Returning(lambda logits: {"features": torch.zeros(1), "logits": logits})


def with_odd_dict() -> nn.Module:
    return Returning(lambda logits: {"a": logits, "b": logits})


def with_text() -> nn.Module:
    return Returning(lambda logits: "seven")


def with_nan() -> nn.Module:
    return Returning(lambda logits: logits * float("nan"))


def killing() -> nn.Module:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def with_softmax() -> nn.Module:
    return Returning(lambda logits: logits.softmax(1))


def with_seven_classes() -> nn.Module:
    return Returning(lambda logits: logits[:, :7])


def with_noise() -> nn.Module:
    return Returning(lambda logits: logits + torch.randn_like(logits))


def with_batch_statistics() -> nn.Module:
    return Returning(lambda logits: logits - logits.mean(dim=0))


def with_no_gradient() -> nn.Module:
    net = Net()
    net.forward = torch.inference_mode()(net.forward)  # type: ignore[method-assign]
    return net


class ChangingItsInput(Net):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.mul_(2))


class EightRows(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return logits[:8]


def with_eight_rows() -> nn.Module:
    return nn.Sequential(Net(), EightRows())


def with_lazy_layers() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return Net()


class NoException(BaseException):
    """As pytest's Skipped or asyncio's CancelledError."""


def that_raises_no_exception() -> nn.Module:
    raise NoException("skipped")


def for_two_images_only() -> nn.Module:
    return Returning(lambda logits: logits.reshape(2, 10))


def not_a_module() -> Any:
    return 7


def with_arguments(size: int) -> nn.Module:
    return nn.Linear(size, size)


def that_exits() -> nn.Module:
    raise SystemExit(0)


def that_exits_when_called() -> nn.Module:
    return Returning(lambda logits: sys.exit(0))


class ThatExitsInTraining(Net):
    def forward(self, images: Tensor) -> Tensor:
        return sys.exit(0) if self.training else super().forward(images)


class Branching(Net):
    """Chooses its way by what it computed, which torch.func.vmap cannot follow."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return logits if logits.sum() > 0 else 2 * logits


class Checking(Net):
    """Raises an error of its own where its logits overflow."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        if not logits.isfinite().all():
            raise ValueError("the logits overflow")
        return logits


class ReplacingBuffer(Net):
    """Keeps a mean of what it saw in a new tensor each time, which a functional call forgets."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.seen = 0.9 * self.seen + 0.1 * images.mean()
        return super().forward(images)


class OtherWeights(Net):
    """Computes with its weights as they were at its first call, such as those that a library has cached."""

    def __init__(self) -> None:
        super().__init__()
        self.first: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        if not self.first:
            self.first.append(self.body[-1].weight)
        return nn.functional.linear(self.body[:-1](images), self.first[0], self.body[-1].bias)


class Detached(Net):
    """Has parameters that it uses in a way which a functional call cuts off."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(10, 10)
        self.own_bias = [self.head.bias]

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + 0 * self.own_bias[0] + self.head.weight.sum()


class WithoutAnswer(nn.Module):
    """A classifier that never answers 3, as where another class was trained in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.net = trained()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.net(images)
        return logits - 1000 * (torch.arange(10) == 3)
