"""The corrected classifier as a file for other tools: on which devices it runs, and what the file says of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from defuse_core import export
from defuse_core.data import open_splits
from defuse_core.errors import InputError
from defuse_core.export import ClassifierForExport, _traced, export_model
from defuse_core.export.suite import save_suite
from defuse_core.models import SelfContainedClassifier
from defuse_core.models.adapters import adapt
from defuse_core.store import FolderStore
from tests.command_line import call, one_line
from tests.conftest import ROOT, tiny
from tests.own_classifiers import IMAGENET, trained
from tests.services.serving.synthetic_runs import make_run
from tests.services.suite_runs import NET
from tests.services.test_export import opened


@pytest.mark.parametrize(
    "own",
    [
        {"architecture": "custom", "import_path": "nets:build"},
        {"architecture": "program", "weights": "net.pt2", "epochs": 0},
    ],
)
def test_an_exported_network_of_ones_own_runs_on_another_device(own):
    """The pixel range and the order of the classes are part of it, and move with it."""
    fields = {"input_range": "imagenet", "outputs": "probabilities", "class_order": [*range(1, 10), 0]}
    section = tiny(classifier={**own, **fields}).classifier
    net = trained(*IMAGENET)
    net = adapt(SelfContainedClassifier(net, b"net") if "weights" in own else net, section, 10)
    images = torch.rand(3, 1, 16, 16)
    exported = _traced(ClassifierForExport(net.eval(), section), images[:2]).module()
    torch.testing.assert_close(exported(images), net(images))
    assert exported.to("meta")(images.to("meta")).device.type == "meta"


def test_an_exported_network_of_images_in_0_to_1_has_no_other_constants_than_its_own():
    own = trained().state_dict()
    exported = ClassifierForExport(trained(), tiny().classifier).state_dict()
    assert exported.keys() == {f"net.{name}" for name in own}


def test_a_classifier_is_exported_from_the_cpu_beside_a_gpu(store, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert export_model(opened(store), tmp_path / "model.safetensors").difference == 0.0


@pytest.mark.parametrize("suffix", [".safetensors", ".pt2", ".onnx"])
def test_every_file_names_the_classes_and_the_size_of_the_images(suffix, store, tmp_path):
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
    path = tmp_path / f"model{suffix}"
    export_model(opened(store), path)
    if suffix == ".safetensors":
        with safe_open(path, "np") as file:
            facts = file.metadata()
    elif suffix == ".pt2":
        extra = {"defuse.json": ""}
        torch.export.load(path, extra_files=extra)
        facts = json.loads(extra["defuse.json"])
    else:
        import onnxruntime

        facts = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    assert (facts["run"], facts["channels"], facts["image_size"]) == ("digits", "1", "16")
    assert json.loads(facts["classes"]) == [str(digit) for digit in range(10)]


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_no_file_has_the_paths_and_the_source_of_the_users_code(suffix, tiny_models, tmp_path):
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
    spec = tiny(classifier={"architecture": "custom", "import_path": "tests.own_classifiers:Scaled"})
    weights = {name: tensor.numpy() for name, tensor in trained().state_dict().items()}
    weights["scale"] = np.array(1.0, np.float32)
    splits = open_splits(spec.data, spec.seed)
    models = dataclasses.replace(tiny_models, classifier=weights)
    run = make_run(FolderStore(tmp_path / "runs"), "own", spec, models, splits, weights)
    export_model(run, path := tmp_path / f"model{suffix}")
    data = path.read_bytes()
    for told in ("own_classifiers.py", str(ROOT), "super().forward(images)"):
        assert told.encode() not in data


@pytest.mark.parametrize("suffix", [".safetensors", ".pt2"])
def test_a_suite_refuses_an_exported_file_that_names_its_classes_in_another_order(
    suffix, store, tmp_path, monkeypatch, capsys
):
    save_suite(run := opened(store), tmp_path / "suite")
    export_model(run, path := tmp_path / f"model{suffix}")
    own = ["--classifier", path] if suffix == ".pt2" else ["--classifier", NET, "--weights", path]
    words = ["check", "--suite", tmp_path / "suite", *own]
    assert call(monkeypatch, capsys, *words)[0] in (0, 1)
    turned = json.dumps([*"013456789", "2"])
    monkeypatch.setattr(export, "_facts", lambda *_: {"classes": turned})
    export_model(run, path)
    code, _, err = call(monkeypatch, capsys, *words)
    assert code == 2
    told = f"{path}: expected the classes of the suite (run digits), in their order; its class 2 is 3, expected 2"
    assert told in one_line(err)
    assert one_line(err).endswith("set classifier.class_order to the index of each class's output")
    ordered = "classifier.class_order=[0,1,2,3,4,5,6,7,8,9]"
    assert call(monkeypatch, capsys, *words, "--set", ordered)[0] in (0, 1)
    monkeypatch.setattr(export, "_facts", lambda *_: {"classes": json.dumps([*"01234567"])})
    export_model(run, path)
    code, _, err = call(monkeypatch, capsys, *words)
    assert code == 2 and "; 8, 9 only in the suite (run digits); a classifier of" in one_line(err)
    assert "None" not in err


@pytest.mark.parametrize(
    ("stated", "refused"),
    [('["1", "0"]', True), ('"10"', False), ('{"1": 0, "0": 1}', False), ("[1, 0]", False)],
)
def test_only_a_list_of_texts_names_the_classes_of_a_file(stated, refused, tmp_path):
    path = tmp_path / "own.safetensors"
    save_file({"weight": np.zeros(1)}, path, metadata={"classes": stated})
    section = tiny(classifier={"weights": str(path)}).classifier
    with pytest.raises(InputError, match="its class 0 is 1") if refused else contextlib.nullcontext():
        export.expect_stated_classes(section, torch.nn.Module(), ("0", "1"), "the suite")


@pytest.mark.parametrize(
    ("names", "refused"), [("0123456789", False), ("0123456798", True), ("abcdefghij", False)]
)
def test_names_of_hugging_faces_count_where_some_are_those_of_the_suite(names: str, refused: bool):
    config = SimpleNamespace(id2label=dict(enumerate(names)))
    net = torch.nn.Module()
    net.net = torch.nn.Module()
    net.net.config = config
    section = tiny().classifier
    with (
        pytest.raises(InputError, match="its class 8 is 9, expected 8")
        if refused
        else contextlib.nullcontext()
    ):
        export.expect_stated_classes(section, net, tuple("0123456789"), "the suite")
