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
from sklearn.svm import SVC
from torch import nn

import defuse_core as defuse
from defuse_core.artifacts import Models
from defuse_core.config import RunFile, load_run_file
from defuse_core.data import open_splits
from defuse_core.errors import (
    DataError,
    DefuseError,
    InputError,
    ModelError,
    RunFileError,
    RunMismatchError,
)
from defuse_core.results import is_complete
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from tests.conftest import ROOT, tiny
from tests.e2e.test_cli import call
from tests.own_classifiers import Net, trained
from tests.services.serving.synthetic_runs import make_run

PREFERRED = 8  # class that the test's classifier sees too often
SETTINGS: dict[str, Any] = {
    "vae": {"epochs": 40, "batch_size": 16, "channels": 8, "latent_dim": 4, "hidden": 64, "beta": 0.3},
    "identify": {"draws": 4, "screen": "none"},
    "distill": {"by": "all", "max_components": 6, "min_support": 1, "max_iterations": 40},
    "review": {
        "images": 5,  # as in defuse_core/README.md
        "tau": 0.1,
        "accept": "share",
        "rho": 0.1,
        "reference": {"count": 2, "channels": 8, "epochs": 8, "batch_size": 32, "train_images": None},
    },
    "judges": {"count": 0},
    "correct": {
        "filter": "none",
        "lambdas": [1.0],
        "epochs": 2,
        "tune_images": 24,
        "test_images": 24,
        "max_loss": 0.2,
    },
    "report": {"tsne_images": 60, "tsne_failures": 40, "perplexity": 10},
    "resources": {"train_threads": 1},
}


@pytest.fixture(autouse=True)
def _short_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("defuse_core.suggest.plan.TRIAL_S", 0.05)


def digits() -> tuple[np.ndarray, np.ndarray]:
    """The tiny digits as a user has them: uint8 (N, H, W) and labels."""
    images = open_splits(tiny(data={"train_images": None}).data, 0).train
    return np.asarray(images.pixels)[:600, 0], images.labels[:600]


def biased(by: float = 5.0) -> nn.Module:
    """A trained classifier that takes many images for an 8."""
    net = Net()
    net.load_state_dict(trained().state_dict())
    with torch.no_grad():
        net.body[-1].bias[PREFERRED] += by
    return net


def arguments(store: Path, **changes: Any) -> dict[str, Any]:
    images, labels = digits()
    return {
        "classifier": biased(),
        "train": (images[:400], labels[:400]),
        "test": (images[400:], labels[400:]),
        "store": store,
        "name": "parts",
        "settings": SETTINGS,
    } | changes


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("api") / "runs"


@pytest.fixture(scope="module")
def finished(store: Path) -> defuse.RunResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("defuse_core.suggest.plan.TRIAL_S", 0.05)
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


def test_settings_that_a_later_call_leaves_out_are_named(finished, store, caplog):
    fewer = {name: section for name, section in SETTINGS.items() if name != "identify"}
    for settings in (SETTINGS, fewer):
        caplog.clear()
        found = defuse.debug(**arguments(store, settings=settings, compute=no_compute))
        named = [line for line in caplog.messages if "left out now still hold: identify.draws, ident" in line]
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


def settings_of(store: Path, until: type[DefuseError] | None = None, **changes: Any) -> RunFile:
    """Return the run file that a call makes; nothing is computed."""
    with pytest.raises(Exception, match="no place"):
        defuse.debug(**arguments(store, compute=lambda run: 1 / 0 if run is None else stop(), **changes))
    return load_run_file(store / "parts" / "run.yaml")


def stop() -> Any:
    raise RuntimeError("no place")


