"""What a user's classifier returns and expects is found before anything is trained."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from defuse_core.config import ClassifierSection
from defuse_core.data import Images, Splits, open_splits
from defuse_core.data.images import PictureFiles, evenly_spaced, read_picture, to_picture
from defuse_core.errors import ModelError
from defuse_core.models import accuracy, check_outputs, log_classifier, probe_classifier
from defuse_core.models.adapters import adapt, as_logits, find_logits, to_range
from defuse_core.models.probe import (
    BETTER_RANGE,
    ClassifierProbe,
    _clearly_better,
    far_better_range,
    fitting_order,
    rows_of_all_classes,
    warnings_of,
)
from defuse_core.suggest.classifier_inputs import probe_notes, set_probed
from tests.conftest import tiny
from tests.own_classifiers import IMAGENET, WithoutAnswer, digits, trained

CUSTOM = {"architecture": "custom", "import_path": "tests.own_classifiers:plain"}


def section(**fields: object) -> ClassifierSection:
    return ClassifierSection.model_validate({**CUSTOM, **fields})


@pytest.fixture(scope="module")
def splits() -> Splits:
    return open_splits(tiny().data, 0)


def test_every_input_range_maps_black_and_white_to_its_ends():
    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    assert to_range(images, "0..1") is images
    assert to_range(images, "-1..1")[:, 0, 0, 0].tolist() == [-1, 1]
    assert to_range(images, "0..255")[:, 0, 0, 0].tolist() == pytest.approx([0, 255])
    torch.testing.assert_close(
        to_range(images, "imagenet")[1, :, 0, 0], torch.tensor([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225])
    )
    assert to_range(images[:, :1], "imagenet").shape == (2, 1, 1, 1)


@pytest.mark.parametrize(
    ("wanted", "shift", "factor"), [("-1..1", 0.5, 0.5), ("imagenet", *IMAGENET), ("0..255", 0.0, 1 / 255)]
)
def test_the_input_range_that_a_classifier_was_trained_on_is_found_and_then_given(
    wanted, shift, factor, splits
):
    net = adapt(trained(shift, factor), section(), 10)
    probe = probe_classifier(net, section(), splits.train, splits.classes)
    found = probe.best_range("0..1")
    assert probe.by_range[wanted] > 0.9
    assert probe.by_range[found] >= probe.by_range[wanted] - 0.05  # batch normalisation makes ranges alike
    adapted = adapt(net, section(input_range=wanted), 10)
    assert accuracy(adapted, splits.train) == pytest.approx(probe.by_range[wanted])
    again = probe_classifier(adapted, section(input_range=wanted), splits.train, splits.classes)
    assert again.by_range == probe.by_range


class Guarded(nn.Module):
    """A classifier that takes no pixels outside [0, 1]."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.net, self.error = trained(), error

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.min() < 0 or images.max() > 1:
            raise self.error
        logits: torch.Tensor = self.net(images)
        return logits


def test_an_input_range_that_a_classifier_refuses_is_no_candidate(splits, caplog):
    caplog.set_level("INFO")
    net = adapt(Guarded(ValueError("images must be in [0, 1]")), section(), 10)
    log_classifier(tiny(classifier={**CUSTOM}), net, splits, {"train": 0.95})
    assert re.search(r"by input range on 300 training images: 0\.\.1 [\d.]+ %$", caplog.text, re.MULTILINE)


@pytest.mark.parametrize(
    ("error", "given"),
    [
        (ValueError("images must be in [0, 1]"), "-1..1"),
        (torch.OutOfMemoryError("CUDA out of memory"), "0..1"),
        (RuntimeError("CUDA error: device-side assert triggered"), "0..1"),
    ],
)
def test_an_error_of_the_given_input_range_or_of_the_machine_ends_the_probe(error, given, splits):
    net = adapt(Guarded(error), section(), 10)
    with pytest.raises(type(error), match=re.escape(str(error))):
        probe_classifier(net, section(input_range=given), splits.train, splits.classes)


