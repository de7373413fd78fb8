"""Options of `defuse run` that have no effect are refused or named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.e2e.test_cli import call, one_line


@pytest.fixture
def finished(finished_run: Path, tmp_path: Path) -> list[object]:
    """The words of the command that made the finished run, on a copy of it."""
    shutil.copytree(finished_run, tmp_path / "copy")
    return ["run", tmp_path / "copy/tiny.yaml", "--store", tmp_path / "copy/runs", "--on", "local"]


def test_a_cluster_is_not_ignored_where_the_run_is_computed_here(finished, monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, *finished, "--address", "head:6379")
    assert code == 2
    assert "--address goes with --on ray" in err


def test_a_step_that_was_made_before_is_not_traced_in_silence(finished, monkeypatch, capsys):
    for until in ([], ["--until", "train"]):
        code, out, err = call(monkeypatch, capsys, *finished, "--profile", "train", *until)
        assert code == 0, err
        assert one_line(err).startswith("note: --profile train: nothing was traced, since this step was made")
    assert "done until train" in out
