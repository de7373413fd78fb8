"""Several workers train the models of one, whatever happens to a worker."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
from ray.exceptions import ActorDiedError, RayTaskError
from ray.train import WorkerGroupError

from cluster.compute import RayCompute
from cluster.ray_train_tune import _cause, _trainer, _worker
from cluster.resources import Resources
from defuse_core.artifacts import Checkpoint
from defuse_core.codec import decode
from defuse_core.config import RunFile
from defuse_core.errors import ComputeError, DataError, ModelError, RunFileError
from defuse_core.protocols import Progress, silent
from defuse_core.store import FolderStore
from defuse_core.train import train_part
from tests.cluster.checks import Lines, noted
from tests.cluster.fakes import (
    ImpatientStore,
    note_working_dir,
    run_together_noted,
    train_part_dying_once,
    train_part_ending_its_task,
    train_part_noting,
)
from tests.conftest import ROOT, tiny
from tests.forked_workers import forked_workers

pytestmark = pytest.mark.usefixtures("ray_session")
TOLERANCE = 2e-4  # difference of weights around 0.1, after three epochs


def together(**sections: dict[str, object]) -> RunFile:
    resources = {"train_workers": 2, "train_threads": 1}
    chosen = {"vae": {"epochs": 3, "class_weight": 2.0, "batch_size": 50}, "resources": resources}
    return tiny(**chosen | sections)


def checkpoint(store: FolderStore, name: str) -> Checkpoint:
    return decode(Checkpoint, store.read(f"training/{name}.safetensors"), name)


def test_two_workers_train_the_vae_of_one_although_one_of_them_is_killed(
    tmp_path: Path, lines: Lines
) -> None:
    """300 images in minibatches of 50: each worker computes 25."""
    spec, here, there = together(), FolderStore(tmp_path / "one"), FolderStore(tmp_path / "two")
    train_part(spec, here, "vae", progress=silent)
    with RayCompute(None, spec) as compute:
        compute.run_distributed("train", train_part_dying_once, spec, there, "vae", tmp_path / "killed")
    assert (tmp_path / "killed").exists()
    assert len(set(lines.processes("train: worker 0"))) == 2  # both were started again
    one, two = checkpoint(here, "vae"), checkpoint(there, "vae")
    assert len(one.history) == len(two.history) == 3
    for alone, shared in zip(one.history, two.history, strict=True):
        assert shared.reconstruction == pytest.approx(alone.reconstruction, rel=1e-4)
        assert shared.kl == pytest.approx(alone.kl, rel=1e-3)
        assert shared.class_loss == pytest.approx(alone.class_loss, rel=1e-4)
    for name, weights in one.weights.items():
        np.testing.assert_allclose(two.weights[name], weights, atol=TOLERANCE, err_msg=name)
    start = tiny(vae={"epochs": 1, "class_weight": 2.0, "batch_size": 50})
    train_part(start, FolderStore(tmp_path / "start"), "vae", progress=silent)
    moved = checkpoint(FolderStore(tmp_path / "start"), "vae").weights
    assert max(np.abs(moved[name] - one.weights[name]).max() for name in moved) > 20 * TOLERANCE


def lose_the_process_that_starts_the_workers(folder: Path) -> None:
    """Train on a Ray of its own, in which the lost workers keep their places until the end."""
    spec, store = together(), ImpatientStore(folder / "store", within_s=60)
    with pytest.MonkeyPatch.context() as patch, forked_workers():
        patch.setattr("cluster.ray_train_tune.run_together", run_together_noted)
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        with (
            RayCompute(None, spec, require_lock=store.require_lock) as compute,
            pytest.raises(ComputeError, match=r"^train: .*worker died unexpectedly"),
        ):
            compute.run_distributed("train", train_part_ending_its_task, spec, store, "vae", folder / "task")
        ray.shutdown()


def test_where_the_process_that_starts_the_workers_dies_the_step_ends_in_place_of_waiting_for_their_places(
    tmp_path: Path,
) -> None:
    call = f"lose_the_process_that_starts_the_workers(Path({str(tmp_path)!r}))"
    program = f"from tests.cluster.test_train_together import *; {call}"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "task").exists()


@pytest.fixture(scope="module")
def two_heads(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what two workers trained, a classifier of two heads, and with what they noted."""
    folder = tmp_path_factory.mktemp("two-heads")
    own = {"architecture": "custom", "import_path": "tests.own_classifiers:TwoHeads", "epochs": 2}
    with RayCompute(None, together(classifier=own)) as compute:
        compute.run_distributed(
            "train", train_part_noting, compute.spec, FolderStore(folder / "store"), "classifier", folder
        )
    return folder


