"""Decodings per second of identification beside a plain loop of classifier(decoder(codes)).

    python tests/bench/identify.py [--images 1024] [--draws 100]

The networks are MNIST's at 32x32 with random weights, on made-up images: speed does not depend on either. First the
plain loop on one thread, at the best of several batch sizes; then Algorithm 1 in this process (--on local), on one
thread as well; then on an embedded Ray with one and with two workers. They take turns, and the median of the ratios is
told, since machines are noisy. On Ray the clock runs from the first finished shard to the last.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch

from cluster.compute import RayCompute
from defuse_core.artifacts import Models
from defuse_core.config import RunFile, load_run_file
from defuse_core.data import open_splits
from defuse_core.device import cpu_threads, device
from defuse_core.identify import Identifier
from defuse_core.models import build_classifier, build_vae, load_classifier, load_vae, weights_of
from defuse_core.store import FolderStore
from tests.sample_components import FIT

RUN_FILE = Path(__file__).parents[2] / "deploy" / "runs" / "mnist.yaml"
BATCHES = (64, 128, 256, 512, 1024)


def made_up(folder: Path, images: int, draws: int, workers: int = 1) -> tuple[RunFile, Models]:
    """Return a run file over random images in `folder`, and untrained models for it."""
    path = folder / "images.npz"
    if not path.exists():
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 255, (images, 32, 32), dtype=np.uint8)
        np.savez(path, train_images=pixels, train_labels=np.arange(images) % 10)
    overrides = (
        "data.name=npz",
        f"data.root={path}",
        f"identify.draws={draws}",
        "identify.block_images=64",
        "identify.batch_size=256",
        "identify.max_per_image=1",
        f"resources.workers={workers}",
    )
    spec = load_run_file(RUN_FILE, overrides)
    splits = open_splits(spec.data, spec.seed)
    torch.manual_seed(0)
    classifier, vae = build_classifier(spec, 10), build_vae(spec)
    models = Models(
        weights_of(classifier), weights_of(vae), splits.classes, splits.counts(), splits.fingerprint(),
        {}, (), (), 0.0, 0.0, np.zeros(spec.vae.latent_dim), FIT, class_images={},
    )  # fmt: skip
    return spec, models


def plain_loop(spec: RunFile, models: Models, batch: int, seconds: float) -> float:
    """Decodings per second of the loop that anyone would write, on one thread."""
    classifier = load_classifier(spec, models.classifier, 10)
    vae = load_vae(spec, models.vae)
    codes = torch.randn(batch, spec.vae.latent_dim, device=device())
    with cpu_threads(1), torch.inference_mode():
        classifier(vae.decode(codes))
        started, done = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            classifier(vae.decode(codes)).argmax(1).cpu()
            done += batch
        return done / (time.perf_counter() - started)


def local(identifier: Identifier, shards: int) -> float:
    """Decodings per second of Algorithm 1 in this process."""
    made = [identifier.shard(index) for index in range(shards)]
    return sum(shard.decodings for shard in made) / sum(shard.seconds for shard in made)


def on_ray(folder: Path, images: int, draws: int, workers: int) -> float:
    """Decodings per second of Algorithm 1 on an embedded Ray, from the first shard to the last."""
    spec, models = made_up(folder, images, draws, workers)
    told: list[tuple[float, int]] = []

    def note(what: str, done: int = 0, total: int = 1, unit: str = "") -> None:
        if done and (not told or done > told[-1][1]):
            told.append((time.perf_counter(), done))

    with tempfile.TemporaryDirectory() as store, RayCompute(None, spec, note) as compute:
        psi = compute.identify(spec, models, FolderStore(store))
    (start, first), (end, last) = told[0], told[-1]
    return psi.decodings * (last - first) / last / (end - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec, models = made_up(folder, given.images, given.draws)
        identifier = Identifier(spec, models)
        best = max(BATCHES, key=lambda batch: plain_loop(spec, models, batch, 1.0))
        rounds = [
            (
                plain_loop(spec, models, best, 3.0),
                local(identifier, 2),
                on_ray(folder, given.images, given.draws, 1),
                on_ray(folder, given.images, given.draws, 2),
            )
            for _ in range(given.rounds)
        ]
    show(best, rounds)


def show(batch: int, rounds: list[tuple[float, float, float, float]]) -> None:
    """Print the medians and the ratios that matter, each taken within a round."""

    def middle(of: Callable[[tuple[float, float, float, float]], float]) -> float:
        return statistics.median(map(of, rounds))

    rows = (
        (f"plain loop, one thread, batch {batch}", lambda r: r[0], lambda r: 1.0, "of itself"),
        ("Algorithm 1, this process, one thread", lambda r: r[1], lambda r: r[1] / r[0], "of the loop"),
        ("Algorithm 1, Ray, one worker", lambda r: r[2], lambda r: r[2] / r[0], "of the loop"),
        ("Algorithm 1, Ray, two workers", lambda r: r[3], lambda r: r[3] / r[2], "of one worker"),
    )
    for name, rate, ratio, of in rows:
        print(f"{name:40} {middle(rate):8,.0f} decodings/s  {middle(ratio):6.0%} {of}")


if __name__ == "__main__":
    main()
