"""Several nodes, and GPUs that are pretended."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cluster.resources import WorkerResources, fitting
from defuse_core.artifacts import Models, Psi
from defuse_core.codec import encode
from defuse_core.local import LocalCompute
from defuse_core.protocols import SweepRequest
from defuse_core.store import FolderStore
from tests.cluster.checks import assert_same_psi
from tests.cluster.nodes import SHORT_SWEEP, made_up
from tests.conftest import ROOT, tiny


def play(scene: str, folder: Path, models: Models) -> dict[str, Any]:
    """Play a scene of nodes.py, and return what it printed."""
    (folder / "models").write_bytes(encode(models))
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster.nodes", scene, str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        timeout=200,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_node_that_joins_gets_work_and_one_that_dies_costs_nothing(
    tmp_path: Path, tiny_models: Models, local_psi: Psi, local_store: FolderStore
) -> None:
    played = play("nodes", tmp_path, tiny_models)
    assert played["finished"]
    assert any(line.startswith("identify: worker 1 is process") for line in played["lines"])
    assert any("since worker 1 was lost" in line for line in played["lines"])
    assert_same_psi(len(local_psi.codes), FolderStore(tmp_path / "nodes"), local_store)


def test_a_run_that_lost_its_last_node_waits_for_another_one(
    tmp_path: Path, tiny_models: Models, local_psi: Psi, local_store: FolderStore
) -> None:
    played = play("last", tmp_path, tiny_models)
    assert played["waited"] and played["finished"]
    assert any("waiting for a node" in line for line in played["lines"])
    assert_same_psi(len(local_psi.codes), FolderStore(tmp_path / "last"), local_store)


def test_a_node_that_joins_a_sweep_gets_trials(tmp_path: Path, tiny_models: Models) -> None:
    played = play("sweep", tmp_path, tiny_models)
    assert played["finished"]
    trials = [line.partition(" in process ")[2] for line in played["lines"] if line.startswith("correct: λ")]
    assert len(trials) == len(set(trials)) == 2  # two at once, where one node has room for one


def test_a_sweep_waits_for_its_first_node_and_one_that_dies_costs_nothing(
    tmp_path: Path, tiny_models: Models
) -> None:
    played = play("lost", tmp_path, tiny_models)
    spec = tiny(correct=SHORT_SWEEP)
    whole = LocalCompute().sweeps(
        tiny_models, [SweepRequest(spec, made_up(spec), None, FolderStore(tmp_path / "whole"))]
    )[0]
    assert played["finished"] and played["failed"] == []
    assert played["rows"] == [asdict(row) for row in whole.rows]


def test_each_worker_and_trial_sees_its_own_gpu_and_says_if_it_cannot_use_it(
    tmp_path: Path, tiny_models: Models, local_psi: Psi, local_store: FolderStore
) -> None:
    lines = play("gpus", tmp_path, tiny_models)["lines"]
    gpus = r"GPU (\d) \(CUDA_VISIBLE_DEVICES=(\d)\)"
    workers = [m.groups() for line in lines if (m := re.search(f"identify: worker . is .* {gpus}", line))]
    assert sorted(workers) == [(str(gpu), str(gpu)) for gpu in range(4)]
    trials = [m.groups() for line in lines if (m := re.search(f"correct: λ = .* in .* {gpus}", line))]
    assert sorted(trials) == [(str(gpu), str(gpu)) for gpu in range(4)]
    loud = [
        line for line in lines if re.search(r"^\w+: GPU \d was granted, but torch .* cannot use it", line)
    ]
    assert {line.split(":")[0] for line in loud} == {"identify", "correct"}
    assert_same_psi(len(local_psi.codes), FolderStore(tmp_path / "gpus"), local_store)


@pytest.mark.parametrize(
    ("node", "worker", "workers"),
    [
        (WorkerResources(8, 0), WorkerResources(1, 0), 8),
        (WorkerResources(8, 4), WorkerResources(1, 1), 4),
        (WorkerResources(2, 4), WorkerResources(1, 1), 2),
        (WorkerResources(8, 4), WorkerResources(1, 2), 2),
        (WorkerResources(8, 3), WorkerResources(1, 2), 1),
        (WorkerResources(16, 2), WorkerResources(1, 0.5), 4),
        (WorkerResources(16, 2), WorkerResources(1, 0.4), 4),
        (WorkerResources(16, 0), WorkerResources(1, 0.5), 0),
        (WorkerResources(3, 0), WorkerResources(2, 0), 1),
        (WorkerResources(1, 0), WorkerResources(0.25, 0), 4),
    ],
)
def test_a_gpu_is_shared_in_whole_parts_only(
    node: WorkerResources, worker: WorkerResources, workers: int
) -> None:
    assert fitting(node, worker) == workers
