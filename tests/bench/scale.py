"""Identification of very many images whose computing is pretended: what grows with N in driver, workers and stores.

    python tests/bench/scale.py [--images 100000 1000000 10000000] [--draws 50]

The driver, the queue of shards, Ray, the packed paths of the images and the store of the run are real. Images are
never read, and a shard's codes are random numbers: one for each image, of 10 dimensions. Each number of images is a
process of its own. The shards are those of Algorithm 1 with so many draws. Afterwards the process reads all shards
again, as a resumed run does, and draws the 50,000 codes that the mixture is fitted on. The last row, 10^8 images, is
computed: the last two rows drawn out as a straight line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import numpy as np
import ray

import cluster.compute
import cluster.identify
from cluster.compute import RayCompute
from cluster.identify import ShardWorker
from defuse_core.artifacts import I64, U8, Failures, Models, Shard
from defuse_core.config import RunFile, parse_run_file
from defuse_core.data import Images, PictureFiles
from defuse_core.data.images import FilePaths
from defuse_core.identify import (
    blocks_per_shard,
    finished_shards,
    gather_shards,
    shard_count,
    shard_fingerprint,
    subsample_psi,
)
from defuse_core.protocols import Progress
from defuse_core.store import FolderStore
from tests.cluster.fakes import Tally, Unless
from tests.sample_components import FIT

CLASSES = 100
LATENT = 10
WORKERS = 2
MB = 2**20
COLUMNS = (
    "images",
    "shards",
    "time",
    "driver MB",
    "worker MB",
    "listing MB, once per node",
    "MB in Ray's store",
    "objects there",
    "requests to the run's store",
    "MB there",
    "to resume, to sample",
    "driver MB then",
)


@dataclass(frozen=True)
class Measured:
    """One number of images. Memory in MB; the memory of a worker is its own, without what it shares on its node."""

    images: int
    shards: int
    seconds: float
    driver_mb: float  # peak
    worker_mb: float  # peak of one worker
    listing_mb: float  # the paths and labels of the images: once per node
    ray_mb: float  # peak of the objects in Ray's store
    ray_objects: int  # likewise
    requests: int  # to the store of the run
    stored_mb: float
    resume_s: float  # to read the counts of all shards again
    sample_s: float  # to draw 50,000 codes
    after_mb: float  # peak of the driver with both


class PretendedFiles(PictureFiles):
    """Images of which there are only the paths."""

    def __getitem__(self, rows: slice | I64) -> U8:
        return np.zeros((len(self.paths.take(rows)), *self.shape[1:]), np.uint8)

    def at(self, rows: slice | I64) -> PictureFiles:
        return PretendedFiles(self.paths.take(rows), 1, 8)


def pretended_images(spec: RunFile, models: Models, *, progress: Progress) -> Images:
    """Return N images, packed class by class as those of a folder are."""
    count = models.images["train"]
    labels = np.sort(np.arange(count, dtype=np.int64) % CLASSES)
    parts = [
        FilePaths.pack([f"/data/train/class-{label:03}/{row:010}.jpg" for row in range(size)], "/data/train/")
        for label, size in enumerate(np.bincount(labels, minlength=CLASSES).tolist())
    ]
    return Images(PretendedFiles(FilePaths.concatenate(parts), 1, 8), labels)


class PretendedIdentifier:
    """Makes up the codes of a shard, one for each of its images."""

    def __init__(self, spec: RunFile, train: Images, fingerprint: str) -> None:
        self.spec, self.train, self.fingerprint = spec, train, fingerprint

    def shard(self, index: int) -> Shard:
        section = self.spec.identify
        size = blocks_per_shard(len(self.train), section) * section.block_images
        rows = np.arange(index * size, min((index + 1) * size, len(self.train)))
        images = self.train.take(rows)
        images.batch(slice(0, section.block_images))
        codes = np.random.default_rng(index).standard_normal((len(rows), LATENT), np.float32)
        answers = (images.labels + 1) % CLASSES
        failures = Failures(codes, rows, images.labels, answers, np.zeros(len(rows), np.bool_))
        draws = len(rows) * section.draws
        return Shard(
            failures,
            images=len(rows),
            decodings=draws,
            images_with_any=len(rows),
            zero_noise_flips=0,
            seconds=0.0,
            failing=draws,
            index=index,
            fingerprint=self.fingerprint,
        )


class PretendedWorker(ShardWorker):
    """A worker that pretends to compute, and notes its memory beside the store."""

    def shard(self, index: int, weights: Any, train: Images, progress_actor: Any) -> Any:
        fingerprint = shard_fingerprint(self.spec, *weights)
        self.identifier = PretendedIdentifier(self.spec, train, fingerprint)  # type: ignore[assignment]
        record = super().shard(index, weights, train, progress_actor)
        folder = Path(self.store.folder.with_name("memory"))  # type: ignore[attr-defined]
        (folder / str(os.getpid())).write_text(str(status_mb("RssAnon")))
        return record


class CountedStore(FolderStore):
    """Counts all requests, in every process."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.requests = Tally(folder.with_name("requests"))

    def exists(self, key: str) -> bool:
        self.requests.add()
        return super().exists(key)

    def read(self, key: str) -> bytes:
        self.requests.add()
        return super().read(key)

    def write(self, key: str, data: bytes, unless: Unless = None) -> None:
        self.requests.add()
        super().write(key, data, unless)

    def list(self, prefix: str = "") -> list[str]:
        self.requests.add()
        return super().list(prefix)


