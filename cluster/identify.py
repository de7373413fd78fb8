"""Identification on the cluster: actors pull shards from the driver's queue, and write them to the store.

A killed process, a lost node or a failing store costs the shards in flight, which are queued again; a shard
that raises an error is tried once more. Two things that Ray does need care: a restarted actor without a node
would hoard shards, and one may land on a node that is dead but not yet known to be. So an actor gets work
only after it has answered a ping, which may itself be retried for ever.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from cluster import metrics
from cluster.faults import as_defuse_error, one_line
from cluster.relay import Place, Relay, relayed, this_place
from cluster.session import SHARE_THE_STORE, Lookout, Share
from defuse_core.artifacts import Models, Shard
from defuse_core.config import RunFile
from defuse_core.errors import ComputeError, DefuseError, InputError, StoreError
from defuse_core.identify import Identifier, ShardRecord, blocks_per_shard, save_shard, shard_count, shard_key
from defuse_core.progress import Progress
from defuse_core.store import Store

log = logging.getLogger("defuse")
IN_FLIGHT = 2  # shards per worker: the next one is there when the last is done
MAX_TRIES = 4
STORE_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0)
LOOK_EVERY_S = 1.0
FILL_EVERY_S = 3.0


class ShardWorker:
    """The actor. It opens data and models with its first shard, and answers with counts."""

    def __init__(self, spec: RunFile, store: Store) -> None:
        self.spec, self.store = spec, store
        self.identifier: Identifier | None = None

    def ping(self, mailbox: Any) -> Place:
        """Return where this actor lives."""
        with relayed(mailbox):
            return this_place("identify")

    def shard(self, index: int, models: Models, mailbox: Any) -> ShardRecord:
        """Identify shard `index`, write it to the store, and return its counts.

        Models and mailbox come with every call: Ray promises the constructor of a restarted actor only plain
        values.
        """
        with relayed(mailbox), named(shard_name(self.spec, models.images["train"], index)):
            self.identifier = self.identifier or Identifier(self.spec, models)
            record = self._save(index, self.identifier.shard(index))
        metrics.identified(record.images, record.decodings, record.codes)
        return record

    def _save(self, index: int, shard: Shard) -> ShardRecord:
        """Write the shard; what was found is not thrown away because the store fails for a while."""
        for pause in STORE_PAUSES_S:
            try:
                return save_shard(self.store, index, shard)
            except StoreError as error:
                log.warning("identify: shard %d not stored, trying again in %g s: %s", index, pause, error)
                time.sleep(pause)
        return save_shard(self.store, index, shard)


@contextlib.contextmanager
def named(shard: str) -> Iterator[None]:
    """Add the shard to whatever is raised inside, as an error of the tree."""
    try:
        yield
    except DefuseError as error:
        raise type(error)(f"identify: {shard} failed: {error}") from error
    except Exception as error:
        raise ComputeError(f"identify: {shard} failed: {type(error).__name__}: {error}") from error


def shard_name(spec: RunFile, images: int, index: int) -> str:
    """Return a shard as a person may look for it, with the rows of the training set that it holds."""
    size = blocks_per_shard(images, spec.identify.block_images) * spec.identify.block_images
    count = shard_count(images, spec.identify.block_images)
    return (
        f"shard {index} of {count} (training images {index * size} to {min((index + 1) * size, images) - 1})"
    )


@dataclass(eq=False)
class Worker:
    """One worker, as the driver sees it."""

    number: int
    actor: Any
    place: Place | None = None  # where it was when it last answered a ping
    present: bool = False  # whether it has answered since it was last lost
    shards: list[int] = field(default_factory=list)  # in flight


@dataclass(eq=False)
class WorkerPool:
    """How workers are made, what each has of the cluster, and how many to have now."""

    spec: RunFile
    models: Any  # ObjectRef of Models
    images: int  # N
    store: Store
    share: Share
    wanted: Callable[[], int]
    relay: Relay
    name: str  # prefix of the actors' names

    def start(self, number: int) -> Any:
        """Return a new actor. It survives its process and its node."""
        remote = ray.remote(ShardWorker).options(
            name=f"{self.name}-{number}", max_restarts=-1, max_task_retries=0, **self.share.options()
        )
        return remote.remote(self.spec, self.store)


class ShardQueue:
    """The driver's side: which shards wait, which are with whom, and what was found."""

    def __init__(self, pool: WorkerPool, waiting: Iterable[int], total: int, progress: Progress) -> None:
        self.pool, self.total, self.progress = pool, total, progress
        self.waiting = deque(waiting)
        self.asked = len(self.waiting)
        self.records: dict[int, ShardRecord] = {}
        self.lost: Counter[int] = Counter()  # shard -> how often its worker died under it
        self.failed: set[int] = set()  # shards that raised an error once
        self.workers: list[Worker] = []
        self.pings: dict[Any, Worker] = {}  # ObjectRef -> who is asked
        self.flights: dict[Any, tuple[Worker, int]] = {}  # ObjectRef -> worker and shard
        self.filled_at = -math.inf
        self.trusted: set[Place | None] = set()  # whose shards are in the store as the driver sees it
        self.lookout = Lookout("identify", pool.share)

    def run(self) -> dict[int, ShardRecord]:
        """Return the records of all shards that waited.

        Raises the error of a shard that fails a second time, or at once where the user's input is at fault;
        ComputeError for a shard lost again and again.
        """
        try:
            while len(self.records) < self.asked:
                self.lookout.look()
                self._fill()
                for reference in self._arrived():
                    self._land(reference)
                self.pool.relay.pass_on()
            return self.records
        finally:
            for worker in self.workers:
                ray.kill(worker.actor)

    def _fill(self) -> None:
        """Have as many workers as wanted; nodes that joined since the last look are used from now on."""
        now = time.monotonic()
        if now - self.filled_at < FILL_EVERY_S:
            return
        self.filled_at, wanted = now, self.pool.wanted()
        for _ in range(min(wanted, self.asked) - len(self.workers)):
            worker = Worker(len(self.workers), self.pool.start(len(self.workers)))
            self.workers.append(worker)
            self._ping(worker)

    def _arrived(self) -> list[Any]:
        """Return the answers that are there, after a moment at most."""
        if not self.pings and not self.flights:  # ray.wait does not wait for nothing
            time.sleep(LOOK_EVERY_S)
            return []
        ready, _ = ray.wait([*self.pings, *self.flights], timeout=LOOK_EVERY_S)
        return ready

    def _ping(self, worker: Worker) -> None:
        worker.present = False
        reference = worker.actor.ping.options(max_task_retries=-1).remote(self.pool.relay.mailbox)
        self.pings[reference] = worker

    def _land(self, reference: Any) -> None:
        """Take one answer, and give work to whoever is free."""
        if reference in self.pings:
            self._land_ping(reference, self.pings.pop(reference))
        else:
            self._land_shard(reference, *self.flights.pop(reference))
        for free in self.workers:
            self._feed(free)

    def _land_ping(self, reference: Any, worker: Worker) -> None:
        """A worker is there; or it is away, and asked again; or it cannot work."""
        try:
            worker.place, worker.present = ray.get(reference), True
            log.info("identify: worker %d is %s", worker.number, worker.place)
        except RayTaskError as error:
            raise as_defuse_error(error, "identify") from error
        except ActorDiedError as error:
            raise ComputeError(
                f"identify: worker {worker.number} does not start: {one_line(error)}"
            ) from error
        except RayError:
            self._ping(worker)

    def _land_shard(self, reference: Any, worker: Worker, index: int) -> None:
        """A shard is finished, or has failed, or its worker is gone: then wait until the worker is back."""
        worker.shards.remove(index)
        try:
            self._finished(worker, index, ray.get(reference))
        except RayTaskError as error:
            self._failed(index, error)
        except RayError as error:
            self._vanished(worker, index, error)
            if worker not in self.pings.values():
                self._ping(worker)

    def _finished(self, worker: Worker, index: int, record: ShardRecord) -> None:
        """Take a shard's counts. Raises InputError where what the worker wrote is not in the driver's store."""
        store = self.pool.store
        if worker.place not in self.trusted:
            if not store.exists(shard_key(index)):
                raise InputError(
                    f"identify: what worker {worker.number} ({worker.place}) wrote to {store.address} is not there for "
                    f"this process; {SHARE_THE_STORE}"
                )
            self.trusted.add(worker.place)
        self.records.setdefault(index, record)
        done = self.total - self.asked + len(self.records)
        self.progress("perturbing training images", done, self.total, "shards")

    def _failed(self, index: int, error: RayTaskError) -> None:
        """The shard raised an error: a hiccup, if it goes well the second time."""
        if index in self.records:  # another worker finished it meanwhile
            return
        fault = as_defuse_error(error, "identify")
        if isinstance(fault, InputError) or index in self.failed:
            raise fault from error
        log.warning("identify: shard %d again, since it failed once: %s", index, fault)
        self.failed.add(index)
        self._requeue(index)

    def _vanished(self, worker: Worker, index: int, error: RayError) -> None:
        """The worker's process or node is gone: queue its shard again."""
        if index in self.records:
            return
        if self.lost[index] >= MAX_TRIES:
            name = shard_name(self.pool.spec, self.pool.images, index)
            raise ComputeError(
                f"identify: {name} was lost {MAX_TRIES + 1} times with its worker: {one_line(error)}; "
                "does it fit in memory? run again to go on"
            ) from error
        log.warning(
            "identify: shard %d again, since worker %d was lost (%s)", index, worker.number, worker.place
        )
        self.lost[index] += 1
        self._requeue(index)

    def _requeue(self, index: int) -> None:
        metrics.redone(1)
        self.waiting.appendleft(index)

    def _feed(self, worker: Worker) -> None:
        """Keep the worker busy. Near the end an idle one also takes a shard that a slow one has not begun."""
        while worker.present and len(worker.shards) < IN_FLIGHT and self.waiting:
            self._send(worker, self.waiting.popleft())
        if worker.present and not worker.shards and (index := self._slow()) is not None:
            self._send(worker, index)

    def _send(self, worker: Worker, index: int) -> None:
        if index in self.records:
            return
        worker.shards.append(index)
        reference = worker.actor.shard.remote(index, self.pool.models, self.pool.relay.mailbox)
        self.flights[reference] = (worker, index)

    def _slow(self) -> int | None:
        """Return the shard sent last that is still with one worker only, or None."""
        holders = Counter(index for _, index in self.flights.values())
        lonely = (index for _, index in reversed(self.flights.values()) if holders[index] == 1)
        return next((index for index in lonely if index not in self.records), None)
