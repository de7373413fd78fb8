"""Figure 2: where failures lie among the training images, by t-SNE of their latent codes."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from defuse_core.artifacts import F64, I64, Evaluation
from defuse_core.evaluate import ACCEPTED, FAILURE, TRAINING, Findings
from defuse_core.report import Report
from defuse_core.report.figures.style import (
    INK,
    MUTED,
    PAPER,
    SMALL,
    WRONG,
    bare,
    new_figure,
    spread_apart,
)

CENTRED: dict[str, Any] = {"ha": "center", "va": "center_baseline", "fontweight": "bold"}
NAMED_CLASSES = 12  # with more classes than this their names would cover the picture


def draw_latent_map(report: Report, found: Findings, evaluation: Evaluation) -> Figure | None:
    """Return the map: training images light by class, Ψ as dark diamonds, component means as numbers."""
    if not len(evaluation.points):
        return None
    figure, (ax,) = new_figure(8.0, 6.4)
    bare(ax)
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
    """Write each class where most of its images lie: at the one with the smallest median distance."""
    for label in np.unique(classes):
        own = points[classes == label][:400]
        distances = np.median(np.linalg.norm(own[:, None] - own[None], axis=2), axis=1)
        name = names[label] if len(names[label]) <= 16 else names[label][:15] + "…"
        x, y = own[distances.argmin()]
        ax.text(x, y, name, color=palette[label] * 0.85, fontsize=15, alpha=0.9, zorder=1.5, **CENTRED)


def _number_means(figure: Figure, ax: Axes, evaluation: Evaluation) -> None:
    """Number the components, moved apart where they would overlap, with a line to their place."""
    kind = evaluation.point_kind
    means = np.flatnonzero(kind >= ACCEPTED)
    if not len(means):
        return
    unit = figure.dpi / 72
    true = ax.transData.transform(evaluation.points[means].astype(np.float64))
    shown = ax.transData.inverted().transform(spread_apart(true, 16.5 * unit))
    for index, start, (x, y) in zip(means, evaluation.points[means], shown, strict=True):
        accepted = kind[index] == ACCEPTED
        edge, fill, ink = (WRONG, WRONG, PAPER) if accepted else (MUTED, PAPER, MUTED)
        order = 5 if accepted else 4
        ax.plot((start[0], x), (start[1], y), color=edge, linewidth=0.9, zorder=3)
        ax.scatter(x, y, s=170, facecolors=fill, edgecolors=edge, linewidths=1, zorder=order)
        number = str(evaluation.point_component[index])
        ax.text(x, y, number, color=ink, fontsize=SMALL, zorder=order, **CENTRED)


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
