"""What is computed from the nodes of a cluster, for clusters that are made up."""

from __future__ import annotations

import itertools
import math
import threading
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from cluster import resources
from cluster.resources import (
    CapacityMonitor,
    Resources,
    capacity,
    expect_training_room,
    expect_worker_room,
    nodes,
    on_nodes_with_cpus,
    task_resources,
    wait_for_gpus,
    wait_for_nodes,
    worker_resources,
)
from defuse_core.config import ResourcesSection
from defuse_core.errors import ComputeError, RunFileError
from tests.waiting import wait_until


def cluster_of(monkeypatch: pytest.MonkeyPatch, *found: tuple[float, float, bool]) -> None:
    """Let Ray list nodes n0, n1, ... with so many CPUs and GPUs, which live or not; it leaves out what is 0."""
    listed: list[dict[str, Any]] = [
        {
            "NodeID": f"n{number}",
            "Alive": alive,
            "Resources": {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount},
        }
        for number, (cpus, gpus, alive) in enumerate(found)
    ]
    monkeypatch.setattr(ray, "nodes", lambda: listed)


def test_only_living_nodes_count(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster_of(monkeypatch, (8, 0, True), (16, 2, False), (0, 0, True), (4, 1, True))
    assert nodes() == [Resources(8, 0), Resources(0, 0), Resources(4, 1)]
    assert capacity(Resources(2, 0)) == 6
    assert capacity(Resources(2, 1)) == 1


def test_a_head_that_does_not_answer_is_waited_for_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def once_warned() -> list[dict[str, Any]]:
        wait_until(lambda: bool(caplog.messages))
        return [{"NodeID": "n0", "Alive": True, "Resources": {"CPU": 2}}]

    monkeypatch.setattr(resources, "WARN_AFTER_S", 0.01)
    monkeypatch.setattr(ray, "nodes", once_warned)
    assert nodes() == [Resources(2, 0)]
    assert caplog.messages == ["waiting for the head of the cluster, which does not answer"]


def test_a_head_is_waited_for_as_long_as_this_node_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = itertools.count()
    monkeypatch.setattr(resources, "WARN_AFTER_S", 0.01)
    monkeypatch.setattr(resources, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(resources, "own_node_has_ended", lambda: next(asked) > 2)
    monkeypatch.setattr(ray, "nodes", threading.Event().wait)
    with pytest.raises(ComputeError, match="^the node of this machine has ended, since the head"):
        nodes()


def test_what_ray_raises_for_its_nodes_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        nodes()


def test_tasks_keep_off_living_nodes_without_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster_of(monkeypatch, (0, 0, True), (8, 0, True), (0, 0, False), (0, 2, True))
    assert on_nodes_with_cpus() == {"label_selector": {"ray.io/node-id": "!in(n0,n3)"}}
    cluster_of(monkeypatch, (8, 0, True), (0, 0, False))
    assert on_nodes_with_cpus() == {}


def test_a_worker_is_given_a_gpu_where_there_is_one_and_what_the_run_file_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = ResourcesSection(cpus_per_worker=2)
    cluster_of(monkeypatch, (8, 0, True), (8, 4, False))
    assert worker_resources(asked) == Resources(2, 0)
    cluster_of(monkeypatch, (8, 0, True), (8, 4, True))
    assert worker_resources(asked) == Resources(2, 1)
    assert worker_resources(asked.model_copy(update={"gpus_per_worker": 0})) == Resources(2, 0)


def test_the_only_task_of_a_step_holds_no_more_cpus_than_a_node_that_has_its_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster_of(monkeypatch, (32, 0, True), (4, 1, True), (6, 1, True))
    assert task_resources(ResourcesSection(train_threads=8)) == Resources(6, 1)
    assert task_resources(ResourcesSection(train_threads=3)) == Resources(3, 1)
    assert task_resources(ResourcesSection(train_threads=40, gpus_per_worker=0)) == Resources(32, 0)


def test_a_task_waits_for_a_node_with_its_gpu_after_the_last_one_was_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cluster_of(monkeypatch, (8, 0, True), (8, 1, False))
    CapacityMonitor("train", task_resources(ResourcesSection(gpus_per_worker=1))).check(running=False)
    assert caplog.messages == ["train: waiting for a node with room for a worker of 2 CPU and 1 GPU"]


def test_more_workers_than_the_nodes_have_room_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster_of(monkeypatch, (3, 0, True), (2, 0, True), (9, 0, False))
    assert capacity(worker_resources(ResourcesSection(cpus_per_worker=2))) == 2
    expect_worker_room(ResourcesSection(cpus_per_worker=2))
    expect_worker_room(ResourcesSection(workers=5))
    with pytest.raises(
        RunFileError, match=r"6 workers of 1 CPU and 0 GPU .* \(it has 5 CPU and 0 GPU on 2 nodes\)"
    ):
        expect_worker_room(ResourcesSection(workers=6))


def test_gpus_that_a_worker_leaves_idle_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cluster_of(monkeypatch, (8, 8, True))
    for gpus in 0.5, 1, 2:
        expect_worker_room(ResourcesSection(gpus_per_worker=gpus))
    assert caplog.messages == [
        "a worker computes on one GPU, not on 2: set resources.gpus_per_worker=1",
    ]


@pytest.mark.parametrize(
    ("node", "worker", "workers"),
    [((2.1, 0), (0.7, 0), 3), ((0.3, 0), (0.1, 0), 3), ((98, 1), (1, 1 / 49), 49)],
)
def test_what_fits_exactly_is_not_lost_to_rounding(
    node: tuple[float, float], worker: tuple[float, float], workers: int
) -> None:
    assert resources.fitting(Resources(*node), Resources(*worker)) == workers


def test_a_cluster_without_cpus_is_asked_and_waited_for_with_one_warning_and_given_up_at_last(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = list[object]()
    monkeypatch.setattr(resources, "placement_group", lambda bundles: calls.append(bundles) or "group")
    monkeypatch.setattr(resources, "remove_placement_group", calls.append)
    cluster_of(monkeypatch, (0, 4, True), (8, 0, False))
    monkeypatch.setattr(resources, "NODES_JOIN_WITHIN_S", 0.1)
    monkeypatch.setattr(resources, "LOOK_EVERY_S", 0.01)
    with pytest.raises(ComputeError, match=r"waited 0 minutes for a node with a CPU to join the cluster"):
        wait_for_nodes()
    assert caplog.messages == ["waiting for a node with a CPU to join the cluster"]
    assert calls == [[{"CPU": 1}], "group"]
    cluster_of(monkeypatch, (0, 4, True), (1, 0, True))
    wait_for_nodes()


def test_what_workers_that_train_and_runs_on_gpus_wait_for_is_asked_for_as_a_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = list[object]()
    monkeypatch.setattr(resources, "placement_group", asked.append)
    monkeypatch.setattr(resources, "remove_placement_group", lambda _: None)
    monkeypatch.setattr(resources, "NODES_JOIN_WITHIN_S", 0.0)
    cluster_of(monkeypatch, (8, 2, True))
    with pytest.raises(ComputeError, match="for room for 3 workers"):
        expect_training_room(Resources(2, 1), 3, wait=True)
    cluster_of(monkeypatch, (8, 0, True))
    with pytest.raises(ComputeError, match="for a node with a GPU"):
        wait_for_gpus(ResourcesSection(), True)
    assert asked == [[{"CPU": 2, "GPU": 1}] * 3, [{"GPU": 1}]]


def test_each_wait_for_room_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now, looks = [100.0], list[float]()
    monkeypatch.setattr(resources, "time", SimpleNamespace(monotonic=lambda: now[0]))
    room = [1]

    def looked(worker: Resources) -> int:
        looks.append(now[0])
        return room[0]

    monkeypatch.setattr(resources, "capacity", looked)
    monitor = CapacityMonitor("identify", Resources(1, 0))

    def said(until: float, running: bool) -> list[str]:
        caplog.clear()
        while now[0] < until:
            now[0] += 1
            monitor.check(running)
        return caplog.messages

    busy = "identify: waiting for 1 CPU and 0 GPU to be free on the cluster"
    gone = "identify: waiting for a node with room for a worker of 1 CPU and 0 GPU"
    assert said(129, running=False) == []
    assert said(200, running=False) == [busy]  # once
    assert said(210, running=True) == []
    assert said(239, running=False) == []
    assert said(250, running=False) == [busy]  # it waits again
    room[0] = 0
    assert said(300, running=False) == [gone]
    room[0] = 1
    assert said(310, running=True) == []
    room[0] = 0
    assert said(400, running=False) == [gone]  # not that others hold the room: there is none
    assert min(b - a for a, b in pairwise(looks)) == math.ceil(resources.CHECK_EVERY_S)
