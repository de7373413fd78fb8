"""Images in memory and on disk, and the parts of a data set."""

from __future__ import annotations

import base64
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import SIZE, ids, noise, numbered, save_picture
from PIL import Image
from sklearn.datasets import load_sample_image

from defuse_core.data import Images, PictureFiles, Splits
from defuse_core.data.images import (
    FilePaths,
    data_address,
    evenly_spaced,
    expect_labels,
    read_picture,
    to_levels,
)
from defuse_core.errors import DataError

NAMES = ["a/0.png", "a/ü.png", os.fsdecode(b"b/\xff.png"), "b/a name with spaces.png"]


@pytest.mark.parametrize("rows", [slice(1, 4), np.array([3, 0, 3])])
def test_a_batch_is_scaled_to_one_contiguous_and_the_callers_own(rows: Any):
    pixels = noise(5, SIZE, SIZE, 3).transpose(0, 3, 1, 2)
    pixels.flags.writeable = False
    batch = Images(pixels, np.zeros(5, np.int64)).batch(rows)
    assert batch.dtype == np.float32
    assert batch.flags.c_contiguous
    assert np.array_equal(batch, pixels[rows].astype(np.float32) / np.float32(255))
    batch[:] = 0


def test_float_pixels_are_served_as_they_are_from_a_read_only_array():
    pixels = np.linspace(0, 1, 4 * SIZE * SIZE, dtype=np.float32).reshape(4, 1, SIZE, SIZE)
    pixels.flags.writeable = False
    batch = Images(pixels, np.zeros(4, np.int64)).batch(slice(0, 4))
    assert np.array_equal(batch, pixels)
    batch[:] = 0
    assert pixels.max() == 1


def test_taken_images_keep_their_labels_in_the_order_asked_for():
    taken = numbered(10).take(np.array([7, 2, 4]))
    assert ids(taken) == [7, 2, 4]
    assert taken.labels.tolist() == [1, 0, 0]


def test_images_refuse_labels_of_another_number():
    with pytest.raises(ValueError, match="labels"):
        Images(noise(3, 1, SIZE, SIZE), np.zeros(2, np.int64))


def test_picture_files_are_read_only_when_indexed_and_equal_the_loaded_ones(tmp_path: Path):
    originals = noise(4, SIZE, SIZE, 3)
    paths = [save_picture(tmp_path / f"{i}.png", pixels) for i, pixels in enumerate(originals)]
    images = Images(PictureFiles([*paths, str(tmp_path / "absent.png")], 3, SIZE), np.arange(5))
    present = images.take(np.array([3, 1, 0]))
    assert np.array_equal(present.loaded().pixels[:], originals[[3, 1, 0]].transpose(0, 3, 1, 2))
    assert np.array_equal(present.batch(slice(0, 2)), present.loaded().batch(slice(0, 2)))
    with pytest.raises(DataError, match=r"absent\.png"):
        images.loaded()


def test_picture_files_survive_pickling(tmp_path: Path):
    path = save_picture(tmp_path / "0.png", noise(1, SIZE, SIZE, 3)[0])
    files = PictureFiles([path], 3, SIZE)
    assert np.array_equal(pickle.loads(pickle.dumps(files))[:], files[:])


