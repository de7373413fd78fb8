"""Networks whose code takes torch's default memory layout alone, as x.view(n, -1) behind a convolution, work, too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defuse_core.correct import FineTuning
from defuse_core.data import open_splits
from defuse_core.errors import ModelError
from defuse_core.export import corrected_classifier, export_model
from defuse_core.export.suite import save_suite
from defuse_core.local import LocalCompute
from defuse_core.models import (
    build_classifier,
    check_outputs,
    expect_trainable,
    load_classifier,
    predict_logits,
    probe_classifier,
    program_of,
    set_weights,
    to_device,
    weights_of,
)
from defuse_core.pipeline import run_defuse
from defuse_core.protocols import silent
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from defuse_core.training.precision import measure_precision
from defuse_core.training.reference_models import ReferenceAnnotators
from defuse_core.trials import _why_not_stacked
from defuse_core.tuning_data import FineTuningData, ScenarioImages
from tests.conftest import recommended, tiny

HERE = "tests.core.test_memory_layout"


class Viewing(nn.Module):
    """A classifier as that of PyTorch's tutorial, for images of 16x16 pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(channels, 6, 5), nn.Conv2d(6, 16, 5), nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        maps = F.relu(self.second(F.max_pool2d(F.relu(self.first(images)), 2)))
        logits: Tensor = self.head(maps.view(maps.size(0), -1))
        return logits


class ViewingVae(nn.Module):
    """A β-VAE with a view behind its convolutions, for grey images of 16x16 pixels and 4 latent dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.moments = nn.Conv2d(1, 8, 4, stride=2, padding=1), nn.Linear(512, 8)
        self.dense, self.up = nn.Linear(4, 512), nn.ConvTranspose2d(8, 1, 4, stride=2, padding=1)

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.moments(F.relu(self.down(images)).view(len(images), -1)).chunk(2, dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        return torch.sigmoid(self.up(F.relu(self.dense(codes)).view(-1, 8, 8, 8)))


def grey() -> nn.Module:
    return Viewing(1)


def colour() -> nn.Module:
    return Viewing(3)


CUSTOM = {channels: f"{HERE}:{name}" for channels, name in ((1, "grey"), (3, "colour"))}
FORMS = ["custom", "torch.jit", "torch.export"]


@pytest.mark.usefixtures("trusted_torchscript")
@pytest.mark.parametrize("channels", CUSTOM)
@pytest.mark.parametrize("form", FORMS)
def test_a_view_behind_a_convolution_passes_the_checks_and_answers_as_for_its_owner(form, channels, tmp_path):
    torch.manual_seed(0)
    net = Viewing(channels).eval()
    fields = {"architecture": "custom", "import_path": CUSTOM[channels], "input_range": "-1..1"}
    if form != "custom":
        net_or_script = torch.jit.script(net) if form == "torch.jit" else net
        (tmp_path / "net.pt").write_bytes(program_of(net_or_script, torch.rand(2, channels, 16, 16)))
        fields = {
            "architecture": "program",
            "weights": str(tmp_path / "net.pt"),
            "input_range": "-1..1",
            "epochs": 0,
        }
    spec = tiny(data={"channels": channels}, classifier=fields)
    images, classes = open_splits(spec.data, 0).train, list("0123456789")
    classifier = to_device(build_classifier(spec, 10))
    if form == "custom":
        set_weights(classifier, weights_of(net), "the test")
    check_outputs(classifier, spec.classifier, images, 10)
    expect_trainable(classifier, images)
    assert probe_classifier(classifier, spec.classifier, images, classes).images == len(images)
    with torch.no_grad():
        expected = net((torch.from_numpy(images.batch()) - 0.5) / 0.5).numpy()
    stored = weights_of(classifier)
    for found in (classifier, load_classifier(spec, stored, 10)):
        np.testing.assert_allclose(predict_logits(found, images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("no_figures")
def test_a_run_of_networks_with_views_is_computed_to_its_end_and_exported(tmp_path):
    """The classifier, the β-VAE, the reference models and the judges are all a user's own."""
    own = {"architecture": "custom", "import_path": CUSTOM[1]}
    spec = recommended(
        classifier=own,
        vae={"architecture": "custom", "import_path": f"{HERE}:ViewingVae", "accept": "blind", "epochs": 10},
        review={"reference": {**own, "count": 2, "epochs": 8, "batch_size": 32}, "rho": 0.0},
        judges=own,
        correct={"lambdas": [0.1, 1.0], "max_loss": 1.0, "stack": 2},
    )
    run, compute = Run.start(FolderStore(tmp_path / "runs"), "own", spec), LocalCompute()
    measure_precision(spec, progress=silent)
    report = run_defuse(run, compute, ReferenceAnnotators(run, compute))
    assert report.chosen is not None
    models, corrected = corrected_classifier(run)
    splits = open_splits(spec.data, spec.seed)
    data = FineTuningData(splits, ScenarioImages(splits.train, len(splits.classes), splits.train), {})
    assert _why_not_stacked(FineTuning(spec, models, data)) is None
    done = export_model(run, tmp_path / "net.pt2")
    assert done.same_answers == done.images
    suite = save_suite(run, tmp_path / "suite")
    assert all(result.passed for result in suite.check(to_device(corrected, spec.data)))
    again = grey()
    set_weights(again, weights_of(corrected), "the test")
    with torch.no_grad():
        expected = again.eval()(torch.from_numpy(splits.train.batch())).numpy()
    np.testing.assert_allclose(predict_logits(corrected, splits.train), expected, rtol=1e-4, atol=1e-5)


class Transposing(Viewing):
    """Code with a view that no layout of the images makes right."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.transpose(2, 3)) + images.transpose(1, 2).view(-1)[:1]


def test_a_view_that_fails_in_every_layout_is_refused_as_before():
    spec = tiny(classifier={"architecture": "custom", "import_path": CUSTOM[1]})
    images = open_splits(tiny(data={"channels": 3}).data, 0).train
    with pytest.raises(ModelError, match="fails on images of shape .*view size is not compatible"):
        check_outputs(to_device(Transposing(3)), spec.classifier, images, 10)


def test_a_network_that_takes_the_fast_layout_keeps_it():
    spec = tiny(data={"channels": 3}, classifier={"architecture": "custom", "import_path": CUSTOM[3]})
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 10))
    to_device(net, spec.data)
    check_outputs(net, spec.classifier, open_splits(spec.data, 0).train, 10)
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert "forward" not in vars(net) and net.training is False
