import itertools
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from defuse_core.artifacts import Corrections, Gallery, Models, SweepRow, Trial, Verdicts
from defuse_core.codec import encode
from defuse_core.correct import ChoiceRule, FineTuning, collect_sweep, fine_tune
from defuse_core.errors import ComputeError, DataError, InputError, ModelError, RunFileError
from defuse_core.local import LocalCompute
from defuse_core.models import accuracy, load_classifier, predict, weights_of
from defuse_core.protocols import SweepRequest
from defuse_core.store import FolderStore
from defuse_core.training import cycle, train_step
from defuse_core.training.batches import random_affine
from defuse_core.trials import (
    collect_stored,
    finished_trials,
    is_trial_failure,
    run_stack,
    run_trial,
    stacks_of,
    trial_key,
    without_weights,
    write_trial,
)
from defuse_core.tuning_data import reviewed_failures
from tests.conftest import fine_tuning_data, tiny
from tests.own_classifiers import trained


def test_tuning_pairs_every_decoded_code_with_its_scenarios_label(data):
    assert data.scenario.tune.labels.tolist() == [8] * 24 + [2] * 24
    assert data.scenario.tune.pixels.shape == (48, 1, 16, 16)
    assert not np.array_equal(data.scenario.tune.pixels, data.scenario.held_out.pixels)


def test_the_baseline_tunes_on_reviewed_failures_and_is_tested_on_the_same_held_out_images(
    tiny_spec, tiny_models, fixes, data
):
    reviewed = data.clean.train.take(slice(0, 5))
    baseline = fine_tuning_data(tiny_spec, tiny_models, fixes, reviewed)
    assert len(baseline.scenario.tune) == 5
    np.testing.assert_array_equal(baseline.scenario.held_out.pixels, data.scenario.held_out.pixels)


def test_fine_tuning_with_a_large_lambda_learns_the_scenarios(tiny_spec, tiny_models, data):
    *_, trial = fine_tune(FineTuning(tiny(correct={"epochs": 15}), tiny_models, data), 10.0, None)
    assert trial.rows[-1].scenario > 0.9
    assert trial.rows[-1].loss < trial.rows[0].loss


def test_a_lambda_that_diverges_is_told_and_left_out(tiny_models, fixes, tmp_path):
    # 1e39 makes the loss infinite, and 1e30 its gradients alone
    spec = tiny(correct={"lambdas": [1.0, 1e30, 1e39], "epochs": 1, "schedule": "one_cycle"})
    (sweep,) = LocalCompute().sweeps(tiny_models, [SweepRequest(spec, fixes, None, FolderStore(tmp_path))])
    assert [row.lam for row in sweep.rows] == [1.0]
    assert [failed.lam for failed in sweep.failed] == [1e30, 1e39]
    assert all("diverged" in failed.cause for failed in sweep.failed)
    spec = tiny(correct={"lambdas": [1e39], "epochs": 1})
    with pytest.raises(
        ModelError, match=r"every trial failed; λ = 1e\+39: training .* diverged: .*; add smaller values"
    ):
        LocalCompute().sweeps(
            tiny_models, [SweepRequest(spec, fixes, None, FolderStore(tmp_path / "other"))]
        )[0]


def test_a_sweep_whose_trials_are_all_finished_reads_no_images(tiny_models, fixes, tmp_path):
    request = SweepRequest(tiny(correct={"epochs": 1}), fixes, None, FolderStore(tmp_path))
    (before,) = LocalCompute().sweeps(tiny_models, [request])
    others = replace(
        tiny_models, data_fingerprint="of other images"
    )  # which are refused where they are opened
    (again,) = LocalCompute().sweeps(others, [request])
    assert encode(again) == encode(before)


def test_images_that_are_gone_stop_the_sweep_and_leave_no_lambda_out(
    tiny_spec, tiny_models, fixes, tmp_path, monkeypatch
):
    def gone(*asked):
        raise DataError("a.png: this image has gone")

    monkeypatch.setattr("defuse_core.trials.run_trial", gone)
    with pytest.raises(DataError, match=r"a\.png"):
        LocalCompute().sweeps(tiny_models, [SweepRequest(tiny_spec, fixes, None, FolderStore(tmp_path))])


