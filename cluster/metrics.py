"""Metrics of a run for Ray's dashboard and Prometheus."""

from __future__ import annotations

import functools

from ray.util.metrics import Counter, Gauge


@functools.cache
def _counter(name: str, description: str) -> Counter:
    return Counter(f"defuse_{name}", description=description)


def _count(name: str, description: str, amount: int) -> None:
    if amount:  # Ray raises for an increment of 0
        _counter(name, description).inc(amount)


def count_shard(images: int, decodings: int, failures: int) -> None:
    """Count one finished shard. Called in the worker."""
    _count("images", "Training images perturbed", images)
    _count("decodings", "Codes decoded and classified", decodings)
    _count("failures", "Codes of Psi found", failures)


def count_redone_shard() -> None:
    """Count a shard that is made again, since it failed or its worker was lost. Called in the driver."""
    _count("shards_redone", "Shards made again, since they failed once or their worker was lost", 1)


@functools.cache
def _running() -> Gauge:
    return Gauge("defuse_trials_running", description="Trials of the sweep over lambda that are running")


def set_running_trials(count: int) -> None:
    """Set the number of trials that run now. Called in the driver."""
    _running().set(count)
