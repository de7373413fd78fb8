"""Files of TorchScript are programs that can do anything: they are loaded by consent, and refused unread without."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import defuse_core as defuse
from defuse_core.errors import ModelError
from defuse_core.models import load_classifier, weights_of
from defuse_core.models.programs import load_program, program_of
from tests.conftest import tiny
from tests.core.debug_arguments import arguments, biased
from tests.own_classifiers import trained

REFUSED = r"found a TorchScript program, .* set DEFUSE_TRUST_TORCHSCRIPT=1 \(on every node of a cluster\), "


def scripted(net: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(net.eval()), file)
    return file.getvalue()


@pytest.mark.parametrize("value", [None, "", "0", "true"])
def test_a_file_is_refused_unread_without_consent(value, monkeypatch):
    if value is not None:
        monkeypatch.setenv("DEFUSE_TRUST_TORCHSCRIPT", value)
    data = scripted(trained())
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("torch read it"))
    with pytest.raises(
        ModelError, match=rf"^net\.pt: {REFUSED}.*torch\.export\.save, .*import_path, weights"
    ):
        load_program(data, "net.pt")


def test_the_classifier_of_a_run_is_refused_unread_without_consent(tmp_path, monkeypatch):
    (tmp_path / "net.pt").write_bytes(scripted(trained()))
    classifier = {"architecture": "program", "weights": str(tmp_path / "net.pt"), "epochs": 0}
    spec = tiny(classifier=classifier)
    monkeypatch.setenv("DEFUSE_TRUST_TORCHSCRIPT", "1")
    weights = weights_of(load_program((tmp_path / "net.pt").read_bytes(), "net.pt"))
    load_classifier(spec, weights, 10)
    monkeypatch.delenv("DEFUSE_TRUST_TORCHSCRIPT")
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("torch read it"))
    with pytest.raises(ModelError, match=rf"classifier: {REFUSED}"):
        load_classifier(spec, weights, 10)


@pytest.mark.parametrize("wrap", [lambda net: net, nn.DataParallel])
def test_a_scripted_classifier_in_memory_is_refused_before_anything_is_stored(wrap, tmp_path):
    with pytest.raises(ModelError, match=rf"^classifier: {REFUSED}"):
        defuse.debug(**arguments(tmp_path, classifier=wrap(torch.jit.script(biased()))))
    assert not list(Path(tmp_path).iterdir())


class Recurrent(nn.Module):
    """Reads an image by its rows, as no program of torch.export may."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU]) -> None:
        super().__init__()
        self.rows, self.head = kind(8, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.rows(images[:, 0])[0][:, -1])
        return logits


@pytest.mark.usefixtures("trusted_torchscript")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_networks_work_as_torchscript_with_consent(kind):
    net, images = Recurrent(kind).eval(), torch.rand(2, 1, 8, 8)
    program = load_program(program_of(torch.jit.script(net), images), "net.pt")
    torch.testing.assert_close(program(images), net(images))
    program(images).sum().backward()
