import dataclasses
import io
import re

import numpy as np
import pytest
from PIL import Image

from defuse_core.config import changed_field
from defuse_core.data import open_splits
from defuse_core.errors import VaeHealthError
from defuse_core.evaluation.health import (
    _tile,
    expect_healthy,
    health_after_training,
    health_figures,
    log_health,
    measure_health,
    measure_perturbed,
    perturbed_answers,
    perturbed_images,
    probe_images,
    reconstruction_errors,
    reconstruction_strip,
)
from defuse_core.local import LocalCompute
from defuse_core.models import decode_codes, encode_images, load_classifier, load_vae, predict
from defuse_core.pipeline import run_defuse
from defuse_core.protocols import silent
from defuse_core.runs import ReachedStep, Run
from defuse_core.seeds import generator
from defuse_core.store import FolderStore
from defuse_core.train import train
from defuse_core.training.reference_models import ReferenceAnnotators
from tests.conftest import recommended, tiny
from tests.own_classifiers import Standardising

ALIVE = np.ones(4)
ANCHORED = recommended(vae={"decode": "anchored"})
WILD = ANCHORED.with_fields("identify", scale=300.0)  # noise that leaves nothing of a picture


def health(kept: int, kl=ALIVE):
    """Of 100 images that the classifier gets right, `kept` reconstructions are right too."""
    labels = np.zeros(100, np.int64)
    reconstructed = np.where(np.arange(100) < kept, 0, 1)
    return measure_health(labels, labels, reconstructed, np.asarray(kl))


@pytest.mark.parametrize(
    ("kept", "kl", "verdict"),
    [
        (100, ALIVE, "fit"),
        (90, ALIVE, "fit"),
        (89, ALIVE, "poor"),
        (50, ALIVE, "poor"),
        (49, ALIVE, "blind"),
        (100, [1, 0.1, 0.1, 0.09], "fit"),
        (100, [1, 1, 0.09, 0.09], "poor"),
        (100, [0, 0, 0, 0.09], "blind"),
    ],
)
def test_the_verdict_follows_the_documented_thresholds(kept, kl, verdict):
    assert health(kept, kl).verdict == verdict


@pytest.mark.parametrize(
    ("counts", "kept", "verdict", "told"),
    [
        (
            [980, 20],
            [980, 0],
            "poor",
            "50.0 % of its right answers on reconstructions on average over the classes, ",
        ),
        (
            [980, 20],
            [980, 10],
            "poor",
            "75.0 % of its right answers on reconstructions on average over the classes, ",
        ),
        ([500, 500], [480, 0], "blind", "48.0 % of its right answers on reconstructions (fit"),
        ([980, 20], [980, 19], "fit", "99.9 % of its right answers on reconstructions (fit"),
        ([980, 1], [980, 0], "fit", "99.9 % of its right answers on reconstructions (fit"),
        ([100] * 10, [80] * 5 + [100] * 5, "fit", "90.0 % of its right answers on reconstructions (fit"),
    ],
)
def test_a_vae_that_erases_what_shows_a_rare_class_is_not_fit(counts, kept, verdict, told):
    labels = np.repeat(np.arange(len(counts)), counts)
    rank = np.concatenate([np.arange(count) for count in counts])
    reconstructed = np.where(rank < np.repeat(kept, counts), labels, 0 if len(counts) == 2 else 10)
    reconstructed[(labels == 0) & (reconstructed == 0) & (rank >= kept[0])] = 1
    found = measure_health(labels, labels, reconstructed, ALIVE)
    figures = health_figures(found, ("healthy", "sick"))
    assert found.verdict == verdict and told in figures
    assert ("least of sick (fit: at least 90 %)" in figures) is (verdict == "poor")
    wrong = measure_health(
        *(np.append(each, n) for each, n in ((labels, 0), (labels, 1), (reconstructed, 1))), ALIVE
    )
    assert wrong.verdict == verdict  # an image that the classifier gets wrong changes nothing


def test_an_image_that_the_classifier_gets_wrong_says_nothing_of_the_vae():
    labels, answers = np.zeros(10, np.int64), np.array([0] * 4 + [1] * 6)
    found = measure_health(labels, answers, answers, ALIVE)
    assert (found.originals_right, found.reconstructions_right, found.kept_right) == (0.4, 0.4, 1.0)
    assert found.verdict == "fit"


