"""Pictures that are read without an error, and still not as they look elsewhere."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from data_samples import SIZE, noise, save_picture, section
from PIL import Image

from defuse_core.data import Images, Splits, log_parts, open_splits
from defuse_core.data.appearance import odd_images, shared_images
from defuse_core.data.images import PictureFiles
from defuse_core.suggest import inspect_data


def write(root: Path, pixels: np.ndarray) -> Path:
    """Save pictures (20, ...) as the training images of two classes."""
    for number, picture in enumerate(pixels):
        save_picture(root / "train" / ("cat", "dog")[number % 2] / f"{number}.png", picture)
    return root


def glyphs(background: int) -> np.ndarray:
    """Black glyphs (20, H, W, 4) on a ground of that opacity."""
    opacity = np.where(noise(20, SIZE, SIZE) > 128, 255, background).astype(np.uint8)
    return np.concatenate([np.zeros((20, SIZE, SIZE, 3), np.uint8), opacity[..., None]], axis=3)


def lines(root: Path, channels: int = 1) -> list[str]:
    return odd_images(open_splits(section("folder", root, channels=channels), 0).train)


def test_black_glyphs_on_transparent_ground_are_named(tmp_path: Path):
    dark, equal, transparent = lines(write(tmp_path, glyphs(0)))
    assert dark.startswith("20 of 20 training images looked at are almost black")
    assert equal == "20 of 20 training images looked at are one and the same picture"
    assert transparent.startswith(
        "20 of 20 training images looked at have transparency, which is dropped: the colours below it are used"
    )


def test_twelve_bits_in_files_of_sixteen_are_named(tmp_path: Path):
    (dark,) = lines(write(tmp_path, noise(20, SIZE, SIZE).astype(np.uint16) << 4))
    assert "are almost black, with no value over 1/8 of the range; scale them to the whole range" in dark


@pytest.mark.parametrize("mode", ["LA", "P"])
def test_grey_pictures_and_palettes_with_transparency_are_named(tmp_path: Path, mode: str):
    root = write(tmp_path, noise(20, SIZE, SIZE))
    for path in root.rglob("*.png"):
        picture = Image.open(path).convert("RGBA")
        picture.putpixel((2, 3), (9, 9, 9, 0))
        picture.convert(mode).save(path, **({"transparency": 0} if mode == "P" else {}))
    assert [line.partition(",")[0] for line in lines(root)] == [
        "20 of 20 training images looked at have transparency"
    ]


def test_opaque_pictures_and_a_few_dark_ones_are_not_odd(tmp_path: Path):
    pixels = np.concatenate([noise(20, SIZE, SIZE, 3), np.full((20, SIZE, SIZE, 1), 255, np.uint8)], axis=3)
    pixels[:8, ..., :3] //= 16
    assert lines(write(tmp_path, pixels), channels=3) == []
    in_memory = Images(np.linspace(0, 1, 40, dtype=np.float32).reshape(10, 1, 2, 2), np.zeros(10, np.int64))
    assert odd_images(in_memory) == []


def test_a_run_warns_of_odd_images_and_init_notes_them(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    data = section("folder", write(tmp_path, glyphs(0)), channels=1)
    with caplog.at_level(logging.WARNING):
        log_parts(data, open_splits(data, 0))
    warned = [record.getMessage() for record in caplog.records]
    assert [line.startswith("images: 20 of 20 training images looked at") for line in warned] == [True] * 3
    noted = inspect_data(tmp_path).warnings
    assert [line for line in noted if "looked at" in line] == [
        line.removeprefix("images: ") for line in warned
    ]


def test_test_images_that_are_training_images_are_counted_with_an_example(tmp_path: Path):
    root = write(tmp_path, noise(20, SIZE, SIZE, 3))
    for number, picture in enumerate(
        noise(30, SIZE, SIZE, 3)[17:]
    ):  # three of the training images, and ten others
        save_picture(root / "test" / ("cat", "dog")[number % 2] / f"t{number}.png", picture)
    for source in (root / "test/cat").iterdir():
        save_picture(root / "validation/cat" / source.name, 255 - np.asarray(Image.open(source)))
    (root / "validation/dog").mkdir()
    example = f"such as {root}/test/cat/t0.png, which is {root}/train/dog/17.png"
    (line,) = shared_images(open_splits(section("folder", root), 0))
    assert line.startswith(
        f"3 of 13 test images looked at are training images, too, {example}; figures on test"
    )
    assert line in inspect_data(root).warnings


def test_a_few_images_of_a_large_part_are_compared_with_all_training_images_in_memory():
    pixels = noise(500, 1, SIZE, SIZE)
    train = Images(pixels, np.zeros(500, np.int64))
    other = Images(255 - pixels[:400], np.zeros(400, np.int64))
    assert shared_images(Splits(train, other, None, ("a", "b"))) == []
    (line,) = shared_images(Splits(train, other, train.take(slice(0, 300)), ("a", "b")))
    assert line.startswith(
        "128 of 128 test images looked at are training images, too; figures on test images are"
    )


def test_test_images_that_are_held_out_for_validation_are_counted(tmp_path: Path):
    root = write(tmp_path, noise(20, SIZE, SIZE, 3))
    data = section("folder", root, validation_share=0.2)
    held_out = open_splits(data, 0).validation
    assert held_out is not None and isinstance(held_out.pixels, PictureFiles)
    for source in held_out.pixels.paths:
        save_picture(
            root / "test" / Path(source).parent.name / Path(source).name, np.asarray(Image.open(source))
        )
    (line,) = shared_images(open_splits(data, 0))
    assert line.startswith("4 of 4 test images looked at are validation images, too, such as ")
