"""What is taken from a run: its classifier and its pictures."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

from defuse_core.artifacts import Sweep, SweepRow
from defuse_core.codec import encode
from defuse_core.data import open_splits
from defuse_core.errors import InputError, ModelError
from defuse_core.evaluation import Findings
from defuse_core.export import corrected_classifier, export_model, finished, plain_weights
from defuse_core.export.finished import export_scenarios, folder_names
from defuse_core.export.suite import load_suite, save_suite
from defuse_core.files import filling
from defuse_core.models import Decodings, build_classifier, weights_of
from defuse_core.models.programs import load_program
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from tests.command_line import call, one_line
from tests.conftest import tiny, trained_models
from tests.own_classifiers import trained


def opened(store: FolderStore) -> Run:
    return Run.open(store, "digits")


def images_of(run: Run) -> torch.Tensor:
    splits = open_splits(run.spec.data, run.spec.seed)
    return torch.from_numpy(np.concatenate([part.batch(slice(0, 400)) for part in splits.parts().values()]))


def test_the_weights_have_plain_names_and_are_the_runs_own(store, tmp_path):
    done = export_model(opened(store), tmp_path / "model.safetensors")
    assert (done.same_answers, done.difference) == (done.images, 0.0)
    assert (done.images, done.source) == (1000, "test, validation and train")
    sweep = opened(store).load(Sweep)
    for name, array in load_file(tmp_path / "model.safetensors").items():
        np.testing.assert_array_equal(array, sweep.weights[name])


def test_a_file_may_have_the_longest_name_that_there_is(store, tmp_path):
    path = tmp_path / f"{'n' * 243}.safetensors"
    assert export_model(opened(store), path).path == path
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_the_network_answers_alike_for_batches_of_any_size(suffix, store, tmp_path):
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
    run, path = opened(store), tmp_path / f"model{suffix}"
    done = export_model(run, path)
    assert done.same_answers == done.images > 800
    assert done.difference < 1e-4
    images = images_of(run)[:7]
    with torch.inference_mode():
        expected = corrected_classifier(run)[1](images).numpy()
    if suffix == ".pt2":
        found = torch.export.load(path).module()(images).detach().numpy()
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (found,) = session.run(["logits"], {"images": images.numpy()})
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt2", ".onnx"])
def test_a_classifier_whose_code_has_changed_is_not_exported(suffix, store, tmp_path, monkeypatch, capsys):
    architectures = (opened(store).spec.classifier.architecture,)  # as if its code were the user's
    monkeypatch.setattr("defuse_core.export.CODE_ELSEWHERE", architectures)
    monkeypatch.setattr("torch.nn.ReLU", torch.nn.Sigmoid)  # the weights fit as before
    path = tmp_path / f"model{suffix}"
    code, _, err = call(monkeypatch, capsys, "export", "digits", "--store", store.address, "--to", path)
    assert code == 2 and "stored images otherwise than when the run began" in one_line(err)
    assert not path.exists()


@pytest.mark.parametrize("difference", [1.0, float("nan")])
def test_a_file_is_replaced_only_by_one_with_the_runs_answers(difference, store, tmp_path, monkeypatch):
    load = torch.export.load

    class Changed(torch.nn.Module):
        def __init__(self, program: torch.export.ExportedProgram) -> None:
            super().__init__()
            self.net = program.module()

        def module(self) -> torch.nn.Module:
            return self

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.net(images) + difference

    monkeypatch.setattr("torch.export.load", lambda file: Changed(load(file)))
    (tmp_path / "model.pt2").write_bytes(b"the last good one")
    with pytest.raises(ModelError, match=r"not written, since its logits differ from the run's by up to"):
        export_model(opened(store), tmp_path / "model.pt2")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"the last good one"]


def test_a_program_in_another_range_is_exported_for_images_from_0_to_1(store, tmp_path):
    path = tmp_path / "own.pt2"
    net = trained(0.0, 1 / 255)
    program = torch.export.export(
        net, (torch.rand(2, 1, 16, 16),), dynamic_shapes=({0: torch.export.Dim("n")},)
    )
    torch.export.save(program, path)
    fields = {"architecture": "program", "weights": str(path), "epochs": 0, "input_range": "0..255"}
    spec = tiny(classifier=fields, vae={"epochs": 1})
    models = trained_models(spec)
    run = Run.start(FolderStore(tmp_path / "runs"), "own", spec)
    run.store.write("models.safetensors", encode(models))
    run.store.write("sweep.safetensors", encode(Sweep((), SweepRow(1.0, 1, 0.0), models.classifier, ())))
    for suffix in (".pt2", ".safetensors"):
        done = export_model(run, tmp_path / f"model{suffix}")
        assert done.same_answers == done.images
    again = torch.export.load(tmp_path / "model.pt2").module()
    load_program((tmp_path / "model.pt2").read_bytes(), "model.pt2")  # with its metadata
    images = images_of(run)[:50]
    torch.testing.assert_close(again(images), net(images * 255), atol=1e-3, rtol=1e-3)
    assert set(load_file(tmp_path / "model.safetensors")) == set(net.state_dict())


def test_resnet_weights_have_torchvisions_names(tmp_path):
    from torchvision.models import resnet18

    spec = tiny(classifier={"architecture": "resnet18", "stem": "imagenet"})
    assert set(plain_weights(build_classifier(spec, 10))) == set(resnet18(num_classes=10).state_dict())


@pytest.mark.parametrize(
    ("fields", "input_range"),
    [
        ({"architecture": "resnet18"}, "imagenet"),
        ({"architecture": "cnn", "input_range": "imagenet", "outputs": "probabilities"}, "0..1"),
    ],
)
def test_the_file_says_what_its_network_gets_and_returns(
    fields, input_range, tmp_path, monkeypatch, tiny_models
):
    monkeypatch.setattr("defuse_core.export.COMPARED_IMAGES", 50)
    order = [*range(1, 10), 0]
    spec = tiny(classifier={**fields, "class_order": order})
    weights = weights_of(build_classifier(spec, 10))
    run = Run.start(FolderStore(tmp_path / "runs"), "own", spec)
    run.store.write("models.safetensors", encode(dataclasses.replace(tiny_models, classifier=weights)))
    run.store.write("sweep.safetensors", encode(Sweep((), SweepRow(1.0, 1, 0.0), weights, ())))
    export_model(run, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        facts = file.metadata()
    assert json.loads(facts["class_order"]) == order
    assert json.loads(facts["classes"]) == list(tiny_models.classes)
    assert (facts["input_range"], facts["outputs"]) == (input_range, "logits")


def test_the_pictures_are_a_folder_per_class_with_a_table(store, tmp_path):
    from torchvision.datasets import ImageFolder

    count = export_scenarios(opened(store), tmp_path / "pictures")
    folders = {part: ImageFolder(str(tmp_path / "pictures" / part)) for part in ("train", "test")}
    assert {tuple(folder.classes) for folder in folders.values()} == {("3", "8")}
    assert {part: len(folder) for part, folder in folders.items()} == {"train": 2 * (5 + 24), "test": 2 * 24}
    assert count == 2 * (5 + 24 + 24)
    rows = list(csv.DictReader((tmp_path / "pictures/labels.csv").open()))
    assert len(rows) == count
    for row in rows:
        assert row["class_index"] == row["label"]  # the digit, which ImageFolder numbers 0 or 1
        with Image.open(tmp_path / "pictures" / row["filepath"]) as picture:
            assert picture.size == (16, 16)
        part = "test" if row["origin"] == "held-out" else "train"
        assert row["filepath"].startswith(
            f"{part}/{row['label']}/scenario-{int(row['scenario']):03d}-{row['origin']}"
        )
    assert {(row["origin"], row["label_from"]) for row in rows} == {
        ("reviewed", "votes"),
        ("tuned", "scenario"),
        ("held-out", "scenario"),
    }
    before = np.mean([row["before"] == row["label"] for row in rows])
    after = np.mean([row["after"] == row["label"] for row in rows])
    assert before < after  # the planted classifier before takes 3 for 8


def test_pictures_that_do_not_fit_in_memory_are_decoded_and_written_a_batch_at_a_time(
    store, tmp_path, monkeypatch
):
    def exported(folder: Path) -> dict[Path, bytes]:
        export_scenarios(opened(store), folder)
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}

    in_memory, at_once, decode = exported(tmp_path / "a"), [], Decodings.__getitem__

    def noting(decodings, rows):
        shown = decode(decodings, rows)
        at_once.append(len(shown))
        return shown

    monkeypatch.setattr(Decodings, "__getitem__", noting)
    monkeypatch.setattr("defuse_core.models.decoding.MAX_DECODED", 0)
    monkeypatch.setattr(finished, "BATCH", 20)
    assert exported(tmp_path / "b") == in_memory
    assert at_once == [20, 20, 8] * 2


def test_the_table_has_no_answers_after_a_correction_that_there_is_not(store, tmp_path, monkeypatch):
    found = dataclasses.replace(Findings.load(opened(store)), sweep=Sweep((), None, {}, ()))
    monkeypatch.setattr(Findings, "load", lambda _: found)
    export_scenarios(opened(store), tmp_path / "pictures")
    rows = list(csv.DictReader((tmp_path / "pictures/labels.csv").open()))
    assert {row["after"] for row in rows} == {""} and "" not in {row["before"] for row in rows}


def test_the_table_has_the_answers_on_the_pictures_as_they_are_written(store, tmp_path, monkeypatch):
    asked, answer = [], finished.predict

    def noting(classifier, images):
        asked.append(images)
        return answer(classifier, images)

    monkeypatch.setattr(finished, "predict", noting)
    export_scenarios(opened(store), tmp_path / "pictures")
    written = {path.read_bytes(): path for path in (tmp_path / "pictures/test").rglob("*.png")}.values()
    assert len(written) > 1
    levels = {np.asarray(Image.open(path)).tobytes() for path in written}
    held_out = asked[-1][:, 0]
    assert {np.rint(image * 255).astype(np.uint8).tobytes() for image in held_out} == levels
    assert all(np.array_equal(images, np.rint(images * 255).astype(np.float32) / 255) for images in asked)


def test_a_suite_checks_no_picture_that_is_exported_to_train_on(store, tmp_path):
    export_scenarios(opened(store), tmp_path / "pictures")
    save_suite(opened(store), tmp_path / "suite")
    asked = {
        picture.tobytes() for picture in load_suite(tmp_path / "suite").pictures.pixels.reshape(-1, 16 * 16)
    }

    def exported(part: str) -> set[bytes]:
        files = (tmp_path / "pictures" / part).glob("*/*.png")
        return {np.asarray(Image.open(file)).tobytes() for file in files}

    assert exported("test") == asked
    assert not exported("train") & asked


@pytest.mark.parametrize("write", [export_scenarios, save_suite])
def test_a_disk_that_fills_leaves_nothing_and_the_same_command_works_again(
    write, store, tmp_path, monkeypatch
):
    (tmp_path / ".a.unfinished" / "train").mkdir(parents=True)  # of a command that was killed
    (tmp_path / ".a.unfinished" / "train" / "half.png").touch()
    save, left = Image.Image.save, iter(range(1))

    def filling(picture: Image.Image, path: Path) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(picture, path)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", filling)
        with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
            write(opened(store), tmp_path)
    assert list(tmp_path.iterdir()) == []
    write(opened(store), tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    assert not list(tmp_path.rglob("half.png"))


def test_of_two_commands_that_fill_one_folder_the_second_to_end_leaves_the_first_alone(tmp_path):
    with (
        pytest.raises(InputError, match="expected an empty or new folder"),
        filling("--to", tmp_path) as slow,
    ):
        (slow / "labels.csv").write_text("slow")
        with filling("--to", tmp_path) as fast:
            for name in ("labels.csv", "train"):
                (fast / name).write_text("fast")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "labels.csv": "fast",
        "train": "fast",
    }


def test_a_move_that_fails_halfway_leaves_nothing(tmp_path, monkeypatch):
    rename, left = Path.rename, iter(range(2))

    def refusing(path: Path, target: Path) -> Path:
        if next(left, None) is None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refusing)
    with pytest.raises(InputError, match="Input/output error"), filling("--to", tmp_path) as folder:
        for name in "abc":
            (folder / name).mkdir()
    assert list(tmp_path.iterdir()) == []


def test_no_two_classes_share_a_folder():
    assert folder_names(("3", "8", ".hidden")) == ["3", "8", "hidden"]
    for classes in (("a/b", "a_b"), ("A", "a"), ("a/b", "a_b", "0-a_b")):
        folders = folder_names(classes)
        assert len({name.casefold() for name in folders}) == len(classes)
        assert not any("/" in name for name in folders)


def test_the_command_writes_both_and_names_the_comparison(store, tmp_path, monkeypatch, capsys):
    where = ["--store", store.address]
    paths = ["--to", tmp_path / "model.safetensors", "--scenarios", tmp_path / "pictures"]
    code, out, _ = call(monkeypatch, capsys, "export", "digits", *where, *paths)
    assert code == 0
    assert "the same answer as the run's classifier on" in out
    assert "106 pictures, with labels.csv; its column class_index has the classifier's class numbers" in out


def test_a_file_that_exists_is_replaced_with_force_alone(store, tmp_path, monkeypatch, capsys):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"another model")
    words = ["export", "digits", "--store", store.address, "--to", path]
    code, _, err = call(monkeypatch, capsys, *words)
    assert (code, path.read_bytes()) == (2, b"another model")
    assert one_line(err).endswith(
        "model.safetensors: exists; choose another file, or replace it with --force"
    )
    assert call(monkeypatch, capsys, *words, "--force")[0] == 0
    assert load_file(path)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--to", "model.bin"], "expected a file that ends in .safetensors, .pt2 or .onnx"),
        (["--scenarios", "."], "expected an empty or new folder, found files"),
        ([], "give --to FILE, --scenarios FOLDER, or both"),
        (["--scenarios", "new", "--force"], "--force replaces the file of --to"),
        (["--to", "file/model.pt2"], "--to file/model.pt2: cannot be written (file: Not a directory); c"),
        (["--to", f"{'n' * 255}.pt2"], "n.pt2: cannot be written (File name too long); choose another place"),
        (["--to", "made.safetensors"], "--to made.safetensors: cannot be written (Is a directory); choose"),
        (["--to", "made.pt2"], "--to made.pt2: cannot be written (Is a directory)"),
        (
            ["--to", "new/a.pt2", "--scenarios", "new"],
            "--to new/a.pt2 and --scenarios new: one is inside the",
        ),
        (["--to", "a.pt2", "--scenarios", "./a.pt2/new"], "one is inside the other; choose another place"),
        (
            ["--to", "s3://bucket/model.pt2"],
            "s3://bucket/model.pt2: expected a path of this machine, found an",
        ),
        (["--scenarios", "s3://bucket/new"], "s3://bucket/new: expected a path of this machine, found an"),
        (["--scenarios", "file/new"], "--scenarios file/new: cannot be written (Not a directory); choose"),
    ],
)
def test_an_export_that_cannot_be_is_refused(options, line, store, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for name in ("made.safetensors", "made.pt2"):
        (tmp_path / name).mkdir()
    code, _, err = call(monkeypatch, capsys, "export", "digits", "--store", store.address, *options)
    assert code == 2
    assert line in " ".join(err.split())
    assert {path.name for path in tmp_path.iterdir()} == {"file", "made.safetensors", "made.pt2"}


def test_a_run_without_a_correction_has_nothing_to_export(store, tmp_path, monkeypatch, capsys):
    Run.start(FolderStore(tmp_path), "begun", tiny())
    code, _, err = call(
        monkeypatch, capsys, "export", "begun", "--store", tmp_path, "--to", tmp_path / "m.pt2"
    )
    assert code == 2
    assert "run begun is not finished; the `defuse run` command that began it" in one_line(err)


def test_no_output_replaces_a_file_of_a_run_a_suite_or_the_registry(own_store, tmp_path, monkeypatch, capsys):
    where = ["--store", own_store.address]
    own_store.within("registry").write("changes/000001.json", b"{}")
    assert call(monkeypatch, capsys, "suite", "save", "digits", *where, "--out", tmp_path / "su")[0] == 0
    (tmp_path / "link").symlink_to(tmp_path / "digits")
    (tmp_path / "linked.yaml").symlink_to(tmp_path / "digits/run.yaml")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.chdir(tmp_path / "su")
    init = ["init", tmp_path, "--force", "--out"]
    for kind, command in [
        ("run", ["export", "digits", *where, "--to", tmp_path / "digits/models.safetensors"]),
        ("run", ["export", "digits", *where, "--to", tmp_path / "digits/new/model.pt2"]),
        ("run", ["export", "digits", *where, "--to", tmp_path / "link/model.pt2"]),
        ("run", ["export", "digits", *where, "--scenarios", tmp_path / "digits/pics"]),
        ("run", ["suite", "save", "digits", *where, "--out", tmp_path / "digits/suite"]),
        ("run", [*init, tmp_path / "digits/run.yaml"]),
        ("run", [*init, tmp_path / "linked.yaml"]),
        ("registry", ["export", "digits", *where, "--to", tmp_path / "registry/versions/m.safetensors"]),
        ("suite", ["export", "digits", *where, "--to", "suite.safetensors"]),
        ("suite", ["check", "digits", *where, "--suite", ".", "--junit", "suite.json"]),
        ("suite", [*init, tmp_path / "su/pictures/run.yaml"]),
    ]:
        code, out, err = call(monkeypatch, capsys, *command)
        assert (code, out) == (2, ""), command  # before anything is computed and shown
        assert f"is inside the {kind} {tmp_path}/" in one_line(err)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
