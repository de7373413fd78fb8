"""The files of a multipart form: which forms are read, and which are rejected."""

from __future__ import annotations

import asyncio
import tempfile

import pytest
from starlette.datastructures import UploadFile
from starlette.requests import Request

from services.serving.inputs import uploaded_files
from services.serving.limits import RejectedInput
from tests.services.serving.test_inputs import request


def test_a_large_file_needs_no_room_for_temporary_files(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    pixels = b"pixels" * 400_000
    body = part + pixels + b"\r\n--x--\r\n"
    assert asyncio.run(uploaded_files(request("multipart/form-data; boundary=x"), body, 1)) == [pixels]


@pytest.mark.parametrize("second", ["image", "other"])
def test_uploads_are_closed_also_when_a_later_field_is_rejected(monkeypatch, second):
    closed, close = [], UploadFile.close

    async def noted(upload):
        closed.append(upload.filename)
        await close(upload)

    monkeypatch.setattr(UploadFile, "close", noted)
    part = '--x\r\nContent-Disposition: form-data; name="{}"; filename="{}.png"\r\n\r\npixels\r\n'
    body = f"{part.format('image', 'a')}{part.format(second, 'b')}--x--\r\n".encode()
    request = Request({"type": "http", "headers": [(b"content-type", b"multipart/form-data; boundary=x")]})
    if second == "image":
        assert asyncio.run(uploaded_files(request, body, 2)) == [b"pixels", b"pixels"]
    else:
        with pytest.raises(RejectedInput, match="unknown field 'other'"):
            asyncio.run(uploaded_files(request, body, 2))
    assert closed == ["a.png", "b.png"]


def form(fields: list[tuple[str, str]]) -> tuple[Request, bytes]:
    """A form with these fields; a field with a file name is a file."""
    parts = [
        f'--x\r\nContent-Disposition: form-data; name="{name}"'
        + (f'; filename="{filename}"' if filename else "")
        + f"\r\n\r\n{'pixels' * 1000}\r\n"
        for name, filename in fields
    ]
    return request("multipart/form-data; boundary=x"), f"{''.join(parts)}--x--\r\n".encode()


def test_one_file_above_the_limit_is_counted_exactly_and_more_are_not_read():
    sent, body = form([("image", "a.png")] * 3)
    assert len(asyncio.run(uploaded_files(sent, body, 2))) == 3  # which decode_images rejects
    sent, body = form([("image", "a.png")] * 4)
    with pytest.raises(RejectedInput, match="more than 2 images") as refused:
        asyncio.run(uploaded_files(sent, body, 2))
    assert refused.value.status_code == 413


@pytest.mark.parametrize("boundary", ["x", '"x"', "x; charset=utf-8"])
def test_a_form_that_was_cut_off_is_broken_and_not_one_of_fewer_images(boundary):
    _, body = form([("image", "a.png")] * 3)
    sent = request(f"multipart/form-data; boundary={boundary}")
    for end in (body, body[:-2], body + b"an epilogue"):
        assert len(asyncio.run(uploaded_files(sent, end, 3))) == 3
    for cut in (3, len("--x--\r\n"), 30, 6003, len(body)):
        with pytest.raises(RejectedInput, match="the multipart body is broken") as refused:
            asyncio.run(uploaded_files(sent, body[:-cut], 3))
        assert refused.value.status_code == 400


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([("image", "")], "the field image has no file name; send it as a file .with curl: -F image=@FILE"),
        ([("a", ""), ("b", "")], "unknown field 'a'; send every image as a file"),
        ([("a", "a.png")], "unknown field 'a'; send every image as a file"),
    ],
)
def test_a_field_that_is_no_file_or_has_another_name_is_rejected(fields, message):
    sent, body = form(fields)
    with pytest.raises(RejectedInput, match=message) as refused:
        asyncio.run(uploaded_files(sent, body, 2))
    assert refused.value.status_code == 422


@pytest.mark.parametrize(
    ("charset", "status"), [("utf-8", None), ("none-such", None), ("utf-16", None), ("undefined", 400)]
)
def test_a_charset_that_cannot_decode_the_names_of_a_form_is_rejected(charset, status):
    body = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\npixels\r\n--x--\r\n'
    header = f"multipart/form-data; boundary=x; charset={charset}".encode()
    request = Request({"type": "http", "headers": [(b"content-type", header)]})
    if status is None:
        assert asyncio.run(uploaded_files(request, body, 2)) == [b"pixels"]
    else:
        with pytest.raises(RejectedInput, match="charset") as refused:
            asyncio.run(uploaded_files(request, body, 2))
        assert refused.value.status_code == status
