from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from defuse_core.artifacts import Failures, Psi, Shard
from defuse_core.config import IdentifySection
from defuse_core.errors import DataError, RunMismatchError, StoreError
from defuse_core.identify import (
    SHARD_DECODINGS,
    SHARDS,
    Identifier,
    beta_noise,
    blocks_per_shard,
    draw_noise,
    encode_posterior,
    finished_shards,
    gather_shards,
    nearest_failures,
    save_shard,
    shard_count,
    shard_fingerprint,
    shard_key,
    shard_of_psi,
    subsample_psi,
)
from defuse_core.local import LocalCompute
from defuse_core.models import Decoder, decode_codes, encode_images, predict, to_tensor
from defuse_core.seeds import generator
from defuse_core.store import FolderStore
from defuse_core.training.reference_models import mean_probabilities
from tests.conftest import recommended, tiny
from tests.sample_components import sample_failures


@pytest.fixture(scope="module")
def identifier(tiny_spec, tiny_models) -> Identifier:
    return Identifier(tiny_spec, tiny_models)


def test_every_code_of_psi_decodes_to_an_image_that_the_classifier_gets_wrong(identifier):
    failures = identifier.shard(0).failures
    assert len(failures) > 0
    answers = predict(identifier.classifier, decode_codes(identifier.vae, failures.codes))
    # decoded here in other batches than there, so allow what lies on the edge of a decision to round otherwise
    assert (answers == failures.predicted).mean() > 0.99
    assert (failures.predicted != failures.truth).all()
    np.testing.assert_array_equal(failures.truth, identifier.train.labels[failures.source])


def test_codes_are_the_encoding_of_their_source_plus_beta_noise(identifier, tiny_spec):
    failures = identifier.shard(1).failures
    mu = encode_images(identifier.vae, identifier.train.take(failures.source))
    noise = failures.codes - mu
    assert noise.min() > 0 and noise.max() < 1
    assert noise.mean() == pytest.approx(0.5, abs=0.02)  # the paper's noise is a shift by about a half


def test_every_image_is_drawn_q_times(identifier, tiny_spec):
    count = shard_count(len(identifier.train), tiny_spec.identify)
    shards = [identifier.shard(index) for index in range(count)]
    assert sum(shard.images for shard in shards) == len(identifier.train)
    assert sum(shard.decodings for shard in shards) == 4 * len(identifier.train)


def test_with_a_share_only_so_many_images_are_perturbed_also_where_a_block_has_none_of_them(tiny_models):
    worker = Identifier(tiny(identify={"share": 0.1, "block_images": 4}), tiny_models)
    shards = [worker.shard(index) for index in range(shard_count(len(worker.train), worker.spec.identify))]
    assert sum(shard.images for shard in shards) == worker.is_perturbed.sum() == pytest.approx(30, abs=9)
    assert sum(shard.decodings for shard in shards) == 4 * worker.is_perturbed.sum()
    assert 0 in [shard.images for shard in shards]
    sources = np.concatenate([shard.failures.source for shard in shards])
    assert len(sources) and worker.is_perturbed[sources].all()
    np.testing.assert_array_equal(
        np.concatenate([shard.failures.truth for shard in shards]), worker.train.labels[sources]
    )


def test_a_share_that_leaves_nothing_to_perturb_is_one_line(tiny_models):
    with pytest.raises(DataError, match="^identify.share: 0.0001 of 300 training images leaves none"):
        Identifier(tiny(identify={"share": 0.0001}), tiny_models)


def test_a_shard_is_the_same_whoever_makes_it_and_whenever(tiny_spec, tiny_models, identifier):
    other = Identifier(tiny_spec, tiny_models)
    last_first = [other.shard(index).failures for index in (2, 0)]
    np.testing.assert_array_equal(last_first[1].codes, identifier.shard(0).failures.codes)
    np.testing.assert_array_equal(last_first[0].codes, identifier.shard(2).failures.codes)


def test_another_seed_gives_another_psi(tiny_models, identifier):
    other = Identifier(tiny().model_copy(update={"seed": 0}), tiny_models)
    other.spec = other.spec.model_copy(update={"seed": 1})
    assert not np.array_equal(other.shard(0).failures.codes, identifier.shard(0).failures.codes)


