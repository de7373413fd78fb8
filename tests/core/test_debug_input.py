"""What `debug` takes and refuses: images, classifiers, settings, and calls that go on with a run."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.svm import SVC
from torch import nn
from torch.utils.data import TensorDataset

import defuse_core as defuse
from defuse_core.api import LabelledImages
from defuse_core.artifacts import Models
from defuse_core.config import RunFile, load_run_file
from defuse_core.data import open_splits
from defuse_core.device import device
from defuse_core.errors import (
    DataError,
    DefuseError,
    InputError,
    ModelError,
    RunFileError,
    RunMismatchError,
)
from defuse_core.store import FolderStore
from tests.conftest import tiny
from tests.core.debug_arguments import SETTINGS, arguments, biased, digits
from tests.own_classifiers import Net
from tests.services.serving.synthetic_runs import make_run


@pytest.fixture(autouse=True)
def _known_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("defuse_core.suggest.speeds._rate", lambda work: 1000.0)


def settings_of(store: Path, until: type[DefuseError] | None = None, **changes: Any) -> RunFile:
    """Return the run file that a call makes; nothing is computed."""
    with pytest.raises(Exception, match="no place"):
        defuse.debug(**arguments(store, compute=lambda run: 1 / 0 if run is None else stop(), **changes))
    return load_run_file(store / "parts" / "run.yaml")


@pytest.mark.parametrize("dtype", [str, object])  # pandas has texts as objects
def test_a_third_array_names_the_object_that_each_image_shows(tmp_path, dtype):
    images, labels = digits()
    objects = np.array([f"part {i // 4}" for i in range(400)], dtype)
    spec = settings_of(tmp_path, train=(images[:400], labels[:400], objects))
    splits = open_splits(spec.data, 0)
    assert splits.validation is not None and splits.train.tracks is not None
    assert not set(splits.train.tracks) & set(splits.validation.tracks)
    assert len(set(splits.validation.tracks)) == 15


def test_a_third_of_none_is_left_out_and_a_column_is_taken(tmp_path):
    images, labels = digits()
    spec = settings_of(tmp_path, train=(images, labels[:, None], np.arange(len(labels))[:, None] // 4))
    assert open_splits(spec.data, 0).train.tracks is not None
    spec = settings_of(tmp_path, train=(images, labels, None))
    assert open_splits(spec.data, 0).train.tracks is None
    assert NoneType in get_args(get_args(LabelledImages)[0])


@pytest.mark.parametrize(("gpus", "planned_on"), [(0, "cpu"), ("auto", "cuda")])
def test_a_run_without_gpus_is_planned_on_the_cpu(gpus, planned_on, tmp_path, monkeypatch):
    def plan(*_: object) -> None:
        raise RuntimeError(f"planned on {device().type}")

    monkeypatch.setattr("defuse_core.device.can_use_gpu", lambda: True)
    monkeypatch.setattr("defuse_core.api.plan_run", plan)
    with pytest.raises(RuntimeError, match=f"planned on {planned_on}"):
        defuse.debug(**arguments(tmp_path, settings={"resources": {"gpus_per_worker": gpus}}))


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
    assert not any("still apply" in line for line in caplog.messages)
    assert settings_of(tmp_path, settings=first).check.min_scenario_accuracy == 0.123
    assert "still apply although this call omits them: check.min_scenario_accuracy" in caplog.messages[-1]
    for _ in range(2):
        caplog.clear()
        settings_of(tmp_path, settings=first, minutes=60)
        assert "minutes=60 has no effect: the run was planned for 30" in caplog.text


def test_channels_that_a_later_call_leaves_out_hold(tmp_path):
    for settings in ({"data": {"channels": 3}}, None):
        assert settings_of(tmp_path, classifier=None, settings=settings).data.channels == 3
        (tmp_path / "parts" / "models.safetensors").write_bytes(b"made")


FORMS = {
    "uint8 (N, H, W)": (lambda x: x, 1),
    "floats (N, H, W, 1)": (lambda x: x[..., None] / 255, 1),
    "a tensor (N, 1, H, W)": (lambda x: torch.from_numpy(x[:, None] / 255), 1),
    "half floats": (lambda x: torch.from_numpy(x[:, None] / 255).half(), 1),
    "a list of tensors": (lambda x: [torch.from_numpy(each / 255).requires_grad_() for each in x], 1),
    "grey pictures": (lambda x: list(map(Image.fromarray, x)), 1),
    "pairs of a data set": (
        lambda x: next(zip(*TensorDataset(torch.from_numpy(x[:40] / 255)), strict=True)),
        1,
    ),
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


def holding_a_lock() -> nn.Module:
    net = Net()
    net.lock = threading.Lock()  # type: ignore[assignment]
    return net


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
        "expected square images, found 20x16 pixels; pad or resize them",
    ),
    "no minutes": ({"minutes": float("nan")}, InputError, "^minutes: expected 1 to 10,000, found nan"),
    "an empty section": ({"settings": {"data": None}}, RunFileError, "^settings: data: expected a section"),
    "labels that are no numbers": (
        {"train": (np.zeros((20, 16, 16), np.uint8), [torch.zeros(2)] * 19 + [None])},
        DataError,
        "^train: expected images of one size and labels",
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
    "a class named twice": ({"classes": ["a", "b", "a"]}, DataError, "^debug: classes: .* found 'a' 2 times;"),
    "no pair": ({"train": np.zeros((20, 16, 16))}, DataError, r"^train: expected \(images, labels\) .* found ndarray"),
    "a data set": (
        {"train": TensorDataset(torch.rand(20, 16, 16), torch.arange(20) % 2)},
        DataError,
        r"found TensorDataset; of a data set of pairs give tuple\(zip\(\*dataset\)\)",
    ),
    "normalised": (
        {"train": (np.linspace(-1, 3, 20 * 256).reshape(20, 16, 16), np.arange(20) % 2)},
        DataError,
        r"found values from -1 to .*; undo a normalisation \(x \* sd \+ mean\) and let the classifier do it",
    ),
    "objects with gaps": (
        {"train": (np.zeros((4, 16, 16), np.uint8), [0, 1, 0, 1], ["a", math.nan, "b", math.nan])},
        DataError,
        r"train_tracks: expected 4 integers or texts, .* found object \(4,\) with nan; correct them",
    ),
    "four arrays": (
        {"train": (np.zeros((4, 16, 16), np.uint8), [0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 1, 1])},
        DataError,
        r"train: expected \(images, labels\) or \(images, labels, objects\), found tuple",
    ),
    "several sizes": (
        {"train": ([np.zeros((16, 16), np.uint8), np.zeros((16, 12), np.uint8)], [0, 1])},
        DataError,
        "^train: expected images of one size",
    ),
    "pictures of a palette": (
        {"train": ([Image.new("L", (16, 16)), Image.new("P", (16, 16)), Image.new("HSV", (16, 16))], [0, 1, 0])},
        DataError,
        r"^train: expected pictures of mode L or RGB, found HSV, P; convert them with \.convert\('RGB'\)$",
    ),
    "classes as a dict": ({"classes": {"b": 1, "a": 0}}, DataError, "^classes: expected a list .* found dict"),
    "classes as a set": ({"classes": {"a", "b"}}, DataError, "^classes: expected a list of names, found set"),
    "classes as bytes": ({"classes": [b"a", b"b"]}, DataError, r"^debug: classes: .* as text, found \|S1 \(2,\);"),
    "classes as text": ({"classes": "0123456789"}, DataError, "^classes: expected a list of names, found str"),
    "no copy": (
        {"classifier": holding_a_lock()},
        ModelError,
        "cannot be copied .*lock.*; name its factory and its weights in settings instead",
    ),
    "no train": ({"train": None}, DataError, "train: expected"),
    "nothing": ({"train": None, "test": None, "settings": None}, DataError, "found neither"),
    "colours": (
        {"train": (np.zeros((20, 16, 16, 3), np.uint8), np.arange(20) % 2), "test": None},
        ModelError,
        r"fails on images of shape \(8, 3, 16, 16\)",
    ),
    "a frozen classifier": (
        {"classifier": Net().requires_grad_(False)},
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
    "people, but models are asked": (
        {"annotators": lambda run, compute: None},
        InputError,
        "^annotators: given, so set review.annotators: label-studio; found reference-models",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused_in_one_line(case, tmp_path):
    changes, kind, line = BAD[case]
    with pytest.raises(kind, match=line):
        defuse.debug(**{**arguments(tmp_path), **changes})
    assert not list(tmp_path.rglob("models.safetensors"))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"vae": {"epoch": 3}}, "^settings: vae.epoch: unknown field; did you mean vae.epochs"),
        ({"data": {"channels": 2}}, "^settings: data.channels: expected 1 or 3, found 2"),
        ({"review": {"rho": 2}}, "^settings: review.rho: expected less than 1"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_stored(settings, line, tmp_path):
    with pytest.raises(RunFileError, match=line):
        defuse.debug(**arguments(tmp_path, settings=settings))
    assert not list(tmp_path.rglob("inputs"))


def test_a_run_is_opened_from_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=rf"no run called {tmp_path.name} in {tmp_path.parent}"):
        defuse.open(".")


def test_what_a_call_left_that_failed_before_the_run_began_is_replaced(tmp_path):
    images, labels = digits()
    odd = np.pad(images, ((0, 0), (0, 1), (0, 1)))
    with pytest.raises(DataError, match="expected an even height and width"):
        defuse.debug(**arguments(tmp_path, classifier=AnySize(), train=(odd[:400], labels[:400]), test=None))
    assert (tmp_path / "parts" / "inputs" / "classifier.pt2").exists()
    settings_of(tmp_path, classifier=AnySize())


class AnySize(nn.Module):
    """A classifier of images of any size, whose exported program takes those of one size alone."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(images.mean(dim=(2, 3)))


