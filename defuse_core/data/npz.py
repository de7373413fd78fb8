"""An .npz file with train_images, train_labels, and optional train_tracks, validation_*, test_* and classes."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from defuse_core.artifacts import F32, I64, U8
from defuse_core.config import DataSection
from defuse_core.data.folder import part_of
from defuse_core.data.images import Images, Splits, data_root, expect_class_names, expect_labels
from defuse_core.data.splits import divided, track_numbers
from defuse_core.errors import DataError
from defuse_core.files import is_special_file
from defuse_core.formatting import first_few

PARTS = ("train", "validation", "test")
NAMES = {f"{part}_{kind}" for part in PARTS for kind in ("images", "labels", "tracks")} | {"classes"}
CHUNK = 4096  # images checked at once, to bound the memory
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others can make gigabytes of a kilobyte
OVERSHOOT = 1e-5  # how far outside [0, 1] a float pixel may be: resizing in floats rounds

Arrays = dict[str, npt.NDArray[Any]]


def open_npz(data: DataSection, seed: int) -> Splits:
    """Return the images of the file data.root.

    Images are uint8, or floats in [0, 1], of shape (N, H, W), (N, H, W, c) or (N, c, H, W), with H and W equal to
    data.image_size. Grey ones are allowed with data.channels: 3. Tracks are integers or texts (N,), equal for images of
    one object. Without `classes` the class names are the labels, and train_labels must contain each. Raises DataError
    naming the file and the array.
    """
    file = data_root(data)
    return splits_of(read_arrays(file), data, seed, str(file))


def splits_of(arrays: Arrays, data: DataSection, seed: int, where: str) -> Splits:
    """Return the parts in arrays named as in an .npz file. Raises DataError naming `where` and the array."""
    train = _part(arrays, "train", data, where)
    if train is None:
        raise DataError(
            f"{where}: expected arrays train_images and train_labels, found {_listed(arrays)}; add them"
        )
    classes = _names(arrays["classes"], where) if "classes" in arrays else _numbers(train.labels, where)
    validation, test = (_part(arrays, part, data, where) for part in ("validation", "test"))
    splits = Splits(train, validation, test, classes)
    for part, images in splits.parts().items():
        expect_labels(images.labels, len(classes), f"{where}: {part}_labels")
    return divided(splits, data, seed)


def npz_classes(file: Path) -> tuple[str, ...] | None:
    """Return the class names in the file, None where it has none. Reads no image. Raises DataError."""
    found = read_arrays(file, {"classes"})
    return _names(found["classes"], str(file)) if found else None


def rows_in_file(data: DataSection, seed: int) -> dict[str, I64]:
    """Return for parts train and validation, as open_npz gives them, the row of each image in the file's own arrays.

    Held out images have their rows in train_images.
    """
    arrays = read_arrays(data_root(data))

    def numbered(part: str) -> Images:
        """Return an image for each label, whose pixels are the bytes of its row number."""
        labels = arrays[f"{part}_labels"].astype(np.int64)
        rows = np.arange(len(labels), dtype=np.int64).view(np.uint8).reshape(-1, 1, 1, 8)
        return Images(rows, labels, _tracks(arrays, part, len(labels), str(data.root)))

    validation = numbered("validation") if "validation_labels" in arrays else None
    splits = divided(Splits(numbered("train"), validation, None, ()), data, seed)
    return {
        part: images.pixels[:].reshape(-1, 8).view(np.int64)[:, 0] for part, images in splits.parts().items()
    }


def read_arrays(file: Path, wanted: set[str] = NAMES) -> Arrays:
    """Return those of the wanted arrays that are in the file. Nothing is unpickled. Raises DataError.

    A named pipe, which would be waited for without end, is not opened.
    """
    if is_special_file(file):
        raise DataError(f"{file}: expected an .npz file, found a pipe, a device or a socket; check data.root")
    try:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("a single array")
        with archive:
            if any(part.compress_type not in COMPRESSIONS for part in archive.zip.infolist()):
                raise ValueError("a compression that numpy does not write")
            return {name: column(name, archive[name]) for name in archive.files if name in wanted}
    except (PermissionError, IsADirectoryError) as error:
        raise DataError(
            f"{file}: expected a readable .npz file ({error.strerror}); check data.root"
        ) from error
    except Exception as error:  # zipfile, zlib and numpy raise many kinds of errors on broken files
        found = "pickled objects, or no .npz file at all" if "allow_pickle" in str(error) else error
        raise DataError(
            f"{file}: expected an .npz file of plain arrays, found {found}; save it again"
        ) from error


def column(name: str, found: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return labels and tracks of shape (N, 1), as MedMNIST has them, as (N,), and any other array as it is.

    Raises an error for what is no array, or holds no text that can be shown.
    """
    if not isinstance(found, np.ndarray) or not found.itemsize:
        raise ValueError(f"no array of values in {name}")
    if name == "classes":
        found.tolist()  # raises for letters that do not exist
    is_column = name.endswith(("_labels", "_tracks")) and found.ndim == 2 and found.shape[1] == 1
    return found.reshape(-1) if is_column else found


