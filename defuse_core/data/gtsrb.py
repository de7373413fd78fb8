"""German traffic signs (GTSRB) in torchvision's layout."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np

from defuse_core.config import DataSection
from defuse_core.data.images import Images, PictureFiles, Splits, data_root, expect_labels, reading
from defuse_core.data.splits import halves, sample_tracks, with_validation
from defuse_core.errors import DataError

LAYOUT = "the signs as gtsrb/GTSRB/Training, gtsrb/GTSRB/Final_Test/Images and gtsrb/GT-final_test.csv"

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
    base = _base(data)
    files = sorted((base / "GTSRB" / "Training").glob("*/*.ppm"))
    train = _pictures(files, [_class_of(file) for file in files], data, base)
    _, tracks = np.unique([track_of(file) for file in files], return_inverse=True)
    train, validation = with_validation(
        replace(train, tracks=tracks.astype(np.int64)), data.validation_share, seed
    )
    test = _official_test(base, data)
    if validation is None:
        validation, test = halves(test, seed)
    return Splits(sample_tracks(train, data.train_images, seed), validation, test, SIGNS)


def track_of(file: Path) -> str:
    """Return CLASS/TRACK of CLASS/TRACK_FRAME.ppm; track numbers repeat in each class."""
    track, underscore, frame = file.stem.partition("_")
    if not (track and underscore and frame):
        raise DataError(f"{file}: expected a name such as TRACK_FRAME.ppm; rename or remove this file")
    return f"{file.parent.name}/{track}"


def _base(data: DataSection) -> Path:
    """Return ROOT/gtsrb, downloaded first where data.download is set. Raises DataError if it does not exist."""
    from torchvision.datasets import GTSRB

    root = data_root(data)
    base = root / "gtsrb"
    if data.download:
        with reading(root, LAYOUT, True):
            GTSRB(root, split="train", download=True)
            GTSRB(root, split="test", download=True)
    if not (base / "GTSRB" / "Training").is_dir():
        raise DataError(f"data.root: expected {LAYOUT} under {root}, found {_found_in(root)}")
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
    with reading(base.parent, LAYOUT, data.download), table.open(encoding="utf-8", newline="") as lines:
        rows = [
            (row["Filename"], int(row["ClassId"]))
            for row in csv.DictReader(lines, delimiter=";", skipinitialspace=True)
        ]
    files = [base / "GTSRB" / "Final_Test" / "Images" / name for name, _ in rows]
    return _pictures(files, [label for _, label in rows], data, table)


def _pictures(files: list[Path], labels: list[int], data: DataSection, where: Path) -> Images:
    if not files:
        raise DataError(f"{where}: expected {LAYOUT}, found no images; check data.root")
    pixels = PictureFiles([str(file) for file in files], data.channels, data.image_size)
    images = Images(pixels, np.array(labels, np.int64))
    expect_labels(images.labels, len(SIGNS), where)
    return images
