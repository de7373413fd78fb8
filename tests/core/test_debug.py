"""The Python API as a user calls it: a classifier and images in memory, results, and what is refused."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import defuse_core as defuse
from defuse_core.errors import (
    DamagedError,
    InputError,
    ModelError,
    RunMismatchError,
    StoreError,
)
from defuse_core.results import is_complete
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from tests.command_line import call
from tests.conftest import ROOT
from tests.core.debug_arguments import PREFERRED, SETTINGS, arguments, biased, digits
from tests.no_access import write_all_but_run_file
from tests.own_classifiers import Net, trained

ANOTHER_LAMBDA = SETTINGS | {"correct": SETTINGS["correct"] | {"lambdas": [1.0, 3.0]}}


@pytest.fixture(autouse=True)
def _known_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("defuse_core.suggest.speeds._rate", lambda work: 1000.0)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("api") / "runs"


@pytest.fixture(scope="module")
def finished(store: Path) -> defuse.RunResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("defuse_core.suggest.speeds._rate", lambda work: 1000.0)
        return defuse.debug(**arguments(store))


def no_compute(run: Run) -> Any:
    """A place to compute that nothing may ask for anything."""

    class Nothing:
        def __enter__(self) -> object:
            return object()

        def __exit__(self, *error: object) -> None:
            pass

    return Nothing()


def test_importing_the_package_imports_no_torch():
    code = "import sys, defuse_core as defuse; print('torch' in sys.modules, 'debug' in dir(defuse))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "True"]


def test_every_exported_name_exists_and_no_other_does():
    assert all(getattr(defuse, name) is not None for name in defuse.__all__)
    with pytest.raises(AttributeError, match="no attribute 'fix'"):
        defuse.fix  # noqa: B018


def test_the_planted_fault_is_found_and_corrected(finished):
    table = finished.scenarios.to_frame()
    assert table.index.name == "number"
    assert len(table) == len(finished.scenarios) == finished.report.scenarios.components
    accepted = finished.scenarios.accepted
    found = [s for s in accepted if s.mistaken_for == str(PREFERRED)]
    assert found
    assert all(s.before < s.after for s in found)
    assert finished.health().verdict in ("fit", "poor")
    assert Path(finished.page).exists()


def test_a_fault_that_looks_like_another_input_range_is_not_mended_in_silence(finished):
    assert finished.run.spec.classifier.input_range == "0..1"
    assert finished.run.spec.classifier.class_order is None
    assert finished.report.accuracy.before.test < 0.95


def test_the_index_of_a_scenario_is_its_number(finished):
    scenarios = finished.scenarios
    assert [s.number for s in scenarios] == list(range(len(scenarios)))
    assert scenarios[-1].number == len(scenarios) - 1
    assert [s.number for s in scenarios[1:3]] == [1, 2]
    with pytest.raises(IndexError, match=f"there are {len(scenarios)}, numbered from 0"):
        scenarios[99]


def test_images_codes_and_answers_belong_together(finished):
    for scenario in finished.scenarios:
        assert scenario.images.shape == (5, 1, 16, 16)
        assert scenario.codes.shape == (5, 4)
        assert len(scenario.answers) == 5
        wrong = np.mean([answer != scenario.label for answer in scenario.answers])
        assert not scenario.accepted or wrong > 0


def test_real_images_are_named_by_their_rows_in_the_arrays_that_were_given(finished):
    images, labels = digits()
    for found in (
        finished.scenarios[0].nearest_training(7),
        finished.scenarios[0].nearest_validation(3),
    ):
        np.testing.assert_allclose(found.images[:, 0], images[found.rows] / 255, atol=1e-6)
        assert found.labels == tuple(str(label) for label in labels[found.rows])
        assert (np.diff(found.distances) >= 0).all()
        assert found.files is None
    assert len(finished.scenarios[0].nearest_training(7)) == 7


def test_the_corrected_classifier_is_a_copy_of_the_one_that_was_given(finished):
    net, before = finished.corrected(), biased()
    assert isinstance(net, Net)
    assert not net.training
    assert net.state_dict().keys() == before.state_dict().keys()
    images, labels = digits()
    batch = torch.from_numpy(images[400:, None] / 255).float()
    with torch.inference_mode():
        answers, old = net(batch).argmax(1).numpy(), before.eval()(batch).argmax(1).numpy()
    assert (answers == labels[400:]).mean() > (old == labels[400:]).mean()


def test_an_opened_run_shows_the_same_and_corrects_alike(finished, store):
    opened = defuse.open(store / "parts")
    assert repr(opened) == repr(finished)
    assert opened.report == finished.report
    batch = torch.rand(4, 1, 16, 16)
    with torch.inference_mode():
        expected = finished.corrected()(batch)
        torch.testing.assert_close(opened.corrected()(batch), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(opened.corrected(like=Net())(batch), expected)
    with pytest.raises(ModelError, match="the weights lack"):
        opened.corrected(like=nn.Linear(2, 2))


def test_a_run_whose_folder_was_moved_finds_its_images(finished, store, tmp_path, monkeypatch, capsys):
    shutil.copytree(store, tmp_path / "elsewhere")
    moved = Run.open(FolderStore(tmp_path / "elsewhere"), "parts")
    text = moved.store.read("run.yaml").decode().replace(str(store), "/gone")
    moved.store.write("run.yaml", text.encode())
    opened = defuse.open(tmp_path / "elsewhere" / "parts")
    assert len(opened.scenarios[0].nearest_training(2)) == 2
    options = ("--store", tmp_path / "elsewhere", "--why", "first", "--force", "not checked here")
    code, out, err = call(monkeypatch, capsys, "promote", "parts", *options)
    assert code == 0, (out, err)


def test_a_finished_run_whose_images_have_changed_says_so(finished, store, tmp_path, monkeypatch, capsys):
    shutil.copytree(store, tmp_path / "runs")
    run_file, images = (tmp_path / "runs" / "parts" / name for name in ("run.yaml", "inputs/images.npz"))
    run_file.write_text(run_file.read_text().replace(str(store), str(tmp_path / "runs")))
    with np.load(images) as found:
        arrays = dict(found)
    np.savez(images, **{**arrays, "train_images": 255 - arrays["train_images"]})
    with pytest.raises(RunMismatchError, match="the images differ from those that the run was trained on"):
        defuse.debug(settings=run_file, store=tmp_path / "runs", name="parts", compute=no_compute)
    before = run_file.read_bytes()
    options = ("--store", tmp_path / "runs", "--name", "parts", "--set", "check.max_loss=0.001")
    code, _, err = call(monkeypatch, capsys, "run", run_file, *options)
    assert (code, "the images differ" in err) == (2, True)
    assert run_file.read_bytes() == before  # a refused command records nothing


def test_a_report_of_another_version_is_computed_again(finished, store, tmp_path):
    shutil.copytree(store / "parts", tmp_path / "parts")
    (tmp_path / "parts" / "report.json").write_text('{"version": 3}')
    opened = defuse.open(tmp_path / "parts")
    assert opened.report.accuracy == finished.report.accuracy
    assert len(opened.scenarios) == len(finished.scenarios)
    assert repr(opened).partition(":")[2] == repr(finished).partition(":")[2]
    (tmp_path / "parts" / "psi.safetensors").unlink()
    opened = defuse.open(tmp_path / "parts")
    assert "run parts is not finished" in repr(opened)
    assert "run parts is not finished" in opened._repr_html_()


def test_the_same_call_returns_at_once_where_the_run_is_finished(finished, store, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("defuse_core.api.run_defuse", lambda *_: 1 / 0)  # nothing is made or drawn again
        again = defuse.debug(**arguments(store, compute=no_compute))
    assert again.report.accuracy == finished.report.accuracy
    assert defuse.debug(**arguments(store, settings=None, compute=no_compute)).report.scenarios


def test_other_images_or_another_classifier_under_the_same_name_are_refused_and_change_nothing(
    finished, store
):
    kept = {path: path.read_bytes() for path in (store / "parts" / "inputs").iterdir()}
    images, labels = digits()
    with pytest.raises(RunMismatchError, match="the images that this run began with"):
        defuse.debug(**arguments(store, train=(images[:300], labels[:300])))
    with pytest.raises(RunMismatchError, match="the classifier that this run began with"):
        defuse.debug(**arguments(store, classifier=trained()))
    with pytest.raises(RunMismatchError, match="vae.epochs: 40 in the run, 41 now; .* name= in Python"):
        defuse.debug(**arguments(store, settings={"vae": {"epochs": 41}}))
    assert kept == {path: path.read_bytes() for path in (store / "parts" / "inputs").iterdir()}


class WithRule(nn.Module):
    """A classifier with a rule of its own for a few images, or one that fails on all."""

    def __init__(self, net: nn.Module, rare: torch.Tensor | None) -> None:
        super().__init__()
        self.body, self.rare = net.body, rare

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.rare is None:
            return self.body(images.double())
        is_rare = (images == self.rare).flatten(1).all(dim=1)
        return self.body(images) + 50.0 * is_rare[:, None] * (torch.arange(10) == 0)


def test_a_classifier_of_the_same_weights_that_answers_a_few_images_otherwise_is_another(finished, store):
    rare = torch.from_numpy(digits()[0][200] / 255).float()
    with pytest.raises(RunMismatchError, match="the classifier that this run began with"):
        defuse.debug(**arguments(store, classifier=WithRule(biased(), rare)))
    with pytest.raises(ModelError, match=r"the classifier fails on images of shape \("):
        defuse.debug(**arguments(store, classifier=WithRule(biased(), None)))


def test_settings_that_a_later_call_leaves_out_are_named(finished, store, caplog):
    fewer = {name: section for name, section in SETTINGS.items() if name != "identify"}
    for settings in (SETTINGS, fewer):
        caplog.clear()
        found = defuse.debug(**arguments(store, settings=settings, compute=no_compute))
        named = [line for line in caplog.messages if "this call omits them: identify.draws, ident" in line]
        assert len(named) == (settings is fewer)
        assert found.run.spec.identify.draws == SETTINGS["identify"]["draws"]


def test_a_run_that_lacks_something_is_not_complete(finished, store, tmp_path):
    shutil.copytree(store / "parts", tmp_path / "parts")
    assert is_complete(defuse.open(tmp_path / "parts"))
    for name in ("report.html", "report.json", "failurewatch.safetensors", "sweep.safetensors"):
        kept = (tmp_path / "parts" / name).read_bytes()
        (tmp_path / "parts" / name).unlink()
        assert not is_complete(defuse.open(tmp_path / "parts")), name
        (tmp_path / "parts" / name).write_bytes(kept)
    (tmp_path / "parts" / "report.json").write_text('{"version": 3}')
    assert not is_complete(defuse.open(tmp_path / "parts"))


def test_no_lambda_is_added_to_the_record_of_a_promoted_version(
    finished, store, tmp_path, monkeypatch, capsys
):
    shutil.copytree(store, tmp_path / "runs")
    options = ("--store", tmp_path / "runs", "--force", "not checked here")
    assert call(monkeypatch, capsys, "promote", "parts", *options)[0] == 0
    with pytest.raises(InputError, match="version 1 in the registry was made from it"):
        defuse.debug(**arguments(tmp_path / "runs", settings=ANOTHER_LAMBDA, compute=no_compute))
    assert defuse.open(tmp_path / "runs/parts").report.accuracy == finished.report.accuracy
    change = max((tmp_path / "runs/registry/changes").iterdir())
    change.write_text("{}")
    with pytest.raises(DamagedError, match=f"{change}: expected a registry state"):
        defuse.debug(**arguments(tmp_path / "runs", settings=ANOTHER_LAMBDA, compute=no_compute))


@pytest.mark.usefixtures("no_figures")
def test_the_same_call_goes_on_where_the_run_file_was_edited_or_not_written(
    finished, store, tmp_path, monkeypatch
):
    shutil.copytree(store, tmp_path / "runs")
    file = tmp_path / "runs/parts/run.yaml"
    file.write_text(file.read_text().replace("draws: 4", "draws: 9"))
    assert defuse.debug(**arguments(tmp_path / "runs", compute=no_compute)).run.spec.identify.draws == 4
    assert "draws: 4" in file.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(FolderStore, "write", write_all_but_run_file)
        with pytest.raises(StoreError):
            defuse.debug(**arguments(tmp_path / "runs", settings=ANOTHER_LAMBDA))
    with pytest.raises(RunMismatchError, match="stopped before it wrote it: correct.lambdas"):
        defuse.open(tmp_path / "runs/parts")
    found = defuse.debug(**arguments(tmp_path / "runs", settings=ANOTHER_LAMBDA))
    assert {row.lam for row in found.report.tradeoff} == {1.0, 3.0}


@pytest.mark.usefixtures("no_figures")
def test_a_report_of_other_settings_is_not_taken_for_that_of_a_call_that_was_stopped(
    finished, store, tmp_path, monkeypatch
):
    shutil.copytree(store, tmp_path / "runs")
    other = arguments(tmp_path / "runs", compute=no_compute)
    other["settings"] = SETTINGS | {"serve": {"failure_threshold": 0.5}}
    with monkeypatch.context() as patch:
        patch.setattr("defuse_core.pipeline.write_report", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            defuse.debug(**other)
    page = Path(defuse.debug(**other).page)
    assert "failure_threshold: 0.5\n" in page.read_text(encoding="utf-8")
    again = page.stat().st_mtime_ns
    assert Path(defuse.debug(**other).page).stat().st_mtime_ns == again  # nothing is left to write


def test_the_given_classifier_keeps_its_mode_and_weights(finished, store):
    net = biased().train()
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    defuse.debug(**arguments(store, classifier=net, compute=no_compute))
    assert net.training
    assert all(torch.equal(tensor, weights[name]) for name, tensor in net.state_dict().items())


def test_notebooks_show_pictures_and_escape_what_people_wrote(finished):
    pages = [
        finished._repr_html_(),
        finished.scenarios._repr_html_(),
        finished.scenarios.accepted[0]._repr_html_(),
        finished.scenarios[0].nearest_training(3)._repr_html_(),
    ]
    assert "accuracy" in pages[0]
    assert pages[1].count("<img") == 5 * len(finished.scenarios)
    assert pages[2].count("<img") == 5
    assert pages[3].count("<img") == 3
    assert all("<script" not in page and "data:image/png" in page for page in pages[1:])
    from defuse_core.report.html import render_real

    shown = render_real(np.zeros((1, 1, 8, 8), np.float32), ["<b>cat"], ["dog"], "t")
    assert "<b>cat" not in shown
    assert "&lt;b&gt;cat" in shown


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_the_python_of_the_readme_runs_as_it_is_written(finished, store, monkeypatch):
    monkeypatch.chdir(store.parent)
    images, labels = digits()
    names: dict[str, Any] = {
        "classifier": biased(),
        "images": images[:400],
        "labels": labels[:400],
        "test_images": images[400:],
        "test_labels": labels[400:],
    }
    for page in ("README.md", "defuse_core/README.md"):
        blocks = python_blocks(ROOT / page)
        assert blocks
        for block in blocks:
            exec(compile(block, page, "exec"), names)