def test_the_cap_keeps_the_failures_nearest_to_mu():
    failed = np.array([[True, True, False, True]])
    distance = np.array([[3.0, 1.0, 0.5, 2.0]], np.float32)
    assert nearest_failures(failed, distance, 2).tolist() == [[False, True, False, True]]
    assert nearest_failures(failed, distance, None).tolist() == failed.tolist()


def test_every_block_has_noise_of_its_own(identifier):
    blocks = [identifier.shard(index).failures for index in (0, 1)]
    first, second = (
        found.codes - encode_images(identifier.vae, identifier.train.take(found.source)) for found in blocks
    )
    assert cdist(first, second).min() > 1e-4


def test_of_the_failing_draws_around_an_image_those_nearest_to_its_own_code_are_kept(tiny_models):
    every, nearest = (
        Identifier(tiny(identify={"max_per_image": cap}), tiny_models).shard(0).failures for cap in (None, 1)
    )
    assert len(nearest) < len(every)
    worker = Identifier(tiny(), tiny_models)
    for source, code in zip(nearest.source, nearest.codes, strict=True):
        mu = encode_images(worker.vae, worker.train.take(np.array([source])))
        others = every.codes[every.source == source]
        assert np.linalg.norm(code - mu) <= np.linalg.norm(others - mu, axis=1).min() + 1e-5


def test_the_cap_is_on_the_draws_that_pass_the_screen(tiny_models, references):
    every, nearest = (
        Identifier(recommended(identify={"max_per_image": cap}), tiny_models, references).shard(0).failures
        for cap in (None, 1)
    )
    assert len(nearest) < len(every)
    np.testing.assert_array_equal(nearest.source, np.unique(every.source))


def test_the_cap_never_adds_a_draw_that_did_not_fail():
    failed = np.array([[False, True, False]])
    assert nearest_failures(failed, np.zeros((1, 3), np.float32), 2).tolist() == failed.tolist()


@pytest.mark.parametrize(("center", "mean"), [(False, 0.5), (True, 0.0)])
def test_noise_is_the_papers_unless_centred(center, mean):
    section = IdentifySection(a=50, b=50, center=center, scale=2.0)
    noise = beta_noise(section, (20_000, 3), generator(0, "test"))
    assert noise.mean() == pytest.approx(2 * mean, abs=0.01)
    assert noise.std() == pytest.approx(2 * 0.5 / np.sqrt(101), abs=0.005)  # sd of Beta(50, 50)
    oblique = IdentifySection(a=20, b=60, center=center)
    assert beta_noise(oblique, (20_000, 3), generator(0, "test")).mean() == pytest.approx(mean / 2, abs=0.01)


def test_posterior_noise_is_as_wide_as_the_encoder_is_unsure():
    sigma = np.array([[0.1, 1.0], [0.5, 0.0]], np.float32)
    section = IdentifySection(noise="posterior", draws=20_000, scale=2.0)
    noise = draw_noise(section, sigma, generator(0, "test"))
    assert noise.shape == (2, 20_000, 2)
    np.testing.assert_allclose(noise.std(axis=1), 2 * sigma, rtol=0.02)
    np.testing.assert_allclose(noise.mean(axis=1), 0, atol=0.05)


@pytest.fixture(scope="module")
def screening(tiny_models, references) -> Identifier:
    return Identifier(recommended(), tiny_models, references)


def test_the_encoder_says_how_unsure_it_is(screening):
    mu, sigma = encode_posterior(screening.vae, screening.train.take(slice(0, 50)), 64)
    np.testing.assert_array_equal(mu, encode_images(screening.vae, screening.train.take(slice(0, 50))))
    with torch.no_grad():
        _, log_variance = screening.vae.encode(to_tensor(screening.train.batch(slice(0, 50))))
    np.testing.assert_allclose(sigma**2, np.exp(log_variance.cpu().numpy()), rtol=1e-4)


