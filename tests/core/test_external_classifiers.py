"""Classifiers that come as files of other tools: TorchScript, torch.export, transformers, timm, checkpoints."""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from defuse_core.config import RunFile
from defuse_core.correct import require_progress
from defuse_core.errors import ModelError, RunFileError
from defuse_core.local import LocalCompute
from defuse_core.models import (
    load_classifier,
    load_pretrained,
    predict,
    read_weights,
    set_weights,
    weights_of,
)
from defuse_core.models.programs import load_program
from defuse_core.pipeline import run_defuse
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from defuse_core.training.reference_models import ReferenceAnnotators
from tests.conftest import tiny, trained_models
from tests.own_classifiers import WithoutAnswer, digits, plain, trained


def save_script(path: Path) -> Path:
    torch.jit.script(trained()).save(path)
    return path


def save_exported(path: Path, module: nn.Module | None = None, batch: object = None) -> Path:
    shapes = ({0: torch.export.Dim("n")},) if batch is None else None
    program = torch.export.export(module or trained(), (torch.rand(2, 1, 16, 16),), dynamic_shapes=shapes)
    torch.export.save(program, path)
    return path


SAVERS = {"net.pt": save_script, "net.pt2": save_exported}


def program_spec(path: Path, **sections: dict[str, object]) -> RunFile:
    classifier = {"architecture": "program", "weights": str(path), "epochs": 0}
    return tiny(classifier=classifier, vae={"epochs": 1, "accept": "blind"}, **sections)


@pytest.mark.usefixtures("trusted_torchscript")
@pytest.mark.parametrize("name", SAVERS)
def test_a_program_answers_as_the_network_does_and_needs_no_file_afterwards(name, tmp_path, caplog):
    caplog.set_level("INFO")
    path = SAVERS[name](tmp_path / name)
    spec = program_spec(path)
    models = trained_models(spec)
    assert models.accuracy["train"] > 0.95
    path.unlink()
    images = digits()
    again = predict(load_classifier(spec, models.classifier, 10), images)
    np.testing.assert_array_equal(again, predict(trained(), images))
    assert "classifier: right on" in caplog.text
    assert "accuracy by input range on 300 training images: 0..1" in caplog.text


def test_a_class_that_the_classifier_never_answers_is_warned_of_before_the_vae_is_trained(tmp_path, caplog):
    caplog.set_level("INFO")
    trained_models(program_spec(save_exported(tmp_path / "net.pt2", WithoutAnswer())))
    lines = caplog.messages
    (told,) = (
        n for n, line in enumerate(lines) if re.match(r"train: .* right on none of \d+ images of 3, so", line)
    )
    assert told < next(n for n, line in enumerate(lines) if "VAE epoch 1" in line)


def test_a_program_of_batches_of_one_size_is_refused_with_what_to_export(tmp_path):
    program = torch.export.export(trained(), (torch.rand(1, 1, 16, 16),))  # as its documentation begins
    torch.export.save(program, tmp_path / "net.pt2")
    with pytest.raises(
        ModelError, match=r"net\.pt2: exported for batches of 1 image, .*\{0: torch\.export\.Dim"
    ):
        load_program((tmp_path / "net.pt2").read_bytes(), "net.pt2")


