"""Evaluation: scores of the three classifiers, and which points the map of the latent space shows."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil

import numpy as np
import pytest
from sample_findings import sample_findings

from defuse_core.artifacts import NONE_OF_THE_ABOVE, Corrections, Models, Psi, Scenarios, Shard, Sweep
from defuse_core.config import RunFile
from defuse_core.data import open_splits
from defuse_core.data.splits import random_rows
from defuse_core.errors import RunMismatchError
from defuse_core.evaluation import (
    ACCEPTED,
    FAILURE,
    REJECTED,
    TRAINING,
    Findings,
    embed,
    evaluate,
    expect_same_accuracy,
    expect_same_answers,
    latent_map,
    shares_of_mixture,
)
from defuse_core.identify import gather_shards, save_shard
from defuse_core.local import LocalCompute
from defuse_core.models import decode_codes, load_classifier, load_vae, predict
from defuse_core.pipeline import _controls, load_finished
from defuse_core.protocols import silent
from defuse_core.runs import FROM_SWEEP, Run
from defuse_core.seeds import generator
from defuse_core.store import FolderStore
from tests.sample_components import sample_failures, sample_scenarios

NOTHING = Sweep((), None, {}, ())


def two_components(width: int) -> Scenarios:
    """Two narrow components far from each other."""
    means = np.stack([np.full(width, -3.0), np.full(width, 3.0)])
    weights, covariances = np.array([0.6, 0.4]), np.stack([0.1 * np.eye(width)] * 2)
    return sample_scenarios(weights, means, covariances, weights, 40, True, 9, 0.0)


def planted_psi(store: FolderStore, scenarios: Scenarios) -> Psi:
    """Write twenty codes at each of the two means, in two shards."""
    records = {}
    for index, mean in enumerate(scenarios.means):
        zeros = np.zeros(20, np.int64)
        failures = sample_failures(np.tile(mean, (20, 1)).astype(np.float32), zeros, zeros, zeros + 1)
        records[index] = save_shard(store, Shard(failures, 20, 80, 5, 2, 1.0, index=index))
    return gather_shards(records)


def findings(models: Models, store: FolderStore, accepted: int, images: int = 4) -> Findings:
    """Findings of the tiny models with two components, the first `accepted` of them failure scenarios."""
    width = len(models.kl_per_dimension)
    scenarios = two_components(width)
    sample, _ = sample_findings(2, accepted, images=images, side=16)
    rows = np.arange(accepted)
    codes = np.repeat(scenarios.means[rows][:, None], 6, axis=1).astype(np.float32)
    return dataclasses.replace(
        sample,
        models=models,
        psi=planted_psi(store, scenarios),
        scenarios=scenarios,
        fixes=Corrections(rows, sample.verdicts.labels[rows], codes, codes),
        baseline=NOTHING,
        sweep=NOTHING,
    )


def test_the_embedding_is_the_same_each_time(tiny_spec: RunFile):
    codes = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    assert embed(tiny_spec, codes[:, :1]).shape == (len(codes), 2)  # a latent space of one dimension
    first, second = embed(tiny_spec, codes), embed(tiny_spec, codes)
    np.testing.assert_array_equal(first, second)
    assert first.shape == (60, 2)


def test_too_few_codes_for_an_embedding_lie_at_one_point(tiny_spec: RunFile):
    for count in (1, 2, 3):
        assert embed(tiny_spec, np.ones((count, 4), np.float32)).shape == (count, 2)
    assert np.isfinite(embed(tiny_spec, np.eye(4, dtype=np.float32))).all()


def test_accuracies_are_those_of_the_models(tiny_spec: RunFile, tiny_models: Models, tmp_path):
    found = findings(tiny_models, FolderStore(tmp_path), accepted=2)
    tuned = Sweep((), None, tiny_models.classifier, ())
    found = dataclasses.replace(found, baseline=tuned)
    evaluation = evaluate(tiny_spec, found, FolderStore(tmp_path), progress=silent)
    expected = [tiny_models.accuracy["validation"], tiny_models.accuracy["test"]]
    np.testing.assert_allclose(evaluation.accuracy[:, :2], [expected] * 3)
    np.testing.assert_allclose(evaluation.accuracy[:, 2], evaluation.scenario.mean(axis=1))
    counts = evaluation.per_class_images
    assert counts.sum() == tiny_models.images["test"]
    assert (evaluation.per_class[0] * counts).sum() / counts.sum() == pytest.approx(expected[1])


def test_with_many_classes_it_is_stored_what_each_lost_for_certain(
    tiny_spec, tiny_models, tmp_path, monkeypatch
):
    found = findings(tiny_models, FolderStore(tmp_path), accepted=2)
    blank = {name: np.zeros_like(array) for name, array in tiny_models.classifier.items()}
    found = dataclasses.replace(found, sweep=Sweep((), None, blank, ()))
    few = evaluate(tiny_spec, found, FolderStore(tmp_path), progress=silent)
    monkeypatch.setattr("defuse_core.evaluation.MANY_CLASSES", 9)
    monkeypatch.setattr("defuse_core.intervals.MANY_CLASSES", 9)
    many = evaluate(tiny_spec, found, FolderStore(tmp_path), progress=silent)
    lost = many.per_class[0] - many.per_class[2]
    assert few.class_loss is None and many.class_loss is not None
    assert (lost > 0.5).any() and (many.class_loss[lost > 0.5] > 0).all()
    assert (many.class_loss <= np.maximum(lost, 0)).all()


def test_answers_after_the_correction_are_those_of_the_corrected_classifier(tiny_spec, tiny_models, tmp_path):
    last = sorted(name for name in tiny_models.classifier if name.endswith(".bias"))[-1]
    layer = (last, last.replace("bias", "weight"))
    shifted = {  # answers the class after that of the classifier before
        name: np.roll(array, 1, axis=0) if name in layer else array
        for name, array in tiny_models.classifier.items()
    }
    found = dataclasses.replace(
        findings(tiny_models, FolderStore(tmp_path), accepted=1), sweep=Sweep((), None, shifted, ())
    )
    evaluation = evaluate(tiny_spec, found, FolderStore(tmp_path), progress=silent)
    before = load_classifier(tiny_spec, tiny_models.classifier, 10)
    answers = predict(before, found.gallery.images.reshape(-1, 1, 16, 16))
    assert evaluation.gallery_after.ravel().tolist() == ((answers + 1) % 10).tolist()
    assert evaluation.accuracy[2, 1] < 0.5 < evaluation.accuracy[0, 1] == tiny_models.accuracy["test"]


def test_held_out_images_are_scored_per_scenario_against_its_label(tiny_spec, tiny_models, tmp_path):
    """Codes of one place in each scenario: the classifier has one answer, right in one scenario only."""
    found = findings(tiny_models, FolderStore(tmp_path), accepted=2)
    means = decode_codes(load_vae(tiny_spec, tiny_models.vae), found.scenarios.means.astype(np.float32))
    answers = predict(load_classifier(tiny_spec, tiny_models.classifier, 10), means)
    labels = np.array([answers[0], (answers[1] + 1) % 10])
    found = dataclasses.replace(found, fixes=dataclasses.replace(found.fixes, labels=labels))
    evaluation = evaluate(tiny_spec, found, FolderStore(tmp_path), progress=silent)
    np.testing.assert_array_equal(evaluation.scenario[0], [1.0, 0.0])
    assert evaluation.accuracy[0, 2] == 0.5


def test_without_an_accepted_scenario_the_classifier_is_left_as_it_was(tiny_spec, tiny_models, tmp_path):
    found = findings(tiny_models, FolderStore(tmp_path), accepted=0)
    evaluation = evaluate(tiny_spec, found, FolderStore(tmp_path), progress=silent)
    np.testing.assert_array_equal(evaluation.accuracy[0], evaluation.accuracy[2])
    assert np.isnan(evaluation.accuracy[1]).all()
    assert np.isnan(evaluation.accuracy[:, 2]).all()
    assert evaluation.scenario.shape == (3, 0)
    kinds = np.bincount(evaluation.point_kind, minlength=4)
    assert kinds[[TRAINING, FAILURE, ACCEPTED, REJECTED]].tolist() == [60, 40, 0, 2]


def test_the_map_shows_only_failures_near_an_accepted_scenario(tiny_spec, tiny_models, tmp_path):
    found = findings(tiny_models, FolderStore(tmp_path), accepted=1)
    evaluation = evaluate(tiny_spec, found, FolderStore(tmp_path), progress=silent)
    shown = evaluation.point_component[evaluation.point_kind == FAILURE]
    assert shown.tolist() == [0] * 20
    train = open_splits(tiny_spec.data, tiny_spec.seed).train
    rows = random_rows(
        len(train), tiny_spec.report.tsne_images, generator(tiny_spec.seed, "report", "sample")
    )
    of_class = evaluation.point_component[evaluation.point_kind == TRAINING]
    np.testing.assert_array_equal(of_class, train.labels[rows])
    assert np.isfinite(evaluation.points).all()


def test_each_failure_on_the_map_is_of_its_own_component_and_the_seed_says_which_are_shown(
    tiny_spec, tiny_models, tmp_path, monkeypatch
):
    monkeypatch.setattr("defuse_core.evaluation.embed", lambda spec, codes: codes)
    store, spec = FolderStore(tmp_path), tiny_spec.with_fields("report", tsne_failures=15)
    found, train = findings(tiny_models, store, accepted=2), open_splits(spec.data, spec.seed).train
    codes, kind, component = latent_map(spec, found, train, store)
    shown = kind == FAILURE
    np.testing.assert_array_equal(component[shown], codes[shown].mean(axis=1) > 0)
    assert shown.sum() == 15 and set(component[shown]) == {0, 1}
    other, _, _ = latent_map(spec.model_copy(update={"seed": 1}), found, train, store)
    assert not np.array_equal(other[kind == TRAINING], codes[kind == TRAINING])
    verdicts = dataclasses.replace(found.verdicts, labels=np.array([NONE_OF_THE_ABOVE, 3]))
    _, kind, component = latent_map(spec, dataclasses.replace(found, verdicts=verdicts), train, store)
    assert kind[-2:].tolist() == [REJECTED, ACCEPTED] and set(component[kind == FAILURE]) == {1}


def test_codes_of_a_dropped_component_belong_to_no_scenario_and_are_not_on_the_map(
    tiny_spec, tiny_models, tmp_path
):
    whole = two_components(len(tiny_models.kl_per_dimension))
    found = findings(tiny_models, FolderStore(tmp_path), accepted=1)
    kept = whole.take(np.array([0]), all_means=whole.means, all_covariances=whole.covariances)
    shares = shares_of_mixture(kept, whole.means.astype(np.float32))
    np.testing.assert_allclose(shares[:, 0], [1, 0], atol=1e-9)
    evaluation = evaluate(
        tiny_spec, dataclasses.replace(found, scenarios=kept), FolderStore(tmp_path), progress=silent
    )
    assert (evaluation.point_kind == FAILURE).sum() == 20  # of 40 in Ψ


def test_a_data_set_without_validation_and_a_mixture_without_components_have_no_such_figures(
    tiny_spec: RunFile, tiny_models: Models, tmp_path
):
    plain = tiny_spec.model_copy(update={"data": tiny_spec.data.model_copy(update={"validation_share": 0.0})})
    images = open_splits(plain.data, plain.seed).fingerprint()
    width = len(tiny_models.kl_per_dimension)
    sample, _ = sample_findings(0, 0, side=16)
    empty = sample_scenarios(
        np.zeros(0), np.zeros((0, width)), np.zeros((0, width, width)), np.zeros(0), 0, True, 0, 0.0
    )
    codes = np.zeros((0, 4, width), np.float32)
    none = np.zeros(0, np.int64)
    found = dataclasses.replace(
        sample,
        models=dataclasses.replace(tiny_models, data_fingerprint=images),
        psi=Psi(none, 0, 0, 0, 0, 0.0),
        scenarios=empty,
        fixes=Corrections(none, none, codes, codes),
    )
    evaluation = evaluate(plain, found, FolderStore(tmp_path), progress=silent)
    assert np.isnan(evaluation.accuracy[:, 0]).all()
    assert np.isfinite(evaluation.accuracy[0, 1])
    assert evaluation.gallery_after.shape == found.gallery.predicted.shape
    assert set(evaluation.point_kind) == {TRAINING}


def test_controls_are_tuned_again_after_an_added_lambda_only_where_other_epochs_are_chosen(
    judged_run, tmp_path, monkeypatch
):
    shutil.copytree(judged_run.store.folder, tmp_path / "a")
    run = Run.open(FolderStore(tmp_path), "a")
    found, compute = load_finished(run).found, LocalCompute()
    assert found.sweep.chosen is not None

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("defuse_core.trials.fine_tune", interrupted)
    run.delete(FROM_SWEEP)
    assert _controls(run, compute, found) is not None
    run.delete(FROM_SWEEP)
    chosen = dataclasses.replace(found.sweep.chosen, epoch=found.sweep.chosen.epoch + 1)
    other = dataclasses.replace(found, sweep=dataclasses.replace(found.sweep, chosen=chosen))
    with pytest.raises(KeyboardInterrupt):
        _controls(run, compute, other)


def test_one_percent_of_the_answers_and_two_more_may_be_others_than_when_the_run_began(tiny_models):
    known = dataclasses.replace(tiny_models, accuracy={"test": 0.9}, images={"test": 200})
    for accuracy in (0.8801, 0.9199):
        expect_same_accuracy(known, "test", accuracy)
    for accuracy in (0.8799, 0.9201):
        with pytest.raises(RunMismatchError, match="of the test images right, and got 90"):
            expect_same_accuracy(known, "test", accuracy)
    expect_same_accuracy(known, "validation", 0.0)  # it is not known


def test_a_tenth_of_the_answers_to_stored_images_and_one_more_may_be_others(tiny_spec, tiny_models):
    gallery = sample_findings(2, 1, images=20, side=16)[0].gallery
    classifier = load_classifier(tiny_spec, tiny_models.classifier, 10)
    answers = predict(classifier, gallery.images.reshape(-1, 1, 16, 16)).reshape(gallery.predicted.shape)
    for others, is_refused in ((5, False), (6, True)):  # of 40
        known = answers.copy()
        known.reshape(-1)[:others] = (known.reshape(-1)[:others] + 1) % 10
        given = dataclasses.replace(gallery, predicted=known)
        refused = pytest.raises(RunMismatchError, match="answers 6 of 40 stored images otherwise")
        with refused if is_refused else contextlib.nullcontext():
            expect_same_answers(tiny_spec, classifier, given)
