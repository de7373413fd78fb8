"""Training by several workers at once: each computes its part of every minibatch, and gradients are averaged.

The workers form a torch process group (cluster/train.py starts them). All see the same minibatches in the same order,
so together they take the steps of a single worker, but for rounding, for dropout, whose masks each worker draws, and
for batch normalisation on CPUs, which sees the worker's part of the minibatch. A process without a group is the only
worker, and computes what it always did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from defuse_core.artifacts import I64
from defuse_core.device import device
from defuse_core.errors import ComputeError
from defuse_core.seeds import torch_seed
from defuse_core.training.batches import DeviceImages

P = ParamSpec("P")
R = TypeVar("R")


def group_size() -> int:
    """Return the number of workers that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def worker_number() -> int:
    """Return the number of this worker, from 0."""
    return dist.get_rank() if group_size() > 1 else 0


def is_first_worker() -> bool:
    """Whether this is the worker that stores checkpoints and reports."""
    return worker_number() == 0


def seed_dropout(seed: int, *path: str | int) -> None:
    """Seed what a network itself draws in an epoch, so that a resumed training goes on alike; workers draw apart."""
    torch.manual_seed(torch_seed(seed, *path) + worker_number())


@dataclass(frozen=True)
class MinibatchPart:
    """The part of a minibatch of `count` images that this worker computes."""

    rows: slice
    count: int
    weight: float  # of the part's mean loss: the average over the workers is the mean over the minibatch

    @staticmethod
    def of(count: int) -> MinibatchPart:
        """Return this worker's part; everything where the minibatch has no two images for each worker."""
        workers = group_size()
        if workers == 1 or count < 2 * workers:
            return MinibatchPart(slice(0, count), count, 1.0)
        first, after = (count * (worker_number() + more) // workers for more in (0, 1))
        return MinibatchPart(slice(first, after), count, workers * (after - first) / count)

    def weighted(self, loss: Tensor) -> Tensor:
        """Return the loss times the weight of the part."""
        return loss if self.weight == 1.0 else loss * self.weight


def worker_minibatches(
    images: DeviceImages, order: Iterable[I64]
) -> Iterator[tuple[MinibatchPart, Tensor, Tensor]]:
    """Yield this worker's part of each minibatch of `order`, with its images and labels."""
    minibatches = list(order)
    mine = [MinibatchPart.of(len(rows)) for rows in minibatches]
    read = images.batches(rows[part.rows] for rows, part in zip(minibatches, mine, strict=True))
    for part, (_, batch, labels) in zip(mine, read, strict=True):
        yield part, batch, labels


class _LossModule(nn.Module):
    """What DistributedDataParallel wraps: a loss as the forward pass of the module that is trained."""

    def __init__(self, trained: nn.Module, loss: Callable[..., object]) -> None:
        super().__init__()
        self.trained, self.loss = trained, loss

    def forward(self, *args: object) -> object:
        return self.loss(*args)


def averaged(trained: nn.Module, loss: Callable[P, R], *, all_used: bool) -> Callable[P, R]:
    """Return `loss`, the backward pass of which averages the gradients of `trained` over the workers.

    `all_used` says that every parameter takes part in the loss, which saves a search for those that do not. On GPUs
    batch normalisation sees the whole minibatch. Waits until all workers have called it.
    """
    if group_size() == 1:
        return loss
    if device().type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(trained)  # type: ignore[no-untyped-call]
    return DistributedDataParallel(_LossModule(trained, loss), find_unused_parameters=not all_used)


def mean_over_workers(values: Tensor) -> Tensor:
    """Return the mean of `values` over the workers, which all call this at the same time."""
    if group_size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / group_size()


def require_same_on_all_workers(number: int, what: str) -> None:
    """Raise ComputeError on all workers, which all call this at the same time, where they have different numbers."""
    if group_size() == 1:
        return
    extremes = torch.tensor([number, -number], device=device())
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    most, least = int(extremes[0]), -int(extremes[1])
    if most != least:
        raise ComputeError(f"the workers of one training differ in {what}: one has {least}, another {most}")


def drawn_normal(part: MinibatchPart, width: int, noise: torch.Generator) -> Tensor:
    """Return the part's rows of standard normal numbers for the whole minibatch, (n, width)."""
    return torch.randn((part.count, width), generator=noise, device=noise.device)[part.rows]
