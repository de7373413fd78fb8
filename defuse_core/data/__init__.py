"""Data sets -> Splits. Pixels stay uint8 (or on disk) and become float32 in [0, 1] one batch at a time."""

from defuse_core.data.datasets import check_class_names, open_splits, reopen_splits
from defuse_core.data.folder import log_parts, overlooked
from defuse_core.data.images import Images, PictureFiles, Splits

__all__ = [
    "Images",
    "PictureFiles",
    "Splits",
    "check_class_names",
    "log_parts",
    "open_splits",
    "overlooked",
    "reopen_splits",
]
