"""Identification on the cluster: the driver sends shards to actors, which write them to the store.

A killed process, a lost node or a failing store costs the shards in flight, which are queued again; a shard that
raises an error is tried once more. Two properties of Ray need care: a restarted actor that waits for a node would
hoard shards, and one may be placed on a node that is dead but not yet known to be. So an actor gets shards only
after it has answered a ping, which Ray may retry without limit.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnschedulableError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
)
from tenacity import RetryCallState, retry, retry_if_exception_type, stop_after_attempt, wait_exponential

from cluster.connection import MORE_MEMORY, as_defuse_error, explained_line
from cluster.progress import ProgressListener, add_to_counter, reporting
from cluster.ray_compat import count_restarts
from cluster.resources import CapacityMonitor, Resources, WorkerLocation, claim_devices
from defuse_core.artifacts import Models, Psi, ReferenceSet, Shard
from defuse_core.config import RunFile
from defuse_core.data import Images
from defuse_core.device import is_device_failure, is_out_of_memory
from defuse_core.errors import ComputeError, DefuseError, InputError, RunBusyError, StoreError
from defuse_core.identify import Identifier, blocks_per_shard, save_shard, shard_count, shard_key
from defuse_core.local import Profile
from defuse_core.protocols import silent
from defuse_core.store import SHARED_STORE, Store

log = logging.getLogger("defuse")
IN_FLIGHT = 2  # shards per worker: the next one waits at the worker when the last is done
MAX_RESTARTS = 10  # most times that the process of a worker is started again before it answers
MAX_LOSSES = 4  # most losses of one shard with its worker; one more is an error
SAVE_ATTEMPTS = 6  # attempts within 15 s
ERROR_ARRIVES_S = 1.0  # time for the error of a failed GPU to reach the driver before its process ends
POLL_EVERY_S = 1.0
SCALE_EVERY_S = 3.0
CHECK_NODE = (
    "free memory and disk space on its node, then run again to continue; Ray's logs are in session_latest/logs of its "
    "folder there (/tmp/ray, or RAY_TMPDIR)"
)


def _warn_not_stored(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    index = state.args[1].index  # of the shard
    log.warning("identify: shard %d not stored, trying again in %g s: %s", index, state.upcoming_sleep, error)


# no method of the actor: Ray pickles those, and tenacity's before release 9.2 cannot be pickled
@retry(
    retry=retry_if_exception_type(StoreError),
    wait=wait_exponential(multiplier=0.5),
    stop=stop_after_attempt(SAVE_ATTEMPTS),
    before_sleep=_warn_not_stored,
    reraise=True,
)
def _save_with_retries(store: Store, shard: Shard) -> Psi:
    """Write the shard. A store that fails for a while does not cost what was found."""
    return save_shard(store, shard)


class ShardWorker:
    """The actor. It opens data and models with its first shard, and returns counts."""

    def __init__(self, spec: RunFile, store: Store, profile: Profile) -> None:
        self.spec, self.store, self.profile = spec, store, profile
        self.identifier: Identifier | None = None
        self.has_failed_gpu = False

    def ping(self, progress_actor: Any) -> WorkerLocation:
        """Return where this actor runs."""
        with reporting(progress_actor):
            return claim_devices("identify")

    def shard(
        self, index: int, weights: tuple[Models, ReferenceSet | None], train: Images, progress_actor: Any
    ) -> Psi:
        """Identify shard `index`, write it to the store, and return its counts.

        Weights, images and progress actor are arguments of every call: Ray restores only plain values for the
        constructor of a restarted actor. All workers of a node read the same copy of them.
        """
        if self.has_failed_gpu:
            # the GPU fails this process from then on, not the one in which Ray starts the actor again
            time.sleep(ERROR_ARRIVES_S)
            os._exit(1)
        models, references = weights
        with reporting(progress_actor), shard_errors(shard_name(self.spec, models.images["train"], index)):
            first = self.identifier is None
            try:
                self.identifier = self.identifier or Identifier(self.spec, models, references, train)
                with self.profile.trace("identify", f"shard-{index}", silent) if first else nullcontext():
                    shard = self.identifier.shard(index)
            except RuntimeError as error:
                self.has_failed_gpu = is_device_failure(error) and not is_out_of_memory(error)
                raise
            record = _save_with_retries(self.store, shard)
        add_to_counter("images", record.images)
        add_to_counter("decodings", record.decodings)
        add_to_counter("failures", record.total)
        return record


@contextlib.contextmanager
def shard_errors(shard: str) -> Iterator[None]:
    """Prefix any exception with the name of the shard, and raise it as an error of the tree."""
    try:
        yield
    except DefuseError as error:
        raise type(error)(f"identify: {shard} failed: {error}") from error
    except Exception as error:
        remedy = f"; {MORE_MEMORY}" if is_out_of_memory(error) else ""
        raise ComputeError(f"identify: {shard} failed: {type(error).__name__}: {error}{remedy}") from error


def shard_name(spec: RunFile, images: int, index: int) -> str:
    """Return the shard's number and its rows of the training set, for messages."""
    size = blocks_per_shard(images, spec.identify) * spec.identify.block_images
    count = shard_count(images, spec.identify)
    last = min((index + 1) * size, images) - 1
    return f"shard {index} of {count} (training images {index * size} to {last})"


