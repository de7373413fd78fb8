"""Images with their labels, in memory or read on demand, and the parts of a data set."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile

from defuse_core.artifacts import F32, I64, U8
from defuse_core.config import DataSection
from defuse_core.errors import DataError
from defuse_core.formatting import first_few, has_control_characters

Read = TypeVar("Read")

# of the suffixes of a folder's images, and GIF, which they can hide; Pillow starts a program for other formats
FORMATS = ("PNG", "JPEG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
# Pillow modes that are read as grey or RGB without loss, but for 16 bits of grey, of which the upper 8 count
LOSSLESS_MODES = {1: ("1", "L", "I;16"), 3: ("RGB", "P")}
MAX_LOADED = 4 * 2**30  # bytes; larger sets are read from their files in every epoch
DOWNLOADABLE = ("mnist", "signs", "svhn")
LOSSLESS_BYTES = 16_384  # a PNG above this is replaced by a JPEG in a data: address
FINGERPRINT_IMAGES = 128  # read per part, however large the data set is


@dataclass(frozen=True, eq=False)
class FilePaths:
    """N paths below one root in one array, in which each takes as many bytes as the longest name; a string takes 100.

    Ray's object store holds it once per node, whatever the number of workers.
    """

    root: str  # what every path begins with
    names: npt.NDArray[np.bytes_]  # (N,) the rest of each path, in the encoding of the file system

    @staticmethod
    def pack(paths: Sequence[str], root: str = "") -> FilePaths:
        """Return `paths`, each of which begins with `root`."""
        return FilePaths(root, np.array([os.fsencode(path.removeprefix(root)) for path in paths], np.bytes_))

    @staticmethod
    def concatenate(parts: Sequence[FilePaths]) -> FilePaths:
        """Return the paths of all parts, in order. Raises ValueError where their roots differ."""
        if len({part.root for part in parts}) != 1:
            raise ValueError(f"FilePaths: expected one root, found {sorted({part.root for part in parts})}")
        return FilePaths(parts[0].root, np.concatenate([part.names for part in parts]))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> str:
        return self.root + os.fsdecode(self.names[row])

    def __iter__(self) -> Iterator[str]:
        return (self[row] for row in range(len(self)))

    def take(self, rows: slice | I64) -> FilePaths:
        """Return the paths of `rows`."""
        return FilePaths(self.root, self.names[rows])


class OnDemand(Protocol):
    """Pixels (N, channels, H, W), as Images holds them, that are read or computed when they are indexed."""

    dtype: np.dtype[Any]

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice | I64) -> U8 | F32: ...

    def at(self, rows: slice | I64) -> OnDemand: ...


class PictureFiles:
    """Image files as a uint8 array (N, channels, H, W) that is read when it is indexed.

    Images are converted to grey or colour, as `channels` says, and resized to `size` x `size`: bilinear with
    antialiasing, as by torchvision's Resize.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, paths: Sequence[str] | FilePaths, channels: int, size: int) -> None:
        self.paths = paths if isinstance(paths, FilePaths) else FilePaths.pack(paths)
        self._channels = channels
        self._size = size

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.paths), self._channels, self._size, self._size)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows: slice | I64) -> U8:
        """Return pixels (n, channels, H, W). Raises DataError naming the files that are no readable images."""
        paths = self.paths.take(rows)
        pixels = np.empty((len(paths), *self.shape[1:]), np.uint8)
        read = partial(read_picture, channels=self._channels, size=self._size)
        for image, picture in zip(pixels, read_each(paths, read), strict=True):
            image[:] = picture
        return pixels

    def at(self, rows: slice | I64) -> PictureFiles:
        """Return the files of `rows`. Reads nothing."""
        return PictureFiles(self.paths.take(rows), self._channels, self._size)


