"""Planted faults: does Defuse find what a classifier was trained to get wrong, and what does it find beside?

    python tests/bench/planted.py --root DATA [--population mnist] [--seeds 0 1 2] [--ways recommended] [--json FILE]

Per seed there is one population of images, with one β-VAE and one set of reference models trained on it; per plant a
classifier that is trained on the spoilt images and brought to Defuse as one's own, with clean images. A plant counts
only if the classifier has learnt it: its accuracy on the slice of the test set is at least 10 points (McNemar: p < 1 %)
below that of the same classifier trained on the clean images. tests/bench/plants holds the plants and the rules of
comparison.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

from scipy.stats import binomtest

from defuse_core.artifacts import F32, Bool, Models
from defuse_core.runs import Run
from defuse_core.seeds import generator
from defuse_core.store import FolderStore
from tests.bench.plants import baselines, populations
from tests.bench.plants.baselines import View
from tests.bench.plants.faults import MNIST_PLANTS, SIGNS_PLANTS, Plant, in_slice, spoil
from tests.bench.plants.funnel import funnel
from tests.bench.plants.populations import Population
from tests.bench.plants.runs import (
    WAYS,
    Tree,
    accepted_of,
    bring,
    clean_models,
    codes_of,
    groups_of,
    run_file,
    run_until,
    seen_in_real_data,
    train_spoilt,
    view,
    write_weights,
)
from tests.bench.plants.scoring import ENOUGH, Group, Outcome, compare, interval
from tests.bench.plants.spotcheck import spotcheck

MNIST_RUN: Tree = {
    "data": {"image_size": 32, "channels": 1},
    "classifier": {
        "architecture": "custom", "import_path": "tests.bench.plants.classifier:build_mnist",
        "optimizer": "adam", "learning_rate": 0.001, "epochs": 5, "batch_size": 64,
    },
    "vae": {
        "architecture": "convolutional", "latent_dim": 16, "encoder_stages": 3, "channels": 16, "beta": 1.0,
        "class_weight": 20.0, "epochs": 12, "batch_size": 128, "learning_rate": 0.003, "schedule": "one_cycle",
        "kl_warmup_steps": 250,
    },
    "identify": {"draws": 10, "scale": 2.0, "min_probability": 0.9},
    "distill": {"max_components": 60},
    "review": {"reference": {"count": 3, "channels": 16, "epochs": 5, "batch_size": 64}},
    "judges": {"count": 0},
    "resources": {"train_threads": 1},
}  # fmt: skip
SIGNS_RUN: Tree = {
    **MNIST_RUN,
    "data": {"image_size": 32, "channels": 3},
    "classifier": {
        **MNIST_RUN["classifier"],
        "import_path": "tests.bench.plants.classifier:build_signs",
        "epochs": 10,
    },
    "vae": {  # as in deploy/runs/signs-laptop.yaml
        **MNIST_RUN["vae"], "decode": "anchored", "latent_dim": 24, "channels": 24, "hidden": 256, "epochs": 8,
        "batch_size": 64, "kl_warmup_steps": 500,
    },
    "identify": {"draws": 4, "scale": 1.5, "min_probability": 0.9},
    "review": {"reference": {"count": 3, "channels": 24, "epochs": 8, "batch_size": 64}},
}  # fmt: skip
SPOTCHECK_RUN: Tree = {
    **MNIST_RUN,
    "data": SIGNS_RUN["data"],
    "classifier": {
        **MNIST_RUN["classifier"], "import_path": "tests.bench.plants.classifier:build_spotcheck", "epochs": 8,
    },
    "vae": {**MNIST_RUN["vae"], "channels": 32, "epochs": 20},
    "review": {"reference": {"count": 3, "channels": 16, "epochs": 6}},
}  # fmt: skip
RUNS = {"mnist": MNIST_RUN, "signs": SIGNS_RUN, "spotcheck": SPOTCHECK_RUN}
LEAST_DROP = 0.1


@dataclass(frozen=True)
class Learnt:
    """What the spoilt training has done to the classifier on the slice of the test set."""

    images: int
    clean: float  # accuracy of the classifier trained on clean images
    spoilt: float
    elsewhere: float  # accuracy of the spoilt classifier outside the slice
    learnt: bool


@dataclass(frozen=True)
class Row:
    """One plant with one seed."""

    plant: str
    kind: str
    seed: int
    slice: Learnt
    outcomes: dict[str, Outcome]  # method -> outcome
    funnels: dict[str, dict[str, Any]]  # way -> where the plant's images went
    seconds: dict[str, float]


@dataclass(frozen=True, eq=False)
class Bench:
    """One seed: what all its plants share."""

    folder: Path
    population: Population
    base: Tree
    seed: int
    control: Run
    models: Models  # of the control
    clean: View  # the test images, as the classifier of the control sees them
    codes: tuple[F32, F32]  # of the validation and the test images; all plants share the β-VAE


def learnt(inside: Bool, clean: View, spoilt: View) -> Learnt:
    """Return whether the classifier has learnt the plant, by McNemar's exact test on the slice."""
    lost = int((inside & ~clean.wrong & spoilt.wrong).sum())
    won = int((inside & clean.wrong & ~spoilt.wrong).sum())
    before, after = 1 - float(clean.wrong[inside].mean()), 1 - float(spoilt.wrong[inside].mean())
    significant = lost + won > 0 and binomtest(lost, lost + won, 0.5, "greater").pvalue < 0.01
    return Learnt(
        images=int(inside.sum()),
        clean=before,
        spoilt=after,
        elsewhere=1 - float(spoilt.wrong[~inside].mean()),
        learnt=bool(significant and before - after >= LEAST_DROP),
    )


