"""A folder of images."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import SIZE, error_of, noise, save_picture, section

from defuse_core.data import PictureFiles, log_parts, open_splits


def write_folder(root: Path, parts: tuple[str, ...] = ("train", "validation", "test")) -> Path:
    for part in parts:
        for label, name in enumerate(("cat", "dog")):
            for i in range(5):
                save_picture(root / part / name / f"{i}.png", np.full((12, 10, 3), 100 * label + i, np.uint8))
    return root


def test_a_folder_is_read_on_demand_with_its_class_names_in_order(tmp_path: Path):
    splits = open_splits(section("folder", write_folder(tmp_path), channels=1), 0)
    assert splits.classes == ("cat", "dog")
    assert splits.counts() == {"train": 10, "validation": 10, "test": 10}
    assert isinstance(splits.train.pixels, PictureFiles)
    assert splits.train.pixels[:][:, 0, 3, 3].tolist() == [0, 1, 2, 3, 4, 100, 101, 102, 103, 104]
    assert splits.train.labels.tolist() == [0] * 5 + [1] * 5


def test_a_folder_without_validation_has_a_share_of_its_training_images_held_out(tmp_path: Path):
    splits = open_splits(section("folder", write_folder(tmp_path, ("train",)), validation_share=0.2), 0)
    assert splits.counts() == {"train": 8, "validation": 2}
    kept = open_splits(section("folder", write_folder(tmp_path), validation_share=0.2), 0)
    assert kept.counts()["train"] == 10


def test_a_class_whose_only_image_is_held_out_is_named_in_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    root = write_folder(tmp_path, ("train",))
    save_picture(root / "train" / "fox" / "0.png", noise(1, SIZE, SIZE, 3)[0])
    warned = {}
    for seed in range(20):
        data = section("folder", root, validation_share=0.3)
        splits = open_splits(data, seed)
        caplog.clear()
        log_parts(data, splits)
        lost = 2 not in splits.train.labels
        warned[lost] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warned[False] == []
    assert [line.partition(";")[0] for line in warned[True]] == [
        "images: 1 of 3 classes have no training image (fox)"
    ]


def test_hidden_files_are_not_images_of_a_class(tmp_path: Path):
    (write_folder(tmp_path) / "train" / "cat" / ".DS_Store").touch()
    assert len(open_splits(section("folder", tmp_path), 0).train) == 10


def test_nothing_in_a_hidden_folder_is_an_image_of_a_class(tmp_path: Path):
    cats = write_folder(tmp_path) / "train" / "cat"
    save_picture(cats / ".ipynb_checkpoints" / "0-checkpoint.png", noise(1, SIZE, SIZE, 3)[0])
    (cats / ".ipynb_checkpoints" / "notes.txt").touch()
    save_picture(cats / "indoors" / "5.png", noise(1, SIZE, SIZE, 3)[0])
    paths = open_splits(section("folder", tmp_path), 0).train.pixels.paths
    assert len(paths) == 11
    assert not any("checkpoint" in path for path in paths)


def test_a_link_to_a_folder_elsewhere_is_followed_each_time(tmp_path: Path):
    root = write_folder(tmp_path / "parts")
    save_picture(tmp_path / "more/5.png", noise(1, SIZE, SIZE, 3)[0])
    for name in ("one", "two"):
        (root / "train/cat" / name).symlink_to(tmp_path / "more")
    assert len(open_splits(section("folder", root), 0).train) == 12


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda root: (root / "train/cat/notes.txt").touch(), "notes.txt: expected an image"),
        (
            lambda root: (root / "test/fox").mkdir(),
            "test: expected the class folders of train, but fox is only in test",
        ),
        (
            lambda root: save_picture(root / "train/fox/0.png", noise(1, SIZE, SIZE, 3)[0]),
            "validation: expected the class folders of train, but fox is only in train",
        ),
        (lambda root: (root / "train").rename(root / "training"), "train: expected a folder"),
        (
            lambda root: [f.unlink() for f in (root / "train/cat").iterdir()],
            "train/cat: expected images of this class",
        ),
        (lambda root: [f.unlink() for f in (root / "test").glob("*/*")], "test: expected images, found none"),
        (
            lambda root: (root / "train/cat/loop").symlink_to(root / "train"),
            "train/cat/loop: this link leads to a folder above it",
        ),
        (
            lambda root: (root / "train/cat/loop").symlink_to(root),
            "train/cat/loop: this link leads to a folder above it",
        ),
        (
            lambda root: (root / "train/cat/away.png").symlink_to(root / "nowhere.png"),
            "train/cat/away.png: this link leads to a file that does not exist; remove it",
        ),
        (
            lambda root: os.mkfifo(root / "train/cat/pipe.png"),
            "train/cat/pipe.png: expected an image, found a pipe, a device or a socket; remove it",
        ),
    ],
)
def test_a_folder_out_of_order_is_refused_in_one_line(
    tmp_path: Path, spoil: Callable[[Path], Any], expected: str
):
    spoil(write_folder(tmp_path))
    assert expected in error_of(section("folder", tmp_path))