def test_screening_keeps_the_failing_draws_that_still_show_their_class(screening, tiny_models):
    unscreened = Identifier(screening.spec, tiny_models).shard(0)
    shard = screening.shard(0)
    assert 0 < len(shard.failures) < len(unscreened.failures) == shard.failing == unscreened.failing
    assert len(np.unique(shard.failures.source)) < shard.images_with_any  # before screening
    assert shard.images_with_any == len(np.unique(unscreened.failures.source))
    seen = mean_probabilities(screening.references, decode_codes(screening.vae, shard.failures.codes))
    least = screening.spec.identify.min_probability
    assert seen[np.arange(len(seen)), shard.failures.truth].min() >= least - 1e-5
    kept = {tuple(code) for code in shard.failures.codes.tolist()}
    others = np.array([code for code in unscreened.failures.codes.tolist() if tuple(code) not in kept])
    truth = unscreened.failures.truth[[tuple(c) not in kept for c in unscreened.failures.codes.tolist()]]
    lost = mean_probabilities(screening.references, decode_codes(screening.vae, others.astype(np.float32)))
    lost_truth = lost[np.arange(len(lost)), truth]
    assert ((lost_truth < least + 1e-5) | (lost_truth < lost.max(axis=1))).all()


class CountingDecoder(Decoder):
    """Remembers how many codes it was asked to decode at once."""

    most = 0

    def decode(self, codes, anchors=None):
        self.most = max(self.most, len(codes))
        return super().decode(codes, anchors)


def test_screening_decodes_one_batch_at_a_time_with_the_result_of_all_at_once(tiny_models, references):
    worker = Identifier(recommended(identify={"batch_size": 8}), tiny_models, references)
    images = worker.train.take(slice(0, 10))
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((10, 7, 4)).astype(np.float32)
    codes = encode_images(worker.vae, images)[:, None, :] + noise
    failed = rng.random((10, 7)) < 0.6
    decoder = CountingDecoder(worker.vae, images, 8)
    kept = worker._screen(decoder, codes, images.labels, failed)
    assert decoder.most == 8 < failed.sum()

    image, _ = np.nonzero(failed)
    seen = mean_probabilities(worker.references, decoder.decode(codes[failed], image), 8)
    truth = images.labels[image]
    sure = seen[np.arange(len(image)), truth] >= worker.spec.identify.min_probability
    recognised = sure & (seen.argmax(axis=1) == truth)
    assert 0 < recognised.sum() < len(image)
    np.testing.assert_array_equal(kept[failed], recognised)
    assert not kept[~failed].any()


def test_the_counts_of_screening_reach_the_record_of_all_shards_and_the_log(screening, tmp_path, caplog):
    store = FolderStore(tmp_path)
    records = [save_shard(store, screening.shard(index)) for index in range(2)]
    with caplog.at_level("INFO", "defuse"):
        psi = gather_shards(finished_shards(store, screening.fingerprint))
    assert psi.failing == sum(record.failing for record in records) > psi.total
    assert caplog.messages == [f"kept {psi.total:,} of {psi.failing:,} failing draws"]


def test_every_code_knows_whether_the_classifier_gets_its_source_image_wrong(identifier):
    found = identifier.shard(0).failures
    answers = predict(identifier.classifier, identifier.train.take(found.source))
    np.testing.assert_array_equal(found.source_wrong, answers != found.truth)


def test_every_code_knows_the_track_of_its_source_image(tiny_models):
    worker = Identifier(tiny(), tiny_models)
    assert worker.shard(0).failures.source_track is None
    tracks = np.arange(len(worker.train)) // 3
    worker.train = replace(worker.train, tracks=tracks)
    found = worker.shard(0).failures
    np.testing.assert_array_equal(found.source_track, tracks[found.source])
    first, rest = found.take(np.arange(3)), found.take(np.arange(3, len(found)))
    np.testing.assert_array_equal(Failures.concatenate([first, rest]).source_track, found.source_track)
    assert Failures.concatenate([replace(first, source_track=None), rest]).source_track is None


def misled(models, references=None) -> Identifier:
    """A worker on training images of which the first ten carry the next class as their label."""
    worker = Identifier(tiny(), models, references)
    labels = worker.train.labels.copy()
    labels[:10] = (labels[:10] + 1) % 10
    worker.train = replace(worker.train, labels=labels)
    return worker


def test_flips_at_zero_noise_are_decodings_that_do_not_get_the_label(tiny_models):
    worker = misled(tiny_models)
    images = worker.train.take(slice(0, worker.shard(0).images))
    answers = predict(worker.classifier, decode_codes(worker.vae, encode_images(worker.vae, images)))
    assert worker.shard(0).zero_noise_flips == (answers != images.labels).sum() >= 10


