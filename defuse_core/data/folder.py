"""Image folders: ROOT/train, ROOT/validation and ROOT/test, one folder of images per class; and what is passed over."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from defuse_core.artifacts import I64
from defuse_core.config import DataSection
from defuse_core.data.appearance import odd_images, shared_images
from defuse_core.data.images import FilePaths, Images, PictureFiles, Splits, data_root, expect_class_names
from defuse_core.data.splits import CHECK_TRACKS, divided, track_numbers
from defuse_core.errors import DataError
from defuse_core.formatting import count_of, escape_control_characters, first_few, sole_difference

log = logging.getLogger("defuse")

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # those of torchvision
OTHER_NAMES = {  # names of parts in other tools
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "training": "train",
    "testing": "test",
    "eval": "test",
}
SYSTEM_FILES = ("thumbs.db", "desktop.ini")  # files that Windows writes into folders of pictures
SYSTEM_FOLDERS = ("@eadir", "__macosx")  # folders that a Synology or macOS adds, with files named as pictures


def open_folder(data: DataSection, seed: int) -> Splits:
    """Return the images under ROOT, read on demand; the classes are the names of the folders, sorted."""
    root = data_root(data)
    classes = folder_classes(root / "train")
    ignored = list[str]()
    found = {name: _files(root / name, classes, ignored) for name in ("train", "validation", "test")}
    _expect_images(root, (path for files in found.values() for of_class in files for path in of_class))
    train, validation, test = (_images(files, data) if files else None for files in found.values())
    assert train is not None  # folder_classes raises where its folder is missing
    return divided(Splits(train, validation, test, classes, ignored=tuple(ignored)), data, seed)


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


def _files(part: Path, classes: tuple[str, ...], ignored: list[str]) -> list[FilePaths]:
    """Return the files of each class of a part, sorted; nothing of a part that does not exist.

    Files of the system are added to `ignored`.
    """
    if not part.exists():
        return []
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
        for other in odd[1:]:
            if sole := sole_difference(odd[0], other):
                where += f"; {odd[0]!a} differs only in {sole} from {other!a}"
        raise DataError(f"{part}: expected the class folders of train, but {odd[0]} is only in {where}")
    files = [FilePaths.pack(sorted(walk_files(part / name, ignored)), f"{part}{os.sep}") for name in classes]
    if part.name == "train" and (
        empty := [n for n, images in zip(classes, files, strict=True) if not images]
    ):
        raise DataError(
            f"{part / empty[0]}: expected images of this class, found none; add some or remove the folder"
        )
    if not any(files):
        raise DataError(f"{part}: expected images, found none; add some or remove the folder")
    return files


def _expect_images(root: Path, paths: Iterable[str]) -> None:
    """Raise DataError naming the files below `root` whose suffix is of no image."""
    others = [path.removeprefix(f"{root}{os.sep}") for path in paths if not path.lower().endswith(SUFFIXES)]
    if others:
        raise DataError(
            f"{root}: expected images ({' '.join(SUFFIXES)}), found {count_of(len(others), 'other file')}: "
            f"{first_few(others, most=20)}; convert them to PNG or JPEG, or remove them"
        )


def _images(files: list[FilePaths], data: DataSection) -> Images:
    """Return the images of a part from the files of each class."""
    labels = np.repeat(np.arange(len(files), dtype=np.int64), [len(images) for images in files])
    paths = FilePaths.concatenate(files)
    tracks = None if data.track_pattern is None else track_numbers(_objects(paths, data.track_pattern))
    return Images(PictureFiles(paths, data.channels, data.image_size), labels, tracks)


def _objects(paths: FilePaths, pattern: str) -> list[str]:
    """Return the object that each file shows, the text in the pattern's group. Raises DataError without a match."""
    objects = []
    for name in map(os.fsdecode, paths.names):
        found = re.search(pattern, name)
        if found is None or not found[1]:
            what = "no match" if found is None else "an empty text"
            raise DataError(
                f"{paths.root}{name}: expected data.track_pattern {pattern} to find the object in {name}, found "
                f"{what}; correct the pattern, or rename the file"
            )
        objects.append(found[1])
    return objects


