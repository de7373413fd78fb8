"""Pictures of the models' making: learning curves, KL per latent dimension, mixture weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from defuse_core.artifacts import Models
from defuse_core.report import COLLAPSED_BELOW, Report
from defuse_core.report.figures.style import (
    ACCENT,
    INK,
    LINE,
    MUTED,
    SMALL,
    WRONG,
    entitle,
    new_figure,
)

WIDE = 10.4  # inches, of a picture as wide as the page
SERIES = {  # column of a history -> name, colour, unit
    "loss": ("training loss", ACCENT, "nats per image"),
    "validation": ("validation accuracy", INK, "share of images"),
    "reconstruction": ("reconstruction", ACCENT, "nats per image"),
    "kl": ("KL to the prior", INK, "nats per image"),
}


def draw_kl(report: Report) -> Figure:
    """Return the KL of each latent dimension, most informative first; collapsed ones are marked."""
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
    """Return the weights of the mixture, heaviest first; those kept stand out."""
    weights = np.array(report.mixture.weights)
    figure, (ax,) = new_figure(WIDE, 2.2)
    kept = np.arange(len(weights)) < report.scenarios.components
    ax.bar(np.arange(len(weights)), weights, color=np.where(kept, ACCENT, LINE).tolist(), width=0.8)
    ax.set(xlabel="components, heaviest first", ylabel="weight")
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
    """Return what training told after each epoch, or None where both models were brought."""
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
        entitle(ax, f"{title}: {name}")
        ax.set(xlabel="epoch", ylabel=unit)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if column == "validation":
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    return figure
