"""Throughput and latency of serving beside a plain server, and a change of versions under load.

    python tests/bench/serving.py [--seconds 4] [--images 2000] [--skip-haproxy]

The network is the MNIST CNN at 32x32 with random weights: speed does not depend on them. Every request carries one PNG
of 28x28 pixels. All servers run on this machine, on loopback, one after the other, and share its cores with the load
generator; compare the rows of one table with each other and with nothing else. Every measurement ends after --seconds
or --images requests, whatever comes first.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/services/serving")]

import numpy as np
from load import Reply, bounded, load, request_bytes
from planted import nudged, png

from defuse_core.config import RunFile, parse_run_file
from defuse_core.models import build_classifier, build_vae, weights_of
from defuse_core.store import FolderStore
from services.serving.candidate import Candidate, weights_digest
from services.serving.registry import Registry
from services.serving.rollout import roll_back, to_production

CLIENTS = (1, 8, 64)
SETTINGS: dict[str, dict[str, Any]] = {
    "batches, watch": {},
    "batches, no watch": {"watch": False},
    "no batches, watch": {"batch_size": 1},
    "no batches, no watch": {"batch_size": 1, "watch": False},
}


def random_candidate(spec: RunFile, scenarios: int = 7) -> Candidate:
    """Return a candidate with the run file's networks, untrained, and `scenarios` components to watch."""
    classifier, dims, count = weights_of(build_classifier(spec, 10)), spec.vae.latent_dim, scenarios
    return Candidate(
        run="bench",
        spec=spec.model_dump(mode="json"),
        classes=tuple("0123456789"),
        classifier=classifier,
        vae=weights_of(build_vae(spec)),
        facts=dict.fromkeys(("lam", "clean_before", "clean_after", "scenario_before", "scenario_after"), 0.0)
        | {"clean_split": "test", "annotators": "nobody"},
        checks=(),
        digest=weights_digest(classifier),
        scenario=np.arange(count),
        labels=np.arange(count),
        read_as=np.arange(count) + 1,
        means=np.random.default_rng(0).standard_normal((count, dims)),
        covariances=np.stack([np.eye(dims)] * count),
        before=np.zeros(count),
        after=np.ones(count),
        levels=np.array([0.0, 1.0]),
        distances=np.tile([0.0, 10.0], (count, 1)),
        recall=np.ones((count, 2)),
    )


def summary(replies: list[Reply], seconds: float) -> dict[str, Any]:
    """Return requests a second, p50 and p99 in milliseconds, and how many were not answered 200."""
    took = [reply.seconds * 1000 for reply in replies]
    return {
        "rate": round(len(replies) / seconds),
        "p50": round(float(np.quantile(took, 0.5)), 1),
        "p99": round(float(np.quantile(took, 0.99)), 1),
        "failed": sum(reply.status != 200 for reply in replies),
    }


