"""Figure 3: what each scenario looks like, with the classifier's answer before and after the correction."""

from __future__ import annotations

import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from defuse_core.artifacts import F32, NONE_OF_THE_ABOVE, Evaluation
from defuse_core.evaluate import Findings
from defuse_core.report import Report, Scenario
from defuse_core.report.figures.style import (
    INK,
    LINE,
    MUTED,
    PAPER,
    RIGHT,
    SMALL,
    WRONG,
    bare,
    new_figure,
)
from defuse_core.report.formatting import percent

CORNERS = (
    "Corners: the classifier's answer before (left) and after (right); "
    "green as the annotators said, red not, grey where the image has no label."
)
PITCH = 1.12  # from one row to the next, in images
SHORT = 3  # class names up to so many letters fit on an image; of others the class number stands there


def draw_gallery_rows(
    report: Report, found: Findings, evaluation: Evaluation, *, accepted: bool
) -> Figure | None:
    """Return one row of images per component, accepted or rejected; None where there is no such component."""
    rows = [row for row in report.scenarios.list if row.accepted == accepted]
    if not rows:
        return None
    tile = 0.74 if accepted else 0.52  # inches
    side = 1.75 if is_short(found.models.classes) else 2.9  # width of the text at the left, in images
    width = side + found.gallery.images.shape[1]
    foot = [CORNERS, *_key(rows, found, evaluation, width * tile)]
    bottom = len(rows) * PITCH + 0.2
    height = bottom + (0.13 * len(foot) + 0.08) / tile
    figure, (ax,) = new_figure(width * tile, height * tile)
    figure.set_layout_engine("none")
    ax.set_position((0, 0, 1, 1))
    bare(ax)
    for place, row in enumerate(rows):
        _row(ax, (side, place * PITCH + 0.14), row, (found, evaluation), tile)
        if place:
            ax.axhline(place * PITCH + 0.05, color=LINE, linewidth=0.6, zorder=0)
    ax.text(0.12, bottom, "\n".join(foot), fontsize=SMALL - 1, color=MUTED, va="top", linespacing=1.4)
    ax.set(xlim=(0, width), ylim=(height, 0))
    return figure


def is_short(classes: tuple[str, ...]) -> bool:
    """Whether class names fit on an image."""
    return max(map(len, classes)) <= SHORT


def answer_text(classes: tuple[str, ...], answer: int) -> str:
    """Return what stands on an image for an answer: the name, or the class number where names are long."""
    return classes[answer] if is_short(classes) else str(answer)


def _key(rows: list[Scenario], found: Findings, evaluation: Evaluation, inches: float) -> list[str]:
    """Return lines that say which class each number stands for; none where names stand on the images."""
    classes = found.models.classes
    if is_short(classes):
        return []
    numbers = [row.number for row in rows]
    used = np.unique([found.gallery.predicted[numbers], evaluation.gallery_after[numbers]])
    names = (f"{i} {classes[i]}".replace(" ", "\xa0") for i in used)
    return textwrap.wrap("   ".join(names), int(inches * 18), break_long_words=False, break_on_hyphens=False)


def _row(
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
        for answer, x, end in ((before, left + 0.05, "left"), (after, left + 0.89, "right")):
            colour = MUTED if labels[i] == NONE_OF_THE_ABOVE else RIGHT if answer == labels[i] else WRONG
            ax.text(
                x,
                top + 0.05,
                answer_text(found.models.classes, answer),
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