@pytest.mark.parametrize("stack", [1, 3])
def test_a_classifier_that_cannot_be_made_here_stops_the_sweep_and_leaves_no_lambda_out(
    stack, tiny_models, data, tmp_path, monkeypatch
):
    def missing(*asked):
        raise ModelError("classifier.import_path my_nets:build: cannot import my_nets; set PYTHONPATH")

    monkeypatch.setattr("defuse_core.correct.load_classifier", missing)
    spec = tiny(correct={"stack": stack})
    made = run_stack(FineTuning(spec, tiny_models, data), stacks_of(spec.correct)[0], FolderStore(tmp_path))
    with pytest.raises(InputError, match=r"^correct: classifier\.import_path .* set PYTHONPATH$") as raised:
        next(made)
    assert not is_trial_failure(raised.value)


NO_MEMORY = r"λ = 0\.001: out of memory .* run again to continue, or lower correct\.batch_size or stack"
GPU_FAILED = r"^correct: λ = 0\.001: .* error: .*; run again in a new process .* to continue$"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError("no room"), NO_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), NO_MEMORY),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
            NO_MEMORY,
        ),
        (RuntimeError("CUDA error: out of memory"), NO_MEMORY),
        (
            torch.AcceleratorError("CUDA error: unspecified launch failure\nCompile with TORCH_USE_CUDA_DSA"),
            GPU_FAILED,
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), GPU_FAILED),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
            GPU_FAILED,
        ),
    ],
)
def test_missing_memory_and_a_gpu_that_fails_stop_the_sweep_and_leave_no_lambda_out(
    tiny_spec, tiny_models, fixes, tmp_path, monkeypatch, error, told
):
    def fail(*asked):
        raise error

    monkeypatch.setattr("defuse_core.trials.run_trial", fail)
    with pytest.raises(ComputeError, match=told):
        LocalCompute().sweeps(tiny_models, [SweepRequest(tiny_spec, fixes, None, FolderStore(tmp_path))])


def test_images_are_augmented_anew_in_every_step_and_only_while_tuning(tiny_models, data, monkeypatch):
    seen = []

    def noting(images, rng):
        seen.append(random_affine(images, rng))
        return seen[-1]

    monkeypatch.setattr("defuse_core.correct.random_affine", noting)
    spec = tiny(correct={"epochs": 2, "augment": True, "batch_size": len(data.clean.train)})
    *_, done = fine_tune(FineTuning(spec, tiny_models, data), 1.0, None)
    images = np.sort(np.stack([step.numpy().sum(axis=(1, 2, 3)) for step in seen]), axis=1)
    assert images.shape == (2, 2 * len(data.clean.train))  # D and as many of D_f, in each of two steps
    assert not np.isclose(images[0], images[1]).all()
    classifier = load_classifier(spec, done.best, 10)
    assert done.rows[done.best_epoch - 1].validation == accuracy(classifier, data.clean.validation)
    spec = tiny(correct={"epochs": 2, "batch_size": len(data.clean.train)})
    *_, plain = fine_tune(FineTuning(spec, tiny_models, data), 1.0, None)
    assert len(seen) == 2
    assert plain.rows[0].loss != done.rows[0].loss


@pytest.mark.parametrize(("schedule", "augmented"), [("constant", False), ("one_cycle", True)])
def test_an_interrupted_trial_goes_on_to_the_same_end_bit_for_bit(schedule, augmented, tiny_models, data):
    spec = tiny(correct={"epochs": 3, "schedule": schedule, "augment": augmented})
    tuning = FineTuning(spec, tiny_models, data)
    *_, whole = fine_tune(tuning, 1.0, None)
    first = next(fine_tune(tuning, 1.0, None))
    *_, resumed = fine_tune(tuning, 1.0, first)
    assert resumed.rows == whole.rows
    for name, array in whole.best.items():
        np.testing.assert_array_equal(resumed.best[name], array)


def test_the_learning_rate_of_a_cycle_falls_to_nothing_at_the_last_step(tiny_models, data, monkeypatch):
    rates = []

    def noting(loss, optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        train_step(loss, optimizer)

    monkeypatch.setattr("defuse_core.correct.train_step", noting)
    spec = tiny(correct={"epochs": 4, "schedule": "one_cycle", "learning_rate": 0.002})
    list(fine_tune(FineTuning(spec, tiny_models, data), 1.0, None))
    assert len(rates) == 4 * 5  # 300 images in batches of 64
    assert max(rates) == rates[1] == 0.002  # after a tenth of the steps
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] == 0.0