def test_images_that_the_classifier_gets_wrong_are_counted_and_those_of_them_that_have_codes(
    tiny_models, references, tmp_path
):
    worker = misled(tiny_models, references)
    shards = [worker.shard(index) for index in range(shard_count(len(worker.train), worker.spec.identify))]
    images, kept = worker.train, np.unique(np.concatenate([shard.failures.source for shard in shards]))
    wrong = predict(worker.classifier, images) != images.labels
    decoded = predict(worker.classifier, decode_codes(worker.vae, encode_images(worker.vae, images)))
    psi = gather_shards({shard.index: save_shard(FolderStore(tmp_path), shard) for shard in shards})
    assert psi.wrong == wrong.sum() >= 10
    assert psi.wrong_decoded == (wrong & (decoded != images.labels)).sum() > 0
    assert psi.wrong_kept == wrong[kept].sum()


def test_draws_around_images_of_another_class_to_the_reference_models_are_screened(tiny_models, references):
    unscreened, screened = (misled(tiny_models, models).shard(0).failures for models in (None, references))
    assert np.isin(np.arange(10), unscreened.source).any()
    assert not np.isin(np.arange(10), screened.source).any()


@pytest.mark.parametrize("draws", [1, 500, 100_000])
@pytest.mark.parametrize("images", [1, 31, 32, 33, 60_000, 10_000_000])
def test_shards_cover_every_block_once_and_cost_minutes_at_most(images, draws):
    section = IdentifySection(block_images=32, draws=draws)
    size, count, blocks = blocks_per_shard(images, section), shard_count(images, section), -(-images // 32)
    assert (count - 1) * size < blocks <= count * size
    assert size == 1 or size * 32 * draws <= SHARD_DECODINGS


def test_a_large_training_set_has_more_shards_than_workers():
    assert shard_count(10_000_000, IdentifySection(draws=500)) > 4 * SHARDS


@pytest.mark.parametrize("shards", [1, 3])
def test_psi_and_its_sample_are_the_same_however_blocks_are_put_into_shards(
    shards, tiny_spec, tiny_models, tmp_path, monkeypatch
):
    fine, coarse = FolderStore(tmp_path / "fine"), FolderStore(tmp_path / "coarse")
    before = LocalCompute().identify(tiny_spec, tiny_models, fine)
    monkeypatch.setattr("defuse_core.identify.SHARDS", shards)
    psi = LocalCompute().identify(tiny_spec, tiny_models, coarse)
    assert len(psi.codes) == shards < len(before.codes)
    assert psi.fingerprint != before.fingerprint  # so that shards of the other layout are not taken for these
    for cap in (before.total, 50):
        spec = tiny(distill={"max_codes": cap})
        one, other = subsample_psi(spec, before, fine), subsample_psi(spec, psi, coarse)
        assert len(one) == cap
        for field in ("codes", "source", "truth", "predicted"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


def test_images_other_than_those_trained_on_are_refused(tiny_models):
    with pytest.raises(RunMismatchError, match="differ from those that the run was trained on"):
        Identifier(tiny(data={"train_images": 200}), tiny_models)


@pytest.fixture
def two_shards(tmp_path, identifier):
    """A store that holds the shards 0 and 1."""
    store = FolderStore(tmp_path)
    for index in (0, 1):
        save_shard(store, identifier.shard(index))
    return store


def test_finished_shards_are_counted_from_what_is_stored(two_shards, identifier):
    psi = gather_shards(finished_shards(two_shards, identifier.fingerprint))
    shard = shard_of_psi(two_shards, identifier.fingerprint, 0)
    assert psi.codes[0] == len(shard.failures)
    assert (psi.images, psi.fingerprint) == (64, identifier.fingerprint)


def test_the_record_of_all_shards_is_in_their_order_whichever_was_made_first(two_shards, identifier):
    counts = finished_shards(two_shards, identifier.fingerprint)
    psi = gather_shards({1: counts[1], 0: counts[0]})
    assert psi.codes.tolist() == [counts[0].total, counts[1].total] and counts[0].total != counts[1].total
    assert psi.worker_seconds == pytest.approx(counts[0].worker_seconds + counts[1].worker_seconds)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (
            lambda store: store.write(shard_key(1), store.read(shard_key(0))),
            "expected shard 1, found shard 0",
        ),
        (lambda store: store.write(shard_key(1), store.read(shard_key(1))[:-9]), "unreadable bytes"),
        (lambda store: store.write(shard_key(1), b""), "unreadable bytes"),
        (lambda store: store.write(shard_key(1), store.read(shard_key(1))[:-1] + b"!"), "its bytes changed"),
    ],
    ids=["another shard copied over it", "truncated", "emptied", "altered"],
)
def test_a_damaged_shard_is_logged_and_not_finished(damage, found, two_shards, identifier, caplog):
    damage(two_shards)
    assert list(finished_shards(two_shards, identifier.fingerprint)) == [0]
    assert "psi/000001.safetensors: " in caplog.text
    assert "the shard is made again" in caplog.text
    assert found in caplog.text