def expect_grey_or_rgb(where: str, images: object) -> None:
    """Raise DataError for a list with pictures of Pillow whose numbers are of a palette or of another colour space."""
    listed = images if isinstance(images, list | tuple) else []
    modes = {each.mode for each in listed if isinstance(each, Image.Image)}
    odd = [mode for mode in sorted(modes) if mode not in ("L", "RGB", "F") and not mode.startswith("I")]
    if odd:
        raise DataError(
            f"{where}: expected pictures of mode L or RGB, found {first_few(odd)}; convert them with "
            ".convert('RGB')"
        )


def unread_arrays(file: Path) -> list[str]:
    """Return lines where a readable .npz file has arrays with names that are not read."""
    with np.load(file, allow_pickle=False) as archive:
        files = set(archive.files)
    unread = sorted(files - NAMES)
    if not unread:
        return []
    named = first_few([ascii(name) for name in unread])
    lines = [f"arrays that are not read: {named}; names that are read: {', '.join(sorted(NAMES))}"]
    for name in unread:
        part, _, kind = name.partition("_")
        wanted = f"{part_of(part)}_{kind}"
        if wanted in NAMES - files:
            lines.append(f"{name!a} is not read; rename it to {wanted} to use it")
    return lines


def _numbers(labels: I64, where: str) -> tuple[str, ...]:
    """Return the labels as class names. Raises DataError where they have gaps."""
    found = np.unique(labels)
    if len(found) < 2 or not np.array_equal(found, np.arange(len(found))):
        raise DataError(
            f"{where}: train_labels: expected two or more classes 0, 1, 2, ... without gaps, "
            f"found {len(found)} different labels, {found[0]} to {found[-1]}; correct them or add `classes`"
        )
    return tuple(str(label) for label in found)


def _names(names: npt.NDArray[Any], where: str) -> tuple[str, ...]:
    if names.ndim != 1 or names.dtype.kind != "U" or len(names) < 2:
        raise DataError(
            f"{where}: classes: expected two or more different names, as text, "
            f"found {names.dtype} {names.shape}; save numpy.array of a list of names"
        )
    different, counts = np.unique(names, return_counts=True)
    if counts.max() > 1:
        raise DataError(
            f"{where}: classes: expected different names, found {str(different[counts.argmax()])!r} {counts.max()} "
            "times; give each class a name of its own"
        )
    expect_class_names(names.tolist(), f"{where}: classes")
    return tuple(names.tolist())


def _part(arrays: Arrays, part: str, data: DataSection, where: str) -> Images | None:
    if not {f"{part}_images", f"{part}_labels", f"{part}_tracks"} & set(arrays):
        return None
    for name in (f"{part}_images", f"{part}_labels"):
        if name not in arrays:
            raise DataError(f"{where}: expected an array {name}, found {_listed(arrays)}; add it")
        if arrays[name].shape[:1] == (0,):
            remedy = "add images" if part == "train" else "add images, or leave out both arrays of this part"
            raise DataError(f"{where}: {name}: expected one or more, found an empty array; {remedy}")
    labels = _labels(arrays, part, where)
    pixels = _pixels(arrays[f"{part}_images"], data, f"{where}: {part}_images")
    if len(pixels) != len(labels):
        raise DataError(
            f"{where}: expected as many {part}_labels as {part}_images, "
            f"found {len(labels)} and {len(pixels)}; correct them"
        )
    return Images(pixels, labels, _tracks(arrays, part, len(labels), where))


