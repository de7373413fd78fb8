"""Pictures that are read without an error, and still not as they look elsewhere."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
from data_samples import SIZE, noise, save_picture, section
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import TiffImageFile

from defuse_core.data import Images, Splits, log_parts, open_splits
from defuse_core.data.appearance import odd_images, shared_images
from defuse_core.data.images import PictureFiles
from defuse_core.files import digest_of
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
    return odd_images(open_splits(section("folder", root, channels=channels), 0))


def odd_in_memory(pixels: np.ndarray, test: np.ndarray | None = None) -> list[str]:
    train, other = (
        each if each is None else Images(each, np.zeros(len(each), np.int64)) for each in (pixels, test)
    )
    return odd_images(Splits(train, None, other, ("a", "b")))


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


def save_turned(path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(noise(SIZE, SIZE, 3)).save(path, exif=exif)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_an_orientation_that_is_not_applied_is_named(tmp_path: Path, suffix: str):
    root = write(tmp_path, noise(20, SIZE, SIZE))
    save_turned(root / f"train/cat/turned.{suffix}")
    (line,) = lines(root)
    assert line.startswith("1 of 21 training images looked at have an EXIF orientation, which is ignored")
    assert line in inspect_data(root).notes


def test_a_tiff_is_turned_by_its_orientation_without_a_line(tmp_path: Path):
    root = write(tmp_path, noise(20, SIZE, SIZE))
    save_turned(root / "train/cat/turned.tiff")
    assert lines(root) == []


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
def test_frames_and_pages_after_the_first_are_named_without_reading_all(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(TiffImageFile, "n_frames", property(lambda _: pytest.fail("reads every page")))
    root = write(tmp_path, noise(20, SIZE, SIZE))
    first, second = map(Image.fromarray, noise(2, SIZE, SIZE, 3))
    first.save(root / f"train/cat/moving.{suffix}", save_all=True, append_images=[second])
    assert lines(root) == [
        "1 of 21 training images looked at have several frames or pages; only the first is read"
    ]


def test_opaque_pictures_and_a_few_dark_ones_are_not_odd(tmp_path: Path):
    pixels = np.concatenate([noise(20, SIZE, SIZE, 3), np.full((20, SIZE, SIZE, 1), 255, np.uint8)], axis=3)
    pixels[:8, ..., :3] //= 16
    assert lines(write(tmp_path, pixels), channels=3) == []
    assert odd_in_memory(np.linspace(0, 1, 40, dtype=np.float32).reshape(10, 1, 2, 2)) == []


def test_a_run_warns_of_odd_images_and_init_notes_them(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    data = section("folder", write(tmp_path, glyphs(0)), channels=1)
    with caplog.at_level(logging.WARNING):
        log_parts(data, open_splits(data, 0))
    warned = [record.getMessage() for record in caplog.records]
    assert [line.startswith("images: 20 of 20 training images looked at") for line in warned] == [True] * 3
    noted = inspect_data(tmp_path).notes
    assert [line for line in noted if "looked at" in line] == [
        line.removeprefix("images: ") for line in warned
    ]


def test_classes_that_are_called_almost_alike_are_told_by_run_and_init(tmp_path: Path, caplog):
    root = write(tmp_path, noise(20, SIZE, SIZE))
    for name in ("Cat", "f\xfcnf", "fu\u0308nf"):
        (root / "train" / "cat").rename(root / "train" / name)
        write(root, noise(20, SIZE, SIZE))
    data = section("folder", root, channels=1)
    log_parts(data, open_splits(data, 0))
    line = (
        "of the classes, 'cat' differs only in case from 'Cat', 'f\\xfcnf' differs only in the Unicode form of its "
        "letters from 'fu\\u0308nf'; merge those that are one class"
    )
    assert f"images: {line}" in caplog.messages
    assert line in inspect_data(root).notes


def test_test_and_validation_images_are_looked_at_as_training_images_are(tmp_path: Path):
    root = write(tmp_path, noise(20, SIZE, SIZE))
    for part, picture in {"test": noise(SIZE, 3 * SIZE, 3), "validation": noise(3 * SIZE, SIZE, 3)}.items():
        (root / part / "dog").mkdir(parents=True)
        save_picture(root / part / "cat" / f"{part}.png", picture)
    save_turned(root / "test" / "cat" / "turned.png")
    assert [" ".join(line.split()[:9]) for line in inspect_data(root).notes if "looked at" in line] == [
        "1 of 2 test images looked at have an",
        "1 of 1 validation images looked at have sides",
        "1 of 1 validation images looked at are coloured,",
        "1 of 2 test images looked at have sides",
        "2 of 2 test images looked at are coloured,",
    ]
    pixels = noise(20, 1, SIZE, SIZE)
    for dark in (pixels % 2, (pixels / np.float32(255) / 255)):
        (line,) = odd_in_memory(pixels, dark)
        assert line.startswith("20 of 20 test images looked at are almost black")


def test_images_that_are_held_out_for_validation_are_looked_at_once(tmp_path: Path):
    (dark, *_) = lines(write(tmp_path, noise(20, SIZE, SIZE) // 9))
    data = section("folder", tmp_path, channels=1, validation_share=0.2)
    assert [dark.replace("20 of 20", "16 of 16")] == odd_images(open_splits(data, 0))


def test_test_images_that_are_training_images_are_counted_with_an_example(tmp_path: Path, caplog):
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
    assert line.startswith(f"3 of 13 test images looked at are also training images, {example}; they make ")
    assert line in inspect_data(root).notes
    log_parts(section("folder", root), open_splits(section("folder", root), 0))
    assert f"images: {line}" in caplog.messages


def test_training_images_that_are_in_two_classes_are_counted_with_an_example(tmp_path: Path):
    root = write(tmp_path, noise(20, SIZE, SIZE, 3))
    cats = root / "train" / "cat"
    (root / "train" / "puma").symlink_to(cats)  # the whole class
    copied = (cats / "0.png").rename(cats / "0\n.png")
    (root / "train" / "dog" / "0.png").write_bytes(copied.read_bytes())
    (line,) = shared_images(open_splits(section("folder", root), 0))
    assert line.startswith(
        f"21 of 31 training images looked at are also in another class, such as {cats}/0\\n.png, which is "
        f"{root}/train/puma/0\\n.png; no classifier is right on both"
    )


def test_equal_training_images_of_one_class_are_not_told_and_those_of_two_are():
    pixels = np.repeat(noise(10, 1, SIZE, SIZE), 2, axis=0)
    for labels, told in ((np.arange(20) // 2 % 2, 0), (np.arange(20) % 2, 1)):
        found = shared_images(Splits(Images(pixels, labels), None, None, ("a", "b")))
        assert [line.partition(";")[0] for line in found] == told * [
            "20 of 20 training images looked at are also in another class"
        ]


def test_a_few_images_of_a_large_part_are_compared_with_all_training_images_in_memory():
    pixels = noise(500, 1, SIZE, SIZE)
    train = Images(pixels, np.zeros(500, np.int64))
    other = Images(255 - pixels[:400], np.zeros(400, np.int64))
    assert shared_images(Splits(train, other, None, ("a", "b"))) == []
    (line,) = shared_images(Splits(train, other, train.take(slice(0, 300)), ("a", "b")))
    assert line.startswith(
        "128 of 128 test images looked at are also training images; they make figures on test images"
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
    assert line.startswith("4 of 4 test images looked at are also validation images, such as ")


@pytest.mark.parametrize("odd", [14, 15])
def test_pictures_are_odd_where_three_quarters_of_them_are(odd: int):
    dark, equal = noise(20, 1, SIZE, SIZE), noise(20, 1, SIZE, SIZE)
    dark[:odd] //= 9  # 28 at most, of 255
    equal[:odd] = equal[0]
    told = [odd_in_memory(pixels) for pixels in (dark, equal)]
    assert [len(each) for each in told] == ([0, 0] if odd == 14 else [1, 1])
    if odd == 15:
        assert told[0][0].startswith("15 of 20 training images looked at are almost black")
        assert told[1] == ["15 of 20 training images looked at are one and the same picture"]


def test_dark_pictures_with_a_light_spot_and_a_single_picture_are_not_odd():
    dark = noise(20, 1, SIZE, SIZE) // 9
    dark[:, :, 3, 3] = 255
    assert odd_in_memory(dark) == odd_in_memory(dark[:1]) == []


@pytest.mark.parametrize(("opacity", "told"), [((128, 128), 0), ((255, 255), 0), ((100, 255), 1)])
def test_only_an_opacity_that_differs_within_a_picture_shows_something(
    tmp_path: Path, opacity: tuple[int, int], told: int
):
    alpha = np.resize(np.array(opacity, np.uint8), (20, SIZE, SIZE, 1))
    root = write(tmp_path, np.concatenate([noise(20, SIZE, SIZE, 3), alpha], axis=3))
    assert len(lines(root)) == told


def test_training_images_and_those_of_a_part_are_looked_at_from_the_first_to_the_last(
    monkeypatch: pytest.MonkeyPatch,
):
    pixels = noise(310, 1, SIZE, SIZE)
    train = Images(pixels[:10], np.zeros(10, np.int64))
    part = Images(
        np.concatenate([pixels[10:309], pixels[9:10]]), np.zeros(300, np.int64)
    )  # the last one alone
    (line,) = shared_images(Splits(train, None, part, ("a", "b")))
    assert line.startswith("1 of 128 test images looked at are also training images")
    monkeypatch.setattr("defuse_core.data.appearance.MOST_COMPARED", 3)  # rows 0, 4 and 9
    (line,) = shared_images(Splits(train, None, train.take(np.array([0, 1, 4, 8])), ("a", "b")))
    assert line.startswith("2 of 4 test images")


def test_each_file_is_read_once_however_many_parts_it_is_compared_with_and_several_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pictures = noise(36, SIZE, SIZE, 3)
    for number, picture in enumerate(pictures):
        save_picture(tmp_path / "train" / ("cat", "dog")[number % 2] / f"{number}.bmp", picture)
    for part in ("validation", "test"):
        for number, picture in enumerate(255 - pictures[:4]):
            save_picture(tmp_path / part / ("cat", "dog")[number % 2] / f"{part}{number}.bmp", picture)
    read, together = list[str](), Barrier(4)

    def noted(path: Path) -> str:
        read.append(path.name)
        if path.parts[-3] == "train":
            together.wait(10)  # for the reading of three others
        return digest_of(path)

    monkeypatch.setattr("defuse_core.data.appearance.digest_of", noted)
    (line,) = shared_images(open_splits(section("folder", tmp_path), 0))
    assert line.startswith("4 of 4 test images looked at are also validation images")
    assert len(read) == len(set(read)) == 44


def test_what_is_no_file_or_of_another_size_is_not_read_and_what_cannot_be_read_is_not_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    paths = {part: [tmp_path / f"{part}{number}" for number in range(4)] for part in ("train", "test")}
    for part, longer in (("train", 7), ("test", 8)):
        present, other, pipe, _ = paths[part]  # the last one does not exist
        present.write_bytes(b"same size")
        other.write_bytes(b"." * longer)
        os.mkfifo(pipe)
    read = set[str]()

    def noted(path: Path) -> str:
        assert path.is_file()  # a pipe would be waited for without end
        read.add(path.name)
        return digest_of(path)

    def refused(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    files = {part: PictureFiles([str(path) for path in paths[part]], 1, SIZE) for part in paths}
    train, test = (Images(files[part], np.zeros(4, np.int64)) for part in ("train", "test"))
    monkeypatch.setattr("defuse_core.data.appearance.digest_of", noted)
    (line,) = shared_images(Splits(train, None, test, ("a", "b")))
    assert line.startswith(f"1 of 4 test images looked at are also training images, such as {tmp_path}/test0")
    assert read == {
        "train0",
        "train1",
        "test0",
        "test1",
    }  # training images are looked for among themselves, too
    monkeypatch.setattr("defuse_core.data.appearance.digest_of", refused)
    assert shared_images(Splits(train, None, test, ("a", "b"))) == []


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_a_damaged_exif_block_is_not_odd_and_stops_nothing(tmp_path: Path, suffix: str):
    root = write(tmp_path, noise(20, SIZE, SIZE))
    for path in root.rglob("*.png"):
        picture = Image.open(path).copy()
        path.unlink()
        picture.save(path.with_suffix(f".{suffix}"), exif=b"nonsense")
    assert lines(root) == []


def test_an_orientation_that_is_not_known_is_not_turned(tmp_path: Path):
    root = write(tmp_path, noise(20, SIZE, SIZE))
    for path in root.rglob("*.png"):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 0
        Image.open(path).save(path, exif=exif)
    assert lines(root) == []
