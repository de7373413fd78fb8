"""What the reader of a folder passes over, and its owner may think it reads."""

from __future__ import annotations

import logging
from pathlib import Path

from defuse_core.config import DataSection
from defuse_core.data.images import Splits

log = logging.getLogger("defuse")
OTHER_NAMES = {  # of parts, in other tools
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "training": "train",
    "testing": "test",
    "eval": "test",
}
BY_THE_SYSTEM = ("thumbs.db", "desktop.ini")  # files that Windows writes into folders of pictures


def log_parts(data: DataSection, splits: Splits) -> None:
    """Log the parts of the data set with their counts, and warn of folders that are not read."""
    counts = ", ".join(f"{count:,} {part}" for part, count in splits.counts().items())
    log.info("images: %s, of %d classes", counts, len(splits.classes))
    if data.name == "folder" and data.root is not None:
        for line in overlooked(data.root):
            log.warning("data.root %s: %s", data.root, line)


def overlooked(root: Path) -> list[str]:
    """Return one line for each folder beside `train` that looks like a part, and for files of the system."""
    lines = []
    for entry in sorted(root.iterdir()):
        wanted = OTHER_NAMES.get(entry.name.lower())
        if wanted and entry.is_dir() and not (root / wanted).exists():
            lines.append(f"{entry.name}/ is not read; rename it to {wanted}/ to use its images")
        elif wanted and entry.is_dir():
            lines.append(f"{entry.name}/ is not read, {wanted}/ is")
    ignored = [path for path in root.glob("*/*/*") if path.name.lower() in BY_THE_SYSTEM]
    if ignored:
        lines.append(f"{len(ignored)} files such as {ignored[0].relative_to(root)} are ignored")
    return lines
