"""What `defuse init` finds in images before any run."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from defuse_core.errors import DataError
from defuse_core.suggest import inspect_data
from defuse_core.suggest.inspect import plain_ground

PIXELS = np.random.default_rng(7).integers(0, 256, (40, 16, 16), np.uint8)


def write(root: Path) -> Path:
    for number, pixels in enumerate(PIXELS):
        folder = root / "train" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (os.mkfifo, "expected an image, found a pipe, a device or a socket; remove it"),
        (
            lambda path: path.symlink_to("nowhere.png"),
            "this link leads to a file that does not exist; remove it",
        ),
    ],
    ids=["a named pipe", "a link to nothing"],
)
def test_a_name_that_is_no_file_is_refused_before_any_run(
    spoil: Callable[[Path], Any], line: str, tmp_path: Path
):
    spoil(write(tmp_path) / "train/cat/odd.png")
    with pytest.raises(DataError, match=f"odd.png: {line}$"):
        inspect_data(tmp_path)


def test_files_that_are_no_pictures_are_named_together(tmp_path: Path):
    write(tmp_path)
    for name in ("cat/0.png", "dog/1.png"):
        (tmp_path / "train" / name).write_bytes(b"")
    with pytest.raises(
        DataError, match=r"^2 of 40 image .*/cat/0\.png, .*/dog/1\.png; .* found an empty file"
    ):
        inspect_data(tmp_path)


def test_pictures_that_are_stretched_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path)
    height, width, *_ = PIXELS[0].shape
    for number, size in enumerate([(2 * width, height), (width, 3 * height), (41, 40)]):
        Image.fromarray(PIXELS[number]).resize(size).save(tmp_path / f"train/cat/{number}.png")
    line = "2 of 41 pictures looked at have sides that differ by over 10 % and are stretched to a square "
    facts = inspect_data(tmp_path)
    assert sum(noted.startswith(line) for noted in facts.notes) == 1
    assert (facts.channels, facts.photographs) == (1, False)  # grey ones are none, whatever their ground
    monkeypatch.setattr("defuse_core.suggest.inspect.SAMPLE", 3)
    assert any("1 of 4 pictures looked at" in noted for noted in inspect_data(tmp_path).notes)


def test_the_plain_ground_is_the_share_of_pixels_of_one_brightness_whatever_their_colour():
    colours = np.zeros((1, 3, 4, 4), np.float32)
    colours[0, 0, :, ::2] = colours[0, 1, :, 1::2] = 0.6  # red and green columns
    assert plain_ground(colours) == 1
    steps = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4) / 255
    assert plain_ground(steps) == 9 / 16 and plain_ground(10 * steps) == 1 / 16
    assert plain_ground(np.concatenate([10 * steps, steps, 0 * steps])) == 9 / 16  # the median


def test_arrays_of_an_npz_file_that_are_not_read_are_named(tmp_path: Path):
    parts = {"train_images": PIXELS, "train_labels": np.arange(40) % 2}
    np.savez(tmp_path / "own.npz", **parts)
    before = inspect_data(tmp_path / "own.npz").notes
    np.savez(tmp_path / "own.npz", **parts, val_images=PIXELS, val_labels=np.arange(40) % 2)
    line, *renames = [line for line in inspect_data(tmp_path / "own.npz").notes if line not in before]
    assert renames == [
        f"'val_{kind}' is not read; rename it to validation_{kind} to use it" for kind in ("images", "labels")
    ]
    assert line.startswith(
        "arrays that are not read: 'val_images', 'val_labels'; names that are read: classes, test_images, "
    )


@pytest.mark.parametrize("name", ["pipe.npz", "nowhere"])
def test_what_is_neither_a_folder_nor_a_file_is_refused(name: str, tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(DataError, match=f"init .*/{name}: expected a folder of images, or an .npz file"):
        inspect_data(tmp_path / name)


@pytest.mark.parametrize("name", ["a\ttab", "\udcc3ber"], ids=["a tab", "not in the locale's encoding"])
def test_a_folder_whose_name_is_no_text_is_to_be_renamed(name: str, tmp_path: Path):
    with pytest.raises(
        DataError, match=r"root: expected text without control .*; rename it, or use a UTF-8 lo"
    ):
        inspect_data(write(tmp_path / name))


def test_images_directly_in_train_are_to_be_sorted(tmp_path: Path):
    for path in write(tmp_path).glob("train/*/*"):
        path.rename(tmp_path / "train" / path.name)
    for folder in tmp_path.glob("train/*/"):
        folder.rmdir()
    refused = r"train: .* found images directly in it; sort them into such folders$"
    with pytest.raises(DataError, match=refused):
        inspect_data(tmp_path)
    (write(tmp_path / "other") / "train").rename(tmp_path / "test")  # no class beside another
    (tmp_path / "other").rmdir()
    with pytest.raises(DataError, match=refused):
        inspect_data(tmp_path)


def test_a_class_that_is_called_train_is_moved_with_the_others_by_the_command_that_is_suggested(
    tmp_path: Path,
):
    for name, own in (("cat", "car"), ("dog", "train")):
        (write(tmp_path / "other") / "train" / name).rename(tmp_path / own)
        shutil.rmtree(tmp_path / "other")
    (tmp_path / ".git/hooks").mkdir(parents=True)
    (tmp_path / "LICENSE").touch()
    with pytest.raises(DataError, match="if train is a class like car, move all class folders") as refused:
        inspect_data(tmp_path)
    command = str(refused.value).partition(" into a new train/: ")[2]
    subprocess.run(["sh", "-c", command], check=True)
    assert inspect_data(tmp_path).classes == ("car", "train")


def test_class_folders_are_known_beside_hidden_folders_and_files(tmp_path: Path):
    """As in a clone of a repository; neither is moved by the command."""
    write(tmp_path / "clone")
    for folder in (tmp_path / "clone/train").iterdir():
        folder.rename(tmp_path / "clone" / folder.name)
    (tmp_path / "clone/train").rmdir()
    (tmp_path / "clone/.git").mkdir()
    shutil.copy(tmp_path / "clone/cat/0.png", tmp_path / "clone/.git")
    (tmp_path / "clone/README.md").touch()
    with pytest.raises(
        DataError, match="found class folders such as cat/; move them into train/: mkdir"
    ) as told:
        inspect_data(tmp_path / "clone")
    command = str(told.value).partition("move them into train/: ")[2]
    subprocess.run(["sh", "-c", command], check=True)
    assert inspect_data(tmp_path / "clone").classes == ("cat", "dog")


def test_the_refusal_of_an_npz_file_with_transparency_says_what_to_drop(tmp_path: Path):
    np.savez(
        tmp_path / "own.npz", train_images=np.zeros((8, 16, 16, 4), np.uint8), train_labels=np.arange(8) % 2
    )
    line = r"with c of 1 or 3, found \(8, 16, 16, 4\); reshape them, or drop the channel of transparency$"
    with pytest.raises(DataError, match=line):
        inspect_data(tmp_path / "own.npz")