def read_each(paths: Sequence[str] | FilePaths, read: Callable[[str], Read]) -> Iterator[Read]:
    """Yield what `read` returns of each image file. Raises, after the last, one DataError for all that it fails on."""
    failed, first = list[str](), ""
    for path in paths:
        try:
            yield read(path)
        except DataError as error:
            failed.append(path)
            first = first or str(error)
    if len(failed) == 1:
        raise DataError(first)
    if failed:
        count, names = f"{len(failed)} of {len(paths):,}", first_few(failed, most=20)
        raise DataError(f"{count} image files cannot be read: {names}; the first error is: {first}")


def read_picture(path: str, channels: int, size: int) -> U8:
    """Return one image file as (channels, size, size). Raises DataError naming the file."""
    with opened_picture(path) as picture:
        return fit_picture(picture, channels, size)


@contextlib.contextmanager
def opened_picture(path: str) -> Iterator[Image.Image]:
    """Yield an image file. Raises DataError, naming the file, for any error of the block, and for what is no file.

    A named pipe would be waited for without end.
    """
    try:
        found = Path(path).stat()
        if not stat.S_ISREG(found.st_mode):
            raise DataError("expected an image, found a pipe, a device or a socket; remove it")
        if not found.st_size:
            raise DataError("expected an image, found an empty file; restore or remove it")
        with Image.open(path, formats=FORMATS) as picture:
            yield picture
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except PermissionError as error:
        raise DataError(f"{path}: no permission to read this image; make it readable to you") from error
    except FileNotFoundError as error:
        if Path(path).is_symlink():
            raise DataError(f"{path}: this link leads to a file that does not exist; remove it") from error
        raise DataError(f"{path}: this image no longer exists; restore it, or start a new run") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: this image has too many pixels to be read; shrink or remove it") from error
    except Exception as error:  # decoders raise many kinds of errors on broken files
        raise DataError(f"{path}: expected an image, found {error}; repair or remove this file") from error


def fit_picture(picture: Image.Image, channels: int, size: int) -> U8:
    """Return a picture as (channels, size, size). Raises DataError for pixels of an unknown range."""
    if picture.mode.startswith(("F", "I")):
        picture = Image.fromarray(_eight_bits(picture))  # Pillow's own conversion clips instead of scaling
    picture = convert_picture(picture, "L" if channels == 1 else "RGB")
    if picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(picture).reshape(size, size, channels).transpose(2, 0, 1)


def convert_picture(picture: Image.Image, mode: str) -> Image.Image:
    """Return a picture as "L" or "RGB", without its transparency."""
    if "transparency" in picture.info:
        picture = picture.convert("RGBA")  # Pillow warns of a palette with transparency otherwise
    return picture.convert(mode)


def keeps_colours(picture: Image.Image, channels: int) -> bool:
    """Return whether `fit_picture` loses no colour and no transparency: grey in RGB counts up to one level.

    So lossy WebP, which rounds each channel by itself, stays grey.
    """
    if "transparency" in picture.info:
        return False
    if picture.mode in LOSSLESS_MODES[channels]:
        return True
    may_be_grey = channels == 1 and picture.mode in LOSSLESS_MODES[3]
    return may_be_grey and bool(np.ptp(np.asarray(picture.convert("RGB")), axis=2).max() <= 1)


def _eight_bits(picture: Image.Image) -> U8:
    """Return the pixels (H, W) of a picture with 16 bits (0 to 65,535) or floats (0 to 1) as 0 to 255.

    Raises DataError for other floats, and for integers of 32 bits, which only a TIFF has: their range is not in the
    file, and the brightest pixel of each picture would give each its own.
    """
    pixels = np.asarray(picture)
    if picture.mode == "F":
        low, high = pixels.min(), pixels.max()
        if not (low >= 0 and high <= 1):  # nan is neither
            raise DataError(
                f"expected floats of 0 to 1, found {low} to {high}; divide those of all images by the largest value "
                "that they can have, or save all with 8 bits"
            )
        return np.round(pixels * 255).astype(np.uint8)
    if isinstance(picture, TiffImageFile) and picture.tag_v2.get(BITSPERSAMPLE) == (32,):
        raise DataError(
            "expected integers of 8 or 16 bits, found 32 bits, whose range is not in the file; save all images with 8 "
            "or 16 bits"
        )
    return (pixels >> 8).clip(0, 255).astype(np.uint8)


