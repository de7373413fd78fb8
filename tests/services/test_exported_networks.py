"""The corrected classifier as a file for other tools: on which devices it runs, and what the file says of it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from defuse_core.data import open_splits
from defuse_core.export import ClassifierForExport, _traced, export_model
from defuse_core.models import SelfContainedClassifier
from defuse_core.models.adapters import adapt
from defuse_core.store import FolderStore
from tests.conftest import ROOT, tiny
from tests.own_classifiers import IMAGENET, trained
from tests.services.serving.synthetic_runs import make_run
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
