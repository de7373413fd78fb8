"""Metrics and log of a replica, one page of all nodes' metrics for Prometheus, and whether a server can still answer.

Ray exports the metrics on every node. `defuse serve` asks whether the server that it started can answer.
"""

from __future__ import annotations

import asyncio
import http.client
import logging
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import ray
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from ray.serve.metrics import Counter, Gauge

from cluster.ray_compat import embedded_ray_has_ended
from defuse_core.errors import ComputeError
from defuse_core.formatting import count_of, escape_control_characters, one_line
from defuse_core.report.evidence_schema import WatchFigures

log = logging.getLogger("defuse")
PREFIXES = ("ray_defuse_", "ray_serve_")
LINE_STARTS = tuple(f"{start}{prefix}" for start in ("", "# HELP ", "# TYPE ") for prefix in PREFIXES)
SCRAPE_TIMEOUT_S = 5.0
# of the page alone: each scrape that is given up while Ray's head does not answer still holds a thread
SCRAPE_THREADS = ThreadPoolExecutor(8, "metrics")
LOG_AGAIN_S = 60.0  # interval at which a failure that repeats is logged
MAX_LINE, MAX_ERROR = 2000, 600  # characters of a line of the log, and of an error that may repeat
RAY_ENDED = "Ray, which would start a replica, has ended (one of its processes died, as when memory is short)"
ANSWER_S = 5.0  # time limit for the answer of /healthz
LIVENESS_FAILURES = 3  # in a row, after which the server ends
# ignores HTTP_PROXY: nodes are near
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class OneLineFormatter(logging.Formatter):
    """Each record is one line, as programs that collect logs expect. No text from a file changes a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return escape_control_characters(one_line(super().format(record), MAX_LINE))


def log_to_stderr() -> None:
    """Log to stderr in a process that Ray starts, unless its log has a handler, as by Ray's LoggingConfig."""
    if log.hasHandlers():
        return
    # Serve puts another stderr into a replica, which keeps up to 1,000 lines in memory
    handler = logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(OneLineFormatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    # the user's code may give the root logger a handler, which would write each line again
    log.propagate = False


class FailureLog:
    """Logs failures of requests: the first of each kind, and then one a minute, with the number of those between."""

    def __init__(self) -> None:
        # by what failed and the type of its error: when the next one is logged, and how many since the last are not
        self._kinds: dict[tuple[str, type[Exception]], tuple[float, int]] = {}

    def add(self, what: str, error: Exception) -> None:
        kind, now = (what, type(error)), time.monotonic()
        again, omitted = self._kinds.get(kind, (now, 0))
        if now < again:
            self._kinds[kind] = again, omitted + 1
            return
        self._kinds[kind] = now + LOG_AGAIN_S, 0
        more = f" ({count_of(omitted, 'more failure')} since the last line)" if omitted else ""
        log.error("%s: %s%s", what, one_line(error, MAX_ERROR), more)


def tag_keys(*names: str) -> Any:
    """Return `names`. Ray annotates tag_keys as a tuple of one; its documentation allows any number."""
    return names


class ServingMetrics:
    """The counters and gauges of one replica. All but `rejected` have a tag for the version."""

    def __init__(self) -> None:
        self.images = Counter("defuse_images_answered", "Images answered.", tag_keys=tag_keys("version"))
        self.errors = Counter(
            "defuse_errors", "Images that a version failed on.", tag_keys=tag_keys("version")
        )
        self.compared = Counter(
            "defuse_compared",
            "Images that both production and a canary or shadow answered.",
            tag_keys=tag_keys("version", "agreed", "inside"),
        )
        self.scenarios = Counter(
            "defuse_scenario_images",
            "Images inside a failure scenario.",
            tag_keys=tag_keys("version", "scenario", "fixed"),
        )
        self.flagged = Counter(
            "defuse_flagged_images",
            "Images whose failure probability reaches the version's threshold.",
            tag_keys=tag_keys("version", "explained"),
        )
        self.expected_errors = Counter(
            "defuse_expected_errors",
            "Sum of the failure probabilities of the images answered: how many answers are wrong, expectedly.",
            tag_keys=tag_keys("version"),
        )
        self.detection = Gauge(
            "defuse_failure_detection",
            "Measured on real images before the promotion: auroc, average_precision, precision, recall, "
            "calibration_error; auroc_low is the lower 95 % bound.",
            tag_keys=tag_keys("version", "images", "figure"),
        )
        self.rejected = Counter(
            "defuse_rejected", "Requests rejected, by HTTP status.", tag_keys=tag_keys("status")
        )
        self.serving = Gauge(
            "defuse_serving",
            "1 for each version that is loaded on this replica, by role.",
            tag_keys=tag_keys("version", "role"),
        )

    def count_rejected(self, status: int) -> None:
        self.rejected.inc(1, {"status": str(status)})

    def set_detection(self, version: str, figures: WatchFigures) -> None:
        """Set the gauge `detection` to what was measured on validation and test images."""
        for images, found in (("validation", figures.validation), ("test", figures.test)):
            if found is None:
                continue
            values = {
                "auroc": found.auroc.value,
                "auroc_low": found.auroc.low,
                "average_precision": found.average_precision,
                "precision": found.precision.value,
                "recall": found.recall.value,
                "calibration_error": found.calibration_error,
            }
            for figure, value in values.items():
                if value is not None:
                    self.detection.set(value, {"version": version, "images": images, "figure": figure})

    def set_roles(self, before: dict[str, str], now: dict[str, str]) -> None:
        """Set the gauge `serving`; both arguments map a role to the version that has it."""
        for role, version in before.items():
            self.serving.set(0, {"version": version, "role": role})
        for role, version in now.items():
            self.serving.set(1, {"version": version, "role": role})


async def metrics_page() -> str:
    """Return the metrics of all nodes in Prometheus' text format. A node that does not answer is left out."""
    run = partial(asyncio.get_running_loop().run_in_executor, SCRAPE_THREADS)
    addresses = await run(_exporters)  # waits for Ray's head
    pages = await asyncio.gather(*(run(_scrape, address) for address in addresses))
    return await run(merge_pages, pages)  # a second or more for many nodes


def _exporters() -> list[str]:
    nodes = [
        node
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"] and node["MetricsExportPort"]
    ]
    return [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]


def _scrape(address: str) -> str:
    try:
        with DIRECT.open(address, timeout=SCRAPE_TIMEOUT_S) as reply:
            return str(reply.read().decode())
    except (OSError, http.client.HTTPException, ValueError):  # URLError and TimeoutError are OSErrors
        return ""  # also for a node that dies within its answer


def merge_pages(pages: Iterable[str]) -> str:
    """Return one page of several, with the metrics whose names start with PREFIXES only; broken pages are left out."""
    families: dict[str, Metric] = {}
    for page in pages:
        for family in _parse(page):
            if not family.name.startswith(PREFIXES):
                continue
            if family.name in families:
                families[family.name].samples.extend(family.samples)
            else:
                families[family.name] = family
    collector: Any = SimpleNamespace(collect=families.values)
    return generate_latest(collector).decode()


def _parse(page: str) -> list[Metric]:
    lines = page.split("\n")
    kept = [line for line in lines[:-1] if line.startswith(LINE_STARTS)]  # parsing a line is slow
    try:
        return list(text_string_to_metric_families("\n".join([*kept, lines[-1]])))
    except ValueError:  # cut within a line
        return []


class LivenessCheck:
    """Finds that nothing answers at `url` and nothing will: no node is left for a replica, or no application.

    A replica that is being replaced, or a slow machine, is no failure: Serve starts replicas as long as it has a node
    and the application.
    """

    def __init__(self, url: str, deployed: Callable[[], object] | None = None) -> None:
        """`deployed` returns None where a cluster that others use, too, has the application no more."""
        self._url, self._deployed, self._failures = url, deployed, 0
        self._warned = False  # of a raylet that has ended

    def __call__(self) -> None:
        """Ask once. Raises ComputeError at the LIVENESS_FAILURES-th failure in a row, and where the head has ended.

        Replicas answer without it for a minute; then Ray's C++ part ends them, and this process with exit code 1.
        """
        if embedded_ray_has_ended("gcs_server"):
            raise ComputeError(f"{RAY_ENDED}; start the command again")
        if not self._warned and embedded_ray_has_ended("raylet"):
            self._warned = True
            log.warning(
                "%s; the replicas still answer, but none is replaced: start the command again", RAY_ENDED
            )
        reason = None if _answers(self._url) else self._reason()
        if reason is None:
            self._failures = 0
            return
        self._failures += 1
        if self._failures == 1:  # Ray may end this process before an error is shown
            log.warning("nothing answers at %s, and %s", self._url, reason)
        if self._failures >= LIVENESS_FAILURES:
            raise ComputeError(f"nothing answers at {self._url}, and {reason}; start the command again")

    def _reason(self) -> str | None:
        """Return why no replica will be started; None where Serve can start one."""
        if not any(node["Alive"] for node in ray.nodes()):  # type: ignore[no-untyped-call]
            return RAY_ENDED
        if self._deployed is not None and self._deployed() is None:
            return "the application was deleted from the cluster, as by `serve shutdown`"
        return None


def _answers(url: str) -> bool:
    try:
        with DIRECT.open(f"{url}/healthz", timeout=ANSWER_S) as reply:
            return bool(reply.status == http.client.OK)
    except (OSError, http.client.HTTPException):  # HTTPError, as of the status 503, is an OSError
        return False