def to_levels(pixels: F32) -> U8:
    """Return pixels of any shape as uint8: 0 for 0 and less, 255 for 1 and more."""
    return np.round(pixels * 255).clip(0, 255).astype(np.uint8)


def to_picture(image: U8) -> Image.Image:
    """Return an image (1 or 3, H, W) as a grey or a colour picture."""
    return Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))


def data_address(image: F32) -> str:
    """Return an image (1 or 3, H, W) in [0, 1] as a data: address, of a PNG up to LOSSLESS_BYTES, else of a JPEG.

    Every image of at most 64 x 64 pixels is kept exactly.
    """
    picture, file, kind = to_picture(to_levels(image)), io.BytesIO(), "png"
    picture.save(file, kind)
    if file.tell() > LOSSLESS_BYTES:
        file, kind = io.BytesIO(), "jpeg"
        picture.save(file, kind, quality=90)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


@dataclass(frozen=True, eq=False)
class Images:
    """N images and their labels. The arrays may be read-only, as those from Ray's object store are."""

    pixels: U8 | F32 | OnDemand  # (N, channels, H, W); uint8 0 to 255, or float32 in [0, 1]
    labels: I64  # (N,)
    tracks: I64 | None = None  # (N,) images of one track show the same object; None where none do

    def __post_init__(self) -> None:
        shape, dtype = self.pixels.shape, self.pixels.dtype
        if len(shape) != 4 or dtype not in (np.uint8, np.float32):
            raise ValueError(
                f"Images.pixels: expected uint8 or float32 (N, channels, H, W), found {dtype} {shape}"
            )
        if self.labels.shape != shape[:1] or self.labels.dtype != np.int64:
            raise ValueError(
                f"Images.labels: expected int64 ({shape[0]},), found {self.labels.dtype} {self.labels.shape}"
            )
        if self.tracks is not None and self.tracks.shape != self.labels.shape:
            raise ValueError(f"Images.tracks: expected {self.labels.shape}, found {self.tracks.shape}")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def unit(self) -> I64:
        """(N,) the track of each image, or its row where images have no tracks."""
        return np.arange(len(self)) if self.tracks is None else self.tracks

    @property
    def files(self) -> tuple[str, ...] | None:
        """The file of each image; None where they are arrays."""
        return tuple(self.pixels.paths) if isinstance(self.pixels, PictureFiles) else None

    def batch(self, rows: slice | I64 = slice(None)) -> F32:
        """Return some images, or all, (n, channels, H, W) in [0, 1], as a new, contiguous and writable array."""
        raw = self.pixels[rows]
        batch = np.array(raw, dtype=np.float32, order="C")
        if raw.dtype == np.uint8:
            batch /= 255
        return batch

    def take(self, rows: slice | I64) -> Images:
        """Return the images of `rows`, in that order. Files are not read, and codes not decoded."""
        pixels = self.pixels[rows] if isinstance(self.pixels, np.ndarray) else self.pixels.at(rows)
        return Images(pixels, self.labels[rows], None if self.tracks is None else self.tracks[rows])

    @property
    def stays_on_disk(self) -> bool:
        """Whether the images are files of more than MAX_LOADED bytes, which are read whenever they are used."""
        return isinstance(self.pixels, PictureFiles) and math.prod(self.pixels.shape) > MAX_LOADED

    def loaded(self) -> Images:
        """Return the images with their pixels in memory, as uint8, unless these stay on disk."""
        is_read = isinstance(self.pixels, PictureFiles) and not self.stays_on_disk
        return replace(self, pixels=self.pixels[:]) if is_read else self


