"""A classifier that fails on images says why, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from defuse_core.errors import ModelError
from defuse_core.models import check_outputs, expect_trainable
from defuse_core.models.adapters import adapt, classifier_failure, failure_line
from defuse_core.models.architectures import import_module
from defuse_core.models.programs import load_program, program_of
from tests.conftest import tiny
from tests.own_classifiers import digits, trained

IMAGES = torch.zeros(2, 1, 8, 8)


def net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


class FixedBatch(nn.Module):
    """A network whose code names the number of images."""

    def __init__(self, images: int) -> None:
        super().__init__()
        self.images, self.layer = images, nn.Linear(64, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layer(images.view(self.images, 64))
        return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_parameters_of_other_floats_than_float32_are_named_with_the_conversion(dtype: torch.dtype):
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(
        ModelError, match=rf"parameters of {name}, and images are float32: convert it with \.float\(\)$"
    ):
        program_of(net().to(dtype), IMAGES)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (
            "no_package.nets:build",
            "cannot import no_package; run defuse in the folder that contains it, or set PYTHON",
        ),
        ("tests.no_nets:build", "cannot import tests.no_nets; run defuse in the folder"),
        ("tests.own_classifiers:buld", "module tests.own_classifiers has no function buld$"),
        ("needing:build", "calling it failed .*No module named 'no_dependency'"),
    ],
)
def test_a_factory_that_is_not_found_is_told_from_one_whose_code_fails(
    path: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "needing.py").write_text("import no_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match=f"^classifier.import_path {path}: {line}"):
        import_module("classifier.import_path", path)


@pytest.mark.parametrize("size", [1, 2])
def test_a_network_for_batches_of_one_size_is_told_from_one_for_other_images(size: int):
    expected = f"it answers a batch of {size} images?, so let it accept batches of any size"
    with pytest.raises(ModelError, match=expected):
        program_of(FixedBatch(size), torch.zeros(8, 1, 8, 8))
    with pytest.raises(ModelError, match="; check the size and the channels of the images"):
        program_of(FixedBatch(7), torch.zeros(8, 3, 8, 8))


def test_an_error_of_torchscript_is_its_last_line():
    scripted = torch.jit.script(net())
    images = torch.zeros(2, 3, 8, 8)
    with pytest.raises(RuntimeError) as raised:
        scripted(images)
    assert "serialized code" in str(raised.value) or "TorchScript" in str(raised.value)
    line = str(classifier_failure(scripted, images, raised.value))
    assert line.startswith("the classifier fails on images of shape (2, 3, 8, 8): RuntimeError: ")
    assert "mat1 and mat2 shapes cannot be multiplied" in line
    assert "Traceback" not in line and "serialized code" not in line and "TorchScript" not in line


def test_the_remedy_is_the_callers_where_no_cause_is_found():
    line = failure_line(net(), torch.zeros(2, 3, 8, 8), ValueError("my  own\nwords"), "look at it")
    assert line == "the classifier fails on images of shape (2, 3, 8, 8): my own words; look at it"


def test_an_error_without_words_is_named_by_its_type():
    line = failure_line(net(), torch.zeros(2, 3, 8, 8), MemoryError(), "look at it")
    assert line.endswith(" (2, 3, 8, 8): MemoryError; look at it")


@pytest.mark.usefixtures("trusted_torchscript")
def test_a_frozen_script_is_told_to_be_saved_without_freezing(tmp_path: Path):
    torch.jit.freeze(torch.jit.script(trained().eval())).save(tmp_path / "net.pt")
    frozen = load_program((tmp_path / "net.pt").read_bytes(), "net.pt")
    with pytest.raises(ModelError, match=r"it has none at all; save it without torch\.jit\.freeze"):
        expect_trainable(adapt(frozen, tiny().classifier, 10), digits())


def test_logits_of_a_map_of_one_pixel_are_to_be_flattened():
    section = tiny(
        classifier={"architecture": "custom", "import_path": "tests.own_classifiers:trained"}
    ).classifier
    convolutional = nn.Sequential(nn.Conv2d(1, 10, 16))
    with pytest.raises(ModelError, match=r"found \(\d+, 10, 1, 1\); return logits\.flatten\(1\)$"):
        check_outputs(adapt(convolutional, section, 10), section, digits(), 10)
