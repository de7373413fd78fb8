"""Speed and memory of `defuse serve`, beside a plain server of 30 lines.

    python tests/bench/serving.py speed [--seconds 4] [--proxies direct haproxy ray] [--json FILE]
    python tests/bench/serving.py memory [--requests 50000] [--proxies direct]

The network is the MNIST CNN at 32x32 with random weights: speed does not depend on them. speed sends one PNG of 28x28
pixels a request to the plain server and to `defuse serve` in turns, several times, and prints the medians and their
ratios; all of them and the load generator share the machine, so only the ratios mean something elsewhere. It then
promotes a version and rolls it back under load. memory sends a mixture of requests of all kinds, valid and invalid, and
prints the resident memory of the replica as it goes; it exits 1 if that still grows in the second half.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/services/serving")]

import numpy as np
from load_generator import Reply, limited, load, request_bytes
from PIL import Image
from serve_process import TOKEN, processes_with, serve_process, wait_until
from synthetic_runs import assign, perturb_weights, png, unverified

from defuse_core.codec import array_digest
from defuse_core.config import RunFile, parse_run_file
from defuse_core.models import build_classifier, build_vae, weights_of
from defuse_core.store import FolderStore
from defuse_core.watch import METHODS, FailureDetector, FailureWatch, MeasuredDetector
from services.serving.candidate import Candidate, CorrectionSummary
from services.serving.registry import Registry
from services.serving.registry_state import PromotionRequest
from tests.ports import free_port

CLIENTS = (1, 8, 64)
ROUNDS = 3
GROWTH = 1.05  # largest ratio of the memory at the end to that half-way
PATH, AUTH = "/v1/predict", {"Authorization": f"Bearer {TOKEN}"}


def random_candidate(spec: RunFile, scenarios: int = 7) -> Candidate:
    """Return a candidate with the run file's networks, untrained, and `scenarios` components to watch."""
    classifier, dims, count = weights_of(build_classifier(spec, 10)), spec.vae.latent_dim, scenarios
    return Candidate(
        run="bench",
        spec=spec.model_dump(mode="json"),
        classes=tuple("0123456789"),
        classifier=classifier,
        vae=weights_of(build_vae(spec)),
        summary=CorrectionSummary(
            lam=1.0,
            epoch=1,
            clean_split="test",
            clean_before=0.0,
            clean_after=0.0,
            scenario_before=0.0,
            scenario_after=0.0,
            annotators="nobody",
            made="",
            clean_images="",
        ),
        checks=(),
        digest=array_digest(classifier),
        scenario=np.arange(count),
        labels=np.arange(count),
        most_common_error=np.arange(count) + 1,
        means=np.random.default_rng(0).standard_normal((count, dims)),
        covariances=np.stack([np.eye(dims)] * count),
        before=np.zeros(count),
        after=np.ones(count),
        levels=np.array([0.0, 1.0]),
        distances=np.tile([0.0, 10.0], (count, 1)),
        recall=np.ones((count, 2)),
        failures=random_watch(dims),
        components_digest="",
        judged=np.zeros(count, bool),
    )


def random_watch(dims: int) -> FailureWatch:
    """Return a watch whose best method needs the classifier and the encoder: the dearest one."""
    rng = np.random.default_rng(0)
    wrong = rng.random(1000) < 0.1
    one = np.ones(1)
    plain = FailureDetector("max-softmax", 1.0, 0 * one, one, one, -2.0)
    dear = FailureDetector(METHODS[-1], 1.0, np.zeros(2), np.ones(2), np.ones(2), -2.0)
    doubt = np.clip(0.1 + 0.05 * rng.standard_normal(1000), 0.01, 0.99)
    return FailureWatch(
        methods=(
            MeasuredDetector(plain, doubt, doubt),
            MeasuredDetector(dear, np.clip(doubt + 0.3 * wrong, 0.01, 0.99), doubt),
        ),
        problem="",
        means=rng.standard_normal((10, dims)),
        covariances=np.stack([np.eye(dims)] * 10),
        validation_wrong=wrong,
        test_wrong=wrong,
    )


