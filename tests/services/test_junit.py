"""The JUnit file of a check: which file the words of a command name, and what an error leaves in it."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from junitparser import JUnitXml

from services.cli.junit import named_file, not_checked, write_error, write_junit


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--junit", "a.xml", "--json"], "a.xml"),
        (["--json", "--junit=a.xml", "digits"], "a.xml"),
        (["--junit", "a.xml", "--junit=b.xml"], "b.xml"),
        (["--junit", "a=b.xml"], "a=b.xml"),
        (["--junit=a=b.xml"], "a=b.xml"),
        (["--junit", "--suite", "suite"], None),  # a variable was empty, and not quoted
        (["--junit", "", "digits"], None),
        (["--junit="], None),
        (["--junit"], None),
        (["--", "--junit", "a.xml"], None),
        (["--junit", "~nosuchuser/a.xml"], None),
        (["--suite", "suite"], None),
    ],
)
def test_the_file_is_the_last_that_the_words_of_a_command_name(words: list[str], named: str | None):
    assert named_file(words) == (named and Path(named))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (click.BadParameter("no such class", param_hint="--set"), "Invalid value for --set: no such class"),
        (KeyError("net.1"), "'net.1'"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_an_error_is_told_as_the_command_tells_it_or_by_its_name(
    error: BaseException, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    report = tmp_path / "new" / "folder" / "a.xml"
    for _ in range(2):
        write_error(report, "defuse check", error)
        (tests,) = JUnitXml.fromfile(str(report))
        (case,) = tests
        assert (tests.name, case.result[0].message) == ("defuse check", message)
    write_error(None, "defuse check", error)
    assert capsys.readouterr() == ("", "")
    write_error(tmp_path, "defuse check", error)
    out, err = capsys.readouterr()
    assert out == "" and " ".join(err.split()).startswith(
        f"note: --junit {tmp_path}: cannot be written (Is a dir"
    )


def test_a_file_that_cannot_be_written_is_an_error_and_no_other_is_one(tmp_path: Path):
    (tmp_path / "file").touch()
    assert write_junit(tmp_path / "a.xml", "it", [not_checked("why")]) is None
    assert "Not a directory" in str(write_junit(tmp_path / "file" / "a.xml", "it", []))