def test_each_image_file_is_read_once_for_all_input_ranges(tmp_path, splits, monkeypatch):
    read = list[str]()

    def reading(path: str, channels: int, size: int) -> np.ndarray:
        read.append(path)
        return read_picture(path, channels, size)

    monkeypatch.setattr("defuse_core.data.images.read_picture", reading)
    files, some = [], splits.train.take(slice(0, 40))
    for number, pixels in enumerate(some.pixels):
        to_picture(pixels).save(tmp_path / f"{number}.png")
        files.append(str(tmp_path / f"{number}.png"))
    on_disk = Images(PictureFiles(files, 1, 16), some.labels)
    net = adapt(trained(), section(), 10)
    probed = [probe_classifier(net, section(), images, splits.classes) for images in (on_disk, some)]
    assert sorted(read) == sorted(files) and probed[0] == probed[1]


@pytest.mark.parametrize(("bias", "far", "needed"), [(6, False, False), (9, True, False), (20, True, True)])
def test_an_input_range_that_heals_a_fault_is_better_and_needed_only_where_most_answers_are_wrong(
    bias, far, needed, splits
):
    net = trained()
    with torch.no_grad():
        net.body[-1].bias[8] += bias
    probe = probe_classifier(net, section(), splits.train, splits.classes)
    assert probe.best_range("0..1") != "0..1"
    assert (far_better_range(probe.by_range, "0..1") is not None) == far
    assert (probe.needed_range != "0..1") == needed


def test_another_input_range_is_noted_where_it_is_certainly_better_by_few_points():
    """As of a classifier for [-1, 1] that copes with most pixels in [0, 1]: 14 % of errors there, 9 % in its own."""
    labels = np.arange(500) % 10
    before, after = np.ones((2, 500), bool)
    before[:70] = after[:45] = False  # 25 gained of 500, none lost
    certain = _clearly_better(before, after, labels, 10, BETTER_RANGE)
    assert certain and not _clearly_better(before, after, labels, 10)
    probe = replace(with_accuracies(0.86, 0.905), best_is_certain=certain)
    assert probe.best_range("0..1") == "-1..1"
    assert replace(probe, best_is_certain=False).best_range("0..1") == "0..1"
    assert replace(with_accuracies(0.86, 0.875), best_is_certain=certain).best_range("0..1") == "0..1"
    by_little, by_much = {}, {}
    (note,) = set_probed(by_little, probe)
    assert not by_little and note.endswith("set classifier.input_range: -1..1 if it was trained on that")
    (note,) = set_probed(by_much, replace(with_accuracies(0.73, 0.85), best_is_certain=certain))
    assert by_much == {"input_range": "-1..1"} and "before the classes are reordered" not in note


