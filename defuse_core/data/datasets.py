"""Open the data set that a run file names."""

from __future__ import annotations

from defuse_core.config import DataSection
from defuse_core.data.digits import open_digits, open_mnist, open_mnist_5000, open_svhn
from defuse_core.data.folder import open_folder
from defuse_core.data.gtsrb import open_signs
from defuse_core.data.images import Splits
from defuse_core.data.npz import open_npz
from defuse_core.errors import DataError, RunMismatchError

OPENERS = {
    "digits": open_digits,
    "mnist": open_mnist,
    "mnist-5000": open_mnist_5000,
    "signs": open_signs,
    "svhn": open_svhn,
    "folder": open_folder,
    "npz": open_npz,
}


def open_splits(data: DataSection, seed: int) -> Splits:
    """Return the parts of the data set that `data` names. Equal arguments on equal files give equal Splits.

    Validation and test parts are those of the data set. Where it has no validation part, data.validation_share of the
    training images is held out; data.train_images of the others are drawn. Raises DataError.
    """
    try:
        return OPENERS[data.name](data, seed)
    except OSError as error:
        raise DataError(
            f"data.root: cannot read {error.filename or data.root} ({error.strerror or error})"
        ) from error


def reopen_splits(data: DataSection, seed: int, fingerprint: str) -> Splits:
    """Return the Splits that a run was trained on. Raises RunMismatchError if the images have changed since."""
    splits = open_splits(data, seed)
    if splits.fingerprint() != fingerprint:
        raise RunMismatchError(
            f"data.root {data.root}: the images differ from those that the run was trained on; "
            "restore them, or start a new run"
        )
    return splits
