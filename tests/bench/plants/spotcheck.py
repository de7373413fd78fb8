"""SpotCheck's synthetic images (arXiv 2207.04104) at 32x32: is there a square? Blind spots are sets of attributes.

Departures, since the β-VAE and the classifier are small: 32 pixels in place of 224, with objects scaled to about an
eighth and allowed to touch where no free place is found; one blind spot per classifier in place of one to three; a
fixed number of images in place of 400 for each combination of attributes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from defuse_core.artifacts import U8
from defuse_core.data import Images
from defuse_core.seeds import generator
from tests.bench.plants.faults import Plant
from tests.bench.plants.populations import Population, Traited

SIZE = 32
SPOTS = 3  # per configuration
OPTIONS = {
    "background": ("colour", "texture", "position"),
    "square": ("size", "colour", "texture", "number"),
    "rectangle": ("size", "colour", "texture"),
    "circle": ("size", "colour", "texture"),
    "text": ("size", "colour", "texture"),
}
SIZES = {"square": ((11, 11), (6, 6)), "rectangle": ((14, 8), (8, 5)), "circle": ((11, 11), (6, 6))}
BLUE, ORANGE = (31, 119, 180), (255, 127, 14)
Attribute = tuple[str, str]  # object, and "presence" or an option of it


@dataclass(frozen=True)
class Configuration:
    """Which attributes vary, and the blind spots: attributes with the values that put an image inside."""

    objects: tuple[str, ...]
    varying: tuple[Attribute, ...]
    spots: tuple[dict[Attribute, int], ...]


def configuration(seed: int) -> Configuration:
    """Return one to three objects beside the square, five to seven attributes, and blind spots of four or five."""
    rng = generator(seed, "spotcheck", "configuration")
    count = int(rng.integers(1, 4))
    others = [str(name) for name in rng.choice(["rectangle", "circle", "text"], count, replace=False)]
    objects = ("background", "square", *sorted(others))
    options = [(name, option) for name in objects for option in OPTIONS[name] if option != "position"]
    chosen = rng.permutation(len(options))[: int(rng.integers(5, 8)) - count]
    varying = (
        ("background", "position"),
        *((name, "presence") for name in objects[2:]),
        *sorted(options[k] for k in chosen),
    )
    spots: list[dict[Attribute, int]] = []
    while len(spots) < SPOTS:
        size = min(int(rng.integers(4, 6)), len(varying))
        spot = {varying[k]: int(rng.integers(2)) for k in rng.permutation(len(varying))[:size]}
        for name, option in list(spot):
            if option != "presence" and name in others:
                spot[name, "presence"] = 1
        if all(_apart(spot, other) for other in spots):
            spots.append(spot)
    return Configuration(objects, varying, tuple(spots))


def _apart(one: dict[Attribute, int], other: dict[Attribute, int]) -> bool:
    """Return whether no image can be inside both."""
    return any(one[name] != other[name] for name in one.keys() & other.keys())


def spotcheck(seed: int, counts: tuple[int, int, int]) -> tuple[Population, tuple[Plant, ...]]:
    """Return the images of one configuration, and one plant for each of its blind spots."""
    found = configuration(seed)
    train, validation, test = (
        _part(found, count, generator(seed, "spotcheck", part))
        for part, count in zip(("train", "validation", "test"), counts, strict=True)
    )
    plants = tuple(
        Plant(f"square not seen: {_told(spot)}", "blind spot", f"spot {number}", 1, 0)
        for number, spot in enumerate(found.spots)
    )
    return Population("spotcheck", train, validation, test, ("no square", "square"), {}), plants


def _told(spot: dict[Attribute, int]) -> str:
    return ", ".join(f"{name} {option} {value}" for (name, option), value in sorted(spot.items()))


def _part(found: Configuration, count: int, rng: np.random.Generator) -> Traited:
    drawn = [_image(found, rng) for _ in range(count)]
    labels = np.array([values["square", "presence"] for _, values in drawn], np.int64)
    traits = {
        f"spot {number}": np.array(
            [float(all(values[name] == value for name, value in spot.items())) for _, values in drawn]
        )
        for number, spot in enumerate(found.spots)
    }
    pixels = np.stack([image for image, _ in drawn])
    return Traited(Images(pixels, labels), traits | {"plain": np.ones(count)})


def _image(found: Configuration, rng: np.random.Generator) -> tuple[U8, dict[Attribute, int]]:
    """Return one image (3, H, W) and the value of each attribute."""
    values = {(name, option): 0 for name in found.objects for option in OPTIONS[name]}
    values |= {(name, "presence"): 1 for name in found.objects}
    values |= {attribute: int(rng.integers(2)) for attribute in found.varying}
    values["square", "presence"] = int(rng.integers(2))
    image = Image.new("RGB", (SIZE, SIZE), (200,) * 3 if values["background", "colour"] else (255,) * 3)
    pixels = np.array(image)
    if values["background", "texture"]:
        pixels[rng.random((SIZE, SIZE)) >= 0.9] = 100
    taken: list[tuple[int, int, int, int]] = []
    for name in found.objects[1:]:
        if values[name, "presence"]:
            for _ in range(2 if name == "square" and values["square", "number"] else 1):
                _draw(pixels, name, values, taken, rng)
    middles = [(box[1] + box[3]) / 2 for box in taken[:1]]
    above = bool(values["square", "presence"]) and middles[0] < SIZE / 2
    values["background", "position"] = int(above)
    return pixels.transpose(2, 0, 1), values


def _draw(
    pixels: U8,
    name: str,
    values: dict[Attribute, int],
    taken: list[tuple[int, int, int, int]],
    rng: np.random.Generator,
) -> None:
    """Paint one object at a free place, if one of 30 tries finds it, and note its box."""
    mask = Image.new("L", (SIZE, SIZE))
    font = ImageFont.load_default(12 if values[name, "size"] else 9)
    width, height = (
        font.getbbox("text")[2:] if name == "text" else SIZES[name][1 if values[name, "size"] else 0]
    )
    for _ in range(30):
        x, y = int(rng.integers(SIZE - int(width) + 1)), int(rng.integers(SIZE - int(height) + 1))
        box = (x, y, x + int(width), y + int(height))
        if not any(_overlap(box, other) for other in taken):
            break
    taken.append(box)
    pen = ImageDraw.Draw(mask)
    corners = (box[0], box[1], box[2] - 1, box[3] - 1)
    if name == "text":
        pen.text((x, y), "text", fill=255, font=font)
    elif name == "circle":
        pen.ellipse(corners, fill=255)
    else:
        pen.rectangle(corners, fill=255)
    inside = np.asarray(mask) > 127
    pixels[inside] = ORANGE if values[name, "colour"] else BLUE
    if values[name, "texture"]:
        pixels[inside & (np.arange(SIZE) % 3 == 0)[None, :]] = 0


def _overlap(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
