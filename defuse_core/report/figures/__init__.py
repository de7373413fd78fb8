"""The pictures of a report, drawn with matplotlib objects, without pyplot's global state."""

from __future__ import annotations

import matplotlib as mpl
from matplotlib.figure import Figure

from defuse_core.artifacts import Evaluation
from defuse_core.evaluation.evaluate import Findings
from defuse_core.report.figures.charts import (
    draw_curves,
    draw_kl,
    draw_lambdas,
    draw_tradeoff,
    draw_weights,
)
from defuse_core.report.figures.scenarios import draw_gallery_rows, draw_latent_map
from defuse_core.report.figures.style import STYLE, png, svg
from defuse_core.report.schema import Report


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
            "weights": draw_weights(report),
            "curves": draw_curves(found.models),
        }
    return {name: figure for name, figure in figures.items() if figure is not None}
