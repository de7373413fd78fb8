"""A cluster of several nodes on one machine: `python -m tests.cluster.nodes FOLDER` plays the scenes that it is told.

It reads the names of scenes, and prints what came of each as a line of JSON. A process of its own, since the tests'
process is in another Ray already; all scenes share its head, and begin with a node that one before them left.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ |= {  # a dead node is known to be dead in a second
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "300",
    "RAY_health_check_timeout_ms": "10000",  # of a busy node; a dead one refuses the connection
    "RAY_health_check_failure_threshold": "3",
}

import numpy as np
import ray
from ray.cluster_utils import Cluster

from cluster import identify, resources
from cluster.compute import RayCompute
from cluster.ray_compat import keep_idle_workers
from cluster.resources import Resources, capacity
from defuse_core.artifacts import Corrections, Models
from defuse_core.codec import decode
from defuse_core.config import RunFile
from defuse_core.errors import RunFileError
from defuse_core.protocols import SweepRequest, map_in_tasks
from tests.cluster.checks import Lines
from tests.cluster.fakes import GatedStore, note_working_dir, pid_by_rows
from tests.conftest import tiny
from tests.forked_workers import forked_workers
from tests.waiting import wait_until

LOOK_EVERY_S = 0.5  # interval of looks for nodes that join or die: 3 s outside of tests
SHORT_SWEEP = {"lambdas": [0.1, 1.0], "epochs": 3}


def main(folder: Path) -> None:
    """Play scenes with the models in `folder`; the store of each is `folder`/SCENE."""
    keep_idle_workers(2)
    identify.SCALE_EVERY_S = resources.CHECK_EVERY_S = LOOK_EVERY_S
    lines = Lines()
    log = logging.getLogger("defuse")
    log.setLevel(logging.DEBUG)
    log.addHandler(lines)
    models = decode(Models, (folder / "models").read_bytes(), "models")
    with forked_workers(), headed_cluster() as cluster:
        for name in map(str.strip, sys.stdin):
            lines.lines.clear()
            try:
                found = SCENES[name](cluster, models, folder / name)
            except Exception:
                found = {"finished": False, "error": traceback.format_exc()}
            print(json.dumps({"lines": lines.lines, **found}), flush=True)


def only_node(cluster: Cluster) -> Any:
    """Return the only node beside the head, of one CPU: one that an earlier scene left, else a new one."""
    living = [node for node in cluster.worker_nodes if node.all_processes["raylet"][0].process.poll() is None]
    remove(cluster, cluster.worker_nodes - set(living[:1]))
    return living[0] if living else cluster.add_node(num_cpus=1)


def remove(cluster: Cluster, nodes: Iterable[Any]) -> None:
    """Remove these nodes, and return once no others are there but those that are left."""
    for node in list(nodes):
        cluster.remove_node(node, allow_graceful=False)
    wait_until(lambda: capacity(Resources(1, 0)) == len(cluster.worker_nodes))


def in_background(work: Callable[[], Any]) -> threading.Thread:
    """Start `work` beside this thread, since nodes can be added from the main thread only."""
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def wait_for_line(lines: Lines, part: str) -> None:
    """Return once a line with `part` in it was logged."""
    wait_until(lambda: any(part in line for line in lines.lines), lambda: f"no line with {part!r}")


@contextlib.contextmanager
def headed_cluster() -> Iterator[Cluster]:
    """A cluster whose head has no CPU, joined by this process."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def kill_raylet(node: Any) -> None:
    """Let a node of the cluster die."""
    os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)


def log_lines() -> Lines:
    """Return what was logged so far, as it grows."""
    return next(h for h in logging.getLogger("defuse").handlers if isinstance(h, Lines))


def nodes_come_and_go(cluster: Cluster, models: Models, folder: Path) -> dict[str, Any]:
    """One node begins; a second joins, works, and has its raylet killed."""
    store, spec = GatedStore(folder), tiny(resources={"workers": "auto"})
    lines = log_lines()
    only_node(cluster)
    with RayCompute(None, spec) as compute:
        thread = in_background(lambda: compute.identify(spec, models, store))
        wait_until(lambda: len(store.list("psi/")) == 1)  # and its worker is held
        late = cluster.add_node(num_cpus=1)
        wait_until(lambda: len(lines.processes("identify: worker 1")) == 1)
        wait_until(lambda: len(store.list("psi/")) == 2)
        kill_raylet(late)
        wait_for_line(lines, "since worker 1 was lost")
        store.open()
        thread.join(200)
    return {"finished": not thread.is_alive()}


def the_last_node_dies(cluster: Cluster, models: Models, folder: Path) -> dict[str, Any]:
    """The only node that has room for workers is killed; another one comes later."""
    store, spec = GatedStore(folder), tiny(resources={"workers": "auto"})
    only = only_node(cluster)
    with RayCompute(None, spec) as compute:
        thread = in_background(lambda: compute.identify(spec, models, store))
        wait_until(lambda: len(store.list("psi/")) == 1)
        kill_raylet(only)
        wait_for_line(log_lines(), "waiting for a node")
        waited = thread.is_alive()
        store.open()
        cluster.add_node(num_cpus=1)
        thread.join(200)
    return {"finished": not thread.is_alive(), "waited": waited}