@dataclass(eq=False)
class Worker:
    """The driver's record of one worker."""

    number: int
    actor: Any
    location: WorkerLocation | None = None  # from its latest ping
    # pinged, until it answers; silent: that failed, and it is pinged again with the next _scale; dropped: cannot start
    state: Literal["pinged", "ready", "silent", "dropped"] = "pinged"
    shards: list[int] = field(default_factory=list)  # in flight
    restarts: int = 0  # of its process, until it last answered


@dataclass(eq=False)
class IdentifyContext:
    """What all workers share, what each one holds of the cluster, and how many are wanted now."""

    spec: RunFile
    weights: Any  # ObjectRef of Models and, for screening, ReferenceSet
    train: Any  # ObjectRef of Images
    images: int  # N
    store: Store
    resources: Resources
    wanted: Callable[[], int]
    listener: ProgressListener
    name: str  # prefix of the actors' names
    profile: Profile

    def start_worker(self, number: int) -> Any:
        """Return a new actor, which Ray restarts when its process or node dies."""
        remote = ray.remote(ShardWorker).options(
            name=f"{self.name}-{number}", max_restarts=-1, max_task_retries=0, **self.resources.options()
        )
        return remote.remote(self.spec, self.store, self.profile)


class ShardScheduler:
    """The driver's side: starts workers, pings them, and drops those that are lost.

    It holds the shards that wait, those in flight, and the records of those that are done.
    """

    def __init__(self, context: IdentifyContext, waiting: Iterable[int], total: int) -> None:
        self.context, self.total = context, total
        self.waiting = deque(waiting)
        self.asked = len(self.waiting)
        self.records: dict[int, Psi] = {}
        self.losses: Counter[int] = Counter()  # shard -> how often its worker was lost
        self.failed: set[int] = set()  # shards that raised an error once
        self.workers: list[Worker] = []
        self.pings: dict[Any, Worker] = {}  # ObjectRef -> worker
        self.in_flight: dict[Any, tuple[Worker, int]] = {}  # ObjectRef -> worker and shard
        self.scaled_at = -math.inf
        self.seen_in_store: set[WorkerLocation | None] = set()  # locations whose shards the driver finds
        self.monitor = CapacityMonitor("identify", context.resources)

    def run(self) -> dict[int, Psi]:
        """Return the records of all shards that waited.

        Raises the error of a shard that fails a second time, or at once where the user's input is at fault;
        ComputeError for a shard whose worker is lost again and again; RunBusyError where another driver took the run
        over. Whatever ends it also ends the workers.
        """
        try:
            while len(self.records) < self.asked:
                self.context.store.require_lock()
                self.monitor.check(any(worker.state == "ready" for worker in self.workers))
                self._scale()
                for reference in self._wait_for_results():
                    self._handle_result(reference)
                self.context.listener.poll()
            return self.records
        finally:
            for worker in self.workers:
                ray.kill(worker.actor)

    def _scale(self) -> None:
        """Start as many workers as are wanted, on nodes that have joined, too; ping silent ones again.

        Those whose process ends again and again before it answers are dropped.
        """
        now = time.monotonic()
        if now - self.scaled_at < SCALE_EVERY_S:
            return
        self.scaled_at, wanted = now, self.context.wanted()
        for _ in range(min(wanted, self.asked) - len(self.workers)):
            worker = Worker(len(self.workers), self.context.start_worker(len(self.workers)))
            self.workers.append(worker)
            self._ping(worker)
        for worker in self.workers:
            if worker.state == "silent":
                self._ping(worker)
            elif worker.state == "pinged":
                self._drop_if_it_never_answers(worker)

    def _drop_if_it_never_answers(self, worker: Worker) -> None:
        """Drop a worker that Ray would start again without end, such as on a node whose disk is full."""
        if count_restarts(worker.actor) - worker.restarts <= MAX_RESTARTS:
            return
        self.pings = {reference: each for reference, each in self.pings.items() if each is not worker}
        ray.kill(worker.actor)
        self._drop(worker, f"its process ended {MAX_RESTARTS + 1} times before it answered; {CHECK_NODE}")

    def _wait_for_results(self) -> list[Any]:
        """Return the references whose results have arrived, after POLL_EVERY_S at most."""
        if not self.pings and not self.in_flight:  # ray.wait returns at once for an empty list
            time.sleep(POLL_EVERY_S)
            return []
        ready, _ = ray.wait([*self.pings, *self.in_flight], timeout=POLL_EVERY_S)
        return ready

    def _ping(self, worker: Worker) -> None:
        worker.state = "pinged"
        reference = worker.actor.ping.options(max_task_retries=-1).remote(self.context.listener.actor)
        self.pings[reference] = worker

    def _handle_result(self, reference: Any) -> None:
        """Handle one result, then dispatch shards to the workers that are free."""
        if reference in self.pings:
            self._handle_ping(reference, self.pings.pop(reference))
        else:
            self._handle_shard(reference, *self.in_flight.pop(reference))
        for worker in self.workers:
            self._dispatch(worker)

    def _handle_ping(self, reference: Any, worker: Worker) -> None:
        """The worker is ready, or is pinged again later, or cannot start, such as on a node that lacks something."""
        try:
            worker.location, worker.state = ray.get(reference), "ready"
            worker.restarts = count_restarts(worker.actor)
            log.info("identify: worker %d is %s", worker.number, worker.location)
        except RayTaskError as error:
            raise as_defuse_error(error, "identify") from error
        except (ActorDiedError, ActorUnschedulableError, RuntimeEnvSetupError) as error:
            self._drop(worker, explained_line(error), error)
        except RayError:
            worker.state = "silent"

    def _drop(self, worker: Worker, reason: str, error: RayError | None = None) -> None:
        """Go on without a worker that cannot start. Raises ComputeError where no other is left."""
        worker.state, why = "dropped", f"worker {worker.number} does not start: {reason}"
        if all(each.state == "dropped" for each in self.workers):
            raise ComputeError(f"identify: {why}") from error
        log.warning("identify: going on without a worker: %s", why)

    def _handle_shard(self, reference: Any, worker: Worker, index: int) -> None:
        """The shard is finished, or has failed, or its worker was lost and is pinged until it is back."""
        worker.shards.remove(index)
        try:
            self._on_shard_done(worker, index, ray.get(reference))
        except RayTaskError as error:
            self._on_shard_failed(index, error)
        except RayError as error:
            self._on_worker_lost(worker, index, error)
            if worker.state in ("ready", "silent"):
                self._ping(worker)

    def _on_shard_done(self, worker: Worker, index: int, record: Psi) -> None:
        """Record the counts. Raises InputError where what the worker wrote is not in the driver's store."""
        store = self.context.store
        if worker.location not in self.seen_in_store:
            if not store.exists(shard_key(index)):
                raise InputError(
                    f"identify: worker {worker.number} ({worker.location}) wrote to {store.address}, and this process "
                    f"does not find it there; {SHARED_STORE}"
                )
            self.seen_in_store.add(worker.location)
        self.records.setdefault(index, record)
        done = self.total - self.asked + len(self.records)
        self.context.listener.progress("perturbing training images", done, self.total, "shards")

    def _on_shard_failed(self, index: int, error: RayTaskError) -> None:
        """Queue the shard again after its first error, raise the second."""
        if index in self.records:  # another worker has finished it
            return
        cause = as_defuse_error(error, "identify")
        if isinstance(cause, InputError | RunBusyError) or index in self.failed:
            raise cause from error
        log.warning("identify: repeating shard %d, since it failed once: %s", index, cause)
        self.failed.add(index)
        self._requeue(index)

    def _on_worker_lost(self, worker: Worker, index: int, error: RayError) -> None:
        """The worker's process or node is gone: queue its shard again."""
        if index in self.records:
            return
        if self.losses[index] >= MAX_LOSSES:
            name = shard_name(self.context.spec, self.context.images, index)
            raise ComputeError(
                f"identify: {name} was lost {MAX_LOSSES + 1} times with its worker: {explained_line(error)}; "
                "check that it fits in memory, then run again to continue"
            ) from error
        log.warning(
            "identify: repeating shard %d, since worker %d was lost (%s)",
            index,
            worker.number,
            worker.location,
        )
        self.losses[index] += 1
        self._requeue(index)

    def _requeue(self, index: int) -> None:
        add_to_counter("shards_redone", 1)
        self.waiting.appendleft(index)

    def _dispatch(self, worker: Worker) -> None:
        """Keep the worker busy. Near the end an idle worker also gets the shard of a straggler."""
        while worker.state == "ready" and len(worker.shards) < IN_FLIGHT and self.waiting:
            self._send(worker, self.waiting.popleft())
        if worker.state == "ready" and not worker.shards and (index := self._straggler()) is not None:
            self._send(worker, index)

    def _send(self, worker: Worker, index: int) -> None:
        if index in self.records:
            return
        worker.shards.append(index)
        reference = worker.actor.shard.remote(
            index, self.context.weights, self.context.train, self.context.listener.actor
        )
        self.in_flight[reference] = (worker, index)

    def _straggler(self) -> int | None:
        """Return the shard that was sent last among those that only one worker has, or None."""
        holders = Counter(index for _, index in self.in_flight.values())
        alone = (index for _, index in reversed(self.in_flight.values()) if holders[index] == 1)
        return next((index for index in alone if index not in self.records), None)
