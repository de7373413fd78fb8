"""The style of all pictures, and their rendering as PNG and SVG."""

from __future__ import annotations

import io
import re
import warnings
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from defuse_core.artifacts import F64

INK, MUTED, LINE, PAPER = "#1c2330", "#667084", "#dfe3ea", "#ffffff"
ACCENT, WRONG, RIGHT = "#2f5bd0", "#c2382c", "#1b8058"
SPREADING_ROUNDS = 200
SMALL, NORMAL = 7.5, 9.0  # points
SCALE = 200  # dots per inch: crisp on a screen of twice the usual density

# In the page these colours are variables of its style sheet, so pictures follow its light and dark mode.
VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    PAPER: "var(--card)",
    ACCENT: "var(--accent)",
    WRONG: "var(--wrong)",
    RIGHT: "var(--right)",
}
STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": NORMAL,
    "svg.fonttype": "none",
    "svg.hashsalt": "defuse",
    "text.parse_math": False,  # the name of a class may contain $
}


def new_figure(width: float, height: float, columns: int = 1, **options: object) -> tuple[Figure, list[Axes]]:
    """Return a figure (size in inches) with styled axes side by side."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)
    axes = figure.subplots(1, columns, squeeze=False, **options)[0]  # type: ignore[call-overload]
    for ax in axes:
        style_axes(ax)
    return figure, list(axes)


def style_axes(ax: Axes) -> None:
    """Draw only the left and lower axis lines, light grid lines and grey labels."""
    ax.set_facecolor("none")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(LINE)
    ax.tick_params(colors=MUTED, labelcolor=MUTED, labelsize=SMALL, length=0, pad=5)
    ax.grid(color=LINE, linewidth=0.6)
    ax.set_axisbelow(True)
    for text in (ax.xaxis.label, ax.yaxis.label):
        text.set(color=MUTED, fontsize=SMALL + 0.5)


def set_title(ax: Axes, title: str) -> None:
    """Write a title above the left end of the axes."""
    ax.set_title(title, loc="left", pad=8, fontsize=SMALL + 0.5, color=INK)


def hide_axes(ax: Axes) -> None:
    """Hide axis lines, ticks and grid."""
    ax.set_axis_off()
    ax.grid(visible=False)


def png(figure: Figure) -> bytes:
    """Return the figure as PNG. Equal figures give equal bytes."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a class name in letters that the font lacks
        figure.savefig(buffer, format="png", dpi=SCALE, metadata={"Software": None})
    return buffer.getvalue()


def svg(figure: Figure, name: str) -> str:
    """Return the figure as an <svg> element. `name` is the prefix of its ids, which are unique in a page."""
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(
            buffer, format="svg", dpi=SCALE, transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", text, count=1)
    text = re.sub(r"(font(?:-family)?:[^;\"]*?)'DejaVu Sans'[^;\"]*", r"\1inherit", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    return text


def move_apart(points: F64, distance: float) -> F64:
    """Return (n, 2) points, moved until no two are nearer than `distance`."""
    moved = points.astype(np.float64).copy()
    moved += 1e-6 * distance * np.arange(len(points))[:, None]  # equal points have no direction to move in
    for _ in range(SPREADING_ROUNDS):
        gap = moved[:, None] - moved[None]  # (n, n, 2)
        length = np.linalg.norm(gap, axis=2) + np.eye(len(points)) * 1e9
        push = np.clip(distance - length, 0, None)
        if not push.any():
            break
        moved += 0.3 * (gap / length[..., None] * push[..., None]).sum(axis=1)
    return moved