def test_black_bytes_and_white_floats_of_equal_numbers_are_other_images(tmp_path):
    images, labels = digits()
    black = (images > 99).astype(np.uint8)
    settings_of(tmp_path, train=(black, labels))
    assert settings_of(tmp_path, train=(black.astype(np.float32), labels)).data.name == "npz"
    with np.load(tmp_path / "parts" / "inputs" / "images.npz") as stored:
        assert stored["train_images"].dtype == np.float32
    (tmp_path / "parts" / "models.safetensors").write_bytes(b"made")
    with pytest.raises(RunMismatchError, match="the images that this run began with"):
        defuse.debug(**arguments(tmp_path, train=(black, labels)))


def test_a_tilde_in_the_store_is_the_users_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InputError, match=rf"no run called parts in {tmp_path}/runs"):
        defuse.open("~/runs/parts")
    with pytest.raises(InputError, match=rf"no run called parts in {tmp_path}/runs"):
        defuse.open("parts", "~/runs")


class Branching(nn.Module):
    """A classifier whose code depends on the values of its input, which torch.export cannot follow."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        size = int(images.sum().item()) % 3 + 10
        return torch.zeros(len(images), size)[:, :10] + images.mean() * 0


def test_a_classifier_that_torch_cannot_export_is_refused_with_the_other_way(tmp_path, capfd):
    with pytest.raises(ModelError, match=r"import_path, weights"):
        defuse.debug(**arguments(tmp_path, classifier=Branching()))
    assert capfd.readouterr().err == ""  # and without a dump of its graph


@pytest.mark.usefixtures("trusted_torchscript")
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
    with pytest.raises(InputError, match="is not finished"):
        (tmp_path / "digits" / "sweep.safetensors").unlink()
        defuse.open(tmp_path / "digits").corrected()


def test_a_relative_root_is_recorded_as_an_absolute_path_where_the_run_computes_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, labels = digits()
    np.savez("images.npz", train_images=images, train_labels=labels)
    section = {"name": "npz", "root": "images.npz", "image_size": 16, "channels": 1}
    settings = RunFile.model_validate({"data": section})
    with pytest.raises(InputError, match="annotators: given"):  # after the run is recorded
        defuse.debug(settings=settings, store="runs", name="a", annotators=lambda run, compute: None)
    assert load_run_file(Path("runs/a/run.yaml")).data.root == tmp_path / "images.npz"