class Contrast(nn.Module):
    """Trained on pixels in [-1, 1]: answers 1 where their deviation is over a limit."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        margin = images.std((1, 2, 3), correction=0) - self.limit
        return torch.stack([-margin, margin], dim=1)


@pytest.mark.parametrize(("limit", "plainly_worse"), [(0.17, True), (0.22, False)])
@pytest.mark.parametrize("few", [100, 5000])
def test_an_input_range_that_is_better_on_a_class_of_few_images_alone_is_noted_and_not_set(
    limit, plainly_worse, few
):
    """In [0, 1] the classifier misses most images of class 1, and in [-1, 1] it takes a few of class 0 for that."""
    rng, labels = np.random.default_rng(0), np.repeat([0, 1], [5000, few])
    contrast = np.exp(rng.normal(np.log([0.05, 0.16]), [0.3, 0.35], (len(labels), 2)))
    deviation = contrast[np.arange(len(labels)), labels].clip(0, 0.45)
    pixels = 127.5 + 255 * deviation[:, None, None, None] * np.where(np.arange(64) % 2, 1, -1).reshape(
        1, 8, 8
    )
    images, net = Images(pixels.astype(np.uint8), labels), adapt(Contrast(limit), section(), 2)
    written: dict[str, object] = {}
    (note,) = set_probed(written, probe_classifier(net, section(), images, ("healthy", "sick")))
    assert written == ({} if few == 100 else {"input_range": "-1..1"})
    to_do = "set classifier.input_range: -1..1" if few == 100 else "remove it"
    assert f"with 0..1, on average over the classes; {to_do} if it was trained on" in note
    right = [accuracy(adapt(net, section(input_range=name), 2), images) for name in ("0..1", "-1..1")]
    assert (right[0] > right[1]) == (plainly_worse and few == 100)


def test_a_sample_has_images_of_each_class_however_few_there_are():
    labels = np.repeat([0, 1, 3], [5000, 100, 7])
    rows = rows_of_all_classes(labels, 4, 512, 64)
    assert (np.diff(rows) > 0).all() and np.bincount(labels[rows])[[1, 2, 3]].tolist()[1:] == [0, 7]
    of_second = rows[labels[rows] == 1]
    assert len(of_second) >= 64 and np.diff(of_second).max() <= 2
    assert rows_of_all_classes(labels, 4, 512, 0).tolist() == evenly_spaced(5107, 512).tolist()


def test_an_input_range_that_is_not_set_does_not_count_for_an_image_size():
    probe = with_accuracies(0.75, 1.0)
    assert (probe.accuracy_as_set("0..1"), probe.best_accuracy) == (0.75, 1.0)
    assert replace(probe, best_is_certain=True).accuracy_as_set("0..1") == 1.0
    assert replace(probe, as_bgr=0.9).accuracy_as_set("0..1") == 0.9
    of_a_rare_class = replace(probe, plain_by_range={"0..1": 0.96, "-1..1": 1.0}, best_is_certain=True)
    assert of_a_rare_class.accuracy_as_set("0..1") == 0.75


def with_accuracies(given: float, other: float) -> ClassifierProbe:
    """As of a sample in which each class has as many images."""
    by_range = {"0..1": given, "-1..1": other}
    return replace(some_probe(), by_range=by_range, plain_by_range=by_range)


def some_probe() -> ClassifierProbe:
    return ClassifierProbe(
        images=500,
        by_range={},
        plain_by_range={},
        best="-1..1",
        constant=0.1,
        best_is_certain=False,
        needed_range="0..1",
        class_order=None,
        order_is_certain=False,
        reordered=0.0,
        names=None,
        answers=10,
        like_sigmoid=False,
        nan_by_range={"0..1": 0, "-1..1": 0},
    )


def test_a_warning_about_a_thousand_classes_is_one_readable_line():
    names = [f"class {number}" for number in range(1000)]
    probe = replace(some_probe(), by_range={"0..1": 0.1}, class_order=tuple(range(1000)), reordered=0.9)
    reordered, wrong = warnings_of(probe, section(), names, 0.1)
    assert reordered.endswith("`defuse init` writes for these images and weights")
    assert wrong.endswith("class 19 and 980 more")


def test_another_order_of_the_classes_is_found_and_then_set_right(splits, caplog):
    order = tuple(np.roll(np.arange(10), 3).tolist())  # of logits: class 0 is the logit order[0]
    net = nn.Sequential(trained(), Permuted(torch.argsort(torch.tensor(order))))
    adapted = adapt(net, section(), 10)
    assert probe_classifier(adapted, section(), splits.train, splits.classes).class_order == order
    log_classifier(tiny(classifier={**CUSTOM}), adapted, splits, {"train": 0.1})
    assert f"set classifier.class_order: {list(order)}" in caplog.text
    assert "does it number the classes in this order? 0, 1, 2" in caplog.text
    right = nn.Sequential(trained(), Permuted(torch.argsort(torch.tensor(order))))
    chosen = section(class_order=order)
    assert accuracy(adapt(right, chosen, 10), splits.train) > 0.9
    assert probe_classifier(right, chosen, splits.train, splits.classes).class_order is None


def test_a_class_that_the_classifier_never_answers_is_told_by_the_plan(splits):
    probe = probe_classifier(adapt(WithoutAnswer(), section(), 10), section(), splits.train, splits.classes)
    (line,) = probe_notes(probe)
    assert line.startswith(
        "the classifier never answers 3 on 300 training images, so many scenarios may show this"
    )
    reordered = replace(probe, class_order=tuple(range(10)))
    assert probe_notes(reordered) == [] == probe_notes(replace(probe, unanswered=()))


class BrightThird(nn.Module):
    """Answers whether the third channel, which is red in BGR, is bright."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        margin = 9 * (images[:, 2].mean((1, 2)) - 0.5)
        return torch.stack([-margin, margin], dim=1)


