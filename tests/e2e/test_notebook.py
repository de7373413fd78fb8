"""The notebooks run from their first cell to their last, and are kept with what they show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "deploy" / "notebooks").glob("*.ipynb"))


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def shown(notebook: Any) -> list[set[str]]:
    """For each cell of code, the kinds of data that it shows."""
    cells = (cell for cell in notebook.cells if cell.cell_type == "code")
    return [{kind for output in cell.outputs for kind in output.get("data", {})} for cell in cells]


def pictures(notebook: Any) -> int:
    return sum(
        output["data"].get("text/html", "").count("<img")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "data" in output
    )


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_it_is_kept_with(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    kept, again = read(path), read(path)
    NotebookClient(
        again, timeout=1100, startup_timeout=240, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert shown(again) == shown(kept)
    assert pictures(again) > 20
    assert pictures(kept) > 20


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_small_and_without_the_paths_of_a_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text) < 400_000
    assert "/tmp/" not in text
    assert "/home/" not in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_with_the_words_of_todays_templates(path: Path) -> None:
    outputs = (output for cell in read(path).cells for output in cell.get("outputs", []))
    shown = " ".join("".join(output.get("data", {}).get("text/html", "") for output in outputs).split())
    folder = ROOT / "defuse_core" / "report" / "templates"
    run, scenarios = (
        (folder / f"{name}.html.j2").read_text("utf-8") for name in ("notebook_run", "notebook")
    )
    legend = scenarios.partition("if corrected }}; ")[2].partition("\n{% for")[0]
    assert "✗" in legend and " ".join(legend.split()) in shown
    assert run.partition("<thead>")[2].partition("</thead>")[0] in shown
