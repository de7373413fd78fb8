"""Joining a Ray cluster or starting one in this machine, and what a worker may have of it."""

from __future__ import annotations

import logging
import math
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from cluster.faults import one_line
from defuse_core.config import ResourcesSection
from defuse_core.errors import ComputeError, InputError, RunFileError

log = logging.getLogger("defuse")
SHARE_THE_STORE = "--store must be what all nodes share: s3://bucket/prefix, or a shared folder"
LOOK_EVERY_S = 3.0
JOINING_S = 600.0  # what a cloud takes for a node, with room to spare


def connect(address: str | None) -> bool:
    """Join the cluster at `address`, or start an embedded Ray; True if this call made the connection.

    Raises InputError for an address of another kind, ComputeError where no cluster answers.
    """
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if address is None:
        protect_embedded()
        ray.init(address="local", include_dashboard=False, **quiet)
        return True
    if "://" in address:
        raise InputError(
            f"--address {address}: expected HOST:PORT of a cluster that this machine is a node of, or auto; from "
            "elsewhere `defuse submit` takes the dashboard's http:// address"
        )
    try:
        ray.init(address=address, **quiet)
    except Exception as error:
        raise ComputeError(_unreachable(address, error)) from error
    return True


def protect_embedded() -> None:
    """Let nobody but this process use the embedded Ray: it listens on every interface of the machine.

    Ray turns its token authentication on by itself unless RAY_AUTH_MODE says otherwise; with a token of this
    process it neither needs nor writes ~/.ray/auth_token.
    """
    if "RAY_AUTH_MODE" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _unreachable(address: str, error: Exception) -> str:
    text = str(error)
    if "token" in text.lower() or "authenticat" in text.lower():
        return (
            f"Ray at {address} asks for a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's "
            "(`ray get-auth-token` on its head shows it)"
        )
    return (
        f"no Ray cluster answers at {address} ({one_line(error)}); see --address, RAY_ADDRESS, RAY_AUTH_TOKEN"
    )


def expect_root_of_nodes(root: Path | None) -> None:
    """Raise RunFileError for a `data.root` that each node would look for in another folder."""
    if root is not None and not root.is_absolute():
        raise RunFileError(f"data.root {root}: expected the absolute path of the images on the nodes")


@dataclass(frozen=True)
class Share:
    """What one worker, trial or task has of the cluster."""

    cpus: float
    gpus: float

    def options(self) -> dict[str, Any]:
        """Return it as arguments of ray.remote."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus}

    def __str__(self) -> str:
        return f"{self.cpus:g} CPU and {self.gpus:g} GPU"


def nodes() -> list[Share]:
    """Return what each living node has in all."""
    found = (node["Resources"] for node in ray.nodes() if node["Alive"])  # type: ignore[no-untyped-call]
    return [Share(resources.get("CPU", 0), resources.get("GPU", 0)) for resources in found]


def wait_for_nodes() -> None:
    """Wait while no living node has a CPU: workers of a cluster that was just made, or that was lost, are on their way.

    Raises ComputeError when none came.
    """
    begun, told = time.monotonic(), False
    while not any(node.cpus for node in nodes()):
        if not told:
            log.warning("waiting for a node with a CPU to join the cluster")
            told = True
        if time.monotonic() - begun > JOINING_S:
            raise ComputeError(
                f"no node with a CPU joined the cluster in {JOINING_S / 60:.0f} minutes; see `ray status`"
            )
        time.sleep(1)


def worker_share(section: ResourcesSection) -> Share:
    """Return the share of an identification worker or a trial: a GPU where the cluster has any, else CPUs."""
    if section.gpus_per_worker != "auto":
        return Share(section.cpus_per_worker, section.gpus_per_worker)
    return Share(section.cpus_per_worker, 1 if any(node.gpus for node in nodes()) else 0)


def task_share(section: ResourcesSection) -> Share:
    """Return the share of a task that has the step for itself: its threads, as far as a node has them."""
    gpus = worker_share(section).gpus
    fitting = [node.cpus for node in nodes() if node.gpus >= gpus]
    return Share(min(section.train_threads, max(fitting, default=0)), gpus)


def capacity(share: Share) -> int:
    """Return how many workers of this share fit on the nodes, were they empty."""
    return sum(_fitting(node, share) for node in nodes())


class Lookout:
    """Says that a step waits because no node has room for its workers, each time that it comes to that."""

    def __init__(self, step: str, share: Share) -> None:
        self.step, self.share = step, share
        self.waiting, self.looked_at = False, -math.inf

    def look(self) -> None:
        """Look at the nodes, but no more often than is worth it."""
        if time.monotonic() - self.looked_at < LOOK_EVERY_S:
            return
        self.looked_at, room = time.monotonic(), capacity(self.share)
        if not room and not self.waiting:
            log.warning("%s: waiting for a node with room for a worker of %s", self.step, self.share)
        self.waiting = not room


def _fitting(node: Share, share: Share) -> int:
    by_cpu = int(node.cpus / share.cpus + 1e-9)
    if not share.gpus:
        return by_cpu
    return min(
        by_cpu, int(node.gpus) * int(1 / share.gpus + 1e-9) if share.gpus < 1 else int(node.gpus / share.gpus)
    )


def worker_count(section: ResourcesSection) -> int:
    """Return how many workers to have now. Raises RunFileError where the cluster has no room for them."""
    share = worker_share(section)
    room, wanted = capacity(share), section.workers
    if room == 0 or (wanted != "auto" and wanted > room):
        has = Share(sum(node.cpus for node in nodes()), sum(node.gpus for node in nodes()))
        asked = "a worker" if wanted == "auto" else f"{wanted} worker{'s' if wanted != 1 else ''}"
        raise RunFileError(
            f"resources: {asked} of {share} each asked for, but the cluster has room for {room} "
            f"(it has {has} on {len(nodes())} node{'s' if len(nodes()) != 1 else ''})"
        )
    return room if wanted == "auto" else wanted
