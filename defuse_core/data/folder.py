"""Image folders: ROOT/train, ROOT/validation and ROOT/test, one folder of images per class; and what is passed over."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from defuse_core.config import DataSection
from defuse_core.data.appearance import odd_images, shared_images
from defuse_core.data.images import FilePaths, Images, PictureFiles, Splits, data_root, expect_class_names
from defuse_core.data.splits import divided
from defuse_core.errors import DataError, count_of, first_few

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as in torchvision


def open_folder(data: DataSection, seed: int) -> Splits:
    """Return the images under ROOT, read on demand; the classes are the names of the folders, sorted."""
    root = data_root(data)
    classes = folder_classes(root / "train")
    parts = {name: _part(root / name, classes, data) for name in ("train", "validation", "test")}
    train = parts["train"]
    assert train is not None  # folder_classes raises where its folder is missing
    return divided(Splits(train, parts["validation"], parts["test"], classes), data, seed)


def folder_classes(part: Path) -> tuple[str, ...]:
    """Return the names of the class folders. Raises DataError if there are fewer than two."""
    names = _class_folders(part)
    if len(names) < 2:
        raise DataError(
            f"{part}: expected a folder of images per class, two classes or more, found {len(names)}"
        )
    return names


def _class_folders(part: Path) -> tuple[str, ...]:
    if not part.is_dir():
        raise DataError(
            f"{part}: expected a folder with one folder of images per class; make it or check data.root"
        )
    names = tuple(
        sorted(entry.name for entry in part.iterdir() if entry.is_dir() and not _hidden(entry.name))
    )
    expect_class_names(names, part)
    return names


def _part(part: Path, classes: tuple[str, ...], data: DataSection) -> Images | None:
    if not part.exists():
        return None
    found = _class_folders(part)
    if not found:
        raise DataError(
            f"{part}: expected a folder of images per class, as in train, found none; sort the images into such "
            "folders, or rename this one if their classes are not known"
        )
    if odd := sorted(set(found) ^ set(classes)):
        where = f"{part.name}; add or remove it"
        if odd[0] in classes:
            where = "train; add it, empty if there are no images of this class, or remove it"
        raise DataError(f"{part}: expected the class folders of train, but {odd[0]} is only in {where}")
    files = [FilePaths.pack(_image_files(part / name), f"{part}{os.sep}") for name in classes]
    if part.name == "train" and (
        empty := [n for n, images in zip(classes, files, strict=True) if not images]
    ):
        raise DataError(
            f"{part / empty[0]}: expected images of this class, found none; add some or remove the folder"
        )
    if not any(files):
        raise DataError(f"{part}: expected images, found none; add some or remove the folder")
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(images) for images in files])
    return Images(PictureFiles(FilePaths.concatenate(files), data.channels, data.image_size), labels)


def _image_files(folder: Path) -> list[str]:
    """Return the files of a class, sorted. Raises DataError naming one that is not an image."""
    found: list[str] = []
    for path in walk_files(folder):
        if not path.lower().endswith(SUFFIXES):
            raise DataError(
                f"{path}: expected an image ({' '.join(SUFFIXES)}); convert this file to PNG or JPEG, or remove it"
            )
        found.append(path)
    return sorted(found)


def walk_files(folder: Path) -> Iterator[str]:
    """Yield the files below a folder, folder by folder, without hidden ones; links are followed.

    Raises DataError naming a link to a folder above it.
    """
    above = {str(folder): {_identity(at) for at in (folder, *folder.resolve().parents)}}
    for where, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        folders[:] = sorted(name for name in folders if not _hidden(name))  # those that os.walk goes on to
        around = above.pop(where)
        for name in folders:
            below = Path(where, name)
            if _identity(below) in around:
                raise DataError(
                    f"{below}: this link leads to a folder above it, {below.resolve()}; remove it"
                )
            above[str(below)] = around | {_identity(below)}
        for name in sorted(names):
            if not _hidden(name):
                yield os.path.join(where, name)  # noqa: PTH118 - a Path each is slow for millions


def _identity(folder: Path) -> tuple[int, int]:
    """Return device and inode, which all paths to one folder share."""
    found = folder.stat()
    return found.st_dev, found.st_ino


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def _raise(error: OSError) -> None:
    raise error


log = logging.getLogger("defuse")
OTHER_NAMES = {  # of parts, in other tools
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "training": "train",
    "testing": "test",
    "eval": "test",
}
SYSTEM_FILES = ("thumbs.db", "desktop.ini")  # files that Windows writes into folders of pictures


def log_parts(data: DataSection, splits: Splits) -> None:
    """Log the parts with their counts; warn of classes without a training image, folders not read, images that are odd
    or in two parts.
    """
    counts = ", ".join(f"{count:,} {part}" for part, count in splits.counts().items())
    log.info("images: %s, of %d classes", counts, len(splits.classes))
    counted = np.bincount(splits.train.labels, minlength=len(splits.classes))
    if absent := [name for name, count in zip(splits.classes, counted, strict=True) if not count]:
        log.warning(
            "images: %d of %d classes have no training image (%s); add some, lower data.validation_share or raise "
            "data.train_images",
            len(absent),
            len(splits.classes),
            first_few(absent),
        )
    if data.name == "folder" and data.root is not None:
        for line in overlooked(data.root):
            log.warning("data.root %s: %s", data.root, line)
    for line in [*odd_images(splits.train), *shared_images(splits)]:
        log.warning("images: %s", line)


def part_of(name: str) -> str | None:
    """Return the part that a folder of this name holds, by whatever name other tools call it; None for no part."""
    lower = name.lower()
    return lower if lower in OTHER_NAMES.values() else OTHER_NAMES.get(lower)


def overlooked(root: Path) -> list[str]:
    """Return one line for each folder beside `train` that looks like a part, and for files of the system."""
    lines = []
    for entry in sorted(root.iterdir()):
        wanted = OTHER_NAMES.get(entry.name.lower())
        if wanted and entry.is_dir() and not (root / wanted).exists():
            lines.append(f"{entry.name}/ is not read; rename it to {wanted}/ to use its images")
        elif wanted and entry.is_dir():
            lines.append(f"{entry.name}/ is not read, {wanted}/ is")
    ignored = [path for path in root.glob("*/*/*") if path.name.lower() in SYSTEM_FILES]
    if ignored:
        lines.append(f"ignored: {count_of(len(ignored), 'file')} such as {ignored[0].relative_to(root)}")
    return lines
