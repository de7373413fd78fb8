"""RayCompute: the heavy steps as Ray tasks. Its results equal LocalCompute's.

What is lost, and who starts it again: README.md, *When something is lost*.
"""

from __future__ import annotations

import functools
import logging
import math
import secrets
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import is_dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Self, TypeVar

import ray

from cluster.connection import connect, disconnect, ray_errors, require_absolute_paths
from cluster.identify import IdentifyContext, ShardScheduler
from cluster.progress import ProgressListener, reporting
from cluster.ray_compat import cancel_all
from cluster.resources import (
    TASK_RETRIES,
    CapacityMonitor,
    RayPartitions,
    Resources,
    capacity,
    claim_devices,
    expect_training_room,
    expect_worker_room,
    on_nodes_with_cpus,
    on_this_node,
    task_resources,
    wait_for_gpus,
    wait_for_nodes,
    worker_resources,
)
from defuse_core.artifacts import Models, Psi, ReferenceSet, Sweep
from defuse_core.config import RunFile
from defuse_core.identify import (
    finished_shards,
    gather_shards,
    open_training_images,
    shard_count,
    shard_fingerprint,
)
from defuse_core.local import UNTRACED, Profile
from defuse_core.protocols import Call, Compute, Progress, SweepRequest, numbered, silent
from defuse_core.runs import Run
from defuse_core.store import Store
from defuse_core.trials import collect_stored, finished_trials
from defuse_core.tuning_data import decode_scenario_images, load_clean_images, score_before

if TYPE_CHECKING:
    from cluster.ray_train_tune import Outcome, SweepContext, TrialImages

log = logging.getLogger("defuse")
T = TypeVar("T")
POLL_EVERY_S = 0.5


