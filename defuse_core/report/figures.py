"""All pictures of a report, by name: Figures 2 and 5, the figures of Figure 5 by λ, and KL per latent dimension.

They are drawn with matplotlib objects, without pyplot's global state, and rendered as SVG.
"""

from __future__ import annotations

import colorsys
import io
import re
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from defuse_core.artifacts import F64, I64, Evaluation
from defuse_core.evaluation import ACCEPTED, FAILURE, TRAINING, Findings
from defuse_core.evaluation.health import COLLAPSED_BELOW
from defuse_core.formatting import lam_text
from defuse_core.report.schema import Report, TradeOff

INK, MUTED, LINE, PAPER = "#1c2330", "#667084", "#dfe3ea", "#ffffff"
ACCENT, WRONG = "#2f5bd0", "#c2382c"
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
}
STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": NORMAL,
    "svg.fonttype": "none",
    "svg.hashsalt": "defuse",
    "text.parse_math": False,  # the name of a class may contain $
}
CENTRED: dict[str, Any] = {"ha": "center", "va": "center_baseline", "fontweight": "bold"}
SCENARIOS = "held-out scenario images, by the scenario's label"
NAMED_CLASSES = 12  # most classes that are named: more names would cover the picture
SPREADING_ROUNDS = 200


def draw_figures(report: Report, found: Findings, evaluation: Evaluation) -> dict[str, str]:
    """Return the pictures of a run by name, as <svg> elements; those without data are absent."""
    with mpl.rc_context():
        mpl.rcdefaults()  # settings of the user's, such as text.usetex, would apply as well
        mpl.rcParams.update(STYLE)
        figures = {
            "tradeoff": draw_tradeoff(report),
            "lambdas": draw_lambdas(report),
            "latent": draw_latent_map(report, found, evaluation),
            "kl": draw_kl(report),
        }
        return {name: svg(figure, name) for name, figure in figures.items() if figure is not None}


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
            ax.scatter(point[0], point[1], s=120, facecolors="none", edgecolors=INK, linewidths=1.4, zorder=4)
            _write_beside(ax, f"λ = {lam_text(row.lam)}", point, 7, color=INK, fontweight="bold")
    for point in before:
        _write_beside(ax, "before", point, -6, color=MUTED)
    ax.set(xlabel=f"accuracy on {SCENARIOS}", ylabel=f"accuracy on the {split} set")
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
    columns = ((split, f"{split} set"), ("scenario", SCENARIOS.replace(", ", ",\n")))
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
        ax.set_title(title, loc="left", pad=8, fontsize=SMALL + 0.5, color=INK)
        ax.set_yticks(places, [lam_text(row.lam) for row in rows])
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.grid(visible=False, axis="y")
        ax.margins(x=0.1)
        _percent(5, ax.xaxis)
    axes[0].set_ylabel("λ")
    return figure


def draw_kl(report: Report) -> Figure:
    """Return the KL of each latent dimension, largest first; collapsed dimensions are shaded, and their figures red."""
    kl = np.array(report.vae.kl_per_dimension)
    order = np.argsort(-kl, kind="stable")
    alive = int((kl >= COLLAPSED_BELOW).sum())
    figure, (ax,) = new_figure(10.4, 2.2)
    places = np.arange(len(kl))
    ax.bar(places, kl[order], color=ACCENT, width=0.7)
    if alive < len(kl):
        ax.axvspan(alive - 0.5, len(kl) - 0.5, color=WRONG, alpha=0.12, linewidth=0)
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
    style.setdefault("fontsize", SMALL)
    style |= {"xytext": (0, up), "textcoords": "offset points", "ha": "center"}
    ax.annotate(text, (point[0], point[1]), va="bottom" if up > 0 else "top", **style)


