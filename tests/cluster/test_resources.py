"""Several nodes, and GPUs that are pretended."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

from cluster.compute import RayCompute
from cluster.resources import Resources, claim_devices, fitting
from defuse_core.artifacts import Corrections, Models, Psi
from defuse_core.codec import encode
from defuse_core.local import LocalCompute
from defuse_core.protocols import SweepRequest
from defuse_core.store import FolderStore
from tests.cluster.checks import Lines, assert_equal_psi, assert_same_psi, noted
from tests.cluster.fakes import BrokenGpu, NotingStore, note_place, visible_gpus
from tests.cluster.nodes import SHORT_SWEEP, made_up
from tests.conftest import ROOT, tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where each scene of nodes.py has its store."""
    return tmp_path_factory.mktemp("nodes")


Play = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def play(folder: Path, tiny_models: Models) -> Iterator[Play]:
    """Return play(scene), which plays a scene of nodes.py to its end and returns what came of it."""
    (folder / "models").write_bytes(encode(tiny_models))
    command = [sys.executable, "-m", "tests.cluster.nodes", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdin=PIPE, stdout=PIPE, text=True) as cluster:
        assert cluster.stdin and cluster.stdout
        given, told = cluster.stdin, cluster.stdout

        def played(scene: str) -> dict[str, Any]:
            print(scene, file=given, flush=True)
            found: dict[str, Any] = json.loads(next(line for line in told if line.startswith("{")))
            assert found["finished"], found.get("error", "the scene hangs")
            return found

        yield played
        given.close()


def test_a_node_that_joins_gets_work_and_one_that_dies_costs_nothing(
    folder: Path, play: Play, local_psi: Psi, local_store: FolderStore
) -> None:
    lines = play("nodes")["lines"]
    assert any(line.startswith("identify: worker 1 is process") for line in lines)
    assert any("since worker 1 was lost" in line for line in lines)
    assert_same_psi(len(local_psi.codes), FolderStore(folder / "nodes"), local_store)


def test_a_run_that_lost_its_last_node_waits_for_another_one(
    folder: Path, play: Play, local_psi: Psi, local_store: FolderStore
) -> None:
    found = play("last")
    assert found["waited"]
    assert any("waiting for a node" in line for line in found["lines"])
    assert_same_psi(len(local_psi.codes), FolderStore(folder / "last"), local_store)


def test_a_node_that_joins_a_sweep_gets_trials(play: Play) -> None:
    lines = play("sweep")["lines"]
    trials = [line.partition(" in process ")[2] for line in lines if line.startswith("correct: λ")]
    assert len(trials) == len(set(trials)) == 2  # two at once, where one node has room for one


def test_a_sweep_waits_for_its_first_node_and_one_that_dies_costs_nothing(
    tmp_path: Path, play: Play, tiny_models: Models
) -> None:
    found = play("lost")
    spec = tiny(correct=SHORT_SWEEP)
    whole = LocalCompute().sweeps(
        tiny_models, [SweepRequest(spec, made_up(spec), None, FolderStore(tmp_path / "whole"))]
    )[0]
    assert found["failed"] == []
    assert found["rows"] == [asdict(row) for row in whole.rows]


@pytest.fixture(scope="module")
def gpus(play: Play) -> dict[str, Any]:
    return play("gpus")


def test_each_worker_and_trial_sees_its_own_gpu_and_says_if_it_cannot_use_it(
    folder: Path, gpus: dict[str, Any], local_psi: Psi, local_store: FolderStore
) -> None:
    lines, shown = gpus["lines"], r"GPU (\d) \(CUDA_VISIBLE_DEVICES=(\d)\)"
    workers = [m.groups() for line in lines if (m := re.search(f"identify: worker . is .* {shown}", line))]
    assert sorted(workers) == [(str(gpu), str(gpu)) for gpu in range(2)]
    trials = [m.groups() for line in lines if (m := re.search(f"correct: λ = .* in .* {shown}", line))]
    assert sorted(trials) == [(str(gpu), str(gpu)) for gpu in range(2)]
    loud = [
        line for line in lines if re.search(r"^\w+: GPU \d was granted, but torch .* cannot use it", line)
    ]
    assert {line.split(":")[0] for line in loud} == {"identify", "correct"}
    assert_same_psi(len(local_psi.codes), FolderStore(folder / "gpus"), local_store)


