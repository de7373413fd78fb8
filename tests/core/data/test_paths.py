"""Paths of many files in one buffer."""

from __future__ import annotations

import os

import numpy as np
import pytest

from defuse_core.data.paths import FilePaths

NAMES = ["a/0.png", "a/ü.png", os.fsdecode(b"b/\xff.png"), "b/a name with spaces.png"]


def test_paths_come_back_as_they_were_whatever_their_encoding() -> None:
    paths = FilePaths.pack([f"/data/train/{name}" for name in NAMES], "/data/train/")
    assert list(paths) == [f"/data/train/{name}" for name in NAMES]
    assert list(paths.take(np.array([3, 0]))) == [f"/data/train/{NAMES[3]}", f"/data/train/{NAMES[0]}"]
    assert list(paths.take(slice(1, 3)).take(slice(1, 2))) == [f"/data/train/{NAMES[2]}"]


def test_paths_of_several_classes_are_put_together_in_order() -> None:
    parts = [FilePaths.pack([f"/data/{name}"], "/data/") for name in NAMES]
    assert list(FilePaths.concatenate(parts)) == [f"/data/{name}" for name in NAMES]
    with pytest.raises(ValueError, match="expected one root"):
        FilePaths.concatenate([*parts, FilePaths.pack(["/other/0.png"], "/other/")])


def test_a_path_takes_little_more_than_the_letters_of_its_name() -> None:
    paths = FilePaths.pack([f"/data/train/cat/{row:07}.png" for row in range(10_000)], "/data/train/")
    held = paths.names.nbytes + paths.starts.nbytes + paths.lengths.nbytes
    assert held == 10_000 * (len("cat/0000000.png") + 10)
