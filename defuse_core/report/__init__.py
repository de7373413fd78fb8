"""The report of a run, with the figures of §4: `report.json` and `report.html`.

To read one, as `defuse status` does, takes no torch: what computes the figures is imported where it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from defuse_core.report.schema import Report, parse_report
from defuse_core.runs import Run

if TYPE_CHECKING:
    from defuse_core.report.build import FinishedRun


def write_report(run: Run, finished: FinishedRun) -> Report:
    """Write `report.json` and `report.html` into the run, and return the report."""
    report, page = draw_report(run, finished)
    store_report(run, report, page)
    return report


def draw_report(run: Run, finished: FinishedRun) -> tuple[Report, str]:
    """Return the report and its page, of which nothing is written."""
    from defuse_core.report.build import build_report
    from defuse_core.report.figures import draw_figures
    from defuse_core.report.html import render_page

    report = build_report(run, finished)
    pictures = draw_figures(report, finished.found, finished.evaluation)
    return report, render_page(report, run.spec, finished, pictures)


def store_report(run: Run, report: Report, page: str) -> None:
    """Write what `draw_report` returns into the run."""
    run.store.write("report.html", page.encode())
    run.store.write("report.json", (report.model_dump_json(indent=1, by_alias=True) + "\n").encode())
