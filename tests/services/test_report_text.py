"""How the report's paragraphs and titles are set in the terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from sample_findings import SAMPLE_CORRECT, report_of, sample_findings

from services.cli.tables import TEXT_WIDTH, print_report, print_text


@pytest.mark.parametrize("width", [60, 100, 300])
def test_a_paragraph_is_never_wider_than_one_can_read(width: int):
    console = Console(width=width, file=io.StringIO())
    print_text(console, "The classifier is hardly better than guessing. " * 20, "")
    longest = max(map(len, console.file.getvalue().splitlines()))
    assert min(width, TEXT_WIDTH) - 12 < longest <= min(width, TEXT_WIDTH)


def test_a_blank_line_stands_before_every_title(tmp_path: Path):
    console = Console(width=120, file=io.StringIO())
    print_report(report_of(sample_findings(5, 2), tmp_path), SAMPLE_CORRECT, console)
    lines = [line.strip() for line in console.file.getvalue().splitlines()]
    for title in ("Accuracy (Figure 4)", "Failure scenarios", "Agreement of the annotators (Figure 6)"):
        assert lines[lines.index(title) - 1] == ""
