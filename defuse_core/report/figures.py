"""All pictures of a report, by name: its charts, and Figures 2 and 3, which are drawn here.

These show where the failures are in latent space, and what each component looks like.
"""

from __future__ import annotations

import colorsys
import textwrap
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from defuse_core.artifacts import F32, F64, I64, NONE_OF_THE_ABOVE, Evaluation
from defuse_core.errors import percent
from defuse_core.evaluation import ACCEPTED, FAILURE, TRAINING, Findings
from defuse_core.report.charts import (
    INK,
    LINE,
    MUTED,
    PAPER,
    RIGHT,
    SMALL,
    STYLE,
    WRONG,
    draw_kl,
    draw_lambdas,
    draw_tradeoff,
    hide_axes,
    new_figure,
)
from defuse_core.report.formatting import answer_text, names_are_short
from defuse_core.report.schema import Report, Scenario

CENTRED: dict[str, Any] = {"ha": "center", "va": "center_baseline", "fontweight": "bold"}
NAMED_CLASSES = 12  # with more classes than this their names would cover the picture
CORNERS = "green ✓: the annotators' label, red ✗: another class, grey: image without a label."
MARKS = {"right": (RIGHT, "✓"), "wrong": (WRONG, "✗"), "": (MUTED, "")}  # colour and sign of an answer
PITCH = 1.12  # from one row to the next, in images
SPREADING_ROUNDS = 200


def draw_figures(report: Report, found: Findings, evaluation: Evaluation) -> dict[str, Figure]:
    """Return the pictures of a run by name; those without data are absent."""
    with mpl.rc_context(STYLE):
        figures = {
            "tradeoff": draw_tradeoff(report),
            "lambdas": draw_lambdas(report),
            "latent": draw_latent_map(report, found, evaluation),
            "scenarios": draw_gallery_rows(report, found, evaluation, accepted=True),
            "rejected": draw_gallery_rows(report, found, evaluation, accepted=False),
            "kl": draw_kl(report),
        }
    return {name: figure for name, figure in figures.items() if figure is not None}


def draw_latent_map(report: Report, found: Findings, evaluation: Evaluation) -> Figure | None:
    """Return Figure 2: training images in light colours by class, Ψ as dark diamonds, component means as numbers."""
    if not len(evaluation.points):
        return None
    figure, (ax,) = new_figure(8.0, 6.4)
    hide_axes(ax)
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


def draw_gallery_rows(
    report: Report, found: Findings, evaluation: Evaluation, *, accepted: bool
) -> Figure | None:
    """Return Figure 3: one row of images per accepted or per rejected component; None if the run has none."""
    rows = [row for row in report.scenarios.list if row.accepted == accepted]
    if not rows:
        return None
    tile = 0.74 if accepted else 0.52  # inches
    side = 1.75 if names_are_short(found.models.classes) else 2.9  # width of the text at the left, in images
    width = side + found.gallery.images.shape[1]
    answers = "before (left) and after (right)" if found.sweep.has_correction else "before"
    foot = [
        f"Corners: the classifier's answer {answers}; {CORNERS}",
        *_key(rows, found, evaluation, width * tile),
    ]
    bottom = len(rows) * PITCH + 0.2
    height = bottom + (0.13 * len(foot) + 0.08) / tile
    figure, (ax,) = new_figure(width * tile, height * tile)
    figure.set_layout_engine("none")
    ax.set_position((0, 0, 1, 1))
    hide_axes(ax)
    for place, row in enumerate(rows):
        _draw_row(ax, (side, place * PITCH + 0.14), row, (found, evaluation), tile)
        if place:
            ax.axhline(place * PITCH + 0.05, color=LINE, linewidth=0.6, zorder=0)
    ax.text(0.12, bottom, "\n".join(foot), fontsize=SMALL - 1, color=MUTED, va="top", linespacing=1.4)
    ax.set(xlim=(0, width), ylim=(height, 0))
    return figure


def _key(rows: list[Scenario], found: Findings, evaluation: Evaluation, inches: float) -> list[str]:
    """Return lines that map class numbers to names; empty where the images show the names themselves."""
    classes = found.models.classes
    if names_are_short(classes):
        return []
    numbers = [row.number for row in rows]
    used = np.unique([found.gallery.predicted[numbers], evaluation.gallery_after[numbers]])
    names = (f"{i} {classes[i]}".replace(" ", "\xa0") for i in used)
    return textwrap.wrap("   ".join(names), int(inches * 18), break_long_words=False, break_on_hyphens=False)


def _draw_row(
    ax: Axes, corner: tuple[float, float], row: Scenario, what: tuple[Findings, Evaluation], tile: float
) -> None:
    found, evaluation = what
    labels = found.verdicts.image_labels[row.number]
    side, top = corner
    _describe(ax, top, row, tile)
    for i, image in enumerate(found.gallery.images[row.number]):
        left = side + i
        ax.imshow(
            displayed(image),
            extent=(left, left + 0.94, top + 0.94, top),
            cmap="gray",
            vmin=0,
            vmax=1,
            interpolation="nearest" if image.shape[-1] <= 64 else "antialiased",
            zorder=1,
        )
        before, after = found.gallery.predicted[row.number, i], evaluation.gallery_after[row.number, i]
        answers = [(before, left + 0.05, "left")]
        if found.sweep.has_correction:
            answers.append((after, left + 0.89, "right"))
        for answer, x, end in answers:
            kind = "" if labels[i] == NONE_OF_THE_ABOVE else "right" if answer == labels[i] else "wrong"
            colour, mark = MARKS[kind]
            ax.text(
                x,
                top + 0.05,
                mark + answer_text(found.models.classes, answer),
                ha=end,
                va="top",
                color=PAPER,
                fontsize=SMALL * tile / 0.74,
                fontweight="bold",
                zorder=2,
                bbox={"boxstyle": "round,pad=0.18", "facecolor": colour, "edgecolor": "none"},
            )
    ax.set_aspect("equal", adjustable="box", anchor="NW")


def displayed(image: F32) -> F32:
    """(channels, H, W) -> (H, W) for grey or (H, W, 3) for colour."""
    return image[0] if len(image) == 1 else image.transpose(1, 2, 0)


def _describe(ax: Axes, top: float, row: Scenario, tile: float) -> None:
    size = SMALL * (1 if tile > 0.6 else 0.85)
    purity = "" if row.purity is None else f"purity {percent(row.purity, 0)}"
    if row.label is None:
        title, rest = f"Component {row.number}", [f"{percent(row.misclassified, 0)} wrong", purity]
    else:
        title = f"Scenario {row.number}"
        rest = [*textwrap.wrap(f"labelled {row.label}", 26, max_lines=2, placeholder=" …"), purity]
    ax.text(0.12, top, title, fontsize=size + 1.2, fontweight="bold", color=INK, va="top")
    ax.text(0.12, top + 0.25, "\n".join(rest), fontsize=size, color=MUTED, va="top", linespacing=1.35)
