import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from defuse_core.artifacts import (
    Anchors,
    ComponentFailures,
    Corrections,
    Gallery,
    Health,
    Models,
    Psi,
    ReferenceSet,
    Scenarios,
    Sweep,
    Verdicts,
)
from defuse_core.codec import encode
from defuse_core.config import changed_field
from defuse_core.data import Images, open_splits
from defuse_core.distill.draws import (
    FAILURES_KEPT,
    IMAGES_KEPT,
    component_failures,
    draw_codes,
    failure_rows,
    smoothed,
)
from defuse_core.errors import VaeHealthError
from defuse_core.evaluation.controls import Controls
from defuse_core.evaluation.evidence import Evidence, gather_evidence
from defuse_core.evaluation.health import expect_healthy, measure_perturbed, with_measured_health
from defuse_core.export.suite import save_suite
from defuse_core.identify import Identifier, finished_shards, shard_fingerprint
from defuse_core.intervals import effective_number, share_with_bounds
from defuse_core.local import LocalCompute
from defuse_core.models import Decoder, StoredVae, decode_codes, encode_images, load_vae, predict
from defuse_core.pipeline import _controls, _scenarios, load_finished, run_defuse
from defuse_core.protocols import silent
from defuse_core.review.sample import sample_corrections, with_used_anchors
from defuse_core.runs import PLAIN_NAMES, Run
from defuse_core.seeds import generator
from defuse_core.store import FolderStore
from defuse_core.training.reference_models import ReferenceAnnotators, mean_probabilities, sees_class
from defuse_core.tuning_data import held_out_images, load_fine_tuning_data, tuning_images
from tests.conftest import fine_tuning_data, recommended, tiny, trained_run
from tests.sample_components import sample_failures, sample_scenarios

ANCHORED = {"decode": "anchored"}
SPEC = recommended(vae=ANCHORED, identify={"scale": 3.0}, judges={"count": 1, "epochs": 3})


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_models: Models,
    references: ReferenceSet,
    no_figures_in_module: None,
) -> Run:
    """A run to its end with anchored decoding; its models are those of the plain one."""
    run = trained_run(FolderStore(tmp_path_factory.mktemp("anchored")), "run", SPEC, tiny_models, references)
    compute = LocalCompute()
    run_defuse(run, compute, ReferenceAnnotators(run, compute))
    return run


def one_component(images: int = 8, width: int = 3) -> Scenarios:
    """One component around 5 with 40 failures of `images` images, each of which is grey of its own shade."""
    rng = generator(0, "test", images)
    codes = rng.normal(5, 2, (1, 40, width)).astype(np.float32)
    pixels = np.broadcast_to(np.arange(images, dtype=np.uint8)[:, None, None, None], (images, 1, 4, 4))
    failures = ComponentFailures(
        codes,
        rng.integers(images, size=(1, 40)),
        Anchors(pixels.copy(), 100 + np.arange(images), np.arange(images) % 2 == 1),
    )
    one = np.ones(1)
    covariance = np.cov(codes[0].T)[None]
    return sample_scenarios(
        one, codes.mean(axis=1).astype(float), covariance, one, 40, True, 1, 0.0, failures=failures
    )


def test_an_anchored_decoding_without_noise_is_the_image_itself(tiny_spec, tiny_models):
    vae = load_vae(tiny_spec, tiny_models.vae)
    images = Images(np.random.default_rng(0).random((9, 1, 16, 16), np.float32), np.zeros(9, np.int64))
    shown = Decoder(vae, images, batch_size=4).decode(encode_images(vae, images), np.arange(9))
    np.testing.assert_allclose(shown, images.pixels, atol=1e-5)


def test_an_anchored_decoding_moves_its_image_as_the_plain_decoding_moves(tiny_spec, tiny_models):
    vae, rng = load_vae(tiny_spec, tiny_models.vae), np.random.default_rng(0)
    images = Images(rng.random((9, 1, 16, 16), np.float32), np.zeros(9, np.int64))
    mu, anchors = encode_images(vae, images), rng.integers(9, size=20)
    codes = mu[anchors] + rng.normal(size=(20, 4)).astype(np.float32)
    moved = decode_codes(vae, codes) - decode_codes(vae, mu)[anchors]
    assert np.abs(moved).max() > 0.1
    shown = Decoder(vae, images).decode(codes, anchors)
    np.testing.assert_allclose(shown, np.clip(images.pixels[anchors] + moved, 0, 1), atol=1e-5)


