"""What `defuse init` makes of classifiers of the user's own that need another look."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from defuse_core.suggest.speeds import Speeds
from tests.command_line import call, one_line
from tests.own_classifiers import digits, trained

HERE = "tests.services.test_init_classifiers"


@pytest.fixture(autouse=True)
def _digits_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("defuse_core.suggest.plan.measure_speeds", lambda *_: Speeds(1e3, 1e3, 1e3, 1e3))
    monkeypatch.chdir(tmp_path)
    images = digits()
    np.savez("digits.npz", train_images=images.pixels[:, 0], train_labels=images.labels)


class Rolled(nn.Module):
    """Numbers the classes differently, and expects pixels from 0 to 255."""

    def __init__(self) -> None:
        super().__init__()
        self.net = trained(0.0, 1 / 255)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images).roll(3, dims=1)


class RolledSigmoid(Rolled):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images).sigmoid()


class Dividing(nn.Module):
    """Divides by the spread of each image, which is 0 of an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = trained()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        spread = images.std((1, 2, 3))[:, None]
        return self.net(images) * spread / spread


def test_images_for_which_a_classifier_returns_nan_are_counted(monkeypatch, capsys):
    torch.save(Dividing().state_dict(), "own.pth")
    images = digits().pixels[:, 0] * (np.arange(len(digits())) % 60 != 9)[:, None, None]
    np.savez("digits.npz", train_images=images, train_labels=digits().labels)
    own = ["--classifier", f"{HERE}:Dividing", "--weights", "own.pth"]
    code, out, err = call(monkeypatch, capsys, "init", "digits.npz", *own)
    assert code == 0, err
    assert "a run would end with an error: a classifier returns nan for 5 of 255 images; often" in out


def test_a_classifier_without_gradients_is_refused(monkeypatch, capsys):
    torch.save(trained().state_dict(), "own.pth")
    chosen = ["--classifier", "tests.own_classifiers:with_no_gradient", "--weights", "own.pth"]
    code, _, err = call(monkeypatch, capsys, "init", "digits.npz", *chosen)
    assert code == 2
    assert one_line(err).endswith("detach and rounding from its forward")


@pytest.mark.parametrize("with_weights", [False, True])
def test_order_and_range_are_fitted_only_to_a_classifier_that_the_run_does_not_train(
    with_weights, monkeypatch, capsys
):
    torch.save(Rolled().state_dict(), "own.pth")
    weights = ["--weights", "own.pth"] if with_weights else []
    code, out, err = call(
        monkeypatch, capsys, "init", "digits.npz", "--classifier", f"{HERE}:Rolled", *weights
    )
    assert code == 0, err
    section = yaml.safe_load(Path("digits.yaml").read_text())["classifier"]
    assert (section["epochs"] == 0) == with_weights
    assert ("input_range" in section, "class_order" in section) == (with_weights, with_weights)
    assert ("number the classes differently" in out) == with_weights
    assert ("training images with inputs in " in out + Path("digits.yaml").read_text()) == with_weights
    assert ("the run trains it" in out) != with_weights
    assert ("which the classifier probably has seen; separate validation images" in out) == with_weights


def test_the_sigmoid_of_a_classifier_that_the_run_trains_is_noted(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "init", "digits.npz", "--classifier", f"{HERE}:RolledSigmoid")
    assert code == 0
    assert out.count("return what its sigmoid is given") == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ["own/nets.py", "--weights", "digits.npz"],
            "name the function in it that returns the network: --classifier own.nets:build",
        ),
        (["./nets.py:make"], "name the function in it that returns the network: --classifier nets:make"),
        (
            ["own/nets.py:make"],
            "name the function in it that returns the network: --classifier own.nets:make",
        ),
        (["json.loads"], "found no such file; did you mean json:loads?"),
        (["json"], "found no such file; did you mean json:build?"),
        (["json.decoder"], "found no such file; did you mean json.decoder:build?"),
        (["../nets.py"], "name the function in it that returns the network: --classifier nets:build"),
        (
            ["own.safetensors"],
            "add the code: --classifier package.module:factory --weights own.safetensors",
        ),
    ],
)
def test_a_classifier_that_is_named_by_half_is_answered_with_the_whole(options, told, monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, "init", "digits.npz", "--classifier", *options)
    assert code == 2 and one_line(err).endswith(told)