class RayCompute(Compute):
    """The protocol `Compute` on the cluster at `address`, on one already joined, or on an embedded Ray.

    A context manager. Ray is started or joined by the first step that needs it: a finished run needs none.
    """

    def __init__(
        self,
        address: str | None,
        spec: RunFile,
        progress: Progress = silent,
        *,
        require_lock: Callable[[], None] = lambda: None,
        profile: Profile = UNTRACED,
        on_gpus: bool = False,
    ) -> None:
        """Tasks are ended once `require_lock` raises RunBusyError. `on_gpus`: the run has computed on GPUs before."""
        self.address, self.spec, self.progress, self.require_lock = address, spec, progress, require_lock
        self.profile, self.on_gpus = profile, on_gpus
        self.listener: ProgressListener | None = None
        self.connected_here = self.had_room = False  # had_room: for the workers that train together
        self.tag = secrets.token_hex(2)  # so that the names of two drivers' actors differ

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        listener, self.listener = self.listener, None
        try:
            if listener is not None:
                listener.close()
        finally:
            if self.connected_here:
                self.connected_here = False
                disconnect()

    def tasks(self, step: str, calls: Sequence[Call[Any]]) -> list[Any]:
        self._join_cluster().begin()
        with ray_errors(step):
            shared, started = _shared_arguments(calls), []
        for numbers, some in _calls_by_task(calls, task_resources(self.spec.resources)):
            args = [shared.get(id(each), each) for call in some for each in call.args]
            options = {"num_cpus": 1} if some[0].one_thread else {}
            started.append(self._start(step, some[0].function, *args, numbers=numbers, **options))
        self._wait(step, (done for done, *_ in started))
        with ray_errors(step):  # a result whose node was lost, and that could not be made again
            return ray.get([result for _, *results in started for result in results])

    def run_distributed(self, step: str, function: Callable[..., None], *args: object) -> None:
        from cluster.ray_train_tune import run_together  # imports pandas and more

        listener, workers = self._join_cluster(), self.spec.resources.train_workers
        resources = task_resources(self.spec.resources)
        resources = replace(resources, gpus=min(1, math.ceil(resources.gpus)))  # NCCL: none is shared
        expect_training_room(resources, workers, wait=self.had_room)  # a node may have been lost since
        self.had_room = True
        given = function, args, workers, resources, listener.actor
        # on this node, so that no error of a worker names the node of this task instead; without retries: Ray keeps the
        # placement group of a lost task until this driver ends, and that of a retry would wait for it without end
        options = {"num_gpus": 0, "max_retries": 0, **on_this_node()}
        done, _ = self._start(step, run_together, *given, **options)
        self._wait(step, [done])

    def partitions(
        self, step: str, load: Callable[..., object], arguments: Sequence[tuple[object, ...]]
    ) -> RayPartitions:
        self._join_cluster()
        return RayPartitions(self.spec.resources, step, load, arguments, self._wait)

    def identify(
        self, spec: RunFile, models: Models, store: Store, references: ReferenceSet | None = None
    ) -> Psi:
        """Workers write their shards to `store` themselves.

        The driver holds a few numbers per shard: its memory does not grow with images or failures.
        """
        count = shard_count(models.images["train"], spec.identify)
        records = finished_shards(store, shard_fingerprint(spec, models, references))
        missing = [index for index in range(count) if index not in records]
        if missing:
            context = self._identify_context(spec, models, store, references)
            records |= ShardScheduler(context, missing, count).run()
        return gather_shards(records)

    def sweeps(self, models: Models, requests: Sequence[SweepRequest]) -> list[Sweep]:
        tuned = [each for each in requests if not each.is_empty]
        outcomes = dict(zip(map(id, tuned), self._run_trials(models, tuned), strict=True))
        return [collect_stored(each, models, *outcomes.get(id(each), ([], {}))) for each in requests]

    def _run_trials(self, models: Models, requests: Sequence[SweepRequest]) -> list[Outcome]:
        """Return the outcome of each request. Without a trial to run, nothing is started."""
        finished = [finished_trials(each.spec, each.store) for each in requests]
        if all(
            trials.keys() >= set(each.spec.correct.lambdas)
            for each, trials in zip(requests, finished, strict=True)
        ):
            return [([*trials.values()], {}) for trials in finished]
        from cluster.ray_train_tune import run_trials  # imports pandas and more

        return run_trials(self._sweep_context(models, requests), finished)

    @ray_errors("identify")
    def _identify_context(
        self, spec: RunFile, models: Models, store: Store, references: ReferenceSet | None
    ) -> IdentifyContext:
        listener, section = self._join_cluster(), self.spec.resources
        resources, workers = worker_resources(section), section.workers
        train = self._held_images("identify", open_training_images, spec, ray.put(models))
        return IdentifyContext(
            spec=spec,
            weights=ray.put((models, references)),
            train=train,
            images=models.images["train"],
            store=store,
            resources=resources,
            wanted=lambda: capacity(resources) if workers == "auto" else workers,
            listener=listener,
            name=f"identify-{self.tag}",
            profile=self.profile,
        )

    @ray_errors("correct")
    def _sweep_context(self, models: Models, requests: Sequence[SweepRequest]) -> SweepContext:
        from cluster.ray_train_tune import SweepContext

        listener, section = self._join_cluster(), self.spec.resources
        models_reference = ray.put(models)
        return SweepContext(
            requests=requests,
            models=models_reference,
            images=self._fine_tuning_images(models_reference, requests),
            resources=worker_resources(section),
            max_concurrent=None if section.workers == "auto" else section.workers,
            listener=listener,
            name=f"correct-{self.tag}",
            profile=self.profile,
        )

    def _fine_tuning_images(self, models: Any, requests: Sequence[SweepRequest]) -> list[TrialImages]:
        """Return what the trials of each request read; requests share what is the same for them."""
        from cluster.ray_train_tune import TrialImages

        # of plain trainings the same
        scenario_keys = [(id(each.fixes), id(each.reviewed)) for each in requests]
        drawn = {}
        for number, (key, each) in enumerate(zip(scenario_keys, requests, strict=True)):
            if key not in drawn:
                args = each.spec, models, each.fixes, each.reviewed
                drawn[key] = self._start("correct", decode_scenario_images, *args, numbers=(number,))
        shared, scored = dict[object, Any](), dict[object, list[Any]]()
        clean_keys = []
        for each in requests:
            left_out, tuned = each.sources()
            clean_key = each.spec.correct.train_images, left_out.tobytes(), tuned.tobytes()
            if clean_key not in shared:
                shared[clean_key] = self._held_images(
                    "correct", load_clean_images, each.spec, models, left_out, tuned
                )
                numbers = (len(scored),)
                scored[clean_key] = self._start(
                    "correct", score_before, each.spec, models, shared[clean_key], numbers=numbers
                )
            clean_keys.append(clean_key)
        self._wait("correct", (done for done, _ in (*drawn.values(), *scored.values())))
        right = {key: ray.get(found) for key, (_, found) in scored.items()}
        # a copy on the driver's node, by a task there: lost with another node, these images would have to be drawn
        # again, on CPUs that the trials that wait for them hold
        copy: Any = ray.remote(_copied).options(name="correct", **on_this_node())
        copies = {key: copy.remote(images) for key, (_, images) in drawn.items()}
        return [
            TrialImages(shared[clean], copies[scenario], right[clean])
            for clean, scenario in zip(clean_keys, scenario_keys, strict=True)
        ]

    def _held_images(self, step: str, function: Callable[..., Any], *args: object) -> Any:
        """Return a reference to the images that function(*args) opens, on a node that has images; raises its error.

        All workers of a node share a copy. One that is lost with its node is made again, and as that takes no CPU, it
        waits for no worker that waits for it.
        """
        done, images = self._start(step, function, *args, num_cpus=0, num_gpus=0, **on_nodes_with_cpus())
        self._wait(step, [done])
        return images

    def _join_cluster(self) -> ProgressListener:
        """Connect where needed, and return the listener. Raises RunFileError for missing resources or images."""
        if self.listener is None:
            self.connected_here = connect(self.address)
            if self.address is not None:
                require_absolute_paths(self.spec)
            if self.address is None and self.connected_here:  # no node joins the embedded Ray
                self.on_gpus = False
        wait_for_nodes()
        self.on_gpus = wait_for_gpus(self.spec.resources, self.on_gpus)
        if self.listener is None:
            expect_worker_room(self.spec.resources)
            self.listener = ProgressListener(self.progress)
        return self.listener

    def _start(
        self,
        step: str,
        function: Callable[..., Any],
        *args: object,
        numbers: Sequence[int] = (0,),
        **options: Any,
    ) -> list[Any]:
        """Start a task; return a reference that is ready when it has ended, and one to the result of each of its calls.

        `numbers` are those of its calls among those of the same function that are started together; `args` are the
        arguments of one call after the other. A process that had a GPU ends with its task: it would keep memory of the
        GPU, and compute on the same one when it is granted another.
        """
        listener, resources = self._join_cluster(), task_resources(self.spec.resources)
        options = {"name": step, "max_retries": TASK_RETRIES, **resources.options()} | options
        remote = _remote_calls(max_calls=1 if options["num_gpus"] else 0)
        started = remote.options(num_returns=1 + len(numbers), **options)
        with ray_errors(step):
            return list(started.remote(step, numbers, function, self.profile, listener.actor, *args))

    def _wait(
        self, step: str, tasks: Iterable[Any], worker: Resources | None = None, at_once: int = sys.maxsize
    ) -> None:
        """Show the progress of tasks until all ended; their results stay on their nodes. Raises the first error.

        An iterator that starts them is asked for the next one while fewer than `at_once` run. `worker` is what each
        holds, if not `task_resources`.
        """
        waiting, tasks, listener = list[Any](), iter(tasks), self.listener
        assert listener is not None  # a task was started
        monitor, has_run = CapacityMonitor(step, worker or task_resources(self.spec.resources)), False
        with ray_errors(step):
            try:
                while waiting := [*waiting, *islice(tasks, at_once - len(waiting))]:
                    ready, waiting = ray.wait(waiting, timeout=POLL_EVERY_S)
                    self.require_lock()
                    shown = listener.flush() if ready else listener.poll()
                    ray.get(ready)
                    has_run = has_run or shown or bool(ready)
                    monitor.check(has_run)
            except BaseException:
                cancel_all(waiting)
                raise


