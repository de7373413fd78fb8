"""The report of a run, with the figures of §4: `report.json` and `report.html`.

To read one, as `defuse status` does, takes no torch: what computes the figures is imported where it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from defuse_core.artifacts import Evaluation
from defuse_core.report.schema import Report, parse_report
from defuse_core.runs import Run

if TYPE_CHECKING:
    from defuse_core.evaluation import Findings
    from defuse_core.evaluation.evidence import Evidence
    from defuse_core.watch import FailureWatch


def write_report(
    run: Run,
    found: Findings,
    evaluation: Evaluation,
    evidence: Evidence | None = None,
    watch: FailureWatch | None = None,
) -> Report:
    """Write `report.json` and `report.html` into the run, and return the report."""
    report, page = draw_report(run, found, evaluation, evidence, watch)
    store_report(run, report, page)
    return report


def draw_report(
    run: Run, found: Findings, evaluation: Evaluation, evidence: Evidence | None, watch: FailureWatch | None
) -> tuple[Report, str]:
    """Return the report and its page, of which nothing is written."""
    from defuse_core.report.build import build_report
    from defuse_core.report.figures import draw_figures
    from defuse_core.report.html import render_page

    report = build_report(run, found, evaluation, evidence, watch)
    pictures = draw_figures(report, found, evaluation)
    return report, render_page(report, run.spec, found, evaluation, pictures, evidence)


def store_report(run: Run, report: Report, page: str) -> None:
    """Write what `draw_report` returns into the run."""
    run.store.write("report.html", page.encode())
    run.store.write("report.json", (report.model_dump_json(indent=1, by_alias=True) + "\n").encode())
