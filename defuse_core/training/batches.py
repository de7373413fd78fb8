"""The minibatches of a training: read ahead, augmented, and shared out over workers that train together.

Images are stored on this process's device where they fit, and read one batch ahead otherwise.

The workers form a torch process group (cluster/ray_train_tune.py starts them, in `training_together`). All see the same
minibatches in the same order, so together they take the steps of a single worker, but for rounding, for dropout, whose
masks each worker draws, and for batch normalisation on CPUs, which sees the worker's part of the minibatch. Any other
process is the only worker, also where the user's program has a process group.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from defuse_core.artifacts import F32, F64, I64, Bool
from defuse_core.data import Images, PictureFiles
from defuse_core.data.read_ahead import batches_of
from defuse_core.device import device
from defuse_core.errors import ComputeError
from defuse_core.models import to_tensor
from defuse_core.seeds import torch_seed

P = ParamSpec("P")
R = TypeVar("R")

_together: ContextVar[bool] = ContextVar("together", default=False)
DEVICE_SHARE = 0.25  # largest share of the accelerator's free memory that a set of images takes


def fits_on_device(images: Images) -> bool:
    """Whether the pixels are copied to the device as a whole: on an accelerator, where they take a small share."""
    if not isinstance(images.pixels, np.ndarray) or device().type == "cpu":
        return False  # on the CPU, arrays are where they are computed with
    free: int = torch.get_device_module(device()).mem_get_info()[0]
    return images.pixels.nbytes <= DEVICE_SHARE * free


class DeviceImages:
    """Images with their labels, for a training loop that does not wait for the host."""

    def __init__(self, images: Images, readers: int = 0) -> None:
        """`readers` processes read image files ahead; 0: a thread of this process."""
        self.images = images
        self._readers = readers
        self._labels = torch.from_numpy(images.labels.copy()).to(device())
        self._pixels: Tensor | None = None
        if fits_on_device(images):
            self._pixels = torch.from_numpy(np.array(images.pixels)).to(device())
        self._scale = torch.tensor(255.0, device=device())  # a tensor: the division is exact, as numpy's is

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: I64) -> Tensor:
        """Return (n, channels, H, W) in [0, 1], as to_tensor(images.batch(rows)) does, bit for bit."""
        if self._pixels is None:
            return to_tensor(self.images.batch(rows))
        raw = self._pixels[torch.from_numpy(rows).to(device())]
        pixels = raw.float() / self._scale if raw.dtype == torch.uint8 else raw
        return pixels.contiguous(memory_format=torch.channels_last)

    def labels(self, rows: I64) -> Tensor:
        """Return the labels of `rows`, (n,)."""
        return self._labels[torch.from_numpy(rows).to(device())]

    def batches(self, order: Iterable[I64]) -> Iterator[tuple[I64, Tensor, Tensor]]:
        """Yield rows, (n,), images, (n, channels, H, W) in [0, 1], and labels, (n,), of each minibatch of `order`.

        Image files are read ahead.
        """
        if not isinstance(self.images.pixels, PictureFiles):
            for rows in order:
                yield rows, self.batch(rows), self.labels(rows)
            return
        order = list(order)
        for rows, read in zip(order, batches_of(self.images, order, self._readers), strict=True):
            yield rows, to_tensor(read), self.labels(rows)


@contextlib.contextmanager
def training_together() -> Iterator[None]:
    """Let the workers of this process's group train together inside the block, which all of them enter."""
    before = _together.set(True)
    try:
        yield
    finally:
        _together.reset(before)


def group_size() -> int:
    """Return the number of workers that train together."""
    return dist.get_world_size() if _together.get() else 1


def worker_number() -> int:
    """Return the number of this worker, from 0."""
    return dist.get_rank() if group_size() > 1 else 0


def is_first_worker() -> bool:
    """Whether this is the worker that stores checkpoints and reports."""
    return worker_number() == 0


def seed_dropout(seed: int, *path: str | int) -> None:
    """Seed a network's draws in an epoch: a resumed training equals an uninterrupted one. Workers draw differently."""
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
    """Yield this worker's part of each minibatch, with its images, (n, channels, H, W) in [0, 1], and labels, (n,)."""
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


