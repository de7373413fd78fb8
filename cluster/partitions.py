"""RayPartitions: parts of a data set in Ray's store, and functions that run where the parts are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import ray

from cluster.connection import ray_errors
from cluster.resources import LOST_NODES, Resources, capacity, hide_other_gpus, on_nodes_with_cpus
from defuse_core.config import ResourcesSection

T = TypeVar("T")
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
            "max_retries": LOST_NODES,
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
