"""Failures that nobody reviewed: which are chosen, and how they are tuned on beside the images of the scenarios."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from defuse_core.artifacts import (
    NONE_OF_THE_ABOVE,
    Anchors,
    ComponentFailures,
    Corrections,
    Failures,
    Models,
    Psi,
    ReferenceSet,
    Scenarios,
    Verdicts,
)
from defuse_core.data import Images, open_splits
from defuse_core.formatting import count_of
from defuse_core.identify import Identifier, save_shard, subsample_psi
from defuse_core.local import LocalCompute
from defuse_core.models import decode_codes, encode_images, load_classifier, load_vae, predict
from defuse_core.pipeline import load_finished, run_defuse
from defuse_core.protocols import map_in_tasks, silent
from defuse_core.review.sample import Examiner
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from defuse_core.training.reference_models import (
    ReferenceAnnotators,
    load_reference_models,
    model_probabilities,
)
from defuse_core.tuning_data import (
    allowed,
    choose_unreviewed,
    decode_failures,
    decode_scenario_images,
    load_clean_images,
)
from tests.conftest import recommended, tiny, trained_run
from tests.sample_components import sample_failures
from tests.sample_findings import sample_findings


def found_with(labels: list[int], cells: list[tuple[int, int]] | None = None) -> tuple[Scenarios, Verdicts]:
    """Components at 0, 100, 200, ... with these labels of the reviewers."""
    found, _ = sample_findings(scenarios=len(labels), accepted=1)
    far = 100.0 * np.arange(len(labels))[:, None] * np.ones((1, 3))
    scenarios = replace(
        found.scenarios,
        means=far,
        covariances=np.stack([np.eye(3)] * len(labels)),
        cells=np.array(cells or [(NONE_OF_THE_ABOVE,) * 2] * len(labels)),
    )
    return scenarios, replace(found.verdicts, labels=np.array(labels))


def failures_at(
    centers: list[float], truth: int, answers: list[int], tracks: list[int] | None = None
) -> Failures:
    codes = np.array(centers, np.float32)[:, None] * np.ones((1, 3), np.float32)
    labels, source = np.full(len(centers), truth), 10 * np.arange(len(centers))
    track = None if tracks is None else np.array(tracks)
    return sample_failures(codes, source, labels, np.array(answers), source_track=track)


def test_no_failure_is_tuned_on_that_reviewers_rejected_or_labelled_otherwise() -> None:
    scenarios, verdicts = found_with([4, 5, NONE_OF_THE_ABOVE])
    failures = failures_at([0.0, 0.5, 50.0, 100.0, 150.0, 200.0], 4, [9] * 6)
    assert allowed(failures, scenarios, verdicts).tolist() == [True, True, True, False, True, False]


def test_a_cell_in_which_reviewers_accepted_nothing_as_its_class_is_tuned_on_nowhere() -> None:
    cells = [(4, 9), (4, 9), (4, 7), (4, 6)]
    scenarios, verdicts = found_with([4, NONE_OF_THE_ABOVE, NONE_OF_THE_ABOVE, 6], cells)
    far = failures_at([1000.0] * 4, 4, [9, 7, 6, 5])  # 5 is in no cell that was reviewed
    assert allowed(far, scenarios, verdicts).tolist() == [True, False, False, True]
    single = replace(scenarios, cells=np.full((4, 2), NONE_OF_THE_ABOVE))  # distill.by: all
    assert allowed(far, single, verdicts).all()


def test_no_failure_is_of_a_photograph_or_track_that_held_out_images_are_anchored_at() -> None:
    scenarios, verdicts = found_with([4, NONE_OF_THE_ABOVE])
    anchors = Anchors(
        np.zeros((4, 1, 4, 4), np.uint8), np.array([0, 10, 20, 30]), np.array([False, True] * 2)
    )
    of_components = ComponentFailures(np.zeros((2, 2, 3), np.float32), np.array([[0, 1], [2, 3]]), anchors)
    failures = failures_at([1000.0] * 4, 4, [9] * 4, [7, 8, 8, 9])
    at = replace(scenarios, failures=of_components)
    # image 30 is held out too, for a component that was not accepted
    images = replace(failures, source_track=None)
    assert allowed(images, at, verdicts).tolist() == [True, False, True, True]
    of_tracks = replace(of_components, anchors=replace(anchors, track=np.array([7, 8, 7, 9])))
    in_tracks = replace(scenarios, failures=of_tracks)
    assert allowed(failures, in_tracks, verdicts).tolist() == [True, False, False, True]


RIGHT = 1000  # source of what follows the failures


@pytest.fixture
def run_with_psi(tmp_path, tiny_models: Models, references: ReferenceSet) -> tuple[Run, Psi]:
    """A run whose Ψ is the first shard of a real one, screened by the models' mean, and codes that do not fail."""
    spec = recommended(identify={"scale": 3.0}, correct={"tune_images": 60})
    run = Run.start(FolderStore(tmp_path), "a", spec)
    identifier = Identifier(spec, tiny_models, references)
    shard = identifier.shard(0)
    # no failures: codes of training images under their class, most of which the classifier gets right
    own = identifier.train.take(slice(0, 100))
    codes = encode_images(identifier.vae, own)
    right = sample_failures(codes, RIGHT + np.arange(100), own.labels, (own.labels + 1) % 10)
    both = Failures.concatenate([shard.failures, right])
    save_shard(run.store, replace(shard, failures=both))
    one = np.array([len(both)])
    return run, Psi(one, shard.images, shard.decodings, 0, 0, 0.0, fingerprint=shard.fingerprint)