def status_mb(field: str) -> float:
    """Return a field of this process's memory, in MB: RssAnon is its own memory now, VmHWM the peak of all."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (value,) = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(value) / 1024


class RayWatch(threading.Thread):
    """Follows what is in Ray's store, and the driver's own memory."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ended = threading.Event()
        self.bytes, self.objects, self.own_mb = 0, 0, 0.0

    def run(self) -> None:
        from ray._private.internal_api import node_stats

        while not self.ended.wait(0.5):
            self.own_mb = max(self.own_mb, status_mb("RssAnon"))
            with contextlib.suppress(Exception):  # Ray is starting, or ending
                (node,) = ray.nodes()  # type: ignore[no-untyped-call]
                address = node["NodeManagerAddress"], node["NodeManagerPort"]
                stats = node_stats(*address, include_memory_info=False).store_stats
                self.bytes = max(self.bytes, stats.object_store_bytes_used)
                self.objects = max(self.objects, stats.num_local_objects)


def run_file(draws: int) -> RunFile:
    return parse_run_file(
        {
            "data": {"name": "folder", "root": "/data", "image_size": 8, "channels": 1},
            "classifier": {"stages": 1},
            "vae": {"latent_dim": LATENT, "encoder_stages": 1, "decoder_stages": 1},
            "identify": {"draws": draws, "screen": "none"},
            "resources": {"workers": WORKERS, "gpus_per_worker": 0},
        },
        "scale",
    )


def measure(images: int, draws: int, folder: Path) -> Measured:
    """Identify so many pretended images in this process and its Ray."""
    cluster.compute.open_training_images = pretended_images  # type: ignore[assignment, attr-defined]
    cluster.identify.ShardWorker = PretendedWorker  # type: ignore[misc]
    (folder / "memory").mkdir()
    spec, store = run_file(draws), CountedStore(folder / "run")
    fit = (0.0, 0.0, np.zeros(LATENT), FIT)
    models = Models({}, {}, ("a", "b"), {"train": images}, "", {}, (), (), *fit, class_images={})
    watch = RayWatch()
    watch.start()
    started = time.perf_counter()
    with RayCompute(None, spec) as compute:
        psi = compute.identify(spec, models, store)
    seconds, requests = time.perf_counter() - started, int(store.requests)
    driver_mb = max(watch.own_mb, status_mb("RssAnon"))
    assert psi.images == images

    started = time.perf_counter()
    assert gather_shards(finished_shards(store, psi.fingerprint)).total == psi.total
    resumed = time.perf_counter()
    assert len(subsample_psi(spec, psi, store)) == spec.distill.max_codes
    sampled = time.perf_counter()
    watch.ended.set()
    listing = (len(f"class-000/{0:010}.jpg") + 8) * images  # names, which are equally long, and labels
    return Measured(
        images,
        len(psi.codes),
        seconds,
        driver_mb,
        max(float(path.read_text()) for path in (folder / "memory").iterdir()),
        listing / MB,
        watch.bytes / MB,
        watch.objects,
        requests,
        sum(path.stat().st_size for path in (folder / "run" / "psi").iterdir()) / MB,
        resumed - started,
        sampled - resumed,
        watch.own_mb,
    )


def drawn_out(two: tuple[Measured, Measured], images: int, draws: int) -> Measured:
    """Return the row of more images, on the straight line through two rows; the number of shards is exact."""
    share = (images - two[1].images) / (two[1].images - two[0].images)
    first, last = asdict(two[0]), asdict(two[1])
    fields = {name: last[name] + share * (last[name] - first[name]) for name in last}
    shards = shard_count(images, run_file(draws).identify)
    requests = shards + last["requests"] - last["shards"]
    objects = round(fields["ray_objects"])
    exact = {"images": images, "shards": shards, "requests": requests, "ray_objects": objects}
    return Measured(**fields | exact)


def measured_elsewhere(images: int, draws: int) -> Measured:
    """Return what a process of its own measured."""
    memory = Path("/dev/shm")  # so that the disk is not what is measured
    with tempfile.TemporaryDirectory(prefix="scale-", dir=memory if memory.is_dir() else None) as folder:
        command = [sys.executable, "-m", "tests.bench.scale", "--one", str(images), str(draws), folder]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True)
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def show(row: Measured, what: str = "") -> None:
    cells = [f"{row.images:.0e}{what}", f"{row.shards:,}", f"{row.seconds:,.0f} s", f"{row.driver_mb:,.0f}"]
    cells += [f"{row.worker_mb:,.0f}", f"{row.listing_mb:,.0f}", f"{row.ray_mb:,.0f}", str(row.ray_objects)]
    cells += [f"{row.requests:,}", f"{row.stored_mb:,.0f}", f"{row.resume_s:.1f} s, {row.sample_s:.1f} s"]
    print("| " + " | ".join([*cells, f"{row.after_mb:,.0f}"]) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--draws", type=int, default=50)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    logging.getLogger("defuse").setLevel(logging.WARNING)
    if chosen.one:
        print(json.dumps(asdict(measure(int(chosen.one[0]), int(chosen.one[1]), Path(chosen.one[2])))))
        return
    print(f"| {' | '.join(COLUMNS)} |")
    print("|" + "---|" * len(COLUMNS))
    rows = []
    for images in chosen.images:
        rows.append(measured_elsewhere(images, chosen.draws))
        show(rows[-1])
    if len(rows) > 1:
        show(drawn_out((rows[-2], rows[-1]), 10**8, chosen.draws), ", computed")


if __name__ == "__main__":
    main()