def test_settings_that_later_calls_leave_out_hold_also_where_there_are_defaults(tmp_path, caplog):
    first = {
        "data": {"validation_share": 0.3},
        "classifier": {"input_range": "-1..1", "class_order": list(range(9, -1, -1)), "epochs": 1},
    }
    began = settings_of(tmp_path, settings=first)
    (tmp_path / "parts" / "models.safetensors").write_bytes(b"made")
    added = settings_of(tmp_path, settings={"check": {"min_scenario_accuracy": 0.123}})
    assert (added.data, added.classifier) == (began.data, began.classifier)
    caplog.clear()
    with pytest.raises(RunMismatchError, match=r"vae.beta: .* in the run, 77.0 now"):
        defuse.debug(**arguments(tmp_path, settings={"vae": {"beta": 77.0}}))
    assert not any("still hold" in line for line in caplog.messages)
    assert settings_of(tmp_path, settings=first).check.min_scenario_accuracy == 0.123
    assert "left out now still hold: check.min_scenario_accuracy" in caplog.messages[-1]


def test_channels_that_a_later_call_leaves_out_hold(tmp_path):
    for settings in ({"data": {"channels": 3}}, None):
        assert settings_of(tmp_path, classifier=None, settings=settings).data.channels == 3
        (tmp_path / "parts" / "models.safetensors").write_bytes(b"made")


FORMS = {
    "uint8 (N, H, W)": (lambda x: x, 1),
    "floats (N, H, W, 1)": (lambda x: x[..., None] / 255, 1),
    "a tensor (N, 1, H, W)": (lambda x: torch.from_numpy(x[:, None] / 255), 1),
    "half floats": (lambda x: torch.from_numpy(x[:, None] / 255).half(), 1),
    "lists": (lambda x: x[:40].tolist() and (x[:40] / 255).tolist(), 1),
}


@pytest.mark.parametrize("form", FORMS)
def test_images_are_taken_in_the_forms_that_people_have(form, tmp_path):
    images, labels = digits()
    change, channels = FORMS[form]
    given = change(images[:100])
    spec = settings_of(tmp_path, train=(given, torch.from_numpy(labels[: len(given)])), test=None)
    assert (spec.data.image_size, spec.data.channels) == (16, channels)
    found = open_splits(spec.data, 0)
    rows = np.concatenate([found.train.batch(slice(0, 200)), found.validation.batch(slice(0, 200))])
    assert len(rows) == len(given)
    assert 0.5 < rows.max() <= 1


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "floats to 255": (
        {"train": (np.full((20, 16, 16), 9.0), np.arange(20) % 2)},
        DataError,
        r"train_images: expected floats in \[0, 1\], found values from 9 to 9 in image 0",
    ),
    "int64 pixels": (
        {"train": (np.zeros((20, 16, 16), np.int64), np.arange(20) % 2)},
        DataError,
        "expected uint8, or floats",
    ),
    "not square": (
        {"train": (np.zeros((20, 16, 20), np.uint8), np.arange(20) % 2)},
        DataError,
        r"found \(20, 16, 20\)",
    ),
    "too small": (
        {"train": (np.zeros((20, 1, 1), np.uint8), np.arange(20) % 2)},
        DataError,
        "^debug: train_images: expected 8 to 512 pixels in .* found 1x1, which is too small; resize the images",
    ),
    "odd": (
        {"train": (np.zeros((20, 13, 13), np.uint8), np.arange(20) % 2), "test": None, "classifier": None},
        DataError,
        "^debug: train_images: expected an even height and width, .* found 13x13 pixels",
    ),
    "one-hot labels": (
        {"train": (np.zeros((20, 16, 16), np.uint8), np.eye(20))},
        DataError,
        r"train_labels: expected integers .* found float64 \(20, 20\)",
    ),
    "too few labels": (
        {"train": (np.zeros((20, 16, 16), np.uint8), np.arange(8) % 2)},
        DataError,
        "found 8 and 20",
    ),
    "flat": (
        {"train": (np.zeros((20, 256), np.uint8), np.arange(20) % 2)},
        DataError,
        r"train: expected images of shape .* found \(20, 256\)",
    ),
    "no pair": ({"train": np.zeros((20, 16, 16))}, DataError, r"train: expected \(images, labels\), found ndarray"),
    "no train": ({"train": None}, DataError, "train: expected"),
    "nothing": ({"train": None, "test": None, "settings": None}, DataError, "found neither"),
    "colours": (
        {"train": (np.zeros((20, 16, 16, 3), np.uint8), np.arange(20) % 2), "test": None},
        ModelError,
        r"fails on images of shape \(8, 3, 16, 16\)",
    ),
    "a frozen classifier": (
        {"classifier": biased().requires_grad_(False)},
        ModelError,
        "expected parameters to fine-tune, found none",
    ),
    "a class": ({"classifier": Net}, ModelError, "expected an nn.Module, found the class Net; call it"),
    "a function": ({"classifier": len}, ModelError, "found builtin_function_or_method; wrap it in a module"),
    "scikit-learn": ({"classifier": SVC()}, ModelError, "expected an nn.Module, found SVC; wrap it"),
    "nobody's home": ({"store": "~nobody-of-this-name/runs"}, InputError, "the home of an existing user after ~"),
    "unknown setting": ({"settings": {"vea": {}}}, RunFileError, "vea: unknown field"),
    "S3": ({"store": "s3://bucket/runs"}, InputError, "store=services.storage.open_store"),
    "a bad name": ({"name": "../up"}, InputError, "run name"),
    "people": (
        {"settings": SETTINGS | {"review": {"annotators": "label-studio"}}},
        InputError,
        "give annotators too",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused_in_one_line(case, tmp_path):
    changes, kind, line = BAD[case]
    with pytest.raises(kind, match=line):
        defuse.debug(**{**arguments(tmp_path), **changes})
    assert not list(tmp_path.rglob("models.safetensors"))


def test_a_tilde_in_the_store_is_the_users_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InputError, match=rf"no run called parts in {tmp_path}/runs"):
        defuse.open("~/runs/parts")