def make_store(folder: Path) -> Registry:
    """Return a registry with two versions of random weights, the first of them in production."""
    spec = parse_run_file({"data": {"name": "mnist", "channels": 1, "root": "."}}, "bench")
    registry, first = Registry(FolderStore(folder)), random_candidate(spec)
    weights = perturb_weights(first.classifier, 2)
    second = Candidate(**{**vars(first), "classifier": weights, "digest": array_digest(weights)})
    for candidate in (first, second):
        registry.add(candidate, "bench", "", forced=False)
    assign(registry, 1, PromotionRequest("bench", ""))
    return registry


def random_requests(count: int = 64) -> list[bytes]:
    rng = np.random.default_rng(0)
    return [request_bytes(png(rng.random((1, 28, 28))), PATH, "image/png", **AUTH) for _ in range(count)]


def summary(replies: list[Reply], seconds: float) -> dict[str, float]:
    """Return requests per second, p50 and p99 in milliseconds, and the number of answers other than 200."""
    milliseconds = [reply.seconds * 1000 for reply in replies]
    return {
        "rate": len(replies) / seconds,
        "p50": float(np.quantile(milliseconds, 0.5)),
        "p99": float(np.quantile(milliseconds, 0.99)),
        "failed": sum(reply.status != 200 for reply in replies),
    }


@dataclass(frozen=True)
class Server:
    """A server under test: its port, and the processes that a request passes."""

    port: int
    processes: tuple[int, ...]

    def cpu_seconds(self) -> float:
        """Return the processor time of the processes so far."""
        ticks = 0
        for pid in self.processes:
            with contextlib.suppress(FileNotFoundError):  # HAProxy starts anew when replicas change
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def measure(self, clients: int, seconds: float) -> dict[str, float]:
        cpu, started = self.cpu_seconds(), time.monotonic()
        replies = load(self.port, clients, limited(random_requests(), 1_000_000, seconds))
        elapsed = time.monotonic() - started
        return summary(replies, elapsed) | {"cpu_us": (self.cpu_seconds() - cpu) / len(replies) * 1e6}


@contextlib.contextmanager
def plain_server() -> Iterator[Server]:
    """Run plain_server.py beside this file in a process of its own."""
    port = free_port()
    process = subprocess.Popen([sys.executable, str(Path(__file__).with_name("plain_server.py")), str(port)])
    try:
        wait_until(lambda: load(port, 1, limited(random_requests(1), 1, 5))[0].status == 200, 60)
        yield Server(port, (process.pid,))
    finally:
        process.terminate()
        process.wait()


def compare(proxy: str, server: Server, other: Server, seconds: float) -> list[dict[str, Any]]:
    """Return one row per number of clients: medians over rounds in which both servers are measured in turns."""
    rows = []
    for clients in CLIENTS:
        for one in (server, other):
            one.measure(clients, min(1, seconds))  # warm-up
        rounds = [(server.measure(clients, seconds), other.measure(clients, seconds)) for _ in range(ROUNDS)]
        ours, plain = (
            {name: float(np.median([one[side][name] for one in rounds])) for name in rounds[0][side]}
            for side in (0, 1)
        )
        ratio = {
            f"{name}_ratio": float(np.median([a[name] / b[name] for a, b in rounds]))
            for name in ("rate", "p50", "p99", "cpu_us")
        }
        rows.append({"proxy": proxy, "clients": clients, **ours, **ratio})
        rows[-1] |= {f"plain_{name}": plain[name] for name in ("rate", "p50", "p99", "cpu_us")}
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


@contextlib.contextmanager
def running(folder: Path, proxy: str) -> Iterator[Server]:
    """Run `defuse serve` with one kind of proxy, and its other settings as they are by default."""
    arguments = ("--store", str(folder), "--proxy", proxy, "--set", "serve.resize=true")
    names = ("ray::ServeReplica", "ray::ProxyActor", "haproxy.cfg")
    with tempfile.TemporaryDirectory() as logs, serve_process(Path(logs), *arguments) as process:
        own = descendants(process.process.pid)
        yield Server(process.port, tuple(pid for name in names for pid in processes_with(name) if pid in own))


