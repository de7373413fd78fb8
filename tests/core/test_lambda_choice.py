"""What each epoch of fine-tuning draws and is scored on, which row is chosen, and which clean images are left."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from defuse_core.artifacts import Corrections, Models, SweepRow, Trial
from defuse_core.config import RunFile
from defuse_core.correct import (
    ChoiceRule,
    FineTuning,
    TuningSteps,
    after_epoch,
    collect_sweep,
    fine_tune,
    require_progress,
)
from defuse_core.errors import ModelError
from defuse_core.models import accuracy, load_classifier, weights_of
from defuse_core.protocols import silent
from defuse_core.training import Adam
from defuse_core.tuning_data import FineTuningData, load_clean_images, score_before
from tests.conftest import fine_tuning_data, tiny
from tests.sample_components import sample_failures

Row = tuple[float, float | None, float]


def with_accuracy(models: Models, clean: float) -> Models:
    return replace(models, accuracy={"train": clean, "validation": clean})


def rule_of(spec: RunFile, clean: float) -> ChoiceRule:
    return ChoiceRule(spec.correct, {"train": clean, "validation": clean})


def rows_of(lam: float, *rows: Row) -> tuple[SweepRow, ...]:
    """Return an epoch for each (train, validation, tune)."""
    return tuple(
        SweepRow(lam, epoch, 0.1, train=train, validation=validation, test=0.0, tune=tune, scenario=0.0)
        for epoch, (train, validation, tune) in enumerate(rows, 1)
    )


def chosen(spec: RunFile, models: Models, *rows: Row) -> int | None:
    """Return which of so many λ is chosen, after one epoch each."""
    trials = [Trial(lam, rows_of(lam, row), {}, {}, {}, 1, True) for lam, row in enumerate(rows)]
    found = collect_sweep(spec, with_accuracy(models, 0.9), trials, {}).chosen
    return None if found is None else int(found.lam)


def test_each_part_of_the_data_is_scored_as_itself(tiny_models):
    rng = np.random.default_rng(0)
    codes = rng.standard_normal((2, 24, 4)).astype(np.float32)
    others = sample_failures(codes[0], np.arange(24), np.full(24, 5), np.full(24, 6))
    fixes = Corrections(np.arange(2), np.array([8, 2]), codes, -codes, unreviewed=others)
    spec = tiny(correct={"epochs": 1})
    data = fine_tuning_data(spec, tiny_models, fixes)
    assert len(data.scenario.d_f) > len(data.scenario.tune)
    *_, made = fine_tune(FineTuning(spec, tiny_models, data), 1.0, None)
    classifier, (row,) = load_classifier(spec, made.best, 10), made.rows
    found = (row.train, row.validation, row.test, row.tune, row.scenario)
    parts = (data.clean.train, data.clean.validation, data.clean.test, data.scenario.tune)
    expected = [accuracy(classifier, part) for part in (*parts, data.scenario.held_out)]
    assert found == pytest.approx(tuple(expected))


def test_of_the_lambdas_within_one_point_of_the_best_on_tuned_images_the_clean_accuracy_chooses(tiny_models):
    spec = tiny(correct={"choose_by": "tune", "max_loss": 0.1})
    assert chosen(spec, tiny_models, (0.9, 0.87, 0.906), (0.9, 0.88, 0.896)) == 1
    assert chosen(spec, tiny_models, (0.9, 0.87, 0.996), (0.9, 0.88, 0.99), (0.9, 0.89, 0.985)) == 1
    assert chosen(spec, tiny_models, (0.9, 0.89, 0.98), (0.9, 0.87, 0.996), (0.9, 0.88, 0.988)) == 2
    assert chosen(spec, tiny_models, (0.9, 0.79, 1.0), (0.9, 0.87, 0.9), (0.9, 0.88, 0.895)) == 2
    assert chosen(spec, tiny_models, (0.9, 0.88, 0.896), (0.9, 0.88, 0.904)) == 1
    assert chosen(spec, tiny_models, (0.91, 0.87, 0.9), (0.89, 0.88, 0.9)) == 1
    assert chosen(spec, tiny_models, (0.87, None, 0.9), (0.88, None, 0.9)) == 1
    assert chosen(spec, tiny_models, (0.9, 0.88, 0.9), (0.9, 0.88, 0.9)) == 0


@pytest.mark.parametrize(
    ("correct", "allowed"),
    [
        ({"max_loss": 0.005}, False),
        ({"max_loss": 0.007}, True),
        ({"max_class_loss": 0.06}, True),
        ({"choose_by": "validation"}, True),
    ],
)
def test_a_lambda_that_costs_a_class_too_much_is_not_chosen(correct, allowed, tiny_models):
    spec = tiny(correct={"choose_by": "tune", "stop_at_loss": None, **correct})
    rows = rows_of(1.0, (0.95, 0.95, 1.0))
    costly = replace(rows[0], class_loss=0.06)
    models = with_accuracy(tiny_models, 0.9)
    found = collect_sweep(spec, models, [Trial(1.0, (costly,), {}, {}, {}, 1, True)], {}).chosen
    assert (found is not None) is allowed
    other = Trial(0.1, rows_of(0.1, (0.9, 0.9, 0.5)), {}, {}, {}, 1, True)
    found = collect_sweep(spec, models, [Trial(1.0, (costly,), {}, {}, {}, 1, True), other], {}).chosen
    assert found is not None and found.lam == (1.0 if allowed else 0.1)


def test_what_a_class_has_lost_is_measured_on_training_and_on_validation_images(tiny_models):
    codes = np.zeros((1, 24, 4), np.float32)
    fixes = Corrections(np.arange(1), np.array([8]), codes, codes)
    spec = tiny(correct={"epochs": 1})
    data = fine_tuning_data(spec, tiny_models, fixes)
    threes_lost = load_classifier(spec, tiny_models.classifier, 10)
    with torch.no_grad():
        [*threes_lost.parameters()][-1][3] = -1e6

    def class_loss(data: FineTuningData, classifier: nn.Module = threes_lost) -> float:
        return FineTuning(spec, tiny_models, data).score(classifier, 1.0, 1, 0.1).class_loss

    parts = {part: data.clean.parts()[part] for part in ("train", "validation")}
    # only class 3 can lose
    blind = {part: images.labels == 3 for part, images in parts.items()}
    whole = replace(data, right_before=blind)
    assert 0.8 < class_loss(whole) < 1
    # so that all threes of a part are a single piece of evidence
    tracks = {part: replace(images, tracks=images.labels) for part, images in parts.items()}
    assert class_loss(replace(whole, clean=replace(data.clean, **tracks))) < 0.3
    known = replace(data, right_before={**blind, "validation": ~blind["validation"]})
    assert class_loss(known) > 0.1
    # that training images, which are many more, lose nothing does not hide what is lost on validation images
    assert class_loss(replace(data, right_before={**blind, "train": blind["train"] & False})) > 0.5
    kept = load_classifier(spec, tiny_models.classifier, 10)
    assert class_loss(data, kept) == 0.0


def test_a_class_is_compared_on_the_images_that_fine_tuning_reads(tiny_models):
    codes = np.zeros((1, 24, 4), np.float32)
    fixes = Corrections(np.arange(1), np.array([8]), codes, codes)
    spec = tiny(correct={"train_images": 100})
    data = fine_tuning_data(spec, tiny_models, fixes)
    assert {part: len(right) for part, right in data.right_before.items()} == {
        "train": 100,
        "validation": len(data.clean.validation),
    }
    known = load_classifier(spec, tiny_models.classifier, 10)
    assert data.right_before["train"].mean() == accuracy(known, data.clean.train)
    # anchored, D lacks training images at which held-out failures are anchored
    anchored = spec.with_fields("vae", decode="anchored")
    assert [*score_before(anchored, tiny_models, data.clean, progress=silent)] == ["validation"]


def test_of_the_epochs_of_a_lambda_that_are_equal_in_whole_percent_the_clean_accuracy_chooses():
    spec = tiny(correct={"choose_by": "tune", "max_loss": 0.1})

    def epoch(*rows: Row) -> int:
        (best,) = rule_of(spec, 0.9).best_rows(rows_of(1.0, *rows))
        return best.epoch

    assert epoch((0.9, 0.87, 0.904), (0.9, 0.88, 0.896)) == 2
    assert epoch((0.9, 0.87, 0.906), (0.9, 0.88, 0.896)) == 1
    assert epoch((0.9, 0.88, 0.896), (0.9, 0.88, 0.904)) == 2


def test_of_equal_epochs_the_earlier_one_is_kept():
    rule, trial = rule_of(tiny(), 0.9), Trial(1.0, (), {}, {}, {}, 0, False)
    rows = rows_of(1.0, *[(0.9, 0.88, 0.9)] * 2)
    for row in rows:
        trial = after_epoch(rule, trial, row, {"epoch": np.array(row.epoch)}, {})
    assert (trial.best_epoch, trial.best["epoch"]) == (1, 1) and rule.best_rows(rows) == [rows[0]]


def test_clean_accuracy_is_that_on_validation_images_and_on_training_images_where_there_are_none(tiny_models):
    spec = tiny(correct={"choose_by": "tune", "max_loss": 0.1})
    assert chosen(spec, tiny_models, (1.0, 0.7, 1.0)) is None
    assert chosen(spec, tiny_models, (0.7, 0.9, 1.0)) == 0
    assert chosen(spec, tiny_models, (0.7, None, 1.0)) is None
    assert chosen(spec, tiny_models, (0.9, None, 1.0)) == 0
    rule = ChoiceRule(
        spec.correct, {"train": 0.99, "validation": 0.9}
    )  # each is compared with its own before
    assert rule.allows(*rows_of(1.0, (0.7, 0.82, 1.0))) and not rule.allows(*rows_of(1.0, (0.82, None, 1.0)))


def test_a_lambda_is_given_up_only_where_it_loses_more_than_the_limit():
    rule = rule_of(tiny(correct={"max_loss": 0.0, "stop_at_loss": 0.1}), 0.9)
    assert [rule.gives_up(row) for row in rows_of(1.0, (0.9, 0.81, 1.0), (0.9, 0.79, 1.0))] == [False, True]
    assert not rule_of(tiny(), 0.9).gives_up(*rows_of(1.0, (0.0, 0.0, 1.0)))


def test_where_every_epoch_loses_too_much_the_one_that_loses_least_is_shown():
    spec = tiny(correct={"choose_by": "tune", "max_loss": 0.1})
    rows = rows_of(1.0, (0.5, 0.5, 1.0), (0.6, 0.6, 0.9), (0.55, 0.55, 0.95))
    (best,) = rule_of(spec, 0.9).best_rows(rows)
    assert best.epoch == 2


def test_of_a_sample_of_the_training_images_those_that_are_left_out_are_missing(tiny_models):
    spec = tiny(correct={"train_images": 100})
    none = np.zeros(0, np.int64)
    whole, sample = (
        load_clean_images(each, tiny_models, none, none, progress=silent).train for each in (tiny(), spec)
    )
    row_of = {image.tobytes(): row for row, image in enumerate(whole.pixels)}
    rows = np.array([row_of[image.tobytes()] for image in sample.pixels])
    assert len(row_of) == len(whole) and len(rows) == 100
    others = np.setdiff1d(np.arange(len(whole)), rows)
    left_out = np.sort(np.concatenate([rows[::10], others[:20]]))
    found = load_clean_images(spec, tiny_models, left_out, none, progress=silent).train
    np.testing.assert_array_equal(found.pixels, np.delete(sample.pixels, np.arange(0, 100, 10), axis=0))


@pytest.mark.parametrize(
    ("section", "scored"),
    [
        ({"schedule": "constant"}, [1, 2, 3]),
        ({"schedule": "one_cycle"}, [3]),
        ({"schedule": "one_cycle", "choose_by": "validation"}, [3]),
        ({"schedule": "constant", "choose_by": "last", "lambdas": [1.0]}, [3]),
        ({"schedule": "one_cycle", "stop_at_loss": 1.0}, [1, 2, 3]),
    ],
)
def test_the_same_weights_are_chosen_whether_or_not_epochs_that_cannot_be_picked_are_scored(
    section, scored, tiny_models, data, monkeypatch
):
    spec = tiny(correct={"epochs": 3, **section})
    *_, made = fine_tune(FineTuning(spec, tiny_models, data), 1.0, None)
    assert [row.epoch for row in made.rows if row.is_scored] == scored
    assert all(row.loss > 0 for row in made.rows) and len(made.rows) == 3
    monkeypatch.setattr("defuse_core.correct.ChoiceRule.needs_score", lambda *_: True)
    *_, whole = fine_tune(FineTuning(spec, tiny_models, data), 1.0, None)
    assert all(row.is_scored for row in whole.rows)
    assert (made.best_epoch, made.rows[-1]) == (whole.best_epoch, whole.rows[-1])
    for name, array in whole.best.items():
        np.testing.assert_array_equal(made.best[name], array)
    sweeps = [collect_sweep(spec, tiny_models, [trial], {}) for trial in (made, whole)]
    assert sweeps[0].chosen == sweeps[1].chosen
    rule = ChoiceRule(spec.correct, tiny_models.accuracy)
    assert rule.best_rows(sweeps[0].rows) == rule.best_rows(sweeps[1].rows)


def test_each_epoch_and_each_seed_has_random_numbers_of_its_own(tiny_models, data, monkeypatch):
    moves, found = list[float](), []

    def noting(images, rng):
        moves.append(rng.random())
        return images

    monkeypatch.setattr("defuse_core.correct.random_affine", noting)
    optimizer = Adam(load_classifier(tiny(), tiny_models.classifier, 10).parameters(), 1e-3)
    for seed, epoch in ((0, 1), (0, 2), (1, 1)):
        spec = tiny(correct={"augment": True}).model_copy(update={"seed": seed})
        both, labels, _ = next(TuningSteps(FineTuning(spec, tiny_models, data)).epoch(epoch, optimizer))
        clean, scenario = (part.flatten().tolist() for part in both.split(len(labels)))
        found.append((tuple(clean), tuple(scenario), moves[-1], torch.rand(1).item()))
    for kind in zip(*found, strict=True):
        assert len(set(kind)) == 3


@pytest.mark.parametrize("lam", [0.0, 1e-3, 10.0])
def test_the_loss_is_that_on_clean_images_and_lambda_times_that_on_images_of_scenarios(
    lam, tiny_models, data
):
    tuning = FineTuning(tiny(correct={"epochs": 1, "batch_size": 300}), tiny_models, data)
    net = tuning.classifier(tiny_models.classifier).train()
    ((both, labels, wrong),) = TuningSteps(tuning).epoch(1, Adam(net.parameters(), 1e-3))
    clean, scenario = net(both).split(len(labels))
    expected = cross_entropy(clean, labels) + lam * cross_entropy(scenario, wrong)
    assert next(fine_tune(tuning, lam, None)).rows[0].loss == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("where", ["statistics", "moments", "weights", None])
def test_an_epoch_that_changes_nothing_or_whose_statistics_or_moments_overflow_has_diverged(where):
    net, moments = nn.BatchNorm1d(2), {"weight/exp_avg": np.ones(2, np.float32)}
    before = {name: array.copy() for name, array in weights_of(net).items()}
    with torch.no_grad():
        net.weight += where != "weights"
        if where == "statistics":  # they have no moments
            net.running_mean[0] = torch.inf
    if where == "moments":
        moments["weight/exp_avg"][0] = np.nan
    what = "changed no weight" if where == "weights" else "overflowed"
    diverged = pytest.raises(ModelError, match=f"λ = 2 diverged: an epoch {what}")
    with diverged if where else nullcontext():
        require_progress(before, net, moments, 2.0)
