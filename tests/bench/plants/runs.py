"""Defuse on a classifier that was trained on spoilt data: the run file, the run up to the review, and its groups."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from scipy.special import softmax
from scipy.stats import chi2, multivariate_normal

from defuse_core.artifacts import (
    F32,
    I64,
    Failures,
    Gallery,
    Models,
    Scenarios,
    Shard,
    Verdicts,
    Weights,
)
from defuse_core.codec import decode
from defuse_core.config import RunFile, parse_run_file
from defuse_core.data import Images
from defuse_core.device import cpu_threads
from defuse_core.local import LocalCompute
from defuse_core.models import (
    encode_images,
    load_classifier,
    load_vae,
    map_batches,
    to_tensor,
    weights_of,
)
from defuse_core.pipeline import run_defuse
from defuse_core.protocols import silent
from defuse_core.report.build import seen_in_training_images
from defuse_core.review.verdicts import most_common_error
from defuse_core.runs import ReachedStep, Run
from defuse_core.store import FolderStore, Store
from defuse_core.train import train_classifier
from defuse_core.training.reference_models import ReferenceAnnotators
from tests.bench.plants.baselines import EPSILON, View
from tests.bench.plants.populations import Population
from tests.bench.plants.scoring import Group

REFERENCES = "references.safetensors"  # they know nothing of the classifier, so one seed trains them once
Tree = Mapping[str, Mapping[str, Any]]
WAYS: dict[str, Tree] = {
    "recommended": {"distill": {"by": "cell", "order": "source-error"}},
    "one mixture": {"distill": {"by": "all", "order": "source-error"}},
    "paper": {
        "identify": {"noise": "beta", "screen": "none"},
        "distill": {"by": "all", "min_support": 1},
        "review": {"tau": 0.5, "accept": "share"},
    },
}

log = logging.getLogger("defuse")


def run_file(base: Tree, seed: int, data: Path, *changes: Tree) -> RunFile:
    """Return the run file of one run: `base` with the changes of its sections, in their order."""
    tree: dict[str, Any] = {name: dict(section) for name, section in base.items()}
    for change in ({"data": {"name": "npz", "root": str(data)}}, *changes):
        for name, section in change.items():
            tree[name] = {**tree.get(name, {}), **section}
    return parse_run_file({**tree, "seed": seed}, "the plants' run file")


def run_until(store: Store, name: str, spec: RunFile, *others: Run, until: str = "review") -> Run:
    """Run Defuse up to the verdicts (or `until`), with what earlier runs of the plant and seed have in common with it.

    The first of `others` is the control, whose reference models serve all plants; a later one that identifies with the
    same settings gives its models and Ψ.
    """
    run = Run.start(store, name, spec, until=until)
    for number, other in enumerate(others):
        if number == 0:
            keys = [REFERENCES]
        elif other.spec.identify == spec.identify:
            keys = [key for key in other.store.list() if key.startswith(("models.", "psi"))]
        else:
            continue
        for key in keys:
            run.store.write(key, other.store.read(key))
    compute = LocalCompute()
    with contextlib.suppress(ReachedStep):
        run_defuse(run, compute, ReferenceAnnotators(run, compute))
    return run


def load(run: Run, kind: type[Any], key: str | None = None) -> Any:
    """Return an artefact that the run has made."""
    found = run.load(kind, key)
    assert found is not None, f"{run.name} has no {kind.__name__}"
    return found


def train_spoilt(spec: RunFile, population: Population, spoilt: Images) -> Weights:
    """Return the weights of the run file's classifier, trained on spoilt images."""
    splits = population.splits()
    with cpu_threads(spec.resources.train_threads), tempfile.TemporaryDirectory() as folder:
        classifier, _ = train_classifier(
            spec, type(splits)(spoilt, splits.validation, None, splits.classes), FolderStore(folder), silent
        )
    return weights_of(classifier)


def write_weights(weights: Weights, path: Path) -> None:
    """Write weights as a file that a run file can name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: np.array(array, order="C") for key, array in weights.items()}, path)


def bring(section: str, path: Path) -> Tree:
    """Return the change of a run file that takes the classifier or the β-VAE from a file, as it is."""
    return {section: {"weights": str(path), "epochs": 0}}


def codes_of(spec: RunFile, vae: Weights, images: Images) -> F32:
    """Return the means of the β-VAE's posterior, (N, Z)."""
    with cpu_threads(spec.resources.train_threads):
        return encode_images(load_vae(spec, vae), images)


def _classifier(spec: RunFile, weights: Weights) -> torch.nn.Module:
    classes = len(list(weights.values())[-1])  # the bias of the last layer
    return load_classifier(spec, weights, classes)


