"""RayCompute: the heavy steps on a Ray cluster, one short method each. Results equal LocalCompute's."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar

import ray
from ray.exceptions import RayError

from cluster.faults import as_defuse_error
from cluster.identify import ShardQueue, WorkerPool
from cluster.relay import Relay, relayed, this_place
from cluster.session import (
    capacity,
    connect,
    expect_root_of_nodes,
    task_share,
    wait_for_nodes,
    worker_count,
    worker_share,
)
from cluster.sweep import Sweeping, run_trials
from defuse_core.artifacts import Corrections, Models, Psi, Sweep
from defuse_core.config import RunFile
from defuse_core.correct import collect_sweep, load_fine_tuning_data, nothing_to_tune
from defuse_core.data import Images
from defuse_core.identify import finished_shards, gather_shards, shard_count
from defuse_core.progress import Progress, silent
from defuse_core.store import Store

log = logging.getLogger("defuse")
T = TypeVar("T")
LOOK_EVERY_S = 0.5
WAITING_AFTER_S = 30.0


class RayCompute:
    """The protocol `Compute` on the cluster at `address`, on one already joined, or on an embedded Ray.

    A context manager. Ray is started or joined when the first step needs it: a finished run needs none.
    """

    def __init__(self, address: str | None, spec: RunFile, progress: Progress = silent) -> None:
        self.address, self.spec, self.progress = address, spec, progress
        self.relay: Relay | None = None
        self.connected_here = False
        self.tag = secrets.token_hex(2)  # so that the names of two drivers' actors differ

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.relay is not None:
            self.relay.close()
            self.relay = None
        if self.connected_here:
            ray.shutdown()
            self.connected_here = False

    def task(self, step: str, function: Callable[..., T], *args: object) -> T:
        """Return function(*args, progress=...), run as one task with the accelerator, if there is one."""
        done, result = self._start(step, function, *args)
        self._wait(step, done)
        return ray.get(result)  # type: ignore[no-any-return]

    def identify(self, spec: RunFile, models: Models, store: Store) -> Psi:
        """Algorithm 1, sharded over workers that write their shards to `store` themselves.

        The driver holds a few numbers per shard: its memory does not grow with images or failures.
        """
        count = shard_count(models.images["train"], spec.identify.block_images)
        records = finished_shards(store)
        missing = [index for index in range(count) if index not in records]
        if missing:
            pool = self._pool(spec, models, store)
            records |= ShardQueue(pool, missing, count, self.progress).run()
        return gather_shards(records)

    def sweep(
        self, spec: RunFile, models: Models, fixes: Corrections, reviewed: Images | None, store: Store
    ) -> Sweep:
        """Fine-tune once per λ as Ray Tune trials. Raises ModelError or ComputeError if every trial failed for good."""
        if nothing_to_tune(fixes, reviewed):
            return collect_sweep(spec, models, [])
        trials, failures = run_trials(self._sweeping(spec, models, fixes, reviewed, store))
        return collect_sweep(spec, models, trials, failures)

    def _pool(self, spec: RunFile, models: Models, store: Store) -> WorkerPool:
        relay, section = self._ready(), self.spec.resources
        share, first = worker_share(section), worker_count(section)
        wanted = (lambda: capacity(share)) if section.workers == "auto" else (lambda: first)
        images = models.images["train"]
        return WorkerPool(spec, ray.put(models), images, store, share, wanted, relay, f"identify-{self.tag}")

    def _sweeping(
        self, spec: RunFile, models: Models, fixes: Corrections, reviewed: Images | None, store: Store
    ) -> Sweeping:
        relay, section = self._ready(), self.spec.resources
        held = ray.put(models)
        loaded, tuning = self._start("correct", load_fine_tuning_data, spec, held, fixes, reviewed)
        self._wait("correct", loaded)
        # from here on it lies on the driver's node: were it lost with another one, it would have to be made again
        # while all CPUs are held by trials that wait for it
        tuning = ray.put(ray.get(tuning))
        return Sweeping(
            spec,
            held,
            tuning,
            store,
            worker_share(section),
            None if section.workers == "auto" else section.workers,
            relay,
            self.progress,
            f"correct-{self.tag}",
        )

    def _ready(self) -> Relay:
        """Return the relay, connecting first where needed. RunFileError where resources or images cannot be found."""
        if self.relay is None:
            if self.address is not None:
                expect_root_of_nodes(self.spec.data.root)
            self.connected_here = connect(self.address)
        wait_for_nodes()
        if self.relay is None:
            worker_count(self.spec.resources)
            self.relay = Relay(self.progress)
        return self.relay

    def _start(self, step: str, function: Callable[..., Any], *args: object) -> tuple[Any, Any]:
        """Start a task; return a reference that tells when and how it ended, and one to its result."""
        relay, share = self._ready(), task_share(self.spec.resources)
        remote = ray.remote(_in_worker).options(name=step, num_returns=2, **share.options())
        done, result = remote.remote(step, function, relay.mailbox, *args)
        return done, result

    def _wait(self, step: str, done: Any) -> None:
        """Show a task's progress until it is done; its result stays where it is. Raises its error."""
        relay, begun, heard = self._ready(), time.monotonic(), False
        while not ray.wait([done], timeout=LOOK_EVERY_S)[0]:
            heard |= relay.pass_on()
            if not heard and time.monotonic() - begun > WAITING_AFTER_S:
                heard = True
                log.warning(
                    "%s: waiting for %s to be free on the cluster", step, task_share(self.spec.resources)
                )
        relay.flush()
        try:
            ray.get(done)
        except RayError as error:
            raise as_defuse_error(error, step) from error


def _in_worker(step: str, function: Callable[..., T], mailbox: Any, *args: object) -> tuple[None, T]:
    with relayed(mailbox) as progress:
        log.debug("%s: in %s", step, this_place(step))
        return None, function(*args, progress=progress)
