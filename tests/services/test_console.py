"""Progress as a log shows it: the time left follows from what was done since the first report."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console
from rich.table import Table

from services.cli import console
from services.cli.console import ProgressDisplay
from services.cli.output import echo_marked
from services.cli.tables import print_text


class Screen(io.StringIO):
    """A terminal, which keeps what it shows."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch, caplog):
    """Seconds that pass only when told to."""
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO)
    return now


def test_the_time_left_of_a_resumed_step_follows_from_what_this_command_has_done(clock, caplog):
    display = ProgressDisplay(Console(file=io.StringIO()))
    display("finding failures", 900, 1000, "images")  # 900 were there from before
    clock[0] += 60
    display("finding failures", 950, 1000, "images")
    assert caplog.messages[-1] == "finding failures: 950 of 1,000 images, 50/min, 1 min 00 s left"


def test_a_log_gets_a_line_every_15_seconds_at_most(clock, caplog):
    display = ProgressDisplay(Console(file=io.StringIO()))
    for second in range(1, 62):
        clock[0] += 1
        display("finding failures", second, 100, "images")
    assert [line.split()[2] for line in caplog.messages] == ["1", "16", "31", "46", "61"]


def test_a_log_gets_no_line_from_bars_that_are_not_drawn():
    """rich before release 15 ends bars that it does not draw with an empty line."""
    with ProgressDisplay(Console(file=io.StringIO())) as display:
        assert not display.bars.live.is_started


def test_a_second_sweep_has_a_rate_of_its_own(clock, caplog):
    display = ProgressDisplay(Console(file=io.StringIO()))
    for trial in (1, 2, 3):
        display("fine-tuning over λ", trial, 3, "trials")
        clock[0] += 600
    display("fine-tuning over λ", 1, 3, "trials")
    clock[0] += 60
    display("fine-tuning over λ", 2, 3, "trials")
    assert caplog.messages[-1] == "fine-tuning over λ: 2 of 3 trials, 1/min, 1 min 00 s left"


def test_a_terminal_shows_one_bar_with_count_rate_and_time_left(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    shown = Screen()
    terminal = Console(file=shown, width=100)
    with ProgressDisplay(terminal) as display:
        display("training the β-VAE", 0, 1000, "images")
        display.begun["training the β-VAE"] = (console.time.monotonic() - 2, 0)
        display("training the β-VAE", 500, 1000, "images")
        display.bars.refresh()
        display("fitting the mixture")
        display.bars.refresh()
        assert [task.description for task in display.bars.tasks] == ["fitting the mixture"]
    said = shown.getvalue()
    assert "training the β-VAE" in said and "500/1000" in said and "images 250/s" in said


@pytest.mark.parametrize("columns", ["40", "200"])
def test_a_command_is_on_one_line_of_any_terminal_and_can_be_copied(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    shown, command = Screen(), "`defuse report signs --store '/a/long-winded/folder of/runs'`"
    monkeypatch.setattr("sys.stdout", shown)
    text = f"the report was written by another Defuse, and {command} writes it again"
    echo_marked("note:", text)
    assert command in shown.getvalue()
    screen = Console(file=io.StringIO(), width=int(columns))
    print_text(screen, text, "dim")
    assert command in screen.file.getvalue()


def test_text_in_a_warning_beside_a_bar_cannot_act_on_the_terminal_and_has_no_colours(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    shown = Screen()
    with ProgressDisplay(Console(file=shown, width=100)):
        logging.getLogger("defuse").warning("%s", "GET: the server's \x1bc\x1b]0;title\x07 'answer' 12")
    assert r"GET: the server's \x1bc\x1b]0;title\x07 'answer' 12" in shown.getvalue()


def test_a_command_in_a_warning_beside_a_bar_is_on_one_line(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    shown, command = Screen(), "`defuse promote RUN --store /a/long/path/to/the/runs`"
    with ProgressDisplay(Console(file=shown, width=50)):
        logging.getLogger("defuse").warning("the registry is gone; restore it, or promote with %s", command)
    assert command in shown.getvalue()


def test_a_long_activity_in_one_piece_is_named_when_it_begins(clock, caplog):
    ProgressDisplay(Console(file=io.StringIO()))("fitting the mixture")
    assert caplog.messages == ["fitting the mixture"]


@pytest.mark.parametrize(
    ("variable", "value", "stream"),
    [
        ("FORCE_COLOR", "1", io.StringIO),
        ("FORCE_COLOR", "0", io.StringIO),
        ("TTY_COMPATIBLE", "1", io.StringIO),
        ("TERM", "dumb", Screen),
    ],
)
def test_a_file_and_a_terminal_without_cursor_get_lines_whatever_colours_are_asked_for(
    variable, value, stream, monkeypatch, clock, caplog
):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(variable, value)
    shown = stream()
    with ProgressDisplay(Console(file=shown)) as display:
        display("finding failures", 0, 1000, "images")
        clock[0] += 60
        display("finding failures", 50, 1000, "images")
    assert shown.getvalue().strip() == ""
    assert caplog.messages == [
        "finding failures",
        "finding failures: 50 of 1,000 images, 50/min, 19 min 00 s left",
    ]


@pytest.mark.parametrize("name", [":100: or a:cat:b", "[bold]b[/bold]", "[/b]"])
def test_a_name_that_rich_knows_as_an_emoji_or_markup_is_printed_as_it_is(name, capsys):
    screen = console.Terminal()
    table = Table()
    table.add_column("label")
    table.add_row(name)
    screen.print(table)
    screen.print(f"accepted as {name}")
    assert capsys.readouterr().out.count(name) == 2


def test_a_line_of_a_check_needs_no_terminal_and_no_output(monkeypatch, capsys):
    echo_marked("ok", "accuracy: 90.00 %")
    assert capsys.readouterr().out == "ok     accuracy: 90.00 %\n"
    monkeypatch.setattr("sys.stdout", None)  # what Python makes of `>&-`
    echo_marked("ok", "accuracy: 90.00 %")


def test_a_narrow_terminal_breaks_an_error_between_words(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    echo_marked("defuse:", "runs/a-b.yaml: cannot read this run-file (No such file)", 8, err=True)
    assert (
        capsys.readouterr().err
        == "defuse: runs/a-b.yaml: cannot read this\n        run-file (No such file)\n"
    )


def test_a_terminal_that_can_do_nothing_but_text_is_as_wide_as_it_says(monkeypatch):
    for name, value in {"TERM": "dumb", "COLUMNS": "60", "FORCE_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    assert console.Terminal().width == 60
