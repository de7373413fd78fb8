"""Identification on Ray finds the same Psi, whatever happens to its workers; what cannot be retried is named."""

from __future__ import annotations

import math
import os
import pickle
import tempfile
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cluster.compute import RayCompute
from cluster.identify import IdentifyContext, ShardScheduler, ShardWorker, shard_errors
from defuse_core.artifacts import Models, Psi
from defuse_core.config import RunFile
from defuse_core.data import PictureFiles, open_splits
from defuse_core.distill.components import distill
from defuse_core.errors import ComputeError, DataError, InputError, RunBusyError
from defuse_core.identify import finished_shards, gather_shards, shard_fingerprint, shard_key
from defuse_core.models import build_classifier, build_vae, weights_of
from defuse_core.protocols import silent
from defuse_core.store import FolderStore, Store
from tests.cluster.checks import (
    Lines,
    assert_equal_psi,
    assert_same_psi,
    kill_soon,
    wait_for_the_end_of,
)
from tests.cluster.fakes import (
    CountingStore,
    DeadlyStore,
    GatedStore,
    HiccupStore,
    OtherWork,
    OwnDiskStore,
    RefusingStore,
    StumblingStore,
    TakenOverStore,
)
from tests.conftest import tiny
from tests.sample_components import FIT
from tests.waiting import WAIT_S, wait_until

pytestmark = pytest.mark.usefixtures("ray_session")
SHARDS = 10  # shards of the tiny run


@settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    workers=st.integers(1, 2),
    order=st.permutations(range(SHARDS)),
    there=st.sets(st.integers(0, SHARDS - 1), max_size=4),
    kill_after=st.integers(0, 5),
)
def test_any_number_of_workers_any_order_and_any_kill_give_the_same_psi(
    tiny_models: Models,
    local_psi: Psi,
    local_store: FolderStore,
    lines: Lines,
    workers: int,
    order: list[int],
    there: set[int],
    kill_after: int,
) -> None:
    """A worker is killed after so many shards; some shards are there from an earlier driver."""
    spec = tiny(resources={"workers": workers})
    with tempfile.TemporaryDirectory() as name:
        store = GatedStore(Path(name) / "run", after=len(there) + kill_after)  # holds them for the kill
        for key in local_store.list("psi/"):
            if int(Path(key).stem) in there:
                FolderStore(store.folder).write(key, local_store.read(key))
        lines.lines.clear()
        killer = kill_soon(lines, "identify: worker", lambda: len(store.list()) >= store.after, store.open)
        records = finished_shards(store, shard_fingerprint(spec, tiny_models))
        with RayCompute(None, spec) as compute:
            context = compute._identify_context(spec, tiny_models, store, None)
            waiting = [index for index in order if index not in records]
            records |= ShardScheduler(context, waiting, SHARDS).run()
        killer.join()
        assert store.gate.exists()
        assert np.array_equal(gather_shards(records).codes, local_psi.codes)
        assert_same_psi(SHARDS, store, local_store)


@pytest.fixture
def spoilt(tmp_path: Path) -> Iterator[tuple[RunFile, Models, str]]:
    """A folder of 160 pictures, one of which becomes unreadable after training: its name."""
    rng = np.random.default_rng(0)
    for index in range(160):
        folder = tmp_path / "images" / "train" / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16), dtype=np.uint8)).save(folder / f"{index:03}.png")
    data = {"name": "folder", "root": str(tmp_path / "images"), "validation_share": 0.0, "train_images": None}
    spec = tiny(data=data)
    splits = open_splits(spec.data, spec.seed)
    models = Models(
        weights_of(build_classifier(spec, 2)), weights_of(build_vae(spec)), splits.classes, splits.counts(),
        splits.fingerprint(), {}, (), (), 0.0, 0.0, np.zeros(4), FIT, class_images={},
    )  # fmt: skip
    read_at_once = np.linspace(0, 159, 128).astype(int)  # by the fingerprint, when the data set is opened
    row = next(row for row in range(128, 160) if row not in read_at_once)
    assert isinstance(splits.train.pixels, PictureFiles)
    path = Path(splits.train.pixels.paths[row])
    path.write_bytes(b"not a picture any more")
    yield spec, models, path.name