def start(folder: Path, population: Population, base: Tree, seed: int) -> Bench:
    """Train what all plants of a seed share, on clean images: the control's classifier, β-VAE and reference models."""
    data = folder / "population.npz"
    if not data.exists():
        population.save(data)
    spec = run_file(base, seed, data)
    control = run_until(FolderStore(folder), "control", spec, until="train")
    models = clean_models(control)
    write_weights(models.vae, folder / "vae.safetensors")
    base = {**base, "vae": {**base["vae"], **bring("vae", folder / "vae.safetensors")["vae"]}}
    codes = (
        codes_of(spec, models.vae, population.validation.images),
        codes_of(spec, models.vae, population.test.images),
    )
    clean = view(spec, models.classifier, codes[1], population.test.images)
    return Bench(folder, population, base, seed, control, models, clean, codes)


def one_plant(bench: Bench, number: int, plant: Plant, ways: list[str], *, with_baselines: bool) -> Row:
    """Train on the spoilt images, and look for the plant with every method."""
    population, seed, data = bench.population, bench.seed, bench.folder / "population.npz"
    clock = Clock()
    spoilt = spoil(population, plant, generator(seed, "plants", "spoil", number))
    weights = train_spoilt(run_file(bench.base, seed, data), population, spoilt)
    path = bench.folder / f"plant-{number}.safetensors"
    write_weights(weights, path)
    own = bring("classifier", path)
    spec = run_file(bench.base, seed, data, own)
    inside = in_slice(population.test, plant, population.train)
    test = view(spec, weights, bench.codes[1], population.test.images)
    clock.lap("train")
    row = Row(plant.name, plant.kind, seed, learnt(inside, bench.clean, test), {}, {}, clock.seconds)
    if not row.slice.learnt:
        return row
    validation = view(spec, weights, bench.codes[0], population.validation.images)
    if with_baselines:
        for name, groups in proposals(validation, test, population.classes, seed):
            row.outcomes[name] = compare(groups, inside, test.labels, test.predicted)
        clock.lap("baselines")
    trained = in_slice(population.train, plant, population.train)
    made: dict[str, Run] = {}
    for way in ways:
        spec = run_file(bench.base, seed, data, own, WAYS[way])
        store = FolderStore(bench.folder)
        made[way] = run_until(store, f"plant-{number}-{way}", spec, bench.control, *made.values())
        clock.lap(way)
        for name, chosen in (
            (way, accepted_of(made[way])),
            (f"{way}, seen in real images", seen_in_real_data(made[way])),
        ):
            found = groups_of(made[way], test, population.classes, chosen)
            row.outcomes[f"Defuse {name}"] = compare(found, inside, test.labels, test.predicted)
        row.funnels[way] = funnel(made[way], population.train.images, trained, bench.control)
        clock.lap(f"{way}: comparison")
    return row


