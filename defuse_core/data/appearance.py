"""What is odd about images that are read without an error: too dark, all the same, turned, in two parts."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from defuse_core.data.images import (
    FINGERPRINT_IMAGES,
    Images,
    PictureFiles,
    Splits,
    evenly_spaced,
    opened_picture,
)
from defuse_core.files import OPENED_AHEAD, digest_of, map_ahead
from defuse_core.formatting import escape_control_characters, first_few, folded, sole_difference

KINDS = {"train": "training", "validation": "validation", "test": "test"}  # part -> kind of image in messages
DARK = 1 / 8  # share of the range; 12 bits in a file of 16 bits end at 1/16
WITH_ALPHA = ("RGBA", "RGBa", "LA", "La", "PA")
TURNED = range(2, 9)  # EXIF orientations that are not upright; 0 is unknown
UNREAD = {  # what files can have -> why it matters
    "transparency": "transparency, which is dropped: the colours below it are used; flatten the files if the "
    "transparency shows the object",
    "orientation": "an EXIF orientation, which is ignored, as in torchvision's ImageFolder; rotate the files if the "
    "classifier was trained on upright images",
    "frames": "several frames or pages; only the first is read",
}
MOST = 0.75  # share of the images looked at from which they are odd
MOST_COMPARED = 10_000  # images of a part that those of later parts are compared with


def given_parts(splits: Splits) -> dict[str, Images]:
    """Return the parts by name, without a validation part that is held out of the training images."""
    parts = splits.parts()
    return {part: parts[part] for part in parts if not (part == "validation" and splits.validation_held_out)}


def odd_images(splits: Splits) -> list[str]:
    """Return a line for classes that are called almost alike, and for each oddity of a sample of a part.

    Oddities are dark images, equal ones, and what of a file is not read.
    """
    odd = [line for part, images in given_parts(splits).items() for line in _odd_in(images, KINDS[part])]
    return _alike(splits.classes) + odd


def _alike(classes: Sequence[str]) -> list[str]:
    """Return a line where classes differ only in case, or in the Unicode form of their letters."""
    first = dict[str, str]()
    pairs = [(name, other) for name in classes if (other := first.setdefault(folded(name), name)) != name]
    lines = [
        f"{name!a} differs only in {sole_difference(name, other)} from {other!a}" for name, other in pairs
    ]
    return [f"of the classes, {first_few(lines)}; merge those that are one class"] if lines else []


def _odd_in(images: Images, kind: str) -> list[str]:
    rows = evenly_spaced(len(images), FINGERPRINT_IMAGES)
    pixels = images.batch(rows).reshape(len(rows), -1)
    looked_at = f"of {len(rows)} {kind} images looked at"
    lines = []
    dark = int((pixels.max(axis=1) < DARK).sum())
    if dark >= MOST * len(rows):
        lines.append(
            f"{dark} {looked_at} are almost black, with no value over 1/8 of the range; scale them to the whole range, "
            "which is 0 to 65,535 in files of 16 bits"
        )
    equal = int(np.unique(pixels, axis=0, return_counts=True)[1].max())
    if len(rows) > 1 and equal >= MOST * len(rows):
        lines.append(f"{equal} {looked_at} are one and the same picture")
    if isinstance(images.pixels, PictureFiles):
        lines += _unread(images.pixels.at(rows), looked_at)
    return lines


def _unread(files: PictureFiles, looked_at: str) -> list[str]:
    """Return a line for each thing that some files have and that is not read."""
    found = [_unread_in(path) for path in files.paths]
    counts = {what: sum(what in each for each in found) for what in UNREAD}
    return [f"{counts[what]} {looked_at} have {text}" for what, text in UNREAD.items() if counts[what]]


def _unread_in(path: str) -> set[str]:
    """Return which of UNREAD a file has. Pillow itself turns a TIFF by its orientation."""
    looks = {"orientation": _is_turned, "transparency": _is_partly_transparent, "frames": _has_frames}
    found = set()
    with opened_picture(path) as picture:
        for what, look in looks.items():
            with contextlib.suppress(Exception):  # on a damaged part, which reading the pixels does not need
                if look(picture):
                    found.add(what)
    return found


def _is_turned(picture: Image.Image) -> bool:
    return picture.format != "TIFF" and picture.getexif().get(ExifTags.Base.Orientation) in TURNED


def _has_frames(picture: Image.Image) -> bool:
    picture.seek(1)  # raises where there is a single one; n_frames would read all
    return True


def _is_partly_transparent(picture: Image.Image) -> bool:
    """Whether the pixels of a picture differ in their transparency."""
    if picture.mode not in WITH_ALPHA and "transparency" not in picture.info:
        return False
    low, high = picture.convert("RGBA").getchannel("A").getextrema()
    return low != high


def shared_images(splits: Splits) -> list[str]:
    """Return a line for each two parts that share images, files of equal bytes or equal arrays, and for two classes.

    Looks for at most 128 images of the later part (train, validation, test) among at most 10,000 of the earlier one,
    evenly spaced, without decoding any; and so for training images among those of other classes.
    """
    seen = _Seen()
    lines = _in_two_classes(splits.train, seen)
    for (earlier, others), (part, images) in combinations(splits.parts().items(), 2):
        some, many = _spaced(images, FINGERPRINT_IMAGES), _spaced(others, MOST_COMPARED)
        same = [(row, *equal.values()) for row, equal in _equal_images(some, many, seen).items()]
        if same:
            lines.append(
                f"{len(same)} of {len(some)} {part} images looked at are also {KINDS[earlier]} images"
                f"{_example(some, many, same[0])}; they make figures on {part} images too good, so remove them from "
                "one of the two parts"
            )
    return lines


def _in_two_classes(train: Images, seen: _Seen) -> list[str]:
    some, many = _spaced(train, FINGERPRINT_IMAGES), _spaced(train, MOST_COMPARED)
    same = {
        row: other
        for row, equal in _equal_images(some, many, seen).items()
        for label, other in equal.items()
        if label != some.labels[row]
    }
    if not same:
        return []
    return [
        f"{len(same)} of {len(some)} training images looked at are also in another class"
        f"{_example(some, many, next(iter(same.items())))}; no classifier is right on both, so remove them from one of "
        "the two classes"
    ]


def _spaced(images: Images, most: int) -> Images:
    return images.take(evenly_spaced(len(images), most))


class _Seen:
    """Sizes and digests of images. Each file is asked for once, and many side by side."""

    def __init__(self) -> None:
        self._size, self._digest = functools.cache(_size), functools.cache(_digest)

    def sizes(self, images: Images) -> list[int]:
        """Return the bytes of each image's file, or of its pixels; 0 for what is no file."""
        if isinstance(images.pixels, PictureFiles):
            return list(map_ahead(self._size, images.pixels.paths, OPENED_AHEAD))
        return [images.pixels[:1].nbytes] * len(images)

    def digests(self, images: Images, rows: Iterable[int]) -> dict[int, str]:
        """Return the digest of the image in each of the rows."""
        rows, pixels = list(rows), images.pixels
        if isinstance(pixels, PictureFiles):
            paths = map(pixels.paths.__getitem__, rows)
            return dict(zip(rows, map_ahead(self._digest, paths, OPENED_AHEAD), strict=True))
        return {row: hashlib.sha256(pixels[row : row + 1].tobytes()).hexdigest() for row in rows}


def _equal_images(some: Images, many: Images, seen: _Seen) -> dict[int, dict[int, int]]:
    """Return for each row of `some` that is in `many`, too, the labels that it has there, with a row of each."""
    sizes = seen.sizes(some)
    looked_for = {*sizes} - {0}
    alike = (row for row, size in enumerate(seen.sizes(many)) if size in looked_for)
    known = defaultdict[str, dict[int, int]](dict)
    for row, digest in seen.digests(many, alike).items():
        known[digest][int(many.labels[row])] = row
    digests = seen.digests(some, (row for row, size in enumerate(sizes) if size))
    return {row: known[digest] for row, digest in digests.items() if digest in known}


def _example(some: Images, many: Images, rows: Sequence[int]) -> str:
    """Return what names the files of two rows; nothing for images that are no files."""
    if some.files is None or many.files is None:
        return ""
    return escape_control_characters(f", such as {some.files[rows[0]]}, which is {many.files[rows[1]]}")


def _size(path: str) -> int:
    file = Path(path)
    return file.stat().st_size if file.is_file() else 0


def _digest(path: str) -> str:
    try:
        return digest_of(Path(path))
    except OSError:  # whoever decodes it says why
        return f"unread {path}"