def nowhere(run: Run) -> tuple[Scenarios, Verdicts]:
    """Two components, one of them accepted, whose regions hold no code."""
    scenarios, verdicts = found_with([NONE_OF_THE_ABOVE, 3])
    width = run.spec.vae.latent_dim
    far = replace(scenarios, means=np.full((2, width), 1e4), covariances=np.stack([np.eye(width)] * 2))
    return far, verdicts


def chosen_of(
    run: Run,
    psi: Psi,
    models: Models,
    references: ReferenceSet,
    scenarios: Scenarios,
    verdicts: Verdicts,
) -> Failures:
    examiner = Examiner(run.spec, models, references, scenarios)
    return choose_unreviewed(examiner, psi, run.store, verdicts, LocalCompute())


def test_they_are_clear_to_every_reference_model_and_drawn_by_seed(run_with_psi, tiny_models, references):
    run, psi = run_with_psi
    arguments = run, psi, tiny_models, references, *nowhere(run)
    chosen, again = chosen_of(*arguments), chosen_of(*arguments)
    assert 0 < len(chosen) <= 60  # tune_images of one accepted scenario
    np.testing.assert_array_equal(chosen.codes, again.codes)
    images = decode_codes(load_vae(run.spec, tiny_models.vae), chosen.codes)
    models = load_reference_models(run.spec, run.spec.review.reference, references, 10)
    sure = model_probabilities(models, images)[:, np.arange(len(chosen)), chosen.truth]
    assert (sure >= run.spec.identify.min_probability).all()
    assert (predict(load_classifier(run.spec, tiny_models.classifier, 10), images) != chosen.truth).all()
    assert (chosen.source < RIGHT).any()
    if len(chosen) > 5:
        assert chosen.source.tolist() != sorted(chosen.source.tolist())  # a part of them is a sample, too
    run.spec = run.spec.model_copy(update={"seed": 1})
    assert not np.array_equal(chosen_of(*arguments).codes, chosen.codes)


def test_all_that_are_clear_are_tuned_on_where_they_are_fewer_than_images_of_scenarios(
    run_with_psi, tiny_models, references
):
    run, psi = run_with_psi
    run.spec = run.spec.with_fields("correct", tune_images=10_000)
    chosen = chosen_of(run, psi, tiny_models, references, *nowhere(run))
    failures = subsample_psi(run.spec, psi, run.store)
    images = decode_codes(load_vae(run.spec, tiny_models.vae), failures.codes)
    models = load_reference_models(run.spec, run.spec.review.reference, references, 10)
    seen = model_probabilities(models, images).min(axis=0)
    sure = (seen.max(axis=1) >= run.spec.identify.min_probability) & (seen.argmax(axis=1) == failures.truth)
    answers = predict(load_classifier(run.spec, tiny_models.classifier, 10), images)
    clear = sure & (answers != failures.truth)
    assert 0 < clear.sum() < len(failures)
    np.testing.assert_array_equal(np.unique(chosen.codes, axis=0), np.unique(failures.codes[clear], axis=0))


def test_twice_as_many_are_examined_as_are_wanted(run_with_psi, tiny_models, references, monkeypatch):
    run, psi = run_with_psi
    run.spec = run.spec.with_fields("correct", tune_images=20).with_fields("identify", min_probability=0.0)
    examined = []

    def noting(compute, step, count, *rest, **options):
        examined.append(count)
        return map_in_tasks(compute, step, count, *rest, **options)

    monkeypatch.setattr("defuse_core.tuning_data.map_in_tasks", noting)
    chosen = chosen_of(run, psi, tiny_models, references, *nowhere(run))
    assert examined == [2 * 20] and len(chosen) <= 20
    monkeypatch.setattr("defuse_core.tuning_data.EXAMINED", 100)  # more of them are clear than are wanted
    run.spec = run.spec.with_fields("correct", tune_images=5)
    assert len(chosen_of(run, psi, tiny_models, references, *nowhere(run))) == 5