def test_where_the_classifier_gets_nothing_right_the_vae_is_blind():
    labels, answers = np.zeros(10, np.int64), np.ones(10, np.int64)
    found = measure_health(labels, answers, labels, ALIVE)
    assert (found.kept_right, found.verdict) == (0.0, "blind")


def test_the_log_warns_of_a_vae_that_is_not_fit(caplog):
    labels = np.zeros(200, np.int64)
    original, moved = np.where(np.arange(200) < 150, 0, 1), np.where(np.arange(200) < 140, 0, 1)
    found = measure_health(labels, original, moved, np.array([1, 1, 1, 0]))
    for kind, level in ((found, "INFO"), (dataclasses.replace(found, verdict="poor"), "WARNING")):
        caplog.clear()
        with caplog.at_level("INFO", "defuse"):
            log_health(kind, ("cat", "dog"))
        assert [record.levelname for record in caplog.records] == [level]
    assert (
        "poor: the classifier gets 75.0 % of 200 training images right and keeps 93.3 % of its right answers on "
        "reconstructions (fit: at least 90 %); 1 of 4 latent dimensions collapsed; the most frequent answer on "
        "reconstructions is cat (70 %)"
    ) in caplog.text


def test_images_to_measure_on_are_spread_over_all_of_them(tiny_spec, monkeypatch):
    monkeypatch.setattr("defuse_core.evaluation.health.PROBE_IMAGES", 50)
    train = open_splits(tiny_spec.data, tiny_spec.seed).train
    in_order = train.take(np.argsort(train.labels, kind="stable"))
    assert len(probe_images(in_order)) == 50
    assert np.unique(probe_images(in_order).labels).tolist() == list(range(10))


def test_errors_and_answers_are_of_each_reconstruction(tiny_spec, tiny_models, monkeypatch):
    monkeypatch.setattr("defuse_core.evaluation.health.PROBE_BATCH", 7)
    images = open_splits(tiny_spec.data, tiny_spec.seed).train.take(slice(0, 20))
    vae, classifier = (
        load_vae(tiny_spec, tiny_models.vae),
        load_classifier(tiny_spec, tiny_models.classifier, 10),
    )
    decoded = decode_codes(vae, encode_images(vae, images))
    errors, answers = reconstruction_errors(classifier, vae, images)
    expected = [np.mean((one - other) ** 2) for one, other in zip(decoded, images.batch(), strict=True)]
    np.testing.assert_allclose(errors, expected, rtol=1e-4)
    np.testing.assert_array_equal(answers, predict(classifier, decoded))


def test_each_image_is_perturbed_by_noise_of_its_own(tiny_models, monkeypatch):
    monkeypatch.setattr("defuse_core.evaluation.health.PROBE_BATCH", 2)
    same = open_splits(ANCHORED.data, ANCHORED.seed).train.take(np.zeros(4, np.int64))
    seen = []

    def answer(images):
        seen.append(images)
        return np.arange(len(images)) + 10 * len(seen)

    originals, perturbed = perturbed_answers(ANCHORED, load_vae(ANCHORED, tiny_models.vae), same, answer)
    assert (originals.tolist(), perturbed.tolist()) == ([10, 11, 30, 31], [20, 21, 40, 41])
    shown = np.concatenate([*seen[1::2], same.batch(slice(0, 1))])
    assert len(np.unique(shown.reshape(5, -1), axis=0)) == 5
    np.testing.assert_array_equal(np.concatenate(seen[::2]), same.batch())


def test_before_reference_models_are_asked_an_anchored_vae_is_blind_only_where_it_collapsed(tiny_models):
    images = open_splits(WILD.data, WILD.seed).train
    vae, classifier = load_vae(WILD, tiny_models.vae), load_classifier(WILD, tiny_models.classifier, 10)
    arguments = WILD, classifier, vae, images, images.labels
    lost = health_after_training(*arguments, ALIVE)
    assert (lost.verdict, lost.anchored) == ("poor", True) and lost.kept_right < 0.5
    assert health_after_training(*arguments, np.zeros(4)).verdict == "blind"
    plain = health_after_training(tiny(), classifier, vae, images, images.labels, ALIVE)
    assert (plain.kept_right, plain.verdict, plain.anchored) == (1.0, "fit", False)


