"""The watch: distances from scenarios, failure probabilities, and which scenario explains a flagged answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis as reference

from defuse_core.config import ServeSection
from defuse_core.models import encode_images, load_classifier, load_vae, predict_logits
from defuse_core.runs import Run
from defuse_core.watch.scenario_regions import mahalanobis
from services.serving.api import ModelInfo
from services.serving.candidate import prepare_candidate
from services.serving.model import LoadedModel, Prediction, ScenarioDistances
from services.serving.registry_state import EMPTY


def test_distances_are_mahalanobis_distances_from_each_component(candidate, good_spec, pixels):
    vae = load_vae(good_spec, candidate.vae)
    images = torch.from_numpy(pixels[:7])
    with torch.inference_mode():
        codes = vae.encode(images)[0].numpy()
        found = ScenarioDistances(vae, candidate.means, candidate.covariances)(images).numpy()
    inverses = [np.linalg.inv(c) for c in candidate.covariances]
    expected = [[reference(c, m, i) for m, i in zip(candidate.means, inverses, strict=True)] for c in codes]
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    np.testing.assert_allclose(
        mahalanobis(codes, candidate.means, candidate.covariances), expected, rtol=1e-6
    )


@pytest.mark.parametrize("share", [0.01, 0.05])
def test_the_configured_share_of_training_images_is_inside_a_scenario(candidate, splits, share):
    served = LoadedModel(candidate, ServeSection(watch_share=share))
    inside = served.predict(splits.train.batch()).inside
    np.testing.assert_allclose(inside.mean(axis=0), share, atol=0.003)


def test_nearly_all_held_out_images_of_a_scenario_are_inside_it(candidate):
    recall = [np.interp(0.02, candidate.levels, recall) for recall in candidate.recall]
    assert min(recall) > 0.9
    half = replace(candidate, recall=candidate.recall / 2)
    served = LoadedModel(half, ServeSection(watch_share=0.02))
    shown = [row.watched_recall for row in ModelInfo.of(served, EMPTY, None, None).scenarios]
    np.testing.assert_allclose(shown, np.array(recall) / 2)


@pytest.fixture(scope="module")
def swapped(planted):
    """The candidate whose classifier confuses 0 and 1, with certainty."""
    return prepare_candidate(Run.open(planted, "swapped"))[1]


def test_served_failure_probabilities_are_those_of_the_detector(candidate, good_spec, pixels):
    served = LoadedModel(candidate, ServeSection())
    detector, watch = served.detector, candidate.failures
    assert detector is not None and detector.uses_codes
    logits = predict_logits(load_classifier(good_spec, candidate.classifier, 10), pixels)
    codes = encode_images(load_vae(good_spec, candidate.vae), pixels)
    far = mahalanobis(codes, watch.means, watch.covariances)[np.arange(len(codes)), logits.argmax(axis=1)]
    output = served.predict(pixels)
    np.testing.assert_allclose(output.failure, detector.probability(logits, far), atol=2e-4)
    np.testing.assert_array_equal(output.flagged, output.failure >= served.watch_figures.threshold)


def test_most_wrong_answers_on_test_images_are_flagged_and_few_right_ones(swapped, splits):
    output = LoadedModel(swapped, ServeSection()).predict(splits.test.batch())
    wrong = output.probabilities.argmax(axis=1) != splits.test.labels
    assert output.flagged[wrong].mean() > 0.6 and output.flagged[~wrong].mean() < 0.1
    figures = swapped.watch_figures(ServeSection())
    assert figures.test.recall.value == pytest.approx(output.flagged[wrong].mean(), abs=0.02)
    assert figures.test.auroc.low > 0.6


def test_without_the_watch_the_failure_probability_follows_from_the_logits(candidate, pixels):
    served = LoadedModel(candidate, ServeSection(watch=False))
    assert served.detector is not None and not served.detector.uses_codes and served.distances is None
    answer = served.predictions(served.predict(pixels[:1]))[0]
    assert answer.scenarios is None and 0 <= answer.failure_probability <= 1


def test_a_set_threshold_flags_more_or_fewer(candidate, pixels):
    shares = [
        LoadedModel(candidate, ServeSection(failure_threshold=at)).predict(pixels).flagged.mean()
        for at in (0.01, 0.5)
    ]
    assert shares[0] > shares[1]


def test_a_version_that_cannot_tell_gives_null_and_the_reason(planted, candidate, pixels):
    broken = prepare_candidate(Run.open(planted, "broken"))[1]
    mute = replace(candidate, failures=replace(broken.failures))
    served = LoadedModel(mute, ServeSection())
    answer = served.predictions(served.predict(pixels[:1]))[0]
    assert (answer.failure_probability, answer.flagged, answer.explanation) == (None, None, None)
    assert served.watch_figures.method is None and "not finite" in served.watch_figures.verdict


def matches_for(candidate, answer):
    """What an image inside scenario 0 (3 read as 8) is told for an answer, with a flag."""
    served = LoadedModel(candidate, ServeSection())
    count = len(candidate.scenario)
    output = served.predict(np.zeros((1, 1, 16, 16), np.float32))
    inside = np.arange(count)[None] == 0
    given = replace(
        output,
        probabilities=np.eye(10, dtype=np.float32)[[answer]],
        inside=inside,
        failure=np.array([0.9]),
        flagged=np.array([True]),
    )
    return served.predictions(given)[0]


@pytest.mark.parametrize("answer", [3, 8])
def test_a_scenario_explains_its_own_confusion(candidate, answer):
    found = matches_for(candidate, answer)
    assert found.explanation == found.scenarios[0].name == "3 read as 8 (scenario 0)"
    assert found.scenarios[0].explains


def test_any_other_answer_is_only_in_the_region_of_a_scenario(candidate):
    told = Prediction.model_fields["explanation"].description or ""
    assert "the name of the nearest that explains the answer, else `in the region of scenario 4`" in told
    found = matches_for(candidate, 5)
    assert found.explanation == found.scenarios[0].name == "in the region of scenario 0"
    assert not found.scenarios[0].explains


def test_the_nearest_scenario_that_explains_the_answer_explains_the_alarm(candidate):
    other = replace(candidate, labels=np.array([5, 8]), most_common_error=np.array([6, 3]))
    served = LoadedModel(other, ServeSection())
    given = replace(
        served.predict(np.zeros((1, 1, 16, 16), np.float32)),
        probabilities=np.eye(10, dtype=np.float32)[[8]],
        distances=np.array([[0.0, 1e6]], np.float32),
        inside=np.ones((1, 2), np.bool_),
        failure=np.array([0.9]),
        flagged=np.array([True]),
    )
    found = served.predictions(given)[0]
    assert [match.explains for match in found.scenarios or []] == [False, True]  # the nearest first
    assert found.explanation == "8 read as 3 (scenario 1)"


def test_of_two_scenarios_nearer_than_all_training_images_the_nearer_one_is_the_first(candidate):
    served = LoadedModel(candidate, ServeSection())
    output = replace(
        served.predict(np.zeros((1, 1, 16, 16), np.float32)),
        distances=np.array([[0.02, 0.01]], np.float32),
        inside=np.ones((1, 2), np.bool_),
    )
    matches = served.predictions(output)[0].scenarios or []
    assert [(match.scenario, match.nearer_share) for match in matches] == [(1, 0.0), (0, 0.0)]


def test_a_scenario_without_a_wrong_answer_is_not_called_read_as_itself(candidate):
    same = replace(candidate, most_common_error=candidate.labels)
    assert same.scenario_names()[0] == "3 misread (scenario 0)"
