"""A whole run with the resources that its run file has, and with f32 and two threads per training: time and figures.

    python tests/bench/runs.py [--run-file deploy/runs/mnist-laptop.yaml --set data.root=DIR]

Both runs follow each other on this machine, so quote the ratio.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FORMER = ("resources.precision=f32", "resources.train_threads=2")
SHARES = ("own_label", "left_out", "real_failures")  # fields of report.json's evidence


def run(run_file: Path, settings: list[str], store: str, name: str) -> dict[str, Any]:
    """Run the command, and return its seconds, those of each artefact, and the figures of the report."""
    words = [sys.executable, "-m", "services.cli", "run", str(run_file), "--store", store, "--name", name]
    started = time.perf_counter()
    subprocess.run([*words, *(word for each in settings for word in ("--set", each))], check=True, cwd=ROOT)
    seconds = time.perf_counter() - started
    folder = Path(store) / name
    entries = json.loads((folder / "manifest.json").read_text())["artefacts"]
    report = json.loads((folder / "report.json").read_text())
    return {
        "seconds": round(seconds, 1),
        "artefacts": {key: entry["seconds"] for key, entry in entries.items()},
        "accuracy": report["accuracy"],
        "evidence": {key: (report.get("evidence") or {}).get(key) for key in SHARES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-file", type=Path, default=ROOT / "deploy" / "runs" / "demo.yaml")
    parser.add_argument("--set", dest="settings", action="append", default=[])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as store:
        now = run(given.run_file, given.settings, store, "now")
        former = run(given.run_file, [*given.settings, *FORMER], store, "former")
    ratio = round(former["seconds"] / now["seconds"], 2)
    print(json.dumps({"ratio": ratio, "now": now, "former": former}), flush=True)


if __name__ == "__main__":
    main()
