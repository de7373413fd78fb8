"""How `defuse init` divides the time of a run."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from defuse_core.config import DistillSection, parse_run_file
from defuse_core.data import Images, Splits
from defuse_core.data.images import read_picture, to_picture
from defuse_core.distill.components import components_of
from defuse_core.protocols import silent
from defuse_core.suggest import inspect_data, plan_run
from defuse_core.suggest.inspect import _few_images
from defuse_core.suggest.plan import TimeBudget, _correct
from defuse_core.suggest.speeds import Speeds, _rate, measure_speeds
from tests.command_line import call
from tests.conftest import tiny
from tests.own_classifiers import digits, plain


def test_a_speed_is_that_of_the_batches_after_the_first_which_takes_longer(monkeypatch):
    clock, durations = [100.0], iter([3.0, *[0.125] * 4])

    def work() -> None:
        clock[0] += next(durations)

    monkeypatch.setattr("defuse_core.suggest.speeds.time.monotonic", lambda: clock[0])
    assert _rate(work) == 64 / 0.125


def test_speeds_are_measured_with_whole_steps_that_change_no_weight(monkeypatch):
    """Also with fewer images than a batch has."""
    monkeypatch.setattr("defuse_core.suggest.speeds._rate", lambda work: (work(), 1.0)[1])
    net = plain()
    before = [weight.detach().clone() for weight in net.parameters()]
    speeds = measure_speeds(tiny(), net, digits().take(slice(0, 5)), 4, silent)
    assert speeds == Speeds(1.0, 1.0, 1.0, 1.0)
    for weight, unchanged in zip(net.parameters(), before, strict=True):
        assert weight.grad.any() and (weight == unchanged).all()


@pytest.mark.parametrize("seconds", [60, 200, 600])
def test_the_time_to_correct_holds_the_sweeps_and_the_trainings_that_evidence_compares_with(seconds: int):
    section = _correct(20_000, seconds, Speeds(1.0, 1.0, 3000.0, 1.0), 500)
    trainings = 2 * len(section["lambdas"]) + 3 + 2  # plain ones, and those without a fold
    # in each epoch D and as much of D_f, and D once more at the end, to be scored
    visits = trainings * (2 * section["epochs"] + 1) * section.get("train_images", 20_000)
    assert visits == pytest.approx(seconds * 3000, rel=0.25)
    assert visits <= seconds * 3000


@pytest.mark.parametrize(
    ("speed", "epochs", "warmup", "draws", "reference", "correct", "note"),
    [
        # the least of all: 7 visits of 10,000 images, and 8 * 4 + 9 * 7 of 500, in 51 s of each minute
        (1.0, (3, 2), 19, 2, (4, 500), (2, 500), "takes about 2,304 minutes here; give fewer images"),
        (
            320.0,
            (3, 4),
            39,
            2,
            (4, 1020),
            (2, 777),
            "only 4 epochs for the β-VAE fit in 10 minutes; give fewer",
        ),
        # 15 %, 25 %, 10 %, 20 % (half of all images for each of eight models) and 30 % of 510 s
        (4e3, (30, 51), 497, 20, (10, None), (2, 9714), "are trained on 15 images of the rarest class"),
        (1e9, (40, 100), 500, 50, (20, None), (4, None), "are trained on 15 images of the rarest class"),
    ],
)
def test_the_time_is_divided_among_the_steps_within_what_each_needs_and_can_use(
    speed, epochs, warmup, draws, reference, correct, note
):
    labels = np.repeat([0, 1], [9970, 30])
    images = Images(np.zeros((len(labels), 1, 8, 8), np.uint8), labels)
    tree = {"data": {"image_size": 8}, "classifier": {}, "vae": {}}
    _, notes = TimeBudget(
        tree, Splits(images, None, None, ("a", "b")), Speeds(*[speed] * 4), 10, own=False
    ).divide()
    assert (tree["classifier"]["epochs"], tree["vae"]["epochs"]) == epochs
    assert (tree["vae"]["kl_warmup_steps"], tree["identify"]["draws"]) == (warmup, draws)
    of_models, tuned = tree["review"]["reference"], tree["correct"]
    assert (of_models["epochs"], of_models.get("train_images")) == reference
    assert (len(tuned["lambdas"]), tuned.get("train_images")) == correct
    assert note in " ".join(notes) and ("minutes here" in " ".join(notes)) == (speed == 1.0)


@pytest.mark.parametrize(
    ("each", "reference", "correct", "few"), [(100, 4000, 4000, False), (30, 3000, 4000, True)]
)
def test_little_time_leaves_reference_models_and_correction_twenty_images_of_each_class(
    each, reference, correct, few
):
    labels = np.repeat(np.arange(200), each)
    images = Images(np.zeros((len(labels), 1, 8, 8), np.uint8), labels)
    tree = {"data": {"image_size": 8}, "classifier": {}, "vae": {}}
    splits = Splits(images, None, None, tuple(map(str, range(200))))
    _, notes = TimeBudget(tree, splits, Speeds(10.0, 10.0, 10.0, 10.0), 1, own=False).divide()
    assert tree["review"]["reference"]["train_images"] == reference
    assert tree["judges"]["train_images"] == reference
    assert tree["correct"]["train_images"] == correct
    line = "the reference models and judges are trained on 15 images of the rarest class, too few"
    assert any(note.startswith(line) for note in notes) == few


def test_many_classes_with_few_images_are_counted_with_separators():
    images = Images(np.zeros((2000, 1, 8, 8), np.uint8), np.arange(2000))
    (line,) = _few_images(Splits(images, None, None, tuple(map(str, range(2000)))))
    assert line.startswith("2,000 of 2,000 classes have fewer") and line.endswith("4 (1) and 1,995 more")


@pytest.mark.parametrize(("each", "told"), [(1, "1 image"), (3, "3 images")])
def test_the_images_of_the_rarest_class_are_counted_in_the_singular_where_it_has_one(each, told):
    labels = np.repeat(np.arange(2), (each, 60))
    images = Images(np.zeros((len(labels), 1, 8, 8), np.uint8), labels)
    tree = {"data": {"name": "digits", "image_size": 8}, "classifier": {}, "vae": {}}
    splits = Splits(images, None, None, ("a", "b"))
    _, notes = TimeBudget(tree, splits, Speeds(*[1e5] * 4), 30, own=False).divide()
    assert notes[0].startswith(f"the reference models and judges are trained on {told} of the rarest class")


@pytest.mark.parametrize(
    ("counts", "few"), [((500, 0, 500), False), ((0, 500, 9), True), ((500, 500, 0), False)]
)
def test_a_class_without_a_training_image_is_not_the_rarest_wherever_it_stands(counts, few):
    labels = np.repeat(np.arange(3), counts)
    images = Images(np.zeros((len(labels), 1, 8, 8), np.uint8), labels)
    tree = {"data": {"name": "digits", "image_size": 8}, "classifier": {}, "vae": {}}
    _, notes = TimeBudget(
        tree, Splits(images, None, None, ("a", "b", "c")), Speeds(*[1e5] * 4), 30, own=False
    ).divide()
    assert any("images of the rarest class" in note for note in notes) == few


def sized(
    classes: int, each: int | list[int], tracks: int | None = None, size: int = 32, **vae: object
) -> tuple[dict, list[str]]:
    """Return the plan for so many images of each class, and its notes; `tracks` images show one object."""
    labels = np.repeat(np.arange(classes), each)
    of_track = None if tracks is None else np.arange(len(labels)) // tracks
    images = Images(np.zeros((len(labels), 1, 8, 8), np.uint8), labels, of_track)
    tree = {"data": {"name": "digits", "image_size": size}, "classifier": {}, "vae": vae}
    splits = Splits(images, None, None, tuple(map(str, range(classes))))
    return tree, TimeBudget(tree, splits, Speeds(*[1e5] * 4), 30, own=False).divide()[1]


@pytest.mark.parametrize(
    ("each", "tracks", "decode", "told"),
    [
        (20, None, "anchored", "at most 7 of one"),
        (29, None, "anchored", "at most 10 of one"),
        (30, None, "anchored", None),
        (200, None, "anchored", None),
        (200, 10, "anchored", "at most 7 of one"),
        (20, None, "plain", None),
    ],
)
def test_classes_of_too_few_photographs_for_any_scenario_are_told(each, tracks, decode, told):
    tree, notes = sized(50, each, tracks, decode=decode)
    (line,) = [line for line in notes if "for a scenario" in line] or [None]
    assert (line is None) == (told is None)
    if line is not None:
        what = "photographs" if tracks is None else "tracks"
        assert line.startswith(f"50 of 50 classes have too few {what} for a scenario: {told} are perturbed")
        assert line.endswith(f"significance takes 6; add {what}, or set review.accept: share")
        tree["review"]["accept"] = "share"
        assert parse_run_file(tree, "it").review.least_units == 1
        (line,) = (
            line for line in sized(50, [each] + [400] * 49, tracks, decode=decode)[1] if "for a sce" in line
        )
        assert line.startswith(f"1 of 50 classes have too few {what} for a scenario: {told} are perturbed")


@pytest.mark.parametrize(
    ("decode", "each", "together"),
    [("plain", 99, True), ("plain", 100, False), ("anchored", 151, True), ("anchored", 152, False)],
)
def test_judges_and_reference_models_share_few_training_images(decode, each, together):
    """Fewer than 5,000, or 7,600 photographs: defuse_core/README.md has these figures."""
    tree, _ = sized(50, each, decode=decode)
    assert (tree["judges"].get("share") == 0) == together


@pytest.mark.parametrize(("classes", "told"), [(100, False), (101, True)])
def test_pretrained_reference_models_and_judges_are_named_where_there_are_many_classes(classes, told):
    tree, notes = sized(classes, 100)
    (line,) = [line for line in notes if "learn few of" in line] or [None]
    assert (line is not None) == told
    if line is not None:
        fields = "review.reference.architecture: custom, import_path, count: 1 and epochs: 0, and the same of judges"
        assert line.endswith(f"learn few of 101 classes; use pretrained ones: {fields}")
        for section in (tree["review"]["reference"], tree["judges"]):
            section |= {"architecture": "custom", "import_path": "nets:build", "count": 1, "epochs": 0}
        assert parse_run_file(tree, "it").judges.count == 1


@pytest.mark.parametrize(
    ("classes", "codes", "most"), [(20, None, 0), (43, None, 215), (1000, 320_000, 5000)]
)
def test_the_lightest_component_of_many_classes_has_twice_as_many_codes_as_dimensions(classes, codes, most):
    tree, notes = sized(classes, 20, latent_dim=32)
    distill = parse_run_file(tree, "it").distill
    assert tree["distill"].get("max_codes") == codes
    assert distill.max_codes * distill.min_weight >= 2 * 32
    told = [line for line in notes if "candidate scenarios" in line]
    assert told == [
        f"up to {most:,} candidate scenarios may be found, each with 10 pictures to review; raise "
        "distill.min_weight for fewer"
    ] * (most > 0)


def test_the_lightest_component_of_a_rare_class_has_twice_as_many_codes_as_dimensions():
    labels = np.repeat([0, 1], [6000, 12])
    images = Images(np.zeros((len(labels), 1, 8, 8), np.uint8), labels)
    tree = {"data": {"name": "digits", "image_size": 48}, "classifier": {}, "vae": {"latent_dim": 32}}
    TimeBudget(tree, Splits(images, None, None, ("a", "b")), Speeds(*[1e5] * 4), 30, own=False).divide()
    assert (tree["distill"]["min_weight"], tree["distill"]["max_codes"]) == (0.001, 64_000)


@pytest.mark.parametrize(
    ("counts", "weight"),
    [((600, 12), 0.00392), ((600, 1), 0.001), ((95, 5), None), ((60, 5), None), ((30,) * 20, None)],
)
def test_the_failures_of_a_rare_class_have_enough_weight_for_a_scenario(counts, weight):
    """Planned so, ten images of the class, each with three failing draws, are not lost beside 3,200 other draws."""
    labels = np.repeat(np.arange(len(counts)), counts)
    images = Images(np.zeros((len(labels), 1, 8, 8), np.uint8), labels)
    tree = {"data": {"name": "digits", "image_size": 32}, "classifier": {}, "vae": {}}
    splits = Splits(images, None, None, tuple(map(str, range(len(counts)))))
    _, warnings = TimeBudget(tree, splits, Speeds(*[1e5] * 4), 30, own=False).divide()
    distill = parse_run_file(tree, "it").distill
    assert (tree["distill"].get("min_weight"), "max_codes" in tree["distill"]) == (weight, False)
    assert not [line for line in warnings if "candidate scenarios" in line]
    ends = [components_of(share, distill) for share in (0.5, 0.03)]
    assert ends == [components_of(share, DistillSection()) for share in (0.5, 0.03)]
    assert (distill.min_weight < 30 / 3230) == (weight is not None)


@pytest.mark.parametrize(("decode", "codes"), [("plain", 320_000), ("anchored", 114_130)])
def test_photographs_of_many_components_fit_into_memory(decode, codes):
    """Some 0.22 for each code, measured with 320,000 codes of 1,000 classes."""
    tree, _ = sized(1000, 20, size=224, latent_dim=32, decode=decode)
    assert tree["distill"]["max_codes"] == codes


def test_validation_images_that_stay_on_disk_are_read_by_processes_and_planned_for(tmp_path, monkeypatch):
    """Beside training images that fit into memory."""
    monkeypatch.setattr("defuse_core.suggest.plan.measure_speeds", lambda *_: Speeds(1e3, 1e3, 1e3, 1e3))
    monkeypatch.setattr("defuse_core.suggest.speeds.usable_cpus", lambda: 2)

    def read_slowly(path: str, channels: int, size: int) -> np.ndarray:
        time.sleep(0.005)
        return read_picture(path, channels, size)

    images, part = digits(), "train"
    for number, (pixels, label) in enumerate(zip(images.pixels[:200], images.labels[:200] % 2, strict=True)):
        part = "train" if number < 50 else "validation"
        (folder := tmp_path / part / str(label)).mkdir(parents=True, exist_ok=True)
        to_picture(pixels).save(folder / f"{number}.png")
    facts = inspect_data(tmp_path)
    monkeypatch.setattr("defuse_core.data.images.read_picture", read_slowly)
    in_memory = plan_run(facts, None, 0.1)
    monkeypatch.setattr("defuse_core.data.images.MAX_LOADED", 100 * images.pixels[0].size)
    on_disk = plan_run(facts, None, 0.1)
    assert "resources" not in in_memory.tree and on_disk.tree["resources"] == {"readers": 1}
    assert on_disk.tree["vae"] == in_memory.tree["vae"]  # the training images are not read from files
    assert on_disk.minutes > in_memory.minutes
    assert "of them for validation and test images; give" in " ".join(on_disk.notes)


@pytest.mark.parametrize(
    ("count", "speed", "batch", "epochs"),
    [
        (1560, 1e5, 32, 21),
        (4999, 1e5, 32, 20),
        (200, 1e5, 16, 60),
        (640, 1e5, 32, 50),
        (10_000, 1e5, 128, 20),
        (10_000, 4e4, 128, 10),
        (1560, 6e3, 32, 12),  # 4.9 epochs would be their share of the time
        (1560, 1e3, 32, 8),
        (10_000, 1e3, 128, 4),
    ],
)
def test_few_images_train_small_models_on_all_of_them_in_as_many_steps_as_these_need(
    count, speed, batch, epochs
):
    images = Images(np.zeros((count, 1, 8, 8), np.uint8), np.arange(count) % 2)
    tree = {"data": {"image_size": 8}, "classifier": {}, "vae": {}}
    _, notes = TimeBudget(
        tree, Splits(images, None, None, ("a", "b")), Speeds(*[speed] * 4), 1, own=True
    ).divide()
    line = "the reference models and judges are trained for 8 epochs, and need about 21 on so few images"
    assert any(note.startswith(line) for note in notes) is ((count, speed) == (1560, 1e3))
    assert sum("are trained for" in note for note in notes) == ((count, speed) == (1560, 1e3))
    reference, judges = tree["review"]["reference"], tree["judges"]
    few = count < 5000
    assert (reference["batch_size"], reference["epochs"]) == (batch, epochs)
    assert reference.get("channels") == (16 if few else None)
    assert judges == ({"share": 0.0, **reference} if few else reference)
    assert not few or "train_images" not in reference


@pytest.mark.parametrize(
    ("speed", "told"),
    [
        (5e4, ", for about 1 minute; more time would bring nothing for so few images; next: defuse run"),
        (300.0, ", for about 10 minutes; next: defuse run"),
    ],
)
def test_the_time_of_a_run_that_cannot_use_the_minutes_is_what_it_needs(
    speed: float, told: str, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.setattr("defuse_core.suggest.speeds._rate", lambda work: speed)
    monkeypatch.chdir(tmp_path)
    images = digits()
    np.savez("digits.npz", train_images=images.pixels[:, 0], train_labels=images.labels)
    code, out, _ = call(monkeypatch, capsys, "init", "digits.npz", "--minutes", 10)
    assert code == 0 and told in out
    written = Path("digits.yaml").read_text().splitlines()[0]
    assert f"Written by `defuse init`{told.partition(';')[0].lstrip(',')} on" in written


def test_fewer_training_images_are_planned_for_with_more_epochs(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr("defuse_core.suggest.speeds._rate", lambda work: 20.0)
    monkeypatch.chdir(tmp_path)
    images = digits()
    np.savez("digits.npz", train_images=images.pixels[:, 0], train_labels=images.labels)
    planned = []
    for options in ([], ["--train-images", 40]):
        chosen = ["digits.npz", "--minutes", 1, "--force", *options]
        code, out, _ = call(monkeypatch, capsys, "init", *chosen)
        tree = yaml.safe_load(Path("digits.yaml").read_text())
        planned.append((code, tree["data"].get("train_images"), tree["vae"]["epochs"]))
        told = "give fewer images (--train-images), smaller ones (--image-size) or more --minutes"
        assert told in out
        assert ("16x16, grey; 40 of the training images" in out) == bool(options)
    assert planned == [(0, None, 2), (0, 40, 6)]


@pytest.mark.parametrize(("shared_memory", "readers"), [(2**30, 3), (2**19, None)])
def test_images_that_stay_on_disk_are_read_by_processes_and_planned_for_as_fast_as_these_read(
    shared_memory: int, readers: int | None, tmp_path: Path, monkeypatch, capsys
):
    def read_slowly(path: str, channels: int, size: int) -> np.ndarray:
        time.sleep(0.02)
        return read_picture(path, channels, size)

    monkeypatch.setattr("defuse_core.suggest.speeds._rate", lambda work: 1000.0)
    monkeypatch.setattr("defuse_core.suggest.speeds.usable_cpus", lambda: 4)
    monkeypatch.setattr(
        "defuse_core.suggest.speeds.shutil.disk_usage", lambda _: SimpleNamespace(free=shared_memory)
    )
    monkeypatch.chdir(tmp_path)
    images = digits()
    for number, (pixels, label) in enumerate(zip(images.pixels[:80], images.labels[:80] % 2, strict=True)):
        folder = Path("photos/train", str(label))
        folder.mkdir(parents=True, exist_ok=True)
        to_picture(pixels).save(folder / f"{number}.png")
    planned = []
    for limit in (4 * 2**30, 0):
        monkeypatch.setattr("defuse_core.data.images.MAX_LOADED", limit)
        code, _, _ = call(monkeypatch, capsys, "init", "photos", "--minutes", 1, "--force")
        assert code == 0
        planned.append(yaml.safe_load(Path("photos.yaml").read_text()))
        monkeypatch.setattr("defuse_core.data.images.read_picture", read_slowly)
    in_memory, on_disk = planned
    assert "resources" not in in_memory and on_disk.get("resources", {}).get("readers") == readers
    assert in_memory["vae"]["epochs"] == 100 and on_disk["vae"]["epochs"] < (40 if readers else 15)
    assert on_disk["identify"]["draws"] == in_memory["identify"]["draws"]


def test_few_images_of_a_rare_class_are_told_although_there_are_many_on_average():
    labels = np.repeat([0, 1], [588, 12])
    splits = Splits(Images(np.zeros((600, 1, 8, 8), np.uint8), labels), None, None, ("healthy", "sick"))
    tree = {"data": {"name": "digits", "image_size": 8}, "classifier": {}, "vae": {}}
    warnings = TimeBudget(tree, splits, Speeds(*[1e5] * 4), 30, own=False).divide()[1]
    assert any(
        text.startswith("the reference models and judges are trained on 12 images of") for text in warnings
    )
