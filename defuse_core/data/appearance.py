"""What is odd about pictures that were read without an error: too dark, all the same, transparent."""

from __future__ import annotations

import numpy as np
from PIL import Image

from defuse_core.data.images import FINGERPRINT_IMAGES, Images, PictureFiles, evenly_spaced

DARK = 1 / 8  # of the range; 12 bits in a file of 16 bits end at 1/16
WITH_ALPHA = ("RGBA", "RGBa", "LA", "La", "PA")
MOST = 0.75  # share of the images looked at from which they are odd


def odd_images(images: Images) -> list[str]:
    """Return a line for each oddity of a sample: dark images, equal ones, and transparency, which is not read."""
    rows = evenly_spaced(len(images), FINGERPRINT_IMAGES)
    pixels = images.batch(rows).reshape(len(rows), -1)
    looked_at = f"of {len(rows)} training images looked at"
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
        transparent = sum(map(_is_partly_transparent, images.pixels.at(rows).paths))
        if transparent:
            lines.append(
                f"{transparent} {looked_at} have transparency, which is dropped: the colours below it are used; "
                "flatten the files where it is what shows the object"
            )
    return lines


def _is_partly_transparent(path: str) -> bool:
    """Whether the pixels of a file differ in their transparency."""
    with Image.open(path) as picture:
        if picture.mode not in WITH_ALPHA and "transparency" not in picture.info:
            return False
        low, high = picture.convert("RGBA").getchannel("A").getextrema()
    return low != high
