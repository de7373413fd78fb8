"""How the report's paragraphs and titles are set in the terminal."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from sample_evidence import sample_evidence
from sample_findings import report_of, sample_findings

from services.cli.tables import TEXT_WIDTH, print_report, print_text


@pytest.mark.parametrize("width", [60, 100, 300])
def test_a_paragraph_is_never_wider_than_one_can_read(width: int):
    console = Console(width=width, file=io.StringIO())
    print_text(console, "The classifier is hardly better than guessing. " * 20, "")
    longest = max(map(len, console.file.getvalue().splitlines()))
    assert min(width, TEXT_WIDTH) - 12 < longest <= min(width, TEXT_WIDTH)


def test_a_blank_line_stands_before_every_title(tmp_path: Path):
    console = Console(width=120, file=io.StringIO())
    print_report(report_of(sample_findings(5, 2), tmp_path), console)
    lines = [line.strip() for line in console.file.getvalue().splitlines()]
    for title in ("Accuracy (Figure 4)", "Failure scenarios", "Agreement of the annotators (Figure 6)"):
        assert lines[lines.index(title) - 1] == ""


def test_a_blank_line_stands_before_every_caveat_and_title(tmp_path: Path):
    console = Console(width=120, file=io.StringIO())
    report = report_of(sample_findings(5, 2), tmp_path)
    print_report(report, console)
    lines = console.file.getvalue().splitlines()
    assert report.caveats
    for caveat in report.caveats:
        (start,) = [place for place, line in enumerate(lines) if line and caveat.startswith(line)]
        assert lines[start - 1] == "" and lines[start]


def test_no_row_is_about_failing_test_draws_that_do_not_exist(tmp_path: Path):
    evidence = sample_evidence(np.array([[0.1, 0.9, 0.9, 1.0], [0.6, 0.9, 0.9, 1.0]]))
    nothing = np.zeros(3, np.int64)
    evidence = dataclasses.replace(evidence, real_failure_images=0, real_failure_pairs_with_baseline=nothing)
    report = report_of((*sample_findings(3, 2), evidence), tmp_path)
    console = Console(width=120, file=io.StringIO())
    print_report(report, console)
    text = console.file.getvalue()
    assert "left-out scenarios" in text and "failing test draw" not in text


def test_a_narrow_report_drops_intervals_and_a_column_before_rows_become_records(tmp_path: Path):
    evidence = sample_evidence(np.array([[0.1, 0.9, 0.9, 1.0], [0.6, 0.9, 0.9, 1.0]]))
    report = report_of((*sample_findings(3, 2), evidence), tmp_path)
    console = Console(width=60, file=io.StringIO())
    print_report(report, console)
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["Validation", "Test", "Scenario", "images"] in lines and ["Before", "Plain", "Defuse"] in lines
    assert ["left-out", "scenarios", "35", "%", "90", "%", "100", "%"] in lines


def test_a_table_without_a_figure_is_left_out(tmp_path: Path):
    report = report_of((*sample_findings(0, 0), sample_evidence(np.zeros((0, 4)))), tmp_path)
    console = Console(width=120, file=io.StringIO())
    print_report(report, console)
    titles = ("Accuracy (Figure 4)", "Evidence, by", "Agreement of the annotators")
    assert [title for title in titles if title in console.file.getvalue()] == ["Accuracy (Figure 4)"]