def test_plain_decoding_is_that_of_the_vae_whatever_the_anchors(tiny_spec, tiny_models):
    vae = load_vae(tiny_spec, tiny_models.vae)
    codes = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    np.testing.assert_array_equal(Decoder(vae).decode(codes, np.arange(5)), decode_codes(vae, codes))


def test_anchored_decoding_without_an_image_for_each_code_is_an_error(tiny_spec, tiny_models):
    vae = load_vae(tiny_spec, tiny_models.vae)
    decoder = Decoder(vae, Images(np.zeros((2, 1, 16, 16), np.float32), np.zeros(2, np.int64)))
    with pytest.raises(ValueError, match="needs the image of each code"):
        decoder.decode(np.zeros((2, 4), np.float32))


def test_draws_at_a_small_tau_are_failures_at_their_own_images_and_at_tau_1_they_have_the_components_moments():
    scenarios = one_component()
    rows = np.arange(40)
    normal = generator(0, "test").standard_normal((40_000, 3))
    near = smoothed(scenarios, 0, rows, 1e-8, normal[:40], truncated=False)
    np.testing.assert_allclose(near.codes, scenarios.failures.codes[0], atol=1e-2)
    np.testing.assert_array_equal(near.anchors, scenarios.failures.anchor[0])
    for tau in (0.3, 1.0):
        wide = smoothed(scenarios, 0, np.resize(rows, 40_000), tau, normal, truncated=False)
        np.testing.assert_allclose(wide.codes.mean(axis=0), scenarios.means[0], atol=0.1)
        np.testing.assert_allclose(np.cov(wide.codes.T), scenarios.covariances[0], atol=0.3)


def test_wide_draws_are_around_their_failures_as_well():
    scenarios = one_component()
    rows = failure_rows(scenarios.failures, 0, 4000, generator(0, "test"), held_out=False)
    # noise as wide as the failures
    wide = draw_codes(tiny(review={"tau": 0.01}), scenarios, 0, 4000, generator(0, "test"), factor=100.0)
    correlation = np.corrcoef(wide.codes[:, 0], scenarios.failures.codes[0, rows, 0])[0, 1]
    assert correlation == pytest.approx(np.sqrt(0.5), abs=0.05)


@pytest.mark.parametrize("images", [2, 3, 8])
def test_held_out_draws_are_anchored_at_other_images(images):
    spec, scenarios = tiny(), one_component(images)
    shown = set(draw_codes(spec, scenarios, 0, 500, generator(0, "a")).anchors.tolist())
    held_out = set(draw_codes(spec, scenarios, 0, 500, generator(0, "b"), held_out=True).anchors.tolist())
    wide = {
        kind: set(draw_codes(spec, scenarios, 0, 500, rng, held_out=kind, factor=4.0).anchors.tolist())
        for kind, rng in ((False, generator(0, "c")), (True, generator(0, "c")))
    }
    assert shown and held_out and not shown & held_out
    assert shown | held_out == set(range(images))
    assert wide == {False: shown, True: held_out}


def test_an_image_of_two_components_is_held_out_by_both_or_by_none():
    failures = [
        sample_failures(
            np.zeros((10, 3), np.float32), np.arange(first, first + 10), *np.zeros((2, 10), np.int64)
        )
        for first in (0, 1)
    ]
    train = Images(np.zeros((11, 1, 4, 4), np.uint8), np.zeros(11, np.int64))
    shared = component_failures(failures, train, seed=0)
    drawn = {
        held_out: [
            set(shared.anchor[row, failure_rows(shared, row, 500, generator(0, "a"), held_out=held_out)])
            for row in (0, 1)
        ]
        for held_out in (False, True)
    }
    assert not set.union(*drawn[True]) & set.union(*drawn[False])
    assert {len(images) for half in drawn.values() for images in half} <= {4, 5, 6}
    np.testing.assert_array_equal(shared.take(np.array([1])).anchors.held_out, shared.anchors.held_out[1:])