def _tracks(arrays: Arrays, part: str, count: int, where: str) -> I64 | None:
    """Return the track of each image, (N,), None where the part has none; they are integers or texts in the file."""
    tracks = arrays.get(f"{part}_tracks")
    if tracks is None:
        return None
    if tracks.shape != (count,) or tracks.dtype.kind not in "iuU":
        odd = [each for each in tracks.flat if not isinstance(each, str)] if tracks.dtype == object else []
        raise DataError(
            f"{where}: {part}_tracks: expected {count} integers or texts, the object that each image shows, found "
            f"{tracks.dtype} {tracks.shape}{f' with {odd[0]!r}' if odd else ''}; correct them"
        )
    return track_numbers(tracks)


def _labels(arrays: Arrays, part: str, where: str) -> I64:
    """Return (N,)."""
    labels = arrays[f"{part}_labels"]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(
            f"{where}: {part}_labels: expected integers (N,), one for each image, "
            f"found {labels.dtype} {labels.shape}; correct them"
        )
    return labels.astype(np.int64)


def _pixels(found: npt.NDArray[Any], data: DataSection, where: str) -> U8 | F32:
    """Return (N, channels, H, W); a read-only view where possible."""
    size = data.image_size
    pixels = _channels_first(found)
    if pixels is not None and pixels.shape[2] != pixels.shape[3]:
        height, width = pixels.shape[2:]
        raise DataError(
            f"{where}: expected square images, found {width}x{height} pixels; pad or resize them (in a folder of "
            "images they would be stretched)"
        )
    if pixels is None or pixels.shape[2:] != (size, size):
        raise DataError(
            f"{where}: expected shape (N, {size}, {size}), (N, {size}, {size}, {data.channels}) or "
            f"(N, {data.channels}, {size}, {size}), found {found.shape}; resize them or set data.image_size"
        )
    if pixels.shape[1] not in (1, data.channels):
        raise DataError(
            f"{where}: expected {data.channels} channels, found {pixels.shape[1]}; set data.channels"
        )
    if pixels.dtype.kind == "f":
        pixels = _fractions(pixels, where)
    elif pixels.dtype != np.uint8:
        raise DataError(f"{where}: expected uint8, or floats in [0, 1], found {found.dtype}; convert them")
    return np.broadcast_to(pixels, (len(pixels), data.channels, size, size))


def _channels_first(pixels: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
    """Return a view (N, c, H, W) with c 1 or 3, or None where `pixels` has no such shape."""
    if pixels.ndim == 3:
        return pixels[:, None]
    if pixels.ndim == 4 and pixels.shape[3] in (1, 3):
        return pixels.transpose(0, 3, 1, 2)
    return pixels if pixels.ndim == 4 and pixels.shape[1] in (1, 3) else None


def image_shape(array: npt.NDArray[Any]) -> tuple[int, int, int] | None:
    """Return (height, width, channels) of images (N, H, W), (N, H, W, c) or (N, c, H, W); None for another shape."""
    images = _channels_first(array)
    return None if images is None else (images.shape[2], images.shape[3], images.shape[1])


def _fractions(pixels: npt.NDArray[Any], where: str) -> F32:
    """Return pixels in [0, 1]; those just beyond, as a resize rounds them, are clipped.

    Raises DataError, naming the first image with another pixel.
    """
    is_beyond = False
    for start in range(0, len(pixels), CHUNK):
        chunk = pixels[start : start + CHUNK]
        low, high = chunk.min(axis=(1, 2, 3)), chunk.max(axis=(1, 2, 3))
        wrong = ~((low >= -OVERSHOOT) & (high <= 1 + OVERSHOOT))  # NaN fails both comparisons
        is_beyond = is_beyond or bool((low < 0).any() or (high > 1).any())
        if wrong.any():
            image = int(np.flatnonzero(wrong)[0])
            values = f"{low[image]:.6g} to {high[image]:.6g}"
            found = "NaN" if "nan" in values else f"values from {values}"
            remedy = "scale them to [0, 1] or save uint8"
            if low[image] < 0:  # scaled by their extremes they would be other images to the classifier
                remedy = "undo a normalisation (x * sd + mean) and let the classifier do it, or save uint8"
            raise DataError(
                f"{where}: expected floats in [0, 1], found {found} in image {start + image}; {remedy}"
            )
    fractions = pixels.astype(np.float32, copy=False)
    return fractions.clip(0, 1) if is_beyond else fractions


def _listed(arrays: Arrays) -> str:
    return ", ".join(sorted(arrays)) or "no array with a known name"