def test_a_picture_that_cannot_be_read_stops_the_run_at_once_and_is_named_with_its_shard(
    spoilt: tuple[RunFile, Models, str], tmp_path: Path, lines: Lines
) -> None:
    spec, models, name = spoilt
    with RayCompute(None, spec) as compute, pytest.raises(DataError) as raised:
        compute.identify(spec, models, FolderStore(tmp_path / "run"))
    line = str(raised.value)
    assert "shard 4 of 5 (training images 128 to 159) failed" in line
    assert name in line
    assert not any("again" in line or "repeating" in line for line in lines.lines)


def test_as_many_workers_as_fit_find_the_same_psi_and_components(
    tiny_models: Models, local_psi: Psi, local_store: FolderStore, tmp_path: Path
) -> None:
    spec = tiny(resources={"workers": "auto"})
    fingerprint = tiny_models.data_fingerprint
    with RayCompute(None, spec) as compute:
        psi = compute.identify(spec, tiny_models, FolderStore(tmp_path))
        scenarios = compute.task("distill", distill, spec, psi, FolderStore(tmp_path), fingerprint)
    assert_equal_psi(psi, local_psi)
    assert_same_psi(len(psi.codes), FolderStore(tmp_path), local_store)
    here = distill(spec, local_psi, local_store, fingerprint, progress=silent)
    assert np.array_equal(scenarios.means, here.means)
    assert np.array_equal(scenarios.covariances, here.covariances)


def test_shards_that_are_there_are_not_made_again(
    tiny_spec: RunFile, tiny_models: Models, local_psi: Psi, local_store: FolderStore, tmp_path: Path
) -> None:
    store, kept = CountingStore(tmp_path / "run"), [0, 1, 4]
    for key in local_store.list("psi/"):
        if int(Path(key).stem) in kept:
            FolderStore(store.folder).write(key, local_store.read(key))
    told, count = list[object](), len(local_psi.codes)
    with RayCompute(None, tiny_spec, lambda *args: told.append(args)) as compute:
        assert_equal_psi(compute.identify(tiny_spec, tiny_models, store), local_psi)
    assert ("perturbing training images", count, count, "shards") in told
    made = [index for index in range(count) if int(store.writes(shard_key(index)))]
    assert made == [index for index in range(count) if index not in kept]


