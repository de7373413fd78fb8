"""A user's classifier is checked before anything is trained: what it returns, and whether it can be fine-tuned."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import defuse_core
from defuse_core.config import ClassifierSection
from defuse_core.errors import ModelError
from defuse_core.models import (
    check_outputs,
    expect_trainable,
    predict_logits,
    predict_probabilities,
    probe_classifier,
    to_device,
)
from defuse_core.models.adapters import TWO_OF_ONE_LOGIT_BY_HOOK, TWO_OF_ONE_OUTPUT_BY_HOOK, adapt
from defuse_core.models.programs import load_program, program_of
from defuse_core.protocols import silent
from defuse_core.train import initial_classifier
from defuse_core.training.reference_models import train_reference
from defuse_core.training.train_vae import initial_vae
from tests.conftest import tiny
from tests.own_classifiers import ChangingItsInput, Net, Returning, digits, trained

CUSTOM = {"architecture": "custom", "import_path": "tests.own_classifiers:plain"}
HERE = "tests.core.test_classifier_checks"


def section(**fields: object) -> ClassifierSection:
    return ClassifierSection.model_validate({**CUSTOM, **fields})


class Switching(nn.Module):
    """Computes gradients in some modes alone."""

    def __init__(self, training: bool, evaluated: bool) -> None:
        super().__init__()
        self.by_mode = {True: training, False: evaluated}
        self.net = nn.Sequential(nn.BatchNorm2d(1), trained())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(self.by_mode[self.training]):
            return self.net(images)


class Unlinked(nn.Module):
    """Computes with its weights as numpy has them, which inference mode allows and gradients do not."""

    def __init__(self) -> None:
        super().__init__()
        self.net = trained()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.net(images).numpy())


class Detaching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = trained()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images).detach()


def as_program(net: nn.Module) -> nn.Module:
    return load_program(program_of(net, torch.rand(2, 1, 16, 16)), "net")


UNREACHED = [
    lambda: Switching(False, False),
    lambda: as_program(Detaching()),
    lambda: as_program(torch.jit.script(Detaching())),
]


@pytest.mark.usefixtures("trusted_torchscript")
@pytest.mark.parametrize("build", UNREACHED)
def test_a_classifier_whose_logits_reach_no_parameter_is_refused(build):
    adapted = adapt(build(), section(), 10)
    check_outputs(adapted, section(), digits(), 10)
    with pytest.raises(ModelError, match="expected a gradient from its logits .* remove torch.no_grad"):
        expect_trainable(adapted, digits())


def test_a_classifier_that_fails_where_gradients_are_computed_is_refused_with_its_reason():
    adapted = adapt(Unlinked(), section(), 10)
    check_outputs(adapted, section(), digits(), 10)
    with pytest.raises(ModelError, match="cannot be fine-tuned, .* Can't call numpy"):
        expect_trainable(adapted, digits())


@pytest.mark.parametrize("evaluated", [False, True])
def test_gradients_in_one_mode_are_enough_and_the_check_leaves_no_trace(evaluated):
    net = adapt(Switching(not evaluated, evaluated), section(), 10)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    expect_trainable(net, digits())
    assert not net.training
    torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)


@pytest.mark.usefixtures("trusted_torchscript")
@pytest.mark.parametrize("build", [trained, lambda: torch.jit.script(trained())])
def test_programs_are_trainable(build):
    expect_trainable(adapt(as_program(build()), section(), 10), digits())


def test_a_classifier_that_changes_its_input_is_told_so_and_the_images_stay():
    images = digits()
    before = images.batch(slice(0, 8)).copy()
    with pytest.raises(ModelError, match="changes the images that it is given, .* begin with x = x.clone"):
        check_outputs(adapt(ChangingItsInput(), section(), 10), section(), images, 10)
    np.testing.assert_array_equal(images.batch(slice(0, 8)), before)
    scaled = section(input_range="-1..1")  # what it changes then is a copy
    check_outputs(adapt(ChangingItsInput(), scaled, 10), scaled, images, 10)


@pytest.mark.parametrize("rows", [4, 8])
def test_fewer_rows_than_images_are_an_error_that_says_so(rows):
    net = adapt(Returning(lambda logits: logits[:rows]), section(), 10)
    with pytest.raises(ModelError, match="let it return one"):
        check_outputs(net, section(), digits(), 10)
        probe_classifier(net, section(), digits(), list("0123456789"))


def test_a_classifier_that_drops_the_batch_of_one_image_is_told_what_to_use():
    net = adapt(Returning(torch.squeeze), section(), 10)
    with pytest.raises(
        ModelError, match=r"\(1, 10\) \(images, classes\), found \(10,\); squeeze\(\) drops the batch"
    ):
        check_outputs(net, section(), digits(), 10)


class FeaturesInTraining(Net):
    """Returns its features first where it is trained, as code for metric learning does."""

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        features = self.body[:-1](images)
        return (features, self.body[-1](features)) if self.training else self.body[-1](features)


class LabelsInTraining(Net):
    """Asks for the labels where it is trained, as ArcFace does."""

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = super().forward(images)
        return logits + nn.functional.one_hot(labels, 10) if self.training else logits


@pytest.mark.parametrize(
    ("build", "line"),
    [
        (
            FeaturesInTraining,
            r"expected logits of shape \(2, 10\) also in train mode, .*, found \(2, 1024\); let its",
        ),
        (LabelsInTraining, r"fails in train mode, .*: one_hot\(\).*; let its forward take images alone"),
    ],
)
def test_a_classifier_that_does_something_else_in_train_mode_is_refused_and_stays_as_it_was(build, line):
    net = adapt(build(), section(), 10)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    check_outputs(net, section(), digits(), 10)
    with pytest.raises(ModelError, match=line):
        expect_trainable(net, digits())
    assert not net.training
    torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)


def test_the_check_of_train_mode_draws_no_random_number_of_the_caller():
    net = adapt(trained(), section(), 10)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    expect_trainable(net, digits())
    assert torch.equal(torch.rand(3), expected)


class Casting(Net):
    """Computes in the type of its weights, and returns float32."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.to(self.body[-1].weight.dtype)).float()


