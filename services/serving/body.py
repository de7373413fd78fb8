"""Reading a request's body, within its limits of size and time, and telling what it holds."""

from __future__ import annotations

import asyncio

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from defuse_core.artifacts import F32
from services.serving.inputs import Expected, Refused, read_json, read_pictures

IMAGE_TYPES = ("image/png", "image/jpeg", "image/bmp", "image/webp", "application/octet-stream")
JSON_TYPE, FORM_TYPE = "application/json", "multipart/form-data"


async def read_body(request: Request, limit: int, timeout_s: float) -> bytes:
    """Return the body. Raises Refused as soon as it is known to exceed `limit` bytes, or if it takes too long."""
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or int(announced) > limit:
        raise _too_large(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise _too_large(limit)
    except TimeoutError:
        raise Refused(408, f"the body did not arrive within {timeout_s:g} s") from None
    except ClientDisconnect:
        raise Refused(400, "the client went away while sending") from None
    return bytes(body)


def _too_large(limit: int) -> Refused:
    return Refused(413, f"the body exceeds the {limit / 1e6:g} MB that are taken at once")


def content_type(request: Request) -> str:
    """Return the media type without its parameters. Raises Refused for one that is not taken."""
    found = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if found not in (*IMAGE_TYPES, JSON_TYPE, FORM_TYPE):
        taken = ", ".join((FORM_TYPE, JSON_TYPE, *IMAGE_TYPES))
        raise Refused(415, f"the content type {found[:60] or '(none)'} is not taken; send one of {taken}")
    return found


async def uploaded(request: Request, body: bytes, max_images: int) -> list[bytes]:
    """Return the files of a multipart body. Raises Refused where it is broken or holds anything but `image` files."""

    async def replay() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        form = await Request(request.scope, replay).form(
            max_files=max_images + 1, max_fields=8, max_part_size=len(body) + 1
        )
    except (MultiPartException, HTTPException) as error:
        many = "Too many files" in str(getattr(error, "detail", error))
        sentence = (
            f"the request holds more than {max_images} images" if many else "the multipart body is broken"
        )
        raise Refused(413 if many else 400, sentence) from None
    files = []
    for name, part in form.multi_items():
        if name != "image" or not isinstance(part, UploadFile):
            raise Refused(422, f"there is no field {name[:40]!r}; send every image as a file called image")
        files.append(await part.read())
    await form.close()
    return files


def decoded(kind: str, parts: list[bytes], expected: Expected) -> F32:
    """Return the pixels (n, channels, H, W) in a body of the given content type. Raises Refused."""
    return read_json(parts[0], expected) if kind == JSON_TYPE else read_pictures(parts, expected)
