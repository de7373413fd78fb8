"""The image size that `defuse init` chooses for a classifier of the user's own."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from defuse_core.config import DataSection
from defuse_core.data import Images, Splits, open_splits
from defuse_core.data.images import evenly_spaced
from defuse_core.errors import DataError
from defuse_core.models.probe import least_plausible
from defuse_core.protocols import silent
from defuse_core.suggest import DataFacts, inspect_data
from defuse_core.suggest.classifier_inputs import (
    _best_size,
    _new_classifier,
    _notes,
    _probe,
    _vae,
    fit_image_size,
)
from defuse_core.suggest.plan import plan_run
from defuse_core.suggest.speeds import Speeds
from tests.command_line import call, one_line
from tests.conftest import tiny
from tests.core.test_probe import CUSTOM, Reading

HERE = "tests.services.test_init_image_size"


@pytest.fixture(autouse=True)
def _known_speeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("defuse_core.suggest.plan.measure_speeds", lambda *_: Speeds(1e3, 1e3, 1e3, 1e3))
    monkeypatch.chdir(tmp_path)


class Brightness(nn.Module):
    """Calls dark pictures class 0 and bright ones class 1, where their size is right; any size is taken."""

    def __init__(self, right_at: int | None) -> None:
        super().__init__()
        self.right_at, self.scale = right_at, nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        margin = self.scale * (images.mean(dim=(1, 2, 3)) - 0.5)
        if self.right_at not in (None, images.shape[-1]):
            margin = 0 * margin
        return torch.stack([-margin, margin], dim=1)


def of_any_size() -> nn.Module:
    return Brightness(None)


def right_at_128() -> nn.Module:
    return Brightness(128)


def right_nowhere() -> nn.Module:
    return Brightness(0)


class Levels(nn.Module):
    """Takes pictures of the levels 130 to 161 for bright, but at each size so many of the darkest of them for dark."""

    def __init__(self, **wrong: int) -> None:
        super().__init__()
        self.wrong, self.scale = wrong, nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        level = (255 * images.mean(dim=(1, 2, 3))).round()
        bright = (level >= 130 + self.wrong.get(f"at_{images.shape[-1]}", 32)) & (level <= 161)
        margin = self.scale * torch.where(bright, 1.0, -1.0)
        return torch.stack([-margin, margin], dim=1)


def best_at_48() -> nn.Module:
    return Levels(at_32=10, at_48=0, at_64=2)


def best_at_128() -> nn.Module:
    return Levels(at_32=14, at_64=2, at_128=0)


def of_48() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(48 * 48, 2))


def of_48_in_colour() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 1, 1), nn.Flatten(), nn.Linear(48 * 48, 2))


def of_8() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(8 * 8, 2))


def of_40() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(40 * 40, 2))


def suggested(
    monkeypatch, capsys, width: int, height: int, factory: str, *options: object, coloured: bool = False
) -> tuple:
    """Return exit code, section data and what was printed, for dark and bright pictures of a size."""
    for name, level in (("black", 20), ("white", 230)):
        folder = Path("photos/train", name)
        folder.mkdir(parents=True)
        for number in range(30):
            pixels = np.full((height, width, 3), level + number % 3, np.uint8)
            pixels[..., 0] += 20 * coloured
            Image.fromarray(pixels).save(folder / f"{number}.png")
    net = globals()[factory]()
    save_file(net.state_dict(), "own.safetensors")
    chosen = ["--classifier", f"{HERE}:{factory}", "--weights", "own.safetensors"]
    code, out, err = call(monkeypatch, capsys, "init", "photos", *chosen, "--minutes", 1, *options)
    data = yaml.safe_load(Path("photos.yaml").read_text())["data"] if code == 0 else {}
    return code, data, out + err


@pytest.mark.parametrize(
    ("side", "factory"), [(48, "of_48"), (8, "of_8"), (40, "of_40"), (48, "of_any_size")]
)
def test_a_classifier_that_takes_the_pictures_as_they_are_gets_them_so(side, factory, monkeypatch, capsys):
    code, data, printed = suggested(monkeypatch, capsys, side, side, factory)
    assert (code, data.get("image_size")) == (0, side), printed
    assert "the classifier gets" not in printed


@pytest.mark.parametrize(
    ("side", "mode", "blue", "resized"),
    [
        (16, "L", 0, None),
        (16, "RGB", 0, None),
        (16, "P", 0, None),
        (20, "L", 0, True),
        (16, "RGBA", 0, True),
        (16, "RGB", 3, True),
    ],
)
def test_a_server_of_pictures_that_the_run_converts_converts_them_too(
    side, mode, blue, resized, monkeypatch, capsys
):
    """With `blue`, pictures are grey but for so many levels of blue, which a run takes for grey."""
    for level, name in ((20, "black"), (230, "white")):
        folder = Path("photos/train", name)
        folder.mkdir(parents=True)
        for number in range(30):
            pixels = np.full((side, side), level + number % 3, np.uint8)
            picture = Image.fromarray(np.stack([pixels, pixels, pixels + np.uint8(blue)], axis=2))
            picture.convert(mode).save(folder / f"{number}.png")
    assert call(monkeypatch, capsys, "init", "photos", "--minutes", 1)[0] == 0
    tree = yaml.safe_load(Path("photos.yaml").read_text())
    assert (tree["data"]["image_size"], tree.get("serve", {}).get("resize")) == (16, resized)


def test_where_the_pictures_own_size_cannot_be_the_size_at_which_the_classifier_is_right_is_taken(
    monkeypatch, capsys
):
    code, data, printed = suggested(monkeypatch, capsys, 60, 40, "right_at_128")
    assert (code, data.get("image_size")) == (0, 128), printed
    note = (
        "note        the classifier gets 128x128 pixels, but the pictures have 60x40; of 60 training images"
    )
    assert note.replace("60 training", "51 training") in printed  # 15 % are held out
    assert "% at 64" in printed
    assert "100 % at 128" in printed and "% at 224" not in printed


@pytest.mark.parametrize(
    ("factory", "size", "note"),
    [
        (
            "right_at_128",
            128,
            "the classifier gets 128x128 pixels, but the pictures have 32x32; of 51 training",
        ),
        (
            "right_nowhere",
            32,
            "the classifier gets 32x32 pixels, as the pictures have; of 51 training images",
        ),
    ],
)
def test_square_pictures_keep_their_size_unless_the_classifier_is_far_more_often_right_at_another(
    factory, size, note, monkeypatch, capsys
):
    code, data, printed = suggested(monkeypatch, capsys, 32, 32, factory)
    assert (code, data.get("image_size")) == (0, size), printed
    assert note in printed
    assert "if it was trained on another size, give that with --image-size" in printed


@pytest.mark.parametrize(
    ("width", "factory", "size"),
    [(60, best_at_48, 48), (32, best_at_128, 64)],  # 128 is far better than 32, and 64 nearly as good
)
def test_the_size_that_is_taken_is_the_one_that_all_sizes_together_speak_for(width, factory, size, tmp_path):
    for part in ("train", "validation", "test"):
        for name, level in (("black", 20), ("white", 130)):
            (folder := tmp_path / "photos" / part / name).mkdir(parents=True)
            for number in range(32):
                Image.new("L", (width, 32), level + number).save(folder / f"{number}.png")
    save_file(factory().state_dict(), weights := tmp_path / "own.safetensors")
    own = CUSTOM | {"import_path": f"{HERE}:{factory.__name__}", "weights": str(weights)}
    facts = inspect_data(tmp_path / "photos")
    assert fit_image_size(facts, own, None, silent).tree["data"]["image_size"] == size
    to_train = fit_image_size(facts, own | {"weights": None, "epochs": 5}, None, silent)
    assert to_train.tree["data"]["image_size"] == 32 and "it is right on" not in " ".join(to_train.notes)


def of_few_bright_ones_at_96() -> nn.Module:
    """Takes half of the bright pictures for dark where they are smaller."""
    return Levels(at_32=16, at_48=16, at_64=16, at_96=0)


def test_a_size_at_which_half_of_a_class_is_missed_is_not_taken_however_few_images_that_has(tmp_path):
    for part, dark in (("train", 300), ("validation", 4)):
        for name, levels in (("black", [20] * dark), ("white", range(131, 161, 5))):
            (folder := tmp_path / "photos" / part / name).mkdir(parents=True)
            for number, level in enumerate(levels):
                Image.new("L", (60, 32), level).save(folder / f"{number}.png")
    save_file(of_few_bright_ones_at_96().state_dict(), weights := tmp_path / "own.safetensors")
    own = CUSTOM | {"import_path": f"{HERE}:of_few_bright_ones_at_96", "weights": str(weights)}
    sized = fit_image_size(inspect_data(tmp_path / "photos"), own, None, silent)
    assert sized.tree["data"]["image_size"] == 96
    right = "right on 75 % at 32, 75 % at 48, 75 % at 64, 100 % at 96, on average over the classes"
    assert f"of 68 training images it is {right}" in sized.notes[0]


def test_the_files_are_listed_once_for_all_sizes_and_each_step_is_told(monkeypatch, tmp_path):
    opened, told = list[int](), list[str]()

    def opening(data: DataSection, seed: int) -> Splits:
        opened.append(data.image_size)
        return open_splits(data, seed)

    for level, name in ((20, "black"), (230, "white")):
        (folder := tmp_path / "photos/train" / name).mkdir(parents=True)
        for number in range(30):
            Image.new("L", (48, 48), level + number % 3).save(folder / f"{number}.png")
    save_file(right_at_128().state_dict(), weights := tmp_path / "own.safetensors")
    own = CUSTOM | {"import_path": f"{HERE}:right_at_128", "weights": str(weights)}
    facts = inspect_data(tmp_path / "photos")
    monkeypatch.setattr("defuse_core.suggest.classifier_inputs.open_splits", opening)
    plan = plan_run(facts, own, 1, lambda what, *_: told.append(what))
    assert (opened, plan.tree["data"]["image_size"]) == ([48], 128)
    steps = ["trying image sizes", "trying the classifier on training images", "measuring speeds"]
    assert list(dict.fromkeys(told)) == steps


@pytest.mark.parametrize("classes", [50, 200])
def test_sizes_are_compared_without_an_order_of_classes_that_explains_the_errors_of_few_images(classes):
    labels = np.arange(classes)
    wrong = np.random.default_rng(0).random(classes) < 0.6
    answers = np.where(wrong, np.random.default_rng(1).integers(0, classes, classes), labels)
    images = Images(answers.astype(np.uint8).reshape(-1, 1, 1, 1), labels)
    sample = evenly_spaced(classes, 64)
    facts = DataFacts("folder", Path(), 1, 1, 16, 1, False, tuple(map(str, labels)), {}, ())
    probe = _probe(Reading(classes), tiny(classifier=CUSTOM), images, facts)
    assert probe.best_accuracy == (answers == labels)[sample].mean()


@pytest.mark.parametrize(
    ("side", "accuracies", "chosen"),
    [
        (32, {32: 0.55, 64: 0.88, 48: 0.88}, 32),
        (32, {32: 0.55, 64: 0.97, 48: 0.88}, 64),
        (33, {32: 0.88, 64: 0.9}, 64),
        (33, {32: 0.7, 64: 0.88}, 64),
        (33, {64: 1.0, 32: 0.96}, 32),  # as right as the best but for 4 points
    ],
)
def test_a_size_at_which_one_answer_for_all_images_is_as_often_right_is_taken_only_where_all_are_so(
    side, accuracies, chosen
):
    facts = DataFacts("folder", Path(), side, side, 32, 1, False, ("bad", "ok"), {}, ())
    assert _best_size(facts, accuracies, least_plausible(0.88)) == chosen


def test_the_note_on_the_size_tells_the_accuracies_of_those_that_were_compared():
    facts = DataFacts("folder", Path(), 32, 32, 32, 1, False, ("a", "b"), {}, ())
    assert _notes(facts, 32, {32: 1.0}, 51) == []
    (line,) = _notes(facts, 64, {64: 1.0, 32: 0.5}, 51)
    right = "it is right on 50 % at 32, 100 % at 64, on average over the classes; if it was trained on another size"
    assert line.startswith(
        f"the classifier gets 64x64 pixels, but the pictures have 32x32; of 51 training images {right}"
    )


def test_a_classifier_that_is_right_at_any_size_gets_the_suggested_one_and_no_other_is_tried(
    monkeypatch, capsys
):
    code, data, printed = suggested(monkeypatch, capsys, 60, 40, "of_any_size")
    assert (code, data.get("image_size")) == (0, 32), printed
    assert "the classifier gets 32x32 pixels, but the pictures have 60x40; if it was trained" in printed


def test_a_classifier_of_colour_pictures_gets_grey_ones_in_colour_and_a_note_says_so(monkeypatch, capsys):
    code, data, printed = suggested(monkeypatch, capsys, 48, 48, "of_48_in_colour")
    assert (code, data.get("image_size"), data.get("channels")) == (0, 48, 3), printed
    assert "used as     48x48, colour" in printed
    assert (
        "note        the pictures look grey, but the classifier takes colour ones, so data.channels is 3"
        in printed
    )


def test_a_classifier_of_grey_pictures_gets_colour_ones_in_grey(monkeypatch, capsys):
    code, data, printed = suggested(monkeypatch, capsys, 48, 48, "of_48", coloured=True)
    assert (code, data.get("image_size"), data.get("channels")) == (0, 48, 1), printed
    assert "the pictures look in colour, but the classifier takes grey ones, so data.channels is 1" in printed


def test_a_size_can_be_asked_for(monkeypatch, capsys):
    code, data, printed = suggested(monkeypatch, capsys, 60, 40, "of_48", "--image-size", 48)
    assert (code, data.get("image_size")) == (0, 48), printed


def test_an_odd_size_is_refused_with_the_way_of_a_classifier_that_needs_it(monkeypatch, capsys):
    code, _, printed = suggested(monkeypatch, capsys, 60, 40, "of_48", "--image-size", 51)
    assert code == 2
    assert "give 52, and let a classifier of 51 resize them: F.interpolate(images, 51, " in one_line(printed)


def test_an_asked_size_that_the_classifier_does_not_take_is_refused_in_the_words_of_the_option(
    monkeypatch, capsys
):
    code, _, printed = suggested(monkeypatch, capsys, 60, 40, "of_48", "--image-size", 32)
    assert code == 2
    assert one_line(printed).endswith("leave --image-size 32 out, or give the size that it was trained on")
    assert "data.image_size" not in printed


def test_the_refusal_of_a_classifier_that_takes_no_tried_size_names_the_option(monkeypatch, capsys):
    code, _, printed = suggested(monkeypatch, capsys, 60, 60, "of_40")
    assert code == 2
    assert "tried sizes 60, 64, 96, 128, 224, 256, 16, 28, 32, 48" in one_line(printed)
    assert "give the one that it was trained on (8 to 512) with --image-size; if that is odd, " in printed


def of_three_classes() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, 3))


class ChangingItsInput(Brightness):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.mul_(2))


def changing_its_input() -> nn.Module:
    return ChangingItsInput(None)


@pytest.mark.parametrize(
    ("factory", "line"),
    [
        (
            "of_three_classes",
            "found (2, 3); the data set has 2 classes, so let it return 2 logits for each image",
        ),
        ("changing_its_input", "or begin with x = x.clone()"),
    ],
)
def test_where_the_size_is_not_the_matter_no_other_one_is_asked_for(factory, line, monkeypatch, capsys):
    code, _, printed = suggested(monkeypatch, capsys, 60, 60, factory)
    assert code == 2
    assert one_line(printed).endswith(line)


def as_many_logits_as_columns() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 1, 1), nn.AdaptiveAvgPool2d((1, None)), nn.Flatten())


def test_where_the_number_of_logits_follows_the_size_another_one_is_asked_for(monkeypatch, capsys):
    code, _, printed = suggested(monkeypatch, capsys, 60, 60, "as_many_logits_as_columns")
    assert code == 2
    assert "found (2, 60)" in printed
    assert one_line(printed).endswith("give the next even one, and let the classifier resize its images")


@pytest.mark.parametrize("size", [27, 4])
def test_a_size_that_cannot_be_is_refused(size, monkeypatch, capsys):
    code, _, printed = suggested(monkeypatch, capsys, 48, 48, "of_any_size", "--image-size", size)
    assert code == 2
    assert "--image-size" in printed


def test_images_of_an_npz_file_are_not_resized_but_may_have_28_pixels(monkeypatch, capsys):
    images = np.random.default_rng(0).integers(0, 255, (60, 28, 28), np.uint8)
    np.savez("x.npz", train_images=images, train_labels=np.arange(60) % 3)
    code, _, err = call(monkeypatch, capsys, "init", "x.npz", "--image-size", 32)
    assert code == 2
    assert "images of an .npz file are used as they are (28x28)" in one_line(err)
    assert call(monkeypatch, capsys, "init", "x.npz", "--minutes", 1)[0] == 0


@pytest.mark.parametrize(("height", "width"), [(75, 75), (75, 76), (76, 75)])
def test_images_of_an_npz_file_with_an_odd_side_are_refused_with_what_to_do(height, width):
    np.savez("x.npz", train_images=np.zeros((60, height, width), np.uint8), train_labels=np.arange(60) % 3)
    line = f"even height and width, .* found {width}x{height} pixels; pad or resize them, best to"
    with pytest.raises(DataError, match=line):
        inspect_data(Path("x.npz"))


def test_an_npz_file_without_training_images_is_refused():
    np.savez("x.npz", images=np.zeros((60, 28, 28), np.uint8), labels=np.arange(60) % 3)
    with pytest.raises(
        DataError, match=r"^mine: expected an .npz file with train_images, found none; save it again$"
    ):
        inspect_data(Path("x.npz"), "mine")


@pytest.mark.parametrize(
    ("size", "channels", "classifier", "vae"),
    [
        (16, 1, {"stages": 3}, (2, 16, 16)),
        (28, 1, {"stages": 2}, (2, 16, 16)),
        (30, 1, {"stages": 1}, (1, 16, 16)),
        (32, 1, {"stages": 4}, (3, 16, 16)),
        (32, 3, {"stem": "small"}, (3, 16, 32)),
        (64, 1, {"stem": "small"}, (4, 32, 32)),
        (96, 3, {"stem": "imagenet"}, (4, 32, 32)),
    ],
)
def test_size_and_colour_decide_the_networks(size, channels, classifier, vae):
    facts = DataFacts("npz", Path("x.npz"), size, size, size, channels, False, ("a", "b"), {}, ())
    suggested, sections = _new_classifier(facts, size), _vae(size, channels)
    assert suggested.items() >= classifier.items()
    assert suggested["architecture"] == ("cnn" if "stages" in classifier else "resnet18")
    assert (sections["encoder_stages"], sections["latent_dim"], sections["channels"]) == vae


@pytest.mark.parametrize(("side", "noted"), [(130, True), (66, True), (96, False), (28, False)])
def test_a_size_that_leaves_the_vae_large_dense_layers_is_noted(side, noted):
    facts = DataFacts("npz", Path("x.npz"), side, side, side, 1, False, ("a", "b"), {}, ())
    np.savez("x.npz", train_images=np.zeros((8, side, side), np.uint8), train_labels=np.arange(8) % 2)
    notes = fit_image_size(facts, None, None, silent).notes
    assert [note.partition(" only ")[0] for note in notes] == [f"the β-VAE can halve {side} pixels"] * noted


def test_a_plan_that_needs_longer_than_the_minutes_asked_for_says_so(monkeypatch, capsys):
    monkeypatch.setattr("defuse_core.suggest.plan.measure_speeds", lambda *_: Speeds(0.1, 0.1, 0.1, 0.1))
    code, _, printed = suggested(monkeypatch, capsys, 48, 48, "of_any_size")
    assert code == 0
    assert "1 minute cannot be enough: a run of 51 images" in printed
    (needed,) = re.findall(r"a run of 51 images .* takes about ([\d,]+) minutes", printed)
    assert float(needed.replace(",", "")) > 1
    assert f", for about {needed} minutes; next: defuse run" in printed
