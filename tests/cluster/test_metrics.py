"""What Prometheus reads of a run on each node."""

from __future__ import annotations

import re
import time
import urllib.request
from pathlib import Path

import pytest
import ray

from cluster.compute import RayCompute
from defuse_core.artifacts import Corrections, Models
from defuse_core.protocols import SweepRequest
from tests.cluster.fakes import CountingStore, HiccupStore
from tests.conftest import tiny
from tests.waiting import WAIT_S

pytestmark = pytest.mark.usefixtures("ray_session")
SETTLE_S = 7.0  # what tests before this one counted is exported within this time


def scraped() -> dict[str, float]:
    """Return Defuse's metrics on this machine's node, summed over the processes that count."""
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=60) as reply:
        page = reply.read().decode()
    found: dict[str, float] = {}
    for name, value in re.findall(r"^ray_(defuse_\w+){.*} (\S+)$", page, re.MULTILINE):
        found[name] = found.get(name, 0.0) + float(value)
    return found


def settled() -> dict[str, float]:
    """Return the metrics once they have not changed for SETTLE_S."""
    found, since = scraped(), time.monotonic()
    while time.monotonic() < since + SETTLE_S:
        time.sleep(0.5)
        if (now := scraped()) != found:
            found, since = now, time.monotonic()
    return found


def wait_for(expected: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    """Return by how much each of `expected` has grown, once all have, or after WAIT_S."""
    deadline = time.monotonic() + WAIT_S
    while True:
        now = scraped()
        grown = {name: now.get(name, 0.0) - before.get(name, 0.0) for name in expected}
        if time.monotonic() > deadline or all(grown[name] >= expected[name] for name in expected):
            return grown
        time.sleep(0.5)


def test_prometheus_reads_what_identification_did_and_how_many_trials_run(
    tiny_models: Models, fixes: Corrections, tmp_path: Path
) -> None:
    running = set()

    def look(what: str, *told: object) -> None:
        if what.startswith("fine-tuning"):
            running.add(scraped().get("defuse_trials_running"))

    spec = tiny(resources={"workers": 1}, correct={"lambdas": [0.1, 1.0]})
    before = settled()
    with RayCompute(None, spec, look) as compute:
        psi = compute.identify(spec, tiny_models, HiccupStore(tmp_path / "run", "psi/000003"))
        compute.sweeps(
            tiny_models, [SweepRequest(spec, fixes, None, CountingStore(tmp_path / "trials", pause_s=2.0))]
        )[0]
    expected = {
        "defuse_images_total": psi.images,
        "defuse_decodings_total": psi.decodings,
        "defuse_failures_total": sum(psi.codes),
        "defuse_shards_redone_total": 1,
    }
    assert wait_for(expected, before) == expected
    assert 1.0 in running
    assert running <= {None, 0.0, 1.0}