def test_images_of_one_track_are_held_out_together():
    failures = [
        sample_failures(
            np.zeros((20, 3), np.float32), np.arange(first, first + 20), *np.zeros((2, 20), np.int64)
        )
        for first in (0, 10)
    ]
    tracks = np.repeat(np.arange(10), 3)
    train = Images(np.zeros((30, 1, 4, 4), np.uint8), np.zeros(30, np.int64), tracks)
    anchors = component_failures(failures, train, seed=0).anchors
    held_out = anchors.held_out
    for track in range(10):
        assert len(set(held_out[tracks[anchors.source] == track])) == 1
    assert {int(held_out[:20].sum()), int(held_out[10:].sum())} <= set(range(6, 15))


def test_images_of_a_single_track_are_not_divided():
    failures = [sample_failures(np.zeros((20, 3), np.float32), np.arange(20), *np.zeros((2, 20), np.int64))]
    train = Images(np.zeros((20, 1, 4, 4), np.uint8), np.zeros(20, np.int64), np.zeros(20, np.int64))
    assert not component_failures(failures, train, seed=0).anchors.held_out.any()


def test_kept_failures_come_from_as_many_images_as_possible_with_their_own_pixels():
    pixels = np.random.default_rng(0).integers(256, size=(300, 1, 4, 4)).astype(np.uint8)
    train = Images(pixels, np.zeros(300, np.int64))
    few = sample_failures(
        np.arange(30, dtype=np.float32).reshape(15, 2), *np.repeat([[3, 7, 9], [0] * 3, [1] * 3], 5, axis=1)
    )
    source = np.concatenate([np.zeros(5000, np.int64), np.arange(200)])
    many = sample_failures(np.zeros((5200, 2), np.float32), source, *np.zeros((2, 5200), np.int64))
    kept = component_failures([few, many], train, seed=0)
    own = kept.anchors.source[kept.anchor]  # (2, L)
    assert own.shape == (2, FAILURES_KEPT)
    assert set(own[0]) == {3, 7, 9}
    assert {tuple(code) for code in kept.codes[0]} == {tuple(code) for code in few.codes}
    assert len(set(own[1])) == IMAGES_KEPT
    assert (own[1, :IMAGES_KEPT] == 0).sum() <= 1
    np.testing.assert_array_equal(kept.anchors.pixels, pixels[kept.anchors.source])
    second = kept.take(np.array([0]))
    np.testing.assert_array_equal(second.anchors.source[second.anchor[0]], own[0])
    assert second.anchors.source.tolist() == [3, 7, 9]


def test_failures_of_identification_are_failures_of_the_moved_image(tiny_models):
    spec = recommended(vae=ANCHORED, identify={"screen": "none"})
    identifier = Identifier(spec, tiny_models)
    shard = identifier.shard(0)
    train, failures = identifier.train, shard.failures
    originals = predict(identifier.classifier, train.take(slice(0, shard.images)))
    assert shard.zero_noise_flips == (originals != train.labels[: shard.images]).sum()
    shown = Decoder(identifier.vae, train).decode(failures.codes, failures.source)
    answers = predict(identifier.classifier, shown)
    assert (
        len(failures) and (answers == failures.predicted).mean() > 0.97
    )  # other batches may round otherwise


def test_the_screen_of_identification_looks_at_the_moved_image(tiny_models, references):
    screening = Identifier(SPEC, tiny_models, references)
    kept, failing = screening.shard(0).failures, Identifier(SPEC, tiny_models).shard(0).failures
    shown = Decoder(screening.vae, screening.train).decode(failing.codes, failing.source)
    seen = mean_probabilities(screening.references, shown)
    expected = failing.take(sees_class(seen, failing.truth, SPEC.identify.min_probability))
    both = np.intersect1d(kept.codes[:, 0], expected.codes[:, 0])
    assert 0.97 * len(expected) < len(both) <= len(kept) < 1.03 * len(expected) < len(failing)


def test_shards_of_the_other_decoding_are_not_taken(tiny_models):
    plain = shard_fingerprint(tiny(), tiny_models)
    assert plain != shard_fingerprint(tiny(vae=ANCHORED), tiny_models)
    assert "vae.decode: 'plain' in the run, 'anchored' now" in str(changed_field(tiny(), tiny(vae=ANCHORED)))