def averaged(trained: nn.Module, loss: Callable[P, R]) -> Callable[P, R]:
    """Return `loss`, the backward pass of which averages the gradients of `trained` over the workers.

    On GPUs batch normalisation sees the whole minibatch. Waits until all workers have called it.
    """
    if group_size() == 1:
        return loss
    if device().type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(trained)  # type: ignore[no-untyped-call]
    # Also without unused parameters: otherwise it divides the gradients anew after its first step, and three workers or
    # more then add in another order than those of a training that was not interrupted.
    return DistributedDataParallel(_LossModule(trained, loss), find_unused_parameters=True)


def mean_over_workers(values: Tensor) -> Tensor:
    """Return the mean of `values` over the workers, in the shape of `values`; all call this at the same time."""
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


def random_affine(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Return each image (n, channels, H, W) randomly rotated, slanted, scaled along each axis, and shifted.

    No image is mirrored, since that changes the class of digits and signs.
    """
    count = len(images)
    angle, slant = rng.uniform(-0.17, 0.17, count), rng.uniform(-0.15, 0.15, count)  # radians; tangent
    scale, shift = rng.uniform(0.9, 1.1, (count, 2)), rng.uniform(-0.12, 0.12, (count, 2))
    return _transformed(images, angle, slant, scale, shift)


def _transformed(images: Tensor, angle: F64, slant: F64, scale: F64, shift: F64) -> Tensor:
    """Return images under affine maps, for (n,) angles and slants, (n, 2) scales, and shifts in half sides."""
    theta = np.zeros((len(images), 2, 3), np.float32)
    cos, sin = np.cos(angle), np.sin(angle)
    theta[:, 0, 0], theta[:, 0, 1] = cos * scale[:, 0], (slant * cos - sin) * scale[:, 0]
    theta[:, 1, 0], theta[:, 1, 1] = sin * scale[:, 1], (slant * sin + cos) * scale[:, 1]
    theta[:, :, 2] = shift
    grid = _affine_grid(torch.from_numpy(theta).to(images.device), *images.shape[2:])
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _affine_grid(theta: Tensor, height: int, width: int) -> Tensor:
    """Return `F.affine_grid(theta, ...)`, (n, height, width, 2), on a CPU in an eighth of its time."""
    y, x = (torch.linspace(-1, 1, side, device=theta.device) * (side - 1) / side for side in (height, width))
    x_share, y_share, shift = theta[:, :, :, None, None].unbind(2)  # (n, 2, 1, 1) each
    return (x_share * x + y_share * y[:, None]).add_(shift).permute(0, 2, 3, 1)


def augment(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Return each image, (n, channels, H, W) in [0, 1], randomly rotated, scaled, shifted, and darkened or brightened.

    Most are blurred. Blur and darkness matter: decodings are smoother than photographs and of lower contrast, and a
    person reads them all the same.
    """
    count = len(images)
    angle, scale = rng.uniform(-0.2, 0.2, count), rng.uniform(0.85, 1.15, count)
    shift = rng.uniform(-0.12, 0.12, (count, 2))
    moved = _transformed(images, angle, np.zeros(count), np.stack([scale, scale], axis=1), shift)
    for share in (0.5, 0.25):
        moved = torch.where(_column(rng.random(count) < share, images), _blurred(moved), moved)
    bright = _column(rng.uniform(0.4, 1.2, count).astype(np.float32), images)
    return (moved * bright).clamp(0, 1)


def color_jitter(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Return each image, (n, channels, H, W) in [0, 1], its contrast and each channel randomly changed."""
    count, channels = images.shape[:2]
    gain = rng.uniform(0.8, 1.2, (count, channels, 1, 1)).astype(np.float32)
    colored = images * torch.from_numpy(gain).to(images.device)
    contrast = _column(rng.uniform(0.5, 1.5, count).astype(np.float32), images)
    mean = colored.mean(dim=(1, 2, 3), keepdim=True)
    return ((colored - mean) * contrast + mean).clamp(0, 1)


def _blurred(images: Tensor) -> Tensor:
    """Return the mean of each pixel and its neighbours, as F.avg_pool2d does, on a CPU in a tenth of its time."""
    return _sums_of_neighbours(images) / _sums_of_neighbours(torch.ones_like(images[:1, :1]))


def _sums_of_neighbours(images: Tensor) -> Tensor:
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1))
    sums = torch.zeros_like(images)
    for top in range(3):
        for left in range(3):
            sums += padded[..., top : top + height, left : left + width]
    return sums


def _column(values: F32 | Bool, like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.device).view(-1, 1, 1, 1)
