"""The table of odd inputs: what is wrong, the line that says so, and the exit code."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.command_line import call, one_line
from tests.conftest import TINY
from tests.own_classifiers import EightRows, Net, trained


def own(factory: str, **fields: object) -> dict[str, object]:
    return {
        "architecture": "custom",
        "import_path": f"tests.own_classifiers:{factory}",
        "epochs": 1,
        **fields,
    }


def program(name: str) -> dict[str, object]:
    return {"architecture": "program", "weights": name, "epochs": 0}


REFUSED = [  # what is wrong, section classifier, the line
    (
        "no such module",
        {"architecture": "custom", "import_path": "no.such:build"},
        "cannot import no; run defuse in",
    ),
    ("no such function", own("nothing"), "has no function nothing"),
    ("a factory with arguments", own("with_arguments"), "callable without arguments"),
    ("no module", own("not_a_module"), "expected an nn.Module, found int"),
    ("a factory that exits", own("that_exits"), 'below `if __name__ == "__main__":`'),
    ("a factory that raises no Exception", own("that_raises_no_exception"), "failed (NoException: skipped)"),
    (
        "the device meta",
        own("on_meta"),
        "a module on the device meta, which has no weights; build it on the CPU",
    ),
    ("a network that exits", own("that_exits_when_called"), "the classifier exits (SystemExit: 0)"),
    ("a network that exits late", own("ThatExitsInTraining"), "exits (SystemExit: 0) when it is trained"),
    ("a dict without logits", own("with_odd_dict"), "found a dict with a, b; wrap it"),
    ("a text", own("with_text"), "the first of a tuple, found str"),
    ("NaN", own("with_nan"), "expected finite logits, found NaN or infinity for 8 of 8 training images"),
    (
        "probabilities",
        own("with_softmax"),
        "found probabilities (each row sums to 1); set classifier.outputs",
    ),
    ("logits said to be probabilities", own("plain", outputs="probabilities"), "expected rows that sum to 1"),
    (
        "too few classes",
        own("with_seven_classes"),
        "expected logits of shape (2, 10) (images, classes), found (2, 7); the data set has 10 classes, so let it",
    ),
    (
        "lazy layers",
        own("with_lazy_layers"),
        "let it call the module once, on images of the size to use, before",
    ),
    (
        "a changed input",
        own("ChangingItsInput"),
        "changes the images that it is given, which are used again; let",
    ),
    (
        "few rows",
        program("few.pt"),
        "a network returns 8 rows for a batch of 256; let it return one for each",
    ),
    ("few rows in training", own("with_eight_rows"), "a network returns 8 rows for a batch of 64; let it"),
    ("noise in eval mode", own("with_noise"), "found different ones at the second call; dropout"),
    ("batch statistics", own("with_batch_statistics"), "found different ones when the batch changes"),
    (
        "no gradient",
        own("with_no_gradient"),
        "expected a gradient from its logits to the parameters to fine-tune",
    ),
    (
        "a fixed batch size",
        own("for_two_images_only"),
        "it answers a batch of 2 images, so let it accept batches of any size",
    ),
    ("no such file", program("nowhere.pt"), "nowhere.pt: expected a file of weights, found none"),
    ("a folder as a program", program("folder"), "folder: expected a file of weights, found a folder"),
    ("a text as a program", program("notes.pt"), "expected a file of torch.jit.save or torch.export.save"),
    (
        "a state dict as a program",
        program("state.pt"),
        "a state dict, or a whole module of torch.save, needs its code",
    ),
    ("a program cut short", program("cut.pt"), "cut.pt: expected a file of torch.jit.save"),
    (
        "a program for a fixed batch",
        program("fixed.pt2"),
        "fixed.pt2: exported for batches of 2 images, expected any number",
    ),
    ("a program as a state dict", own("plain", weights="net.pt"), "set classifier.architecture: program"),
    (
        "a pickled network",
        own("plain", weights="pickled.pt"),
        "found pickled Python objects, which are never loaded",
    ),
    ("weights of another network", own("plain", weights="other.pt"), "the weights lack body.0.weight"),
    ("a folder of weights", own("plain", weights="folder"), "needs classifier.architecture: transformers"),
    ("no order of classes", own("plain", class_order=[0, 0]), "expected each of the logits 0 to 9 once"),
    ("a model of timm without a name", {"architecture": "timm"}, "classifier.timm_model goes with"),
    (
        "no folder of transformers",
        {"architecture": "transformers", "weights": "folder"},
        "readable config.json",
    ),
]
TAKEN = [  # what is odd, section classifier, the line in the log
    ("an object with .logits", own("with_object"), "the classifier returns more than logits; used: .logits"),
    ("a tuple", own("with_tuple"), "used: the first of a tuple of 2"),
    ("a dict", own("with_dict"), "used: ['logits']"),
    ("probabilities, as set", own("with_softmax", outputs="probabilities"), "images: 300 train"),
    ("a checkpoint", own("plain", weights="checkpoint.pt", epochs=0), "is read from its entry 'state_dict'"),
    ("DataParallel", own("plain", weights="checkpoint.pt", epochs=0), "without their prefix 'module.'"),
    ("TorchScript", program("net.pt"), "classifier: right on"),
    ("torch.export", program("net.pt2"), "classifier: right on"),
    ("another range", own("plain", weights="range.pt", epochs=0), "set classifier.input_range: 0..255"),
    ("a guess", own("plain", weights="untrained.pt", epochs=0), "does it number the classes in this order?"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every file that the table names."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "folder").mkdir()
    (folder / "notes.pt").write_text("not a network")
    net, state = trained(), trained().state_dict()
    torch.save(state, folder / "state.pt")
    torch.save(net, folder / "pickled.pt")
    torch.save({"weight": torch.zeros(1)}, folder / "other.pt")
    torch.save({"state_dict": {f"module.{name}": t for name, t in state.items()}}, folder / "checkpoint.pt")
    torch.save(trained(0.0, 1 / 255).state_dict(), folder / "range.pt")
    torch.manual_seed(0)
    torch.save(Net().state_dict(), folder / "untrained.pt")
    torch.jit.script(net).save(folder / "net.pt")
    torch.jit.script(torch.nn.Sequential(net, EightRows())).save(folder / "few.pt")
    (folder / "cut.pt").write_bytes((folder / "net.pt").read_bytes()[:5000])
    example = (torch.rand(2, 1, 16, 16),)
    dynamic = ({0: torch.export.Dim("n")},)
    torch.export.save(torch.export.export(net, example), folder / "fixed.pt2")
    torch.export.save(torch.export.export(net, example, dynamic_shapes=dynamic), folder / "net.pt2")
    return folder


def start(classifier: dict[str, object], tmp_path: Path, monkeypatch, capsys) -> tuple[int, str]:
    tree = {**TINY, "classifier": classifier, "vae": {**TINY["vae"], "epochs": 1}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    where = ["--store", tmp_path / "runs", "--on", "local", "--until", "train"]
    code, _, err = call(monkeypatch, capsys, "run", tmp_path / "tiny.yaml", *where)
    return code, err


@pytest.mark.usefixtures("trusted_torchscript")
@pytest.mark.parametrize(
    ("classifier", "line"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_an_unusable_classifier_exits_2_with_one_line(classifier, line, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(files)
    code, err = start(classifier, tmp_path, monkeypatch, capsys)
    assert line in one_line(err)
    assert code == 2
    assert not (tmp_path / "runs/tiny/models.safetensors").exists()


@pytest.mark.usefixtures("trusted_torchscript")
@pytest.mark.parametrize(("classifier", "line"), [row[1:] for row in TAKEN], ids=[row[0] for row in TAKEN])
def test_an_odd_but_usable_classifier_is_taken_with_a_line(
    classifier, line, files, tmp_path, monkeypatch, capsys, caplog
):
    caplog.set_level("INFO")
    monkeypatch.chdir(files)
    code, err = start(classifier, tmp_path, monkeypatch, capsys)
    assert code == 0, err
    assert line in caplog.text


def write_pictures(root: Path) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 2)):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 255, (16, 16, 3), np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")


def unpicturelike(root: Path) -> None:
    (root / "train/cat/0.png").write_text("no picture")


ODD_FOLDERS = [  # what is odd, how it is made, the line, the exit code
    ("val/", lambda root: shutil.copytree(root / "test", root / "val"), "val/ is not read; rename it to valid", 0),
    ("valid/", lambda root: shutil.copytree(root / "test", root / "valid"), "rename it to validation/", 0),
    ("dev/", lambda root: shutil.copytree(root / "test", root / "dev"), "dev/ is not read", 0),
    ("Thumbs.db", lambda root: (root / "train/cat/Thumbs.db").touch(), "ignored: 1 file such as train/cat/", 0),
    ("notes", lambda root: (root / "train/cat/notes.txt").touch(), "found 1 other file: train/cat/notes.txt;", 2),
    ("no train/", lambda root: shutil.rmtree(root / "train"), "train: expected a folder with one folder", 2),
    ("one class", lambda root: shutil.rmtree(root / "train/cat"), "two classes or more, found 1", 2),
    ("an empty class", lambda root: (root / "train/fox").mkdir(), "train/fox: expected images", 2),
    ("a broken picture", unpicturelike, "train/cat/0.png: expected an image", 2),
]  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "line", "exit_code"), [row[1:] for row in ODD_FOLDERS], ids=[row[0] for row in ODD_FOLDERS]
)
def test_an_odd_folder_is_warned_of_or_refused(spoil, line, exit_code, tmp_path, monkeypatch, capsys, caplog):
    caplog.set_level("INFO")
    write_pictures(tmp_path / "pictures")
    spoil(tmp_path / "pictures")
    data = {
        "name": "folder",
        "root": str(tmp_path / "pictures"),
        "image_size": 16,
        "channels": 3,
        "train_images": None,
    }
    tree = {**TINY, "data": data, "classifier": {**TINY["classifier"], "epochs": 1}}
    tree["vae"] = {**TINY["vae"], "epochs": 1, "batch_size": 4}
    tree["correct"] = {**TINY["correct"], "choose_by": "train"}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    where = ["--store", tmp_path / "runs", "--on", "local", "--until", "train"]
    code, _, err = call(monkeypatch, capsys, "run", tmp_path / "tiny.yaml", *where)
    assert line in (caplog.text if exit_code == 0 else one_line(err))
    assert code == exit_code, err
