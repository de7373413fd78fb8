"""What a folder of images, or an .npz file, holds: sizes, colours, classes and parts; how fast its files are read."""

from __future__ import annotations

import itertools
import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import ValidationError

from defuse_core.artifacts import F32
from defuse_core.config import DataSection, first_problem
from defuse_core.data import Splits, open_splits, overlooked
from defuse_core.data.appearance import given_parts, odd_images, shared_images
from defuse_core.data.folder import SUFFIXES, folder_classes, part_of, walk_files
from defuse_core.data.images import (
    PictureFiles,
    convert_picture,
    evenly_spaced,
    keeps_colours,
    opened_picture,
    read_each,
)
from defuse_core.data.npz import image_shape, read_arrays, unread_arrays
from defuse_core.errors import DataError
from defuse_core.formatting import first_few

SIZES = (16, 32, 64, 128)  # heights and widths that the β-VAE's stages halve to 4
LARGEST_SUGGESTED = 64  # unless the classifier asks for more: costs grow with the square
SAMPLE = 200  # pictures that are looked at
FEWEST = 4  # training images, of which one at least is held out for validation
FEW = 20  # training images of a class: fewer are worth a note
OBLONG = 1.1  # longer side by shorter one, from which a picture in a square looks stretched
# Difference of two channels, of 255, from which a pixel counts as coloured (JPEG blurs grey by less).
COLOUR = 6
# The same of a pixel of a small mark, such as a lamp, in a picture of at most DETAIL x DETAIL pixels; MARK are enough.
STRONG_COLOUR, DETAIL, MARK = 64, 256, 4
# Share of pixels of one brightness from which a picture is a drawing rather than a photograph.
PLAIN_GROUND = 0.5

Form = tuple[int, int, frozenset[int]]  # height, width, and the numbers of channels that keep its colours


@dataclass(frozen=True)
class DataFacts:
    """What was found in the images."""

    name: str  # folder or npz, as data.name
    root: Path
    height: int  # median over the pictures looked at
    width: int
    image_size: int  # suggested
    channels: int  # 1 where all pictures looked at are grey, else 3
    photographs: bool  # colour pictures without a plain ground, unlike digits, symbols and drawings
    classes: tuple[str, ...]
    counts: dict[str, int]  # part -> images
    notes: tuple[str, ...]
    forms: frozenset[Form] = frozenset()  # of the pictures looked at; none of an .npz file

    def are_converted(self, size: int, channels: int) -> bool:
        """Return whether a run whose images have this size and these channels resizes pictures or changes colours."""
        return any(
            (height, width) != (size, size) or channels not in kept for height, width, kept in self.forms
        )


def inspect_data(root: Path, called: str | None = None) -> DataFacts:
    """Return what is in a folder in ImageFolder layout below `train`, or in an .npz file.

    Raises DataError, which names the data as `called`, by default their path.
    """
    called = called or str(root)
    if not (root.is_dir() or root.is_file()):
        raise DataError(
            f"init {root}: expected a folder of images, or an .npz file, found neither; check the path"
        )
    if root.is_file():
        name, (height, width, channels), forms = "npz", _look_at_npz(root, called), list[Form]()
        image_size, lines = height, unread_arrays(root)
    else:
        _expect_train(root)
        name, ((height, width, channels), forms) = "folder", _look_at_pictures(root / "train")
        image_size, lines = _suggested_size(min(height, width)), _stretched(forms)
    try:
        section = DataSection.model_validate(
            {"name": name, "root": root, "image_size": image_size, "channels": channels}
        )
    except ValidationError as error:  # an .npz whose images are too small or too large, or the path
        remedy = "resize the images"
        if error.errors()[0]["loc"] == ("root",):
            remedy = "rename it, or use a UTF-8 locale (LC_ALL=C.UTF-8)"
        raise DataError(f"{called}: {first_problem(error, DataSection)}; {remedy}") from error
    splits = open_splits(section, 0)
    if name == "folder":
        lines = [*overlooked(root, splits.ignored), *lines]
    if len(splits.train) < FEWEST:
        raise DataError(f"{called}: {len(splits.train)} training images are too few; add images")
    some = splits.train.take(evenly_spaced(len(splits.train), SAMPLE))
    photographs = channels == 3 and plain_ground(some.batch()) < PLAIN_GROUND
    return DataFacts(
        name,
        root,
        height,
        width,
        image_size,
        channels,
        photographs,
        splits.classes,
        splits.counts(),
        (
            *lines,
            *_few_images(splits),
            *odd_images(splits),
            *_unlike_training(splits, channels),
            *shared_images(splits),
        ),
        frozenset(forms),
    )


