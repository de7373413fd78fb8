"""RayCompute gives what LocalCompute gives, whatever happens to its workers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.compute import RayCompute
from cluster.session import connect
from defuse_core.artifacts import Corrections, FailedTrial, Models, Psi, Sweep
from defuse_core.config import RunFile
from defuse_core.correct import trial_key
from defuse_core.distill import distill
from defuse_core.errors import ComputeError, DataError, InputError, RunFileError, StoreError
from defuse_core.identify import shard_key
from defuse_core.progress import silent
from defuse_core.store import FolderStore
from tests.cluster.checks import Lines, assert_same_psi
from tests.cluster.fakes import (
    CountingStore,
    DeadlyStore,
    HiccupStore,
    OwnDiskStore,
    RefusingStore,
    StumblingStore,
    dying_once,
    failing,
    shouting,
)
from tests.conftest import tiny

pytestmark = pytest.mark.usefixtures("ray_session")


def counts(psi: Psi) -> Psi:
    """Psi without what depends on the clock."""
    return replace(psi, worker_seconds=0.0)


def assert_equal_psi(psi: Psi, other: Psi) -> None:
    assert np.array_equal(psi.codes, other.codes)
    assert vars(counts(psi)) | {"codes": 0} == vars(counts(other)) | {"codes": 0}


def assert_equal_sweeps(sweep: Sweep, other: Sweep) -> None:
    assert (sweep.rows, sweep.chosen, sweep.failed) == (other.rows, other.chosen, other.failed)
    assert all(np.array_equal(sweep.weights[key], other.weights[key]) for key in other.weights)


# ---- joining


@pytest.mark.parametrize("address", ["http://head:8265", "ray://head:10001"])
def test_an_address_of_another_kind_is_refused_with_what_to_do(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.session.ray.is_initialized", lambda: False)
    with pytest.raises(InputError, match="expected HOST:PORT .* `defuse submit`"):
        connect(address)


def test_images_that_the_nodes_of_a_joined_cluster_could_not_find_are_refused() -> None:
    spec = tiny(data={"name": "npz", "root": "images.npz"})
    with (
        RayCompute("head:6379", spec) as compute,
        pytest.raises(RunFileError, match="data.root images.npz: expected"),
    ):
        compute.task("train", shouting, "a")


def test_a_store_that_the_workers_do_not_share_is_said_with_the_first_shard(
    tiny_spec: RunFile, tiny_models: Models, tmp_path: Path
) -> None:
    store = OwnDiskStore(tmp_path / "run")
    with (
        RayCompute(None, tiny_spec) as compute,
        pytest.raises(
            InputError, match="is not there for this process; --store must be what all nodes share"
        ),
    ):
        compute.identify(tiny_spec, tiny_models, store)


def test_trials_that_another_disk_holds_are_said(
    tiny_spec: RunFile, tiny_models: Models, fixes: Corrections, tmp_path: Path
) -> None:
    spec = tiny(correct={"lambdas": [1.0], "epochs": 1})
    with RayCompute(None, spec) as compute, pytest.raises(InputError, match="--store must be what all nodes"):
        compute.sweep(spec, tiny_models, fixes, None, OwnDiskStore(tmp_path / "run"))


# ---- tasks


def test_a_task_passes_on_its_progress_its_log_and_its_result(tiny_spec: RunFile, lines: Lines) -> None:
    told = []
    with RayCompute(None, tiny_spec, lambda *args: told.append(args)) as compute:
        assert compute.task("review", shouting, "help") == "HELP"
    assert told[-1] == ("shouting", 3, 3, "letters")
    assert "shouted help" in lines.lines


def test_an_error_of_the_tree_comes_through_as_itself(tiny_spec: RunFile) -> None:
    with RayCompute(None, tiny_spec) as compute, pytest.raises(DataError, match=r"^cat\.png: not a cat$"):
        compute.task("train", failing, DataError("cat.png: not a cat"))


def test_another_error_is_a_compute_error_in_one_line(tiny_spec: RunFile) -> None:
    with RayCompute(None, tiny_spec) as compute, pytest.raises(ComputeError) as raised:
        compute.task("train", failing, KeyError("weights"))
    assert str(raised.value) == "train: KeyError: 'weights'"


def test_a_task_whose_process_is_killed_is_run_again(tiny_spec: RunFile, tmp_path: Path) -> None:
    with RayCompute(None, tiny_spec) as compute:
        assert compute.task("train", dying_once, tmp_path / "marker") == "alive"


@pytest.mark.parametrize(
    ("resources", "line"),
    [
        (
            {"workers": 3},
            r"3 workers of 1 CPU and 0 GPU each asked for, .* has room for 2 \(it has 2 CPU and 0 GPU",
        ),
        ({"gpus_per_worker": 0.5}, r"a worker of 1 CPU and 0.5 GPU each asked for, .* has room for 0"),
        ({"cpus_per_worker": 4}, r"a worker of 4 CPU and 0 GPU each asked for, .* has room for 0"),
    ],
)
def test_asking_for_more_than_there_is_is_said_at_once(resources: dict[str, object], line: str) -> None:
    begun = time.monotonic()
    with RayCompute(None, tiny(resources=resources)) as compute, pytest.raises(RunFileError, match=line):
        compute.task("train", shouting, "never")
    assert time.monotonic() - begun < 5


# ---- identification


@pytest.mark.parametrize("workers", [1, "auto"])
def test_any_number_of_workers_finds_the_same_psi(
    workers: object, tiny_models: Models, local_psi: Psi, local_store: FolderStore, tmp_path: Path
) -> None:
    spec = tiny(resources={"workers": workers})
    with RayCompute(None, spec) as compute:
        psi = compute.identify(spec, tiny_models, FolderStore(tmp_path))
        scenarios = compute.task("distill", distill, spec, psi, FolderStore(tmp_path))
    assert_equal_psi(psi, local_psi)
    assert_same_psi(len(psi.codes), FolderStore(tmp_path), local_store)
    here = distill(spec, local_psi, local_store, progress=silent)
    assert np.array_equal(scenarios.means, here.means)
    assert np.array_equal(scenarios.covariances, here.covariances)


def test_shards_that_are_there_are_not_made_again(
    tiny_spec: RunFile, tiny_models: Models, local_psi: Psi, local_store: FolderStore, tmp_path: Path
) -> None:
    store, kept = CountingStore(tmp_path / "run"), [0, 1, 4]
    for key in local_store.list("psi/"):
        if int(Path(key).stem) in kept:
            FolderStore(store.folder).write(key, local_store.read(key))
    with RayCompute(None, tiny_spec) as compute:
        assert_equal_psi(compute.identify(tiny_spec, tiny_models, store), local_psi)
    made = [index for index in range(len(local_psi.codes)) if int(store.writes(shard_key(index)))]
    assert made == [index for index in range(len(local_psi.codes)) if index not in kept]


def kill_soon(lines: Lines, beginning: str, when: Callable[[], bool]) -> threading.Thread:
    """Kill the newest process told of in lines that begin so, once `when`."""

    def wait_and_kill() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            processes = lines.processes(beginning)
            if processes and when():
                os.kill(processes[-1], signal.SIGKILL)
                return
            time.sleep(0.02)

    thread = threading.Thread(target=wait_and_kill)
    thread.start()
    return thread


def test_a_killed_worker_costs_only_what_it_had_in_hand(
    tiny_spec: RunFile,
    tiny_models: Models,
    local_psi: Psi,
    local_store: FolderStore,
    tmp_path: Path,
    lines: Lines,
) -> None:
    store = CountingStore(tmp_path / "run", pause_s=0.2)
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
    (told,) = [line for line in lines.lines if "shard 3 again" in line]
    assert told.endswith("shard 3 of 10 (training images 96 to 127) failed: RuntimeError: CUDA out of memory")


def test_a_shard_that_fails_twice_stops_the_run_and_is_named(
    tiny_spec: RunFile, tiny_models: Models, tmp_path: Path, lines: Lines
) -> None:
    store = RefusingStore(tmp_path / "run", "psi/000003", with_bug=True)
    with RayCompute(None, tiny_spec) as compute, pytest.raises(ComputeError) as raised:
        compute.identify(tiny_spec, tiny_models, store)
    line = str(raised.value)
    assert "shard 3 of 10 (training images 96 to 127)" in line
    assert line.endswith("ZeroDivisionError: of a pixel by nothing")
    assert len([line for line in lines.lines if "shard 3 again" in line]) == 1


def test_a_shard_that_kills_its_worker_each_time_stops_the_run_and_is_named(
    tiny_spec: RunFile, tiny_models: Models, tmp_path: Path
) -> None:
    store = DeadlyStore(tmp_path / "run", "psi/000003")
    with RayCompute(None, tiny_spec) as compute, pytest.raises(ComputeError) as raised:
        compute.identify(tiny_spec, tiny_models, store)
    assert "shard 3 of 10 (training images 96 to 127) was lost 5 times with its worker" in str(raised.value)


# ---- the sweep


def test_the_sweep_equals_the_local_one(
    tiny_spec: RunFile, tiny_models: Models, fixes: Corrections, local_sweep: Sweep, tmp_path: Path
) -> None:
    told = []
    with RayCompute(None, tiny_spec, lambda *args: told.append(args)) as compute:
        sweep = compute.sweep(tiny_spec, tiny_models, fixes, None, FolderStore(tmp_path))
    assert_equal_sweeps(sweep, local_sweep)
    assert ("fine-tuning over λ", 6, 6, "epochs") in told


def test_a_trial_is_shown_under_the_name_of_its_step(
    tiny_spec: RunFile, tiny_models: Models, fixes: Corrections, tmp_path: Path, lines: Lines
) -> None:
    titles = set()

    def look(*told: object) -> None:
        for process in lines.processes("correct: λ")[-1:]:
            titles.add(Path(f"/proc/{process}/cmdline").read_bytes().split(b".")[0].strip(b"\0"))

    spec = tiny(resources={"workers": 1})
    with RayCompute(None, spec, look) as compute:
        compute.sweep(spec, tiny_models, fixes, None, CountingStore(tmp_path / "run", pause_s=0.1))
    assert titles == {b"ray::correct"}


def test_a_sweep_over_nothing_starts_nothing(tiny_spec: RunFile, tiny_models: Models, tmp_path: Path) -> None:
    none = Corrections(
        np.zeros(0, int), np.zeros(0, int), np.zeros((0, 24, 4), np.float32), np.zeros((0, 24, 4), np.float32)
    )
    with RayCompute(None, tiny_spec) as compute:
        sweep = compute.sweep(tiny_spec, tiny_models, none, None, FolderStore(tmp_path))
        assert compute.relay is None
    assert sweep.weights == {}


def test_a_killed_trial_goes_on_at_its_last_finished_epoch(
    tiny_spec: RunFile, tiny_models: Models, fixes: Corrections, tmp_path: Path, lines: Lines
) -> None:
    spec = tiny(correct={"lambdas": [1.0], "epochs": 4})
    with RayCompute(None, spec) as compute:
        undisturbed = compute.sweep(spec, tiny_models, fixes, None, FolderStore(tmp_path / "undisturbed"))
        store = CountingStore(tmp_path / "run", pause_s=0.5)
        lines.lines.clear()
        writes = store.writes(trial_key(1.0))
        killer = kill_soon(lines, "correct: λ = 1", lambda: int(writes) == 2)
        sweep = compute.sweep(spec, tiny_models, fixes, None, store)
    killer.join()
    assert len(set(lines.processes("correct: λ = 1"))) == 2
    assert int(writes) == 4
    assert_equal_sweeps(sweep, undisturbed)


def test_a_trial_that_fails_for_good_is_left_out_and_told(
    tiny_spec: RunFile, tiny_models: Models, fixes: Corrections, local_sweep: Sweep, tmp_path: Path
) -> None:
    store = RefusingStore(tmp_path / "run", trial_key(1.0), with_bug=True)
    with RayCompute(None, tiny_spec) as compute:
        sweep = compute.sweep(tiny_spec, tiny_models, fixes, None, store)
    assert sweep.failed == (FailedTrial(1.0, "ZeroDivisionError: of a pixel by nothing"),)
    assert sweep.rows == tuple(row for row in local_sweep.rows if row.lam != 1.0)


def test_a_store_that_fails_leaves_no_lambda_out_but_stops_the_sweep_until_it_is_back(
    tiny_spec: RunFile, tiny_models: Models, fixes: Corrections, local_sweep: Sweep, tmp_path: Path
) -> None:
    with RayCompute(None, tiny_spec) as compute:
        with pytest.raises(StoreError, match=f"{trial_key(1.0)}: no"):
            compute.sweep(
                tiny_spec, tiny_models, fixes, None, RefusingStore(tmp_path / "run", trial_key(1.0))
            )
        sweep = compute.sweep(tiny_spec, tiny_models, fixes, None, FolderStore(tmp_path / "run"))
    assert_equal_sweeps(sweep, local_sweep)


def test_a_sweep_without_a_trial_left_fails(tiny_models: Models, fixes: Corrections, tmp_path: Path) -> None:
    spec = tiny(correct={"lambdas": [1.0]})
    store = RefusingStore(tmp_path / "run", "lam", with_bug=True)
    with RayCompute(None, spec) as compute, pytest.raises(ComputeError) as raised:
        compute.sweep(spec, tiny_models, fixes, None, store)
    assert str(raised.value) == "correct: every trial failed; λ = 1: ZeroDivisionError: of a pixel by nothing"
