"""An .npz file of images, good and bad."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import SIZE, Arrays, error_of, noise, section

from defuse_core.data import log_parts, open_splits, reopen_splits
from defuse_core.data.npz import image_shape, npz_classes, rows_in_file
from defuse_core.errors import DataError
from tests.conftest import tiny

GOOD: Arrays = {
    "train_images": noise(12, SIZE, SIZE, 3),
    "train_labels": np.arange(12) % 3,
    "test_images": noise(6, SIZE, SIZE, 3),
    "test_labels": np.arange(6) % 3,
}


def write_npz(path: Path, **changed: Any) -> Path:
    """GOOD with some arrays changed, or left out where the change is None."""
    arrays = {name: array for name, array in (GOOD | changed).items() if array is not None}
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("layout", ["last", "first", "float", "double", "compressed"])
def test_an_npz_file_gives_the_same_images_in_every_layout(tmp_path: Path, layout: str):
    file, images = tmp_path / "own.npz", GOOD["train_images"]
    changed = {
        "first": images.transpose(0, 3, 1, 2),
        "float": images.astype(np.float32) / 255,
        "double": images / 255,
    }.get(layout, images)
    save = np.savez_compressed if layout == "compressed" else np.savez
    save(file, **GOOD | {"train_images": changed})
    splits = open_splits(section("npz", file), 0)
    assert splits.counts() == {"train": 12, "test": 6}
    assert splits.classes == ("0", "1", "2")
    assert np.allclose(splits.train.batch(slice(None)), images.transpose(0, 3, 1, 2) / 255, atol=1e-7)


def test_grey_npz_images_serve_for_colour_too(tmp_path: Path):
    grey = GOOD["train_images"][..., 0]
    file = write_npz(tmp_path / "own.npz", train_images=grey, test_images=None, test_labels=None)
    for channels in (1, 3):
        batch = open_splits(section("npz", file, channels=channels), 0).train.batch(slice(None))
        assert np.array_equal(batch, np.repeat(grey[:, None] / np.float32(255), channels, axis=1))


def test_npz_class_names_may_name_classes_without_training_images(tmp_path: Path):
    file = write_npz(tmp_path / "own.npz", classes=np.array(["a", "b", "c", "d"]))
    assert open_splits(section("npz", file), 0).classes == ("a", "b", "c", "d")


def test_validation_of_an_npz_file_is_held_out_only_where_it_has_none(tmp_path: Path):
    file = write_npz(tmp_path / "own.npz")
    assert open_splits(section("npz", file, validation_share=0.25), 0).counts()["validation"] == 3
    write_npz(file, validation_images=GOOD["test_images"], validation_labels=GOOD["test_labels"])
    assert open_splits(section("npz", file, validation_share=0.25), 0).counts()["validation"] == 6


def test_labels_may_be_unsigned_and_a_sample_of_the_training_images_is_taken_where_one_is_asked_for(
    tmp_path: Path,
):
    file = write_npz(tmp_path / "own.npz", train_labels=GOOD["train_labels"].astype(np.uint8))
    splits = open_splits(section("npz", file, train_images=6), 0)
    assert splits.counts() == {"train": 6, "test": 6}
    assert np.bincount(splits.train.labels).tolist() == [2, 2, 2]


def test_labels_may_be_a_column(tmp_path: Path):
    file = write_npz(tmp_path / "own.npz", train_labels=GOOD["train_labels"].reshape(-1, 1))
    train = open_splits(section("npz", file), 0).train
    np.testing.assert_array_equal(train.labels, GOOD["train_labels"])
    assert len(rows_in_file(section("npz", file), 0)["train"]) == len(train)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 8, 6), (8, 6, 1)),
        ((5, 8, 6, 1), (8, 6, 1)),
        ((5, 8, 6, 3), (8, 6, 3)),
        ((5, 1, 8, 6), (8, 6, 1)),
        ((5, 3, 8, 6), (8, 6, 3)),
        ((5, 2, 8, 6), None),
        ((5, 8), None),
    ],
)
def test_height_width_and_channels_are_read_from_any_layout(
    shape: tuple[int, ...], expected: tuple[int, int, int] | None
):
    assert image_shape(np.zeros(shape)) == expected


def test_the_parts_of_an_npz_file_are_told_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    data = section("npz", write_npz(tmp_path / "own.npz", test_images=255 - GOOD["test_images"]))
    with caplog.at_level("INFO", "defuse"):
        log_parts(data, open_splits(data, 0))
    assert [record.getMessage() for record in caplog.records] == ["images: 12 train, 6 test, of 3 classes"]


def test_classes_without_an_image_in_a_part_are_named_in_their_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    labels = {"train_labels": np.arange(12) % 11, "test_labels": np.arange(6)}
    data = section("npz", write_npz(tmp_path / "own.npz", **labels))
    log_parts(data, open_splits(data, 0))
    assert "5 of 11 classes with training images have none in test (6, 7, 8, 9, 10)," in caplog.text


@pytest.mark.parametrize(
    ("objects", "told"), [(["part1", "part2"], True), (["1", "2"], False), ([1, 2], False)]
)
def test_a_track_whose_name_is_in_two_parts_of_an_npz_file_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, objects: list[str], told: bool
):
    tracks = {"train_tracks": np.repeat(objects, 6), "test_tracks": np.repeat(objects[:1], 6)}
    data = section("npz", write_npz(tmp_path / "own.npz", **tracks))
    log_parts(data, open_splits(data, 0))
    assert (
        "1 of 1 named track in test have the name of one in train, such as part1; " in caplog.text
    ) is told


def test_an_array_that_is_not_wanted_is_not_read(tmp_path: Path):
    file = write_npz(tmp_path / "own.npz", notes=np.array([0, None]))  # pickled
    assert open_splits(section("npz", file), 0).counts() == {"train": 12, "test": 6}
    assert npz_classes(file) is None
    write_npz(file, classes=np.array(["a", "b", "c"]))
    assert npz_classes(file) == ("a", "b", "c")


@pytest.mark.parametrize("own_validation", [False, True])
def test_the_rows_of_a_part_are_those_of_its_images_in_the_file(tmp_path: Path, own_validation: bool):
    given = {"validation_images": GOOD["test_images"], "validation_labels": GOOD["test_labels"]}
    file = write_npz(tmp_path / "own.npz", **(given if own_validation else {}))
    data = section("npz", file, validation_share=0.25, train_images=6)
    for seed in (0, 1):
        rows, splits = rows_in_file(data, seed), open_splits(data, seed)
        assert len(rows["train"]) == 6 and len(rows["validation"]) == (6 if own_validation else 3)
        for part, arrays in {"train": GOOD, "validation": given if own_validation else {}}.items():
            source = arrays.get(f"{part}_images", GOOD["train_images"])[rows[part]].transpose(0, 3, 1, 2)
            np.testing.assert_array_equal(splits.parts()[part].pixels[:], source)


@pytest.mark.parametrize("objects", [np.arange(12) // 3 * 7, np.array(list("bbbdddaaaccc"))])
def test_tracks_are_held_out_whole_and_numbered_as_texts_or_integers(tmp_path: Path, objects: np.ndarray):
    labels = {"train_labels": np.arange(12) // 6, "test_labels": np.arange(6) % 2}
    file = write_npz(tmp_path / "own.npz", train_tracks=objects, **labels)
    data = section("npz", file, validation_share=0.5)
    splits = open_splits(data, 0)
    rows = {part: objects[rows] for part, rows in rows_in_file(data, 0).items()}
    assert splits.test is not None and splits.test.tracks is None
    assert not set(rows["train"]) & set(rows["validation"])
    for part, found in rows.items():
        assert len(set(found)) == 2
        _, expected = np.unique(objects, return_inverse=True)
        tracks = splits.parts()[part].tracks
        assert tracks is not None
        assert set(tracks) == {expected[objects == each][0] for each in found}


def test_a_wrong_pixel_is_named_wherever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("defuse_core.data.npz.CHUNK", 4)
    file = write_npz(tmp_path / "own.npz", train_images=with_value(np.nan))
    assert "found NaN in image 5;" in error_of(section("npz", file))


@pytest.mark.parametrize("value", [1.0000001, -1e-6])
def test_a_pixel_that_rounding_put_beyond_is_clipped(tmp_path: Path, value: float):
    file = write_npz(tmp_path / "own.npz", train_images=with_value(value))
    batch = open_splits(section("npz", file), 0).train.batch(slice(0, 12))
    assert batch[5, 1, 2, 2] == np.float32(np.clip(value, 0, 1))
    assert 0 <= batch.min() <= batch.max() <= 1


def with_value(value: float) -> np.ndarray:
    images = GOOD["train_images"].astype(np.float32) / 255
    images[5, 2, 2, 1] = value
    return images


BAD_NPZ: list[tuple[str, Arrays, str]] = [
    (
        "labels outside the named classes",
        {"classes": np.array(["a", "b"])},
        "train_labels: expected labels 0 to 1, found 2 at index 2",
    ),
    (
        "test labels never trained on",
        {"test_labels": np.full(6, 3)},
        "test_labels: expected labels 0 to 2, found 3",
    ),
    (
        "a negative label",
        {"train_labels": np.arange(12) % 3 - 1},
        "train_labels: expected two or more classes 0, 1, 2",
    ),
    (
        "a gap in the labels",
        {"train_labels": np.arange(12) * 1000},
        "without gaps, found 12 different labels, 0 to 11000",
    ),
    ("one class", {"train_labels": np.zeros(12, int)}, "two or more classes"),
    ("labels that are not integers", {"train_labels": np.zeros(12)}, "train_labels: expected integers (N,)"),
    ("labels one-hot", {"train_labels": np.eye(12, 3, dtype=int)}, "found int64 (12, 3)"),
    (
        "images of the wrong size",
        {"train_images": noise(12, 9, 9, 3)},
        "found (12, 9, 9, 3); resize them or set data.image_size",
    ),
    (
        "images that are not square",
        {"test_images": noise(6, 8, 9)},
        "expected square images, found 9x8 pixels",
    ),
    ("two channels", {"train_images": noise(12, SIZE, SIZE, 2)}, "found (12, 8, 8, 2)"),
    ("flat images", {"train_images": noise(12, SIZE * SIZE)}, "found (12, 64)"),
    (
        "NaN",
        {"train_images": with_value(np.nan)},
        "train_images: expected floats in [0, 1], found NaN in image 5",
    ),
    ("values over 1", {"train_images": with_value(1.5)}, "to 1.5 in image 5"),
    ("values under 0", {"train_images": with_value(-0.5)}, "found values from -0.5 to"),
    ("infinity", {"train_images": with_value(np.inf)}, "to inf in image 5"),
    (
        "integers that are not bytes",
        {"train_images": noise(12, SIZE, SIZE).astype(int)},
        "expected uint8, or floats in [0, 1], found int64",
    ),
    (
        "no training images",
        {"train_images": noise(0, SIZE, SIZE), "train_labels": np.zeros(0, int)},
        "train_images: expected one or more, found an empty array; add images",
    ),
    (
        "no test labels",
        {"test_labels": np.zeros(0, int)},
        "test_labels: expected one or more, found an empty array",
    ),
    (
        "an empty test set",
        {"test_images": noise(0, SIZE, SIZE)},
        "test_images: expected one or more, found an empty array; add images, or leave out both arrays",
    ),
    ("fewer labels than images", {"train_labels": np.arange(11) % 3}, "found 11 and 12"),
    ("a track too few", {"train_tracks": np.arange(11)}, "train_tracks: expected 12 integers or texts"),
    ("tracks alone", {"validation_tracks": np.arange(6)}, "expected an array validation_images, found "),
    ("tracks that are no names", {"train_tracks": np.zeros(12)}, "found float64 (12,); correct them"),
    ("no train_images", {"train_images": None}, "expected an array train_images, found test_images"),
    ("no test_labels", {"test_labels": None}, "expected an array test_labels"),
    (
        "nothing to train on",
        {"train_images": None, "train_labels": None},
        "expected arrays train_images and train_labels",
    ),
    (
        "pickled labels",
        {"train_labels": np.array([0, None] * 6)},
        "expected an .npz file of plain arrays, found pickled objects",
    ),
    (
        "class names that repeat",
        {"classes": np.array(["a", "b", "a"])},
        "classes: expected different names, found 'a' 2 times; give each class a name of its own",
    ),
    (
        "class names that are numbers",
        {"classes": np.arange(3)},
        "classes: expected two or more different names, as text",
    ),
    ("one class name", {"classes": np.array(["a"])}, "classes: expected two or more different names"),
    ("a table of class names", {"classes": np.array([["a"], ["b"]])}, "as text, found <U1 (2, 1)"),
    (
        "a class name that colours the terminal",
        {"classes": np.array(["a", "b", "\x1b[1mc"])},
        "classes: expected names of classes without control characters, found '\\x1b[1mc'",
    ),
]


@pytest.mark.parametrize(
    ("changed", "expected"), [case[1:] for case in BAD_NPZ], ids=[case[0] for case in BAD_NPZ]
)
def test_a_bad_npz_file_is_refused_in_one_line_that_names_it(tmp_path: Path, changed: Arrays, expected: str):
    message = error_of(section("npz", write_npz(tmp_path / "own.npz", **changed)))
    assert "own.npz" in message
    assert expected in message


def test_colour_npz_images_are_not_made_grey_in_silence(tmp_path: Path):
    assert "set data.channels" in error_of(section("npz", write_npz(tmp_path / "own.npz"), channels=1))


def test_a_folder_in_place_of_an_npz_file_is_said(tmp_path: Path):
    assert "expected a readable .npz file (Is a directory)" in error_of(section("npz", tmp_path))


@pytest.mark.parametrize("content", ["cut", "text", "npy", "pickle", "flipped", "nothing"])
def test_a_corrupt_npz_file_is_refused_in_one_line(tmp_path: Path, content: str):
    file = write_npz(tmp_path / "own.npz")
    whole = file.read_bytes()
    if content == "npy":
        np.save(tmp_path / "own.npy", GOOD["train_images"])
        file = tmp_path / "own.npy"
    else:
        flipped = whole[:400] + bytes([whole[400] ^ 255]) + whole[401:]
        file.write_bytes(
            {
                "cut": whole[:900],
                "text": b"hello",
                "pickle": pickle.dumps([1]),
                "flipped": flipped,
                "nothing": b"",
            }[content]
        )
    assert f"{file}: expected an .npz file of plain arrays" in error_of(section("npz", file))


def npy(kind: str, content: bytes) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": kind, "fortran_order": False, "shape": (3,)})
    return out.getvalue() + content


@pytest.mark.parametrize(
    ("name", "content", "compression", "found"),
    [
        ("classes", b"a, b, c", zipfile.ZIP_STORED, "no array of values in classes"),
        ("classes.npy", npy("<U0", b""), zipfile.ZIP_STORED, "no array of values in classes"),
        ("classes.npy", npy("<U1", b"\x7f" * 12), zipfile.ZIP_DEFLATED, "character"),
        ("notes.txt", b"", zipfile.ZIP_BZIP2, "a compression that numpy does not write"),
    ],
)
def test_what_numpy_does_not_write_into_an_npz_file_is_refused(
    tmp_path: Path, name: str, content: bytes, compression: int, found: str
):
    file = write_npz(tmp_path / "own.npz")
    with zipfile.ZipFile(file, "a", compression) as archive:
        archive.writestr(name, content)
    message = error_of(section("npz", file))
    assert "expected an .npz file of plain arrays, found" in message
    assert found in message


@pytest.mark.timeout(20)
def test_a_named_pipe_is_refused_in_place_of_being_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.npz")  # which nobody writes to
    found = error_of(section("npz", tmp_path / "pipe.npz"))
    assert found.endswith(
        "pipe.npz: expected an .npz file, found a pipe, a device or a socket; check data.root"
    )


def test_a_run_whose_images_were_moved_says_what_records_their_new_place(tmp_path: Path):
    moved = tiny(data={"name": "npz", "root": str(tmp_path / "gone.npz")})
    with pytest.raises(
        DataError, match=r"gone\.npz does not exist; .* by `defuse run RUNFILE --name RUN --set data\.root"
    ):
        reopen_splits(moved, "any")
    (tmp_path / "gone.npz").write_bytes(b"damaged")
    with pytest.raises(DataError, match="expected an .npz file of plain arrays.*save it again$"):
        reopen_splits(moved, "any")