def _unlike_training(splits: Splits, channels: int) -> list[str]:
    """Return lines where validation or test files are far from square, or coloured where training images are grey."""
    lines = []
    for part, images in given_parts(splits).items():
        if part == "train" or not isinstance(images.pixels, PictureFiles):
            continue
        paths = images.pixels.at(evenly_spaced(len(images), SAMPLE)).paths
        forms, coloured = zip(*read_each(paths, _look_at), strict=True)
        lines += _stretched(list(forms), f"{part} images")
        if channels == 1 and any(coloured):
            lines.append(
                f"{sum(coloured)} of {len(paths)} {part} images looked at are coloured, those for training "
                f"are grey; figures on {part} images are of other pictures than the classifier was trained on"
            )
    return lines


def _stretched(forms: list[Form], kind: str = "pictures") -> list[str]:
    """Return a line where some pictures are far from square."""
    count = sum(max(height, width) > OBLONG * min(height, width) for height, width, _ in forms)
    if not count:
        return []
    return [
        f"{count} of {len(forms)} {kind} looked at have sides that differ by over 10 % and are stretched to a square "
        "without crop or padding; if the classifier was trained on crops, crop the files first"
    ]


def _few_images(splits: Splits) -> list[str]:
    """Return a line where some classes have few training images."""
    counts = np.bincount(splits.train.labels, minlength=len(splits.classes))
    few = [
        f"{quoted(name)} ({count})" for name, count in zip(splits.classes, counts, strict=True) if count < FEW
    ]
    if not few:
        return []
    return [
        f"{len(few):,} of {len(counts):,} classes have fewer than {FEW} training images, too few to rely on what is "
        f"found there; add images: {first_few(few)}"
    ]


def quoted(name: str) -> str:
    """Return the name of a class for a list with commas: in quotes where it has a comma or a quote of its own."""
    return json.dumps(name, ensure_ascii=False) if set(name) & set(',"') else name


def plain_ground(images: F32) -> float:
    """Return the median over (n, channels, H, W) images of the share of pixels with the most common brightness.

    Measured with brightness in steps of 1/255, within 4 steps: 0.85 on MNIST, 0.3 on traffic signs, 0.15 on CIFAR-10.
    """
    levels = np.round(255 * images.mean(axis=1)).astype(np.int64).reshape(len(images), -1)
    counts = [np.convolve(np.bincount(row, minlength=256), np.ones(9), "same").max() for row in levels]
    return float(np.median(counts) / levels.shape[1])


def _expect_train(root: Path) -> None:
    """Raise DataError, with what mends it, for a folder of class folders, or of parts with other names."""
    if (root / "train").is_dir():
        _expect_folders(root / "train")
        return
    parts = {folder.name: part for folder in _folders(root) if (part := part_of(folder.name))}
    if "train" in parts.values():
        renames = ", ".join(f"{name}/ to {part}/" for name, part in parts.items() if name != part)
        raise DataError(
            f"{root}: expected train/ with a folder per class, found {', '.join(parts)}; rename {renames}"
        )
    _expect_no_part(root)
    folders = [folder for folder in _folders(root) if folder.name not in parts]
    layout = "train/ with a folder of images per class (train/CLASS/*.png)"
    if len(folders) > 1 and all(map(_is_class_folder, folders)):
        raise DataError(
            f"{root}: expected {layout}, found class folders such as {folders[0].name}/; "
            f"move them into train/{_moved(root) if not parts else ''}"
        )
    if holding := [folder for folder in folders if _has_pictures(folder)]:
        raise DataError(
            f"{root}: expected {layout}, found no train/, but images below {holding[0].name}/; "
            "give a folder of this layout"
        )
    raise DataError(f"{root}: expected {layout}, found no train/; make it")


def _moved(root: Path) -> str:
    """Return the command that moves all folders below `root` into train/."""
    at = shlex.quote(str(root))  # hidden, since `*/` would match train/ too
    return f": mkdir {at}/.train && mv {at}/*/ {at}/.train && mv {at}/.train {at}/train"


def _expect_folders(train: Path) -> None:
    """Raise DataError where train/ holds images in place of class folders, as where it is a class itself."""
    if _folders(train) or not _has_pictures(train):
        return
    remedy = "sort them into such folders"
    others = [folder for folder in _folders(train.parent) if folder != train]
    if others and all(_is_class_folder(folder) and not part_of(folder.name) for folder in others):
        move = f"move all class folders into a new train/{_moved(train.parent)}"
        remedy = f"if train is a class like {others[0].name}, {move}"
    raise DataError(f"{train}: expected a folder of images per class, found images directly in it; {remedy}")


