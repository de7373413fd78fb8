"""Request bodies: which are accepted, and which are rejected with which status and message."""

from __future__ import annotations

import io
import json
import re
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image
from starlette.requests import Request

from defuse_core.config import ServeSection, parse_run_file
from defuse_core.data.images import read_picture
from services.serving.inputs import InputSpec, content_type, decode_images, decode_json
from services.serving.limits import RejectedInput

GREY = InputSpec(channels=1, size=16, pad_to=None, resize=False, max_images=3, max_pixels=10_000)
COLOUR = InputSpec(channels=3, size=16, pad_to=None, resize=False, max_images=3, max_pixels=10_000)
FITTING = InputSpec(channels=1, size=16, pad_to=None, resize=True, max_images=3, max_pixels=10_000)


def file(mode: str = "L", size: tuple[int, int] = (16, 16), kind: str = "PNG", **options: object) -> bytes:
    picture = Image.new(mode, size) if mode == "I;16" else Image.effect_noise(size, 60).convert(mode)
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


GREY_LEVELS = np.arange(256, dtype=np.uint8).reshape(16, 16)


def rgb(kind: str = "PNG", blue: int = 255, **options: object) -> bytes:
    """Every level of grey, in red, green and blue; `blue` is that of the last pixel, a white one."""
    levels = np.repeat(GREY_LEVELS[..., None], 3, axis=2)
    levels[-1, -1, 2] = blue
    out = io.BytesIO()
    Image.fromarray(levels).save(out, kind, **options)
    return out.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG with width x height grey pixels in its header, all zero and highly compressed."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * min((width + 1) * height, 50_000_000), 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_grey_of_16_bits_is_read_as_in_training(tmp_path):
    pixels = np.linspace(0, 65_535, 256).astype(np.uint16).reshape(16, 16)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    (tmp_path / "picture.png").write_bytes(out.getvalue())
    trained_on = read_picture(str(tmp_path / "picture.png"), 1, 16)
    np.testing.assert_array_equal(
        decode_images([out.getvalue()], GREY)[0], trained_on.astype(np.float32) / 255
    )
    with pytest.raises(RejectedInput, match="colour mode I;16, expected 16x16 pixels in colour"):
        decode_images([out.getvalue()], COLOUR)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP"])
