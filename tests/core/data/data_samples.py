"""What the tests of the data sets share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from defuse_core.config import DataSection
from defuse_core.data import Images, open_splits
from defuse_core.errors import DataError

SIZE = 8
REAL_DATA = Path(__file__).parents[4] / "shared" / "data"

Arrays = dict[str, Any]


def section(name: str, root: Path | None = None, **fields: Any) -> DataSection:
    return DataSection.model_validate({"name": name, "root": root, "image_size": SIZE, **fields})


def noise(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (count, *shape), dtype=np.uint8)


def error_of(data: DataSection) -> str:
    with pytest.raises(DataError) as caught:
        open_splits(data, 0).loaded()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def save_picture(path: Path, pixels: np.ndarray) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return str(path)


def numbered(count: int, classes: int = 2) -> Images:
    """Image i has pixels that say i, and label i modulo classes."""
    pixels = np.arange(count, dtype=np.float32)[:, None, None, None] / np.float32(1000)
    return Images(pixels, np.arange(count, dtype=np.int64) % classes)


def ids(images: Images | None) -> list[int]:
    assert images is not None
    return np.round(images.batch(slice(None))[:, 0, 0, 0] * 1000).astype(int).tolist()