def _expect_no_part(root: Path) -> None:
    """Raise DataError for a folder that is a part of a data set, such as train/ itself, rather than the data set."""
    name, parent = root.absolute().name, root.absolute().parent
    if not any(map(_is_class_folder, _folders(root))):
        return
    remedy = f"give its parent: defuse init {shlex.quote(str(parent))}"
    if part := part_of(name):
        raise DataError(f"{root}: this is the {part} folder itself; {remedy}")
    if (parent / "train").is_dir():
        raise DataError(f"{root}: this folder of classes is beside train/; {remedy}")


def _folders(root: Path) -> list[Path]:
    """Return the folders in a folder, without hidden ones, such as .git, which no run reads."""
    return [each for each in sorted(root.iterdir()) if each.is_dir() and not each.name.startswith(".")]


def _is_class_folder(folder: Path) -> bool:
    """Whether a folder holds images and nothing else, as no folder of a program or of runs does."""
    try:
        paths = walk_files(folder)
        return all(path.lower().endswith(SUFFIXES) for path in paths) and _has_pictures(folder)
    except (OSError, DataError):  # a folder that no run reads
        return False


def _has_pictures(folder: Path) -> bool:
    try:
        return bool(_pictures(folder, 1))
    except (OSError, DataError):  # a folder that no run reads
        return False


def _pictures(folder: Path, limit: int | None = None) -> list[str]:
    """Return the first files of a class, or all, as a run reads them."""
    images = (path for path in walk_files(folder) if path.lower().endswith(SUFFIXES))
    return list(itertools.islice(images, limit))


def _some_pictures(folder: Path, most: int) -> list[str]:
    """Return evenly spaced files of a class, since files of one source often come first."""
    found = sorted(_pictures(folder))
    return [found[row] for row in evenly_spaced(len(found), most)]


def _look_at_pictures(train: Path) -> tuple[tuple[int, int, int], list[Form]]:
    """Return median height, median width and 1 or 3 channels of pictures of every class, and the forms of these."""
    folders = [train / name for name in folder_classes(train)]
    each = max(2, SAMPLE // len(folders))
    paths = [path for folder in folders for path in _some_pictures(folder, each)]
    if not paths:
        raise DataError(f"{train}: expected one folder of images per class, found no images")
    forms, coloured = zip(*read_each(paths, _look_at), strict=True)
    height, width = (int(side) for side in np.median(np.array([form[:2] for form in forms]), axis=0))
    return (height, width, 3 if any(coloured) else 1), list(forms)


def _look_at(path: str) -> tuple[Form, bool]:
    """Return the form of a picture, and whether it is coloured."""
    with opened_picture(path) as picture:
        kept = frozenset(channels for channels in (1, 3) if keeps_colours(picture, channels))
        return (picture.height, picture.width, kept), 1 not in kept and _is_coloured(picture)


def _is_coloured(picture: Image.Image) -> bool:
    if picture.mode in {"L", "1", "LA"} or picture.mode.startswith("I"):
        return False
    colours = convert_picture(picture, "RGB")
    if (np.ptp(np.asarray(colours.resize((32, 32))), axis=2) > COLOUR).mean() > 0.01:
        return True
    width, height = colours.size
    detailed = np.asarray(colours.resize((min(width, DETAIL), min(height, DETAIL))))
    return bool((np.ptp(detailed, axis=2) > STRONG_COLOUR).sum() >= MARK)


def _look_at_npz(file: Path, called: str) -> tuple[int, int, int]:
    """Return height, width and channels of train_images. Raises DataError, which names the file as `called`."""
    arrays = read_arrays(file, {"train_images"})
    if "train_images" not in arrays:
        raise DataError(f"{called}: expected an .npz file with train_images, found none; save it again")
    images = arrays["train_images"]
    shape = image_shape(images)
    if shape is None:
        raise DataError(
            f"{called}: train_images: expected shape (N, H, W), (N, H, W, c) or (N, c, H, W) with c of 1 or 3, found "
            f"{images.shape}; reshape them, or drop the channel of transparency"
        )
    height, width, _ = shape
    if height % 2 or width % 2:
        raise DataError(
            f"{called}: train_images: expected an even height and width, which the β-VAE can halve, found "
            f"{width}x{height} pixels; pad or resize them, best to a multiple of 16"
        )
    return shape


def _suggested_size(side: int) -> int:
    """Return the size that pictures whose shorter side has `side` pixels are resized to."""
    fitting = [size for size in SIZES if size <= LARGEST_SUGGESTED and size >= 0.8 * side]
    return fitting[0] if fitting else LARGEST_SUGGESTED