def draw_latent_map(report: Report, found: Findings, evaluation: Evaluation) -> Figure | None:
    """Return Figure 2: training images in light colours by class, Ψ as dark diamonds, component means as numbers."""
    if not len(evaluation.points):
        return None
    figure, (ax,) = new_figure(8.0, 6.4)
    ax.set_axis_off()
    kind, points = evaluation.point_kind, evaluation.points.astype(np.float64)
    classes, training = evaluation.point_component[kind == TRAINING], points[kind == TRAINING]
    palette = class_colours(len(found.models.classes))
    light: dict[str, Any] = {"alpha": 0.5, "linewidths": 0, "rasterized": True, "zorder": 1}
    ax.scatter(training[:, 0], training[:, 1], s=5, c=palette[classes], **light)
    failures = points[kind == FAILURE]
    ax.scatter(failures[:, 0], failures[:, 1], s=9, marker="D", color=INK, linewidths=0, alpha=0.8, zorder=2)
    ax.set_aspect("equal", adjustable="datalim")
    ax.margins(0.02)
    figure.draw_without_rendering()
    if len(palette) <= NAMED_CLASSES:
        _name_classes(ax, training, classes, found.models.classes, palette)
    _number_means(figure, ax, evaluation)
    quiet: dict[str, Any] = {
        "frameon": False,
        "fontsize": SMALL + 0.5,
        "labelcolor": MUTED,
        "handletextpad": 0.3,
    }
    figure.legend(handles=_legend(report), loc="outside lower center", ncols=4, columnspacing=1.8, **quiet)
    return figure


def class_colours(classes: int) -> F64:
    """Return one mid-tone per class, (C, 3), neighbours in number far apart in hue."""
    golden = 0.618033988749895
    hues = [i / classes if classes <= 10 else (i * golden) % 1 for i in range(classes)]
    return np.array([colorsys.hls_to_rgb(hue, 0.52 + 0.08 * (i % 2), 0.62) for i, hue in enumerate(hues)])


def _name_classes(ax: Axes, points: F64, classes: I64, names: tuple[str, ...], palette: F64) -> None:
    """Write each class name at the image with the smallest median distance to the others of its class."""
    for label in np.unique(classes):
        own = points[classes == label][:400]
        distances = np.median(np.linalg.norm(own[:, None] - own[None], axis=2), axis=1)
        name = names[label] if len(names[label]) <= 16 else names[label][:15] + "…"
        x, y = own[distances.argmin()]
        ax.text(x, y, name, color=palette[label] * 0.85, fontsize=15, alpha=0.9, zorder=1.5, **CENTRED)


def _number_means(figure: Figure, ax: Axes, evaluation: Evaluation) -> None:
    """Draw the numbers of the components, moved apart where they overlap, with a line to the true position."""
    kind = evaluation.point_kind
    means = np.flatnonzero(kind >= ACCEPTED)
    if not len(means):
        return
    unit = figure.dpi / 72
    true = ax.transData.transform(evaluation.points[means].astype(np.float64))
    shown = ax.transData.inverted().transform(move_apart(true, 16.5 * unit))
    for index, start, (x, y) in zip(means, evaluation.points[means], shown, strict=True):
        accepted = kind[index] == ACCEPTED
        edge, fill, ink = (WRONG, WRONG, PAPER) if accepted else (MUTED, PAPER, MUTED)
        order = 5 if accepted else 4
        ax.plot((start[0], x), (start[1], y), color=edge, linewidth=0.9, zorder=3)
        ax.scatter(x, y, s=170, facecolors=fill, edgecolors=edge, linewidths=1, zorder=order)
        number = str(evaluation.point_component[index])
        ax.text(x, y, number, color=ink, fontsize=SMALL, zorder=order, **CENTRED)


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


def _legend(report: Report) -> list[Line2D]:
    def mark(shape: str, face: str, edge: str, size: float, label: str) -> Line2D:
        return Line2D(
            [],
            [],
            linestyle="",
            marker=shape,
            markerfacecolor=face,
            markeredgecolor=edge,
            markersize=size,
            label=label,
        )

    handles = [mark("o", "#8aa0c8", "none", 5, "training images"), mark("D", INK, "none", 4, "failures (Ψ)")]
    if report.scenarios.accepted:
        handles.append(mark("o", WRONG, WRONG, 9, "failure scenarios"))
    if report.scenarios.accepted < report.scenarios.components:
        handles.append(mark("o", PAPER, MUTED, 9, "other components"))
    return handles


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


def svg(figure: Figure, name: str) -> str:
    """Return the figure as an <svg> element. `name` is the prefix of its ids, which are unique in a page."""
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a class name in letters that the font lacks
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
