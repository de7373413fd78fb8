"""The charts of a report, and the style of all its pictures.

Charts are Figure 5 and KL per latent dimension. Pictures are drawn with matplotlib objects, without pyplot's global
state, and rendered as PNG and SVG.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from defuse_core.artifacts import F64
from defuse_core.evaluation.health import COLLAPSED_BELOW
from defuse_core.report.formatting import lam_text
from defuse_core.report.schema import Report, TradeOff

INK, MUTED, LINE, PAPER = "#1c2330", "#667084", "#dfe3ea", "#ffffff"
ACCENT, WRONG, RIGHT = "#2f5bd0", "#c2382c", "#1b8058"
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


def draw_tradeoff(report: Report) -> Figure | None:
    """Return Figure 5 as a scatter plot, in which the chosen λ is named."""
    split, rows = clean_split(report)
    if not rows:
        return None
    figure, (ax,) = new_figure(5.2, height(rows))
    points = np.array([(row.scenario, getattr(row, split)) for row in rows])
    before = _before(report, split)  # (0 or 1, 2)
    ax.scatter(before[:, 0], before[:, 1], s=34, marker="D", facecolors=PAPER, edgecolors=MUTED, zorder=3)
    ax.scatter(points[:, 0], points[:, 1], s=26, color=ACCENT, alpha=0.55, linewidths=0, zorder=3)
    for row, point in zip(rows, points, strict=True):
        if row.chosen:
            ax.scatter(*point, s=120, facecolors="none", edgecolors=INK, linewidths=1.4, zorder=4)
            _write_beside(ax, f"λ = {lam_text(row.lam)}", point, 7, color=INK, fontweight="bold")
    for point in before:
        _write_beside(ax, "before", point, -6, color=MUTED)
    ax.set(xlabel="accuracy on held-out scenario images", ylabel=f"accuracy on the {split} set")
    ax.margins(0.14)
    _percent(6, ax.xaxis, ax.yaxis)
    return figure


def height(rows: Sequence[TradeOff]) -> float:
    """Return the height in inches of both charts, which the page shows side by side."""
    return max(3.4, 0.2 * len(rows) + 0.8)


def clean_split(report: Report) -> tuple[str, list[TradeOff]]:
    """Return the split that clean accuracy is shown on (test, else validation, else train) and its rows."""
    for split in ("test", "validation", "train"):
        rows = [r for r in report.tradeoff if r.scenario is not None and getattr(r, split) is not None]
        if rows:
            return split, rows
    return "test", []


def _before(report: Report, split: str) -> F64:
    """Return the point of the classifier before, (1, 2); (0, 2) where it was not measured."""
    before = report.accuracy.before
    clean = {"test": before.test, "validation": before.validation}.get(split)
    known = clean is not None and before.scenario is not None
    return np.array([(before.scenario, clean)] if known else [], np.float64).reshape(-1, 2)


def _percent(bins: int, *axes: Axis) -> None:
    for axis in axes:
        axis.set_major_locator(MaxNLocator(bins, steps=[1, 2, 2.5, 5, 10]))
        low, high = axis.get_view_interval()
        digits = 0 if high - low > 0.06 else 1 if high - low > 0.006 else 2
        axis.set_major_formatter(FuncFormatter(lambda value, _, digits=digits: f"{100 * value:.{digits}f} %"))


def draw_lambdas(report: Report) -> Figure | None:
    """Return the figures of Figure 5 by λ, readable also where its points coincide."""
    split, rows = clean_split(report)
    if not rows:
        return None
    figure, axes = new_figure(5.2, height(rows), columns=2, sharey=True)
    before = report.accuracy.before
    places = np.arange(len(rows))
    columns = ((split, f"{split} set"), ("scenario", "held-out scenario images"))
    for ax, (name, title) in zip(axes, columns, strict=True):
        values = [getattr(row, name) for row in rows]
        start = getattr(before, name, None)
        if start is not None:
            ax.axvline(start, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            ax.hlines(places, start, values, color=LINE, linewidth=2.2, zorder=1)
        ax.scatter(values, places, s=24, color=ACCENT, linewidths=0, zorder=3)
        for place, row in zip(places, rows, strict=True):
            if row.chosen:
                ax.axhspan(place - 0.5, place + 0.5, color=ACCENT, alpha=0.12, linewidth=0)
        set_title(ax, title)
        ax.set_yticks(places, [lam_text(row.lam) for row in rows])
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.grid(visible=False, axis="y")
        ax.margins(x=0.1)
        _percent(5, ax.xaxis)
    axes[0].set_ylabel("λ")
    return figure


def draw_kl(report: Report) -> Figure:
    """Return the KL of each latent dimension, largest first; figures of collapsed dimensions are red."""
    kl = np.array(report.vae.kl_per_dimension)
    order = np.argsort(-kl, kind="stable")
    figure, (ax,) = new_figure(10.4, 2.2)
    places = np.arange(len(kl))
    ax.bar(places, kl[order], color=ACCENT, width=0.7)
    ax.margins(x=0.02, y=0.14)
    if len(kl) <= 40:
        for place, value in enumerate(kl[order]):
            colour = MUTED if value >= COLLAPSED_BELOW else WRONG
            size = SMALL if len(kl) <= 24 else SMALL - 1.5
            _write_beside(ax, f"{value:.2f}", np.array([place, value]), 2, color=colour, fontsize=size)
    step = -(-len(kl) // 32)
    ax.set_xticks(places[::step], [str(i) for i in order[::step]])
    ax.grid(visible=False, axis="x")
    ax.set(xlabel="latent dimension", ylabel="KL to the prior, nats")
    return figure


def _write_beside(ax: Axes, text: str, point: F64, up: float, **style: Any) -> None:
    """Write a text above the point, (2,), at a distance of `up` in 1/72 inch; below it where that is negative."""
    style = {"fontsize": SMALL, "ha": "center", "va": "bottom" if up > 0 else "top"} | style
    ax.annotate(text, (point[0], point[1]), xytext=(0, up), textcoords="offset points", **style)


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