def view(spec: RunFile, classifier: Weights, codes: F32, images: Images) -> View:
    """Return what the methods see of `images`."""
    with cpu_threads(spec.resources.train_threads):
        module = _classifier(spec, classifier)
        assert isinstance(module, torch.nn.Sequential)
        body, head = module[:-1], module[-1]
        features = map_batches(lambda rows: body(to_tensor(images.batch(rows))), len(images), 256)
        logits = map_batches(lambda rows: head(torch.from_numpy(features[rows])), len(images), 256)
    return View(images.labels, softmax(logits, axis=1), codes, features)


@dataclass(frozen=True, eq=False)
class Candidate:
    """One component of a run: what it is taken to be, and whether it was accepted."""

    component: int
    label: int  # of the verdict; of a rejected one, the label most of its reviewed images show; -1 for none
    answer: int  # what the classifier says to most of its misclassified images; -1 for none
    accepted: bool
    reason: str


def candidates(run: Run) -> list[Candidate]:
    """Return all components of a run, in their order."""
    gallery, verdicts = load(run, Gallery), load(run, Verdicts)
    found = []
    for component in range(len(gallery)):
        seen = verdicts.image_labels[component]
        named = seen[seen >= 0]
        voted = int(np.bincount(named).argmax()) if len(named) else -1
        label = int(verdicts.labels[component])
        accepted = label >= 0
        answer = most_common_error(gallery.predicted[component], label if accepted else voted, seen)
        found.append(
            Candidate(
                component,
                label if accepted else voted,
                -1 if answer is None else answer,
                accepted,
                verdicts.reasons[component],
            )
        )
    return found


def groups_of(run: Run, test: View, names: tuple[str, ...], chosen: list[Candidate]) -> list[Group]:
    """Return components of a run as groups of test images, in the order of `chosen`.

    A test image's score is the log density of its code under the component plus the log probability of the scenario's
    answer, and none where the image has another label. Members are the images of that label with that answer that the
    component has the highest density for and that lie within its 99.9 % ellipsoid.
    """
    scenarios = load(run, Scenarios)
    densities = {found.component: log_density(scenarios, found.component, test) for found in chosen}
    groups = []
    for found in chosen:
        density = densities[found.component]
        of_label = test.labels == found.label
        rivals = [
            densities[o.component] for o in chosen if (o.label, o.answer) == (found.label, found.answer)
        ]
        members = of_label & (test.predicted == found.answer) & (density >= np.max(rivals, axis=0))
        members &= density >= _edge(scenarios, found.component)
        nearest = np.where(of_label, density, -np.inf)
        score = nearest + np.log(test.probabilities[:, found.answer] + EPSILON)
        name = f"{names[found.label]} read as {names[found.answer]}"
        groups.append(Group(name, score, members, nearest))
    return groups


def accepted_of(run: Run) -> list[Candidate]:
    """Return the accepted scenarios, in their order."""
    return [found for found in candidates(run) if found.accepted and found.answer >= 0]


def seen_in_real_data(run: Run) -> list[Candidate]:
    """Return the accepted scenarios whose source images the classifier itself gets wrong, in their order.

    The failures of the others may be of decodings alone.
    """
    seen = seen_in_training_images(load(run, Scenarios))
    return [found for found in accepted_of(run) if seen[found.component]]


def all_failures(run: Run) -> Failures:
    """Return the whole of Ψ."""
    keys = [key for key in run.store.list("psi/") if key.endswith(".safetensors")]
    return Failures.concatenate([decode(Shard, run.store.read(key), key).failures for key in keys])


def owners(run: Run, psi: Failures) -> I64:
    """Return the component that each code belongs to most, (F,); -1 for a code of a cell without components."""
    scenarios: Scenarios = load(run, Scenarios)
    if not len(scenarios):
        return np.full(len(psi), -1, np.int64)
    joint = np.stack(
        [
            multivariate_normal(mean, covariance).logpdf(psi.codes) + np.log(weight)
            for mean, covariance, weight in zip(
                scenarios.means, scenarios.covariances, scenarios.weights, strict=True
            )
        ]
    )  # (S, F)
    cells = scenarios.cells
    if (cells >= 0).all():  # a component knows the codes of its cell only
        same = (cells[:, :1] == psi.truth) & (cells[:, 1:] == psi.predicted)
        joint = np.where(same, joint, -np.inf)
    found: I64 = np.where(np.isfinite(joint).any(axis=0), joint.argmax(axis=0), -1)
    return found


def log_density(scenarios: Scenarios, component: int, seen: View) -> Any:
    """Return the log density of each image's code under a component, (N,)."""
    return multivariate_normal(scenarios.means[component], scenarios.covariances[component]).logpdf(
        seen.codes
    )


def _edge(scenarios: Scenarios, component: int) -> float:
    """Return the log density at the surface of a component's 99.9 % ellipsoid."""
    mean = scenarios.means[component]
    peak = multivariate_normal(mean, scenarios.covariances[component]).logpdf(mean)
    return float(peak - 0.5 * chi2.ppf(0.999, len(mean)))


def clean_models(run: Run) -> Models:
    """Return the models of the run on clean data: the control, whose β-VAE all plants of a seed share."""
    found: Models = load(run, Models)
    return found
