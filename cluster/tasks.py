"""Calls as tasks on Ray: which share a task, which arguments are stored once, and what a task runs."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass, replace
from typing import Any

import ray

from cluster.progress import reporting
from cluster.resources import WorkerResources, capacity, claim_devices
from defuse_core.local import Profile
from defuse_core.protocols import Call, numbered

log = logging.getLogger("defuse")


def calls_by_task(
    calls: Sequence[Call[Any]], worker: WorkerResources
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


def shared_arguments(calls: Sequence[Call[Any]]) -> dict[int, Any]:
    """Return references to the artefacts that several calls take, by id: each is stored once."""
    artefacts = [each for call in calls for each in call.args if is_dataclass(each)]
    counts = Counter(map(id, artefacts))
    shared = {id(each): each for each in artefacts if counts[id(each)] > 1}
    return {name: ray.put(each) for name, each in shared.items()}


def in_worker(
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
        with reporting(progress_actor, number) as progress:
            log.debug("%s: in %s", step, claim_devices(step))
            own = args[place * count : (place + 1) * count]
            results.append(profile.call(step, function, *own, progress=progress, task=number))
    return None, *results
