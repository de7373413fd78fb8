"""Data sets -> Splits. Pixels stay uint8 (or on disk) and become float32 in [0, 1] one batch at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from defuse_core.config import WITHOUT_ROOT, DataSection, RunFile
from defuse_core.data.benchmarks import open_digits, open_mnist, open_mnist_5000, open_signs, open_svhn
from defuse_core.data.folder import folder_classes, log_parts, open_folder, overlooked
from defuse_core.data.images import Images, PictureFiles, Splits, data_root, read_each, read_picture
from defuse_core.data.npz import npz_classes, open_npz
from defuse_core.errors import DataError, RunMismatchError
from defuse_core.files import OPENED_AHEAD, map_ahead

# An opener reads what is below `data_root(data)`, and raises DataError that names the file. Its Splits have pixels of
# data.channels and data.image_size, in memory or as PictureFiles. It checks labels with `expect_labels`, numbers tracks
# with `track_numbers`, and ends in `divided`, which applies data.validation_share and data.train_images. Another one
# needs its name in DataSection.name, in WITHOUT_ROOT or DOWNLOADABLE if it is so, and in
# services.serving.inputs.InputSpec.of if it pads images. Images in a format of your own need no opener: write an .npz,
# or call defuse.debug.
OPENERS = {
    "digits": open_digits,
    "mnist": open_mnist,
    "mnist-5000": open_mnist_5000,
    "signs": open_signs,
    "svhn": open_svhn,
    "folder": open_folder,
    "npz": open_npz,
}
PNG_ENDS = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"
JPEG_ENDS = b"\xff\xd8\xff", b"\xff\xd9"


def open_splits(data: DataSection, seed: int) -> Splits:
    """Return the parts of the data set that `data` names. Equal arguments on equal files give equal Splits.

    Validation and test parts are those of the data set. Where it has no validation part, data.validation_share of the
    training images is held out; data.train_images of the others are drawn. Raises DataError.
    """
    with os_errors_as_data_errors(data.root):
        return OPENERS[data.name](data, seed)


@contextlib.contextmanager
def os_errors_as_data_errors(root: Path | None) -> Iterator[None]:
    """Raise an OSError of the block as a DataError that names the file, or else `root`."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"data.root: cannot read {error.filename or root} ({error.strerror or error})"
        ) from error


def expect_root(data: DataSection) -> None:
    """Raise DataError where data.root cannot be read on this machine, for a data set that is read from there."""
    if data.name not in WITHOUT_ROOT:
        with os_errors_as_data_errors(data.root):
            data_root(data)


def check_class_names(data: DataSection) -> None:
    """Raise DataError for names of classes that are not usable, without reading an image.

    For the moment at which a run file is read: images that are not on this machine are not asked about.
    """
    with contextlib.suppress(OSError):  # open_splits reports it, on the machine that reads the images
        if data.root is None or not data.root.exists():
            return
        if data.name == "folder":
            folder_classes(data.root / "train")
        elif data.name == "npz":
            npz_classes(data.root)


def reopen_splits(spec: RunFile, fingerprint: str) -> Splits:
    """Return the Splits that a run was trained on. Raises RunMismatchError if the images have changed since."""
    try:
        splits = open_splits(spec.data, spec.seed)
    except DataError as error:
        root = spec.data.root
        if root is None or os.path.exists(root):  # noqa: PTH110 - Path.exists raises where a folder cannot be read
            raise
        raise DataError(
            f"{error}. A run records another place by `defuse run RUNFILE --name RUN --set data.root=PATH`"
        ) from error
    if splits.fingerprint() != fingerprint:
        raise RunMismatchError(
            f"data.root {spec.data.root}: the images differ from those that the run was trained on; "
            "restore them, or start a new run"
        )
    return splits


def expect_whole_files(splits: Splits, share: slice = slice(None)) -> None:
    """Raise DataError for validation and test images that cannot be read, which a training may read hours later.

    Of each part that is not in memory, the rows of `share` are looked at.
    Files with both ends of a PNG or a JPEG are not decoded, so one that is damaged inside passes. A million of them
    take half a minute on a disk.
    """
    for images in (splits.validation, splits.test):
        if images is not None and isinstance(images.pixels, PictureFiles):
            _read_unless_whole(images.pixels.at(share))


def _read_unless_whole(files: PictureFiles) -> None:
    _, channels, size, _ = files.shape
    whole = map_ahead(_has_both_ends, files.paths, OPENED_AHEAD)
    for _ in read_each(files.paths, lambda path: next(whole) or read_picture(path, channels, size)):
        pass


def _has_both_ends(path: str) -> bool:
    """Whether a file begins and ends as a PNG or a JPEG; not where it cannot be read."""
    try:
        if not Path(path).is_file():
            return False
        with Path(path).open("rb") as file:
            begin = file.read(len(PNG_ENDS[0]))
            file.seek(-len(PNG_ENDS[1]), os.SEEK_END)
            end = file.read()
    except OSError:
        return False
    return any(begin.startswith(first) and end.endswith(last) for first, last in (PNG_ENDS, JPEG_ENDS))
