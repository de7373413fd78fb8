"""`make bench`: the measurements that compare two ways in one run, as a table and as JSON.

    python tests/bench/all.py [--only NAME ...] [--json bench.json]

Each one is a process of its own. The other files of this folder measure what needs a server, a cluster or people.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Bench:
    """One file of this folder, whose last line of output is JSON with ratios in it."""

    words: tuple[str, ...]  # file and arguments
    goals: dict[str, float]  # ratio (a dotted path into the JSON) -> what it has to reach


BENCHES = {
    "mixture": Bench(("mixture.py",), {"ratio": 8.0}),
    "identification": Bench(("precision.py",), {"ratio": 1.6}),
    "training": Bench(
        ("training.py",),
        {
            "classifier.ratio": 1.3,
            "vae.ratio": 1.2,
            "reference.ratio": 1.3,
            "fine-tuning.ratio": 1.5,
            "stack of 4, f32.ratio": 1.5,
        },
    ),
    "demo": Bench(("runs.py",), {"ratio": 1.6}),
}


def measure(bench: Bench) -> dict[str, Any]:
    """Return what the bench prints last. Raises CalledProcessError."""
    file, *arguments = bench.words
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "bench" / file), *arguments],
        stdout=subprocess.PIPE,
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def at(tree: dict[str, Any], path: str) -> float:
    """Return the number at a dotted path."""
    *parts, last = path.split(".")
    for part in parts:
        tree = tree[part]
    return float(tree[last])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=tuple(BENCHES), default=tuple(BENCHES))
    parser.add_argument("--json", type=Path, default=Path("bench.json"))
    given = parser.parse_args()
    results = {}
    print(f"{'':36} {'times as fast':>14} {'goal':>6}", flush=True)
    for name in given.only:
        results[name] = measure(BENCHES[name])
        for path, goal in BENCHES[name].goals.items():
            label = f"{name}: {path.removesuffix('ratio').rstrip('.')}".rstrip(": ")
            print(f"{label:36} {at(results[name], path):>14.2f} {goal:>6.2f}", flush=True)
        given.json.write_text(json.dumps(results, indent=1))
    print(f"all figures: {given.json}")


if __name__ == "__main__":
    main()
