"""Identification of MNIST in this process and on Ray with one and two workers: time, and the driver's memory.

    python tests/bench/cluster.py --root DIR [--images 60000] [--draws 20]

DIR holds MNIST as torchvision lays it out. A classifier and a β-VAE are trained for a few epochs on 6,000 images. Each
measurement is a process of its own, from the start of Ray to its end; its peak memory is the driver's own, without its
workers. The last lines compare the peak at a tenth of the images and at all of them.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from cluster.compute import RayCompute
from defuse_core.artifacts import Models
from defuse_core.codec import decode, encode
from defuse_core.config import RunFile, load_run_file
from defuse_core.data import open_splits
from defuse_core.local import LocalCompute
from defuse_core.protocols import silent
from defuse_core.store import FolderStore
from defuse_core.train import train

RUN_FILE = Path(__file__).parents[2] / "deploy" / "runs" / "mnist-laptop.yaml"
TRAINED_ON = 6000


@dataclass(frozen=True)
class Measured:
    """One process's identification."""

    seconds: float
    worker_seconds: float
    codes: int
    decodings: int
    peak_mb: float  # of the driver


def run_file(root: str, images: int, draws: int, workers: int) -> RunFile:
    """Return the laptop's MNIST with so many images and draws, and a short training."""
    settings = (
        f"data.root={root}",
        f"data.train_images={images}",
        "classifier.epochs=2",
        "vae.epochs=8",
        "vae.batch_size=128",
        f"identify.draws={draws}",
        f"resources.workers={workers}",
    )
    return load_run_file(RUN_FILE, settings)


def fitted(spec: RunFile, models: Models) -> Models:
    """Return the models as if they had been trained on the images of `spec`."""
    splits = open_splits(spec.data, spec.seed)
    return replace(models, images=splits.counts(), data_fingerprint=splits.fingerprint())


def measure(spec: RunFile, models: Models, where: str) -> Measured:
    """Identify here or on an embedded Ray, and measure this process."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as store:
        if where == "local":
            psi = LocalCompute().identify(spec, models, FolderStore(store))
        else:
            with RayCompute(None, spec) as compute:
                psi = compute.identify(spec, models, FolderStore(store))
    seconds = time.perf_counter() - started
    return Measured(seconds, psi.worker_seconds, psi.total, psi.decodings, peak_mb())


def peak_mb() -> float:
    """Return the most memory that this process held. (getrusage would tell of the process that started it, too.)"""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) / 1024


def alone(folder: Path, where: str, root: str, images: int, draws: int) -> Measured:
    """Measure in a process of its own."""
    words = [sys.executable, __file__, "--root", root, "--images", str(images), "--draws", str(draws)]
    done = subprocess.run(
        [*words, "--one", where, "--models", str(folder)], stdout=subprocess.PIPE, check=True
    )
    measured = Measured(**json.loads(done.stdout.splitlines()[-1]))
    print(
        f"{NAMES[where]:22} {images:7,} images  {measured.seconds:7.1f} s  "
        f"{measured.decodings / measured.seconds:7,.0f} decodings/s  |Ψ| {measured.codes:9,}  "
        f"driver {measured.peak_mb:5,.0f} MB",
        flush=True,
    )
    return measured


NAMES = {"local": "this process", "1": "Ray, one worker", "2": "Ray, two workers"}


def main() -> None:
    """Measure all, or, as a process of its own, one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", required=True)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--one", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    if given.one:
        spec = run_file(given.root, given.images, given.draws, 1 if given.one == "local" else int(given.one))
        models = decode(Models, given.models.read_bytes(), "models")
        print(json.dumps(asdict(measure(spec, models, given.one))))
        return
    with tempfile.TemporaryDirectory() as name:
        compare(Path(name), given.root, given.images, given.draws)


def compare(folder: Path, root: str, images: int, draws: int) -> None:
    """Train once, measure each way, and print what follows."""
    trained = train(run_file(root, TRAINED_ON, draws, 1), FolderStore(folder / "run"), progress=silent)
    for count in {images, images // 10}:
        spec = run_file(root, count, draws, 1)
        (folder / str(count)).write_bytes(encode(fitted(spec, trained)))
    small = alone(folder / str(images // 10), "2", root, images // 10, draws)
    here = alone(folder / str(images), "local", root, images, draws)
    one = alone(folder / str(images), "1", root, images, draws)
    two = alone(folder / str(images), "2", root, images, draws)
    if {one.codes, two.codes} != {here.codes}:
        raise SystemExit("Ψ differs")
    print(f"lost to Ray with one worker: {1 - here.seconds / one.seconds:.1%} of the time")
    print(f"two workers against one: {one.seconds / two.seconds:.2f} times as fast")
    print(f"driver's peak with ten times the images: {two.peak_mb - small.peak_mb:+.0f} MB")


if __name__ == "__main__":
    main()
