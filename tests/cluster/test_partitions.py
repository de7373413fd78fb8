"""Parts of data on Ray: results equal those in one process, whatever happens to the workers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cluster.compute import RayCompute
from defuse_core.artifacts import Failures, Psi, Shard
from defuse_core.distill.sharded import distill_all
from defuse_core.errors import StoreError
from defuse_core.identify import save_shard
from defuse_core.local import LocalCompute
from defuse_core.store import FolderStore
from tests.cluster.fakes import Tally, add, load_numbers, sum_or_die_once
from tests.conftest import tiny

pytestmark = pytest.mark.usefixtures("ray_session")
SPEC = {
    "distill": {"by": "cell", "max_codes": None, "engine": "torch", "max_iterations": 20},
    "resources": {"workers": 2},
}


def test_a_function_is_called_with_every_part_in_order_and_parts_are_loaded_once(tmp_path: Path) -> None:
    with RayCompute(None, tiny(**SPEC)) as compute:
        parts = compute.partitions("distill", load_numbers, [(tmp_path / "loads", n) for n in range(7)])
        assert parts.map(add, 1) == [5 * n + 1 for n in range(7)]
        assert parts.map(sum_or_die_once, tmp_path / "killed") == [5 * n for n in range(7)]
    assert (tmp_path / "killed").exists()
    assert int(Tally(tmp_path / "loads")) == 7


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Psi, FolderStore]:
    """2,000 codes of two cells in 20 shards."""
    rng, store = np.random.default_rng(0), FolderStore(tmp_path / "run")
    for index in range(20):
        codes = (rng.standard_normal((100, 4)) + 6 * rng.integers(0, 2, (100, 1))).astype(np.float32)
        truth = rng.integers(0, 2, 100)
        failures = Failures(codes, 100 * index + np.arange(100), truth, truth + 1)
        save_shard(store, index, Shard(failures, 100, 100, 0, 0, 0.0))
    return Psi(np.full(20, 100), 2000, 2000, 0, 0, 0.0), store


def test_all_of_psi_gives_the_same_bits_on_any_number_of_workers(
    stored: tuple[Psi, FolderStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("defuse_core.distill.sharded.PART_CODES", 150)  # in the driver, which cuts the parts
    psi, store = stored
    here = distill_all(tiny(**SPEC), psi, store, "", LocalCompute())
    assert len(here) > 1
    for workers in (1, 2):
        spec = tiny(**SPEC | {"resources": {"workers": workers}})
        with RayCompute(None, spec) as compute:
            found = distill_all(spec, psi, store, "", compute)
        for field in ("weights", "means", "covariances", "support"):
            assert np.array_equal(getattr(found, field), getattr(here, field)), field
        assert found.lower_bound == here.lower_bound


def test_a_shard_that_is_gone_is_named(stored: tuple[Psi, FolderStore]) -> None:
    psi, store = stored
    store.delete("psi/000007.safetensors")
    spec = tiny(**SPEC)
    with (
        RayCompute(None, spec) as compute,
        pytest.raises(StoreError, match=r"000007\.safetensors: .* found no such file"),
    ):
        distill_all(spec, psi, store, "", compute)