def test_the_most_frequent_answer_on_reconstructions_is_measured():
    found = health(30)
    assert (found.most_common_answer, found.most_common_share) == (1, 0.7)


def test_reference_models_that_return_nan_answer_no_picture(tiny_models, monkeypatch):
    module = "defuse_core.evaluation.health"
    monkeypatch.setattr(f"{module}.load_reference_models", lambda *_: [Standardising()])
    monkeypatch.setattr(f"{module}.perturbed_images", lambda _spec, _vae, images, _rng: 0 * images.batch())
    found = measure_perturbed(ANCHORED, tiny_models, None, progress=silent)
    assert (found.reconstructions_right, found.most_common_share) == (0, 0)
    log_health(found, tiny_models.classes)


def test_training_measures_health_and_stores_originals_beside_reconstructions(tmp_path, tiny_spec, caplog):
    store = FolderStore(tmp_path)
    models = train(tiny(vae={"epochs": 1}, classifier={"epochs": 8}), store, progress=silent)
    assert models.health.images == 300
    assert models.health.reconstructions_right == pytest.approx(1 - models.reconstruction_flips)
    assert models.health.collapsed == int((models.kl_per_dimension < 0.1).sum())
    assert f"the β-VAE is {models.health.verdict}: the classifier gets" in caplog.text
    strip = Image.open(io.BytesIO(store.read("reconstructions.png")))
    assert strip.size == (16 * 64, 2 * 64)


def test_the_upper_row_of_the_strip_is_the_originals(tiny_spec, tiny_models):
    images = open_splits(tiny_spec.data, tiny_spec.seed).train.take(slice(0, 16))
    strip = reconstruction_strip(tiny_spec, load_vae(tiny_spec, tiny_models.vae), images)
    pixels = np.asarray(Image.open(io.BytesIO(strip)).convert("L"))[::4, ::4]
    expected = np.concatenate([image[0] for image in images.batch(slice(0, 16))], axis=1)
    np.testing.assert_allclose(pixels[:16] / 255, expected, atol=0.5 / 255 + 1e-6)
    assert not np.allclose(pixels[16:] / 255, expected, atol=0.1)


def test_an_anchored_strip_has_the_perturbed_originals_in_a_third_row(tiny_models, monkeypatch):
    monkeypatch.setattr("defuse_core.evaluation.health.STRIP_SIDE", 8)  # less than the images have
    images = open_splits(ANCHORED.data, ANCHORED.seed).train.take(slice(0, 61))
    vae, shown = load_vae(ANCHORED, tiny_models.vae), images.take(np.arange(0, 61, 4))
    strip = reconstruction_strip(ANCHORED, vae, images)
    pixels = np.asarray(Image.open(io.BytesIO(strip)).convert("L"))
    assert pixels.shape == (3 * 16, 16 * 16)
    perturbed = perturbed_images(ANCHORED, vae, shown, generator(ANCHORED.seed, "health", "strip"))
    for row, expected in ((0, shown.batch()), (2, perturbed)):
        beside = np.concatenate([image[0] for image in expected], axis=1)
        np.testing.assert_allclose(pixels[16 * row : 16 * row + 16] / 255, beside, atol=0.6 / 255)


def test_pictures_of_colours_stand_in_rows_and_columns():
    grid = np.random.default_rng(0).integers(0, 256, (2, 3, 3, 4, 5)).astype(np.float32) / 255
    tiled = _tile(grid)
    assert tiled.shape == (2 * 4, 3 * 5, 3)
    for row, column in np.ndindex(2, 3):
        picture = tiled[4 * row : 4 * row + 4, 5 * column : 5 * column + 5]
        np.testing.assert_array_equal(picture, np.round(255 * grid[row, column]).transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("verdict", "accept", "stops"),
    [
        ("blind", "poor", True),
        ("blind", "blind", False),
        ("poor", "fit", True),
        ("poor", "poor", False),
        ("fit", "fit", False),
    ],
)
def test_a_verdict_worse_than_accept_stops(verdict, accept, stops, tiny_models):
    models = dataclasses.replace(tiny_models, health=dataclasses.replace(tiny_models.health, verdict=verdict))
    spec = tiny(vae={"accept": accept})
    if stops:
        with pytest.raises(VaeHealthError, match=f"the β-VAE is {verdict}.* vae.accept: {verdict} goes on"):
            expect_healthy(spec, models)
    else:
        expect_healthy(spec, models)


