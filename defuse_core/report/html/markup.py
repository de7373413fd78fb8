"""HTML that cannot forget to escape: text stays text until `tag` has made it part of an element."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from PIL import Image

from defuse_core.artifacts import F32

VOID = {"img", "meta", "br", "input"}
PIXEL_ART = 64  # images of at most so many pixels are kept exactly; larger ones are compressed


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = str | int | None


def tag(name: str, /, *children: Child, **attributes: str | int | bool | None) -> Markup:
    """Return an element. Children that are not Markup are escaped; None is left out; `class_` is class."""
    inside = "".join(
        child if isinstance(child, Markup) else escape(str(child)) for child in children if child is not None
    )
    said = "".join(_attribute(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items())
    return Markup(f"<{name}{said}>" if name in VOID else f"<{name}{said}>{inside}</{name}>")


def _attribute(name: str, value: str | int | bool | None) -> str:
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'


def join(parts: Iterable[Child]) -> Markup:
    """Return the parts one after the other, text among them escaped."""
    return Markup(
        "".join(part if isinstance(part, Markup) else escape(str(part)) for part in parts if part is not None)
    )


def table(head: Sequence[str], rows: Iterable[Sequence[Child]], texts: int = 1) -> Markup:
    """Return a table in a box that scrolls sideways; the first `texts` columns are text, others numbers."""

    def cells(name: str, row: Sequence[Child]) -> Markup:
        kinds = (None if place < texts else "n" for place in range(len(row)))
        return tag("tr", *(tag(name, cell, class_=kind) for cell, kind in zip(row, kinds, strict=True)))

    inside = (tag("thead", cells("th", head)), tag("tbody", *(cells("td", row) for row in rows)))
    return tag("div", tag("table", *inside), class_="scroll")


def figures_list(pairs: Iterable[tuple[str, Child]]) -> Markup:
    """Return names with their figures."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs))


def folded(summary: Child, *children: Child) -> Markup:
    """Return something that opens on a click."""
    return tag("details", tag("summary", summary), *children)


def picture(image: F32) -> str:
    """Return pixels (channels, H, W) in [0, 1] as a data: address."""
    pixels = np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)
    shown = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    buffer = io.BytesIO()
    kind = "png" if max(shown.size) <= PIXEL_ART else "jpeg"
    shown.save(buffer, kind, **({"optimize": True} if kind == "png" else {"quality": 90}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
