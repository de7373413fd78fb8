"""Counters of the application, exported by Ray on every node; and the page that gathers them for Prometheus."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from typing import Any

import ray
from ray.serve.metrics import Counter, Gauge

PREFIXES = ("ray_defuse_", "ray_serve_")
SCRAPE_TIMEOUT_S = 5.0


def keys(*names: str) -> Any:
    """Ray's own annotation allows one key alone; its documentation, any number."""
    return names


class Meters:
    """What one replica counts. Every counter is per version."""

    def __init__(self) -> None:
        self.images = Counter("defuse_images_answered", "Images answered.", tag_keys=keys("version"))
        self.errors = Counter("defuse_errors", "Images that a version failed on.", tag_keys=keys("version"))
        self.compared = Counter(
            "defuse_compared",
            "Images that a canary or shadow and production both answered.",
            tag_keys=keys("version", "agreed", "inside"),
        )
        self.scenarios = Counter(
            "defuse_scenario_images",
            "Images that lie in a failure scenario.",
            tag_keys=keys("version", "scenario", "fixed"),
        )
        self.refused = Counter(
            "defuse_refused",
            "Requests refused, by status.",
            tag_keys=keys(
                "status",
            ),
        )
        self.serving = Gauge(
            "defuse_serving",
            "1 for each version on this replica, in its role.",
            tag_keys=keys("version", "role"),
        )


async def metrics_page() -> str:
    """Return the metrics of all nodes, in Prometheus' text format. A node that is away is left out."""
    pages = await asyncio.gather(*(asyncio.to_thread(_scrape, address) for address in _exporters()))
    return merged(pages)


def _exporters() -> list[str]:
    nodes = [
        node
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"] and node["MetricsExportPort"]
    ]
    return [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]


def _scrape(address: str) -> str:
    try:
        with urllib.request.urlopen(address, timeout=SCRAPE_TIMEOUT_S) as reply:
            return str(reply.read().decode())
    except (urllib.error.URLError, TimeoutError, OSError):
        return ""


def merged(pages: list[str]) -> str:
    """Return one page of several: each family's HELP and TYPE once, and the samples of all, of our families alone."""
    heads: dict[str, dict[str, str]] = {}
    samples: dict[str, list[str]] = {}
    for page in pages:
        family = ""
        for line in page.splitlines():
            if line.startswith("# "):
                _, kind, family = line.split(" ", 3)[:3]
                heads.setdefault(family, {}).setdefault(kind, line)
            elif line:
                samples.setdefault(family, []).append(line)
    ours = [family for family in samples if family.startswith(PREFIXES)]
    lines = [line for family in ours for line in (*heads[family].values(), *samples[family])]
    return "\n".join(lines) + "\n"
