"""Figure 5, and the charts of training: learning curves, KL per latent dimension, mixture weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from defuse_core.artifacts import F64, Models
from defuse_core.evaluation.health import COLLAPSED_BELOW
from defuse_core.report.figures.style import (
    ACCENT,
    INK,
    LINE,
    MUTED,
    PAPER,
    SMALL,
    WRONG,
    new_figure,
    set_title,
)
from defuse_core.report.formatting import lam_ranges, lam_text
from defuse_core.report.schema import Report, TradeOff

CLOSE = 0.045  # of the picture's width: points nearer than this share one label
# Directions from a point to its label.
SPOTS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
WIDE = 10.4  # inches, of a picture as wide as the page
SERIES = {  # column of a history -> name, colour, unit
    "loss": ("training loss", ACCENT, "nats per image"),
    "validation": ("validation accuracy", INK, "share of images"),
    "reconstruction": ("reconstruction", ACCENT, "nats per image"),
    "kl": ("KL to the prior", INK, "nats per image"),
}


def draw_tradeoff(report: Report) -> Figure | None:
    """Return Figure 5 as a scatter plot. Neighbouring points share one label, such as `10⁻⁷ – 0.1`."""
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


def clusters(points: F64, close: float) -> list[list[int]]:
    """Return groups of row indices whose members are linked by gaps of at most `close`."""
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial.distance import cdist

    count, group = connected_components(cdist(points, points) <= close)
    return [np.flatnonzero(group == number).tolist() for number in range(count)]


def _label(figure: Figure, ax: Axes, rows: Sequence[TradeOff], points: F64, before: F64) -> None:
    """Write λ beside each cluster, where it covers neither a point nor another label."""
    figure.draw_without_rendering()
    pixels, start = ax.transData.transform(points), ax.transData.transform(before)
    frame = ax.get_window_extent()
    unit = figure.dpi / 72
    inside = (frame.x0, frame.y0, frame.x1, frame.y1)
    taken = [(x - 5 * unit, y - 5 * unit, x + 5 * unit, y + 5 * unit) for x, y in (*pixels, *start)]
    lams = [row.lam for row in rows]
    notes = [("before", start, False)] if len(start) else []
    for group in sorted(clusters(pixels / frame.width, CLOSE), key=len):
        notes.append(("λ " + lam_ranges(lams, group), pixels[group], any(rows[i].chosen for i in group)))
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
    """Return the box beside the group, inside the frame, that overlaps least with `taken`; the first of equals."""
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
    figure, (ax,) = new_figure(WIDE, 2.2)
    places = np.arange(len(kl))
    ax.bar(places, kl[order], color=ACCENT, width=0.7)
    ax.margins(x=0.02, y=0.14)
    if len(kl) <= 40:
        for place, value in enumerate(kl[order]):
            _write_above(ax, place, value, SMALL if len(kl) <= 24 else SMALL - 1.5)
    _numbered(ax, [str(i) for i in order])
    ax.set(xlabel="latent dimension", ylabel="KL to the prior, nats")
    return figure


def _write_above(ax: Axes, place: int, value: float, size: float) -> None:
    text, colour = f"{value:.2f}", MUTED if value >= COLLAPSED_BELOW else WRONG
    above: dict[str, Any] = {"xytext": (0, 2), "textcoords": "offset points", "ha": "center", "va": "bottom"}
    ax.annotate(text, (place, value), fontsize=size, color=colour, **above)


def draw_weights(report: Report) -> Figure:
    """Return the weights of the mixture, largest first; components kept for review are blue."""
    weights = np.array(report.mixture.weights)
    figure, (ax,) = new_figure(WIDE, 2.2)
    kept = np.zeros(len(weights), np.bool_)
    for weight, count in Counter(scenario.weight for scenario in report.scenarios.list).items():
        kept[np.flatnonzero(weights == weight)[:count]] = True  # components of equal weight look the same
    ax.bar(np.arange(len(weights)), weights, color=np.where(kept, ACCENT, LINE).tolist(), width=0.8)
    ax.set(xlabel="components, largest weight first", ylabel="weight")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.grid(visible=False, axis="x")
    ax.margins(x=0.01)
    return figure


def _numbered(ax: Axes, names: list[str]) -> None:
    step = -(-len(names) // 32)
    ax.set_xticks(range(0, len(names), step), names[::step])
    ax.grid(visible=False, axis="x")


def draw_curves(models: Models) -> Figure | None:
    """Return the learning curves, or None where both models are pretrained."""
    panels = [
        (title, history, column)
        for title, history in (("classifier", models.classifier_history), ("β-VAE", models.vae_history))
        for column in SERIES
        if history and getattr(history[-1], column, None) is not None
    ]
    if not panels:
        return None
    figure, axes = new_figure(WIDE * min(1, len(panels) / 4), 2.2, columns=len(panels))
    for ax, (title, history, column) in zip(axes, panels, strict=True):
        name, colour, unit = SERIES[column]
        epochs, values = [row.epoch for row in history], [getattr(row, column) for row in history]
        ax.plot(
            epochs,
            values,
            color=colour,
            linewidth=1.6,
            marker="o" if len(values) < 12 else "",
            markersize=3.5,
        )
        set_title(ax, f"{title}: {name}")
        ax.set(xlabel="epoch", ylabel=unit)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if column == "validation":
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    return figure
