"""CPUs and GPUs of the cluster: how much a worker is given, how many workers fit, parts of data on them."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.connection import ray_errors
from cluster.ray_compat import embedded_ray_has_ended, log_folder, own_node_has_ended
from defuse_core.config import ResourcesSection
from defuse_core.errors import ComputeError, RunFileError
from defuse_core.formatting import count_of

log = logging.getLogger("defuse")
T = TypeVar("T")
CHECK_EVERY_S = 3.0
WARN_AFTER_S = 30.0  # wait for other work, or for the head, before a warning
NODES_JOIN_WITHIN_S = 600.0  # generous for a cloud that starts machines
# interval of looks for these nodes, and for the node of this process while its head is away
LOOK_EVERY_S = 1.0
TASK_RETRIES = 10  # most retries, in one step, of a task whose node is lost


@dataclass(frozen=True)
class Resources:
    cpus: float
    gpus: float

    def options(self) -> dict[str, Any]:
        return {"num_cpus": self.cpus, "num_gpus": self.gpus}

    def __str__(self) -> str:
        return f"{self.cpus:g} CPU and {self.gpus:g} GPU"


@dataclass(frozen=True)
class WorkerLocation:
    node: str  # its address
    pid: int
    gpus: tuple[str, ...]  # ids granted by Ray
    visible_gpus: str  # CUDA_VISIBLE_DEVICES of its process

    def __str__(self) -> str:
        if not self.gpus:
            return f"process {self.pid} on {self.node}, CPU"
        gpus = f"GPU {', '.join(self.gpus)} (CUDA_VISIBLE_DEVICES={self.visible_gpus})"
        return f"process {self.pid} on {self.node}, {gpus}"


def hide_other_gpus() -> None:
    """Leave torch no GPU in a process that Ray granted none: by default Ray shows it every GPU of the node.

    Has an effect only before torch looks for GPUs.
    """
    if not ray.get_gpu_ids():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def claim_devices(step: str) -> WorkerLocation:
    """Hide the GPUs that this process was not granted, and return its location; warn of one that torch cannot use.

    Every worker calls it before its work.
    """
    import torch

    from defuse_core.device import can_use_gpu

    hide_other_gpus()
    gpus = tuple(str(gpu) for gpu in ray.get_gpu_ids())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    node = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    if gpus and not can_use_gpu():
        log.warning(
            "%s: %s was granted, but torch %s cannot use it: working on the CPU. Install a torch for its GPU "
            "and driver on %s, or set resources.gpus_per_worker=0",
            step,
            f"GPU {', '.join(gpus)}",
            torch.__version__,
            node,
        )
    return WorkerLocation(node, os.getpid(), gpus, visible)


def nodes() -> list[Resources]:
    """Return what each living node has in all."""
    found = (node["Resources"] for node in _living_nodes())
    return [Resources(resources.get("CPU", 0), resources.get("GPU", 0)) for resources in found]


def on_nodes_with_cpus() -> dict[str, Any]:
    """Return options of a task that keep it off nodes without CPUs, such as a head: these may have no images."""
    others = [node["NodeID"] for node in _living_nodes() if not node["Resources"].get("CPU")]
    return {"label_selector": {"ray.io/node-id": f"!in({','.join(others)})"}} if others else {}


def _living_nodes() -> list[dict[str, Any]]:
    """Return Ray's description of each living node, once the head answers.

    Asked in a thread, since ray.nodes blocks, and Ctrl-C with it. Raises ComputeError where the embedded Ray has ended.
    """
    if embedded_ray_has_ended():
        raise ComputeError(
            "Ray has ended on this machine, as where its memory is full; run again to continue "
            f"(Ray's logs are in {log_folder()})"
        )
    answer: Future[list[dict[str, Any]]] = Future()

    def ask() -> None:
        try:
            answer.set_result(ray.nodes())  # type: ignore[no-untyped-call]
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        found = answer.result(WARN_AFTER_S)
    except TimeoutError:
        if answer.done():  # Ray's own error
            raise
        log.warning("waiting for the head of the cluster, which does not answer")
        found = _from_head(answer)
    return [node for node in found if node["Alive"]]


def _from_head(answer: Future[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the head's answer. Raises ComputeError where this node ends meanwhile: no later head knows it."""
    while not wait([answer], LOOK_EVERY_S).done:
        if own_node_has_ended():
            raise ComputeError(
                "the node of this machine has ended, since the head of the cluster was away for too long; start the "
                "cluster, and run again to continue"
            )
    return answer.result()


