"""The mixture over all of Ψ equals the mixture over the same codes in one piece."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from defuse_core.artifacts import Psi, Shard
from defuse_core.codec import encode
from defuse_core.config import RunFile
from defuse_core.data import Images
from defuse_core.distill.components import Cell, distill, fit_mixtures
from defuse_core.distill.mixture import one_component_coefficients
from defuse_core.distill.sharded import (
    CellCodes,
    CellSummary,
    _all_of_cell,
    _merged_cells,
    distill_all,
    load_part,
    part_spans,
    part_sums,
)
from defuse_core.errors import RunFileError
from defuse_core.identify import save_shard, shard_of_psi, subsample_psi
from defuse_core.local import LocalCompute
from defuse_core.pipeline import _scenarios
from defuse_core.protocols import silent
from defuse_core.store import FolderStore
from tests.conftest import tiny
from tests.sample_components import sample_failures

SHARD_SIZES = (300, 0, 450, 7, 243)
CENTRES = ((0.0, 0.0, 0.0, 0.0), (9.0, 0.0, 0.0, 0.0), (0.0, 9.0, 0.0, 0.0))


def all_codes(by: str, **fields: object) -> RunFile:
    chosen = {"engine": "torch", "max_iterations": 300, "tolerance": 1e-9, "max_components": 5}
    return tiny(distill={"by": by, "max_codes": None, **chosen, **fields})


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Psi, FolderStore]:
    """1,000 codes in five shards: three clusters in two cells, and a third cell of three codes."""
    rng, store = np.random.default_rng(0), FolderStore(tmp_path)
    first = 0
    for index, size in enumerate(SHARD_SIZES):
        cluster = rng.integers(0, 3, size)
        codes = (np.array(CENTRES)[cluster] + rng.standard_normal((size, 4))).astype(np.float32)
        truth = (cluster == 2).astype(np.int64)
        if index == 4:
            truth[:3] = 5
        source = first + np.arange(size) // 3  # three codes from each image
        first += size
        found = sample_failures(codes, source, truth, truth + 1)
        save_shard(store, Shard(found, size, size, 0, 0, 0.0, index=index))
    return Psi(np.array(SHARD_SIZES), 1000, 1000, 0, 0, 0.0), store


@pytest.mark.parametrize("by", ["all", "cell"])
def test_it_is_the_fixed_point_that_the_fit_in_one_piece_reaches(
    by: str, stored: tuple[Psi, FolderStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("defuse_core.distill.sharded.PART_CODES", 320)
    psi, store = stored
    spec = all_codes(by)
    found = distill_all(spec, psi, store, "", LocalCompute())
    failures = subsample_psi(spec, psi, store)  # all of them, since they are few
    whole = fit_mixtures(failures, spec.distill, spec.seed, silent).scenarios()
    assert found.converged and found.codes_used == whole.codes_used
    assert found.lower_bound == pytest.approx(whole.lower_bound, abs=1e-6)
    np.testing.assert_allclose(found.weights, whole.weights, atol=1e-5)
    np.testing.assert_allclose(found.means, whole.means, atol=1e-4)
    np.testing.assert_allclose(found.covariances, whole.covariances, atol=1e-4)
    np.testing.assert_array_equal(found.cells, whole.cells)
    np.testing.assert_array_equal(found.support, whole.support)
    assert found.dropped == whole.dropped


def test_from_a_sample_it_finds_what_all_codes_say(
    stored: tuple[Psi, FolderStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sample alone puts the means elsewhere than all codes do."""
    psi, store = stored
    spec = all_codes("all", max_components=3)
    whole = distill(spec, psi, store, "", progress=silent)
    monkeypatch.setattr("defuse_core.identify.SAMPLE_CODES", 60)
    sample = distill(spec, psi, store, "", progress=silent)
    found = distill_all(spec, psi, store, "", LocalCompute())
    order, other, short = (np.argsort(fit.means[:, 0]) for fit in (found, whole, sample))
    np.testing.assert_allclose(found.means[order], whole.means[other], atol=1e-3)
    assert np.abs(sample.means[short] - whole.means[other]).max() > 0.05


