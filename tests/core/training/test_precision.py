"""bf16: answers that equal those of f32, the measured choice, and batches that are stored on the device."""

import gzip
import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from defuse_core import pipeline
from defuse_core.artifacts import MeasuredPrecision, ReferenceSet
from defuse_core.codec import decode
from defuse_core.config import changed_field
from defuse_core.config.run_file import PrecisionSection
from defuse_core.data import Images
from defuse_core.data.images import PictureFiles
from defuse_core.device import autocast
from defuse_core.errors import ModelError
from defuse_core.identify import Identifier
from defuse_core.local import MAX_REPORTS, LocalCompute, Profile
from defuse_core.models import load_classifier, predict, to_tensor
from defuse_core.protocols import Call, silent
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from defuse_core.training import CHECK_LOSS_EVERY, Losses, batches, precision
from defuse_core.training.batches import DeviceImages
from defuse_core.training.precision import answers_as_in_f32, margin_bound, predict_as_in_f32
from defuse_core.training.reference_models import reference_models
from tests.conftest import made_in_a_run, tiny

BF16 = {"resources": {"precision": "bf16"}}


@pytest.fixture(scope="module")
def close_logits():
    """10,000 inputs of a network whose two largest logits are so close that bf16 gets many answers wrong."""
    torch.manual_seed(0)
    inputs, layer = torch.randn(10_000, 64), torch.nn.Linear(64, 10)
    return lambda rows: layer(inputs[torch.as_tensor(rows)])


def test_answers_equal_those_of_f32_where_bf16_alone_gets_some_wrong(close_logits):
    rows = np.arange(10_000)
    with torch.inference_mode():
        exact = close_logits(rows).argmax(1).numpy()
        with autocast("bf16"):
            alone = close_logits(rows).argmax(1).numpy()
    assert (alone != exact).sum() > 5
    found = answers_as_in_f32(close_logits, len(rows), 512, margin_bound(close_logits, len(rows)))
    np.testing.assert_array_equal(found, exact)


def test_only_answers_in_doubt_are_computed_in_f32_and_never_more_than_a_batch_of_them(close_logits):
    calls = {True: list[np.ndarray](), False: list[np.ndarray]()}

    def logits(rows):
        calls[torch.is_autocast_enabled("cpu")].append(np.asarray(rows))
        return close_logits(rows)

    answers_as_in_f32(logits, 10_000, 512, 0.05)
    with torch.inference_mode(), autocast("bf16"):
        two = np.sort(close_logits(np.arange(10_000)).float().numpy(), axis=1)[:, -2:]
    np.testing.assert_array_equal(np.concatenate(calls[True]), np.arange(10_000))
    np.testing.assert_array_equal(
        np.concatenate(calls[False]), np.flatnonzero(two[:, 1] - two[:, 0] < np.float32(0.05))
    )
    assert len(calls[False]) > 1 and max(len(rows) for each in calls.values() for rows in each) == 512


