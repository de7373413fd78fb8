"""From the body of a request to pixels. Everything here is refused in one sentence before it can cost much."""

from __future__ import annotations

import io
import json
import warnings
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from PIL import Image, UnidentifiedImageError

from defuse_core.artifacts import F32
from defuse_core.config import RunFile, ServeSection
from defuse_core.data.images import fit_picture

FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
PLAIN_MODES = {1: ("1", "L"), 3: ("RGB", "P")}  # colour modes that need no conversion that loses something


class Refused(Exception):  # noqa: N818 - the client's error, answered with its status and sentence
    """A request that is answered with `status` and one sentence."""

    def __init__(self, status: int, sentence: str, retry_after_s: int | None = None) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.retry_after_s = status, sentence, retry_after_s


@dataclass(frozen=True)
class Expected:
    """What the images of a request must be like."""

    channels: int
    size: int
    pad_to: tuple[int, int] | None  # pictures of the first size are padded to the second, as MNIST's were
    resize: bool
    max_images: int
    max_pixels: int

    @classmethod
    def of(cls, spec: RunFile, settings: ServeSection) -> Expected:
        pad = (28, 32) if spec.data.name == "mnist" and spec.data.image_size == 32 else None
        data = spec.data
        return cls(
            data.channels, data.image_size, pad, settings.resize, settings.max_images, settings.max_pixels
        )

    @property
    def sizes(self) -> set[tuple[int, int]]:
        """Width and height of the pictures that are taken without being resized."""
        edges = {self.size} if self.pad_to is None else {self.size, self.pad_to[0]}
        return {(edge, edge) for edge in edges}

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size

    def __str__(self) -> str:
        return f"{self.size}x{self.size} pixels in {'grey' if self.channels == 1 else 'colour'}"


def read_pictures(files: list[bytes], expected: Expected) -> F32:
    """Return (n, channels, H, W) in [0, 1] from image files. Raises Refused for the first that is not usable."""
    if not files:
        raise Refused(422, "the request holds no image")
    if len(files) > expected.max_images:
        raise Refused(
            413, f"the request holds {len(files)} images, at most {expected.max_images} are taken at once"
        )
    pixels = np.empty((len(files), *expected.shape), np.float32)
    left = expected.max_pixels  # to decode, for all of them together
    for row, data in enumerate(files):
        pixels[row], decoded = _picture(data, expected, f"image {row + 1}: " if len(files) > 1 else "", left)
        left -= decoded
    return pixels


def _picture(data: bytes, expected: Expected, which: str, left: int) -> tuple[F32, int]:
    """Return the pixels, and how many the file held. Raises Refused."""
    if not data:
        raise Refused(422, f"{which}the image is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata; broken pixels are errors
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                _expect_size(picture, expected, which, left)
                _expect_mode(picture, expected, which)
                return _fitted(picture, expected), picture.width * picture.height
    except Refused:
        raise
    except Image.DecompressionBombError:
        raise Refused(413, f"{which}the picture is too large to decode") from None
    except UnidentifiedImageError:
        raise Refused(400, f"{which}this is not an image in PNG, JPEG, BMP or WebP format") from None
    except Exception:  # decoders raise a dozen kinds of errors on broken files
        raise Refused(400, f"{which}this image file is broken") from None


def _expect_size(picture: Image.Image, expected: Expected, which: str, left: int) -> None:
    """The size comes from the header: nothing is decoded yet."""
    width, height = picture.size
    if width * height > expected.max_pixels:
        limit = expected.max_pixels
        raise Refused(
            413, f"{which}the picture has {width}x{height} pixels, more than {limit} are not decoded"
        )
    if width * height > left:
        raise Refused(
            413, f"{which}with it the request holds more than {expected.max_pixels} pixels to decode"
        )
    if not expected.resize and picture.size not in expected.sizes:
        raise Refused(422, f"{which}the picture has {width}x{height} pixels, expected {expected}")


def _expect_mode(picture: Image.Image, expected: Expected, which: str) -> None:
    plain = picture.mode in PLAIN_MODES[expected.channels] and "transparency" not in picture.info
    if not expected.resize and not plain:
        raise Refused(422, f"{which}the picture is of colour mode {picture.mode}, expected {expected}")


def _fitted(picture: Image.Image, expected: Expected) -> F32:
    fitted = np.zeros(expected.shape, np.float32)
    edge = 0
    if expected.pad_to and picture.size == (expected.pad_to[0],) * 2:
        edge = (expected.pad_to[1] - expected.pad_to[0]) // 2
    inner = slice(edge, expected.size - edge)
    fitted[:, inner, inner] = fit_picture(picture, expected.channels, expected.size - 2 * edge)
    fitted /= 255
    return fitted


def read_json(body: bytes, expected: Expected) -> F32:
    """Return (n, channels, H, W) from {"pixels": ...}: one image or a list of them, numbers from 0 to 1.

    Raises Refused for anything else.
    """
    tree = _parsed(body)
    if not isinstance(tree, dict):
        raise Refused(422, 'expected a JSON object such as {"pixels": [...]}')
    if unknown := sorted(tree.keys() - {"pixels"}):
        raise Refused(422, f"there is no field {unknown[0][:40]!r}, only pixels")
    if "pixels" not in tree:
        raise Refused(422, "the field pixels is missing")
    return _shaped(_numbers(tree["pixels"]), expected)


def _parsed(body: bytes) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise Refused(422, f"pixels: expected numbers from 0 to 1, found {constant}")

    try:
        return json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON") from None


def _numbers(pixels: Any) -> F32:
    if not isinstance(pixels, list):
        raise Refused(422, "pixels: expected a list of rows of numbers")
    try:
        array = np.array(pixels)
    except (ValueError, OverflowError, RecursionError):
        raise Refused(422, "pixels: expected rows of equal length") from None
    if array.dtype.kind not in "iuf" or not array.size:
        raise Refused(422, "pixels: expected numbers from 0 to 1")
    if not (array.min() >= 0 and array.max() <= 1):  # false for NaN, too
        raise Refused(422, "pixels: expected numbers from 0 to 1 (divide 8-bit values by 255)")
    return array.astype(np.float32)


def _shaped(array: F32, expected: Expected) -> F32:
    channels, size, _ = expected.shape
    if array.shape == (size, size) and channels == 1:
        array = array[None, None]
    elif array.shape == expected.shape:
        array = array[None]
    if array.shape[1:] != expected.shape:
        found = "x".join(str(length) for length in array.shape)
        raise Refused(
            422, f"pixels: found {found} numbers, expected {channels}x{size}x{size}, or several such"
        )
    if len(array) > expected.max_images:
        raise Refused(
            413, f"the request holds {len(array)} images, at most {expected.max_images} are taken at once"
        )
    return array
