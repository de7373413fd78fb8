"""Request bodies: decoding images and JSON into pixels. Image headers are checked before pixels are decoded."""

from __future__ import annotations

import io
import json
import sys
import warnings
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from PIL import Image, UnidentifiedImageError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from defuse_core.artifacts import F32
from defuse_core.config import RunFile, ServeSection
from defuse_core.data.images import fit_picture, keeps_colours
from defuse_core.formatting import count_of
from services.serving.limits import RejectedInput

IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
IMAGE_TYPES = ("image/png", "image/jpeg", "image/bmp", "image/webp", "application/octet-stream")
JSON_TYPE, FORM_TYPE = "application/json", "multipart/form-data"
MAX_JPEG_SCANS = 100  # a progressive JPEG has some 10; decoding takes time for each, however few bytes it has
# Of a PNG image, each of up to 1 MB once it is decompressed, of 1 KB; an ordinary one has a profile and a few texts.
MAX_PNG_TEXTS, PNG_TEXTS = 20, (b"iCCP", b"iTXt", b"zTXt")
REMEDY = "convert it, or serve with `serve.resize: true`, which converts it as in training"


@dataclass(frozen=True)
class InputSpec:
    """The images that a model version accepts."""

    channels: int
    size: int
    # images are fitted into the first size and padded to the second, their own, as MNIST's in training
    pad_to: tuple[int, int] | None
    resize: bool
    max_images: int
    max_pixels: int

    @classmethod
    def of(cls, spec: RunFile, section: ServeSection) -> InputSpec:
        data = spec.data
        pad_to = (28, 32) if data.name in ("mnist", "mnist-5000") and data.image_size == 32 else None
        return cls(
            data.channels, data.image_size, pad_to, section.resize, section.max_images, section.max_pixels
        )

    @property
    def sizes(self) -> set[tuple[int, int]]:
        """Width and height of the images that are accepted without resizing."""
        edges = {self.size} if self.pad_to is None else {self.size, self.pad_to[0]}
        return {(edge, edge) for edge in edges}

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size

    def __str__(self) -> str:
        sizes = " or ".join(f"{width}x{height}" for width, height in sorted(self.sizes, reverse=True))
        return f"{sizes} pixels in {'grey' if self.channels == 1 else 'colour'}"


def content_type(request: Request) -> str:
    """Return the media type, without parameters. Raises RejectedInput for an unsupported one and a compressed body."""
    found = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if found not in (*IMAGE_TYPES, JSON_TYPE, FORM_TYPE):
        supported = ", ".join((FORM_TYPE, JSON_TYPE, *IMAGE_TYPES))
        raise RejectedInput(
            415, f"the content type {found[:60] or '(none)'} is not supported; send one of {supported}"
        )
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise RejectedInput(
            415,
            f"the content encoding {encoding[:60]} is not supported; send the body without compressing it",
        )
    return found


class _FormParser(MultiPartParser):
    """Knows whether the closing boundary was read: without it, the parser leaves out the last part without an error.

    Keeps all files in memory, as the body is: a full disk fails no request, and no picture is written to a disk.
    """

    spool_max_size = sys.maxsize
    is_complete = False

    def on_end(self) -> None:
        self.is_complete = True


async def uploaded_files(request: Request, body: bytes, max_images: int) -> list[bytes]:
    """Return the files of a multipart body. Raises RejectedInput for a broken one, or one with other fields."""

    async def chunks() -> AsyncGenerator[bytes]:
        yield body

    parser = _FormParser(
        request.headers, chunks(), max_files=max_images + 1, max_fields=8, max_part_size=len(body) + 1
    )
    try:
        form = await parser.parse()
        try:
            if not parser.is_complete:
                raise RejectedInput(400, "the multipart body is broken")
            return [await _read_part(name, part) for name, part in form.multi_items()]
        finally:
            await form.close()
    except MultiPartException as error:
        if "Too many files" in error.message:
            raise RejectedInput(413, f"the request holds more than {count_of(max_images, 'image')}") from None
        raise RejectedInput(400, "the multipart body is broken") from None
    except UnicodeError:  # of a charset such as punycode; bytes that are no UTF-8 raise none
        raise RejectedInput(400, "the names of the multipart body are not in its charset") from None


