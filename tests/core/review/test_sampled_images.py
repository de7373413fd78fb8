"""Images drawn for review and for tuning: whose answers they show, how wide they are, none twice."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from defuse_core.artifacts import NONE_OF_THE_ABOVE, Corrections, Gallery, Scenarios
from defuse_core.distill.draws import Draws, distances_from
from defuse_core.local import LocalCompute
from defuse_core.models import decode_codes, load_classifier, load_vae, predict
from defuse_core.protocols import silent
from defuse_core.review.sample import Examiner, filter_corrections, sample_corrections, sample_gallery
from defuse_core.review.verdicts import decide_verdicts
from defuse_core.training.reference_models import load_reference_models, model_probabilities, votes_of_models
from tests.conftest import recommended
from tests.sample_components import review_section, sample_scenarios


@pytest.fixture(scope="module")
def scenarios() -> Scenarios:
    return sample_scenarios(
        np.array([0.7, 0.3]),
        np.array([[0.0] * 4, [1.0] * 4]),
        np.stack([np.eye(4)] * 2),
        np.array([0.7, 0.3]),
        100,
        True,
        5,
        -1.0,
    )


@pytest.fixture(scope="module")
def gallery(tiny_spec, tiny_models, scenarios) -> Gallery:
    return sample_gallery(tiny_spec, tiny_models, scenarios, progress=silent)


def test_the_gallery_shows_the_classifiers_own_answers(gallery, tiny_spec, tiny_models):
    assert gallery.images.shape == (2, 5, 1, 16, 16)
    classifier = load_classifier(tiny_spec, tiny_models.classifier, 10)
    np.testing.assert_array_equal(
        predict(classifier, gallery.images.reshape(-1, 1, 16, 16)), gallery.predicted.ravel()
    )


def test_a_component_is_drawn_alike_whichever_others_there_are(gallery, tiny_spec, tiny_models, scenarios):
    first = sample_scenarios(
        **{
            **vars(scenarios),
            "weights": scenarios.weights[:1],
            "means": scenarios.means[:1],
            "covariances": scenarios.covariances[:1],
        }
    )
    alone = sample_gallery(tiny_spec, tiny_models, first, progress=silent)
    np.testing.assert_array_equal(alone.codes[0], gallery.codes[0])


def test_images_to_tune_on_to_test_on_and_to_review_are_all_different(gallery, tiny_spec, scenarios):
    certain = np.full((3, 2, 5, 10), 0.0, np.float32)
    certain[..., 9] = 1.0
    verdicts = decide_verdicts(review_section(0.0), gallery, votes_of_models(certain, 0.5))
    fixes = sample_corrections(tiny_spec, scenarios, verdicts)
    assert len(fixes.scenario) == len(verdicts.accepted) > 0
    every = np.concatenate([fixes.tune[0], fixes.test[0], gallery.codes[int(fixes.scenario[0])]])
    assert len(np.unique(every, axis=0)) == len(every)


def test_a_label_is_a_class_of_which_every_reference_model_is_sure(tiny_models, scenarios, references):
    spec = recommended(identify={"min_probability": 0.5})
    codes = np.random.default_rng(0).normal(scale=2, size=(200, 4)).astype(np.float32)
    _, labels = Examiner(spec, tiny_models, references, scenarios).unanimous(Draws(codes))
    models = load_reference_models(spec, spec.review.reference, references, 10)
    seen = model_probabilities(models, decode_codes(load_vae(spec, tiny_models.vae), codes))  # (W, n, C)
    unanimous = (seen >= 0.5).all(axis=0)
    np.testing.assert_array_equal(
        labels, np.where(unanimous.any(axis=1), unanimous.argmax(axis=1), NONE_OF_THE_ABOVE)
    )
    assert ((seen.mean(axis=0).max(axis=1) >= 0.5) & (labels == NONE_OF_THE_ABOVE)).any()
    assert (labels != NONE_OF_THE_ABOVE).any()


def test_an_examiner_travels_without_the_networks_that_it_has_loaded(tiny_models, scenarios, references):
    examiner, draws = (
        Examiner(recommended(), tiny_models, references, scenarios),
        Draws(np.zeros((3, 4), "f")),
    )
    found = examiner.unanimous(draws)
    again = pickle.loads(pickle.dumps(examiner))
    assert vars(again).keys() == {"spec", "models", "references", "scenarios"} < vars(examiner).keys()
    np.testing.assert_array_equal(again.unanimous(draws), found)


def test_images_to_tune_on_show_the_scenarios_label_to_reference_models(tiny_models, scenarios, references):
    spec = recommended(review={"tau": 1.0})
    examiner = Examiner(spec, tiny_models, references, scenarios)
    seen = [examiner.unanimous(Draws(scenarios.means[[j]].astype(np.float32)))[1][0] for j in range(2)]
    labels = np.array(seen, np.int64)
    rng = np.random.default_rng(0)
    tune, test = rng.normal(size=(2, 2, 24, 4)).astype(np.float32)
    drawn = Corrections(np.arange(2), labels, tune, test)
    kept = filter_corrections(examiner, drawn, LocalCompute())
    for row, label in enumerate(labels):
        agrees = examiner.unanimous(Draws(drawn.tune[row]))[1] == label
        assert kept.kept[row] == pytest.approx(agrees.mean())
        if agrees.any():
            shown = examiner.unanimous(Draws(kept.tune[row]))[1]
            assert (shown == label).mean() > 0.9  # other batches may round otherwise
    np.testing.assert_array_equal(kept.test, drawn.test)


def test_images_to_tune_on_are_wider_than_those_to_test_on(gallery, scenarios):
    certain = np.full((3, 2, 5, 10), 0.0, np.float32)
    certain[..., 9] = 1.0
    verdicts = decide_verdicts(review_section(0.0), gallery, votes_of_models(certain, 0.5))
    spec = recommended(review={"tau": 0.1}, correct={"widen": 16.0, "tune_images": 400, "test_images": 400})
    fixes = sample_corrections(spec, scenarios, verdicts)
    tune, test = (
        (distances_from(scenarios, int(fixes.scenario[0]), codes[0]) ** 2).mean()
        for codes in (fixes.tune, fixes.test)
    )
    assert tune / test == pytest.approx(16, rel=0.2)


def test_a_label_that_no_reference_model_sees_is_the_annotators_and_keeps_images_as_wide_as_the_reviewed_ones(
    tiny_models, scenarios, references
):
    spec = recommended(identify={"min_probability": 1.0}, review={"tau": 1.0})
    tune = np.random.default_rng(0).normal(size=(1, 24, 4)).astype(np.float32)
    drawn = Corrections(np.array([0]), np.array([3]), tune, tune)
    examiner = Examiner(spec, tiny_models, references, scenarios)
    kept = filter_corrections(examiner, drawn, LocalCompute())
    assert kept.kept.tolist() == [0.0]
    assert (distances_from(scenarios, 0, kept.tune[0]) ** 2).mean() < 2 * kept.tune.shape[2]
