"""Which photographs the pictures of an anchored run were made from."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from defuse_core.artifacts import Anchors, ComponentFailures, Corrections, Gallery, Models, Scenarios
from defuse_core.codec import encode
from defuse_core.data import open_splits
from defuse_core.data.images import to_levels, to_picture
from defuse_core.export.finished import export_scenarios
from defuse_core.results import RunResult, ScenarioView
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from tests.conftest import tiny
from tests.services.serving.synthetic_runs import make_run


@pytest.fixture
def run(tmp_path: Path, tiny_models: Models) -> Run:
    """A finished run over a folder of photographs: of each scenario 1 to 5 is anchored at training image 1 to 5."""
    digits = open_splits(tiny().data, 0).train
    for row, label in enumerate(digits.labels):
        folder = tmp_path / "photos/train" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        to_picture(to_levels(digits.batch(slice(row, row + 1))[0])).save(folder / f"{row:03d}.png")
    data = {"name": "folder", "root": str(tmp_path / "photos")}
    spec = tiny(data=data, vae={"decode": "anchored"})
    splits = open_splits(spec.data, spec.seed)
    models = replace(tiny_models, data_fingerprint=splits.fingerprint())
    made = make_run(FolderStore(tmp_path / "runs"), "photos", spec, models, splits, tiny_models.classifier)
    source = np.arange(10, 15)
    anchors = Anchors(splits.train.take(source).pixels[:], source, np.arange(5) > 2)
    gallery, fixes, scenarios = (made.require(kind) for kind in (Gallery, Corrections, Scenarios))
    tuned, held_out = np.zeros(fixes.tune.shape[:2], np.int64), np.full(fixes.test.shape[:2], 4)
    failures = ComponentFailures(np.zeros((3, 4, 4), np.float32), np.array([[0, 2, 2, 1]] * 3), anchors)
    for changed in (
        replace(gallery, source=np.broadcast_to(source, gallery.predicted.shape).copy()),
        replace(fixes, anchors=anchors, tune_anchor=tuned, test_anchor=held_out),
        replace(scenarios, failures=failures),
    ):
        made.store.write(f"{type(changed).__name__.lower()}.safetensors", encode(changed))
    return made


def exported(run: Run, folder: Path) -> dict[str, list[str]]:
    """The column source for each origin, in order."""
    export_scenarios(run, folder)
    found: dict[str, list[str]] = {}
    for row in csv.DictReader((folder / "labels.csv").open()):
        found.setdefault(row["origin"], []).append(row["source"])
    return found


def test_the_table_names_the_photograph_that_each_picture_was_made_from(run, tmp_path, caplog):
    photos = Path(run.spec.data.root)
    files = [Path(file).relative_to(photos).as_posix() for file in open_splits(run.spec.data, 0).train.files]
    found = exported(run, tmp_path / "pictures")
    assert found["reviewed"] == files[10:15] * 2
    assert (set(found["tuned"]), set(found["held-out"])) == ({files[10]}, {files[14]})
    shutil.rmtree(photos)
    for sources in exported(run, tmp_path / "without").values():
        assert set(sources) == {""}
    assert (
        "labels.csv: the column source is empty, since the training images are not available" in caplog.text
    )


def test_a_scenario_names_the_photographs_that_its_failures_come_from(run):
    result, files = RunResult(run), open_splits(run.spec.data, 0).train.files
    found = type("Found", (), {"scenarios": run.require(Scenarios)})
    result.__dict__["_finished"] = SimpleNamespace(found=found)
    row = type("Row", (), {"number": 1})
    assert ScenarioView(result, row).sources == files[10:13]