async def _read_part(name: str, part: UploadFile | str) -> bytes:
    if name == "image" and not isinstance(part, UploadFile):
        raise RejectedInput(
            422, "the field image has no file name; send it as a file (with curl: -F image=@FILE)"
        )
    if name != "image" or not isinstance(part, UploadFile):
        raise RejectedInput(
            422, f"unknown field {name[:40]!r}; send every image as a file in the field image"
        )
    return await part.read()


def decode_body(media_type: str, parts: list[bytes], input_spec: InputSpec) -> F32:
    """Return the pixels (n, channels, H, W) in the parts of a body. Raises RejectedInput."""
    return decode_json(parts[0], input_spec) if media_type == JSON_TYPE else decode_images(parts, input_spec)


def decode_images(files: list[bytes], input_spec: InputSpec) -> F32:
    """Return (n, channels, H, W) in [0, 1] from image files. Raises RejectedInput for the first unusable one."""
    if not files:
        raise RejectedInput(422, "the request holds no image")
    if len(files) > input_spec.max_images:
        raise _too_many_images(len(files), input_spec)
    pixels = np.empty((len(files), *input_spec.shape), np.float32)
    budget = input_spec.max_pixels  # pixels that may still be decoded for this request
    for row, data in enumerate(files):
        try:
            pixels[row], decoded = _decode_image(data, input_spec, budget)
        except RejectedInput as rejected:
            if len(files) > 1:
                rejected.detail = f"image {row + 1}: {rejected.detail}"
            raise
        budget -= decoded
    return pixels


def _too_many_images(count: int, input_spec: InputSpec) -> RejectedInput:
    return RejectedInput(413, f"the request holds {count} images, the limit is {input_spec.max_images}")