def test_waiting_for_what_other_work_holds_is_said(
    tiny_spec: RunFile,
    tiny_models: Models,
    local_psi: Psi,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("cluster.resources.WARN_AFTER_S", 0.5)
    other = OtherWork.remote()
    ray.get(other.began.remote())

    def end_other_work() -> None:
        wait_until(lambda: "identify: waiting for 1 CPU and 0 GPU to be free on the cluster" in caplog.text)
        ray.kill(other)

    with ThreadPoolExecutor(1) as pool, RayCompute(None, tiny_spec) as compute:
        ended = pool.submit(end_other_work)
        psi = compute.identify(tiny_spec, tiny_models, FolderStore(tmp_path))
        ended.result()
    assert_equal_psi(psi, local_psi)


def test_a_killed_worker_costs_only_what_it_had_in_hand(
    tiny_spec: RunFile,
    tiny_models: Models,
    local_psi: Psi,
    local_store: FolderStore,
    tmp_path: Path,
    lines: Lines,
) -> None:
    store = CountingStore(tmp_path / "run", pause_s=0.5)
    killer = kill_soon(lines, "identify: worker", lambda: bool(store.list("psi/")))
    with RayCompute(None, tiny_spec) as compute:
        psi = compute.identify(tiny_spec, tiny_models, store)
    killer.join()
    assert_equal_psi(psi, local_psi)
    assert_same_psi(len(psi.codes), store, local_store)
    assert any("was lost" in line for line in lines.lines)
    assert sum(int(store.writes(shard_key(index))) for index in range(len(psi.codes))) <= len(psi.codes) + 3


def test_a_store_that_fails_now_and_then_is_borne_with(
    tiny_spec: RunFile,
    tiny_models: Models,
    local_psi: Psi,
    local_store: FolderStore,
    tmp_path: Path,
    lines: Lines,
) -> None:
    store = StumblingStore(tmp_path / "run", every=4)
    with RayCompute(None, tiny_spec) as compute:
        psi = compute.identify(tiny_spec, tiny_models, store)
    assert_equal_psi(psi, local_psi)
    assert_same_psi(len(psi.codes), store, local_store)
    assert any("not stored, trying again" in line for line in lines.lines)


def test_a_shard_that_fails_once_is_made_again(
    tiny_spec: RunFile,
    tiny_models: Models,
    local_psi: Psi,
    local_store: FolderStore,
    tmp_path: Path,
    lines: Lines,
) -> None:
    store = HiccupStore(tmp_path / "run", "psi/000003")
    with RayCompute(None, tiny_spec) as compute:
        psi = compute.identify(tiny_spec, tiny_models, store)
    assert_equal_psi(psi, local_psi)
    assert_same_psi(len(psi.codes), store, local_store)
    (told,) = [line for line in lines.lines if "repeating shard 3" in line]
    assert told.endswith("shard 3 of 10 (training images 96 to 127) failed: RuntimeError: CUDA out of memory")


def test_a_shard_that_runs_out_of_memory_says_what_to_do() -> None:
    with (
        pytest.raises(
            ComputeError, match="shard 3 failed: OutOfMemoryError: CUDA .* fewer tasks run on a node"
        ),
        shard_errors("shard 3"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_a_shard_that_fails_twice_stops_the_run_and_is_named(
    tiny_spec: RunFile, tiny_models: Models, tmp_path: Path, lines: Lines
) -> None:
    store = RefusingStore(tmp_path / "run", "psi/000003", with_bug=True)
    with RayCompute(None, tiny_spec) as compute, pytest.raises(ComputeError) as raised:
        compute.identify(tiny_spec, tiny_models, store)
    line = str(raised.value)
    assert "shard 3 of 10 (training images 96 to 127)" in line
    assert line.endswith("ZeroDivisionError: of a pixel by nothing")
    assert len([line for line in lines.lines if "repeating shard 3" in line]) == 1


def test_a_shard_that_kills_its_worker_each_time_stops_the_run_and_is_named(
    tiny_spec: RunFile, tiny_models: Models, tmp_path: Path
) -> None:
    store = DeadlyStore(tmp_path / "run", "psi/000003")
    with RayCompute(None, tiny_spec) as compute, pytest.raises(ComputeError) as raised:
        compute.identify(tiny_spec, tiny_models, store)
    assert "shard 3 of 10 (training images 96 to 127) was lost 5 times with its worker" in str(raised.value)


class BrokenNodes(IdentifyContext):
    """Nodes that cannot set up the environment of the workers with these numbers."""

    broken: Collection[int] = ()

    def start_worker(self, number: int) -> Any:
        if number not in self.broken:
            return super().start_worker(number)
        remote = ray.remote(ShardWorker).options(
            max_restarts=-1, runtime_env={"working_dir": "https://127.0.0.1:9/none.zip"}
        )
        return remote.remote(self.spec, self.store, self.profile)


def scheduler_on_broken_nodes(
    compute: RayCompute, models: Models, store: Store, broken: Collection[int]
) -> ShardScheduler:
    context = BrokenNodes(**vars(compute._identify_context(compute.spec, models, store, None)))
    context.broken = broken
    return ShardScheduler(context, range(SHARDS), SHARDS)


def end_in_time(store: FolderStore) -> None:
    """End an identification that goes on for ever."""
    end = time.monotonic() + WAIT_S

    def require_lock() -> None:
        assert time.monotonic() < end, "the identification does not end"

    store.require_lock = require_lock  # type: ignore[method-assign]


def test_a_worker_whose_node_cannot_set_up_the_environment_is_dropped(
    tiny_models: Models, local_psi: Psi, tmp_path: Path, lines: Lines
) -> None:
    store = FolderStore(tmp_path)
    with RayCompute(None, tiny(resources={"workers": 2})) as compute:
        scheduler = scheduler_on_broken_nodes(compute, tiny_models, store, [1])
        scheduler.waiting.clear()  # all wait until worker 1 is dropped
        end_in_time(store)
        while not scheduler.workers or scheduler.workers[1].state != "dropped":
            scheduler._scale()
            for reference in scheduler._wait_for_results():
                scheduler._handle_result(reference)
            store.require_lock()
        scheduler.waiting.extend(range(SHARDS))
        scheduler._dispatch(scheduler.workers[0])
        assert np.array_equal(gather_shards(scheduler.run()).codes, local_psi.codes)
    (said,) = [line for line in lines.lines if "going on without a worker: worker 1 does not start" in line]
    assert "a node could not set up the job's environment" in said


def test_nodes_none_of_which_can_set_up_the_environment_are_an_error(
    tiny_models: Models, tmp_path: Path
) -> None:
    store = FolderStore(tmp_path)
    with RayCompute(None, tiny(resources={"workers": 2})) as compute:
        scheduler = scheduler_on_broken_nodes(compute, tiny_models, store, [0, 1])
        end_in_time(store)
        with pytest.raises(
            ComputeError, match=r"^identify: worker \d does not start: a node could not set up"
        ):
            scheduler.run()


def test_a_worker_whose_ping_fails_is_pinged_again_later_and_not_at_once(
    tiny_models: Models, tmp_path: Path
) -> None:
    crashed = ray.remote(lambda: os._exit(1)).options(max_retries=0).remote()
    with RayCompute(None, tiny(resources={"workers": 1})) as compute:
        scheduler = ShardScheduler(
            compute._identify_context(compute.spec, tiny_models, FolderStore(tmp_path), None), [0], 1
        )
        scheduler._scale()
        (worker,) = scheduler.workers
        scheduler.pings.clear()
        scheduler._handle_ping(crashed, worker)
        assert not scheduler.pings
        scheduler.scaled_at = -math.inf
        scheduler._scale()
        assert list(scheduler.pings.values()) == [worker]
        ray.kill(worker.actor)


def test_a_store_that_the_workers_do_not_share_is_said_with_the_first_shard(
    tiny_spec: RunFile, tiny_models: Models, tmp_path: Path
) -> None:
    store = OwnDiskStore(tmp_path / "run")
    with (
        RayCompute(None, tiny_spec) as compute,
        pytest.raises(
            InputError, match="does not find it there; the store .* must be one that all nodes share"
        ),
    ):
        compute.identify(tiny_spec, tiny_models, store)


def test_a_driver_that_lost_its_run_ends_its_workers(
    tiny_spec: RunFile, tiny_models: Models, tmp_path: Path, lines: Lines
) -> None:
    store = TakenOverStore(tmp_path / "run", pause_s=1.0)
    with RayCompute(None, tiny_spec) as compute:
        with pytest.raises(RunBusyError, match="another driver took the run over"):
            compute.identify(tiny_spec, tiny_models, store)
        wait_for_the_end_of(set(lines.processes("identify: worker")))


def test_a_worker_of_a_driver_that_lost_its_run_is_refused_and_nothing_is_tried_again(
    tiny_spec: RunFile, tiny_models: Models, tmp_path: Path, lines: Lines
) -> None:
    store = FolderStore(tmp_path / "run")
    with store.lock():
        lost = pickle.loads(pickle.dumps(store))
    with (
        RayCompute(None, tiny_spec) as compute,
        pytest.raises(RunBusyError, match="held this run; .* holds it now"),
    ):
        lost.require_lock = lambda: None  # the driver has not noticed yet
        compute.identify(tiny_spec, tiny_models, lost)
    assert store.list() == []
    assert not any("again" in line or "repeating" in line for line in lines.lines)