def test_a_last_epoch_of_one_step_at_rate_0_is_no_divergence(tiny_models, data):
    spec = tiny(correct={"epochs": 2, "schedule": "one_cycle", "batch_size": 300})
    *_, done = fine_tune(FineTuning(spec, tiny_models, data), 1.0, None)
    assert [row.epoch for row in done.rows] == [1, 2]


def test_only_the_last_epoch_of_a_cycle_may_be_chosen(tiny_models, data):
    spec = tiny(correct={"epochs": 3, "schedule": "one_cycle", "choose_by": "validation"})
    *_, done = fine_tune(FineTuning(spec, tiny_models, data), 1.0, None)
    assert done.best_epoch == 3
    rows = ((0.99, 1.0, 1.0), (0.95, 0.9, 0.9))  # the first of two epochs is better
    models = models_with(0.9, tiny_models)
    sweep = collect_sweep(spec, models, [trial(1.0, *rows, best=2)], {})
    assert sweep.chosen.epoch == 2
    assert [row.epoch for row in ChoiceRule(spec.correct, models.accuracy).best_rows(sweep.rows)] == [2]


def test_a_hopeless_lambda_is_given_up_after_the_epoch_that_loses_too_much(tiny_models, fixes, tmp_path):
    before = models_with(2.0, tiny_models)  # so that every epoch loses 1 or more
    spec = tiny(correct={"lambdas": [1.0], "epochs": 3, "stop_at_loss": 0.9})
    (sweep,) = LocalCompute().sweeps(before, [SweepRequest(spec, fixes, None, FolderStore(tmp_path))])
    assert [row.epoch for row in sweep.rows] == [1]
    assert sweep.chosen is None


def test_dropout_is_drawn_alike_whatever_ran_in_the_process_before(tiny_models, data, monkeypatch):
    def with_dropout(*asked):
        classifier = load_classifier(*asked)
        classifier.register_forward_pre_hook(
            lambda module, given: (functional.dropout(given[0], 0.5, module.training),)
        )
        return classifier

    monkeypatch.setattr("defuse_core.correct.load_classifier", with_dropout)
    tuning = FineTuning(tiny(correct={"epochs": 2}), tiny_models, data)
    *_, first = fine_tune(tuning, 1.0, None)
    torch.rand(7)
    *_, second = fine_tune(tuning, 1.0, None)
    assert first.rows == second.rows


def test_each_step_has_as_many_scenario_images_as_clean_ones(tiny_spec, tiny_models, data, monkeypatch):
    sizes = []

    def counting(*asked):
        classifier = load_classifier(*asked)
        classifier.register_forward_pre_hook(
            lambda module, given: sizes.append(len(given[0])) if module.training else None
        )
        return classifier

    monkeypatch.setattr("defuse_core.correct.load_classifier", counting)
    next(fine_tune(FineTuning(tiny_spec, tiny_models, data), 1.0, None))
    assert sizes == [128, 128, 128, 128, 88]  # 300 images in batches of 64, and their like of D_f


def test_a_trial_resumes_from_what_lies_in_the_store_and_a_finished_one_is_not_run_again(
    tmp_path, tiny_spec, tiny_models, data
):
    store, tuning = FolderStore(tmp_path), FineTuning(tiny_spec, tiny_models, data)
    killed = next(run_trial(tuning, 1.0, store))
    assert len(killed.rows) == 1 and finished_trials(tiny_spec, store) == {}
    *_, done = run_trial(tuning, 1.0, store)
    assert [row.epoch for row in done.rows] == [1, 2] and [*finished_trials(tiny_spec, store)] == [1.0]
    before = store.read(trial_key(1.0))
    assert [trial.done for trial in run_trial(tuning, 1.0, store)] == [True]
    assert store.read(trial_key(1.0)) == before


