"""Image files that processes read ahead of a training."""

from __future__ import annotations

from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from defuse_core.data import Images, PictureFiles
from defuse_core.errors import DataError
from defuse_core.training.batches import DeviceImages


def stored(folder: Path, count: int) -> Images:
    rng = np.random.default_rng(0)
    paths = [str(folder / f"{row}.png") for row in range(count)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(path)
    return Images(PictureFiles(paths, 1, 8), np.arange(count))


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