class Clock:
    """Processor seconds between laps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.process_time()

    def lap(self, name: str) -> None:
        """Note the seconds since the last lap."""
        now = time.process_time()
        self.seconds[name], self._last = round(now - self._last, 1), now


def proposals(
    validation: View, test: View, names: tuple[str, ...], seed: int
) -> Iterator[tuple[str, list[Group]]]:
    """Yield each baseline with its groups."""
    yield "confusion cells", baselines.confusion_cells(validation, test, names)
    yield "mixture on failures", baselines.failure_mixture(validation, test, seed)
    yield "PlaneSpot", baselines.planespot(validation, test, seed)
    yield "Domino", baselines.domino(validation, test, seed)


def summary(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """Return, per method, the figures over all learnt plants and seeds as (mean, low, high)."""
    counted = [row for row in rows if row.slice.learnt]
    methods = dict.fromkeys(name for row in counted for name in row.outcomes)
    table = {}
    for name in methods:
        found = [row.outcomes[name] for row in counted if name in row.outcomes]
        shown = [outcome for outcome in found if outcome.groups]
        first = [min(outcome.groups, 10) for outcome in shown]
        table[name] = {
            "plants": len(found),
            "precision_at_10": interval([o.precision for o in found]),
            "discovered_by_precision": interval([float(o.by_precision) for o in found]),
            "discovered_by_union": interval([float(o.by_union) for o in found]),
            "not_the_plant": interval([1 - o.belonging / n for o, n in zip(shown, first, strict=True)]),
            "false": interval([o.false / n for o, n in zip(shown, first, strict=True)]),
            "groups": interval([float(o.groups) for o in found]),
        }
    return table


def show(rows: list[Row]) -> None:
    """Print one line per plant and seed, then the summary."""
    for row in rows:
        part = row.slice
        state = "learnt" if part.learnt else "NOT learnt"
        print(
            f"{row.plant} (seed {row.seed}): {part.images} test images, {part.clean:.0%} -> {part.spoilt:.0%}, "
            f"elsewhere {part.elsewhere:.1%}, {state}"
        )
        for name, outcome in row.outcomes.items():
            print(
                f"    {name:32} P@10 {outcome.precision:.1f}  union recall {outcome.union_recall:.2f}  "
                f"groups {outcome.groups:3}  first ten: {outcome.belonging} plant, {outcome.natural} natural, "
                f"{outcome.false} false"
            )
        for way, found in row.funnels.items():
            groups = row.outcomes[f"Defuse {way}"].groups
            print(
                f"    {way}: {from_plant(found)} of {groups} accepted scenarios have {ENOUGH:.0%} of their codes from "
                "training images of the plant"
            )
    print(f"\n{sum(row.slice.learnt for row in rows)} of {len(rows)} plants were learnt\n")
    print(f"{'':32} {'P@10':>18} {'P@10 >= 0.8':>18} {'union rule':>18} {'not the plant':>18} {'false':>18}")
    for name, figures in summary(rows).items():
        cells = [
            "{:.2f} ({:.2f}-{:.2f})".format(*figures[key])
            for key in (
                "precision_at_10", "discovered_by_precision", "discovered_by_union", "not_the_plant", "false",
            )
        ]  # fmt: skip
        print(f"{name:32} " + " ".join(f"{cell:>18}" for cell in cells))


def from_plant(found: dict[str, Any]) -> int:
    """Return how many accepted scenarios of a funnel are of the plant, by the training images of their codes.

    Unlike the scores of test images, this does not depend on what the latent codes tell of a picture: with anchored
    decoding they know little of blur, darkness and stickers.
    """
    return sum(
        part["share_of_plant"] >= ENOUGH and part["reason"].startswith("accepted")
        for part in found["components"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, help="folder of MNIST or of the signs, as data.root")
    parser.add_argument("--population", choices=tuple(RUNS), default="mnist")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--plants", type=int, nargs="+", help="numbers of the plants; all of them by default")
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=["recommended", "one mixture"])
    parser.add_argument("--baselines", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--images",
        type=int,
        help="training images: 8,000 by default, of the signs all; those are drawn as whole tracks",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--folder", type=Path, help="where runs are kept, to go on with; else a temporary one"
    )
    parser.add_argument("--json", type=Path, help="where the figures are written, after every plant")
    given = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with tempfile.TemporaryDirectory() as temporary:
        rows = study(given, given.folder or Path(temporary))
    show(rows)


def study(given: argparse.Namespace, folder: Path) -> list[Row]:
    """Return a row per seed and plant, and write them to given.json as they come."""
    base = {**RUNS[given.population], "resources": {"train_threads": given.threads}}
    rows: list[Row] = []
    for seed in given.seeds:
        population, plants = population_of(given, seed)
        home = folder / f"{given.population}-{seed}"
        home.mkdir(parents=True, exist_ok=True)
        bench = start(home, population, base, seed)
        for number in given.plants or range(len(plants)):
            rows.append(one_plant(bench, number, plants[number], given.ways, with_baselines=given.baselines))
            show(rows[-1:])
            if given.json is not None:
                found = {"rows": [asdict(row) for row in rows], "summary": summary(rows)}
                given.json.write_text(json.dumps(found, indent=1))
    return rows


def population_of(given: argparse.Namespace, seed: int) -> tuple[Population, tuple[Plant, ...]]:
    """Return the images of one seed and the plants that are tried on them."""
    if given.population == "signs":
        return populations.signs(given.root, seed, given.images), SIGNS_PLANTS
    images = given.images or 8000
    counts = (images, images // 2, images * 3 // 4)
    if given.population == "spotcheck":
        return spotcheck(seed, counts)
    return populations.mnist(given.root, seed, counts), MNIST_PLANTS


if __name__ == "__main__":
    main()
