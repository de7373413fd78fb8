"""German signs on a small copy of torchvision's layout."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from data_samples import SIZE, error_of, noise, save_picture, section

from defuse_core.data import PictureFiles, open_splits
from defuse_core.data.gtsrb import SIGNS
from defuse_core.progress import silent
from defuse_core.tuning_data import load_clean_images
from tests.conftest import tiny


def write_signs(root: Path, tracks: dict[int, int], frames: int = 3, test: int = 7) -> Path:
    """The layout that torchvision's GTSRB reads; every frame's pixels are its own."""
    base = root / "gtsrb"
    pixels = iter(noise(1000, SIZE, SIZE, 3))
    for label, count in tracks.items():
        for track in range(count):
            for frame in range(frames):
                save_picture(base / f"GTSRB/Training/{label:05d}/{track:05d}_{frame:05d}.ppm", next(pixels))
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for i in range(test):
        save_picture(base / f"GTSRB/Final_Test/Images/{i:05d}.ppm", next(pixels))
        rows.append(f"{i:05d}.ppm;8;8;0;0;7;7;{list(tracks)[i % len(tracks)]}")
    (base / "GT-final_test.csv").write_text("\n".join(rows) + "\n")
    return root


def test_signs_are_read_as_torchvision_reads_them_with_the_test_set_halved(tmp_path: Path):
    from torchvision.datasets import GTSRB

    root = write_signs(tmp_path, dict.fromkeys(range(43), 1), frames=1)
    splits = open_splits(section("signs", root), 0)
    assert splits.counts() == {"train": 43, "validation": 3, "test": 4}
    assert splits.classes == SIGNS
    assert splits.classes[14] == "Stop"
    expected = {
        (np.asarray(image).transpose(2, 0, 1).tobytes(), label) for image, label in GTSRB(root, "test")
    }
    assert splits.validation
    assert splits.test
    found = [
        (i.tobytes(), int(n))
        for p in (splits.validation, splits.test)
        for i, n in zip(p.pixels[:], p.labels, strict=True)
    ]
    assert set(found) == expected
    train = GTSRB(root, "train")
    assert splits.train.labels.tolist() == [label for _, label in train]
    assert np.array_equal(splits.train.pixels[5:6][0], np.asarray(train[5][0]).transpose(2, 0, 1))


def test_sign_labels_are_their_folders_even_where_classes_are_missing(tmp_path: Path):
    splits = open_splits(section("signs", write_signs(tmp_path, {4: 1, 42: 2})), 0)
    assert splits.train.labels.tolist() == [4] * 3 + [42] * 6


def test_signs_are_sampled_in_whole_tracks_of_one_class(tmp_path: Path):
    root = write_signs(tmp_path, {0: 4, 1: 4}, frames=3)
    everything = open_splits(section("signs", root), 0).train
    track = {image.tobytes(): row // 3 for row, image in enumerate(everything.pixels[:])}
    some = open_splits(section("signs", root, train_images=10), 0).train
    tracks = [track[image.tobytes()] for image in some.pixels[:]]
    assert len(some) == 9
    assert set(np.unique(tracks, return_counts=True)[1].tolist()) == {3}
    assert sorted(np.bincount(some.labels).tolist()) == [3, 6]  # of each class alike


def test_signs_know_their_track_which_no_other_class_shares(tmp_path: Path):
    train = open_splits(section("signs", write_signs(tmp_path, {0: 2, 4: 1}, frames=2)), 0).train
    assert train.tracks is not None
    assert train.tracks.tolist() == [0, 0, 1, 1, 2, 2]
    some = train.take(slice(1, 3)).loaded()
    assert some.tracks is not None
    assert some.tracks.tolist() == [0, 1]


def test_validation_is_held_out_of_the_training_tracks_where_a_share_is_asked_for(tmp_path: Path):
    root = write_signs(tmp_path, {0: 6, 4: 6}, frames=3)
    train = open_splits(section("signs", root), 0).train
    splits = open_splits(section("signs", root, validation_share=0.34), 0)
    assert splits.counts() == {"train": 24, "validation": 12, "test": 7}
    assert not set(splits.train.tracks) & set(splits.validation.tracks)
    assert sorted([*splits.train.tracks, *splits.validation.tracks]) == train.tracks.tolist()
    assert np.bincount(splits.validation.labels).tolist() == [6, 0, 0, 0, 6]
    some = open_splits(section("signs", root, validation_share=0.34, train_images=10), 0)
    assert some.counts() == {"train": 9, "validation": 12, "test": 7}
    assert "validation_share: 0.01 of 12 tracks" in error_of(section("signs", root, validation_share=0.01))


def test_no_image_of_a_track_with_held_out_pictures_is_fine_tuned_on(tmp_path: Path):
    data = section("signs", write_signs(tmp_path, {0: 3, 4: 2}, frames=3))
    splits = open_splits(data, 0)
    spec = tiny(data=data.model_dump())
    models: Any = SimpleNamespace(data_fingerprint=splits.fingerprint())
    for left_out, tuned, expected in (
        ([4, 13], [], [0, 0, 0, 2, 2, 2, 3, 3, 3]),
        ([4, 13], [3], [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3]),  # 3 to 5 are of the track of 4, too
        ([4, 9, 13], [], [0, 0, 0, 2, 2, 2, 3, 3, 4, 4]),  # its class would be empty
        ([], [], [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]),
    ):
        rows = np.array(left_out, np.int64), np.array(tuned, np.int64)
        assert load_clean_images(spec, models, *rows, progress=silent).train.tracks.tolist() == expected


def test_signs_stay_on_disk_until_they_are_loaded(tmp_path: Path):
    splits = open_splits(section("signs", write_signs(tmp_path, {0: 1, 1: 1})), 0)
    assert splits.test
    assert all(isinstance(images.pixels, PictureFiles) for images in splits.parts().values())
    loaded = splits.loaded("train").train
    assert isinstance(loaded.pixels, np.ndarray)
    assert np.array_equal(loaded.batch(slice(0, 2)), splits.train.batch(slice(0, 2)))
    assert isinstance(splits.loaded("train").test.pixels, PictureFiles)


def test_packed_signs_are_named_with_what_was_expected(tmp_path: Path):
    (tmp_path / "gtsrb.tar.xz").touch()
    message = error_of(section("signs", tmp_path))
    assert "gtsrb/GTSRB/Training" in message
    assert "found only gtsrb.tar.xz; unpack it" in message


def break_signs(root: Path, how: str) -> None:
    base = root / "gtsrb"
    if how == "table":
        (base / "GT-final_test.csv").unlink()
    elif how == "label":
        (base / "GT-final_test.csv").write_text("Filename;ClassId\n00000.ppm;43\n00001.ppm;0\n")
    elif how == "name":
        (base / "GTSRB/Training/00000/00000_00000.ppm").rename(base / "GTSRB/Training/00000/first.ppm")
    elif how == "folder":
        (base / "GTSRB/Training/00000").rename(base / "GTSRB/Training/stop")
    elif how == "picture":
        (base / "GTSRB/Training/00000/00000_00000.ppm").write_text("P6")
    else:
        (base / "GTSRB/Final_Test/Images/00003.ppm").unlink()


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("table", "GT-final_test.csv"),
        ("label", "expected labels 0 to 42, found 43 at index 0"),
        ("name", "first.ppm: expected a name such as TRACK_FRAME.ppm"),
        ("folder", "stop: expected a folder named by its class"),
        ("picture", "00000_00000.ppm: expected an image"),
        ("absent", "00003.ppm: this image no longer exists"),
    ],
)
def test_broken_signs_are_refused_in_one_line(tmp_path: Path, how: str, expected: str):
    break_signs(write_signs(tmp_path, {0: 1, 1: 1}), how)
    assert expected in error_of(section("signs", tmp_path))
