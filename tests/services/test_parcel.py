"""What a job takes along to the cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from defuse_core.config import RunFile, load_run_file
from defuse_core.errors import ModelError, RunFileError
from services.parcel import RUN_FILE, pack
from tests.conftest import tiny


def brought(weights: Path, module: str = "mine") -> RunFile:
    """A run file with a classifier of one's own."""
    return tiny(
        classifier={
            "architecture": "custom",
            "import_path": f"{module}:build",
            "weights": str(weights),
            "epochs": 0,
        }
    )


def test_weights_and_code_travel_and_the_run_file_names_them_where_they_lie_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("build = None")
    (tmp_path / "best.safetensors").write_bytes(b"weights")
    job = tmp_path / "job"
    job.mkdir()
    pack(brought(tmp_path / "best.safetensors"), job)
    there = load_run_file(job / RUN_FILE)
    assert there.classifier.weights == Path("weights/classifier.safetensors")
    assert (job / "weights/classifier.safetensors").read_bytes() == b"weights"
    assert (job / "mine.py").read_text() == "build = None"
    assert (job / "defuse_core/pipeline.py").is_file() and not list(job.rglob("*.pyc"))


def test_what_the_nodes_could_not_find_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("")
    with pytest.raises(RunFileError, match=r"classifier.weights .*gone\.pt: cannot be read \(No such file"):
        pack(brought(tmp_path / "gone.pt"), tmp_path / "a")
    with pytest.raises(ModelError, match="there is no module absent here or on PYTHONPATH"):
        pack(brought(tmp_path / "gone.pt", "absent"), tmp_path / "b")
    with pytest.raises(ModelError, match="services is a package of Defuse; rename yours"):
        pack(brought(tmp_path / "gone.pt", "services.nets"), tmp_path / "d")
    with pytest.raises(RunFileError, match=r"data.root images.npz: expected the absolute path"):
        pack(tiny(data={"name": "npz", "root": "images.npz"}), tmp_path / "c")