def test_finished_trials_take_the_memory_of_one_trial_however_many_are_stored(tmp_path, tiny_spec):
    def peak(lambdas: range) -> int:
        tracemalloc.start()
        found = finished_trials(tiny_spec.with_fields("correct", lambdas=tuple(lambdas)), store)
        assert [*found] == [lam for lam in lambdas if lam > 14]
        assert not any(trial.best for trial in found.values())
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    store, rows, weights = FolderStore(tmp_path), (SweepRow(1.0, 1, 0.1),), {"w": np.ones(100_000)}
    for lam in range(1, 18):
        done = lam > 14
        state = {} if done else weights
        write_trial(store, Trial(lam, rows, state, state, weights, 1, done))
    peak(range(1, 2))  # with what is made once
    assert peak(range(1, 18)) < 1.1 * peak(range(1, 2))


def test_a_sweep_reads_the_weights_of_the_trial_that_is_chosen_alone(
    tmp_path, tiny_spec, tiny_models, fixes, data
):
    class Reads(FolderStore):
        def read(self, key: str) -> bytes:
            asked.append(key)
            return super().read(key)

    asked, store = list[str](), Reads(tmp_path)
    spec = tiny_spec.with_fields("correct", lambdas=(0.1, 1.0, 10.0))
    trials = [
        [*run_trial(FineTuning(spec, tiny_models, data), lam, store)][-1] for lam in spec.correct.lambdas
    ]
    asked.clear()
    expected = collect_sweep(spec, tiny_models, trials, {})
    request = SweepRequest(spec, fixes, None, store)
    found = collect_stored(request, tiny_models, [without_weights(trial) for trial in trials], {})
    assert encode(found) == encode(expected)
    assert expected.chosen is not None and asked == [trial_key(expected.chosen.lam)]


def test_every_lambda_has_a_key_of_its_own():
    lambdas = (*tiny().correct.lambdas, 1.0000000001, 1e-10)
    assert len({trial_key(lam) for lam in lambdas}) == len(lambdas)


def test_a_loss_that_is_not_finite_stops_the_trial_in_one_line(tiny_spec, tiny_models, data):
    broken = Models(
        **{**vars(tiny_models), "classifier": {k: v * 1e30 for k, v in tiny_models.classifier.items()}}
    )
    with pytest.raises(ModelError, match="diverged"):
        next(fine_tune(FineTuning(tiny_spec, broken, data), 1.0, None))


def test_further_training_of_a_classifier_that_is_sure_of_every_image_changes_nothing(
    tiny_spec, tiny_models, data
):
    last = sorted(name for name in tiny_models.classifier if name.endswith(".bias"))[-1].removesuffix("bias")
    sure = {k: v * 1e6 if k.startswith(last) else v for k, v in tiny_models.classifier.items()}
    right = predict(load_classifier(tiny_spec, sure, 10), data.clean.train.pixels) == data.clean.train.labels
    clean = replace(data.clean, train=data.clean.train.take(np.flatnonzero(right)))
    known = replace(data, clean=clean, right_before={})
    trial = next(fine_tune(FineTuning(tiny_spec, replace(tiny_models, classifier=sure), known), 0.0, None))
    assert trial.rows[0].train == 1.0


def test_a_trial_with_lambda_0_learns_nothing_of_the_scenarios_from_batch_statistics(tiny_models, data):
    own = {"architecture": "custom", "import_path": "tests.own_classifiers:trained", "epochs": 1}
    spec = tiny(classifier=own, correct={"augment": True})
    models = replace(tiny_models, classifier=weights_of(trained()))
    without = replace(data, scenario=replace(data.scenario, d_f=data.clean.train.take(slice(0, 48))))
    both = FineTuning(spec, models, data), FineTuning(spec, models, without)
    plain, other = (next(fine_tune(each, 0.0, None)).best for each in both)
    for name, array in plain.items():
        np.testing.assert_array_equal(array, other[name])


def test_the_last_epoch_of_the_only_lambda_is_kept_whatever_it_scores(tiny_models, data):
    spec = tiny(correct={"lambdas": [1e-3], "epochs": 3, "choose_by": "last", "learning_rate": 0.1})
    *_, made = fine_tune(FineTuning(spec, tiny_models, data), 1e-3, None)
    assert made.best_epoch == 3
    assert collect_sweep(spec, tiny_models, [made], {}).chosen.epoch == 3
    with pytest.raises(RunFileError, match="choose_by last needs a single λ"):
        tiny(correct={"choose_by": "last"})