def test_a_classifier_with_a_head_that_its_answers_do_not_use_is_trained_by_two_workers(
    two_heads: Path,
) -> None:
    assert len(checkpoint(FolderStore(two_heads / "store"), "classifier").history) == 2


def test_workers_keep_their_working_directory_so_that_relative_paths_lead_somewhere(
    two_heads: Path, tmp_path: Path
) -> None:
    with RayCompute(None, together()) as compute:
        compute.task("train", note_working_dir, tmp_path / "alone")
    assert len(list((two_heads / "working directories").iterdir())) == 2
    assert noted(two_heads / "working directories") == noted(tmp_path / "alone")


def test_training_workers_that_were_granted_no_gpu_see_none(two_heads: Path) -> None:
    assert noted(two_heads / "gpus") == {""}


def test_gpus_that_a_worker_was_not_granted_are_hidden_before_ray_looks_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch reads the variable once, when it first looks."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    visible = list[str]()
    monkeypatch.setattr("torch.cuda.is_available", lambda: visible.append(os.environ["CUDA_VISIBLE_DEVICES"]))
    trainer = _trainer({}, 2, Resources(1, 0), str(tmp_path))
    with trainer.backend_config.train_func_context():
        assert visible == [""]


def test_a_training_that_diverges_does_so_once_and_a_node_that_is_lost_before_the_next_one_is_waited_for(
    tmp_path: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spec = together(classifier={"epochs": 2, "optimizer": "adam", "learning_rate": 1e30})
    with RayCompute(None, spec) as compute:
        with pytest.raises(ModelError, match="the classifier diverged"):
            compute.run_distributed("train", train_part, spec, FolderStore(tmp_path), "classifier")
        assert len(set(lines.processes("train: worker 0"))) == 1
        monkeypatch.setattr("cluster.resources.NODES_JOIN_WITHIN_S", 0.1)
        monkeypatch.setattr("cluster.resources.capacity", lambda worker: 1)
        with pytest.raises(ComputeError, match=r"waited 0 minutes for room for 2 workers of 1 CPU and 0 GPU"):
            compute.run_distributed("train", note_working_dir, tmp_path / "second")
    assert "waiting for room for 2 workers of 1 CPU and 0 GPU each to join the cluster" in caplog.text


def test_a_damaged_image_that_one_worker_found_is_the_error_although_the_first_was_lost_with_it() -> None:
    damaged = DataError("train/3.png: damaged")
    assert _cause(WorkerGroupError("", {0: ActorDiedError(), 1: damaged})) is damaged
    lost = _cause(WorkerGroupError("", {0: ActorDiedError(), 1: OSError("connection reset")}))
    assert isinstance(lost, ComputeError) and str(lost).startswith("train: its worker process died")


def _deny(*, progress: Progress) -> None:
    raise DataError("data.root: /data does not exist")


def test_an_error_of_a_worker_on_another_node_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "cluster.ray_train_tune.train.get_context", lambda: SimpleNamespace(get_world_rank=lambda: 1)
    )
    monkeypatch.setattr("cluster.ray_train_tune.claim_devices", lambda step: "10.0.0.7")
    for node, told in (("10.0.0.7", " (on 10.0.0.7)"), (ray.util.get_node_ip_address(), "")):
        with monkeypatch.context() as there:
            there.setattr("ray.util.get_node_ip_address", lambda node=node: node)
            with pytest.raises(RayTaskError) as raised:
                _worker({"function": _deny, "args": (), "progress_actor": None})
        arrived = pickle.loads(pickle.dumps(raised.value))
        found = _cause(WorkerGroupError("", {0: ActorDiedError(), 1: arrived}))
        assert type(found) is DataError and str(found) == f"data.root: /data does not exist{told}"


def test_more_workers_than_fit_are_an_error_at_once(tmp_path: Path) -> None:
    spec = together(resources={"train_workers": 3, "train_threads": 1})
    with (
        RayCompute(None, spec) as compute,
        pytest.raises(RunFileError, match="train_workers: 3 workers .* room for 2"),
    ):
        compute.run_distributed("train", train_part, spec, FolderStore(tmp_path), "vae")