@pytest.mark.parametrize("most", [4, 32, None])
def test_a_program_of_batches_up_to_a_size_is_refused_with_what_to_export(most, tmp_path):
    shapes = ({0: torch.export.Dim("batch", min=2, max=most)},)
    program = torch.export.export(trained(), (torch.rand(2, 1, 16, 16),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "net.pt2")
    data = (tmp_path / "net.pt2").read_bytes()
    if most is None:
        assert load_program(data, "net.pt2")(torch.rand(600, 1, 16, 16)).shape == (600, 10)
        return
    line = rf"net\.pt2: exported for batches of at most {most} images, .*Dim\('batch'\)\}},\), without max"
    with pytest.raises(ModelError, match=line):
        load_program(data, "net.pt2")


@pytest.mark.usefixtures("trusted_torchscript")
@pytest.mark.parametrize("name", SAVERS)
def test_a_program_stays_in_eval_mode_while_it_is_fine_tuned(name, tmp_path):
    layers = nn.Flatten(), nn.BatchNorm1d(256), nn.Dropout(0.5), nn.Linear(256, 10)
    network, path = nn.Sequential(*layers).eval(), tmp_path / name
    if name == "net.pt":
        torch.jit.script(network).save(path)
    else:
        save_exported(path, network)
    program, images = load_program(path.read_bytes(), name), torch.rand(8, 1, 16, 16)
    program.train()
    torch.testing.assert_close(program(images), network(images))
    torch.testing.assert_close(program(images), network(images))  # the statistics are still the same


@pytest.mark.usefixtures("trusted_torchscript")
@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("name", SAVERS)
def test_a_program_is_corrected_like_any_other_classifier(name, tmp_path):
    path, correct = SAVERS[name](tmp_path / name), {"lambdas": [1.0]}
    spec = program_spec(path, review={"rho": 0.0, "tau": 1.0}, correct=correct)
    run = Run.start(FolderStore(tmp_path / "runs"), "own", spec)
    compute = LocalCompute()
    report = run_defuse(run, compute, ReferenceAnnotators(run, compute))
    assert report.accuracy.before.test is not None
    assert report.scenarios.accepted and report.chosen is not None


def repacked(path: Path, changes: dict[str, bytes], target: Path) -> bytes:
    """Return the archive with some of its entries replaced or added."""
    source = zipfile.ZipFile(path)
    root = source.namelist()[0].partition("/")[0]
    with zipfile.ZipFile(target, "w") as archive:
        kept = [name for name in source.namelist() if name.partition("/")[2] not in changes]
        for name in kept:
            archive.writestr(name, source.read(name))
        for name, data in changes.items():
            archive.writestr(f"{root}/{name}", data)
    return target.read_bytes()


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def edited(path: Path, old: str, new: str) -> bytes:
    text = next(
        zipfile.ZipFile(path).read(n) for n in zipfile.ZipFile(path).namelist() if n.endswith("model.json")
    )
    assert old in text.decode()
    return text.decode().replace(old, new, 1).encode()


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A file that `torch.export.save` wrote, to be read only."""
    return save_exported(tmp_path_factory.mktemp("exported") / "net.pt2")


@pytest.mark.parametrize(
    ("entry", "make", "line"),
    [
        ("data/sample_inputs/model.pt", lambda path: saved(Bomb()), "sample inputs would be unpickled"),
        ("data/constants/opaque_obj_0", lambda path: pickle.dumps(Bomb()), "holds data/constants/opaque_obj_0"),
        ("data/aotinductor/model/a.so", lambda path: b"", "holds data/aotinductor/model/a.so"),
        ("data/weights/model.pt", lambda path: saved(Bomb()), "a pickle, as torch 2.8 .* torch 2.9 or newer"),
        (
            "data/weights/model_weights_config.json",
            lambda path: b'{"config": {"w": {"path_name": "weight_0", "use_pickle": true}}}',
            "w is pickled",
        ),
        ("models/model.json", lambda p: edited(p, "torch.ops.aten.relu.default", "torch.os.system"), "calls torch.os"),
        ("models/model.json", lambda p: edited(p, "torch.ops.aten.relu.default", "torch.load"), "calls torch.load"),
        ("models/model.json", lambda p: edited(p, "aten.relu.default", "aten.save.default"), "calls torch.ops.aten"),
        (
            "models/model.json",
            lambda p: edited(p, '"guards_code": []', '"guards_code": ["__import__(\'os\').system(\'x\')"]'),
            "holds the expression",
        ),
        (
            "models/model.json",
            lambda p: edited(p, '"expr_str": "Symbol', '"expr_str": "exec(1) + Symbol'),
            "holds the expression",
        ),
    ],
)  # fmt: skip
def test_a_program_that_would_unpickle_or_evaluate_anything_is_refused_unread(
    entry, make, line, exported, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.export, "load", lambda *_: pytest.fail("torch read it"))
    data = repacked(exported, {entry: make(exported)}, tmp_path / "bad.pt2")
    with pytest.raises(ModelError, match=line):
        load_program(data, "bad.pt2")
    assert not Path("exploded").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("part", ["sample inputs", "weights"])
def test_a_program_of_a_gpu_names_the_export_that_is_needed(part, exported, tmp_path, monkeypatch):
    if part == "weights":
        entry = "data/weights/model_weights_config.json"
        source = zipfile.ZipFile(exported)
        name = next(name for name in source.namelist() if name.endswith(entry))
        data = source.read(name).replace(b'"type": "cpu", "index": null', b'"type": "cuda", "index": 0')
        assert b"cuda" in data
    else:
        entry = "data/sample_inputs/model.pt"
        monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        data = saved(((torch.rand(2, 1, 16, 16),), {}))
        monkeypatch.undo()
    changed = repacked(exported, {entry: data}, tmp_path / "gpu.pt2")
    with pytest.raises(
        ModelError, match=r"gpu\.pt2: exported on a GPU .* export it on the CPU: torch\.export"
    ):
        load_program(changed, "gpu.pt2")


@pytest.mark.usefixtures("trusted_torchscript")
def test_torchscript_is_read_without_pythons_unpickler(tmp_path, monkeypatch):
    data = save_script(tmp_path / "net.pt").read_bytes()
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *_, **__: pytest.fail("unpickled"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    assert load_program(data, "net.pt").eval()(torch.rand(3, 1, 16, 16)).shape == (3, 10)


@pytest.mark.parametrize("key", ["state_dict", "model"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", ""])
def test_checkpoints_of_training_scripts_are_read_and_logged(key, prefix, tmp_path, caplog):
    caplog.set_level("INFO")
    state = {f"{prefix}{name}": tensor for name, tensor in trained().state_dict().items()}
    torch.save({"epoch": 3, key: state}, tmp_path / "checkpoint.pt")
    net = plain()
    load_pretrained(net, tmp_path / "checkpoint.pt", trained_on=False)
    torch.testing.assert_close(dict(net.state_dict()), dict(trained().state_dict()))
    assert f"is read from its entry '{key}'" in caplog.text
    assert ("without their prefix" in caplog.text) == bool(prefix)


class Normalising(nn.Module):
    """A network that calls a part of itself `module`, as wrappers of torch do."""

    def __init__(self) -> None:
        super().__init__()
        self.module = trained()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.module((images - 0.5) / 0.5)
        return logits


@pytest.mark.parametrize("build", [plain, Normalising, lambda: nn.DataParallel(plain())])
@pytest.mark.parametrize("change", ["none", "data-parallel", "compiled-data-parallel", "bare"])
def test_the_weights_of_a_network_are_its_own_whatever_wrapped_it_in_training(build, change, tmp_path):
    net, again = build(), build()
    own = net.state_dict()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    prefix = {"data-parallel": "module.", "compiled-data-parallel": "_orig_mod.module."}.get(change, "")
    names = {name: name.removeprefix("module.") if change == "bare" else prefix + name for name in own}
    torch.save({names[name]: tensor for name, tensor in own.items()}, tmp_path / "net.pt")
    load_pretrained(again, tmp_path / "net.pt", trained_on=False)
    torch.testing.assert_close(dict(again.state_dict()), dict(own), rtol=0, atol=0)


def test_neither_weights_nor_the_bytes_of_a_program_are_copied_to_be_checked(monkeypatch):
    net, copied = nn.Linear(2, 2), []
    net.register_buffer("source", torch.zeros(8, dtype=torch.uint8))
    monkeypatch.setattr(
        torch.Tensor, "float", lambda tensor: copied.append(tensor) or tensor.to(torch.float32)
    )
    set_weights(net, weights_of(net), "net.pt")
    assert copied == []


def test_a_mask_of_infinities_is_no_broken_weight():
    class Masking(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))

    weights = weights_of(Masking())
    set_weights(Masking(), weights, "net.pt")
    for name, value in (("weight", weights["mask"]), ("mask", np.full((2, 2), np.nan, np.float32))):
        with pytest.raises(ModelError, match=f"net.pt: {name}: expected finite numbers"):
            set_weights(Masking(), weights | {name: value}, "net.pt")
    tuned = Masking()
    require_progress(weights, tuned, {}, lam=1.0)
    with torch.no_grad():
        tuned.mask[0, 0] = torch.inf
    with pytest.raises(ModelError, match="an epoch overflowed"):
        require_progress(weights, tuned, {}, lam=1.0)


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (trained, "found pickled Python objects, which are never loaded"),
        (lambda: {"epoch": 3}, "expected a state dict of tensors"),
        (lambda: [torch.zeros(1)], "expected a state dict of tensors"),
        (lambda: {"w": torch.eye(3).to_sparse()}, "expected a state dict of tensors, dense"),
        (lambda: {"w": torch.rand(3, device="meta")}, "expected a state dict of tensors, dense"),
        (lambda: {"w": torch.zeros(1, dtype=torch.float16).expand(10**11)}, "more numbers than the file"),
        (
            lambda: {"w": torch.zeros(2, dtype=torch.complex64).conj()},
            "expected a state dict of tensors, dense",
        ),
        (lambda: {1: torch.zeros(2)}, "expected a state dict of tensors, dense"),
    ],
)
def test_a_file_without_a_state_dict_is_refused(value, line, tmp_path):
    torch.save(value(), tmp_path / "odd.pt")
    with pytest.raises(ModelError, match=line):
        read_weights(tmp_path / "odd.pt")


@pytest.mark.parametrize(("kind", "shape"), [("F4", [0]), ("F32", [0, 2**62])])
def test_safetensors_that_torch_or_numpy_cannot_hold_are_refused(kind, shape, tmp_path):
    header = json.dumps({"w": {"dtype": kind, "shape": shape, "data_offsets": [0, 0]}}).encode()
    (tmp_path / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelError, match="expected a state dict of tensors, dense"):
        read_weights(tmp_path / "odd.safetensors")


def test_a_zip_archive_of_a_version_that_python_cannot_read_is_refused(tmp_path):
    torch.save(trained().state_dict(), tmp_path / "net.pt")
    data = bytearray((tmp_path / "net.pt").read_bytes())
    data[data.find(b"PK\x01\x02") + 6] = 200
    with pytest.raises(ModelError, match="found neither"):
        load_program(bytes(data), "net.pt")


def test_a_program_in_place_of_a_state_dict_names_the_setting(tmp_path):
    with pytest.raises(ModelError, match="set classifier.architecture: program"):
        read_weights(save_script(tmp_path / "net.pt"))


@pytest.mark.parametrize("architecture", ["program", "transformers"])
def test_programs_and_folders_need_their_file(architecture):
    with pytest.raises(RunFileError, match=f"{architecture} needs classifier.weights"):
        tiny(classifier={"architecture": architecture})


def test_a_model_of_timm_is_made_by_name_with_local_weights(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model("resnet10t", pretrained=False, num_classes=10, in_chans=1).eval()
    torch.save({"state_dict": net.state_dict()}, tmp_path / "net.pth")
    fields = {
        "architecture": "timm",
        "timm_model": "resnet10t",
        "weights": str(tmp_path / "net.pth"),
        "epochs": 0,
    }
    spec = tiny(classifier=fields, vae={"epochs": 1}, data={"image_size": 32})
    models = trained_models(spec)
    batch = torch.rand(4, 1, 32, 32)
    torch.testing.assert_close(load_classifier(spec, models.classifier, 10)(batch), net(batch))
    assert set(models.classifier) == set(weights_of(net))


@pytest.mark.parametrize(
    ("name", "line"),
    [("hf-hub:timm/resnet18", "would be downloaded"), ("resnet1800", "timm cannot make resnet1800")],
)
def test_a_model_of_timm_that_is_unknown_or_remote_is_refused(name, line):
    pytest.importorskip("timm")
    with pytest.raises(ModelError, match=line):
        trained_models(tiny(classifier={"architecture": "timm", "timm_model": name}))


@pytest.mark.parametrize(("logits", "told"), [(1, True), (3, False)])
def test_a_file_of_one_logit_is_refused_with_a_way_for_two_classes(logits, told):
    weights = weights_of(nn.Linear(4, logits))
    with pytest.raises(ModelError, match=rf"expected shape \(2, 4\), found \({logits}, 4\)") as refused:
        set_weights(nn.Linear(4, 2), weights, "net.pt")
    assert ("for two classes, with architecture: custom" in str(refused.value)) == told
