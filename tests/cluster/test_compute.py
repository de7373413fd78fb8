"""RayCompute: tasks, their progress and their errors."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray._private.ray_constants import DEFAULT_TASK_MAX_RETRIES
from ray.exceptions import OutOfDiskError

from cluster.compute import RayCompute, on_ray
from cluster.connection import require_absolute_paths
from cluster.resources import Resources
from defuse_core.artifacts import Models
from defuse_core.config import RunFile
from defuse_core.errors import ComputeError, DataError, RunBusyError, RunFileError
from defuse_core.protocols import Call, map_in_tasks
from defuse_core.runs import Run, versions
from defuse_core.store import FolderStore
from tests.cluster.checks import Lines, wait_for_the_end_of
from tests.cluster.fakes import (
    counting,
    dying,
    failing,
    held_by_rows,
    held_cpus,
    meeting,
    place_among_starts,
    shouting,
    sleeping,
    vae_size,
)
from tests.conftest import tiny
from tests.waiting import WAIT_S

pytestmark = pytest.mark.usefixtures("ray_session")


def test_images_that_the_nodes_of_a_joined_cluster_could_not_find_are_refused() -> None:
    spec = tiny(data={"name": "npz", "root": "images.npz"})
    with (
        RayCompute("head:6379", spec) as compute,
        pytest.raises(RunFileError, match="data.root images.npz: expected"),
    ):
        compute.task("train", shouting, "a")


def test_relative_weights_are_refused_on_a_joined_cluster_except_in_a_job_which_brings_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = tiny(classifier={"weights": "best.safetensors"})
    with (
        RayCompute("head:6379", spec) as compute,
        pytest.raises(
            RunFileError, match=r"classifier\.weights best\.safetensors: expected the absolute path"
        ),
    ):
        compute.task("train", shouting, "a")
    with RayCompute(None, spec) as compute:
        compute.task("train", shouting, "a")
    in_job = SimpleNamespace(runtime_env={"working_dir": "gcs://of_the_job.zip"})
    monkeypatch.setattr(ray, "get_runtime_context", lambda: in_job)
    require_absolute_paths(spec)


def test_what_the_store_of_ray_does_not_take_from_the_driver_is_an_error_of_the_step(
    tiny_spec: RunFile, tiny_models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object) -> None:
        raise OutOfDiskError("Local disk is full")

    monkeypatch.setattr(ray, "put", full)
    shared = [Call(vae_size, tiny_models), Call(vae_size, tiny_models)]
    with RayCompute(None, tiny_spec) as compute:
        for step, work in (
            ("identify", lambda: compute.identify(tiny_spec, tiny_models, FolderStore(tmp_path))),
            ("train", lambda: compute.tasks("train", shared)),
            ("distill", lambda: compute.partitions("distill", len, []).map(len, tiny_models)),
        ):
            with pytest.raises(ComputeError, match=f"^{step}: Local disk is full; free space"):
                work()


def test_a_task_passes_on_its_progress_its_log_and_its_result(tiny_spec: RunFile, lines: Lines) -> None:
    told = []
    with RayCompute(None, tiny_spec, lambda *args: told.append(args)) as compute:
        assert compute.task("review", shouting, "help") == "HELP"
    assert told[-1] == ("shouting", 3, 3, "letters")
    assert "shouted help" in lines.lines


def test_a_node_with_another_defuse_is_warned_of_once(
    tiny_spec: RunFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    there = versions()
    monkeypatch.setattr(
        "cluster.progress.versions", lambda: there | {"defuse": "0+1a2b", "platform": "other"}
    )
    with RayCompute(None, tiny_spec) as compute:
        for _ in range(2):
            compute.task("review", shouting, "help")
    (line,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert re.match(rf"\S+ has defuse {re.escape(there['defuse'])}, and this process 0\+1a2b: ", line)


def test_tasks_that_share_an_activity_show_what_all_of_them_have_done(tiny_spec: RunFile) -> None:
    told = []
    with RayCompute(None, tiny_spec, lambda *args: told.append(args)) as compute:
        for _ in range(2):  # the second time from the start
            compute.tasks("review", [Call(counting, 3, 8), Call(counting, 5, 8)])
            assert told[-1] == ("counting", 8, 8, "numbers")


def test_an_error_of_the_tree_comes_through_as_itself(tiny_spec: RunFile) -> None:
    with RayCompute(None, tiny_spec) as compute, pytest.raises(DataError, match=r"^cat\.png: not a cat$"):
        compute.task("train", failing, DataError("cat.png: not a cat"))


def test_another_error_is_a_compute_error_in_one_line(tiny_spec: RunFile) -> None:
    with RayCompute(None, tiny_spec) as compute, pytest.raises(ComputeError) as raised:
        compute.task("train", failing, KeyError("weights"))
    assert str(raised.value) == "train: KeyError: 'weights'"


def test_an_artefact_that_several_tasks_take_is_stored_once(
    tiny_spec: RunFile, tiny_models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, put = [], ray.put
    monkeypatch.setattr(ray, "put", lambda value: stored.append(value) or put(value))
    size = sum(array.size for array in tiny_models.vae.values())
    with RayCompute(None, tiny_spec) as compute:
        calls = [Call(vae_size, tiny_models, number) for number in range(3)]
        assert compute.tasks("distill", calls) == [(number, size) for number in range(3)]
    assert stored == [tiny_models]


def test_a_run_that_computed_on_gpus_waits_for_them_with_a_word_on_how_to_go_on_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    run = Run.start(FolderStore(tmp_path), "a", tiny())
    run.store.write("manifest.json", b'{"device": "NVIDIA H100"}')
    monkeypatch.setattr("cluster.resources.NODES_JOIN_WITHIN_S", 0.1)
    with (
        on_ray("head:6379")(run) as compute,
        pytest.raises(ComputeError, match="waited 0 minutes for a node with a GPU .*gpus_per_worker=0"),
    ):
        compute.task("train", shouting, "a")
    assert "waiting for a node with a GPU to join the cluster; this run computed on GPUs" in caplog.text
    run.spec = tiny(resources={"gpus_per_worker": 0})
    with on_ray("head:6379")(run) as compute:
        assert compute.task("train", shouting, "a") == "A"
    run.spec, seen = tiny(), [Resources(2, 1)]
    run.store.write("manifest.json", b'{"device": "cpu (AVX2)"}')
    with on_ray("head:6379")(run) as compute:
        assert compute.task("train", shouting, "a") == "A"
        monkeypatch.setattr("cluster.resources.nodes", lambda: seen)
        compute._join_cluster()
        seen[0] = Resources(2, 0)  # the nodes with GPUs are lost
        with pytest.raises(ComputeError, match="for a node with a GPU"):
            compute.task("train", shouting, "a")


def test_a_task_holds_the_cpus_that_it_computes_with() -> None:
    with RayCompute(None, tiny(resources={"train_threads": 2})) as compute:
        calls = [Call(held_cpus), Call(held_cpus, one_thread=True)]
        assert compute.tasks("review", calls) == [2, 1]
        assert map_in_tasks(compute, "review", 2, held_by_rows, rows_per_task=1) == [1, 1]


def test_independent_tasks_run_at_the_same_time_and_their_results_keep_the_order(
    tiny_spec: RunFile, tmp_path: Path
) -> None:
    calls = [Call(meeting, tmp_path, name, other) for name, other in (("a", "b"), ("b", "a"))]
    with RayCompute(None, tiny_spec) as compute:
        assert compute.tasks("train", calls) == ["a", "b"]


def test_tasks_start_in_the_order_of_their_calls(tmp_path: Path) -> None:
    calls = [Call(place_among_starts, tmp_path / "starts") for _ in range(12)]
    one_at_a_time = tiny(resources={"train_threads": 2})  # a task holds all CPUs
    with RayCompute(None, one_at_a_time) as compute:
        assert compute.tasks("train", calls) == [*range(1, 13)]


def test_an_error_of_one_of_several_tasks_ends_the_others(tiny_spec: RunFile, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    calls: list[Call[object]] = [Call(sleeping, pid), Call(failing, DataError("cat.png: not a cat"))]
    with RayCompute(None, tiny_spec) as compute, pytest.raises(DataError, match=r"cat\.png"):
        compute.tasks("train", calls)
    if pid.exists():
        wait_for_the_end_of({int(pid.read_text())})


def test_a_task_whose_process_is_killed_is_run_again_more_often_than_ray_does(
    tiny_spec: RunFile, tmp_path: Path
) -> None:
    times = DEFAULT_TASK_MAX_RETRIES + 1
    with RayCompute(None, tiny_spec) as compute:
        assert compute.task("train", dying, tmp_path / "tally", times) == "alive"


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
    assert time.monotonic() - begun < 30


def test_a_driver_that_lost_its_run_ends_the_task_under_way(tiny_spec: RunFile, tmp_path: Path) -> None:
    pid = tmp_path / "pid"

    def require_lock() -> None:
        if pid.exists():
            raise RunBusyError("another driver took the run over")

    with RayCompute(None, tiny_spec, require_lock=require_lock) as compute:
        with pytest.raises(RunBusyError, match="another driver took the run over"):
            compute.task("train", sleeping, pid)
        wait_for_the_end_of({int(pid.read_text())})


def test_a_task_under_way_that_no_node_has_room_for_any_more_says_that_it_waits(
    tiny_spec: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pid, begun = tmp_path / "pid", time.monotonic()
    line = "train: waiting for a node with room for a worker of 1 CPU and 0 GPU"

    def require_lock() -> None:
        if line in caplog.messages or time.monotonic() - begun > WAIT_S / 4:
            raise RunBusyError("enough")

    monkeypatch.setattr("cluster.resources.capacity", lambda worker: 0 if pid.exists() else 2)
    with RayCompute(None, tiny_spec, require_lock=require_lock) as compute, pytest.raises(RunBusyError):
        compute.task("train", sleeping, pid)
    assert line in caplog.messages
