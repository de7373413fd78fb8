"""Image files that processes read ahead of a training."""

from __future__ import annotations

import os
from collections.abc import Iterator
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from defuse_core.config import ResourcesSection
from defuse_core.data import Images, PictureFiles
from defuse_core.data.read_ahead import batches_of, reader_pool
from defuse_core.errors import ComputeError, DataError
from defuse_core.local import UNTRACED
from defuse_core.models import map_images
from defuse_core.protocols import silent
from defuse_core.training.batches import DeviceImages
from defuse_core.training.precision import right_by_part


class ReadersNames(PictureFiles):
    """Image files all pixels of which are two bytes of the number of the process that reads them."""

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        pixels = np.zeros((len(self.paths.take(rows)), *self.shape[1:]), np.uint8)
        pixels[:, 0, 0, :2] = divmod(os.getpid() % 65_536, 256)
        return pixels

    def at(self, rows: slice | np.ndarray) -> ReadersNames:
        return ReadersNames(self.paths.take(rows), *self.shape[1:3])


class Recording(nn.Module):
    """Answers 0, and notes the processes whose numbers are in the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.readers = set[int]()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        high, low = images[:, 0, 0, :2].mul(255).round().long().unbind(1)
        self.readers |= {*(256 * high + low).tolist()}
        return torch.eye(3)[[0] * len(images)]


def stored(folder: Path, count: int) -> Images:
    rng = np.random.default_rng(0)
    paths = [str(folder / f"{row}.png") for row in range(count)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(path)
    return Images(PictureFiles(paths, 1, 8), np.arange(count))


@pytest.fixture(autouse=True)
def no_processes_stay() -> Iterator[None]:
    yield
    reader_pool.cache_clear()


def test_processes_that_read_ahead_change_nothing_in_any_epoch_and_name_a_file_that_is_no_image(
    tmp_path: Path,
) -> None:
    images = stored(tmp_path, 9)
    others, readers = set(active_children()), list[set[int | None]]()
    here, ahead = DeviceImages(images), DeviceImages(images, readers=2)
    for order in ([np.array([3, 1]), np.array([8, 0, 4])], [np.array([7, 2, 5])], []):
        expected, found = list(here.batches(order)), list(ahead.batches(order))
        assert len(found) == len(order)
        readers.append({process.pid for process in set(active_children()) - others})
        for one, other in zip(expected, found, strict=True):
            assert all(np.array_equal(np.array(a), np.array(b)) for a, b in zip(one, other, strict=True))
    assert len(readers[0]) == 2 and readers[0] == readers[1] == readers[2]  # they stay from epoch to epoch
    (tmp_path / "6.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"^\S*6\.png: expected an image"):
        list(ahead.batches([np.array([1, 2]), np.array([6, 3])]))


def test_dropout_masks_are_the_same_whoever_reads_and_wherever_a_training_is_resumed(tmp_path: Path) -> None:
    images = stored(tmp_path, 4)

    def masks(readers: int, first_epoch: int) -> list[list[float]]:
        """Of each minibatch of the epochs from `first_epoch` to the third."""
        loader, found = DeviceImages(images, readers), []
        for epoch in range(first_epoch, 3):
            torch.manual_seed(epoch)
            minibatches = loader.batches([np.array([0, 1]), np.array([2, 3])])
            found += [F.dropout(torch.ones(16)).tolist() for _ in minibatches]
        return found

    assert masks(1, 1) == masks(0, 0)[2:]


@pytest.mark.parametrize("arithmetic", ["f32", "bf16"])
def test_the_processes_read_what_is_scored_for_all_parts_and_end_with_their_task(arithmetic: str) -> None:
    files = ReadersNames(["none"] * 2048, 1, 8)
    parts, classifier = {name: Images(files, np.zeros(2048, np.int64)) for name in ("a", "b")}, Recording()
    resources = ResourcesSection.model_validate({"readers": 2, "precision": {"answers": arithmetic}})
    others = {process.pid for process in active_children()}
    with UNTRACED.task("train", right_by_part, silent, 0):
        right = right_by_part(classifier, parts, resources)
        readers = {process.pid for process in active_children()} - others
        if arithmetic == "bf16":  # the sample on which its error is measured is read here
            classifier.readers.discard(os.getpid() % 65_536)
        assert len(readers) == 2 and classifier.readers == {pid % 65_536 for pid in readers if pid}
    assert {process.pid for process in active_children()} == others
    assert all(hits.all() for hits in right.values())


def test_a_second_set_is_read_by_a_thread_while_the_processes_read_the_first(tmp_path: Path) -> None:
    images, order = stored(tmp_path, 4), [np.array([0]), np.array([3, 1]), np.array([2])]
    first = batches_of(images, order, readers=1)
    found = [next(first)]
    for rows, batch in zip(order, batches_of(images, order, readers=1), strict=True):
        assert np.array_equal(batch, images.batch(rows))
    found += first
    assert all(np.array_equal(batch, images.batch(rows)) for rows, batch in zip(order, found, strict=True))
    next(batches_of(images, order, readers=1))  # left, and the next one begins anew
    assert [len(batch) for batch in batches_of(images, order, readers=1)] == [1, 2, 1]


@pytest.mark.parametrize("ended", [False, True])  # when its connection fails, or before
def test_a_process_that_is_killed_ends_what_it_reads_and_a_new_one_reads_the_next_images(
    tmp_path: Path, ended: bool
) -> None:
    images, order, others = stored(tmp_path, 9), [np.array([row]) for row in range(9)], set(active_children())
    read = batches_of(images, order, readers=1)
    next(read)
    (process,) = set(active_children()) - others
    process.kill()
    if ended:
        process.join()
    # an error of the machine: the sweep leaves out no λ for it
    with pytest.raises(ComputeError, match=r"a process that reads images failed \(\w+Error:.*run again"):
        list(read)
    assert len(list(batches_of(images, order, readers=1))) == 9


def test_an_error_that_is_kept_does_not_keep_the_processes_from_the_next_images(tmp_path: Path) -> None:
    def fails(images: torch.Tensor) -> torch.Tensor:
        raise ValueError(len(images))

    with pytest.raises(ValueError, match="2") as kept:
        map_images(fails, stored(tmp_path, 4), batch_size=2, readers=1)
    assert kept.tb and not reader_pool(1).in_use.locked()
