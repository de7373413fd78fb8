"""Minibatches on this process's device: images are stored there where they fit, and read one batch ahead otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from defuse_core.artifacts import F32, I64
from defuse_core.data import Images
from defuse_core.data.images import PictureFiles
from defuse_core.device import device
from defuse_core.errors import DataError
from defuse_core.map_ahead import map_ahead
from defuse_core.models import to_tensor

DEVICE_SHARE = 0.25  # of the accelerator's free memory that a set of images may take


def is_on_disk(images: Images) -> bool:
    """Whether the images are files that are read in every epoch."""
    return isinstance(images.pixels, PictureFiles)


def fits_on_device(images: Images) -> bool:
    """Whether the pixels are copied to the device as a whole: on an accelerator, where they take a small share."""
    if isinstance(images.pixels, PictureFiles) or device().type == "cpu":
        return False  # on the CPU, arrays are where they are computed with
    free: int = torch.get_device_module(device()).mem_get_info()[0]
    return images.pixels.nbytes <= DEVICE_SHARE * free


class _Minibatches(Dataset[Tensor | str]):
    """What the processes of the loader read: a minibatch, or the error of a file that is no image."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitem__(self, rows: I64) -> Tensor | str:
        try:
            return torch.from_numpy(self.images.batch(rows))  # a tensor travels in shared memory
        except DataError as error:
            return str(error)  # torch would put its traceback before it


class FileLoader:
    """A torch DataLoader whose processes stay from epoch to epoch. The order is the caller's, so no result changes."""

    def __init__(self, images: Images, readers: int) -> None:
        self.order: list[I64] = []
        self.loader = DataLoader(
            _Minibatches(images),
            batch_size=None,
            sampler=self,
            num_workers=readers,
            persistent_workers=True,
            multiprocessing_context="forkserver",  # a fork of a process with Ray's threads may stop for ever
            collate_fn=_unchanged,
            generator=torch.Generator(),  # the loader draws a seed per epoch, else from that of the dropout masks
        )

    def __iter__(self) -> Iterator[I64]:
        return iter(self.order)

    def batches(self, order: Iterable[I64]) -> Iterator[tuple[I64, F32]]:
        """Yield rows and pixels of each minibatch, read 2 a process ahead. Raises DataError for a file that is none."""
        self.order = list(order)
        for rows, pixels in zip(self.order, self.loader, strict=True):
            if isinstance(pixels, str):
                raise DataError(pixels)
            yield rows, pixels.numpy()


def _unchanged(minibatch: Any) -> Any:
    return minibatch


class DeviceImages:
    """Images with their labels, for a training loop that does not wait for the host."""

    def __init__(self, images: Images, readers: int = 0) -> None:
        """`readers` processes read image files ahead; 0: a thread of this process."""
        self.images = images
        self._loader = FileLoader(images, readers) if readers and is_on_disk(images) else None
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
        """Yield rows, images and labels of each minibatch of `order`; image files are read ahead."""
        if self._loader is not None:
            for rows, pixels in self._loader.batches(order):
                yield rows, to_tensor(pixels), self.labels(rows)
            return
        if not is_on_disk(self.images):
            for rows in order:
                yield rows, self.batch(rows), self.labels(rows)
            return
        for rows, read in map_ahead(lambda rows: (rows, self.images.batch(rows)), order, ahead=1):
            yield rows, to_tensor(read), self.labels(rows)