def test_scenario_images_are_cycled_through_before_any_comes_twice():
    rows = np.concatenate(list(itertools.islice(cycle(10, 4, np.random.default_rng(0)), 5)))
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))


def trial(lam: float, *rows: tuple[float, float, float], best: int = 1) -> Trial:
    """Rows of (validation, tune, scenario)."""
    made = tuple(
        SweepRow(lam, n + 1, 0.1, train=v, validation=v, test=0.0, tune=t, scenario=s)
        for n, (v, t, s) in enumerate(rows)
    )
    weights = {"w": np.array([lam], np.float32)}
    return Trial(lam, made, {}, {}, weights, best, True)


def models_with(validation: float, tiny_models: Models) -> Models:
    return Models(**{**vars(tiny_models), "accuracy": {"train": validation, "validation": validation}})


@pytest.mark.parametrize(
    ("rule", "chosen"),
    [
        ({"choose_by": "validation"}, 0.001),  # the paper's: highest clean accuracy, the smaller λ at a tie
        (
            {"choose_by": "tune", "max_loss": 0.01},
            1.0,
        ),  # highest scenario accuracy among those that stay good
        ({"choose_by": "tune", "max_loss": 0.5}, 10.0),
    ],
)
def test_the_rule_of_choice_picks_lambda(rule, chosen, tiny_models):
    trials = [
        trial(10.0, (0.60, 1.0, 0.9)),
        trial(0.01, (0.98, 0.2, 1.0)),
        trial(1.0, (0.975, 0.9, 0.8)),
        trial(0.001, (0.98, 0.2, 0.2)),
    ]
    sweep = collect_sweep(tiny(correct=rule), models_with(0.98, tiny_models), trials, {})
    assert sweep.chosen.lam == chosen
    assert sweep.weights["w"][0] == np.float32(chosen)


def test_a_loss_of_exactly_what_is_allowed_is_allowed(tiny_models):
    sweep = collect_sweep(
        tiny(correct={"max_loss": 0.003}),
        models_with(3004 / 6000, tiny_models),
        [trial(1.0, (2986 / 6000, 1, 1))],
        {},
    )
    assert sweep.chosen is not None


def test_held_out_and_test_accuracy_choose_nothing(tiny_models):
    trials = [trial(1.0, (0.9, 0.5, 0.1)), trial(2.0, (0.9, 0.4, 1.0))]
    assert collect_sweep(tiny(), models_with(0.9, tiny_models), trials, {}).chosen.lam == 1.0


def test_if_every_row_loses_too_much_nothing_is_chosen_and_the_log_says_so(tiny_models, caplog):
    trials = [trial(1.0, (0.5, 1.0, 1.0)), trial(2.0, (0.6, 0.9, 0.9))]
    sweep = collect_sweep(tiny(correct={"max_loss": 0.0}), models_with(0.9, tiny_models), trials, {})
    assert (sweep.chosen, sweep.weights, len(sweep.rows)) == (None, {}, 2)
    assert "NO λ CHOSEN: every λ costs more clean accuracy than correct.max_loss" in caplog.text
    assert caplog.text.count("add smaller values to correct.lambdas") == 1
    caplog.clear()
    collect_sweep(
        tiny(correct={"max_loss": 0.0}), models_with(0.9, tiny_models), trials, {}, comparison="the baseline"
    )
    assert "the baseline has no result: every λ" in caplog.text
    assert "NO λ CHOSEN" not in caplog.text and "add smaller" not in caplog.text


def test_a_sweep_without_trials_has_no_choice(tiny_spec, tiny_models):
    sweep = collect_sweep(tiny_spec, tiny_models, [], {})
    assert (sweep.chosen, sweep.weights, sweep.failed) == (None, {}, ())


def test_each_lambda_that_is_left_out_is_logged_once_with_its_error(tiny_models, caplog):
    failures = {2.0: ModelError("it diverged"), 0.1: ComputeError("ZeroDivisionError: by nothing")}
    trials = [trial(1.0, (0.9, 0.5, 0.1))]
    collect_sweep(tiny(), models_with(0.9, tiny_models), trials, failures, comparison="the baseline")
    assert "correct: the trial of the baseline with λ = 2 failed for good: it diverged" in caplog.messages
    caplog.clear()
    collect_sweep(tiny(), models_with(0.9, tiny_models), trials, failures)
    assert caplog.messages == [
        "correct: the trial with λ = 0.1 failed for good: ZeroDivisionError: by nothing",
        "correct: the trial with λ = 2 failed for good: it diverged",
    ]