def test_an_anchored_run_reaches_its_report_with_every_picture_at_a_training_image_of_its_class(finished):
    scenarios, gallery, fixes = (finished.load(kind) for kind in (Scenarios, Gallery, Corrections))
    verdicts = finished.load(Verdicts)
    assert len(verdicts.accepted) > 0
    assert finished.store.exists("report.html")
    train = open_splits(SPEC.data, SPEC.seed).train
    truth = train.labels[gallery.source]  # (S, R)
    np.testing.assert_array_equal(truth, np.broadcast_to(scenarios.cells[:, :1], truth.shape))
    for rows, codes in ((fixes.tune_anchor, fixes.tune), (fixes.test_anchor, fixes.test)):
        assert rows.shape == codes.shape[:2]
    for tuned, tested in zip(fixes.tune_anchor, fixes.test_anchor, strict=True):
        assert not set(tuned) & set(tested)


def test_corrections_hold_what_their_pictures_need(finished, tiny_models):
    fixes, vae = finished.load(Corrections), StoredVae(SPEC, tiny_models.vae)
    train = open_splits(SPEC.data, SPEC.seed).train
    source = fixes.anchors.source[fixes.test_anchor].reshape(-1)
    expected = Decoder(vae.loaded, train).decode(fixes.test, source)
    np.testing.assert_allclose(held_out_images(vae, fixes).pixels, expected, atol=1e-5)
    half = fixes.take(np.array([0]))
    np.testing.assert_array_equal(
        tuning_images(vae, half).pixels, tuning_images(vae, fixes).pixels[: fixes.tune.shape[1]]
    )


def test_nothing_is_fine_tuned_on_the_images_of_held_out_pictures(finished, tiny_models):
    fixes, train = finished.load(Corrections), open_splits(SPEC.data, SPEC.seed).train
    sources = fixes.anchors.source
    assert set(np.unique([*fixes.tune_anchor.ravel(), *fixes.test_anchor.ravel()])) == set(
        range(len(sources))
    )
    tuned, tested = set(sources[fixes.tune_anchor.ravel()]), set(sources[fixes.test_anchor.ravel()])
    assert tested and not tested & tuned
    for used, without in ((fixes, tested), (fixes.take(np.array([0])), None)):
        data = fine_tuning_data(SPEC, tiny_models, used)
        left_out = set(used.sources()[0].tolist())
        assert len(data.clean.train) == len(train) - len(left_out)
        if without is not None:
            assert without <= left_out and not left_out & tuned
        assert not left_out & set(sources[used.tune_anchor.ravel()])


def test_nor_on_those_of_wider_draws_that_no_held_out_picture_happens_to_use(finished, tiny_models):
    spec = SPEC.with_fields("correct", test_images=1)
    scenarios, verdicts = finished.load(Scenarios), finished.load(Verdicts)
    fixes = with_used_anchors(sample_corrections(spec, scenarios, verdicts))
    used = scenarios.failures.take(verdicts.accepted).anchors
    of_wider = set(used.source[used.held_out]) - set(fixes.anchors.source)
    assert of_wider
    left_out, tuned = (set(each) for each in fixes.sources())
    assert of_wider <= left_out and not left_out & tuned


def test_the_controls_that_leave_scenarios_out_are_tuned_on_the_clean_images_of_plain_training(
    finished, tmp_path: Path
):
    found = load_finished(finished).found
    assert len(found.fixes.labels) > 1, "no scenario can be left out of one"
    asked = []

    class Recording(LocalCompute):
        def sweeps(self, models, requests):
            asked.extend(requests)
            return [found.sweep for _ in requests]

    other = Run.start(FolderStore(tmp_path), "run", SPEC)
    _controls(other, Recording(), found)
    clean = [load_fine_tuning_data(found.models, each, progress=silent).clean.train.pixels for each in asked]
    assert len(clean) == len(PLAIN_NAMES) + 2
    for images in clean[1:]:
        np.testing.assert_array_equal(images, clean[0])