def a_node_joins_a_sweep(cluster: Cluster, models: Models, folder: Path) -> dict[str, Any]:
    """One node with room for one trial begins; a second joins once an epoch is done, and gets one, too."""
    store, spec = GatedStore(folder), tiny(correct=SHORT_SWEEP)
    lines = log_lines()
    only_node(cluster)
    with RayCompute(None, spec) as compute:
        thread = in_background(
            lambda: compute.sweeps(models, [SweepRequest(spec, made_up(spec), None, store)])[0]
        )
        wait_until(lambda: bool(store.list()))
        cluster.add_node(num_cpus=1)
        wait_until(lambda: len(set(lines.processes("correct: λ"))) == 2)
        store.open()
        thread.join(200)
    return {"finished": not thread.is_alive()}


def the_node_of_a_sweep_dies(cluster: Cluster, models: Models, folder: Path) -> dict[str, Any]:
    """No node has a CPU at first. One comes, is killed with the images that it holds, and another one comes."""
    store, spec = GatedStore(folder), tiny(correct=SHORT_SWEEP)
    lines = log_lines()
    found = []
    remove(cluster, cluster.worker_nodes)
    with RayCompute(None, spec) as compute:
        thread = in_background(
            lambda: found.append(compute.sweeps(models, [SweepRequest(spec, made_up(spec), None, store)])[0])
        )
        wait_for_line(lines, "waiting for a node with a CPU")
        doomed = cluster.add_node(num_cpus=1)
        wait_until(lambda: bool(store.list()))
        kill_raylet(doomed)
        wait_for_line(lines, "correct: waiting for a node with room")
        store.open()
        cluster.add_node(num_cpus=1)
        thread.join(200)
    return {
        "finished": not thread.is_alive(),
        "rows": [asdict(row) for row in found[0].rows],
        "failed": found[0].failed,
    }


def made_up(spec: RunFile) -> Corrections:
    """Two scenarios, drawn from nothing."""
    rng = np.random.default_rng(0)
    tune, test = (rng.normal(size=(2, 24, spec.vae.latent_dim)).astype(np.float32) for _ in range(2))
    return Corrections(np.arange(2), np.arange(2), tune, test)


def a_node_with_two_gpus(cluster: Cluster, models: Models, folder: Path) -> dict[str, Any]:
    """Two GPUs that are not there."""
    remove(cluster, cluster.worker_nodes)
    cluster.add_node(num_cpus=4, num_gpus=2)
    finished = two_gpus(models, folder)
    lines = list(log_lines().lines)
    return {"finished": finished, "lines": lines, **tasks_on_a_gpu(), "refused": too_many_training(folder)}


def two_gpus(models: Models, folder: Path) -> bool:
    """Two workers and two trials: who sees which GPU?"""
    spec = tiny(correct=SHORT_SWEEP)
    with RayCompute(None, spec) as compute:
        shards, lines = GatedStore(folder), log_lines()
        thread = in_background(lambda: compute.identify(spec, models, shards))
        wait_until(lambda: len(set(lines.processes("identify: worker"))) == 2)  # before any of them is done
        shards.open()
        thread.join(200)
        store = GatedStore(folder / "trials")
        thread = in_background(
            lambda: compute.sweeps(models, [SweepRequest(spec, made_up(spec), None, store)])[0]
        )
        wait_until(lambda: len(set(lines.processes("correct: λ"))) == 2)  # both run at once
        store.open()
        thread.join(200)
    return not thread.is_alive()


def tasks_on_a_gpu() -> dict[str, Any]:
    """Two tasks one after the other, and short calls that would be four tasks on CPUs."""
    with RayCompute(None, tiny()) as compute:
        tasks = [compute.task("train", pid_by_rows, range(1)) for _ in range(2)]
        calls = map_in_tasks(compute, "distill", 4, pid_by_rows, rows_per_task=1)
    return {"tasks": tasks, "calls": calls}


def too_many_training(folder: Path) -> str | None:
    """Return how three training workers are refused, where each other worker has half a GPU."""
    spec = tiny(resources={"gpus_per_worker": 0.5, "train_workers": 3, "train_threads": 1})
    try:
        with RayCompute(None, spec) as compute:
            compute.run_distributed("train", note_working_dir, folder)
    except RunFileError as error:
        return str(error)
    return None


SCENES = {
    "nodes": nodes_come_and_go,
    "last": the_last_node_dies,
    "sweep": a_node_joins_a_sweep,
    "gpus": a_node_with_two_gpus,
    "lost": the_node_of_a_sweep_dies,
}

if __name__ == "__main__":
    main(Path(sys.argv[1]))