def test_codes_are_fitted_in_parts_only_where_a_sample_would_leave_some_out_and_that_is_wanted(
    stored: tuple[Psi, FolderStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    psi, store = stored

    class Noting(LocalCompute):
        def partitions(self, step: str, *rest: Any) -> Any:
            steps.append(step)
            return super().partitions(step, *rest)

    for most, max_codes, parts in ((psi.total, None, 0), (psi.total - 1, None, 1), (60, 100, 0)):
        steps: list[str] = []
        monkeypatch.setattr("defuse_core.identify.SAMPLE_CODES", most)
        monkeypatch.setattr("defuse_core.pipeline.SAMPLE_CODES", most)
        spec = all_codes("all", max_components=3, max_iterations=5).with_fields(
            "distill", max_codes=max_codes
        )
        run = SimpleNamespace(spec=spec.with_fields("review", tau=0.5), store=store)
        _scenarios(run, Noting(), psi, SimpleNamespace(data_fingerprint=""), None)
        assert len(steps) == parts


def test_the_number_of_cores_changes_nothing(tmp_path: Path) -> None:
    rng, store = np.random.default_rng(0), FolderStore(tmp_path)
    codes, labels = rng.standard_normal((400, 160)) @ rng.standard_normal((160, 160)), np.zeros(400, np.int64)
    found = sample_failures(codes.astype(np.float32), np.arange(400), labels, labels + 1)
    save_shard(store, Shard(found, 400, 400, 0, 0, 0.0, index=0))
    psi = Psi(np.array([400]), 400, 400, 0, 0, 0.0)
    spec = all_codes("all", max_components=2, max_iterations=2).with_fields("vae", latent_dim=160)
    fitted = []
    for cores in (1, 2):
        with threadpool_limits(cores):
            fitted.append(encode(distill_all(spec, psi, store, "", LocalCompute())))
    assert fitted[0] == fitted[1]


def test_a_cell_over_epsilon_that_the_sample_misses_is_one_component(
    stored: tuple[Psi, FolderStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    psi, store = stored
    spec = all_codes("cell", min_weight=0.002)  # the third cell holds 0.003 of the codes
    monkeypatch.setattr("defuse_core.identify.SAMPLE_CODES", 20)
    found = distill_all(spec, psi, store, "", LocalCompute())
    failures = subsample_psi(spec.with_fields("distill", max_codes=1000), psi, store)
    rare = failures.codes[failures.truth == 5]
    (number,) = np.flatnonzero(found.cells[:, 0] == 5)
    assert found.weights[number] == pytest.approx(0.003, abs=1e-6)
    assert not any(dropped.source == 5 for dropped in found.dropped)
    np.testing.assert_allclose(found.means[number], rare.mean(axis=0), atol=1.0)


@pytest.mark.parametrize("min_weight", [3 / 16, 0.05])
def test_cells_that_are_too_small_are_those_of_the_fit_in_one_piece(
    min_weight: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("defuse_core.distill.sharded.PART_CODES", 1)
    store, rng = FolderStore(tmp_path), np.random.default_rng(0)
    for index, truth in enumerate((np.repeat([0, 5], [6, 2]), np.repeat([0, 5, 7], [6, 1, 1]))):
        codes, source = rng.standard_normal((8, 4)).astype(np.float32), 8 * index + np.arange(8)
        found = sample_failures(codes, source, truth, truth + 1)
        save_shard(store, Shard(found, 8, 8, 0, 0, 0.0, index=index))
    psi, spec = Psi(np.array([8, 8]), 16, 16, 0, 0, 0.0), all_codes("cell", min_weight=min_weight)
    failures = subsample_psi(spec, psi, store)
    whole = fit_mixtures(failures, spec.distill, spec.seed, silent).scenarios()
    found = distill_all(spec, psi, store, "", LocalCompute())
    assert found.dropped == whole.dropped and found.dropped[-1].reason == "a single code is no cluster"
    assert (5 in found.cells[:, 0]) is (min_weight < 3 / 16)
    monkeypatch.setattr("defuse_core.distill.components.MOST_SMALL_CELLS", 0)
    together = distill_all(spec, psi, store, "", LocalCompute()).dropped
    assert [(one.cause, one.reason, one.support) for one in together] == [
        ("few images", "cells of too few images each", sum(one.support for one in found.dropped))
    ]


def test_anchored_components_keep_their_own_failures_and_those_of_one_photograph_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    centres, sizes = np.array([[0.0, 0.0], [40.0, 0.0], [0.0, 40.0]]), [60, 100, 140]
    codes = np.repeat(centres, sizes, axis=0) + np.random.default_rng(0).standard_normal((300, 2))
    source = np.concatenate([np.arange(60), np.full(100, 60), 61 + np.arange(140)])
    labels = np.repeat([[0, 0, 1], [1, 2, 2]], sizes, axis=1)  # three cells
    found = sample_failures(codes.astype(np.float32), source, *labels)
    store = FolderStore(tmp_path)
    save_shard(store, Shard(found, 300, 300, 0, 0, 0.0, index=0))
    train = Images(np.zeros((201, 1, 4, 4), np.uint8), np.zeros(201, np.int64))
    monkeypatch.setattr("defuse_core.distill.sharded.reopen_splits", lambda *_: SimpleNamespace(train=train))
    spec = all_codes("cell", max_components=3, min_weight=0.1).with_fields(
        "vae", decode="anchored", latent_dim=2
    )
    made = distill_all(spec, Psi(np.array([300]), 300, 300, 0, 0, 0.0), store, "", LocalCompute())
    np.testing.assert_allclose(made.means, centres[[2, 0]], atol=1)
    assert [dropped.reason for dropped in made.dropped] == [
        "too few photographs to hold out: all are of one photograph"
    ]
    assert made.failures is not None
    for mean, own in zip(made.means, made.failures.codes, strict=True):
        assert np.abs(own - mean).max() < 10


def test_failures_of_a_cell_that_the_sample_misses_are_read_from_all_shards(
    stored: tuple[Psi, FolderStore],
) -> None:
    psi, store = stored
    everything = subsample_psi(all_codes("cell").with_fields("distill", max_codes=1000), psi, store)
    found = _all_of_cell(psi, store, (5, 6))
    assert set(found.truth.tolist()) == {5} and set(found.predicted.tolist()) == {6}
    np.testing.assert_array_equal(found.codes, everything.codes[everything.truth == 5])


def test_a_part_whose_shards_hold_no_code_has_no_cell(stored: tuple[Psi, FolderStore]) -> None:
    psi, store = stored
    assert part_spans(np.array([70_000, 0])) == [(0, 1), (1, 2)]
    assert load_part(store, psi.fingerprint, "cell", 1, 2).rows == {}


def test_parts_cover_all_shards_in_order_and_depend_on_psi_alone() -> None:
    codes = np.random.default_rng(0).integers(0, 40_000, 5_000)
    spans = part_spans(codes)
    assert spans[0][0] == 0 and spans[-1][1] == len(codes)
    assert all(one[1] == other[0] for one, other in itertools.pairwise(spans))
    held = [codes[first:after].sum() for first, after in spans]
    assert min(held[:-1]) >= 2**16 and len(spans) <= 1024
    assert part_spans(np.array([3, 0, 2])) == [(0, 3)]


def test_sums_over_a_part_are_those_over_its_cells(stored: tuple[Psi, FolderStore]) -> None:
    psi, store = stored
    part = load_part(store, psi.fingerprint, "cell", 2, 5)
    assert isinstance(part, CellCodes) and set(part.rows) == {(0, 1), (1, 2), (5, 6)}
    center, table = np.ones(4), one_component_coefficients(4)
    (sums, _) = part_sums(part, {(1, 2): center}, {(1, 2): table})[(1, 2)]
    codes = part.of((1, 2)).astype(np.float64) - 1
    np.testing.assert_allclose(sums[0, :5], [len(codes), *codes.sum(axis=0)], rtol=1e-12)


def test_all_of_psi_is_fitted_by_torch_only() -> None:
    with pytest.raises(RunFileError, match="max_codes: null goes with engine: torch"):
        tiny(distill={"max_codes": None, "engine": "scikit-learn"})


def summary(codes: int, tracks: list[int]) -> CellSummary:
    return CellSummary(codes, len(tracks), np.array(tracks), np.ones(2))


def test_a_part_is_asked_only_for_the_cells_that_it_holds() -> None:
    class Held(dict[Cell, CellSummary]):
        def __contains__(self, key: object) -> bool:
            raise AssertionError("every part is asked for every cell")

    parts = [
        Held({(0, 1): summary(2, [7]), (5, 6): summary(3, [7, 8])}),
        Held({(0, 0): summary(1, [9]), (0, 1): summary(4, [7, 8, 9])}),
    ]
    found = _merged_cells(parts)
    assert [*found] == [(0, 0), (0, 1), (5, 6)]
    merged = found[0, 1]
    assert (merged.count, merged.support, merged.total.tolist()) == (6, 4, [2.0, 2.0])
    assert merged.units.tolist() == [7, 8, 9]  # a track of both parts counts once


def test_the_shards_are_read_once_for_a_sample_and_again_where_it_is_damaged_or_one_was_made_again(
    stored: tuple[Psi, FolderStore], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (psi, store), read, spec = stored, list[str](), tiny(distill={"max_codes": 400})

    def noting(self: FolderStore, key: str, read_file: Any = FolderStore.read) -> bytes:
        read.append(key)
        return read_file(self, key)

    def sample_of(psi: Psi) -> tuple[Any, int]:
        read.clear()
        codes = subsample_psi(spec, psi, store).codes
        return codes, sum(key.startswith("psi/") for key in read)

    monkeypatch.setattr(FolderStore, "read", noting)
    drawn, count = sample_of(psi)
    assert (len(drawn), count) == (400, 4)
    again, count = sample_of(psi)
    np.testing.assert_array_equal(again, drawn)
    assert count == 0 and not caplog.messages

    store.write("psi_sample.safetensors", b"")
    again, count = sample_of(psi)
    np.testing.assert_array_equal(again, drawn)
    assert count == 4 and "psi_sample.safetensors: expected a Shard artefact, found unreadable" in caplog.text

    last = shard_of_psi(store, "", 4)
    save_shard(
        store, replace(last, seconds=1.0, failures=replace(last.failures, codes=last.failures.codes + 1))
    )
    again, count = sample_of(replace(psi, worker_seconds=1.0))
    assert count == 4 and (again != drawn).any()
