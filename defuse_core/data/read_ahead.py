"""Image files that are read ahead of what computes with them, by processes or by a thread."""

from __future__ import annotations

import functools
import threading
from collections.abc import Generator, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from defuse_core.artifacts import F32, I64
from defuse_core.data.images import Images, PictureFiles
from defuse_core.errors import ComputeError, DataError
from defuse_core.files import map_ahead
from defuse_core.formatting import one_line


class _Batches(Dataset[Tensor | str]):
    """What the processes of the pool read: the pixels of some files, or the error of a file that is no image."""

    def __getitem__(self, files: PictureFiles) -> Tensor | str:
        try:
            batch = Images(files, np.zeros(len(files), np.int64)).batch()
            return torch.from_numpy(batch)  # a tensor travels in shared memory
        except DataError as error:
            return str(error)  # torch would put its traceback before it


class _Order:
    """The files of each batch, in the caller's order, so no result changes."""

    def __init__(self) -> None:
        self.batches: Iterator[PictureFiles] = iter(())

    def __iter__(self) -> Iterator[PictureFiles]:
        return self.batches


class ReaderPool:
    """Processes of a torch DataLoader that read any files and stay for the next ones."""

    def __init__(self, readers: int) -> None:
        self.in_use = threading.Lock()
        self._order = _Order()
        self._loader = DataLoader(
            _Batches(),
            batch_size=None,
            sampler=self._order,
            num_workers=readers,
            persistent_workers=True,
            multiprocessing_context="forkserver",  # a fork of a process with Ray's threads may stop for ever
            generator=torch.Generator(),  # the loader draws a seed per epoch, else from that of the dropout masks
        )

    def read(self, batches: Iterator[PictureFiles]) -> Iterator[F32]:
        """Yield the pixels of each batch, read 2 a process ahead. Raises DataError for a file that is no image."""
        self._order.batches = batches
        for pixels in self._loader:
            if isinstance(pixels, str):
                raise DataError(pixels)
            yield pixels.numpy()


@functools.cache
def reader_pool(readers: int) -> ReaderPool:
    """Return the pool that all sets of images of this process share."""
    return ReaderPool(readers)


def batches_of(images: Images, order: Iterable[slice | I64], readers: int) -> Generator[F32, None, None]:
    """Yield `images.batch(rows)` for all rows of `order`.

    Files are read ahead: by `readers` processes, or by a thread where that is 0 or other files are being read. Raises
    ComputeError where one of the processes is lost; the next files are read by new ones.
    """
    if not isinstance(images.pixels, PictureFiles):
        yield from map(images.batch, order)
    elif readers and (pool := reader_pool(readers)).in_use.acquire(blocking=False):
        try:
            yield from pool.read(map(images.pixels.at, order))
        except DataError:
            raise
        except Exception as error:  # of torch, or of the connection to a process that ends
            reader_pool.cache_clear()  # it never reads again
            why = one_line(f"{type(error).__name__}: {error}")
            raise ComputeError(
                f"resources.readers: a process that reads images failed ({why}); free memory, or lower "
                "resources.readers, and run again to continue"
            ) from error
        finally:
            pool.in_use.release()
    else:
        yield from map_ahead(images.batch, order, ahead=1)