def test_a_process_that_had_a_gpu_ends_with_its_task_and_short_calls_share_one(gpus: dict[str, Any]) -> None:
    (first,), (second,) = gpus["tasks"]
    assert first != second
    assert len(gpus["calls"]) == 4 and len(set(gpus["calls"])) == 2  # one for each GPU


def test_workers_that_train_together_get_a_gpu_each(gpus: dict[str, Any]) -> None:
    """Three of half a GPU would fit on two GPUs; NCCL refuses two workers on one."""
    assert gpus["refused"] == (
        "resources.train_workers: 3 workers of 1 CPU and 1 GPU each asked for, but the cluster has room for 2"
    )


@pytest.mark.usefixtures("ray_session")
def test_workers_that_were_granted_no_gpu_see_none_and_keep_their_working_directory(
    tiny_models: Models, fixes: Corrections, tmp_path: Path
) -> None:
    """So that relative paths lead somewhere. Workers that train together: test_train_together.py."""
    spec = tiny(correct={"lambdas": [1.0], "epochs": 1})
    shards, trials = (NotingStore(tmp_path / name, note_place) for name in ("shards", "trials"))
    with RayCompute(None, spec) as compute:
        compute.task("train", note_place, tmp_path / "task")
        assert compute.partitions("distill", visible_gpus, [(0,)]).map(str) == [""]
        compute.identify(spec, tiny_models, shards)
        compute.sweeps(tiny_models, [SweepRequest(spec, fixes, None, trials)])
    for folder in (tmp_path / "task", shards.notes, trials.notes):
        assert noted(folder / "gpus") == {""}, folder
        assert noted(folder / "working directories") == noted(tmp_path / "task" / "working directories")


def test_a_granted_gpu_that_torch_has_no_kernels_for_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cluster.resources.ray.get_gpu_ids", lambda: [3])
    monkeypatch.setattr("cluster.resources.ray.util.get_node_ip_address", lambda: "10.0.0.7")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("defuse_core.device._has_kernels", lambda: False)
    claim_devices("train")
    assert "train: GPU 3 was granted, but torch" in caplog.text and "on 10.0.0.7" in caplog.text


@pytest.mark.usefixtures("ray_session")
def test_a_gpu_that_fails_in_one_process_costs_that_process_and_not_the_run(
    tiny_models: Models, local_psi: Psi, tmp_path: Path, lines: Lines
) -> None:
    spec, gpu = tiny(resources={"workers": 1}), BrokenGpu(starts=tmp_path / "starts")
    with RayCompute(None, spec, profile=gpu) as compute:
        psi = compute.identify(spec, tiny_models, FolderStore(tmp_path / "run"))
    assert_equal_psi(psi, local_psi)
    assert len(set(lines.processes("identify: worker 0 is"))) == 2
    assert any("AcceleratorError: CUDA error: an illegal memory access" in line for line in lines.lines)


@pytest.mark.parametrize(
    ("node", "worker", "workers"),
    [
        (Resources(8, 0), Resources(1, 0), 8),
        (Resources(8, 4), Resources(1, 1), 4),
        (Resources(2, 4), Resources(1, 1), 2),
        (Resources(8, 4), Resources(1, 2), 2),
        (Resources(8, 3), Resources(1, 2), 1),
        (Resources(16, 2), Resources(1, 0.5), 4),
        (Resources(16, 2), Resources(1, 0.4), 4),
        (Resources(16, 0), Resources(1, 0.5), 0),
        (Resources(3, 0), Resources(2, 0), 1),
        (Resources(1, 0), Resources(0.25, 0), 4),
    ],
)
def test_a_gpu_is_shared_in_whole_parts_only(node: Resources, worker: Resources, workers: int) -> None:
    assert fitting(node, worker) == workers