def test_a_classifier_of_bgr_images_is_told_so_and_its_classes_keep_their_order():
    labels = np.arange(80) % 2
    pixels = np.repeat(np.stack([labels, labels, np.arange(80) // 2 % 2], axis=1) * 255, 64, axis=1)
    images, names = Images(pixels.reshape(80, 3, 8, 8).astype(np.uint8), labels), ("dark", "red")
    probe = probe_classifier(adapt(BrightThird(), section(), 2), section(), images, names)
    assert (probe.as_bgr, probe.class_order) == (1.0, None)
    line = (
        "right on 100.0 % of 80 training images with the channels reversed, as OpenCV reads them, on 50.0 % in the "
        "order RGB, on average over the classes; if it was trained on BGR, let its forward begin with images = "
        "images.flip(1)"
    )
    written: dict[str, object] = {}
    assert (set_probed(written, probe), written) == ([], {})
    assert probe_notes(probe) == [f"the classifier is {line}"]
    told = [
        probe_notes(replace(probe, answers=1, constant=share)) for share in (0.9, 1.0)
    ]  # 1.0: of one class
    assert ["one answer; check its weights" in " ".join(lines) for lines in told] == [True, False]
    assert warnings_of(probe, section(), names, 1.0) == [f"it is {line}"]


class Colours(nn.Module):
    """Answers with the number of the brightest channel."""

    def __init__(self, names: tuple[str, ...] = ()) -> None:
        super().__init__()
        # of Hugging Face's models
        self.net = SimpleNamespace(config=SimpleNamespace(id2label=dict(enumerate(names))))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 9 * images.mean((2, 3))


def test_an_order_of_classes_that_explains_the_errors_as_bgr_does_is_told_too_and_set_where_the_model_names_it():
    labels = np.arange(90) % 3
    pixels = np.random.default_rng(0).integers(0, 128, (90, 3, 8, 8), dtype=np.uint8)
    pixels[np.arange(90), 2 - labels] += 127
    images, names = Images(pixels, labels), ("blue", "green", "red")
    probe = probe_classifier(adapt(Colours(), section(), 3), section(), images, names)
    assert (probe.as_bgr, probe.class_order) == (1.0, (2, 1, 0))
    written: dict[str, object] = {}
    (note,) = set_probed(written, probe)
    assert not written and note.endswith("set classifier.class_order: [2, 1, 0] if it does")
    assert [line[:20] for line in warnings_of(probe, section(), names, 1.0)] == [
        "it is right on 100.0",
        "it seems to number t",
    ]

    named = adapt(Colours(("red", "green", "blue")), section(), 3)
    probe = probe_classifier(named, section(), images, names)
    assert (probe.as_bgr, probe.class_order) == (None, (2, 1, 0))
    set_probed(written, probe)
    assert written == {"class_order": [2, 1, 0]}

    renumbered = nn.Sequential(Colours(), Permuted(torch.tensor([0, 2, 1])))
    probe = probe_classifier(adapt(renumbered, section(), 3), section(), images, names)
    assert probe.as_bgr is None and probe.class_order is not None
    right = probe_classifier(adapt(Colours(), section(), 3), section(), Images(pixels, 2 - labels), names)
    assert (right.as_bgr, right.class_order) == (None, None)


class Permuted(nn.Module):
    def __init__(self, order: torch.Tensor) -> None:
        super().__init__()
        self.order = order

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[:, self.order]


def test_a_good_classifier_gives_no_warning(splits, caplog):
    net = adapt(trained(), section(), 10)
    log_classifier(tiny(classifier={**CUSTOM}), net, splits, {"train": accuracy(net, splits.train)})
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_probabilities_become_logits_that_give_the_same_probabilities_back():
    probabilities = torch.tensor([[0.7, 0.3, 0.0]])
    logits = as_logits(probabilities, "probabilities", None)
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits.softmax(1), probabilities)


def test_logits_are_found_wherever_classifiers_put_them():
    logits = torch.rand(2, 3)
    assert find_logits((logits, None))[1] == "the first of a tuple of 2"
    assert find_logits({"out": logits})[1] == "['out']"
    with pytest.raises(ModelError, match="found a dict with a, b; wrap it"):
        find_logits({"a": logits, "b": logits})


def test_complex_logits_are_refused():
    with pytest.raises(ModelError, match="of real numbers, found complex ones; return their .real$"):
        as_logits(torch.ones(2, 3) * 1j, "logits", None)


def test_the_best_order_is_a_one_to_one_assignment():
    assert fitting_order(np.array([1, 1, 2, 0]), np.array([0, 0, 1, 2]), 3).tolist() == [1, 2, 0]


class Reading(nn.Module):
    """Answers with the level of the one pixel that an image has."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        answers = (255 * images.flatten()).round().long().clamp(0, self.classes - 1)
        return nn.functional.one_hot(answers, self.classes).float()


def order_found(answers: np.ndarray, labels: np.ndarray, classes: int) -> tuple[int, ...] | None:
    images = Images(answers.astype(np.uint8).reshape(-1, 1, 1, 1), labels)
    return probe_classifier(Reading(classes), section(), images, [*map(str, range(classes))]).class_order


@pytest.mark.parametrize(("classes", "right"), [(200, 0.7), (200, 0.5), (100, 0.8), (250, 0.0)])
def test_an_order_that_explains_the_errors_of_few_images_alone_is_not_found(classes, right):
    labels = np.repeat(np.arange(classes), 2)
    wrong = np.random.default_rng(0).random(len(labels)) >= right
    others = np.random.default_rng(1).integers(0, classes, len(labels))
    assert order_found(np.where(wrong, others, labels), labels, classes) is None


@pytest.mark.parametrize("in_turn", [False, True])
def test_another_order_of_many_classes_is_found_however_the_images_are_sorted(in_turn):
    labels = np.arange(400) % 40 if in_turn else np.repeat(np.arange(40), 10)
    order = np.random.default_rng(0).permutation(40)
    assert order_found(order[labels], labels, 40) == tuple(order)


@pytest.mark.parametrize("counts", [(4, 508), (4, 250, 258), (10, 150, 340), (20,) * 9 + (300,)])
def test_nothing_is_suggested_for_a_classifier_that_knows_nothing_of_unequal_classes(counts):
    classes, rng = len(counts), np.random.default_rng(0)
    pixels = rng.integers(0, 255, (sum(counts), 1, 8, 8)).astype(np.uint8)
    images = Images(pixels, np.repeat(np.arange(classes), counts))
    for seed in range(8):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, classes)).eval()
        written: dict[str, object] = {}
        probe = probe_classifier(net, section(), images, [*map(str, range(classes))])
        assert (set_probed(written, probe), written) == ([], {})


def test_another_order_of_unequal_classes_is_found_where_the_small_one_has_enough_images():
    for few, found in ((4, None), (40, (1, 0))):
        labels = (np.arange(512) >= few).astype(np.int64)
        assert order_found(1 - labels, labels, 2) == found


def test_a_class_without_images_keeps_its_own_answer():
    assert fitting_order(np.array([1, 0]), np.array([0, 1]), 4).tolist() == [1, 0, 2, 3]


def test_a_class_order_that_is_no_permutation_is_refused():
    with pytest.raises(ModelError, match="expected each of the logits 0 to 9 once, found"):
        adapt(trained(), section(class_order=(0, 0)), 10)
    with pytest.raises(ModelError) as refused:
        adapt(trained(), section(class_order=range(100_000)), 10)
    assert len(str(refused.value)) < 250


@pytest.mark.parametrize("ends", ["sigmoid", "logits"])
def test_outputs_of_a_sigmoid_are_warned_of_with_what_to_return(ends, caplog):
    net = adapt(nn.Sequential(trained(), *([nn.Sigmoid()] if ends == "sigmoid" else [])), section(), 10)
    check_outputs(net, section(), digits(), 10)
    assert not caplog.text  # `init` tries several sizes
    probe = probe_classifier(net, section(), digits(), list("0123456789"))
    for told in (warnings_of(probe, section(), list("0123456789"), 1.0), probe_notes(probe)):
        assert any("if it ends in one, return what its sigmoid is given" in line for line in told) == (
            ends == "sigmoid"
        )


def swapped(range_trained_on: str) -> nn.Module:
    """A classifier of dark (0) and bright (1) images that numbers them the other way, and is constant otherwise."""

    class Swapped(nn.Module):
        def forward(self, images):
            low, high = {"0..1": (0.0, 1.0), "-1..1": (-1.0, 1.0)}[range_trained_on]
            mean = images.flatten(1).mean(1)
            dark = (mean < (low + high) / 2).float()
            known = (images.amin((1, 2, 3)) >= low - 0.01) & (images.amin((1, 2, 3)) < low + 0.01)
            return torch.stack([torch.where(known, 1 - dark, 1.0), torch.where(known, dark, 0.0)], 1) * 9

    return Swapped()


@pytest.mark.parametrize("range_trained_on", ["0..1", "-1..1"])
def test_a_swapped_order_of_two_classes_is_found_with_its_range(range_trained_on):
    labels = np.arange(80) % 2
    pixels = np.where(labels[:, None, None, None], 220, 30) + np.arange(80)[:, None, None, None] % 7
    pixels = np.broadcast_to(pixels, (80, 1, 8, 8)).astype(np.uint8).copy()
    pixels[:, :, 0, 0] = 0
    net = adapt(swapped(range_trained_on), section(), 2)
    written: dict[str, object] = {}
    probe = probe_classifier(net, section(), Images(pixels, labels), ["dark", "bright"])
    told = " ".join(set_probed(written, probe))
    assert ("before the classes are reordered" in told) == (range_trained_on != "0..1")
    expected = {} if range_trained_on == "0..1" else {"input_range": range_trained_on}
    assert written == {**expected, "class_order": [1, 0]}


def test_an_order_that_may_be_wrong_for_some_classes_is_noted_and_not_written():
    rng = np.random.default_rng(0)
    labels, order = np.repeat(np.arange(100), 5), rng.permutation(100)
    wrong = rng.random(500) < 0.2
    answers = np.where(wrong, rng.integers(0, 100, 500), order[labels])

    class Numbered(nn.Module):
        def forward(self, images):
            rows = (images[:, 0, 0, 0] * 255).round().long() * 256 + (images[:, 0, 0, 1] * 255).round().long()
            return 9 * torch.nn.functional.one_hot(torch.tensor(answers)[rows.clamp(0, 499)], 100).float()

    pixels = np.zeros((500, 1, 8, 8), np.uint8)
    pixels[:, 0, 0, 0], pixels[:, 0, 0, 1] = np.divmod(np.arange(500), 256)
    names = [str(number) for number in range(100)]
    probe = probe_classifier(adapt(Numbered(), section(), 100), section(), Images(pixels, labels), names)
    written: dict[str, object] = {}
    (note,) = set_probed(written, probe)
    assert probe.class_order is not None and written == {}
    assert "seems to number the classes differently" in note and "perhaps not for every class" in note


def test_a_single_answer_for_everything_is_warned_of(splits, caplog):
    class Constant(nn.Module):
        def forward(self, images):
            return torch.nn.functional.one_hot(torch.zeros(len(images), dtype=torch.long), 10) * 5.0

    net = adapt(Constant(), section(), 10)
    check_outputs(net, section(), digits(), 10)
    log_classifier(tiny(classifier={**CUSTOM}), net, splits, {"train": 0.1})
    assert "gives one answer for all of 300 training images" in caplog.text