class Rounding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(256, 10)

    def forward(self, images: Tensor) -> Tensor:
        return (100 * self.head(images.flatten(1))).round().long()


def test_whole_numbers_as_logits_are_refused_in_one_line():
    network = adapt(Rounding(), section(), 10)
    check_outputs(network, section(), digits(), 10)
    with pytest.raises(ModelError, match="rounding from its forward"):
        expect_trainable(network, digits())


def casting_bfloat16() -> nn.Module:
    return Casting().bfloat16()


def casting_float16() -> nn.Module:
    return Casting().half()


SMALL = {"bfloat16": casting_bfloat16, "float16": casting_float16}


@pytest.mark.parametrize("dtype", SMALL)
def test_weights_of_16_bits_are_refused_before_anything_is_trained(dtype):
    own = {"architecture": "custom", "import_path": f"{HERE}:casting_{dtype}"}
    line = rf"has weights of {dtype}, expected float32: convert it with \.float\(\)$"
    check_outputs(adapt(SMALL[dtype](), section(), 10), section(), digits(), 10)
    with pytest.raises(ModelError, match=f"^the classifier {line}"):
        initial_classifier(tiny(classifier=own), digits(), 10)
    with pytest.raises(ModelError, match=rf"^review\.reference\.import_path: the model {line}"):
        train_reference(tiny(review={"reference": own}), "reference", digits(), 10, 0, silent)
    as_it_is = tiny(review={"reference": own | {"epochs": 0, "count": 1}})
    if dtype == "float16":  # can be stored, and is not trained
        assert not train_reference(as_it_is, "reference", digits(), 10, 0, silent).training
    else:
        with pytest.raises(ModelError, match=line):
            train_reference(as_it_is, "reference", digits(), 10, 0, silent)
    vae = tiny(vae={"architecture": "custom", "import_path": f"{HERE}:vae_of_{dtype}"})
    with pytest.raises(ModelError, match=f"^the β-VAE {line}"):
        initial_vae(vae, digits())