def on_this_node() -> dict[str, Any]:
    """Return options of a task that run it on the node of this process, whatever else runs there."""
    here = ray.get_runtime_context().get_node_id()
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}


def wait_for_nodes() -> None:
    wait_for(lambda: any(node.cpus for node in nodes()), "a node with a CPU", [{"CPU": 1}])


def wait_for(
    has_joined: Callable[[], bool], what: str, bundles: list[dict[str, float]], otherwise: str = ""
) -> None:
    """Wait until the cluster has `what`: the nodes of one that was just made, or lost them, join later.

    A placement group of `bundles` is pending meanwhile, since an autoscaler starts nodes for what is asked for alone.
    Raises ComputeError when it did not. `otherwise` is what to do without.
    """
    if has_joined():
        return
    log.warning("waiting for %s to join the cluster%s", what, otherwise)
    give_up_at, asked = time.monotonic() + NODES_JOIN_WITHIN_S, placement_group(bundles)
    try:
        while not has_joined():
            if time.monotonic() >= give_up_at:
                minutes = f"{NODES_JOIN_WITHIN_S / 60:.0f} minutes"
                raise ComputeError(
                    f"waited {minutes} for {what} to join the cluster; see `ray status`{otherwise}"
                )
            time.sleep(LOOK_EVERY_S)
    finally:
        remove_placement_group(asked)


def worker_resources(section: ResourcesSection) -> Resources:
    """Return what an identification worker or a trial holds: a GPU where the cluster has any, else CPUs alone."""
    if section.gpus_per_worker != "auto":
        return Resources(section.cpus_per_worker, section.gpus_per_worker)
    return Resources(section.cpus_per_worker, 1 if has_gpus() else 0)


def has_gpus() -> bool:
    return any(node.gpus for node in nodes())


def task_resources(section: ResourcesSection) -> Resources:
    """Return what the only task of a step holds: `train_threads` CPUs, or as many as a node with its GPUs has."""
    gpus = worker_resources(section).gpus
    suitable = [node.cpus for node in nodes() if node.gpus >= gpus]
    return Resources(min(section.train_threads, max(suitable, default=section.train_threads)), gpus)


def capacity(worker: Resources) -> int:
    """Return how many such workers fit on the nodes when nothing else runs there."""
    return sum(fitting(node, worker) for node in nodes())


def fitting(node: Resources, worker: Resources) -> int:
    """Return how many such workers fit on an empty node. A fraction of a GPU never spans two GPUs."""
    by_cpu = int(node.cpus / worker.cpus + 1e-9)
    if not worker.gpus:
        return by_cpu
    if worker.gpus < 1:
        return min(by_cpu, int(node.gpus) * int(1 / worker.gpus + 1e-9))
    return min(by_cpu, int(node.gpus / worker.gpus))


def expect_worker_room(section: ResourcesSection) -> None:
    """Raise RunFileError where the cluster has no room for resources.workers, or for one; warn of GPUs left idle."""
    worker = worker_resources(section)
    if worker.gpus > 1:
        log.warning("a worker computes on one GPU, not on %g: set resources.gpus_per_worker=1", worker.gpus)
    room, wanted = capacity(worker), section.workers
    if room == 0 or (wanted != "auto" and wanted > room):
        found = nodes()
        total = Resources(sum(node.cpus for node in found), sum(node.gpus for node in found))
        asked = "a worker" if wanted == "auto" else count_of(wanted, "worker")
        raise RunFileError(
            f"resources: {asked} of {worker} each asked for, but the cluster has room for {room} "
            f"(it has {total} on {count_of(len(found), 'node')})"
        )