def test_a_suite_holds_the_images_that_its_codes_are_decoded_at(finished, tiny_models, tmp_path: Path):
    pictures = save_suite(finished, tmp_path / "suite").pictures
    vae = load_vae(SPEC, tiny_models.vae)
    anchors = Images(pictures.anchors.pixels, np.zeros(len(pictures.anchors.source), np.int64))
    shown = Decoder(vae, anchors).decode(pictures.codes, pictures.anchor)
    assert np.abs(shown * 255 - pictures.pixels.reshape(shown.shape)).max() <= 0.51


def test_the_reference_models_judge_the_health_of_anchored_decoding(finished, tiny_models, references):
    measured = finished.load(Health)
    assert (measured.judged_by, measured.anchored) == ("reference models", True)
    assert with_measured_health(finished, tiny_models).health == measured
    wild = SPEC.with_fields("identify", scale=300.0)
    lost = measure_perturbed(wild, tiny_models, references, progress=silent)
    assert lost.kept_right < measured.kept_right
    blind = Models(**{**vars(tiny_models), "health": lost})
    assert lost.verdict == "blind"
    with pytest.raises(
        VaeHealthError, match=r"the reference models get .* moved by the noise.*lower identify.scale"
    ):
        expect_healthy(wild, blind)


def test_an_anchored_run_is_the_same_when_only_some_of_it_is_made_again(finished, tmp_path: Path):
    store = FolderStore(tmp_path)
    for key in finished.store.list():
        if not key.startswith(
            ("gallery", "votes", "verdicts", "corrections", "sweep", "baseline", "trials", "evidence")
        ):
            store.within("run").write(key, finished.store.read(key))
    run, compute = Run.start(store, "run", SPEC), LocalCompute()
    run_defuse(run, compute, ReferenceAnnotators(run, compute))
    assert finished_shards(
        run.store, shard_fingerprint(SPEC, run.load(Models), run.load(ReferenceSet, "references"))
    )
    for kind in (Gallery, Corrections, Sweep, Evidence):
        assert encode(run.load(kind)) == encode(finished.load(kind))


def test_evidence_is_of_held_out_photographs_alone_and_each_of_them_counts_once(finished):
    found = load_finished(finished).found
    failures, fixes = found.scenarios.failures, found.fixes
    pixels = failures.anchors.pixels * failures.anchors.held_out[:, None, None, None]
    blank = replace(failures, anchors=replace(failures.anchors, pixels=pixels))  # where it is tuned
    others = replace(found, scenarios=replace(found.scenarios, failures=blank))
    alone = replace(found, fixes=fixes.take(np.array([0])))
    made, same, single = (
        gather_evidence(finished.spec, each, Controls((found.sweep,), ()), progress=silent)
        for each in (found, others, alone)
    )
    np.testing.assert_array_equal(made.wider, same.wider)
    photographs = [len(np.unique(fixes.anchors.unit[row])) for row in fixes.test_anchor]
    assert (made.units <= photographs).all() and max(photographs) < fixes.test.shape[1]
    share, units = single.own_label[0, 0], int(single.units[0])
    assert np.ptp(single.own_label[0, 1:]) >= np.ptp(share_with_bounds(share * units, units)[1:]) - 1e-9
    shown = fixes.anchors.unit[fixes.test_anchor[0]]
    draws = effective_number(np.zeros(len(shown), np.int64), shown, 1).item()
    np.testing.assert_allclose(single.purity, share_with_bounds(single.purity[0] * draws, draws))
    held_out = failures.held_out_anchors(fixes.scenario[:1])
    share, most = single.wider[0, 0, 0], len(np.unique(held_out.unit))
    assert np.ptp(single.wider[0, 0, 1:]) >= np.ptp(share_with_bounds(share * most, most)[1:]) - 1e-9


def test_components_of_too_few_photographs_for_certainty_are_logged(
    finished, tiny_models, references, caplog
):
    run = copy.copy(finished)
    run.spec = SPEC.with_fields("review", max_false=0.01)
    with caplog.at_level("INFO", "defuse"):
        _scenarios(run, LocalCompute(), finished.load(Psi), tiny_models, references)
    assert "components are not reviewed (too few photographs or tracks for certainty: " in caplog.text
