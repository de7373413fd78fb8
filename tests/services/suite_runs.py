"""Runs that find scenarios over time, suites of them, and a classifier to check against these."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from defuse_core.artifacts import Corrections, Models, Sweep
from defuse_core.codec import encode
from defuse_core.config import RunFile
from defuse_core.data import open_splits
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from tests.conftest import tiny
from tests.services.serving.synthetic_runs import make_run, perturb_weights, swap_classes

NET = "tests.services.suite_runs:the_tiny_cnn"
EASY = {
    "check": {"min_scenario_accuracy": 0.5, "min_each_scenario": 0.5}
}  # the tiny classifier is not very good


def the_tiny_cnn() -> torch.nn.Module:
    """The classifier of the tiny run file as users have it: a factory in a module of theirs."""
    from defuse_core.models import build_classifier

    return build_classifier(tiny(), 10)


def planted_runs(folder: Path, tiny_models: Models) -> FolderStore:
    """Return runs on one data set: first finds 3 and 8, the others come later."""
    found, spec = FolderStore(folder), tiny(**EASY)
    splits = open_splits(spec.data, spec.seed)
    good, swapped = tiny_models.classifier, swap_classes(tiny_models.classifier, (3, 8))

    def plant(name: str, before: object, spec: RunFile = spec, after: object = good) -> Run:
        again = swap_classes(before, (3, 8))  # make_run swaps the classes of the classifier before
        return make_run(found, name, spec, dataclasses.replace(tiny_models, classifier=again), splits, after)

    first = plant("first", swapped)
    plant("same", swapped)
    plant("mended", good)
    plant("relapsed", perturb_weights(swapped, 1))
    plant("broken", good, after=swapped)
    plant("unimproved", swapped, after=swapped)
    fixes = first.load(Corrections)
    one = Corrections(fixes.scenario[:1], fixes.labels[:1], fixes.tune[:1], fixes.test[:1])
    plant("only-three", swapped).store.write("corrections.safetensors", encode(one))
    none = Corrections(fixes.scenario[:0], fixes.labels[:0], fixes.tune[:0], fixes.test[:0])
    plant("nothing", swapped).store.write("corrections.safetensors", encode(none))
    plant("never-wrong", good).store.write("corrections.safetensors", encode(none))
    plant("broken-unseen", good, after=swapped).store.write("corrections.safetensors", encode(none))
    plant("uncorrected", swapped).store.write("sweep.safetensors", encode(Sweep((), None, {}, ())))
    Run.start(found, "begun", spec)
    return found


def with_scenarios(suite: Path, folder: Path, change: Callable[[list[dict]], object]) -> Path:
    """Return a copy of a suite whose scenarios in suite.json were edited."""
    shutil.copytree(suite, folder)
    page = json.loads((suite / "suite.json").read_text())
    change(page["scenarios"])
    (folder / "suite.json").write_text(json.dumps(page))
    return folder