class CastingVae(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(256, 8), nn.Linear(4, 256)

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.down(images.flatten(1).to(self.down.weight.dtype)).float().chunk(2, dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        return torch.sigmoid(self.up(codes.to(self.up.weight.dtype)).float()).view(-1, 1, 16, 16)


def vae_of_bfloat16() -> nn.Module:
    return CastingVae().bfloat16()


def vae_of_float16() -> nn.Module:
    return CastingVae().half()


class Autocasting(Net):
    """Computes in bfloat16 by itself, and so returns it."""

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, dtype=torch.bfloat16):
            return super().forward(images)


def test_logits_of_bfloat16_are_taken_as_they_are():
    net = Autocasting()
    net.load_state_dict(trained().state_dict())
    images = digits()
    with torch.no_grad():
        own = to_device(net).eval()(torch.from_numpy(images.batch(slice(0, 64))))
    assert own.dtype == torch.bfloat16
    np.testing.assert_allclose(predict_probabilities(net, images).sum(axis=1), 1, rtol=1e-5)
    for taken in (as_program(net), net):  # a program computes in bfloat16, too
        adapted = adapt(taken, section(), 10)
        check_outputs(adapted, section(), images, 10)
        expect_trainable(adapted, images)
        probe = probe_classifier(adapted, section(), images, list("0123456789"))
        assert probe.by_range["0..1"] > 0.9
        found = predict_logits(adapted, images)[:64]
        np.testing.assert_allclose(found, own.float().cpu(), rtol=0.05, atol=0.05)


class Keeping(Net):
    """Makes a grid at its first call and keeps it."""

    grid: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        maps = self.body[:3](images)
        if self.grid is None:
            self.grid = torch.linspace(0.5, 1, maps.shape[-1], device=maps.device)
        return self.body[3:](maps * self.grid)


@pytest.mark.parametrize("first", [lambda net: None, lambda net: predict_logits(net.eval(), digits())])
def test_a_network_that_keeps_a_tensor_from_its_first_call_is_trainable(first: Callable[[nn.Module], object]):
    net = adapt(Keeping(), section(), 10)
    first(net)
    check_outputs(net, section(), digits(), 10)
    expect_trainable(net, digits())


def test_a_network_that_keeps_a_tensor_from_its_first_call_is_exported():
    net = Keeping().eval()
    images = torch.rand(4, 1, 16, 16)
    program = load_program(program_of(net, images), "net")
    torch.testing.assert_close(program(images), net(images))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_may_depend_on_the_batch_by_the_rounding_of_their_own_numbers(dtype):
    net = Returning(lambda logits: (logits * (1 + 0.004 * (len(logits) % 2))).to(dtype))
    refused = pytest.raises(ModelError, match="depend on the image alone")
    with nullcontext() if dtype == torch.bfloat16 else refused:
        check_outputs(adapt(net, section(), 10), section(), digits(), 10)


@pytest.mark.parametrize(("classes", "flat"), [(2, False), (2, True), (3, False)])
def test_a_single_logit_for_two_classes_is_refused_with_what_to_return(classes, flat):
    head = [nn.Flatten(), nn.Linear(256, 1), *([nn.Flatten(0)] if flat else [])]
    with pytest.raises(ModelError, match="expected logits of shape") as refused:
        check_outputs(adapt(nn.Sequential(*head), section(), classes), section(), digits(), classes)
    advice = "for one logit z of shape (images, 1) return torch.cat([torch.zeros_like(z), z], 1)"
    assert (advice in str(refused.value)) == (classes == 2)
    z = torch.randn(5, 1)
    two = torch.cat([torch.zeros_like(z), z], 1)
    torch.testing.assert_close(two.softmax(1)[:, 1:], z.sigmoid())


def test_where_the_code_is_not_the_users_own_a_hook_gives_the_second_logit():
    folder = ClassifierSection.model_validate(
        {"architecture": "transformers", "weights": "folder", "epochs": 0}
    )
    net = nn.Sequential(nn.Flatten(), nn.Linear(256, 1))
    with pytest.raises(ModelError, match=r"\(2, 1\); with architecture: custom, let a func") as refused:
        check_outputs(adapt(net, folder, 2), folder, digits(), 2)
    assert "return torch" not in str(refused.value)
    assert TWO_OF_ONE_OUTPUT_BY_HOOK in str(refused.value)


class InObject(nn.Sequential):
    """Returns its logits as models of Hugging Face do."""

    def forward(self, images):
        return SimpleNamespace(logits=super().forward(images))


@pytest.mark.parametrize(
    ("made", "advice"), [(nn.Sequential, TWO_OF_ONE_LOGIT_BY_HOOK), (InObject, TWO_OF_ONE_OUTPUT_BY_HOOK)]
)
def test_the_hook_that_is_advised_for_a_single_logit_gives_two_and_keeps_the_names_in_the_file(made, advice):
    net = made(nn.Flatten(), nn.Linear(256, 1))
    names = [*net.state_dict()]
    code = advice[advice.index("net.register") :]
    assert code in (Path(defuse_core.__file__).with_name("README.md")).read_text(encoding="utf-8")
    eval(code, {"net": net, "torch": torch})
    check_outputs(adapt(net, section(), 2), section(), digits(), 2)
    assert [*net.state_dict()] == names
