"""Identification in bf16 against f32: how much faster, and whether any answer differs.

    python tests/bench/precision.py --decodings 1000000

Trains the models of demo.yaml first, or takes those of a run: --store runs --name demo. Both formats decode and
classify the same codes in turns on one thread, so quote the ratio.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from defuse_core.artifacts import Models
from defuse_core.config import Arithmetic, RunFile, load_run_file
from defuse_core.device import cpu_threads
from defuse_core.identify import Identifier, draw_noise, encode_posterior
from defuse_core.models import decoder_at
from defuse_core.protocols import silent
from defuse_core.runs import Run
from defuse_core.seeds import generator
from defuse_core.store import FolderStore
from defuse_core.train import train

RUN_FILE = Path(__file__).parents[2] / "deploy" / "runs" / "demo.yaml"
BLOCK = 8192  # codes that one format works on before the other has its turn


def with_arithmetic(spec: RunFile, arithmetic: Arithmetic) -> RunFile:
    """Return the run file with another number format."""
    return spec.with_fields("resources", precision=arithmetic)


def trained(store: str | None, name: str) -> tuple[RunFile, Models]:
    """Return the run file and models of a run, or of the demo, trained now."""
    if store is None:
        spec = with_arithmetic(load_run_file(RUN_FILE), "f32")
        with tempfile.TemporaryDirectory() as folder:
            return spec, train(spec, FolderStore(folder), progress=silent)
    run = Run.open(FolderStore(store), name)
    models = run.load(Models)
    if models is None:
        raise SystemExit(f"run {name} has no models yet")
    return run.spec, models


def compare(spec: RunFile, models: Models, decodings: int) -> dict[str, float]:
    """Decode and classify codes around training images in both formats."""
    exact = Identifier(with_arithmetic(spec, "f32"), models)
    fast = Identifier(with_arithmetic(spec, "bf16"), models)
    rng = generator(spec.seed, "bench", "precision")
    seconds, different, done = {"f32": 0.0, "bf16": 0.0}, 0, 0
    with cpu_threads(1):
        bound = fast._margin_bound
        while done < decodings:
            rows = rng.integers(len(exact.train), size=BLOCK)
            images = exact.train.take(rows)
            mu, sigma = encode_posterior(exact.vae, images, 256)
            section = spec.identify.model_copy(update={"draws": 1})
            codes = mu + draw_noise(section, sigma, rng)[:, 0]
            answers = {}
            for name, identifier in (("f32", exact), ("bf16", fast)):
                decoder = decoder_at(spec, identifier.vae, images)
                started = time.process_time()
                answers[name] = identifier._classify(decoder, codes, np.arange(len(codes)))
                seconds[name] += time.process_time() - started
            different += int((answers["f32"] != answers["bf16"]).sum())
            done += len(codes)
    return {
        "decodings": done,
        "f32_per_s": round(done / seconds["f32"]),
        "bf16_per_s": round(done / seconds["bf16"]),
        "ratio": round(seconds["f32"] / seconds["bf16"], 2),
        "different_answers": different,
        "margin_bound": round(bound, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--decodings", type=int, default=1_000_000)
    parser.add_argument("--store")
    parser.add_argument("--name", default="demo")
    given = parser.parse_args()
    print(json.dumps(compare(*trained(given.store, given.name), given.decodings)), flush=True)


if __name__ == "__main__":
    main()