def wait_for_gpus(section: ResourcesSection, wanted: bool) -> bool:
    """Return whether gpus_per_worker: auto finds GPUs; where they are `wanted`, wait for the first.

    A step that begins without them stays on CPUs to its end.
    """
    if section.gpus_per_worker != "auto":
        return False
    if wanted:
        otherwise = (
            "; this run computed on GPUs before: start a node with one, or set resources.gpus_per_worker=0"
        )
        wait_for(has_gpus, "a node with a GPU", [{"GPU": 1}], otherwise)
    return has_gpus()


def expect_training_room(worker: Resources, workers: int, *, wait: bool) -> None:
    """Raise RunFileError where the cluster has no room for workers that train together, or wait for it."""
    if wait:
        bundles = [{"CPU": worker.cpus, "GPU": worker.gpus}] * workers
        wait_for(lambda: capacity(worker) >= workers, f"room for {workers} workers of {worker} each", bundles)
    elif (room := capacity(worker)) < workers:
        raise RunFileError(
            f"resources.train_workers: {workers} workers of {worker} each asked for, but the cluster has room for "
            f"{room}"
        )


class CapacityMonitor:
    """Warns each time that a step begins to wait: no node has room for its workers, or other work holds the room."""

    def __init__(self, step: str, worker: Resources) -> None:
        self.step, self.worker = step, worker
        self.waiting, self.checked_at = False, -math.inf
        self.warn_at = time.monotonic() + WARN_AFTER_S

    def check(self, running: bool) -> None:
        """Compare the nodes with what a worker holds, every few seconds at most; `running`: whether any worker runs."""
        now = time.monotonic()
        if running:
            self.warn_at = now + WARN_AFTER_S
        if now - self.checked_at < CHECK_EVERY_S:
            return
        self.checked_at, room = now, capacity(self.worker)
        if not room and not self.waiting:
            log.warning("%s: waiting for a node with room for a worker of %s", self.step, self.worker)
        if room and now > self.warn_at:
            self.warn_at = math.inf
            log.warning("%s: waiting for %s to be free on the cluster", self.step, self.worker)
        self.waiting = not room


# Waits for the tasks of a step. Its arguments: the step; an iterator that starts a task and yields a reference, ready
# once the task has ended; what a task holds; how many run at once at most.
Wait = Callable[[str, Iterable[Any], Resources, int], None]


class RayPartitions:
    """The protocol `Partitions` on a cluster, on CPUs.

    Ray starts a call on a node that has its part, and loads a part again that was lost with its node. A call holds its
    CPUs only once its part is there, so no call waits for a part that waits for a CPU.
    """

    def __init__(
        self,
        section: ResourcesSection,
        step: str,
        load: Callable[..., object],
        arguments: Sequence[tuple[object, ...]],
        wait: Wait,
    ) -> None:
        """Load the parts that load(*arguments) returns, spread over the nodes."""
        self.step, self.wait = step, wait
        self.worker = Resources(section.cpus_per_worker, 0)
        self.workers = max(1, capacity(self.worker)) if section.workers == "auto" else section.workers
        self.options = {
            "name": step,
            "num_cpus": section.cpus_per_worker,
            "num_gpus": 0,
            "num_returns": 2,
            "max_retries": TASK_RETRIES,
            **on_nodes_with_cpus(),
        }
        remote: Any = ray.remote(_on_part).options(**self.options, scheduling_strategy="SPREAD")
        self.parts = self._run(partial(remote.remote, load, *each) for each in arguments)  # ObjectRefs

    def map(self, function: Callable[..., T], *args: object) -> list[T]:
        remote: Any = ray.remote(_on_part).options(**self.options)
        with ray_errors(self.step):
            shared = [ray.put(argument) for argument in args]
            references = self._run(partial(remote.remote, function, part, *shared) for part in self.parts)
            return ray.get(references)

    def _run(self, calls: Iterable[Callable[[], Any]]) -> list[Any]:
        """Make the calls, two for each worker at once, and return references to their results. Raises the first error.

        What runs is cancelled then, and where this is interrupted.
        """
        references: list[Any] = []

        def started() -> Iterator[Any]:
            for call in calls:
                done, result = call()
                references.append(result)
                yield done

        self.wait(self.step, started(), self.worker, 2 * self.workers)
        return references


def _on_part(function: Callable[..., T], *args: object) -> tuple[None, T]:
    hide_other_gpus()
    return None, function(*args)