def descendants(pid: int) -> set[int]:
    """Return the processes that a process started, and those that they started."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    found, waiting = set(), [pid]
    while waiting:
        for child in children.get(waiting.pop(), []):
            found.add(child)
            waiting.append(child)
    return found


def speed(args: argparse.Namespace, folder: Path) -> None:
    registry = make_store(folder)
    rows: list[dict[str, Any]] = []
    changes: dict[str, dict[str, Any]] = {}
    with plain_server() as plain:
        for proxy in args.proxies:
            with running(folder, proxy) as server:
                rows += compare(proxy, server, plain, args.seconds)
                changes[proxy] = change_of_versions(server.port, registry)
    print_rows(rows)
    for proxy, change in changes.items():
        print(f"\nversion 1 -> 2 -> 1 under 8 clients, {proxy}")
        for name, value in change.items():
            print(f"  {name}: {value}")
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "changes": changes}, indent=1))


def print_rows(rows: list[dict[str, Any]]) -> None:
    names = ("rate", "p50", "p99", "cpu_us")
    print(
        f"{'':>16} | {'requests/s, p50 ms, p99 ms, processor us':^36} | {'plain server':^36} | {'ratios':^28}"
    )
    for row in rows:
        ours = "".join(f"{row[name]:>9.1f}" for name in names)
        plain = "".join(f"{row[f'plain_{name}']:>9.1f}" for name in names)
        ratios = "".join(f"{row[f'{name}_ratio']:>7.2f}" for name in names)
        print(f"{row['proxy']:<8}{row['clients']:>8} | {ours} | {plain} | {ratios}")


def change_of_versions(port: int, registry: Registry) -> dict[str, Any]:
    """Promote version 2 and roll back again while 8 clients ask; return what became of their requests."""
    requests = random_requests()
    replies: list[Reply] = []
    asking = threading.Thread(target=lambda: replies.extend(load(port, 8, limited(requests, 20_000, 10))))
    asking.start()
    time.sleep(3)
    promoted = time.monotonic()
    assign(registry, 2, PromotionRequest("bench", ""))
    time.sleep(3.5)
    rolled_back = time.monotonic()
    registry.roll_back("bench", "", unverified)
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


def mixed_requests() -> list[bytes]:
    """Return requests of all kinds: small and large images, JSON, several at once, and invalid ones."""
    rng = np.random.default_rng(0)
    small = [png(rng.random((1, 28, 28))) for _ in range(16)]
    requests = [request_bytes(image, PATH, "image/png", **AUTH) for image in small]
    for edge in (200, 640, 1200):
        for kind in ("PNG", "JPEG", "BMP", "WEBP"):
            picture = io.BytesIO()
            Image.effect_noise((edge, edge), 60).convert("RGB").save(picture, kind)
            requests.append(request_bytes(picture.getvalue(), PATH, f"image/{kind.lower()}", **AUTH))
    for count in (1, 7, 32):
        pixels = json.dumps({"pixels": rng.random((count, 1, 32, 32)).round(3).tolist()}).encode()
        requests.append(request_bytes(pixels, PATH, "application/json", **AUTH))
        requests.append(
            request_bytes(multipart(small[:count]), PATH, "multipart/form-data; boundary=b", **AUTH)
        )
    for body, kind in (
        (b"?", "image/png"),
        (b"{", "application/json"),
        (b"", "image/jpeg"),
        (b"x", "text/plain"),
    ):
        requests.append(request_bytes(body, PATH, kind, **AUTH))
    return requests


def multipart(images: list[bytes]) -> bytes:
    head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="i"\r\n\r\n'
    return b"".join(head + image + b"\r\n" for image in images) + b"--b--\r\n"


def resident_mb(pid: int) -> float:
    line = next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def memory(args: argparse.Namespace, folder: Path) -> None:
    make_store(folder)
    with running(folder, args.proxies[0]) as server:
        replica = next(pid for pid in processes_with("ray::ServeReplica") if pid in server.processes)
        found = [resident_mb(replica)]
        statuses: Counter[int] = Counter()
        print(f"requests {0:>6}: {found[0]:.0f} MB", flush=True)
        step = args.requests // 10
        for done in range(step, args.requests + 1, step):
            requests = mixed_requests()
            replies = load(server.port, 8, limited(requests, step, 3600))
            statuses += Counter(reply.status for reply in replies)
            found.append(resident_mb(replica))
            print(f"requests {done:>6}: {found[-1]:.0f} MB", flush=True)
    print(f"answers by status: {dict(statuses)}")
    if found[-1] > GROWTH * found[len(found) // 2]:
        raise SystemExit(f"the memory still grows: {found[len(found) // 2]:.0f} -> {found[-1]:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["speed", "memory"])
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--proxies", nargs="+", default=["direct", "haproxy", "ray"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (speed if args.what == "speed" else memory)(args, Path(folder))


if __name__ == "__main__":
    main()