def _decode_image(data: bytes, input_spec: InputSpec, budget: int) -> tuple[F32, int]:
    """Return the pixels, and how many pixels the file holds. Raises RejectedInput."""
    if not data:
        raise RejectedInput(422, "the image is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings concern metadata; broken pixels raise errors
            _check_texts(data)
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                _check_size(image, input_spec, budget)
                _check_scans(data)
                _check_mode(image, input_spec)
                return _fit(image, input_spec), image.width * image.height
    except (RejectedInput, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise RejectedInput(413, "the image is too large to decode") from None
    except UnidentifiedImageError:
        raise RejectedInput(
            400, "expected an image in PNG, JPEG, BMP or WebP format, found other bytes"
        ) from None
    except Exception:  # decoders raise a dozen kinds of errors on broken files
        raise RejectedInput(400, "this image file is broken") from None


def _check_size(image: Image.Image, input_spec: InputSpec, budget: int) -> None:
    """Check the size in the header; no pixel is decoded yet."""
    width, height = image.size
    if width * height > input_spec.max_pixels:
        raise RejectedInput(
            413, f"the image has {width}x{height} pixels, the limit is {input_spec.max_pixels}"
        )
    if width * height > budget:
        raise RejectedInput(
            413, f"the images of this request have more than {input_spec.max_pixels} pixels together"
        )
    if not input_spec.resize and image.size not in input_spec.sizes:
        raise RejectedInput(422, f"the image has {width}x{height} pixels, expected {input_spec}; {REMEDY}")


def _check_mode(image: Image.Image, input_spec: InputSpec) -> None:
    """Check that no colour is lost."""
    if input_spec.resize:
        return
    if "transparency" in image.info:
        raise RejectedInput(
            422, f"the image has transparency (tRNS), expected {input_spec} without; {REMEDY}"
        )
    if not keeps_colours(image, input_spec.channels):
        raise RejectedInput(422, f"the image has colour mode {image.mode}, expected {input_spec}; {REMEDY}")


def _check_texts(data: bytes) -> None:
    """Check the texts and profiles of a PNG image, which are decompressed with its header."""
    if data.startswith(b"\x89PNG") and sum(map(data.count, PNG_TEXTS)) > MAX_PNG_TEXTS:
        raise RejectedInput(422, f"the PNG image has more than {MAX_PNG_TEXTS} compressed texts or profiles")


def _check_scans(data: bytes) -> None:
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MAX_JPEG_SCANS:  # starts of scans
        raise RejectedInput(422, f"the JPEG image has more than {MAX_JPEG_SCANS} scans")


def _fit(image: Image.Image, input_spec: InputSpec) -> F32:
    fitted = np.zeros(input_spec.shape, np.float32)
    border = 0
    if input_spec.pad_to and image.size != (input_spec.size, input_spec.size):
        border = (input_spec.pad_to[1] - input_spec.pad_to[0]) // 2
    inner = slice(border, input_spec.size - border)
    fitted[:, inner, inner] = fit_picture(image, input_spec.channels, input_spec.size - 2 * border)
    fitted /= 255
    return fitted


def decode_json(body: bytes, input_spec: InputSpec) -> F32:
    """Return (n, channels, H, W) from {"pixels": ...}: one image or a list of images, numbers from 0 to 1.

    Raises RejectedInput for anything else.
    """
    tree = _parse_json(body)
    if not isinstance(tree, dict):
        raise RejectedInput(422, 'expected a JSON object such as {"pixels": [...]}')
    if unknown := sorted(tree.keys() - {"pixels"}):
        raise RejectedInput(422, f"unknown field {unknown[0][:40]!r}; the only field is pixels")
    if "pixels" not in tree:
        raise RejectedInput(422, "the field pixels is missing")
    _check_numbers_only(body)
    return _to_images(_to_numbers(tree["pixels"]), input_spec)


def _parse_json(body: bytes) -> Any:
    def reject_constant(constant: str) -> NoReturn:
        raise RejectedInput(422, f"pixels: expected numbers from 0 to 1, found {constant}")

    try:
        return json.loads(body, parse_constant=reject_constant)
    except (ValueError, RecursionError):
        raise RejectedInput(400, "the body is not JSON") from None


def _check_numbers_only(body: bytes) -> None:
    """Raise RejectedInput where `body`, {"pixels": ...}, holds a string, true or false beside numbers.

    Beside one string, NumPy makes strings of that length of all numbers: 32 KB of JSON would take 500 MB. Of true and
    false it makes numbers.
    """
    # letters of true and false that neither numbers nor the key contain
    if body.count(b'"') > 2 or b"r" in body or b"f" in body:
        raise RejectedInput(422, "pixels: expected numbers from 0 to 1, found something else among them")


def _to_numbers(pixels: Any) -> F32:
    if not isinstance(pixels, list):
        raise RejectedInput(422, "pixels: expected a list of rows of numbers")
    try:
        array = np.array(pixels)
    except (ValueError, OverflowError, RecursionError):
        raise RejectedInput(422, "pixels: expected rows of equal length") from None
    if array.dtype.kind not in "iuf" or not array.size:
        raise RejectedInput(422, "pixels: expected numbers from 0 to 1")
    if not (array.min() >= 0 and array.max() <= 1):  # also false for NaN
        raise RejectedInput(422, "pixels: expected numbers from 0 to 1 (divide 8-bit values by 255)")
    return array.astype(np.float32)


def _to_images(array: F32, input_spec: InputSpec) -> F32:
    channels, size, _ = input_spec.shape
    if array.shape == (size, size) and channels == 1:
        array = array[None, None]
    elif array.shape == input_spec.shape:
        array = array[None]
    if array.shape[1:] != input_spec.shape:
        found = "x".join(str(length) for length in array.shape)
        raise RejectedInput(
            422, f"pixels: found {found} numbers, expected {channels}x{size}x{size} or a list of such images"
        )
    if len(array) > input_spec.max_images:
        raise _too_many_images(len(array), input_spec)
    return array
