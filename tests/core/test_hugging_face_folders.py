"""Hugging Face folders: answers as of the library, and nothing but config.json and .safetensors files is read."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from defuse_core.errors import ModelError
from defuse_core.models import load_classifier
from defuse_core.models.adapters import with_stated_range
from defuse_core.models.programs import class_names_of, open_transformers, transformers_from
from tests.conftest import tiny, trained_models
from tests.own_classifiers import digits


def save_vit(folder: Path, names: dict[int, str] | None = None) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4,
        num_channels=1, num_labels=10, **({"id2label": names} if names else {}),
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    return folder


def test_a_folder_of_transformers_answers_as_the_library_does_and_needs_no_file_afterwards(tmp_path, caplog):
    caplog.set_level("INFO")
    folder = save_vit(tmp_path / "vit", {i: str(9 - i) for i in range(10)})
    spec = tiny(
        classifier={"architecture": "transformers", "weights": str(folder), "epochs": 0}, vae={"epochs": 1}
    )
    models = trained_models(spec)
    assert "the classifier returns more than logits; used: .logits" in caplog.text
    original = open_transformers(folder).eval()
    for file in folder.iterdir():
        file.unlink()
    images = digits()
    batch = torch.from_numpy(images.batch(slice(0, 50)))
    ours = load_classifier(spec, models.classifier, 10)(batch)
    torch.testing.assert_close(ours, original(batch).logits)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder beside a pickle that makes a folder in the current one."""
    monkeypatch.chdir(tmp_path)
    Path("bomb.bin").write_bytes(pickle.dumps(Bomb()))
    return save_vit(tmp_path / "vit")


TIMM = {"model_type": "timm_wrapper", "architecture": "resnet10t", "num_classes": 10}


@pytest.mark.parametrize(
    ("added", "found"),
    [
        ({"auto_map": {"AutoConfig": "own.Config"}}, "'own.Config' for AutoConfig"),
        ({"configuration_files": ["config.4.0.0.json"]}, "'config.4.0.0.json' for configuration_files"),
        ({"transformers_weights": "adapter_model.bin"}, "'adapter_model.bin' for transformers_weights"),
        ({"attn_implementation": "someone/kernel"}, "'someone/kernel' for attn_implementation"),
        ({"quantization_config": {"quant_method": "x"}}, "'x' for quant_method"),
        (TIMM | {"model_args": {"checkpoint_path": "bomb.bin"}}, "'bomb.bin' for checkpoint_path"),
        (TIMM | {"model_args": {"pretrained_cfg": {"file": "bomb.bin"}}}, "'bomb.bin' for file"),
        (TIMM | {"architecture": "local-dir:vit"}, "'local-dir:vit' for architecture"),
        (TIMM | {"architecture": "hf-hub:timm/resnet18"}, "'hf-hub:timm/resnet18' for architecture"),
        (
            TIMM
            | {
                "attribute_map": {"label_names": "model_args"},
                "label_names": {"checkpoint_path": "bomb.bin"},
            },
            "'attribute_map' for a key",
        ),
        ({"per_layer_config": {"0": {"id2label": {"0": "../bomb"}}}}, r"'\.\./bomb' for id2label"),
        ({"rope_parameters": {"../bomb": 1}}, "'../bomb' for a key"),
    ],
)
def test_no_configuration_names_a_file_a_download_or_code(added, found, folder):
    changed = json.dumps(json.loads((folder / "config.json").read_text()) | added).encode()
    (folder / "config.json").write_bytes(changed)
    for make in (lambda: open_transformers(folder), lambda: transformers_from(changed, "the run")):
        with pytest.raises(ModelError, match=f"its config.json has {found}, which could name a file"):
            make()
    assert not Path("exploded").exists()


def test_what_a_configuration_only_shows_is_not_given_to_the_library_and_old_nested_labels_are_accepted(
    folder,
):
    of_labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "_name_or_path": ""}
    names = {"0": "a/b: c", "1": "../d"}
    added = {"_name_or_path": "/home/x", "label_descriptions": {"a": "b/c"}, "text_config": of_labels}
    config = json.loads((folder / "config.json").read_text()) | added | {"id2label": names}
    net = transformers_from(json.dumps(config).encode(), "the run")
    assert class_names_of(net) == ("a/b: c", "../d")
    assert net.net.config._name_or_path != "/home/x" and net.net.config.label_descriptions == {}


@pytest.mark.parametrize(("key", "number"), [("num_labels", 10**6 + 1), ("num_hidden_layers", 1001)])
def test_a_configuration_of_a_network_without_end_is_refused(key, number, folder):
    changed = json.loads((folder / "config.json").read_text()) | {key: number}
    with pytest.raises(ModelError, match=f"has {number} for {key}, expected at most"):
        transformers_from(json.dumps(changed).encode(), "the run")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_a_pipe_or_a_device_in_place_of_a_file_is_neither_waited_for_nor_read(name, make, folder):
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    if name == "preprocessor_config.json":
        section = {"architecture": "transformers", "weights": str(folder)}
        assert with_stated_range(section) == (section, [])
        return
    with pytest.raises(ModelError, match=r"found a pipe, a device|with a readable config\.json"):
        open_transformers(folder)


def test_files_beside_the_configuration_and_the_weights_are_not_read(folder):
    original = open_transformers(folder).state_dict()
    for name in (
        "adapter_config.json",
        "config.4.0.0.json",
        "model.safetensors.index.json",
        "adapter_model.bin",
    ):
        (folder / name).write_text("{")
    torch.testing.assert_close(open_transformers(folder).state_dict(), original)


def test_weights_in_parts_are_read_from_the_folder_alone(folder):
    original = open_transformers(folder).state_dict()
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for at, name in enumerate(weights, 1):
        part = f"model-{at:05}-of-{len(weights):05}.safetensors"
        save_file({name: weights[name]}, folder / part, metadata={"format": "pt"})
    places = dict.fromkeys(weights, "../bomb.bin")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    torch.testing.assert_close(open_transformers(folder).state_dict(), original)


def test_a_folder_without_safetensors_or_configuration_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"expected weights in model\.safetensors, .*found none"):
        open_transformers(folder)
    with pytest.raises(ModelError, match=r"with a readable config\.json"):
        open_transformers(Path("nowhere"))


@pytest.mark.parametrize("saved_by", ["timm", "transformers"])
def test_a_folder_of_timms_is_rebuilt_from_its_configuration_as_it_was_opened(saved_by, tmp_path):
    timm, _ = pytest.importorskip("timm"), pytest.importorskip("transformers")
    net = timm.create_model("resnet10t", num_classes=5)
    timm.models._hub.save_for_hf(net, tmp_path / "timm", safe_serialization=True)
    config = json.loads((tmp_path / "timm/config.json").read_text())
    config["model_args"] = {"drop_rate": 0.25}
    (tmp_path / "timm/config.json").write_text(json.dumps(config))
    opened = open_transformers(tmp_path / "timm")
    if saved_by == "transformers":
        opened.net.save_pretrained(tmp_path / "again")
        opened = open_transformers(tmp_path / "again")
    rebuilt = transformers_from(opened.source.numpy().tobytes(), "the run")
    shapes = [
        {name: tensor.shape for name, tensor in each.state_dict().items()} for each in (opened, rebuilt)
    ]
    assert shapes[0] == shapes[1]
    assert rebuilt.net.timm_model.drop_rate == 0.25
