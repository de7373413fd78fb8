"""A folder of images."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import SIZE, error_of, noise, save_picture, section

from defuse_core.data import PictureFiles, expect_whole_files, log_parts, open_splits
from defuse_core.data.folder import overlooked, part_of
from defuse_core.data.images import read_picture
from defuse_core.errors import DataError
from tests.no_access import refuse_access


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


def test_a_class_that_the_sample_of_training_images_lacks_is_named_in_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    root = write_folder(tmp_path, ("train",))
    save_picture(root / "train" / "fox" / "0.png", noise(1, SIZE, SIZE, 3)[0])
    warned = {}
    for seed in range(20):
        assert (
            2 in open_splits(section("folder", root, validation_share=0.3), seed).train.labels
        )  # is not held out
        data = section("folder", root, validation_share=0.3, train_images=4)
        splits = open_splits(data, seed)
        caplog.clear()
        log_parts(data, splits)
        lost = 2 not in splits.train.labels
        warned[lost] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [line.partition(",")[0] for line in warned[False]] == [
        "images: 1 of 3 classes with training images have none in validation (fox)"
    ]
    assert [line.partition(";")[0] for line in warned[True]] == [
        "images: 1 of 3 classes have no training image (fox)"
    ]


def test_images_of_one_object_form_a_track_that_is_held_out_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for name in ("cat", "dog"):
        for i in range(20):
            save_picture(tmp_path / "train" / name / f"{name}{i // 4}_{i}.png", noise(20, SIZE, SIZE, 3)[i])
    data = section("folder", tmp_path, validation_share=0.4, track_pattern="/(.+)_")
    splits = open_splits(data, 0)
    assert splits.validation is not None and splits.train.tracks is not None
    assert splits.counts() == {"train": 24, "validation": 16}
    objects = [
        {Path(path).stem.partition("_")[0] for path in part.pixels.paths} for part in splits.parts().values()
    ]
    assert len(objects[0]) == len(np.unique(splits.train.tracks)) == 6
    assert len(objects[1]) == 4 and not objects[0] & objects[1]
    with caplog.at_level("INFO", "defuse"):
        log_parts(data, splits)
    assert "images: 6 tracks in train" in caplog.text


@pytest.mark.parametrize(
    ("pattern", "warned"),
    [
        (
            "/(.+)_",
            ["images: 2 of 2 tracks in train hold images of several classes, such as one of cat, dog"],
        ),
        ("(.+)_", []),
        ("(.+)", ["images: each training track is one image"]),
    ],
)
def test_tracks_that_are_hardly_objects_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, pattern: str, warned: list[str]
):
    for i, name in enumerate(("cat/1_1", "cat/1_2", "cat/2_1", "dog/1_1", "dog/1_2", "dog/2_1")):
        save_picture(tmp_path / "train" / f"{name}.png", noise(6, SIZE, SIZE, 3)[i])
    data = section("folder", tmp_path, track_pattern=pattern)
    log_parts(data, open_splits(data, 0))
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == warned


def test_tracks_of_which_some_are_held_out_for_validation_are_told_once(tmp_path: Path, caplog):
    for name in (f"{kind}/{track}_1" for track in range(4) for kind in ("cat", "dog")):
        save_picture(tmp_path / "train" / f"{name}.png", noise(1, SIZE, SIZE, 3)[0])
    data = section("folder", tmp_path, track_pattern="/(.+)_", validation_share=0.5)
    splits = open_splits(data, 0)
    assert splits.counts() == {"train": 4, "validation": 4}
    log_parts(data, splits)
    assert caplog.text.count("hold images of several classes") == 1


def test_tracks_with_which_a_class_has_no_training_image_are_named(tmp_path: Path, caplog):
    """Each class is a track here."""
    data = section("folder", write_folder(tmp_path), train_images=6, track_pattern="(.+)/")
    log_parts(data, open_splits(data, 0))
    assert "raise data.train_images, or check the tracks (data.track_pattern, or the array" in caplog.text


@pytest.mark.parametrize(("name", "told"), [("part", True), ("", False)])
def test_a_track_whose_name_is_in_two_parts_is_told_and_one_of_a_number_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, told: bool
):
    files = ("train/cat/{}1_0", "train/dog/{}2_0", "train/dog/{}2_1", "test/cat/{}1_1", "test/dog/{}3_0")
    for file, image in zip(files, noise(5, SIZE, SIZE, 3), strict=True):
        save_picture(tmp_path / f"{file.format(name)}.png", image)
    data = section("folder", tmp_path, track_pattern="(.+)_")
    log_parts(data, open_splits(data, 0))
    text = (
        "images: 1 of 2 named tracks in test have the name of one in train, such as cat/part1; if they show the same "
        "objects, figures on test images are too good: keep each in one part"
    )
    assert [record.getMessage() for record in caplog.records] == [text] * told


@pytest.mark.parametrize(("pattern", "found"), [("/(.+)_", "no match"), ("()", "an empty text")])
def test_a_file_whose_object_is_not_found_is_named(tmp_path: Path, pattern: str, found: str):
    data = section("folder", write_folder(tmp_path), track_pattern=pattern)
    wanted = (
        f"cat/0.png: expected data.track_pattern {pattern} to find the object in cat/0.png, found {found}; "
    )
    assert wanted in error_of(data)


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


def test_folders_of_other_tools_and_files_beside_the_classes_are_no_classes(tmp_path: Path):
    train = write_folder(tmp_path) / "train"
    for folder in (".ipynb_checkpoints", "__MACOSX", "cat/@eaDir"):
        save_picture(train / folder / "0.png", noise(1, SIZE, SIZE, 3)[0])
    (train / "README.txt").touch()
    splits = open_splits(section("folder", tmp_path), 0)
    assert (splits.classes, len(splits.train)) == (("cat", "dog"), 10)


@pytest.mark.parametrize("name", ["Thumbs.db", "desktop.ini", "DESKTOP.INI"])
def test_files_that_a_system_writes_beside_pictures_are_no_images_and_are_told(tmp_path: Path, name: str):
    (write_folder(tmp_path) / "train" / "cat" / name).touch()
    splits = open_splits(section("folder", tmp_path), 0)
    assert len(splits.train) == 10
    assert overlooked(tmp_path, splits.ignored) == [f"ignored: 1 file such as train/cat/{name}"]


def test_files_of_a_system_are_told_without_listing_the_classes_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    data = section("folder", write_folder(tmp_path))
    file = tmp_path / "train" / "cat" / "Thumbs.db"
    file.touch()
    splits = open_splits(data, 0)
    file.unlink()
    log_parts(data, splits)
    assert f"data.root {tmp_path}: ignored: 1 file such as train/cat/Thumbs.db" in caplog.text


def test_folders_that_other_tools_call_a_part_are_told_with_the_name_that_is_read(tmp_path: Path):
    root = write_folder(tmp_path, ("train", "test"))
    for name in ("Val", "testing", "others"):
        (root / name).mkdir()
    (root / "dev").touch()
    assert overlooked(root, ()) == [
        "Val/ is not read; rename it to validation/ to use its images",
        "testing/ is not read, test/ is",
    ]
    # as where case does not count: one folder under both names
    (root / "validation").symlink_to(root / "Val")
    assert overlooked(root, ()) == ["testing/ is not read, test/ is"]
    parts = ["train", "validation", "test", "validation", None]
    assert [part_of(name) for name in ("Train", "VALID", "eval", "dev", "others")] == parts


def test_a_part_in_another_case_and_one_named_otherwise_while_a_part_is_missing_are_told(tmp_path: Path):
    root = write_folder(tmp_path, ("train", "VALIDATION", "Test", "Train", "hold\nout", ".old"))
    save_picture(root / "notes" / "cat" / "0.png", noise(1, SIZE, SIZE, 3)[0])
    assert overlooked(root, ()) == [
        "Test/ is not read; rename it to test/ to use its images",
        "Train/ is not read, train/ is",
        "VALIDATION/ is not read; rename it to validation/ to use its images",
        "hold\\nout/ has the classes of train/ and is not read; rename it to validation/ or test/ to use it",
    ]
    write_folder(tmp_path, ("test",))
    assert overlooked(root, ())[-1].endswith("is not read; rename it to validation/ to use it")
    write_folder(tmp_path, ("validation",))  # with nothing missing, the other folder is left out on purpose
    assert [line.split()[0] for line in overlooked(root, ())] == ["Test/", "Train/", "VALIDATION/"]


@pytest.mark.parametrize(
    "suffix", [".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"]
)
def test_each_kind_of_picture_is_read_whatever_the_case_of_its_suffix(tmp_path: Path, suffix: str):
    pixels = np.full((SIZE, SIZE), 77, np.uint8)
    for number, spelt in enumerate((suffix, suffix.upper())):
        save_picture(write_folder(tmp_path) / "train" / "cat" / f"more{number}{spelt}", pixels)
    cats = open_splits(section("folder", tmp_path, channels=1), 0).train.take(np.array([5, 6]))
    assert [Path(path).name for path in cats.pixels.paths] == [f"more0{suffix}", f"more1{suffix.upper()}"]
    assert np.abs(cats.loaded().pixels[:].astype(int) - 77).max() <= 2


def test_files_of_a_class_are_in_the_order_of_their_paths_wherever_they_are(tmp_path: Path):
    cats = write_folder(tmp_path) / "train" / "cat"
    for name in ("1a/0.png", "zoo/1/0.png", "zoo/0.png"):
        save_picture(cats / name, noise(1, SIZE, SIZE, 3)[0])
    paths = list(open_splits(section("folder", tmp_path), 0).train.pixels.paths)
    expected = ["0.png", "1.png", "1a/0.png", "2.png", "3.png", "4.png", "zoo/0.png", "zoo/1/0.png"]
    assert paths[:8] == [str(cats / name) for name in expected]


def test_a_sample_of_the_training_images_of_a_folder_is_read_where_one_is_asked_for(tmp_path: Path):
    splits = open_splits(section("folder", write_folder(tmp_path), train_images=6), 0)
    assert splits.counts() == {"train": 6, "validation": 10, "test": 10}
    assert np.bincount(splits.train.labels).tolist() == [3, 3]


def test_a_class_without_an_image_in_another_part_than_the_training_images_is_no_error(tmp_path: Path):
    for picture in (write_folder(tmp_path) / "test" / "cat").iterdir():
        picture.unlink()
    assert open_splits(section("folder", tmp_path), 0).test.labels.tolist() == [1] * 5


def test_a_folder_that_may_not_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    locked = write_folder(tmp_path) / "train" / "cat" / "locked"
    locked.mkdir()
    refuse_access(monkeypatch, locked)
    assert f"cannot read {locked} (Permission denied)" in error_of(section("folder", tmp_path))


def test_a_link_to_a_folder_elsewhere_is_followed_each_time(tmp_path: Path):
    root = write_folder(tmp_path / "parts")
    save_picture(tmp_path / "more/5.png", noise(1, SIZE, SIZE, 3)[0])
    for name in ("one", "two"):
        (root / "train/cat" / name).symlink_to(tmp_path / "more")
    assert len(open_splits(section("folder", root), 0).train) == 12


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (
            lambda root: [
                (root / f"{name}.HEIC").touch() for name in ("train/cat/1", "train/dog/2", "test/cat/3")
            ],
            "found 3 other files: train/cat/1.HEIC, train/dog/2.HEIC, test/cat/3.HEIC; convert them to PNG or JPEG",
        ),
        (
            lambda root: [
                (root / "train" / path).write_bytes(text)
                for path, text in (("cat/1.png", b""), ("cat/2.png", b"no picture"), ("dog/0.png", b"none"))
            ],
            "3 of 10 image files cannot be read: {root}/train/cat/1.png, {root}/train/cat/2.png, "
            "{root}/train/dog/0.png; the first error is: {root}/train/cat/1.png: expected an image, found an empty "
            "file; restore or remove it",
        ),
        (
            lambda root: (root / "test/fox").mkdir(),
            "test: expected the class folders of train, but fox is only in test",
        ),
        (
            lambda root: save_picture(root / "train/fox/0.png", noise(1, SIZE, SIZE, 3)[0]),
            "validation: expected the class folders of train, but fox is only in train; add it, empty if there are",
        ),
        (
            lambda root: (root / "test/cat").rename(root / "test/Cat"),
            "but Cat is only in test; add or remove it; 'Cat' differs only in case from 'cat'",
        ),
        (
            lambda root: [
                (root / part / "cat").rename(root / part / name)
                for part, name in (("train", "caf\xe9"), ("validation", "caf\xe9"), ("test", "cafe\u0301"))
            ],
            r"; 'cafe\u0301' differs only in the Unicode form of its letters from 'caf\xe9'",
        ),
        (lambda root: (root / "train").rename(root / "training"), "train: expected a folder"),
        (
            lambda root: shutil.rmtree(root / "test/dog"),
            "test: expected the class folders of train, but dog is only in train; add it, empty",
        ),
        (
            lambda root: [shutil.rmtree(root / "test" / name) for name in ("cat", "dog")],
            "as in train, found none; sort the images into such folders, or rename this one if their classes are",
        ),
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
            lambda root: [
                (root / "train/cat/deep").mkdir(),
                (root / "train/cat/deep/loop").symlink_to(root / "train/cat/deep"),
            ],
            "train/cat/deep/loop: this link leads to a folder above it",
        ),
        (
            lambda root: [
                (root / "train/cat/deep").mkdir(),
                (root / "train/cat/deep/loop").symlink_to(root / "train/cat"),
            ],
            "train/cat/deep/loop: this link leads to a folder above it",
        ),
        (
            lambda root: shutil.rmtree(root / "train/dog"),
            "train: expected a folder of images per class, two classes or more, found 1",
        ),
        (
            lambda root: (root / "train/cat\x1b").mkdir(),
            r"train: expected names of classes without control characters, found 'cat\x1b'",
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
    assert expected.format(root=tmp_path) in error_of(section("folder", tmp_path))


def test_validation_and_test_images_that_are_cut_off_are_refused_and_whole_ones_are_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root, decoded = write_folder(tmp_path), list[str]()
    jpeg, cut, other = (root / name for name in ("test/cat/5.jpg", "test/dog/5.jpg", "validation/cat/5.bmp"))
    for path in (jpeg, cut, other):
        save_picture(path, noise(1, 40, 40, 3)[0])

    def noted(path: str, channels: int, size: int) -> np.ndarray:
        decoded.append(path)
        return read_picture(path, channels, size)

    monkeypatch.setattr("defuse_core.data.read_picture", noted)
    splits = open_splits(section("folder", root), 0)
    expect_whole_files(splits)
    assert decoded == [str(other)]

    cut.write_bytes(cut.read_bytes()[:-400])
    (root / "test/cat/0.png").write_bytes(b"")
    os.mkfifo(root / "test/cat/pipe.png")
    with pytest.raises(DataError) as caught:
        expect_whole_files(open_splits(section("folder", root), 0))
    assert str(caught.value).startswith(
        f"3 of 13 image files cannot be read: {root}/test/cat/0.png, {root}/test/cat/pipe.png, {cut}; the first error "
        f"is: {root}/test/cat/0.png: expected an image, found an empty file"
    )