def test_none_is_tuned_on_that_is_in_the_region_of_a_rejected_component(
    run_with_psi, tiny_models, references
):
    run, psi = run_with_psi
    run.spec = run.spec.with_fields("correct", tune_images=10_000)
    failures, (scenarios, verdicts) = subsample_psi(run.spec, psi, run.store), nowhere(run)
    means = np.stack([np.median(failures.codes, axis=0), scenarios.means[1]])
    near = replace(scenarios, means=means, covariances=0.2 * scenarios.covariances)
    assert 0 < allowed(failures, near, verdicts).mean() < 0.95
    chosen = chosen_of(run, psi, tiny_models, references, near, verdicts)
    assert len(chosen) and allowed(chosen, near, verdicts).all()


def test_with_anchored_decoding_each_is_shown_at_its_own_training_image(tiny_models, monkeypatch):
    monkeypatch.setattr("defuse_core.tuning_data.CODES_AT_ONCE", 2)
    spec = recommended(vae={"decode": "anchored"})
    vae, train = load_vae(spec, tiny_models.vae), Identifier(spec, tiny_models).train
    source = np.array([7, 3, 7])
    codes = encode_images(vae, train.take(source))
    failures = sample_failures(codes, source, np.array([1, 2, 3]), np.array([4, 5, 6]))
    shown = decode_failures(spec, tiny_models, failures)
    np.testing.assert_allclose(
        shown, train.take(source).batch(), atol=1e-5
    )  # without noise: the image itself
    assert decode_failures(spec, tiny_models, failures.take(np.zeros(0, np.int64))).shape == (
        0,
        1,
        16,
        16,
    )


def test_with_anchored_decoding_the_training_images_are_listed_once_for_all_that_are_examined(
    tmp_path, tiny_models, references, monkeypatch
):
    spec = recommended(vae={"decode": "anchored"}, identify={"scale": 3.0}, correct={"tune_images": 20})
    run = Run.start(FolderStore(tmp_path), "a", spec)
    failures = Identifier(spec, tiny_models, references).shard(0).failures
    opened = []

    def noting(*data):
        opened.append(data)
        return open_splits(*data)

    monkeypatch.setattr("defuse_core.data.open_splits", noting)
    monkeypatch.setattr("defuse_core.tuning_data._draw_allowed", lambda *_, **__: failures)
    monkeypatch.setattr("defuse_core.tuning_data.CODES_AT_ONCE", 4)
    psi = Psi(np.array([len(failures)]), 0, 0, 0, 0.0, 0.0, fingerprint="")
    chosen = chosen_of(run, psi, tiny_models, references, *nowhere(run))
    assert len(opened) == 1 and len(failures) > 4 and 0 < len(chosen) <= 20
    images = decode_failures(spec, tiny_models, chosen)
    models = load_reference_models(spec, spec.review.reference, references, 10)
    sure = model_probabilities(models, images)[:, np.arange(len(chosen)), chosen.truth]
    assert (sure >= spec.identify.min_probability - 1e-4).all()
    assert (predict(load_classifier(spec, tiny_models.classifier, 10), images) != chosen.truth).all()


@pytest.fixture
def failures() -> Failures:
    """Codes of the training images 7, 3 and 7."""
    codes = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    return sample_failures(codes, np.array([7, 3, 7]), np.array([1, 2, 3]), np.array([4, 5, 6]))


def fixes_with(failures: Failures | None) -> Corrections:
    codes = np.zeros((2, 5, 4), np.float32)
    return Corrections(np.array([0, 1]), np.array([8, 9]), codes, codes, unreviewed=failures)


def test_unreviewed_failures_are_tuned_on_under_the_class_of_their_training_image(tiny_models, failures):
    spec = recommended()
    made = decode_scenario_images(spec, tiny_models, fixes_with(failures), None, progress=silent)
    assert made.d_f.labels.tolist() == [8] * 5 + [9] * 5 + [1, 2, 3] * 3 + [1]  # half of all
    shown = decode_codes(load_vae(spec, tiny_models.vae), failures.codes)
    np.testing.assert_allclose(made.d_f.batch()[10:13], shown, atol=1e-6)
    assert made.tune.labels.tolist() == made.held_out.labels.tolist() == [8] * 5 + [9] * 5
    without = decode_scenario_images(spec, tiny_models, fixes_with(None), None, progress=silent)
    assert without.d_f.labels.tolist() == without.tune.labels.tolist() == [8] * 5 + [9] * 5


