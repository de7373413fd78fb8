"""Parts of data on Ray: results equal those in one process, whatever happens to the workers."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from cluster.compute import RayCompute
from cluster.resources import Resources
from defuse_core.artifacts import Models, Psi, Shard
from defuse_core.distill.sharded import distill_all
from defuse_core.errors import RunBusyError, RunFileError, StoreError
from defuse_core.identify import save_shard
from defuse_core.local import LocalCompute
from defuse_core.store import FolderStore
from tests.cluster.checks import assert_equal_psi
from tests.cluster.fakes import (
    OtherWork,
    Tally,
    add,
    load_numbers,
    load_without_store,
    rest,
    shouting,
    sum_or_die_once,
)
from tests.conftest import tiny
from tests.sample_components import sample_failures
from tests.waiting import WAIT_S, wait_until

pytestmark = pytest.mark.usefixtures("ray_session")
SPEC = {
    "distill": {"by": "cell", "max_codes": None, "engine": "torch", "max_iterations": 8},
    "resources": {"workers": 2},
}


def test_a_function_is_called_with_every_part_in_order_and_parts_are_loaded_once(tmp_path: Path) -> None:
    with RayCompute(None, tiny(**SPEC)) as compute:
        parts = compute.partitions("distill", load_numbers, [(tmp_path / "loads", n) for n in range(7)])
        assert parts.map(add, 1) == [5 * n + 1 for n in range(7)]
        assert parts.map(sum_or_die_once, tmp_path / "killed") == [5 * n for n in range(7)]
    assert (tmp_path / "killed").exists()
    assert int(Tally(tmp_path / "loads")) == 7


def test_the_first_part_that_cannot_be_loaded_ends_the_loading(tmp_path: Path) -> None:
    with RayCompute(None, tiny(**SPEC)) as compute, pytest.raises(StoreError, match="^the bucket is away$"):
        compute.partitions("distill", load_without_store, [(tmp_path / "loads", n) for n in range(12)])
    assert int(Tally(tmp_path / "loads")) < 11


def test_fewer_nodes_than_the_run_file_asks_for_are_an_error_at_connection_alone(
    tmp_path: Path, tiny_models: Models, local_psi: Psi, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, store = tiny(**SPEC), FolderStore(tmp_path / "run")
    with RayCompute(None, spec) as compute:
        compute.task("train", shouting, "a")
        monkeypatch.setattr("cluster.resources.nodes", lambda: [Resources(1, 0)])
        parts = compute.partitions("distill", load_numbers, [(tmp_path / "loads", n) for n in range(3)])
        assert parts.map(add, 1) == [1, 6, 11]
        assert_equal_psi(compute.identify(spec, tiny_models, store), local_psi)
    with RayCompute(None, spec) as compute, pytest.raises(RunFileError, match="has room for 1"):
        compute.task("train", shouting, "a")


def test_two_calls_a_worker_are_under_way_at_once_and_all_have_ended_before_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, ended, polls, wait = list[int](), list[int](), list[None](), ray.wait

    def noted(running: list[Any], **options: Any) -> Any:
        ready, left = wait(running, **options)
        started.append(len(running))
        ended.append(len(ready))
        return ready, left

    monkeypatch.setattr(ray, "wait", noted)
    with RayCompute(None, tiny(**SPEC | {"resources": {"workers": 1}})) as compute:
        parts = compute.partitions("distill", load_numbers, [(tmp_path / "loads", n) for n in range(7)])
        assert (max(started), sum(ended)) == (2, 7)
        started.clear()
        ended.clear()
        monkeypatch.setattr(compute.listener, "flush", lambda: polls.append(None))
        assert parts.map(add, 1) == [5 * n + 1 for n in range(7)]
        assert (max(started), sum(ended)) == (2, 7)
        assert len(polls) >= 7  # what workers report is shown meanwhile


def test_waiting_for_what_other_work_holds_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cluster.resources.WARN_AFTER_S", 0.5)
    monkeypatch.setattr("cluster.resources.CHECK_EVERY_S", 0.1)
    other = OtherWork.remote()
    ray.get(other.began.remote())

    def end_other_work() -> None:
        with contextlib.suppress(AssertionError):
            wait_until(lambda: "waiting for" in caplog.text, within_s=WAIT_S / 4)
        ray.kill(other)

    with ThreadPoolExecutor(1) as pool, RayCompute(None, tiny(**SPEC)) as compute:
        pool.submit(end_other_work)
        compute.partitions("distill", load_numbers, [(tmp_path / "loads", 1)])
    assert "distill: waiting for 1 CPU and 0 GPU to be free on the cluster" in caplog.messages


def test_a_driver_that_lost_its_run_cancels_the_calls_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled, cancel = list[Any](), ray.cancel
    monkeypatch.setattr(ray, "cancel", lambda task, **how: cancelled.append(task) or cancel(task, **how))

    def lost() -> None:
        raise RunBusyError("another process has this run")

    with RayCompute(None, tiny(**SPEC)) as compute:
        parts = compute.partitions("distill", load_numbers, [(tmp_path / "loads", n) for n in range(3)])
        compute.require_lock = lost
        with pytest.raises(RunBusyError):
            parts.map(rest, 600)
    assert len(cancelled) == 3


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Psi, FolderStore]:
    """1,000 codes of two cells in 10 shards."""
    rng, store = np.random.default_rng(0), FolderStore(tmp_path / "run")
    for index in range(10):
        codes = (rng.standard_normal((100, 4)) + 6 * rng.integers(0, 2, (100, 1))).astype(np.float32)
        truth = rng.integers(0, 2, 100)
        failures = sample_failures(codes, 100 * index + np.arange(100), truth, truth + 1)
        save_shard(store, Shard(failures, 100, 100, 0, 0, 0.0, index=index))
    return Psi(np.full(10, 100), 1000, 1000, 0, 0, 0.0), store


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