@dataclass(frozen=True, eq=False)
class Splits:
    """The parts of a data set. A part that the data set lacks is None; no part is empty."""

    train: Images
    validation: Images | None
    test: Images | None
    classes: tuple[str, ...]  # C names; a label is an index into them
    validation_held_out: bool = False  # of the training part (data.validation_share)
    ignored: tuple[str, ...] = ()  # files that a system wrote among those of a folder

    def parts(self) -> dict[str, Images]:
        """Return the parts that exist, by name."""
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: images for name, images in named.items() if images is not None}

    def loaded(self, *names: str) -> Splits:
        """Return the splits with the named parts, or all, in memory. Raises DataError for an unreadable image."""
        parts = self.parts()
        loaded: dict[str, Any] = {name: parts[name].loaded() for name in names or parts if name in parts}
        return replace(self, **loaded)

    def counts(self) -> dict[str, int]:
        """Return the number of images of each part that exists."""
        return {name: len(images) for name, images in self.parts().items()}

    def fingerprint(self, *names: str) -> str:
        """Return a SHA-256, in hex, over class names, shapes, all labels and tracks, and the pixels of some images.

        It is of the named parts, or of all. Reads at most 128 evenly spaced images of each, so it can miss a change
        elsewhere.
        """
        digest = hashlib.sha256("\0".join(self.classes).encode())
        parts = self.parts()
        for name in names or parts:
            images = parts[name]
            digest.update(f"\0{name} {images.pixels.dtype} {images.pixels.shape}\0".encode())
            digest.update(np.ascontiguousarray(images.labels, "<i8").data)
            if images.tracks is not None:
                digest.update(np.ascontiguousarray(images.tracks, "<i8").data)
            sample = images.pixels[evenly_spaced(len(images), FINGERPRINT_IMAGES)]
            digest.update(np.ascontiguousarray(sample).tobytes())
        return digest.hexdigest()


def evenly_spaced(count: int, most: int) -> I64:
    """Return at most `most` of `count` rows, evenly spaced from the first to the last."""
    rows: I64 = np.unique(np.linspace(0, count - 1, min(most, count)).astype(np.int64))
    return rows


def expect_labels(labels: I64, classes: int, where: str | Path) -> None:
    """Raise DataError, naming the first label that is not a class."""
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if wrong.size:
        raise DataError(
            f"{where}: expected labels 0 to {classes - 1}, found {labels[wrong[0]]} at index {wrong[0]} "
            f"({wrong.size} such); correct the labels or name all classes"
        )


def expect_class_names(names: Iterable[str], where: str | Path) -> None:
    """Raise DataError for a name that would change the terminal, the page or the log line that shows it."""
    for name in filter(has_control_characters, names):
        raise DataError(
            f"{where}: expected names of classes without control characters, found {name!a}; rename the class"
        )


def data_root(data: DataSection) -> Path:
    """Return data.root. Raises DataError where it is not set, or does not exist and is not downloaded to."""
    images = "images" if data.name in ("folder", "npz") else f"{data.name} images"
    if data.root is None:
        raise DataError(f"data.root: expected the path of the {images}, found none (--set data.root=PATH)")
    if not data.root.exists() and not data.download:
        remedy = " or set data.download: true" if data.name in DOWNLOADABLE else ""
        raise DataError(f"data.root: {data.root} does not exist; set it to the path of the {images}{remedy}")
    return data.root


@contextlib.contextmanager
def reading(where: Path, expected: str, download: bool) -> Iterator[None]:
    """Raise any error of the block as one DataError that says what was expected."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # readers and downloads raise many kinds of errors on missing or broken files
        todo = (
            "download failed, so put them there" if download else "put them there or set data.download: true"
        )
        raise DataError(f"data.root: expected {expected} under {where}, found {error}; {todo}") from error