def measured(port: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one summary per number of clients, after a warm-up."""
    rng = np.random.default_rng(0)
    pictures = [png(rng.random((1, 28, 28))) for _ in range(64)]
    requests = [request_bytes(picture, "/v1/predict", "image/png") for picture in pictures]
    load(port, 8, bounded(requests, 200, 5))
    rows = []
    for clients in CLIENTS:
        started = time.monotonic()
        replies = load(port, clients, bounded(requests, args.images, args.seconds))
        rows.append({"clients": clients, **summary(replies, time.monotonic() - started)})
    return rows


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


@contextlib.contextmanager
def plain_server(candidate: Candidate) -> Iterator[int]:
    """Run plain_server.py beside this file in a process of its own; yields its port."""
    port = free_port()
    command = [sys.executable, str(Path(__file__).with_name("plain_server.py")), str(port)]
    process = subprocess.Popen(command)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()


def part(args: argparse.Namespace, store: str) -> None:
    """Measure every setting of Ray Serve behind one kind of proxy, and print one JSON object per row."""
    from services.serving.start import application, deploy, ray_for, use_fast_proxy

    if args.part == "haproxy":
        use_fast_proxy()
    port = free_port()
    with ray_for(None, 4), application({"store": store}, "127.0.0.1", port, shared=False):
        for name, settings in SETTINGS.items():
            deploy({"store": store, "settings": {"resize": True, **settings}})
            for row in measured(port, args):
                say({"what": f"Ray Serve, {args.part}: {name}", **row})
        two = {"resize": True, "min_replicas": 2, "max_replicas": 2, "poll_s": 0.5}
        deploy({"store": store, "settings": two})
        say({"change": f"Ray Serve, {args.part}, 2 replicas, 8 clients", **change_of_versions(port, store)})


def say(row: dict[str, Any]) -> None:
    """Print a row for the process that gathers them, and for whoever waits."""
    print(json.dumps(row), flush=True)
    print(row, file=sys.stderr, flush=True)


def change_of_versions(port: int, store: str) -> dict[str, Any]:
    """Promote version 2 and roll back again while 8 clients ask; return what became of their requests."""
    registry = Registry(FolderStore(store))
    rng = np.random.default_rng(0)
    requests = [request_bytes(png(rng.random((1, 28, 28))), "/v1/predict", "image/png") for _ in range(64)]
    replies: list[Reply] = []
    asking = threading.Thread(target=lambda: replies.extend(load(port, 8, bounded(requests, 20_000, 10))))
    asking.start()
    time.sleep(3)
    promoted = time.monotonic()
    to_production(registry, 2, "bench", "")
    time.sleep(3.5)
    rolled_back = time.monotonic()
    roll_back(registry, "bench", "")
    asking.join()
    replies.sort(key=lambda reply: reply.at)
    versions = [(reply.at, reply.json()["version"]) for reply in replies if reply.status == 200]
    first_new = next(at for at, version in versions if version == "2")
    last_old = max(at for at, version in versions if version == "1" and at < rolled_back)
    return {
        "sent": len(replies),
        "failed": sum(reply.status != 200 for reply in replies),
        "by version": dict(Counter(version for _, version in versions)),
        "mixed while switching": sum(first_new <= at <= last_old for at, _ in versions),
        "seconds until the last answer of the old": round(last_old - promoted, 2),
        "seconds until the rollback was whole": round(
            max(at for at, version in versions if version == "2") - rolled_back, 2
        ),
        "changes of version seen": sum(a[1] != b[1] for a, b in itertools.pairwise(versions)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--skip-haproxy", action="store_true")
    parser.add_argument("--part", choices=["proxy", "haproxy"], help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        part(args, args.store)
        return
    spec = parse_run_file({"data": {"name": "mnist", "channels": 1, "root": "."}}, "bench")
    with tempfile.TemporaryDirectory() as folder:
        registry, candidate = Registry(FolderStore(folder)), random_candidate(spec)
        second = nudged(candidate.classifier, 2)
        for one in (
            candidate,
            Candidate(**{**vars(candidate), "classifier": second, "digest": weights_digest(second)}),
        ):
            registry.add(one, "bench", "", forced=False)
        to_production(registry, 1, "bench", "")
        with plain_server(candidate) as port:
            rows = [{"what": "FastAPI, uvicorn, torch: plain", **row} for row in measured(port, args)]
        changes = []
        for kind in ("proxy",) if args.skip_haproxy else ("proxy", "haproxy"):
            command = [
                sys.executable,
                __file__,
                "--part",
                kind,
                "--store",
                folder,
                "--seconds",
                str(args.seconds),
            ]
            output = subprocess.run(
                [*command, "--images", str(args.images)], stdout=subprocess.PIPE, check=True
            ).stdout
            for line in filter(
                lambda line: line.startswith("{"), output.decode().splitlines()
            ):  # Ray prints, too
                found = json.loads(line)
                (changes if "change" in found else rows).append(found)
    print(f"{'server':<48}{'clients':>8}{'req/s':>8}{'p50 ms':>9}{'p99 ms':>9}{'failed':>8}")
    for row in rows:
        numbers = (row["clients"], row["rate"], row["p50"], row["p99"], row["failed"])
        print(f"{row['what']:<48}{numbers[0]:>8}{numbers[1]:>8}{numbers[2]:>9}{numbers[3]:>9}{numbers[4]:>8}")
    for change in changes:
        print(f"\nversion 1 -> 2 -> 1: {change.pop('change')}")
        for name, value in change.items():
            print(f"  {name}: {value}")


if __name__ == "__main__":
    main()