class Branching(nn.Module):
    """A classifier whose code depends on the values of its input, which torch.export cannot follow."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        size = int(images.sum().item()) % 3 + 10
        return torch.zeros(len(images), size)[:, :10] + images.mean() * 0


def test_a_classifier_that_torch_cannot_export_is_refused_with_the_other_way(tmp_path):
    with pytest.raises(ModelError, match=r"import_path, weights"):
        defuse.debug(**arguments(tmp_path, classifier=Branching()))


def test_a_scripted_classifier_and_a_whole_run_file_are_taken(tmp_path):
    scripted = torch.jit.script(biased())
    spec = settings_of(tmp_path, classifier=scripted, settings=tiny())
    assert (spec.classifier.architecture, spec.classifier.epochs) == ("program", 0)
    assert spec.vae == tiny().vae
    assert (spec.data.name, spec.data.validation_share) == ("npz", 0.2)


def test_a_run_before_its_end_shows_the_health_and_says_what_is_missing(
    tmp_path, tiny_spec, tiny_models: Models
):
    splits = open_splits(tiny_spec.data, tiny_spec.seed)
    make_run(FolderStore(tmp_path), "digits", tiny_spec, tiny_models, splits, tiny_models.classifier)
    run = defuse.open(tmp_path / "digits")
    assert run.health() == tiny_models.health
    assert "not finished" in repr(run)
    assert "not finished" in run._repr_html_()
    for wanted in ("report", "scenarios"):
        with pytest.raises(InputError, match="run digits is not finished"):
            getattr(run, wanted)
    with pytest.raises(InputError, match="no run called other"):
        defuse.open(tmp_path / "other")


def test_where_nothing_was_corrected_an_error_says_so(tmp_path, tiny_spec, tiny_models: Models):
    splits = open_splits(tiny_spec.data, tiny_spec.seed)
    make_run(FolderStore(tmp_path), "digits", tiny_spec, tiny_models, splits, {})
    with pytest.raises(InputError, match=r"corrected nothing \(every λ costs more clean accuracy"):
        defuse.open(tmp_path / "digits").corrected()
    with pytest.raises(InputError, match="no corrected classifier yet"):
        (tmp_path / "digits" / "sweep.safetensors").unlink()
        defuse.open(tmp_path / "digits").corrected()


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
