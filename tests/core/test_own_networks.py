"""Networks as people build them: outputs of other libraries, hooks, shared weights, rare classes, quantized ones."""

from __future__ import annotations

import collections
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from defuse_core.config import ClassifierSection
from defuse_core.data import Images
from defuse_core.errors import ModelError
from defuse_core.models import is_same_program, load_pretrained, probe_classifier
from defuse_core.models.adapters import adapt, with_stated_range
from defuse_core.models.architectures import import_module
from defuse_core.models.programs import copy_for_inference, load_program, program_of
from tests.own_classifiers import Net, digits, trained

HERE = "tests.core.test_own_networks"
CUSTOM = ClassifierSection(architecture="custom", import_path="a:b")


Output = collections.namedtuple("Output", "logits features")


class WithFeatures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = trained()

    def forward(self, images: torch.Tensor) -> Output:
        return Output(self.net(images), images.flatten(1))


def test_a_program_returns_the_logits_of_an_output_alone():
    images = torch.rand(4, 1, 16, 16)
    program = load_program(program_of(WithFeatures().eval(), images), "net")
    torch.testing.assert_close(program(images), trained()(images))
    assert "net.net.body.0.weight" in program.state_dict()


class Starred(Net):
    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs[0])


WRAPPED = {
    "compiled": lambda: torch.compile(trained(), backend="eager"),
    "parallel": lambda: nn.DataParallel(trained()),
    "compiled, parallel": lambda: torch.compile(nn.DataParallel(trained()), backend="eager"),
    "starred": lambda: Starred().eval(),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_network_is_stored_under_its_own_names_without_a_wrapper_of_torch(name):
    net, images = WRAPPED[name](), digits()
    stored = program_of(net, torch.from_numpy(images.batch(slice(0, 8))))
    program = load_program(stored, "net")
    batch = torch.from_numpy(images.batch(slice(0, 3)))
    torch.testing.assert_close(program(batch), net(batch))
    assert "net.body.0.weight" in program.state_dict()
    assert "body.0.weight" in copy_for_inference(net).state_dict()
    assert is_same_program(net, stored, images)


def test_a_program_of_a_network_of_transformers_is_read_without_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8,
        num_labels=3,
    )  # fmt: skip
    net = transformers.ViTForImageClassification(config).eval()
    (tmp_path / "net.pt2").write_bytes(program_of(net, torch.rand(4, 3, 16, 16)))
    code = (
        "import sys, torch; from pathlib import Path; from defuse_core.models.programs import load_program; "
        "print(tuple(load_program(Path('net.pt2').read_bytes(), 'net')(torch.rand(3, 3, 16, 16)).shape), "
        "'transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "(3, 3) False", done.stderr


@pytest.mark.parametrize(
    ("stated", "found", "noted"),
    [
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, "-1..1", "input_range is set to -1..1, as"),
        (
            {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
            "imagenet",
            "set to imagenet",
        ),
        (
            {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]},
            None,
            "states mean [0.48, 0.46, 0.41]",
        ),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": False}, None, ""),
        ({"image_mean": "much"}, None, ""),
        ({"image_mean": None, "image_std": None}, None, ""),
        ({"image_mean": [10**400], "image_std": [1]}, None, ""),
    ],
)
def test_the_input_range_that_a_folder_of_hugging_face_states_is_used(stated, found, noted, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    own: dict[str, object] = {"architecture": "transformers", "weights": str(tmp_path)}
    section, notes = with_stated_range(own)
    assert section is not None and section.get("input_range") == found
    assert noted in "".join(notes) and bool(notes) == bool(noted)
    assert with_stated_range({**own, "input_range": "0..1"}) == ({**own, "input_range": "0..1"}, [])


def test_a_hook_of_the_classifier_is_part_of_it():
    net = trained()
    net.register_forward_pre_hook(lambda _module, arguments: (1 - arguments[0],))
    images = digits()
    images = Images(255 - images.pixels[:], images.labels)
    probe = probe_classifier(adapt(net, CUSTOM, 10), CUSTOM, images, list("0123456789"))
    assert probe.by_range["0..1"] > 0.95
    assert len(net._forward_hooks) == 1  # that of adapt is back


def test_an_input_range_is_applied_before_a_hook_of_the_classifier():
    net, seen = nn.Sequential(nn.Flatten()), []
    net.register_forward_pre_hook(lambda _module, arguments: seen.append(float(arguments[0].min())))
    adapt(net, CUSTOM.model_copy(update={"input_range": "-1..1"}), 4)(torch.zeros(2, 1, 2, 2))
    assert seen == [-1.0]


def test_an_order_of_the_classes_is_not_certain_where_two_classes_have_no_image():
    order = torch.tensor([2, 0, 1, 4, 3, 6, 5, 7, 8, 9])

    class Shifted(nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            answers = order[(pixels.flatten() * 255).round().clamp(0, 9).long()]
            return nn.functional.one_hot(answers, 10).float()

    for rare, certain in (([], False), ([8], True), ([8, 9], True)):  # which an even sample misses
        labels = np.concatenate([[0], np.repeat(rare, 2).astype(int), np.repeat(np.arange(8), 800)])
        images = Images(labels.astype(np.uint8).reshape(-1, 1, 1, 1), labels)
        probe = probe_classifier(adapt(Shifted(), CUSTOM, 10), CUSTOM, images, list("abcdefghij"))
        assert probe.class_order == tuple(order.tolist())
        assert probe.order_is_certain is certain


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        self.head = self.net[1]


def test_weights_that_save_model_wrote_are_complete_where_names_share_a_tensor(tmp_path):
    saved, net = Shared(), Shared()
    save_model(saved, tmp_path / "net.safetensors")
    load_pretrained(net, tmp_path / "net.safetensors", trained_on=False)
    torch.testing.assert_close(dict(net.state_dict()), dict(saved.state_dict()))


def test_the_prefix_of_a_lightning_module_is_left_out(tmp_path):
    saved, net = nn.Linear(12, 3), nn.Linear(12, 3)
    save_file(
        {f"model.{name}": tensor for name, tensor in saved.state_dict().items()}, tmp_path / "net.safetensors"
    )
    load_pretrained(net, tmp_path / "net.safetensors", trained_on=False)
    torch.testing.assert_close(net.weight, saved.weight)


def test_weights_of_other_names_are_refused_with_some_of_them(tmp_path):
    save_file(dict(nn.Linear(12, 3).state_dict()), tmp_path / "net.safetensors")
    with pytest.raises(ModelError, match=r"the weights lack 1\.weight \(they have bias, weight\)"):
        load_pretrained(
            nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), Path(tmp_path / "net.safetensors"), False
        )


class Extra(nn.Linear):
    def __init__(self) -> None:
        super().__init__(12, 3)

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}


def dynamic() -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    return torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Extra", "dynamic"])
def test_a_network_with_values_in_its_state_that_are_no_tensors_is_refused(name):
    with pytest.raises(
        ModelError, match=r"own_networks:\w+: its state dict has .*, which is no plain tensor; .* quantiz"
    ):
        import_module("classifier.import_path", f"{HERE}:{name}")