def walk_files(folder: Path, ignored: list[str] | None = None) -> Iterator[str]:
    """Yield the files below a folder, folder by folder, without hidden ones; links are followed.

    Files of the system are added to `ignored`. Raises DataError naming a link to a folder above it.
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
            elif ignored is not None and name.lower() in SYSTEM_FILES:
                ignored.append(str(Path(where, name)))


def _identity(folder: Path) -> tuple[int, int]:
    """Return device and inode, which all paths to one folder share."""
    found = folder.stat()
    return found.st_dev, found.st_ino


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_FILES + SYSTEM_FOLDERS


def _raise(error: OSError) -> None:
    raise error


def log_parts(data: DataSection, splits: Splits) -> None:
    """Log the parts with their counts; warn of classes without an image in a part, tracks of several classes or in two
    parts, folders not read, images that are odd or in two parts.
    """
    counts = ", ".join(f"{count:,} {part}" for part, count in splits.counts().items())
    log.info("images: %s, of %d classes", counts, len(splits.classes))
    for part, images in splits.parts().items():
        if images.tracks is not None:
            log.info("images: %s in %s", count_of(len(np.unique(images.tracks)), "track"), part)
            if part == "validation" and splits.validation_held_out:
                continue  # those of the training images were told
            for line in _odd_tracks(data, part, images.labels, images.tracks, splits.classes):
                log.warning("images: %s", line)
    if absent := _absent(splits.classes, splits.train.labels):
        log.warning(
            "images: %d of %d classes have no training image (%s); add some, lower data.validation_share or raise "
            "data.train_images%s",
            len(absent),
            len(splits.classes),
            first_few(absent),
            "" if splits.train.tracks is None else f", or {CHECK_TRACKS}",
        )
    for part, images in [*splits.parts().items()][1:]:
        if lacking := [name for name in _absent(splits.classes, images.labels) if name not in absent]:
            log.warning(
                "images: %d of %d classes with training images have none in %s (%s), whose figures say nothing of "
                "them; add some",
                len(lacking),
                len(splits.classes) - len(absent),
                part,
                first_few(lacking),
            )
    if data.name == "folder" and data.root is not None:
        for line in overlooked(data.root, splits.ignored):
            log.warning("data.root %s: %s", data.root, line)
    for line in [*odd_images(splits), *shared_images(splits), *_shared_tracks(data, splits)]:
        log.warning("images: %s", line)


def _absent(classes: tuple[str, ...], labels: I64) -> list[str]:
    """Return the classes without an image."""
    counted = np.bincount(labels, minlength=len(classes))
    return [name for name, count in zip(classes, counted, strict=True) if not count]


def _odd_tracks(
    data: DataSection, part: str, labels: I64, tracks: I64, classes: tuple[str, ...]
) -> list[str]:
    """Return a line where tracks hold images of several classes, and where each training track is one image."""
    given = "data.track_pattern" if data.name == "folder" else f"{part}_tracks"
    found, frames = np.unique(tracks, return_counts=True)
    lines = []
    if part == "train" and frames.max() == 1:
        lines.append(f"each training track is one image; check {given}")
    # the classes of each track
    track, label = np.divmod(np.unique(tracks * len(classes) + labels), len(classes))
    of_track = np.unique(track, return_counts=True)[1]
    if (mixed := found[of_track > 1]).size:
        names = first_few([classes[each] for each in label[track == mixed[0]]])
        remedy = f"give each class its own in {given}"
        if data.name == "folder":
            remedy = f"{given} has to find the class, too, as in (.+)_ in place of /(.+)_"
        lines.append(
            f"{len(mixed)} of {count_of(len(found), 'track')} in {part} hold images of several classes, such as one of "
            f"{names}; if each class numbers its objects anew, {remedy}"
        )
    return lines


def _shared_tracks(data: DataSection, splits: Splits) -> list[str]:
    """Return a line for each two parts with tracks of one name."""
    named = {part: _track_names(data, part, images) for part, images in splits.parts().items()}
    return [
        f"{len(both)} of {count_of(len(names), 'named track')} in {part} have the name of one in {earlier}, such as "
        f"{min(both)}; if they show the same objects, figures on {part} images are too good: keep each in one part"
        for (earlier, others), (part, names) in combinations(named.items(), 2)
        if (both := names & others)
    ]


def _track_names(data: DataSection, part: str, images: Images) -> set[str]:
    """Return the names of a part's tracks; without those that are numbers, since each part may begin anew."""
    names: Iterable[str] = ()
    if data.track_pattern is not None and isinstance(images.pixels, PictureFiles):
        names = _objects(images.pixels.paths, data.track_pattern)
    elif data.name == "npz":
        with np.load(data_root(data), allow_pickle=False) as arrays:
            if f"{part}_tracks" in arrays:
                names = map(str, arrays[f"{part}_tracks"].flat)
    return {name for name in names if re.search(r"[^\W\d_][^/]*$", name)}


def part_of(name: str) -> str | None:
    """Return the part that a folder of this name holds, by whatever name other tools call it; None for no part."""
    lower = name.lower()
    return lower if lower in OTHER_NAMES.values() else OTHER_NAMES.get(lower)


def overlooked(root: Path, ignored: Sequence[str]) -> list[str]:
    """Return one line for each folder beside `train` that looks like a part, and for the `ignored` files.

    A folder of another name looks like one by its classes, while a part is missing.
    """
    lines, classes = list[str](), set(folder_classes(root / "train"))
    missing = [f"{part}/" for part in ("validation", "test") if not (root / part).exists()]
    for entry in sorted(root.iterdir()):
        name, wanted = entry.name, part_of(entry.name)
        if name == wanted or _hidden(name) or not entry.is_dir():
            continue
        if wanted and not (root / wanted).exists():
            lines.append(f"{name}/ is not read; rename it to {wanted}/ to use its images")
        elif wanted and not (root / wanted).samefile(entry):  # one folder where case does not count
            lines.append(f"{name}/ is not read, {wanted}/ is")
        elif not wanted and missing and classes <= {folder.name for folder in entry.glob("*/")}:
            lines.append(
                f"{name}/ has the classes of train/ and is not read; rename it to {' or '.join(missing)} to use it"
            )
    if ignored:
        lines.append(
            f"ignored: {count_of(len(ignored), 'file')} such as {Path(ignored[0]).relative_to(root)}"
        )
    return [escape_control_characters(line) for line in lines]