def test_a_shard_of_another_run_is_not_finished(two_shards, tiny_models, caplog):
    other = Identifier(tiny(identify={"draws": 5}), tiny_models)
    assert finished_shards(two_shards, other.fingerprint) == {}
    assert "expected a shard of this run, found one of another run" in caplog.text


def test_the_fingerprint_depends_on_the_weights_and_not_on_the_resources(tiny_models, identifier):
    assert shard_fingerprint(tiny(resources={"workers": 7}), tiny_models) == identifier.fingerprint
    for field in ("vae", "classifier"):
        moved = {name: array + 1 for name, array in getattr(tiny_models, field).items()}
        assert shard_fingerprint(tiny(), replace(tiny_models, **{field: moved})) != identifier.fingerprint


def test_the_fingerprint_depends_on_the_seed_and_on_the_images(tiny_models, identifier):
    other_seed, other_images = (
        tiny().model_copy(update={"seed": 1}),
        replace(tiny_models, data_fingerprint="x"),
    )
    prints = shard_fingerprint(other_seed, tiny_models), shard_fingerprint(tiny(), other_images)
    assert len({identifier.fingerprint, *prints}) == 3


def test_the_fingerprint_depends_on_the_models_that_screen(tiny_models, references):
    other = replace(references, models=references.models[::-1])
    prints = {shard_fingerprint(recommended(), tiny_models, models) for models in (None, references, other)}
    assert len(prints) == 3


def test_a_store_that_fails_is_not_taken_for_a_damaged_shard(two_shards, identifier, monkeypatch):
    def fail(self, key):
        raise StoreError("no answer")

    monkeypatch.setattr(FolderStore, "read", fail)
    with pytest.raises(StoreError, match="no answer"):
        finished_shards(two_shards, identifier.fingerprint)


def stored_psi(folder, sizes=(30, 0, 50)) -> tuple[Psi, FolderStore]:
    store = FolderStore(folder)
    for index, size in enumerate(sizes):
        codes = (1000 * index + np.arange(size, dtype=np.float32))[:, None].repeat(4, 1)
        labels = np.zeros(size, np.int64)
        found = sample_failures(codes, labels, labels, labels + 1)
        save_shard(store, Shard(found, size, size, 0, 0, 0.0, index=index))
    return Psi(np.array(sizes), 80, 80, 0, 0, 0.0), store


def test_psi_within_the_limit_is_taken_whole_and_in_order(tmp_path):
    psi, store = stored_psi(tmp_path)
    codes = subsample_psi(tiny(), psi, store).codes
    assert codes[:, 0].tolist() == [*range(30), *range(2000, 2050)]


def test_a_sample_of_psi_has_no_code_twice_and_every_shard_a_share(tmp_path):
    psi, store = stored_psi(tmp_path)
    spec = tiny(distill={"max_codes": 40, "max_components": 6})
    values = subsample_psi(spec, psi, store).codes[:, 0]
    assert len(set(values.tolist())) == 40
    assert (values < 100).any() and (values >= 2000).any()
    other = spec.model_copy(update={"seed": 1})
    assert not np.array_equal(subsample_psi(other, psi, store).codes[:, 0], values)


def test_a_missing_shard_is_named_with_what_to_delete(tmp_path):
    psi, store = stored_psi(tmp_path)
    store.delete("psi/000002.safetensors")
    with pytest.raises(
        StoreError, match=r"000002\.safetensors: .* found no such file; delete .*psi\.safetensors and"
    ):
        subsample_psi(tiny(), psi, store)
