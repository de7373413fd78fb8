"""`defuse init` and `defuse fields`: a run file from a folder, a classifier and a time."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from defuse_core.config import load_run_file
from defuse_core.errors import DataError
from defuse_core.suggest import inspect_data
from defuse_core.suggest.inspect import _pictures
from defuse_core.suggest.speeds import Speeds
from services.cli.runs import run_name
from tests.command_line import call, one_line
from tests.own_classifiers import digits, trained


@pytest.fixture(autouse=True)
def _short_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("defuse_core.suggest.speeds.TRIAL_S", 0.05)


@pytest.fixture
def known_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds that need not be measured, for tests of all else that is suggested."""
    monkeypatch.setattr("defuse_core.suggest.plan.measure_speeds", lambda *_: Speeds(1e3, 1e3, 1e3, 1e3))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny digits as a folder of grey PNG files; saved as RGB, as many tools do."""
    root, images = tmp_path_factory.mktemp("pictures") / "digits", digits()
    for number in range(len(images)):
        folder = root / ("train" if number % 5 else "test") / str(images.labels[number])
        folder.mkdir(parents=True, exist_ok=True)
        levels = images.pixels[number : number + 1][0, 0]
        Image.fromarray(np.repeat(levels[..., None], 3, axis=2)).save(folder / f"{number}.png")
    return root


def start(monkeypatch, capsys, *options: object) -> tuple[dict, str]:
    code, out, err = call(monkeypatch, capsys, "init", *options)
    assert code == 0, err
    return yaml.safe_load(Path("digits.yaml").read_text()), out


def test_class_folders_are_moved_by_the_command_that_is_suggested(pictures, tmp_path, monkeypatch, capsys):
    flat = tmp_path / "it's flat"
    shutil.copytree(pictures / "train", flat)
    with pytest.raises(DataError) as refused:
        inspect_data(flat)
    command = str(refused.value).partition("move them into train/: ")[2]
    subprocess.run(["sh", "-c", command], check=True)
    assert [path.name for path in flat.iterdir()] == ["train"]
    assert inspect_data(flat).counts["train"] > 0


def test_the_images_decide_size_colour_classes_and_the_vae(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "defuse_core.suggest.speeds._rate", lambda work: 1000.0
    )  # on a busy machine 10 minutes are few
    tree, out = start(monkeypatch, capsys, pictures, "--minutes", 10)
    assert "240 train, 60 test; 10 classes; 16x16 pixels" in out
    assert "next: defuse run digits.yaml" in out
    data = tree["data"]
    assert (data["image_size"], data["channels"], data["validation_share"]) == (16, 1, 0.15)
    vae = tree["vae"]
    assert (vae["architecture"], vae["encoder_stages"], vae["latent_dim"]) == ("convolutional", 2, 16)
    assert "decode" not in vae  # plain, the default
    assert load_run_file(Path("digits.yaml")).classifier.architecture == "cnn"
    text = Path("digits.yaml").read_text()
    assert text.startswith("# Written by `defuse init` for about 3 minutes")
    assert "# Perturbed decodings tried per training image, Q" in text


@pytest.mark.usefixtures("known_speeds")
def test_comments_explain_the_value_that_is_written(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    start(monkeypatch, capsys, pictures, "--minutes", 1)
    lines = [" ".join(line.split()) for line in Path("digits.yaml").read_text().splitlines()]
    assert "name: folder # folder is ROOT/train, ROOT/validation and ROOT/test in ImageFolder layout" in lines
    assert "architecture: cnn # cnn is Figure 7" in lines
    written = "\n".join(lines)
    assert "architecture: convolutional # convolutional has batch normalisation" in written
    for passes in ("training images; 0 uses `weights`", r"images; 0 uses `weights` \(or a custom module\)"):
        assert re.search(rf"^epochs: \d+ # Passes over the {passes} unchanged$", written, re.MULTILINE)


def test_more_minutes_give_more_epochs(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short, _ = start(monkeypatch, capsys, pictures, "--minutes", 1)
    long, _ = start(monkeypatch, capsys, pictures, "--minutes", 60, "--force")
    assert short["vae"]["epochs"] <= long["vae"]["epochs"]
    assert short["identify"]["draws"] <= long["identify"]["draws"]


@pytest.mark.usefixtures("trusted_torchscript")
@pytest.mark.usefixtures("known_speeds")
def test_the_range_that_a_program_expects_and_its_probabilities_are_written(
    pictures, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    net = torch.nn.Sequential(trained(0.0, 1 / 255), torch.nn.Softmax(1))
    torch.jit.script(net).save("own.pt")
    tree, out = start(monkeypatch, capsys, pictures, "--classifier", "own.pt")
    section = tree["classifier"]
    assert (section["architecture"], section["epochs"], section["outputs"]) == ("program", 0, "probabilities")
    assert section.get("input_range") == "0..255"
    assert "note        classifier.outputs is set to probabilities" in out
    assert re.search(
        r"^classifier  right on .*% of \d+ training images with inputs in 0..255 \(used\), ", out, re.M
    )
    assert re.search(
        "^# Classifier: right on .* in 0..255 .used., .* in 0..1", Path("digits.yaml").read_text(), re.M
    )
    assert "note        classifier.input_range is set to 0..255: right on" in out
    load_run_file(Path("digits.yaml"))


@pytest.mark.usefixtures("known_speeds")
def test_a_state_dict_with_its_factory_is_taken(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(trained().state_dict(), "own.pth")
    tree, _ = start(
        monkeypatch, capsys, pictures, "--classifier", "tests.own_classifiers:plain", "--weights", "own.pth"
    )
    assert tree["classifier"]["import_path"] == "tests.own_classifiers:plain"
    assert tree["classifier"]["epochs"] == 0
    assert "class_order" not in tree["classifier"]


def test_a_classifier_below_an_unknown_home_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(monkeypatch, capsys, "init", tmp_path, "--classifier", "~nosuchuser/net.pt2")
    assert code == 2
    assert "--classifier ~nosuchuser/net.pt2: expected the home of an existing user after ~" in one_line(err)


@pytest.mark.usefixtures("known_speeds")
def test_an_input_range_that_gives_five_points_more_is_written_with_the_way_back(
    pictures, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    weights = trained().state_dict()
    weights["body.5.bias"] = weights["body.5.bias"] + 8 * torch.eye(10)[8]  # takes many images for an 8
    torch.save(weights, "own.pth")
    tree, out = start(
        monkeypatch, capsys, pictures, "--classifier", "tests.own_classifiers:plain", "--weights", "own.pth"
    )
    assert tree["classifier"]["input_range"] == "imagenet"
    line = r"note +classifier.input_range is set to imagenet: right on 99.\d % of 204 .*; remove it if .* on 0..1"
    assert re.search(line, out)


@pytest.mark.usefixtures("known_speeds")
def test_another_order_of_the_classes_is_written_with_a_note(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    weights = trained().state_dict()
    rolled = {name: weights[name].roll(3, dims=0) for name in ("body.5.weight", "body.5.bias")}
    torch.save(weights | rolled, "own.pth")
    tree, out = start(
        monkeypatch, capsys, pictures, "--classifier", "tests.own_classifiers:plain", "--weights", "own.pth"
    )
    assert tree["classifier"]["class_order"] == [3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    assert (
        "note        classifier.class_order is set, since the classifier seems to number the classes" in out
    )
    assert "# Note: classifier.class_order is set" in Path("digits.yaml").read_text()


def colour_picture(path: Path, width: int, height: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.mark.usefixtures("known_speeds")
def test_photographs_are_decoded_anchored_and_the_run_file_says_why(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number in range(30):
        for part in ("train", "test"):
            colour_picture(tmp_path / "digits" / part / "cat" / f"{number}.png", 16, 16)
            colour_picture(tmp_path / "digits" / part / "dog" / f"{number}.png", 16, 16)
    tree, out = start(monkeypatch, capsys, "digits", "--minutes", 1)
    assert (tree["vae"]["decode"], tree["identify"]["scale"]) == ("anchored", 2.0)
    assert (tree["review"]["purity"], tree["identify"]["share"]) == (0.7, 0.34)
    assert "decode      anchored: photographs are moved, not redrawn" in out
    assert (
        "vae.decode is anchored, since these are colour pictures without a plain ground"
        in Path("digits.yaml").read_text()
    )
    load_run_file(Path("digits.yaml"))


def test_colour_drawings_on_a_plain_ground_are_decoded_plainly(tmp_path):
    for name in ("cat", "dog"):
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        pixels = np.full((32, 32, 3), (250, 250, 240), np.uint8)
        pixels[8:24, 12:20] = (200, 10, 10)
        for number in range(2):
            Image.fromarray(pixels).save(folder / f"{number}.png")
    facts = inspect_data(tmp_path)
    assert (facts.channels, facts.photographs) == (3, False)


def test_a_palette_with_transparency_is_looked_at_without_a_warning(tmp_path):
    for name in ("cat", "dog"):
        picture = Image.new("P", (16, 16), 1)
        picture.putpalette([0, 0, 0, 200, 20, 30])
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(2):
            picture.save(tmp_path / "train" / name / f"{number}.png", transparency=b"\x00\x80")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inspect_data(tmp_path).channels == 3


@pytest.mark.parametrize("classes", [2, 120])
def test_colour_is_found_where_the_first_pictures_of_each_class_are_grey(classes, tmp_path):
    for name in range(classes):
        (tmp_path / "train" / str(name)).mkdir(parents=True)
        for number in range(480 // classes):
            colour = (90, 90, 90) if number < 300 // classes else (200, 90, 90)
            Image.new("RGB", (16, 16), colour).save(tmp_path / "train" / str(name) / f"{number:03}.png")
    assert inspect_data(tmp_path).channels == 3


@pytest.mark.parametrize(("side", "channels"), [(3, 3), (1, 1)])
def test_small_marks_make_pictures_coloured_and_single_pixels_do_not(side, channels, tmp_path):
    """The marks are red and green of one brightness, so that in grey the classes are the same."""
    for name, colour in (("off", (200, 0, 0)), ("on", (0, 102, 0))):
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        for number in range(30):
            pixels = np.full((32, 32, 3), 120, np.uint8)
            pixels[number % 28 :, 9:][:side, :side] = colour
            Image.fromarray(pixels).save(folder / f"{number}.png")
    assert inspect_data(tmp_path).channels == channels


@pytest.mark.usefixtures("known_speeds")
def test_classes_with_few_images_are_named_in_a_note(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, count in (("cat, wild", 3), ("dog", 25)):
        for number in range(count):
            colour_picture(tmp_path / "digits/train" / name / f"{number}.png", 16, 16)
    tree, out = start(monkeypatch, capsys, "digits", "--minutes", 1)
    note = "1 of 2 classes have fewer than 20 training images, too few to rely on what is found there"
    assert f'{note}; add images: "cat, wild" (3)\n' in out
    assert '\n# Classes: "cat, wild", dog.\n' in Path("digits.yaml").read_text()
    assert tree["data"]["validation_share"] == 0.15


def test_pictures_are_looked_at_through_links_and_not_in_hidden_folders_as_a_run_reads_them(tmp_path):
    for name in ("cat", "dog"):
        for number in range(2):
            colour_picture(tmp_path / "elsewhere" / name / "more" / f"{number}.png", 40, 40)
        folder = tmp_path / "parts" / "train" / name
        folder.mkdir(parents=True)
        (folder / "linked").symlink_to(tmp_path / "elsewhere" / name)
        for number in range(9):
            colour_picture(folder / ".thumbnails" / f"{number}.png", 16, 16)
    colour_picture(tmp_path / "parts" / "train" / ".trash" / "0.png", 16, 16)
    facts = inspect_data(tmp_path / "parts")
    assert (facts.classes, facts.counts["train"], facts.width) == (("cat", "dog"), 4, 40)


def test_only_as_many_files_are_listed_as_are_looked_at(tmp_path, monkeypatch):
    for folder in ("a", "b"):
        for number in range(3):
            colour_picture(tmp_path / folder / f"{number}.png", 16, 16)
    walked = []
    walk = os.walk
    monkeypatch.setattr(
        os, "walk", lambda *args, **more: (walked.append(at) or at for at in walk(*args, **more))
    )
    assert len(_pictures(tmp_path, 2)) == 2
    assert [Path(where).name for where, _, _ in walked] == [tmp_path.name, "a"]


@pytest.mark.parametrize(
    ("width", "height", "size"), [(12, 40, 16), (33, 40, 32), (60, 48, 64), (900, 700, 64)]
)
def test_the_suggested_size_follows_the_pictures_and_stays_affordable(width, height, size, tmp_path):
    for name in ("cat", "dog"):
        for number in range(2):
            colour_picture(tmp_path / "train" / name / f"{number}.png", width, height)
    facts = inspect_data(tmp_path)
    assert (facts.image_size, facts.channels, facts.width, facts.height) == (size, 3, width, height)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["few"], "few: 2 training images are too few; add images"),
        (["nowhere"], "expected a folder of images, or an .npz file, found neither"),
        (["splits"], "found testing, training; rename testing/ to test/, training/ to train/"),
        (["part"], "found class folders such as cat/; move them into train/"),
        (
            ["classes"],
            "mkdir classes/.train && mv classes/*/ classes/.train && mv classes/.train classes/train",
        ),
        (["few/train"], "few/train: this is the train folder itself; give its parent: defuse init few"),
        (
            ["few/more"],
            "few/more: this folder of classes is beside train/; give its parent: defuse init few",
        ),
        (["."], "found no train/, but images below classes/; give a folder of this layout"),
        (["project"], "found no train/, but images below docs/; give a folder of this layout"),
        (["empty"], "expected train/ with a folder of images per class"),
        (["notes.npz"], "expected an .npz file of plain arrays"),
        (["mine.yaml"], "is no folder of images and no .npz file; did you mean `defuse run "),
        (["flat", "--out", "gone/flat.yaml"], "gone/flat.yaml: its folder does not exist; create it, or"),
        (["flat", "--out", "notes.npz"], "--out notes.npz: exists; choose another file"),
        (["flat", "--out", "empty", "--force"], "--out empty: cannot be written (Is a directory); choose"),
        (["small.npz"], "small.npz: image_size: expected greater than or equal to 8, found 6; resize"),
        (["flat", "--classifier", "nothing"], "expected package.module:factory, a file, a folder"),
        (
            ["flat", "--classifier", "timm:resnet18"],
            "needs --weights with a file, since nothing is downloaded",
        ),
        (["flat", "--weights", "notes.npz"], "give --classifier too"),
        (["flat", "--classifier", "notes.npz", "--weights", "notes.npz"], "the file holds its own"),
        (["flat", "--classifier", "a.b:c", "--weights", "gone.pt"], "expected a file of weights, found none"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for name in ("notes.npz", "mine.yaml"):
        Path(name).write_text("notes")
    np.savez("small.npz", train_images=np.zeros((20, 6, 6), np.uint8), train_labels=np.arange(20) % 2)
    for name in (
        "flat/cat",
        "splits/training/cat",
        "splits/testing/cat",
        "part/cat",
        "part/dog",
        "part/val/cat",
        "few/more/cat",
        "classes/cat",
        "classes/dog",
    ):
        colour_picture(tmp_path / name / "0.png", 16, 16)
    for name in ("docs", "runs"):  # a project, whose folders no command may move
        colour_picture(tmp_path / "project" / name / "0.png", 16, 16)
    Path("project/runs/run.yaml").touch()
    for name in ("cat", "dog"):
        colour_picture(tmp_path / "few/train" / name / "0.png", 16, 16)
    code, _, err = call(monkeypatch, capsys, "init", *options)
    assert line in one_line(err).replace(str(tmp_path) + "/", "")
    assert code == 2


@pytest.mark.usefixtures("known_speeds")
@pytest.mark.parametrize(
    ("images", "out", "file", "following"),
    [
        ("my parts", None, "my-parts.yaml", "defuse run my-parts.yaml"),
        ("日本", None, "images.yaml", "defuse run images.yaml"),
        ("traffic", None, "traffic-images.yaml", "defuse run traffic-images.yaml"),
        ("a" * 120, None, "a" * 90 + ".yaml", f"defuse run {'a' * 90}.yaml"),
        ("digits.v2", None, "digits.v2.yaml", "defuse run digits.v2.yaml"),
        ("digits", "my run.yaml", "my run.yaml", "defuse run 'my run.yaml' --name my-run"),
    ],
)
def test_the_next_command_has_a_name_that_a_run_can_have(
    images, out, file, following, pictures, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path(images).symlink_to(pictures)
    options = [] if out is None else ["--out", out]
    code, printed, err = call(monkeypatch, capsys, "init", images, "--minutes", 1, *options)
    assert code == 0, err
    assert Path(file).is_file()
    assert printed.endswith(f"next: {following}\n")
    _, _, _, *name = shlex.split(following)
    assert run_name(name[1] if name else None, Path(file))


def test_minutes_that_are_no_number_are_refused(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(monkeypatch, capsys, "init", pictures, "--minutes", "nan")
    assert code == 2
    assert "'--minutes': expected a number from 1 to 10,000, found 'nan'" in err


def test_a_classifier_from_an_unset_variable_is_refused(pictures, monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, "init", pictures, "--classifier", "")
    assert (code, "'--classifier': expected a value, found an empty one" in err) == (2, True)


@pytest.mark.usefixtures("known_speeds")
def test_more_classes_leave_cells_of_less_weight(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 255, (400, 16, 16), np.uint8)
    np.savez("many.npz", train_images=images, train_labels=np.arange(400) % 100)
    assert call(monkeypatch, capsys, "init", "many.npz", "--minutes", 1)[0] == 0
    assert load_run_file(Path("many.yaml")).distill.min_weight == 0.002
