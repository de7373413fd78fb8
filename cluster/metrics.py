"""What the cluster's dashboard and Prometheus can plot of a run."""

from __future__ import annotations

import functools

from ray.util.metrics import Counter, Gauge


@functools.cache
def _counter(name: str, description: str) -> Counter:
    return Counter(f"defuse_{name}", description=description)


def _count(name: str, description: str, amount: int) -> None:
    if amount:  # Ray refuses to add nothing
        _counter(name, description).inc(amount)


def identified(images: int, decodings: int, failures: int) -> None:
    """Count one finished shard. Called in the worker."""
    _count("images", "Training images perturbed", images)
    _count("decodings", "Codes decoded and classified", decodings)
    _count("failures", "Codes of Psi found", failures)


def redone(shards: int) -> None:
    """Count shards that were lost or failed, and are made again. Called in the driver."""
    _count(
        "shards_redone", "Shards made again, since they were lost with their worker or failed once", shards
    )


@functools.cache
def _running() -> Gauge:
    return Gauge("defuse_trials_running", description="Trials of the sweep over lambda that are running")


def trials_running(count: int) -> None:
    """Say how many trials run now. Called in the driver."""
    _running().set(count)