def test_an_image_file_gives_its_pixels_between_0_and_1(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    mode = "RGB" if kind == "WEBP" else "L"  # WebP has no grey
    expected = COLOUR if kind == "WEBP" else GREY
    data = file(mode, kind=kind, **options)
    pixels = decode_images([data], expected)
    levels = np.asarray(Image.open(io.BytesIO(data))).reshape(16, 16, -1).transpose(2, 0, 1)
    np.testing.assert_array_equal(pixels[0], levels.astype(np.float32) / np.float32(255))


@pytest.mark.parametrize(
    ("files", "status", "words"),
    [
        ([], 422, "no image"),
        ([b""], 422, "^the image is empty"),
        ([b"GIF89a"], 400, "expected an image in PNG, JPEG, BMP or WebP"),
        ([file(kind="GIF")], 400, "expected an image in PNG, JPEG, BMP or WebP"),
        ([file()[:-40]], 400, "broken"),
        ([file(size=(28, 16))], 422, "28x16 pixels, expected 16x16 pixels in grey"),
        ([rgb(blue=253)], 422, "colour mode RGB, expected 16x16 pixels in grey"),
        ([file(), b"?"], 400, "image 2: "),
        ([file()] * 4, 413, "4 images, the limit is 3"),
        ([bomb(100_000, 100_000)], 413, "too large|pixels"),
        ([bomb(4000, 4000)], 413, "4000x4000 pixels, the limit is 10000"),
    ],
)
def test_an_unusable_file_is_rejected_in_one_sentence(files, status, words):
    with pytest.raises(RejectedInput) as refused:
        decode_images(files, GREY)
    assert re.search(words, refused.value.detail)
    assert refused.value.status_code == status and "\n" not in refused.value.detail


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
def test_an_rgb_file_of_a_grey_image_is_a_grey_image(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels = decode_images([rgb(kind, **options)], GREY)
    np.testing.assert_array_equal(pixels[0, 0], GREY_LEVELS.astype(np.float32) / np.float32(255))


def test_a_palette_file_is_a_grey_image_where_its_colours_are_grey():
    levels = file("L")
    np.testing.assert_array_equal(decode_images([palette(levels)], GREY), decode_images([levels], GREY))
    with pytest.raises(RejectedInput, match="colour mode P, expected 16x16 pixels in grey"):
        decode_images([palette(rgb(blue=0))], GREY)


def palette(data: bytes) -> bytes:
    """The image of a file with a palette."""
    out = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("P").save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_a_lossy_rgb_file_of_a_grey_image_is_a_grey_image(kind):
    assert decode_images([file("RGB", kind=kind)], GREY).shape == (1, 1, 16, 16)


def progressive(scans: int, mode: str = "L") -> bytes:
    """A progressive JPEG whose last scan is repeated until there are so many."""
    data = file(mode, kind="JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    more = scans - data.count(b"\xff\xda")
    return data[:last] + data[last:-2] * (1 + more) + data[-2:]


def test_a_jpeg_with_thousands_of_scans_is_rejected_and_one_with_a_hundred_is_not():
    assert decode_images([progressive(100)], GREY).shape == (1, 1, 16, 16)
    for scans in (101, 5000):
        with pytest.raises(RejectedInput, match="more than 100 scans") as refused:
            decode_images([progressive(scans)], FITTING)
        assert refused.value.status_code == 422


def test_the_scans_of_a_jpeg_are_counted_before_its_colours_are_decoded(monkeypatch):
    decoded = []
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda picture: decoded.append(picture.size))
    with pytest.raises(RejectedInput, match="more than 100 scans"):
        decode_images([progressive(101, "RGB")], GREY)
    assert decoded == []


def with_profiles(count: int, picture: bytes) -> bytes:
    """A PNG image with so many profiles of 1 MB, which have 1 KB each in the file."""
    chunk = b"iCCP" + b"name\0\0" + zlib.compress(bytes(1_000_000), 9)
    profile = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    header = 8 + 25  # signature and IHDR
    return picture[:header] + profile * count + picture[header:]


def test_a_png_with_many_compressed_profiles_is_rejected_before_one_is_read(monkeypatch):
    """7,500 of them, in 8 MB, take half a minute."""
    picture = file()
    accepted = decode_images([with_profiles(20, picture)], GREY)
    np.testing.assert_array_equal(accepted, decode_images([picture], GREY))
    monkeypatch.setattr("PIL.Image.open", lambda *_, **__: pytest.fail("reads the header"))
    with pytest.raises(RejectedInput, match="^422: the PNG image has more than 20 compressed texts or"):
        decode_images([with_profiles(21, picture)], GREY)


def test_a_decompression_bomb_is_rejected_before_its_pixels_are_decoded(monkeypatch):
    decoded = []
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda picture: decoded.append(picture.size))
    with pytest.raises(RejectedInput):
        decode_images([bomb(7000, 7000)], FITTING)
    assert decoded == []


def test_the_pixels_of_all_images_of_a_request_are_limited_together():
    half = file(size=(50, 100))
    assert decode_images([file(size=(100, 100))], FITTING).shape == (1, 1, 16, 16)
    assert decode_images([half, half], FITTING).shape == (2, 1, 16, 16)
    with pytest.raises(
        RejectedInput, match="^413: image 3: the images of this request have more than 10000 pixels"
    ):
        decode_images([half, file(size=(50, 99)), file(size=(6, 9))], FITTING)


@pytest.mark.parametrize(
    "data", [file(size=(28, 16)), file("RGBA"), rgb(blue=253)], ids=["size", "alpha", "colour"]
)
def test_the_rejection_of_an_image_that_can_be_converted_says_how(data):
    with pytest.raises(
        RejectedInput, match="expected 16x16 pixels in grey.*; convert it, or .*serve.resize: true"
    ):
        decode_images([data], GREY)


def test_as_many_images_as_are_allowed_are_accepted():
    assert decode_images([file()] * 3, GREY).shape == (3, 1, 16, 16)


def test_memory_that_runs_out_is_not_called_a_broken_image(monkeypatch):
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("services.serving.inputs.fit_picture", fail)
    with pytest.raises(MemoryError):
        decode_images([file()], GREY)


def test_an_image_with_transparency_is_converted_with_serve_resize_only():
    see_through = file(transparency=3)
    assert decode_images([see_through], FITTING).shape == (1, 1, 16, 16)
    with pytest.raises(
        RejectedInput, match=r"has transparency \(tRNS\), expected 16x16 pixels in grey without; convert it"
    ):
        decode_images([see_through], GREY)


def request(header: str | None) -> Request:
    headers = [] if header is None else [(b"content-type", header.encode())]
    return Request({"type": "http", "headers": headers})


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ("image/png", "image/png"),
        ("Image/PNG ; q=1", "image/png"),
        ("application/json; charset=utf-8", "application/json"),
        ("multipart/form-data; boundary=x", "multipart/form-data"),
        ("application/octet-stream", "application/octet-stream"),
        ("image/jpeg", "image/jpeg"),
        ("image/bmp", "image/bmp"),
        ("image/webp", "image/webp"),
    ],
)
def test_the_content_type_is_read_without_its_parameters_in_any_case(header, found):
    assert content_type(request(header)) == found


