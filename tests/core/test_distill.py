import numpy as np
import pytest

from defuse_core.artifacts import Failures, Psi, Shard
from defuse_core.config import DistillSection
from defuse_core.distill import fit_mixture, sample_codes
from defuse_core.errors import StoreError
from defuse_core.identify import save_shard
from defuse_core.sample import sample_codes_from
from defuse_core.store import FolderStore
from tests.conftest import tiny


def planted(rng: np.random.Generator, sizes=(600, 300, 100), width=3) -> tuple[np.ndarray, np.ndarray]:
    """Codes around far-apart centres, and the centres."""
    centres = 12.0 * np.eye(width)[: len(sizes)]
    codes = np.concatenate([c + rng.standard_normal((n, width)) for c, n in zip(centres, sizes, strict=True)])
    return codes.astype(np.float32), centres


def test_planted_clusters_are_recovered_heaviest_first():
    codes, centres = planted(np.random.default_rng(0))
    found = fit_mixture(codes, DistillSection(max_components=10, min_weight=0.02), seed=0)
    assert len(found) == 3
    np.testing.assert_allclose(found.means, centres, atol=0.5)
    np.testing.assert_allclose(found.weights, [0.6, 0.3, 0.1], atol=0.03)


def test_components_of_low_weight_are_dropped():
    codes, _ = planted(np.random.default_rng(0))
    found = fit_mixture(codes, DistillSection(max_components=10, min_weight=0.2), seed=0)
    assert len(found) == 2
    assert len(found.all_weights) == 10


def test_the_same_codes_and_seed_give_the_same_mixture():
    codes, _ = planted(np.random.default_rng(1))
    first, second = (fit_mixture(codes, DistillSection(max_components=8), seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.means, second.means)


def test_a_fit_that_did_not_converge_says_so():
    codes, _ = planted(np.random.default_rng(0))
    found = fit_mixture(codes, DistillSection(max_components=10, max_iterations=1), seed=0)
    assert not found.converged
    assert found.iterations == 1


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_codes_give_no_scenario(count):
    found = fit_mixture(np.zeros((count, 4), np.float32), DistillSection(), seed=0)
    assert len(found) == 0
    assert found.means.shape == (0, 4)


def stored_psi(folder, sizes=(30, 0, 50)) -> tuple[Psi, FolderStore]:
    store = FolderStore(folder)
    for index, size in enumerate(sizes):
        codes = (1000 * index + np.arange(size, dtype=np.float32))[:, None].repeat(4, 1)
        labels = np.zeros(size, np.int64)
        save_shard(store, index, Shard(Failures(codes, labels, labels, labels + 1), size, size, 0, 0, 0.0))
    return Psi(np.array(sizes), 80, 80, 0, 0, 0.0), store


def test_psi_within_the_limit_is_taken_whole_and_in_order(tmp_path):
    psi, store = stored_psi(tmp_path)
    codes = sample_codes(tiny(), psi, store)
    assert codes[:, 0].tolist() == [*range(30), *range(2000, 2050)]


def test_a_sample_of_psi_has_no_code_twice_and_every_shard_a_share(tmp_path):
    psi, store = stored_psi(tmp_path)
    values = sample_codes(tiny(distill={"max_codes": 40, "max_components": 6}), psi, store)[:, 0]
    assert len(set(values.tolist())) == 40
    assert (values < 100).any()
    assert (values >= 2000).any()


def test_a_shard_that_is_gone_is_named_with_what_to_delete(tmp_path):
    psi, store = stored_psi(tmp_path)
    store.delete("psi/000002.safetensors")
    with pytest.raises(
        StoreError, match=r"000002\.safetensors is gone.*delete psi/000002\.json and psi\.saf"
    ):
        sample_codes(tiny(), psi, store)


def test_tau_multiplies_the_covariance():
    codes, _ = planted(np.random.default_rng(0), sizes=(1000,))
    found = fit_mixture(codes, DistillSection(max_components=1), seed=0)
    drawn = sample_codes_from(found, 0, 20_000, 0.25, np.random.default_rng(0))
    np.testing.assert_allclose(np.cov(drawn.T), 0.25 * found.covariances[0], atol=0.02)
    np.testing.assert_allclose(drawn.mean(0), found.means[0], atol=0.02)
