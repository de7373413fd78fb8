"""Minibatches on this process's device: images are stored there where they fit, and read one batch ahead otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from defuse_core.artifacts import I64
from defuse_core.data import Images
from defuse_core.data.images import PictureFiles
from defuse_core.device import device
from defuse_core.models import to_tensor

DEVICE_SHARE = 0.25  # of the accelerator's free memory that a set of images may take


def fits_on_device(images: Images) -> bool:
    """Whether the pixels are copied to the device as a whole: on an accelerator, where they take a small share."""
    if isinstance(images.pixels, PictureFiles) or device().type != "cuda":
        return False  # on the CPU, arrays are where they are computed with
    free, _ = torch.cuda.mem_get_info()
    return images.pixels.nbytes <= DEVICE_SHARE * free


class DeviceImages:
    """Images with their labels, for a training loop that does not wait for the host."""

    def __init__(self, images: Images) -> None:
        self.images = images
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
        """Yield rows, images and labels of each minibatch of `order`; image files are read one minibatch ahead."""
        if not isinstance(self.images.pixels, PictureFiles):
            for rows in order:
                yield rows, self.batch(rows), self.labels(rows)
            return
        with ThreadPoolExecutor(1) as reader:
            waiting = None
            for rows in order:
                following = (rows, reader.submit(self.images.batch, rows))
                if waiting is not None:
                    yield waiting[0], to_tensor(waiting[1].result()), self.labels(waiting[0])
                waiting = following
            if waiting is not None:
                yield waiting[0], to_tensor(waiting[1].result()), self.labels(waiting[0])