def test_a_file_that_is_not_an_image_is_named(tmp_path: Path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(DataError, match=r"broken\.png: expected an image"):
        PictureFiles([str(tmp_path / "broken.png")], 3, SIZE)[:]


def test_an_image_with_almost_too_many_pixels_for_pillow_is_read_without_a_warning(tmp_path: Path):
    Image.new("L", (SIZE, SIZE)).save(tmp_path / "map.png")
    code = (
        f"from PIL import Image; Image.MAX_IMAGE_PIXELS = {SIZE * SIZE - 1}; "
        f"from defuse_core.data.images import read_picture; read_picture('map.png', 1, {SIZE})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""


def test_an_image_with_too_many_pixels_for_pillow_is_to_be_shrunk(tmp_path: Path):
    Image.new("1", (14_000, 14_000)).save(tmp_path / "map.png")
    with pytest.raises(
        DataError, match=r"map\.png: this image has too many pixels to be read; shrink or remove it$"
    ):
        read_picture(str(tmp_path / "map.png"), 1, SIZE)


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path: Path):
    path = save_picture(tmp_path / "deep.png", np.full((SIZE, SIZE), 0x8000, np.uint16))
    assert (PictureFiles([path], 1, SIZE)[:] == 0x80).all()


@pytest.mark.parametrize(
    ("kind", "stored", "expected"),
    [
        (np.float32, (0.0, 0.25, 1.0), (0, 64, 255)),
        (np.float32, (0.0, 0.1, 0.25), (0, 26, 64)),  # a dark picture of floats
        (np.uint16, (0, 0x4000, 0xFFFF), (0, 0x40, 0xFF)),
        (np.uint16, (0, 64, 255), (0, 0, 0)),  # a dark picture of 16 bits
    ],
)
def test_tiffs_of_16_bits_and_of_floats_are_scaled_to_0_to_255(
    tmp_path: Path, kind: Any, stored: tuple[float, ...], expected: tuple[int, ...]
):
    path = save_picture(tmp_path / "deep.tif", np.resize(np.array(stored, kind), (SIZE, SIZE)))
    for channels in (1, 3):
        found = PictureFiles([path], channels, SIZE)[:]
        assert (found == np.resize(np.array(expected, np.uint8), (SIZE, SIZE))).all()


def test_no_program_is_started_for_an_image_whatever_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Pillow hands PostScript to Ghostscript."""
    started = tmp_path / "started"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {started}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    path = tmp_path / "odd.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(DataError, match=r"odd\.png: expected an image, found cannot identify"):
        read_picture(str(path), 1, SIZE)
    assert not started.exists()


@pytest.mark.parametrize("kind", ["MPO", "GIF"])
def test_the_first_picture_of_a_camera_or_of_a_renamed_gif_is_read(tmp_path: Path, kind: str):
    first, second = (Image.new("L", (SIZE, SIZE), grey) for grey in (200, 50))
    first.save(tmp_path / "odd.jpg", kind, save_all=True, append_images=[second])
    assert abs(int(read_picture(str(tmp_path / "odd.jpg"), 1, SIZE).mean()) - 200) < 3


@pytest.mark.parametrize("pixel", [-0.5, 1.5, 255.0, np.nan])
def test_a_tiff_of_floats_in_another_range_is_named(tmp_path: Path, pixel: float):
    pixels = np.ones((SIZE, SIZE), np.float32)
    pixels[0, 0] = pixel
    path = save_picture(tmp_path / "odd.tif", pixels)
    with pytest.raises(
        DataError, match=r"odd\.tif: expected floats of 0 to 1, found .*; divide those of all"
    ):
        PictureFiles([path], 1, SIZE)[:]


@pytest.mark.parametrize("brightest", [1, 250, 260, 0xFFFF, 2**31 - 1])
def test_a_tiff_of_32_bit_integers_is_refused_whatever_its_brightest_pixel(tmp_path: Path, brightest: int):
    path = save_picture(tmp_path / "deep.tif", np.full((SIZE, SIZE), brightest, np.int32))
    with pytest.raises(
        DataError, match=r"deep\.tif: expected integers of 8 or 16 bits, found 32 bits, .*; save"
    ):
        PictureFiles([path], 1, SIZE)[:]


def test_a_transparent_palette_is_read_as_its_colours(tmp_path: Path):
    picture = Image.new("P", (SIZE, SIZE), 1)
    picture.putpalette([0, 0, 0, 10, 20, 30])
    picture.save(tmp_path / "palette.png", transparency=b"\x00\x80")
    pixels = PictureFiles([str(tmp_path / "palette.png")], 3, SIZE)[:]
    assert pixels[0, :, 4, 4].tolist() == [10, 20, 30]


def test_pictures_are_converted_to_the_given_size_and_channels(tmp_path: Path):
    path = save_picture(tmp_path / "wide.png", np.full((20, 31, 3), (255, 0, 0), np.uint8))
    grey = PictureFiles([path], 1, SIZE)[:]
    assert grey.shape == (1, 1, SIZE, SIZE)
    assert (grey == 76).all()  # the luminance of red, ITU-R 601


def splits_of(images: Images) -> Splits:
    return Splits(images, None, images.take(slice(0, 3)), ("even", "odd"))


def test_counts_name_the_parts_that_exist():
    assert splits_of(numbered(9)).counts() == {"train": 9, "test": 3}


def test_equal_splits_have_equal_fingerprints_in_memory_and_on_disk(tmp_path: Path):
    paths = [save_picture(tmp_path / f"{i}.png", pixels) for i, pixels in enumerate(noise(9, SIZE, SIZE, 3))]
    images = Images(PictureFiles(paths, 3, SIZE), np.arange(9) % 2)
    assert splits_of(images).fingerprint() == splits_of(images.loaded()).fingerprint()


@pytest.mark.parametrize("change", ["pixel", "label", "class name", "order", "size", "tracks"])
def test_any_change_to_small_splits_changes_their_fingerprint(change: str):
    pixels, labels, classes = numbered(9).pixels[:].copy(), np.arange(9) % 2, ["even", "odd"]
    before = Splits(Images(pixels.copy(), labels.copy()), None, None, tuple(classes)).fingerprint()
    if change == "pixel":
        pixels[4] += np.float32(0.5)
    elif change == "label":
        labels[8] = 1
    elif change == "class name":
        classes[0] = "straight"
    elif change == "order":
        pixels = pixels[::-1].copy()
    elif change == "size":
        pixels, labels = pixels[:8], labels[:8]
    tracks = np.arange(9) if change == "tracks" else None
    assert Splits(Images(pixels, labels, tracks), None, None, tuple(classes)).fingerprint() != before


def test_a_fingerprint_reads_few_images_of_a_large_set():
    class Counting(PictureFiles):
        read = 0

        def __getitem__(self, rows: Any) -> Any:
            Counting.read += len(rows)
            return np.zeros((len(rows), 1, SIZE, SIZE), np.uint8)

    images = Images(Counting(["x"] * 100_000, 1, SIZE), np.zeros(100_000, np.int64))
    assert len(Splits(images, None, None, ("a", "b")).fingerprint()) == 64
    assert 0 < Counting.read <= 128


def test_paths_come_back_as_they_were_whatever_their_encoding():
    paths = FilePaths.pack([f"/data/train/{name}" for name in NAMES], "/data/train/")
    assert list(paths) == [f"/data/train/{name}" for name in NAMES]
    assert list(paths.take(np.array([3, 0]))) == [f"/data/train/{NAMES[3]}", f"/data/train/{NAMES[0]}"]
    assert list(paths.take(slice(1, 3)).take(slice(1, 2))) == [f"/data/train/{NAMES[2]}"]


def test_paths_of_several_classes_are_put_together_in_order():
    parts = [FilePaths.pack([f"/data/{name}"], "/data/") for name in NAMES]
    assert list(FilePaths.concatenate(parts)) == [f"/data/{name}" for name in NAMES]
    with pytest.raises(ValueError, match="expected one root"):
        FilePaths.concatenate([*parts, FilePaths.pack(["/other/0.png"], "/other/")])


def test_a_path_takes_no_more_than_the_letters_of_the_longest_name():
    paths = FilePaths.pack([f"/data/train/cat/{row:07}.png" for row in range(10_000)], "/data/train/")
    assert paths.names.nbytes == 10_000 * len("cat/0000000.png")


@pytest.mark.parametrize(
    ("pixels", "labels", "tracks", "field"),
    [
        (np.zeros((3, 1, SIZE, SIZE)), np.zeros(3, np.int64), None, "pixels: .* found float64"),
        (np.zeros((3, SIZE, SIZE), np.uint8), np.zeros(3, np.int64), None, r"pixels: .* \(3, 8, 8\)"),
        (np.zeros((3, 1, SIZE, SIZE), np.uint8), np.zeros(3, np.int32), None, "labels: .* found int32"),
        (
            np.zeros((3, 1, SIZE, SIZE), np.uint8),
            np.zeros(3, np.int64),
            np.zeros(2, np.int64),
            r"tracks: expected \(3,\), found \(2,\)",
        ),
    ],
)
def test_images_refuse_arrays_of_another_type_or_shape(pixels: Any, labels: Any, tracks: Any, field: str):
    with pytest.raises(ValueError, match=rf"^Images\.{field}"):
        Images(pixels, labels, tracks)


def test_files_of_more_than_the_limit_of_bytes_are_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("defuse_core.data.images.MAX_LOADED", 4 * 3 * SIZE * SIZE)
    paths = [save_picture(tmp_path / f"{i}.png", pixels) for i, pixels in enumerate(noise(5, SIZE, SIZE, 3))]
    images = Images(PictureFiles(paths, 3, SIZE), np.arange(5))
    assert images.loaded() is images
    assert isinstance(images.take(slice(0, 4)).loaded().pixels, np.ndarray)


def test_only_the_named_parts_are_loaded(tmp_path: Path):
    path = save_picture(tmp_path / "0.png", noise(1, SIZE, SIZE, 3)[0])
    images = Images(PictureFiles([path], 3, SIZE), np.zeros(1, np.int64))
    splits = Splits(images, images, None, ("a", "b"))
    read = {
        part
        for part, held in splits.loaded("train", "test").parts().items()
        if isinstance(held.pixels, np.ndarray)
    }
    assert read == {"train"}
    assert isinstance(splits.loaded().parts()["validation"].pixels, np.ndarray)


def test_a_large_picture_is_made_smaller_with_all_of_its_pixels(tmp_path: Path):
    stripes = np.resize(np.array([0, 255], np.uint8), (2 * SIZE, 2 * SIZE))
    small = PictureFiles([save_picture(tmp_path / "stripes.png", stripes)], 1, SIZE)[:]
    assert np.abs(small[..., 1:-1].astype(int) - 127.5).max() < 1  # no stripe is left


def test_names_and_parts_and_shapes_that_read_alike_in_a_row_have_other_fingerprints():
    images, some = numbered(4), numbered(2)
    wide = Images(images.pixels.reshape(2, 1, 1, 2), some.labels)  # type: ignore[union-attr]
    given = [
        Splits(images, some, None, ("ab", "c")),
        Splits(images, some, None, ("a", "bc")),
        Splits(images, None, some, ("ab", "c")),
        Splits(wide, None, None, ("ab", "c")),
        Splits(Images(wide.pixels.reshape(2, 1, 2, 1), some.labels), None, None, ("ab", "c")),  # type: ignore
    ]
    assert len({splits.fingerprint() for splits in given}) == len(given)


@pytest.mark.parametrize(
    ("count", "most", "rows"), [(10, 4, [0, 3, 6, 9]), (3, 10, [0, 1, 2]), (1, 5, [0]), (5, 2, [0, 4])]
)
def test_evenly_spaced_rows_go_from_the_first_to_the_last(count: int, most: int, rows: list[int]):
    assert evenly_spaced(count, most).tolist() == rows


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ([0, -1, 2], r"found -1 at index 1 \(1 such\)"),
        ([2, 1, 3, 0, 7], r"found 3 at index 2 \(2 such\)"),
    ],
)
def test_the_first_label_that_is_no_class_is_named(labels: list[int], found: str):
    expect_labels(np.arange(3), 3, "here")
    with pytest.raises(DataError, match=f"^here: expected labels 0 to 2, {found}"):
        expect_labels(np.array(labels), 3, "here")


def test_a_label_far_behind_the_images_that_are_read_changes_the_fingerprint():
    labels = np.zeros(500, np.int64)
    pixels = np.zeros((500, 1, 2, 2), np.uint8)
    before = Splits(Images(pixels, labels.copy()), None, None, ("a", "b")).fingerprint()
    labels[371] = 1
    assert Splits(Images(pixels, labels), None, None, ("a", "b")).fingerprint() != before


def test_levels_are_the_nearest_ones_and_end_at_black_and_white():
    fractions = np.array([-0.2, 0, 0.4, 0.6, 127.6, 254.4, 255, 300], np.float32) / np.float32(255)
    assert to_levels(fractions).tolist() == [0, 0, 0, 1, 128, 254, 255, 255]


def shown_at(address: str) -> tuple[str, Any]:
    """Return the head of a data: address, and its picture (channels, H, W)."""
    head, _, data = address.partition(";base64,")
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    return head, picture[None] if picture.ndim == 2 else picture.transpose(2, 0, 1)


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 64, 64), (3, 64, 64)])
def test_the_address_of_a_small_image_keeps_each_pixel(shape: tuple[int, int, int]):
    pixels = noise(*shape)
    head, shown = shown_at(data_address(pixels / np.float32(255)))
    assert head == "data:image/png" and np.array_equal(shown, pixels)


def test_a_large_image_of_few_colours_is_kept_and_a_photograph_is_compressed_in_one_way():
    squares = np.kron(noise(1, 8, 8), np.ones((1, 28, 28), np.uint8))
    head, shown = shown_at(data_address(squares / np.float32(255)))
    assert head == "data:image/png" and np.array_equal(shown, squares)
    photograph = load_sample_image("china.jpg")[200:424, :224].transpose(2, 0, 1)
    address = data_address(photograph / np.float32(255))
    head, shown = shown_at(address)
    assert head == "data:image/jpeg" and len(address) < 50_000
    assert np.abs(shown - photograph.astype(np.float32)).mean() < 5
    assert data_address(photograph / np.float32(255)) == address
