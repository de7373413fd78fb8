"""Digits for real; MNIST and SVHN on small files made here, and the real MNIST where it lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import REAL_DATA, Arrays, error_of, noise, section
from scipy.io import savemat

from defuse_core.data import open_splits


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
    monkeypatch.setattr("defuse_core.data.digits.find_spec", lambda name: None)
    assert "pip install 'defuse[demo]'" in error_of(section("mnist-5000", channels=1))