def test_images_to_tune_on_and_held_out_images_are_decoded_from_codes_of_their_own(tiny_models):
    spec = recommended()
    tune, test = np.random.default_rng(0).normal(size=(2, 2, 3, 4)).astype(np.float32)
    fixes = Corrections(np.array([0, 1]), np.array([8, 9]), tune, test[:, :2])
    vae = load_vae(spec, tiny_models.vae)
    made = decode_scenario_images(spec, tiny_models, fixes, None, progress=silent)
    for images, codes in ((made.tune, tune), (made.held_out, test[:, :2])):
        np.testing.assert_allclose(images.batch(), decode_codes(vae, codes.reshape(-1, 4)), atol=1e-6)
        assert images.labels.tolist() == [8] * codes.shape[1] + [9] * codes.shape[1]


def test_few_unreviewed_failures_are_not_repeated_without_end(tiny_models, failures):
    one = fixes_with(failures.take(np.array([1])))
    made = decode_scenario_images(recommended(), tiny_models, one, None, progress=silent)
    assert made.d_f.labels.tolist() == [8] * 5 + [9] * 5 + [2] * 4
    nobody = fixes_with(failures.take(np.zeros(0, np.int64)))
    made = decode_scenario_images(recommended(), tiny_models, nobody, None, progress=silent)
    assert made.d_f.labels.tolist() == [8] * 5 + [9] * 5


def test_fewer_scenarios_are_tuned_on_with_the_first_failures_alone(tiny_models, failures):
    fixes = fixes_with(failures)
    few = replace(fixes, tune=fixes.tune[:, :1])
    made = decode_scenario_images(recommended(), tiny_models, few, None, progress=silent)
    assert made.d_f.labels.tolist() == [8, 9, 1, 2]


def test_the_baseline_is_tuned_on_the_reviewed_images_alone(tiny_models, failures):
    reviewed = Images(np.zeros((2, 1, 16, 16), np.float32), np.array([5, 6]))
    made = decode_scenario_images(recommended(), tiny_models, fixes_with(failures), reviewed, progress=silent)
    assert made.d_f.labels.tolist() == [5, 6]


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("correct", "tuned"), [({}, True), ({"unreviewed": False}, False), ({"filter": "none"}, False)]
)
def test_a_run_tunes_on_unreviewed_failures_only_where_they_are_screened_and_wanted(
    tmp_path, tiny_models, references, correct, tuned
):
    spec = recommended(judges={"count": 0}, correct={"lambdas": [1.0], "epochs": 1, **correct})
    run = trained_run(FolderStore(tmp_path), "a", spec, tiny_models, references)
    compute = LocalCompute()
    report = run_defuse(run, compute, ReferenceAnnotators(run, compute))
    codes = load_finished(run).found.fixes.unreviewed
    assert (codes is not None) == tuned
    assert report.scenarios.unreviewed_images == (len(codes) if tuned else 0)
    if tuned:
        assert 0 < len(codes) <= report.scenarios.accepted * run.spec.correct.tune_images
        page = run.store.read("report.html").decode()
        assert f'<b class="unbroken">{count_of(len(codes), "failing draw")}</b> that nobody' in page


def test_with_an_image_that_is_left_out_goes_its_track_unless_that_is_tuned_on(tiny_models, monkeypatch):
    spec = tiny()
    splits = open_splits(spec.data, spec.seed)
    train = replace(splits.train, tracks=np.arange(len(splits.train)) // 4)
    monkeypatch.setattr("defuse_core.tuning_data.reopen_splits", lambda *_: replace(splits, train=train))
    left_out, tuned = np.array([0, 5]), np.array([6])  # of the tracks 0 and 1, and 1
    found = load_clean_images(spec, tiny_models, left_out, tuned, progress=silent).train
    np.testing.assert_array_equal(found.pixels, np.delete(train.pixels, [0, 1, 2, 3, 5], axis=0))


def test_a_sample_of_the_training_images_follows_from_the_seed_and_has_its_share_of_each_class(
    tiny_models, monkeypatch
):
    spec, none = tiny(correct={"train_images": 100}), np.zeros(0, np.int64)
    splits = open_splits(spec.data, spec.seed)
    monkeypatch.setattr("defuse_core.tuning_data.reopen_splits", lambda *_: splits)
    one, other = (
        load_clean_images(each, tiny_models, none, none, progress=silent).train
        for each in (spec, spec.model_copy(update={"seed": 1}))
    )
    assert not np.array_equal(one.pixels, other.pixels)
    share = np.bincount(splits.train.labels, minlength=10) * 100 / len(splits.train)
    for sample in (one, other):
        assert np.abs(np.bincount(sample.labels, minlength=10) - share).max() < 1
