"""Parts of a data set in Ray's store, and functions that run where the parts are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self, TypeVar

import ray
from ray.exceptions import RayError

from cluster.errors import as_defuse_error
from cluster.progress import ProgressListener
from cluster.ray_compat import cancel_all
from cluster.resources import hide_other_gpus, on_nodes_with_cpus, worker_count
from defuse_core.config import ResourcesSection

T = TypeVar("T")
POLL_EVERY_S = 0.5
LOST_NODES = 10  # that a part is loaded again after, and a call repeated


class RayPartitions:
    """The protocol `Partitions` on a cluster, on CPUs.

    Ray starts a call on a node that has its part, and loads a part again that was lost with its node. A call holds its
    CPUs only once its part is there, so no call waits for a part that waits for a CPU.
    """

    def __init__(
        self,
        listener: ProgressListener,
        section: ResourcesSection,
        step: str,
        require_lock: Callable[[], None],
    ) -> None:
        self.listener, self.step, self.require_lock = listener, step, require_lock
        self.at_once = worker_count(section)
        self.options = {
            "name": step,
            "num_cpus": section.cpus_per_worker,
            "num_gpus": 0,
            "max_retries": LOST_NODES,
            **on_nodes_with_cpus(),
        }
        self.parts: list[Any] = []  # ObjectRefs

    def load(self, function: Callable[..., object], arguments: Sequence[tuple[object, ...]]) -> Self:
        """Load the parts that function(*arguments) returns, spread over the nodes."""
        remote = ray.remote(_in_worker).options(**self.options, scheduling_strategy="SPREAD")
        self.parts = self._wait([partial(remote.remote, function, *each) for each in arguments])
        return self

    def map(self, function: Callable[..., T], *args: object) -> list[T]:
        remote: Any = ray.remote(_in_worker).options(**self.options)
        shared = [ray.put(argument) for argument in args]
        references = self._wait([partial(remote.remote, function, part, *shared) for part in self.parts])
        try:
            return ray.get(references)
        except RayError as error:
            raise as_defuse_error(error, self.step) from error

    def _wait(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """Start the calls, so many at once as there are workers, and return their references once all have ended.

        What runs is cancelled where this is interrupted.
        """
        references: list[Any] = []
        running: list[Any] = []
        try:
            for call in calls:
                references.append(call())
                running.append(references[-1])
                if len(running) >= 2 * self.at_once:
                    running = self._some_left(running, 1)
            while running:
                running = self._some_left(running, len(running))
        except BaseException:
            cancel_all(running)
            raise
        return references

    def _some_left(self, running: list[Any], wanted: int) -> list[Any]:
        """Wait a moment for `wanted` of the calls to end, and return those that have not."""
        while True:
            self.require_lock()
            self.listener.poll()
            ended, left = ray.wait(running, num_returns=wanted, timeout=POLL_EVERY_S, fetch_local=False)
            if ended:
                return list(left)


def _in_worker(function: Callable[..., T], *args: object) -> T:
    hide_other_gpus()
    return function(*args)
