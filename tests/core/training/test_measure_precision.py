"""The measurement behind resources.precision: auto, with steps and clocks of the tests' own."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from torch import nn

from defuse_core.errors import DataError
from defuse_core.protocols import silent
from defuse_core.training import precision
from tests.conftest import TINY, tiny


class Timed:
    """A step that takes the given seconds of a clock that nothing else moves; None is an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **seconds: Iterable[float | None]) -> None:
        self.now, self.seconds = 0.0, {kind: iter(each) for kind, each in seconds.items()}
        self.calls: list[str] = []
        monkeypatch.setattr(precision.time, "process_time", lambda: self.now)

    def __call__(self, arithmetic: str) -> None:
        self.calls.append(arithmetic)
        took = next(self.seconds[arithmetic])
        if took is None:
            raise RuntimeError("not implemented for 'BFloat16'")
        self.now += took


def measured_with(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[str, tuple[float, float]]
) -> precision.MeasuredPrecision:
    monkeypatch.setattr(precision, "_steps", lambda spec, classes, count: {kind: kind for kind in seconds})
    monkeypatch.setattr(precision, "_seconds", seconds.__getitem__)
    return precision.measure_precision(tiny(), progress=silent)


def test_bf16_is_chosen_where_it_is_faster_by_a_tenth_and_the_log_has_the_ratios(monkeypatch, caplog):
    with caplog.at_level("INFO", "defuse"):
        found = measured_with(
            monkeypatch, {"classifier": (2.0, 1.0), "vae": (1.05, 1.0), "answers": (1.0, 2.0)}
        )
    assert found.chosen == {"classifier": "bf16", "vae": "f32", "answers": "f32"}
    assert "times as fast: classifier 2.00, vae 1.05, answers 0.50" in caplog.text


def test_images_that_are_not_there_are_an_error_before_anything_is_measured(tmp_path):
    reports: list[object] = []
    spec = tiny(data={"name": "folder", "root": str(tmp_path / "gone"), "image_size": 16})
    with pytest.raises(DataError, match="gone does not exist"):
        precision.measure_precision(spec, progress=lambda *report: reports.append(report))
    assert reports == []


def test_random_numbers_that_follow_are_the_same_whether_it_was_measured_or_not():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    precision.measure_precision(tiny(), progress=silent)
    assert torch.equal(torch.rand(3), expected)


def test_the_fastest_step_counts_without_the_first_which_compiles(monkeypatch):
    step = Timed(
        monkeypatch,
        f32=itertools.chain([1.0, 5.0, 3.0], itertools.repeat(4.0)),
        bf16=itertools.chain([2.0, 6.0], itertools.repeat(7.0)),
    )
    assert precision._seconds(step) == (3.0, 6.0)


@pytest.mark.parametrize(("enough_s", "rounds"), [(-1.0, 2), (1000.0, 10)])
def test_each_format_is_measured_at_least_twice_and_at_most_ten_times(monkeypatch, enough_s, rounds):
    monkeypatch.setattr(precision, "ENOUGH_S", enough_s)
    step = Timed(monkeypatch, f32=itertools.repeat(1.0), bf16=itertools.repeat(1.0))
    precision._seconds(step)
    assert step.calls == ["f32", "bf16"] * (1 + rounds)


def test_bf16_that_fails_later_on_is_not_possible_and_not_tried_again(monkeypatch):
    step = Timed(monkeypatch, f32=itertools.repeat(2.0), bf16=[1.0, 1.0, None])
    assert precision._seconds(step) == (2.0, np.inf)


def test_an_error_in_f32_is_no_measurement(monkeypatch):
    with pytest.raises(RuntimeError, match="not implemented"):
        precision._seconds(Timed(monkeypatch, f32=[1.0, None], bf16=itertools.repeat(1.0)))


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cpu", {"classifier": 32, "vae": 32, "answers": 32, "reference": 32, "judges": 32}),
        ("cuda", {"classifier": 48, "vae": 300, "answers": 70, "reference": 36, "judges": 40}),
    ],
)
def test_a_measured_step_has_32_images_on_a_cpu_and_a_batch_of_the_run_on_a_gpu(
    device, expected, monkeypatch
):
    monkeypatch.setattr(precision, "device", lambda: torch.device(device))
    spec = tiny(
        classifier={"batch_size": 48},
        vae={"batch_size": 2048},
        identify={"batch_size": 70},
        review={"reference": {**TINY["review"]["reference"], "batch_size": 36}},
        judges={"count": 1, "batch_size": 40},
    )
    steps, seen, found = precision._steps(spec, 10, 300), set[int](), {}
    with nn.modules.module.register_module_forward_pre_hook(lambda _, inputs: seen.add(len(inputs[0]))):
        for kind, step in steps.items():
            seen.clear()
            step("f32")
            (found[kind],) = seen
    assert found == expected


def test_models_that_are_not_trained_are_not_measured():
    path = "tests.core.training.test_reference_models:Dark"
    one = {"count": 1, "architecture": "custom", "import_path": path, "epochs": 0}
    kinds = {"classifier", "vae", "answers"}
    assert precision._steps(tiny(review={"reference": one}), 10, 64).keys() == kinds
    assert precision._steps(tiny(judges=one), 10, 64).keys() == kinds | {"reference"}


def test_a_run_file_that_names_a_precision_is_not_measured(monkeypatch):
    class Unasked:
        spec = tiny()

    precision.resolve_precision(Unasked, None)
    assert Unasked.spec == tiny()
