"""The sweep on Ray equals the local one, whatever happens to its workers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import RayTaskError, WorkerCrashedError

from cluster.compute import RayCompute
from cluster.ray_train_tune import _failure
from defuse_core.artifacts import Corrections, FailedTrial, Models, Sweep, Trial
from defuse_core.codec import decode, encode
from defuse_core.config import RunFile
from defuse_core.correct import FineTuning, collect_sweep
from defuse_core.errors import ComputeError, InputError, RunBusyError, StoreError
from defuse_core.local import LocalCompute
from defuse_core.protocols import SweepRequest
from defuse_core.store import FolderStore
from defuse_core.trials import run_trial, trial_key
from tests.cluster.checks import (
    Lines,
    assert_equal_sweeps,
    kill_soon,
    title_of,
    wait_for_the_end_of,
)
from tests.cluster.fakes import (
    CountingStore,
    OwnDiskStore,
    RefusingStore,
    TakenOverStore,
)
from tests.conftest import fine_tuning_data, tiny

pytestmark = pytest.mark.usefixtures("ray_session")


def test_the_sweep_equals_the_local_one(
    tiny_spec: RunFile, tiny_models: Models, fixes: Corrections, local_sweep: Sweep, tmp_path: Path
) -> None:
    told = []
    with RayCompute(None, tiny_spec, lambda *args: told.append(args)) as compute:
        (sweep,) = compute.sweeps(tiny_models, [SweepRequest(tiny_spec, fixes, None, FolderStore(tmp_path))])
    assert_equal_sweeps(sweep, local_sweep)
    assert ("fine-tuning over λ", 6, 6, "epochs") in told


def test_repetitions_that_run_together_equal_the_local_ones(
    tiny_models: Models, fixes: Corrections, tmp_path: Path
) -> None:
    spec = tiny(correct={"lambdas": (0.0,), "epochs": 1})

    def requests(place: str) -> list[SweepRequest]:
        stores = [FolderStore(tmp_path / place / str(number)) for number in range(3)]
        return [SweepRequest(spec, fixes, None, store, fixes, number) for number, store in enumerate(stores)]

    with RayCompute(None, spec) as compute:
        made = compute.sweeps(tiny_models, requests("ray"))
    local = LocalCompute().sweeps(tiny_models, requests("local"))
    for sweep, other in zip(made, local, strict=True):
        assert_equal_sweeps(sweep, other)
    assert len({sweep.rows[0].loss for sweep in made}) == 3


def test_a_sweep_over_nothing_starts_nothing(tiny_spec: RunFile, tiny_models: Models, tmp_path: Path) -> None:
    none = Corrections(
        np.zeros(0, int), np.zeros(0, int), np.zeros((0, 24, 4), np.float32), np.zeros((0, 24, 4), np.float32)
    )
    with RayCompute(None, tiny_spec) as compute:
        (sweep,) = compute.sweeps(tiny_models, [SweepRequest(tiny_spec, none, None, FolderStore(tmp_path))])
        assert compute.listener is None
    assert sweep.weights == {}


def test_a_killed_trial_goes_on_at_its_last_finished_epoch_and_is_shown_under_the_name_of_its_step(
    tiny_models: Models, fixes: Corrections, tmp_path: Path, lines: Lines
) -> None:
    titles = set()

    def look(*told: object) -> None:
        for process in lines.processes("correct: λ")[-1:]:
            titles.add(title_of(process).split(b".")[0].strip(b"\0"))

    spec = tiny(correct={"lambdas": [1.0], "epochs": 4})
    calm = FolderStore(tmp_path / "undisturbed")
    (undisturbed,) = LocalCompute().sweeps(tiny_models, [SweepRequest(spec, fixes, None, calm)])
    store = CountingStore(tmp_path / "run", pause_s=1.0)
    writes = store.writes(trial_key(1.0))
    with RayCompute(None, spec, look) as compute:
        killer = kill_soon(lines, "correct: λ = 1", lambda: int(writes) in {2, 3})
        (sweep,) = compute.sweeps(tiny_models, [SweepRequest(spec, fixes, None, store)])
    killer.join()
    assert len(set(lines.processes("correct: λ = 1"))) == 2
    assert int(writes) == 4
    assert_equal_sweeps(sweep, undisturbed)
    assert titles - {b"ray::IDLE"} == {b"ray::correct"}  # it may have ended before the driver hears of it


@pytest.mark.usefixtures("fewer_attempts")
def test_a_trial_that_fails_for_good_is_left_out_and_told(
    two: RunFile, tiny_models: Models, fixes: Corrections, local_sweep_of_two: Sweep, tmp_path: Path
) -> None:
    store = RefusingStore(tmp_path / "run", trial_key(1.0), with_bug=True)
    with RayCompute(None, two) as compute:
        (sweep,) = compute.sweeps(tiny_models, [SweepRequest(two, fixes, None, store)])
    assert sweep.failed == (FailedTrial(1.0, "ZeroDivisionError: of a pixel by nothing"),)
    assert {row.lam for row in sweep.rows} == {10.0}
    assert sweep.rows == tuple(row for row in local_sweep_of_two.rows if row.lam != 1.0)


def test_a_trial_that_runs_out_of_memory_ends_the_sweep_with_what_to_do() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(
        ComputeError, match="λ = 1: OutOfMemoryError: CUDA out of memory.* fewer tasks run on a node or GPU"
    ):
        _failure(RayTaskError("trial", "", error), (1.0,))


def test_a_trial_whose_gpu_failed_in_every_attempt_ends_the_sweep_and_is_not_left_out() -> None:
    error = torch.AcceleratorError("CUDA error: unspecified launch failure")
    with pytest.raises(ComputeError, match="^correct: λ = 1: AcceleratorError: CUDA error: unspecified"):
        _failure(RayTaskError("trial", "", error), (1.0,))


def test_a_trial_whose_worker_was_lost_again_and_again_ends_the_sweep_and_is_not_left_out() -> None:
    with pytest.raises(ComputeError, match="^correct: λ = 1: "):
        _failure(WorkerCrashedError(), (1.0,))


@pytest.mark.usefixtures("fewer_attempts")
def test_a_store_that_fails_leaves_no_lambda_out_but_stops_the_sweep_until_it_is_back(
    two: RunFile, tiny_models: Models, fixes: Corrections, local_sweep_of_two: Sweep, tmp_path: Path
) -> None:
    with RayCompute(None, two) as compute:
        with pytest.raises(StoreError, match=f"{trial_key(1.0)}: no"):
            compute.sweeps(
                tiny_models,
                [SweepRequest(two, fixes, None, RefusingStore(tmp_path / "run", trial_key(1.0)))],
            )[0]
        again = SweepRequest(two, fixes, None, FolderStore(tmp_path / "run"))
        (sweep,) = compute.sweeps(tiny_models, [again])
    assert {row.lam for row in sweep.rows} == {1.0, 10.0}
    assert_equal_sweeps(sweep, local_sweep_of_two)


def test_trials_that_another_disk_holds_are_said(
    tiny_spec: RunFile, tiny_models: Models, fixes: Corrections, tmp_path: Path
) -> None:
    spec = tiny(correct={"lambdas": [1.0], "epochs": 1})
    with (
        RayCompute(None, spec) as compute,
        pytest.raises(InputError, match="the store .* must be one that all nodes"),
    ):
        compute.sweeps(tiny_models, [SweepRequest(spec, fixes, None, OwnDiskStore(tmp_path / "run"))])


def test_a_driver_that_lost_its_run_ends_its_trials(
    local_spec: RunFile, tiny_models: Models, fixes: Corrections, tmp_path: Path, lines: Lines
) -> None:
    store = TakenOverStore(tmp_path / "run", pause_s=1.0)
    with RayCompute(None, local_spec) as compute:
        with pytest.raises(RunBusyError, match="another driver took the run over"):
            compute.sweeps(tiny_models, [SweepRequest(local_spec, fixes, None, store)])
        wait_for_the_end_of(set(lines.processes("correct: λ")))


def test_ctrl_c_ends_the_trials_and_gives_back_what_they_hold_of_a_cluster_that_goes_on(
    two: RunFile, tiny_models: Models, fixes: Corrections, tmp_path: Path, lines: Lines
) -> None:
    def interrupt(*told: object) -> None:
        if told[0] == "fine-tuning over λ":
            raise KeyboardInterrupt

    request = SweepRequest(two, fixes, None, CountingStore(tmp_path / "run", pause_s=1.0))
    with RayCompute(None, two, interrupt) as compute:
        with pytest.raises(KeyboardInterrupt) as kept:  # with its traceback, as a notebook keeps it
            compute.sweeps(tiny_models, [request])
        wait_for_the_end_of(set(lines.processes("correct: λ")))
    groups: dict[str, dict[str, object]] = ray.util.placement_group_table()
    assert {group["state"] for group in groups.values()} <= {"REMOVED"}
    assert kept.tb is not None


def test_fewer_epochs_never_replace_more(
    tiny_models: Models, fixes: Corrections, tmp_path: Path, local_spec: RunFile
) -> None:
    """A trial that was given up for lost goes on beside the one that took its place."""
    data = fine_tuning_data(local_spec, tiny_models, fixes)
    store = FolderStore(tmp_path)
    given_up = run_trial(FineTuning(local_spec, tiny_models, data), 1.0, store)
    next(given_up)
    *_, done = run_trial(FineTuning(local_spec, tiny_models, data), 1.0, store)
    assert done.done
    next(given_up)
    stored = decode(Trial, store.read(trial_key(1.0)), "")
    assert stored.done and stored.rows == done.rows


def test_an_unfinished_trial_is_never_read_as_finished(
    tiny_models: Models, fixes: Corrections, tmp_path: Path, local_spec: RunFile
) -> None:
    data = fine_tuning_data(local_spec, tiny_models, fixes)
    trial = next(run_trial(FineTuning(local_spec, tiny_models, data), 1.0, FolderStore(tmp_path)))
    with pytest.raises(ComputeError, match="expected a finished trial with λ = 1, found 1 of 3 epochs; run"):
        collect_sweep(local_spec, tiny_models, [trial], {})


@pytest.mark.parametrize("damage", ["truncated", "of another λ"])
def test_a_damaged_trial_begins_again_and_that_is_logged(
    damage: str,
    tiny_models: Models,
    fixes: Corrections,
    tmp_path: Path,
    local_spec: RunFile,
    lines: Lines,
) -> None:
    data = fine_tuning_data(local_spec, tiny_models, fixes)
    store = FolderStore(tmp_path)
    *_, whole = run_trial(FineTuning(local_spec, tiny_models, data), 1.0, store)
    other = encode(replace(whole, lam=10.0))
    store.write(trial_key(1.0), other if damage == "of another λ" else store.read(trial_key(1.0))[:-5])
    *_, again = run_trial(FineTuning(local_spec, tiny_models, data), 1.0, store)
    assert again.rows == whole.rows
    assert any(f"{trial_key(1.0)}: " in line and "the trial begins again" in line for line in lines.lines)


@pytest.mark.parametrize("lam", [1e30, 1e38])
def test_a_lambda_that_overflows_is_a_diverged_trial(
    lam: float, tiny_models: Models, fixes: Corrections, tmp_path: Path
) -> None:
    spec = tiny(correct={"lambdas": [1.0, lam], "epochs": 1})
    (sweep,) = LocalCompute().sweeps(tiny_models, [SweepRequest(spec, fixes, None, FolderStore(tmp_path))])
    (failed,) = sweep.failed
    assert failed.lam == lam
    assert "diverged" in failed.cause
    assert {row.lam for row in sweep.rows} == {1.0}


def test_a_stack_of_lambdas_is_one_trial_of_tune_and_equals_the_local_one(
    tiny_models: Models, fixes: Corrections, tmp_path: Path, lines: Lines
) -> None:
    spec = tiny(correct={"lambdas": [1.0, 1e30, 10.0, 1e38, 0.0], "stack": 3})
    (local,) = LocalCompute().sweeps(
        tiny_models, [SweepRequest(spec, fixes, None, FolderStore(tmp_path / "local"))]
    )
    told = []
    with RayCompute(None, spec, lambda *args: told.append(args)) as compute:
        (sweep,) = compute.sweeps(
            tiny_models, [SweepRequest(spec, fixes, None, FolderStore(tmp_path / "ray"))]
        )
    assert_equal_sweeps(sweep, local)
    assert [failed.lam for failed in sweep.failed] == [1e30, 1e38]
    assert all("diverged" in failed.cause for failed in sweep.failed)
    started = sorted(line.partition(" in ")[0] for line in lines.lines if line.startswith("correct: λ = "))
    assert [line for line in started if "leaves" not in line] == [
        "correct: λ = 0",
        "correct: λ = 1, 1e+30, 10",
        "correct: λ = 1e+38",  # made once, although it diverges
    ]
    assert ("fine-tuning over λ", 6, 10, "epochs") in told  # those of the λ that diverged are missing


def test_a_stack_that_is_killed_between_two_writes_goes_on_with_each_lambda_where_it_was(
    tiny_models: Models, fixes: Corrections, tmp_path: Path, lines: Lines
) -> None:
    spec = tiny(correct={"lambdas": [1.0, 10.0], "epochs": 3, "stack": 2})
    (local,) = LocalCompute().sweeps(
        tiny_models, [SweepRequest(spec, fixes, None, FolderStore(tmp_path / "local"))]
    )
    store = CountingStore(tmp_path / "run", pause_s=1.0)
    writes = [store.writes(trial_key(lam)) for lam in (1.0, 10.0)]
    with RayCompute(None, spec) as compute:
        killer = kill_soon(lines, "correct: λ = 1, 10", lambda: [*map(int, writes)] == [2, 1])
        (sweep,) = compute.sweeps(tiny_models, [SweepRequest(spec, fixes, None, store)])
    killer.join()
    assert len(set(lines.processes("correct: λ = 1, 10"))) == 2
    assert [*map(int, writes)] == [3, 3]
    assert [replace(row, loss=0.0) for row in sweep.rows] == [replace(row, loss=0.0) for row in local.rows]
    np.testing.assert_allclose([row.loss for row in sweep.rows], [row.loss for row in local.rows], rtol=1e-5)


@pytest.fixture
def fewer_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that fails is started again once: each attempt is a process."""
    monkeypatch.setattr("cluster.ray_train_tune.TRIAL_RETRIES", 1)


@pytest.fixture
def local_spec() -> RunFile:
    return tiny(correct={"lambdas": [1.0], "epochs": 3})


@pytest.fixture(scope="module")
def two() -> RunFile:
    """The tiny run file with two λ, as many as there are CPUs."""
    return tiny(correct={"lambdas": [1.0, 10.0]})


@pytest.fixture(scope="module")
def local_sweep_of_two(
    two: RunFile, tiny_models: Models, fixes: Corrections, local_sweep: Sweep, local_store: FolderStore
) -> Sweep:
    """Its sweep, of trials of `local_sweep`."""
    request = SweepRequest(two, fixes, None, local_store.within("trials"))
    (sweep,) = LocalCompute().sweeps(tiny_models, [request])
    return sweep
