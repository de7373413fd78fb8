"""The report of a run: §4 for this run, as `report.json`, `report.html` and `figures/*.png`."""

from __future__ import annotations

from defuse_core.artifacts import Evaluation
from defuse_core.evaluate import Findings
from defuse_core.health import COLLAPSED_BELOW
from defuse_core.report.build import build_report
from defuse_core.report.schema import Accuracy, ClassAccuracy, Mean, Report, Scenario, TradeOff
from defuse_core.runs import Run

__all__ = [
    "COLLAPSED_BELOW",
    "Accuracy",
    "ClassAccuracy",
    "Mean",
    "Report",
    "Scenario",
    "TradeOff",
    "build_report",
    "write_report",
]


def write_report(run: Run, found: Findings, evaluation: Evaluation) -> Report:
    """Return the report, having written `report.json`, `report.html` and `figures/*.png` into the run."""
    from defuse_core.report.figures import draw_figures, png
    from defuse_core.report.html import page

    report = build_report(run, found, evaluation)
    figures = draw_figures(report, found, evaluation)
    for name, figure in figures.items():
        run.store.write(f"figures/{name}.png", png(figure))
    run.store.write("report.html", page(report, run.spec, found, evaluation, figures).encode())
    run.store.write("report.json", (report.model_dump_json(indent=1, by_alias=True) + "\n").encode())
    return report