@pytest.mark.parametrize(
    ("header", "named"), [(None, r"\(none\)"), ("", r"\(none\)"), ("text/html", "text/html")]
)
def test_another_content_type_is_rejected(header, named):
    with pytest.raises(
        RejectedInput, match=f"type {named} is not supported; send one of multipart/"
    ) as refused:
        content_type(request(header))
    assert refused.value.status_code == 415


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip"])
def test_a_body_that_is_compressed_in_any_way_is_rejected(encoding):
    headers = [(b"content-type", b"image/png"), (b"content-encoding", encoding.encode())]
    with pytest.raises(
        RejectedInput, match=f"encoding {encoding} is not supported; send the body wi"
    ) as refused:
        content_type(Request({"type": "http", "headers": headers}))
    assert refused.value.status_code == 415


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "RGBA", "P", "I;16", "CMYK"])
def test_other_sizes_and_colors_are_converted_with_serve_resize(mode):
    data = file(mode, (28, 20), "JPEG" if mode == "CMYK" else "PNG")
    assert decode_images([data], FITTING).shape == (1, 1, 16, 16)


@pytest.mark.parametrize("name", ["mnist", "mnist-5000"])
@pytest.mark.parametrize("resize", [False, True])
def test_mnist_pictures_of_28_pixels_are_padded_as_they_were_in_training(resize, name):
    trained = parse_run_file({"data": {"name": name, "image_size": 32, "channels": 1, "root": "data"}}, "run")
    expected = InputSpec.of(trained, ServeSection(resize=resize))
    data = file(size=(28, 28))
    levels = np.asarray(Image.open(io.BytesIO(data)))
    pixels = decode_images([data], expected)[0, 0]
    np.testing.assert_array_equal(pixels[2:30, 2:30], levels.astype(np.float32) / np.float32(255))
    assert pixels[:2].max() == pixels[30:].max() == pixels[:, :2].max() == pixels[:, 30:].max() == 0


def test_mnist_pictures_of_another_size_get_the_border_that_those_of_training_have():
    data = {"name": "mnist", "image_size": 32, "channels": 1, "root": "data"}
    expected = InputSpec.of(parse_run_file({"data": data}, "run"), ServeSection(resize=True))
    small = Image.linear_gradient("L").resize((28, 28))
    files = []
    for picture in (small, small.resize((56, 56), Image.Resampling.NEAREST)):
        out = io.BytesIO()
        picture.save(out, "PNG")
        files.append(out.getvalue())
    pixels = decode_images(files, expected)
    assert pixels[1][:, :2].max() == 0
    centre = pixels[:, :, 2:30, 2:30]
    assert np.abs(centre[0] - centre[1]).max() < 3 / 255


