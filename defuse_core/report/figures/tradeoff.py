"""Figure 5: accuracy on the test set against accuracy on the failure scenarios, over λ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from defuse_core.artifacts import F64
from defuse_core.report import Report, TradeOff
from defuse_core.report.figures.style import (
    ACCENT,
    INK,
    LINE,
    MUTED,
    PAPER,
    SMALL,
    entitle,
    new_figure,
)
from defuse_core.report.formatting import lam_text, runs_text

CLOSE = 0.045  # of the picture's width: points nearer than this share one label
SPOTS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))  # where a label may stand


def draw_tradeoff(report: Report) -> Figure | None:
    """Return the scatter of Figure 5; points that lie together share one label such as `10⁻⁷ - 0.1`."""
    split, rows = clean_split(report)
    if not rows:
        return None
    figure, (ax,) = new_figure(5.2, height(rows))
    points = np.array([(row.scenario, getattr(row, split)) for row in rows])
    before = _before(report, split)  # (0 or 1, 2)
    ax.scatter(before[:, 0], before[:, 1], s=34, marker="D", facecolors=PAPER, edgecolors=MUTED, zorder=3)
    ax.scatter(points[:, 0], points[:, 1], s=26, color=ACCENT, alpha=0.55, linewidths=0, zorder=3)
    for row, (x, y) in zip(rows, points, strict=True):
        if row.chosen:
            ax.scatter(x, y, s=120, facecolors="none", edgecolors=INK, linewidths=1.4, zorder=4)
    ax.set(xlabel="accuracy on held-out scenario images", ylabel=f"accuracy on the {split} set")
    ax.margins(0.14)
    _percent(6, ax.xaxis, ax.yaxis)
    _label(figure, ax, rows, points, before)
    return figure


def height(rows: Sequence[TradeOff]) -> float:
    """Return how high both pictures are, in inches: side by side they look best of one height."""
    return max(3.4, 0.2 * len(rows) + 0.8)


def clean_split(report: Report) -> tuple[str, list[TradeOff]]:
    """Return the set that clean accuracy is shown on, test or else what there is, and the rows."""
    for split in ("test", "validation", "train"):
        rows = [r for r in report.tradeoff if r.scenario is not None and getattr(r, split) is not None]
        if rows:
            return split, rows
    return "test", []


def _before(report: Report, split: str) -> F64:
    """Return where the classifier before stands, (1, 2); (0, 2) where that was not measured."""
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


def clusters(points: F64, close: float) -> list[list[int]]:
    """Return groups of row indices whose members are linked by gaps of at most `close`."""
    left, groups = set(range(len(points))), []
    while left:
        group, queue = [], [min(left)]
        left.discard(queue[0])
        while queue:
            at = queue.pop()
            group.append(at)
            near = [i for i in left if np.linalg.norm(points[i] - points[at]) <= close]
            left.difference_update(near)
            queue += near
        groups.append(sorted(group))
    return groups


def _label(figure: Figure, ax: Axes, rows: Sequence[TradeOff], points: F64, before: F64) -> None:
    """Write λ beside every cluster, where it covers neither a point nor another label."""
    figure.draw_without_rendering()
    pixels, start = ax.transData.transform(points), ax.transData.transform(before)
    frame = ax.get_window_extent()
    unit = figure.dpi / 72
    inside = (frame.x0, frame.y0, frame.x1, frame.y1)
    taken = [(x - 5 * unit, y - 5 * unit, x + 5 * unit, y + 5 * unit) for x, y in (*pixels, *start)]
    lams = [row.lam for row in rows]
    notes = [("before", start, False)] if len(start) else []
    for group in sorted(clusters(pixels / frame.width, CLOSE), key=len):
        notes.append(("λ " + runs_text(lams, group), pixels[group], any(rows[i].chosen for i in group)))
    for text, marks, bold in notes:
        size = ((len(text) * 0.6 + 1) * SMALL * unit, SMALL * 1.4 * unit)
        box, at = _free_spot(marks, size, taken, inside, 7 * unit)
        taken.append(box)
        x, y = ax.transData.inverted().transform(at)
        colour, weight = (INK, "bold") if bold else (MUTED, "normal")
        style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": SMALL, "fontweight": weight}
        ax.text(x, y, text, color=colour, zorder=5, **style)


Box = tuple[float, float, float, float]


def _free_spot(
    group: F64, size: tuple[float, float], taken: list[Box], frame: Box, gap: float
) -> tuple[Box, F64]:
    """Return the first box beside the group that is inside the frame and covers least of what is taken."""
    low, high = group.min(axis=0), group.max(axis=0)
    centre, half = (low + high) / 2, np.array(size) / 2
    found: list[tuple[float, int, Box, F64]] = []
    for order, (dx, dy) in enumerate((*SPOTS, *((2.6 * x, 2.6 * y) for x, y in SPOTS))):
        step = np.array([dx, dy])
        at = centre + step * ((high - low) / 2 + gap) + np.sign(step) * half * np.array([1, 1 if dy else 0])
        at = np.clip(at, (frame[0] + half[0], frame[1] + half[1]), (frame[2] - half[0], frame[3] - half[1]))
        box = (at[0] - half[0], at[1] - half[1], at[0] + half[0], at[1] + half[1])
        found.append((sum(_overlap(box, other) for other in taken), order, box, at))
    _, _, box, at = min(found, key=lambda spot: spot[:2])
    return box, at


def _overlap(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def draw_lambdas(report: Report) -> Figure | None:
    """Return the same figures λ by λ, which stays readable where the points of Figure 5 coincide."""
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
        entitle(ax, title)
        ax.set_yticks(places, [lam_text(row.lam) for row in rows])
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.grid(visible=False, axis="y")
        ax.margins(x=0.1)
        _percent(5, ax.xaxis)
    axes[0].set_ylabel("λ")
    return figure