@pytest.mark.parametrize(
    ("kl", "vae", "remedy"),
    [
        ([0, 0, 0, 0], {}, "lower vae.beta \\(now 0.3\\)"),
        ([0, 0, 1, 1], {}, "lower vae.beta \\(now 0.3\\)"),
        ([0, 1, 1, 1], {}, "set vae.architecture"),
        (ALIVE, {}, "set vae.architecture: convolutional, and choose another"),
        (ALIVE, {"architecture": "convolutional"}, "raise vae.epochs or vae.latent_dim, and choose another"),
    ],
)
def test_the_error_says_what_to_change(kl, vae, remedy, tiny_models):
    models = dataclasses.replace(tiny_models, health=health(10, kl))
    with pytest.raises(VaeHealthError, match=remedy):
        expect_healthy(tiny(vae=vae), models)
    guessing = dataclasses.replace(models, class_accuracy={"validation": np.full(10, 0.11)})
    with pytest.raises(VaeHealthError, match="; the classifier is hardly better than guessing") as raised:
        expect_healthy(tiny(vae=vae), guessing)
    assert not re.search(remedy, str(raised.value))


@pytest.mark.parametrize("kl", [ALIVE, np.zeros(4)])
def test_the_beta_vae_is_not_blamed_where_the_classifier_gets_nothing_right(kl, tiny_models):
    answers = np.zeros(100, np.int64)
    never = measure_health(answers + 1, answers, answers, kl)
    with pytest.raises(VaeHealthError) as raised:
        expect_healthy(tiny(), dataclasses.replace(tiny_models, health=never))
    assert "; the classifier gets no training image right; check its weights, the input" in str(raised.value)
    assert "vae.beta" not in str(raised.value) and "vae.architecture" not in str(raised.value)


@pytest.mark.parametrize(
    ("judged_by", "kl", "told", "remedy"),
    [
        ("reference models", ALIVE, "they are worse; train better ones", "they are worse; train better ones"),
        ("reference models", ALIVE, None, "lower identify.scale"),
        ("reference models", [0, 0, 1, 1], "they are worse", "lower vae.beta"),
        ("classifier", ALIVE, "they are worse", "lower identify.scale"),
    ],
)
def test_reference_models_that_are_worse_than_the_classifier_are_blamed_for_their_verdict(
    judged_by, kl, told, remedy, tiny_models
):
    blind = dataclasses.replace(health(10, kl), anchored=True, judged_by=judged_by)
    with pytest.raises(VaeHealthError) as raised:
        expect_healthy(ANCHORED, dataclasses.replace(tiny_models, health=blind), told)
    assert f"in the run shows some); {remedy}" in str(raised.value)
    assert str(raised.value).endswith("; vae.accept: blind goes on all the same")


def test_a_blind_vae_stops_the_run_before_identification_until_it_is_accepted(tmp_path):
    blind = {"vae": {"epochs": 1}, "classifier": {"epochs": 1}}

    def whole_run(spec):
        run = Run.start(FolderStore(tmp_path), "a", spec, until="identify")
        compute = LocalCompute()
        return run_defuse(run, compute, ReferenceAnnotators(run, compute))

    with pytest.raises(VaeHealthError, match="the β-VAE is blind"):
        whole_run(tiny(**blind))
    assert not FolderStore(tmp_path).list("a/psi")
    with pytest.raises(ReachedStep):
        whole_run(tiny(vae={**blind["vae"], "accept": "blind"}, classifier=blind["classifier"]))
    assert FolderStore(tmp_path).list("a/psi")


def test_accepting_another_verdict_changes_no_result():
    assert changed_field(tiny(), tiny(vae={"accept": "blind"})) is None