@pytest.mark.parametrize("name", ["mnist", "mnist-5000"])
def test_mnist_pictures_are_padded_to_32_pixels_only_and_those_of_32_are_as_they_are(name):
    def expected(size: int) -> InputSpec:
        data = {"name": name, "image_size": size, "channels": 1, "root": "data"}
        return InputSpec.of(parse_run_file({"data": data}, "run"), ServeSection())

    data = file(size=(32, 32))
    levels = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(
        decode_images([data], expected(32))[0, 0], levels.astype(np.float32) / np.float32(255)
    )
    assert decode_images([file()], expected(16)).shape == (1, 1, 16, 16)
    with pytest.raises(RejectedInput, match="28x28 pixels, expected 16x16"):
        decode_images([file(size=(28, 28))], expected(16))
    with pytest.raises(RejectedInput, match="30x30 pixels, expected 32x32 or 28x28 pixels in grey"):
        decode_images([file(size=(30, 30))], expected(32))


def test_bytes_that_start_scans_in_a_jpeg_mean_nothing_in_other_files():
    assert decode_images([file() + b"\xff\xda" * 101], GREY).shape == (1, 1, 16, 16)


def pixels_of(value: object) -> bytes:
    return json.dumps({"pixels": value}).encode()


ONE = np.linspace(0, 1, 256).reshape(16, 16)


@pytest.mark.parametrize("value", [ONE, ONE[None], ONE[None, None], np.stack([ONE, ONE])[:, None]])
def test_pixels_in_json_are_one_image_or_several(value):
    pixels = decode_json(pixels_of(value.tolist()), GREY)
    np.testing.assert_array_equal(pixels, value.astype(np.float32).reshape(-1, 1, 16, 16))


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b'{"pixels": ' + b"9" * 5000 + b"}", 400, "not JSON"),
        (b"[]", 422, "object"),
        (b"{}", 422, "missing"),
        (b'{"pixels": [], "image": 1}', 422, "unknown field 'image'"),
        (b'{"pixels": [NaN]}', 422, "found NaN"),
        (b'{"pixels": [[1e999]]}', 422, "0 to 1"),
        (b'{"pixels": []}', 422, "numbers"),
        (b'{"pixels": 3}', 422, "list"),
        (b'{"pixels": [["a"]]}', 422, "numbers"),
        (b'{"pixels": [[true]]}', 422, "numbers"),
        (b'{"pixels": [[null]]}', 422, "numbers"),
        (b'{"pixels": [[{}]]}', 422, "numbers"),
        (b'{"pixels": [[true, 0.5]]}', 422, "something else"),
        (b'{"pixels": [[false, 0.5]]}', 422, "something else"),
        (b'{"pixels": [[null, 0.5]]}', 422, "from 0 to 1$"),
        (b'{"pixels": [[{}, 0.5]]}', 422, "from 0 to 1$"),
        (b'{"pixels": [[0, 1], [0]]}', 422, "equal length"),
        (b'{"pixels": ' + b"[" * 200 + b"]" * 200 + b"}", 422, "pixels"),
        (b'{"pixels": [[0.5, 1' + b"0" * 400 + b"]]}", 422, "pixels"),
        (pixels_of((ONE * 255).tolist()), 422, "divide"),
        (pixels_of((ONE * 1.01).tolist()), 422, "divide"),
        (pixels_of((ONE - 0.1).tolist()), 422, "0 to 1"),
        (pixels_of(ONE[:8].tolist()), 422, "found 8x16 numbers, expected 1x16x16"),
        (pixels_of(np.stack([ONE] * 3).tolist()), 422, "found 3x16x16"),
        (pixels_of(np.stack([ONE] * 4)[:, None].tolist()), 413, "4 images, the limit is 3"),
    ],
)
def test_unusable_json_is_rejected_in_one_sentence(body, status, words):
    with pytest.raises(RejectedInput, match=words) as refused:
        decode_json(body, GREY)
    assert refused.value.status_code == status and "\n" not in refused.value.detail


def test_one_grey_image_is_no_color_image():
    with pytest.raises(RejectedInput, match="found 16x16 numbers, expected 3x16x16"):
        decode_json(pixels_of(ONE.tolist()), COLOUR)


def test_a_string_among_the_numbers_takes_no_memory_for_each_of_them():
    body = pixels_of(["a" * 16_000, *[0] * 8_000])  # as NumPy's strings 512 MB
    tracemalloc.start()
    with pytest.raises(RejectedInput, match="expected numbers"):
        decode_json(body, GREY)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
