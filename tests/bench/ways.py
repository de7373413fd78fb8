"""The paper's way and the recommended one on one run file, seed after seed: what judges say of both, and the time.

    python tests/bench/ways.py --set data.root=DIR [--run-file deploy/runs/mnist-laptop.yaml] [--seeds 0 1 2]
        [--ways recommended paper] [--folder DIR] [--json FILE]

Judges, classifier, images and budget are the same in both. Runs in --folder that are finished are read again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.bench.runs import run

WAYS: dict[str, tuple[str, ...]] = {
    "recommended": (),
    "paper": (  # §3.2: noise of a Beta distribution, one mixture of all of Ψ, a share over ρ, one label for all
        "identify.noise=beta",
        "identify.scale=1.0",
        "identify.screen=none",
        "distill.by=all",
        "distill.order=weight",
        "distill.min_weight=0.01",
        "distill.min_support=1",
        "review.tau=0.5",
        "review.accept=share",
        "correct.filter=none",
        "correct.unreviewed=false",
        "correct.schedule=constant",
        "correct.batch_size=256",
        "correct.augment=false",
    ),
}
Row = dict[str, str]


def row_of(folder: Path) -> Row:
    """Return the figures of one run as they are shown."""
    report = json.loads((folder / "report.json").read_text())
    found, evidence = report["scenarios"], report["evidence"]
    accuracy = report["accuracy"]
    seconds = folder / "seconds"
    own, left, real = (evidence[key] for key in ("own_label", "left_out", "real_failures"))
    return {
        "judges right on the test set": ", ".join(f"{share:.1%}" for share in evidence["judges"]["accuracy"]),
        "accepted of candidates": f"{found['accepted']} of {found['components']}",
        "purity": _share(evidence["purity"]),
        "judges' labels: before, plain, corrected": _shares(own["before"], own["plain"], own["defuse"]),
        "left out of the tuning: before, plain, corrected": _shares(
            left["before"], left["plain"], left["defuse"]
        ),
        "left out with a confusion that is tuned on: plain, corrected": _confusion(
            evidence["left_out_known_confusion"]
        ),
        "left out with a new confusion: plain, corrected": _confusion(evidence["left_out_new_confusion"]),
        "failing test draws: plain, corrected": _shares(real["plain"], real["defuse"])
        + f" of {evidence['real_failure_images']}",
        "better and worse than plain: scenarios; failing test draws": "; ".join(
            _pairs(evidence["against_plain"][key]) for key in ("scenarios", "real_failures")
        ),
        "scenarios confirmed; worse": "; ".join(
            f"{sum(bool((each['evidence'] or {}).get(key)) for each in found['list'])} of {found['accepted']}"
            for key in ("confirmed", "worse")
        ),
        "test: before, failures alone, corrected": _accuracies(accuracy, "test"),
        "validation": _accuracies(accuracy, "validation"),
        "test, gained and lost: plain; corrected": "; ".join(
            _pairs(evidence[key]) for key in ("plain_against_before", "defuse_against_before")
        ),
        "answers per accepted scenario": f"{report['votes']['answers'] / max(1, found['accepted']):.0f}",
        "seconds": seconds.read_text() if seconds.exists() else "-",
    }


def _share(share: dict[str, Any]) -> str:
    value, low, high = share["value"], share["low"], share["high"]
    return "-" if value is None else f"{value:.1%} ({low:.0%} to {high:.0%})"


def _shares(*shares: dict[str, Any] | None) -> str:
    return " -> ".join(
        "-" if each is None or each["value"] is None else f"{each['value']:.1%}" for each in shares
    )


def _confusion(part: dict[str, Any]) -> str:
    shares = _shares(*({"value": part[key]} for key in ("plain", "defuse")))
    return f"{shares} of {part['count']}" if part["count"] else "-"


def _pairs(pairs: dict[str, Any] | None) -> str:
    return f"+{pairs['better']} -{pairs['worse']}, p {pairs['p_value']:.1g}" if pairs else "-"


def _accuracies(accuracy: dict[str, Any], part: str) -> str:
    shown = [(accuracy[model] or {}).get(part) for model in ("before", "baseline", "defuse")]
    return " -> ".join("-" if each is None else f"{each:.2%}" for each in shown)


def table(columns: dict[str, Row]) -> str:
    """Return a Markdown table, a column for each run."""
    names = list(next(iter(columns.values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(column[name] for column in columns.values()) + " |" for name in names
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-file", type=Path, default=ROOT / "deploy" / "runs" / "mnist-laptop.yaml")
    parser.add_argument("--set", dest="settings", action="append", default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS))
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    columns: dict[str, Row] = {}
    for seed in given.seeds:
        for way in given.ways:
            name = f"{given.run_file.stem}-{way}-{seed}"
            if not (given.folder / name / "report.json").exists():
                settings = [f"seed={seed}", *given.settings, *WAYS[way]]
                made = run(given.run_file, settings, str(given.folder.resolve()), name)
                (given.folder / name / "seconds").write_text(f"{made['seconds']:.0f}")
            columns[f"{way}, seed {seed}"] = row_of(given.folder / name)
            print(table(columns), flush=True)
    if given.json:
        given.json.write_text(json.dumps(columns, indent=2))


if __name__ == "__main__":
    main()