def test_a_sweep_that_lost_all_trials_to_different_causes_is_no_fault_of_the_input(tiny_spec, tiny_models):
    failures = {2.0: ComputeError("out of memory"), 1.0: ModelError("it diverged")}
    with pytest.raises(ComputeError, match="every trial failed; λ = 1: it diverged$"):
        collect_sweep(tiny_spec, tiny_models, [], failures)


def test_a_comparison_that_lost_all_trials_is_left_out(tiny_spec, tiny_models, caplog):
    failures = {1.0: ModelError("it diverged")}
    sweep = collect_sweep(tiny_spec, tiny_models, [], failures, comparison="a control of the evidence")
    assert (sweep.chosen, sweep.weights, [each.cause for each in sweep.failed]) == (None, {}, ["it diverged"])
    assert "the trial of a control of the evidence with λ = 1 failed for good: it diverged" in caplog.text


def test_reviewed_failures_are_the_labelled_images_that_the_classifier_gets_wrong():
    images = np.arange(4, dtype=np.float32).reshape(1, 4, 1, 1, 1).repeat(2, 3).repeat(2, 4) / 4
    gallery = Gallery(images, np.zeros((1, 4, 2), np.float32), np.array([[1, 1, 1, 1]]), ("a", "b", "c"))
    one, labels, agreement = np.ones(1), np.array([[2, 1, -1, 0]]), np.ones((1, 4))
    verdicts = Verdicts(np.array([2]), one, one, labels, agreement, 0, 0, ("",), (), np.array([3]))
    wrong = reviewed_failures(gallery, verdicts)
    assert wrong.labels.tolist() == [2, 0]
    assert wrong.pixels[:, 0, 0, 0].tolist() == [0.0, 0.75]


def test_nothing_accepted_or_nothing_wrong_leaves_nothing_to_tune_on(tiny_spec, fixes, data, tmp_path):
    none = Corrections(*(part[:0] for part in (fixes.scenario, fixes.labels, fixes.tune, fixes.test)))
    store = FolderStore(tmp_path)
    assert SweepRequest(tiny_spec, none, None, store).is_empty
    assert SweepRequest(tiny_spec, fixes, data.scenario.tune.take(slice(0, 0)), store).is_empty
    assert not SweepRequest(tiny_spec, fixes, None, store).is_empty


def test_a_repetition_has_the_same_images_in_another_order(tiny_spec, tiny_models, fixes):
    """The first is the fine-tuning of the sweep. Augmentation and order are of the repetition, the images are not."""
    spec = tiny(correct={"lambdas": (0.0,), "epochs": 1, "train_images": 100})
    data = fine_tuning_data(spec, tiny_models, fixes)
    assert data.repetition == 0
    trained = [
        [*fine_tune(FineTuning(spec, tiny_models, replace(data, repetition=number)), 0.0, None)][-1].best
        for number in (0, 0, 1, 2)
    ]
    alike = [
        [all(np.array_equal(first[key], other[key]) for key in first) for other in trained]
        for first in trained
    ]
    assert alike[0] == [True, True, False, False] and alike[2] == [False, False, True, False]


def test_a_repetition_that_was_stopped_goes_on_as_the_same_one(tiny_spec, tiny_models, fixes, tmp_path):
    spec = tiny(correct={"lambdas": (0.0,), "epochs": 2})
    data = fine_tuning_data(spec, tiny_models, fixes)
    tuning = FineTuning(spec, tiny_models, replace(data, repetition=1))
    *_, whole = run_trial(tuning, 0.0, FolderStore(tmp_path / "whole"))
    next(run_trial(tuning, 0.0, FolderStore(tmp_path / "stopped")))
    *_, resumed = run_trial(tuning, 0.0, FolderStore(tmp_path / "stopped"))
    assert encode(resumed) == encode(whole)
    request = SweepRequest(spec, fixes, None, FolderStore(tmp_path / "asked"), repetition=1)
    (sweep,) = LocalCompute().sweeps(tiny_models, [request])
    assert all(np.array_equal(sweep.weights[key], whole.best[key]) for key in whole.best)