def on_ray(
    address: str | None = None, progress: Progress = silent, profile: Profile = UNTRACED
) -> Callable[[Run], RayCompute]:
    """Return `compute` of `defuse_core.debug`: Ray at `address`, or without one an embedded Ray."""
    return lambda run: RayCompute(
        address,
        run.spec,
        progress,
        require_lock=run.store.require_lock,
        profile=profile,
        on_gpus=run.used_gpus(),
    )


@functools.cache
def _remote_calls(max_calls: int) -> Any:
    """Return `_calls_in_worker` as one function of Ray, which starts the tasks of one in the order of their calls."""
    return ray.remote(max_calls=max_calls)(_calls_in_worker)


def _calls_in_worker(
    step: str,
    numbers: Sequence[int],
    function: Callable[..., Any],
    profile: Profile,
    progress_actor: Any,
    *args: object,
) -> tuple[Any, ...]:
    """Make the calls of a task, with the devices that Ray gave its process; return None and then their results.

    `args` are the arguments of one call after the other. Their reports go to the driver's actor, under the numbers
    `numbers`.
    """
    results, count = [], len(args) // len(numbers)
    for place, number in enumerate(numbers):
        own = args[place * count : (place + 1) * count]
        with reporting(progress_actor, number) as reporter:
            log.debug("%s: in %s", step, claim_devices(step))
            with profile.task(step, function, reporter, number) as progress:
                results.append(function(*own, progress=progress))
    # None first: the driver waits for it, so that no result is fetched before it is wanted
    return None, *results


def _calls_by_task(
    calls: Sequence[Call[Any]], worker: Resources
) -> list[tuple[tuple[int, ...], tuple[Call[Any], ...]]]:
    """Return the calls of each task, after their numbers among those of the same function: one, or several short ones.

    Calls of one thread, which are short and of one function, share as many tasks as run at once where these hold GPUs,
    since each such task is a process of its own, which imports torch.
    """
    size = 1
    if worker.gpus and all(call.one_thread for call in calls):
        size = math.ceil(len(calls) / max(1, capacity(replace(worker, cpus=1)))) or 1
    found = numbered(calls)
    groups = (found[first : first + size] for first in range(0, len(found), size))
    return [(tuple(number for number, _ in group), tuple(call for _, call in group)) for group in groups]


def _shared_arguments(calls: Sequence[Call[Any]]) -> dict[int, Any]:
    """Return references to the artefacts that several calls take, by id: each is stored once."""
    artefacts = [each for call in calls for each in call.args if is_dataclass(each)]
    counts = Counter(map(id, artefacts))
    shared = {id(each): each for each in artefacts if counts[id(each)] > 1}
    return {name: ray.put(each) for name, each in shared.items()}


def _copied(value: T) -> T:
    return value