class Recording(torch.nn.Module):
    """A classifier of two classes that keeps whether it was asked in bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.in_bf16 = torch.nn.Linear(4, 2), set[bool]()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.in_bf16.add(torch.is_autocast_enabled("cpu"))
        return self.layer(images.flatten(1))


@pytest.mark.parametrize(
    ("count", "arithmetic", "fast"), [(2047, "bf16", False), (2048, "bf16", True), (2048, "f32", False)]
)
def test_answers_are_computed_in_bf16_where_that_is_chosen_and_pays(count, arithmetic, fast):
    pixels = np.random.default_rng(0).random((count, 1, 2, 2), np.float32)
    classifier = Recording().eval()
    predict_as_in_f32(classifier, Images(pixels, np.zeros(count, np.int64)), arithmetic)
    assert (True in classifier.in_bf16) is fast


def test_an_answer_without_a_margin_is_computed_in_f32():
    def logits(rows):
        broken = torch.is_autocast_enabled("cpu")
        return torch.full((len(rows), 3), torch.nan) if broken else torch.eye(3)[torch.as_tensor(rows)]

    assert answers_as_in_f32(logits, 3, 2, margin_bound(logits, 3)).tolist() == [0, 1, 2]


def test_the_bound_is_twice_the_largest_error_of_a_margin_on_inputs_from_first_to_last():
    exact = torch.tensor([[1.0, 0, -9], [3, 0, -9], [0, 4, -9]])
    fast = torch.tensor([[1.25, 0, -9], [2.5, 0, -9], [0, 4.125, -9]])  # in error by 0.25, -0.5 and 0.125

    def logits(rows):
        table = fast if torch.is_autocast_enabled("cpu") else exact
        return table[torch.as_tensor(rows) * 3 // 10_000]

    assert margin_bound(logits, 10_000) == 2 * 0.5
    assert margin_bound(lambda rows: logits(rows)[:, :2], 10_000) == 2 * 0.5


def test_the_margin_whose_error_counts_is_that_of_the_two_largest_logits_in_bf16():
    exact, fast = torch.tensor([[1.0, 0.75, 0.5]]), torch.tensor([[1.0, 0.25, 0.875]])

    def logits(rows):
        return fast if torch.is_autocast_enabled("cpu") else exact

    assert margin_bound(logits, 1) == 2 * (0.5 - 0.125)


def test_bf16_is_that_of_the_device_and_f32_changes_nothing(monkeypatch):
    asked = []
    monkeypatch.setattr("defuse_core.device.device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype: asked.append((kind, dtype)))
    autocast("bf16")
    with autocast("f32"):
        assert asked == [("cuda", torch.bfloat16)]


def test_a_classifier_of_one_class_is_never_in_doubt():
    exactly = []

    def logits(rows):
        exactly.append(not torch.is_autocast_enabled("cpu"))
        return torch.ones(len(rows), 1)

    assert margin_bound(logits, 4) == 0
    exactly.clear()
    assert answers_as_in_f32(logits, 4, 2, 0.0).tolist() == [0] * 4
    assert not any(exactly)


def test_psi_of_bf16_is_that_of_f32(tiny_spec, tiny_models):
    exact = Identifier(tiny_spec, tiny_models)
    fast = Identifier(tiny(identify={"batch_size": 32}, **BF16), tiny_models)
    assert 0 < fast._margin_bound < 5
    for index in range(3):
        one, other = exact.shard(index), fast.shard(index)
        for name, array in vars(one.failures).items():
            np.testing.assert_array_equal(array, getattr(other.failures, name))
        assert one.failing == other.failing


def test_the_answers_in_bf16_are_those_of_f32(tiny_models, tiny_spec, monkeypatch):
    monkeypatch.setattr("defuse_core.training.precision.WORTHWHILE", 10)
    classifier = load_classifier(tiny_spec, tiny_models.classifier, 10)
    rng = np.random.default_rng(0)
    images = Images(rng.random((1000, 1, 16, 16), np.float32), rng.integers(0, 10, 1000))
    np.testing.assert_array_equal(predict_as_in_f32(classifier, images, "bf16"), predict(classifier, images))


def test_models_trained_in_bf16_are_other_weights_of_about_the_same_accuracy(finished_run):
    stored = finished_run / "runs" / "tiny" / "references.safetensors"
    exact = decode(ReferenceSet, stored.read_bytes(), "references")
    fast = made_in_a_run(reference_models, tiny(**BF16))
    assert any(not np.array_equal(array, fast.models[0][name]) for name, array in exact.models[0].items())
    assert abs(exact.test.mean() - fast.test.mean()) < 0.05


def test_a_run_keeps_the_precision_that_it_measured(tmp_path, monkeypatch):
    seconds = {"f32": 2.0, "bf16": 1.0}
    monkeypatch.setattr(precision, "_seconds", lambda step: (seconds["f32"], seconds["bf16"]))
    spec = tiny(resources={"precision": "auto"})
    assert spec.resources.arithmetic("vae") == "f32"
    run = Run.start(FolderStore(tmp_path), "a", spec)
    precision.resolve_precision(run, LocalCompute())
    assert run.spec.resources.arithmetic("vae") == run.spec.resources.arithmetic("answers") == "bf16"
    seconds.update(f32=1.0)  # another machine, on which bf16 is no faster
    again = Run.start(FolderStore(tmp_path), "a", spec)
    precision.resolve_precision(again, LocalCompute())
    assert again.spec.resources.arithmetic("vae") == "bf16"
    assert again.load(MeasuredPrecision).chosen["classifier"] == "bf16"


def test_every_step_computes_in_the_precision_that_was_measured(tmp_path, monkeypatch):
    """Identification and the sweep kept `auto`, which is f32, while the controls of the sweep were tuned in bf16."""
    run = Run.start(FolderStore(tmp_path), "a", tiny(resources={"precision": "auto"}))
    run.once(
        "train",
        MeasuredPrecision,
        lambda: MeasuredPrecision(dict.fromkeys(PrecisionSection.model_fields, "bf16")),
    )
    monkeypatch.setattr(pipeline, "_healthy_models", lambda run, compute: (None, None))

    class IdentifyError(Exception):
        pass

    class Recorder(LocalCompute):
        def identify(self, spec, *arguments):
            raise IdentifyError(spec.resources.arithmetic("answers"), spec.resources.arithmetic("classifier"))

    with pytest.raises(IdentifyError) as found:
        pipeline.run_defuse(run, Recorder(), None)
    assert found.value.args == ("bf16", "bf16")


def test_every_kind_of_computation_is_measured(tiny_spec):
    measured = precision.measure_precision(tiny(judges={"count": 1}), progress=silent)
    assert measured.chosen.keys() == {"classifier", "vae", "answers", "reference", "judges"}


def test_where_bf16_is_not_possible_f32_is_timed_all_the_same(caplog, monkeypatch):
    def step(arithmetic):
        if arithmetic == "bf16":
            raise RuntimeError("not implemented for 'BFloat16'")

    f32, bf16 = precision._seconds(step)
    assert np.isfinite(f32) and np.isinf(bf16)
    monkeypatch.setattr(precision, "_steps", lambda spec, classes, count: {"vae": step})
    with caplog.at_level("INFO", "defuse"):
        assert precision.measure_precision(tiny(), progress=silent).chosen == {"vae": "f32"}
    assert "vae bf16 not possible" in caplog.text


def test_a_resumed_run_must_keep_its_precision():
    assert "resources.precision" in changed_field(tiny(), tiny(**BF16))
    part = tiny(resources={"precision": {"vae": "bf16"}})
    assert part.resources.arithmetic("vae") == "bf16" and part.resources.arithmetic("judges") == "f32"


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_images_stored_on_the_device_give_the_same_batches_bit_for_bit(monkeypatch, dtype):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (50, 3, 8, 8)).astype(dtype)
    images = Images(pixels / np.float32(255) if dtype == np.float32 else pixels, np.arange(50))
    monkeypatch.setattr(batches, "fits_on_device", lambda images: True)
    stored, rows = DeviceImages(images), rng.permutation(50)[:20]
    batch = stored.batch(rows)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(batch, to_tensor(images.batch(rows)), rtol=0, atol=0)
    assert stored.labels(rows).tolist() == rows.tolist()


def test_images_are_stored_on_an_accelerator_where_they_take_a_quarter_of_its_free_memory(monkeypatch):
    images = Images(np.zeros((50, 1, 8, 8), np.uint8), np.zeros(50, np.int64))
    free = [4 * images.pixels.nbytes]
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (free[0], 10**12))
    assert not batches.fits_on_device(images)  # on the CPU
    monkeypatch.setattr(batches, "device", lambda: torch.device("cuda"))
    assert batches.fits_on_device(images)
    assert not batches.fits_on_device(Images(PictureFiles([], 1, 8), np.zeros(0, np.int64)))
    free[0] -= 4
    assert not batches.fits_on_device(images)


def test_image_files_are_read_one_batch_ahead_and_come_in_order(tmp_path, monkeypatch):
    paths = []
    for shade in range(6):
        paths.append(str(tmp_path / f"{shade}.png"))
        Image.new("L", (4, 4), 40 * shade).save(paths[-1])
    images = DeviceImages(Images(PictureFiles(paths, 1, 4), np.arange(6)))
    order = [np.array([5, 0]), np.array([3, 4]), np.array([1, 2])]
    seen = [
        (rows, batch[:, 0, 0, 0].mul(255).round().tolist(), labels.tolist())
        for rows, batch, labels in images.batches(order)
    ]
    assert [labels for *_, labels in seen] == [rows.tolist() for rows in order]
    assert [shades for _, shades, _ in seen] == [[200, 0], [120, 160], [40, 80]]


class Watched:
    """Image files that say which batches were read, and when the second one was."""

    def __init__(self, images: Images) -> None:
        self.images, self.pixels, self.read = images, images.pixels, list[list[int]]()
        self.second = threading.Event()

    def batch(self, rows: np.ndarray) -> np.ndarray:
        self.read.append(rows.tolist())
        if len(self.read) == 2:
            self.second.set()
        return self.images.batch(rows)


def test_while_a_batch_of_image_files_is_used_the_next_one_is_read_and_no_other(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "0.png")
    images = DeviceImages(Images(PictureFiles([str(tmp_path / "0.png")] * 4, 1, 4), np.arange(4)))
    images.images = watched = Watched(images.images)
    minibatches = images.batches(np.array([row]) for row in range(4))
    next(minibatches)
    assert watched.second.wait(10)
    assert watched.read == [[0], [1]]
    assert [rows.tolist() for rows, *_ in minibatches] == [[1], [2], [3]]


def test_arrays_that_cannot_be_written_as_those_of_an_object_store_are_read(monkeypatch):
    images = Images(np.zeros((4, 1, 8, 8), np.uint8), np.arange(4))
    for array in (images.pixels, images.labels):
        array.flags.writeable = False
    monkeypatch.setattr(batches, "fits_on_device", lambda images: True)
    stored = DeviceImages(images)
    ((_, pixels, labels),) = stored.batches([np.array([3, 1])])
    assert (len(stored), pixels.shape, labels.tolist()) == (4, (2, 1, 8, 8), [3, 1])


def test_a_loss_that_is_not_finite_is_noticed_before_the_epoch_ends():
    losses = Losses("f")
    losses.add(torch.tensor(1.0), torch.tensor(3.0))
    losses.add(torch.tensor(2.0), torch.tensor(5.0))
    assert losses.mean() == (1.5, [4.0])
    losses.add(torch.tensor(torch.inf), torch.tensor(0.0))
    with pytest.raises(ModelError, match="training f diverged: its loss became inf"):
        for _ in range(CHECK_LOSS_EVERY):
            losses.add(torch.tensor(1.0), torch.tensor(1.0))


def test_a_profiled_step_leaves_traces_of_its_operations(tmp_path, tiny_spec, tiny_models):
    store = FolderStore(tmp_path)
    LocalCompute(profile=Profile("identify", store)).identify(tiny_spec, tiny_models, store)
    (key,) = store.list("profile/")
    events = json.loads(gzip.decompress(store.read(key)))["traceEvents"]
    assert any("conv" in event.get("name", "") for event in events)
    LocalCompute(profile=Profile("train", store)).task("draw", lambda *, progress: None)
    assert store.list("profile/") == [key]


def adding(one, *, progress):
    return one + 1


def doubling(one, *, progress):
    return one + one


def test_traces_of_one_function_are_numbered_by_task_and_none_is_replaced(tmp_path):
    store = FolderStore(tmp_path)
    compute = LocalCompute(profile=Profile("draw", store))
    one = torch.ones(3)
    compute.tasks("draw", [Call(adding, one), Call(doubling, one), Call(adding, one)])
    compute.task("draw", adding, one)
    names = ("adding-2", "adding-3", "adding", "doubling")
    assert store.list("profile/") == [f"profile/draw-{name}.json.gz" for name in names]


def reporting(one, reports, *, progress):
    for done in range(reports):
        one @ one
        progress("multiplying", done, reports)
    return one @ one


@pytest.mark.parametrize("reports", [0, MAX_REPORTS - 1, MAX_REPORTS, MAX_REPORTS + 5])
def test_a_trace_ends_with_the_task_or_after_some_reports_of_progress(tmp_path, reports):
    store, seen = FolderStore(tmp_path), []
    compute = LocalCompute(lambda *report: seen.append(report), Profile("draw", store))
    compute.task("draw", reporting, torch.ones(3, 3), reports)
    (key,) = store.list("profile/")
    events = json.loads(gzip.decompress(store.read(key)))["traceEvents"]
    traced = sum(event.get("name") == "aten::mm" for event in events)
    assert traced == min(reports + 1, MAX_REPORTS) and len(seen) == reports
