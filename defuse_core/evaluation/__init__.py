"""What a run found, and the figures of §4 that need a model or a fit: accuracies, and the t-SNE of Figure 2."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits
from torch import nn

from defuse_core.artifacts import (
    F32,
    F64,
    I64,
    Bool,
    Corrections,
    Evaluation,
    Gallery,
    Models,
    Psi,
    ReferenceSet,
    Scenarios,
    Sweep,
    Verdicts,
    Votes,
    Weights,
)
from defuse_core.config import RunFile
from defuse_core.data import Images, Splits, reopen_splits
from defuse_core.data.images import evenly_spaced
from defuse_core.data.splits import random_rows
from defuse_core.device import cpu_threads
from defuse_core.distill.mixture import responsibilities
from defuse_core.errors import ANOTHER_NAME, RunMismatchError
from defuse_core.evaluation.health import with_measured_health
from defuse_core.formatting import percent
from defuse_core.identify import subsample_psi
from defuse_core.intervals import MANY_CLASSES, class_accuracy, class_loss
from defuse_core.models import StoredVae, encode_images, load_classifier, load_vae, predict
from defuse_core.protocols import Progress
from defuse_core.runs import Run
from defuse_core.seeds import generator, torch_seed
from defuse_core.store import Store
from defuse_core.tuning_data import held_out_images

MIN_RESPONSIBILITY = 0.01  # B.5: codes of Ψ that belong less to every failure scenario are left out
MIN_CODES = 4  # fewest codes of a t-SNE: a perplexity of 1 needs them
ANGLE = 0.8  # Barnes-Hut angle; scikit-learn's 0.5 takes half as long again for a KL that is 3 % lower
COMPARED_ANSWERS = 100  # stored answers that a classifier gives again
OTHER_CODE = (
    "the run began. Its weights are the same, so its code, or that of a package, has changed; restore that, or run "
    f"again under {ANOTHER_NAME}"
)
TRAINING, FAILURE, ACCEPTED, REJECTED = range(4)  # Evaluation.point_kind


@dataclass(frozen=True, eq=False)
class Findings:
    """Everything that a run found, for its report."""

    models: Models
    psi: Psi
    scenarios: Scenarios
    gallery: Gallery
    votes: Votes
    verdicts: Verdicts
    fixes: Corrections
    baseline: Sweep
    sweep: Sweep
    references: ReferenceSet | None = None  # the reference models, where any step used them
    judges: ReferenceSet | None = None  # None with judges.count 0

    @classmethod
    def load(cls, run: Run) -> Findings:
        """Return what a finished run found. Raises InputError for one that is not finished."""
        return cls(
            with_measured_health(run, run.require(Models)),
            run.require(Psi),
            run.require(Scenarios),
            run.require(Gallery),
            run.require(Votes),
            run.require(Verdicts),
            run.require(Corrections),
            run.require(Sweep, "baseline"),
            run.require(Sweep),
            references=run.load(ReferenceSet, "references"),
            judges=run.load(ReferenceSet, "judges"),
        )


def evaluate(spec: RunFile, found: Findings, store: Store, *, progress: Progress) -> Evaluation:
    """Return the figures of §4. Without an accepted scenario the corrected classifier is the one before.

    Raises RunMismatchError where the images, or the answers of the classifier, have changed since the run began.
    """
    on_disk = reopen_splits(spec, found.models.data_fingerprint)
    splits = on_disk.loaded("validation", "test")  # scored again and again; few training images are looked at
    classes = len(found.models.classes)
    before = found.models.classifier
    all_weights = (before, found.baseline.weights, found.sweep.weights or before)
    with cpu_threads(spec.resources.train_threads):
        held_out = held_out_images(StoredVae(spec, found.models.vae), found.fixes)
        scores = []
        for done, weights in enumerate(all_weights):
            progress("scoring the classifiers", done, len(all_weights), "classifiers")
            scores.append(_score(spec, weights, splits, held_out, found))
        for part, share in zip(("validation", "test"), scores[0][0], strict=False):
            expect_same_accuracy(found.models, part, float(share))
        corrected = load_classifier(spec, all_weights[-1], classes)
        after = predict(corrected, found.gallery.images.reshape(-1, *found.gallery.images.shape[2:]))
        progress("drawing the latent space")
        points, kind, component = latent_map(spec, found, splits.train, store)
    tested = np.zeros(0, np.int64) if splits.test is None else splits.test.labels
    accuracy, per_class, scenario, right = (np.stack(part) for part in zip(*scores, strict=True))
    loss = None
    if splits.test is not None and classes > MANY_CLASSES:
        loss = class_loss(right[0], right[-1], tested, splits.test.tracks, classes)
    return Evaluation(
        accuracy=accuracy,
        per_class=per_class,
        per_class_images=np.bincount(tested, minlength=classes).astype(np.int64),
        scenario=scenario,
        gallery_after=after.reshape(found.gallery.predicted.shape),
        points=points,
        point_kind=kind,
        point_component=component,
        class_loss=loss,
    )


def expect_same_accuracy(models: Models, part: str, accuracy: float) -> None:
    """Raise RunMismatchError unless f has the accuracy on a part of the images that it had when the run began.

    Up to 1 % of the answers, and two more, may be others: another device rounds differently.
    """
    known = models.accuracy.get(part)
    if known is not None and abs(accuracy - known) > 0.01 + 2 / models.images[part]:
        raise RunMismatchError(
            f"the classifier gets {percent(accuracy, 2)} of the {part} images right, and got {percent(known, 2)} when "
            f"{OTHER_CODE}"
        )


def expect_same_code(spec: RunFile, models: Models, gallery: Gallery, *, progress: Progress) -> None:
    """Load f and raise RunMismatchError unless it answers as `expect_same_answers` describes."""
    progress("comparing answers of the classifier")
    expect_same_answers(spec, load_classifier(spec, models.classifier, len(models.classes)), gallery)


def expect_same_answers(spec: RunFile, classifier: nn.Module, gallery: Gallery) -> None:
    """Raise RunMismatchError unless f answers images of the gallery as when they were drawn.

    Up to a tenth of the answers, and one more, may be others: failures can be near the boundary of two classes.
    """
    images = gallery.images.reshape(-1, *gallery.images.shape[2:])
    rows = evenly_spaced(len(images), COMPARED_ANSWERS)
    with cpu_threads(spec.resources.train_threads):
        answers = predict(classifier, images[rows])
    changed = int((answers != gallery.predicted.reshape(-1)[rows]).sum())
    if changed > 1 + len(rows) / 10:
        raise RunMismatchError(
            f"the classifier answers {changed} of {len(rows)} stored images otherwise than when {OTHER_CODE}"
        )


def _score(
    spec: RunFile, weights: Weights, splits: Splits, held_out: Images, found: Findings
) -> tuple[F64, F64, F64, Bool]:
    """Return accuracies on validation, test and scenario images, (3,), in each class, (C,), and scenario, (A,).

    nan where there is nothing to score on. The last says which of the (T,) test images it gets right.
    """
    classes, scenarios = len(found.models.classes), len(found.fixes.labels)
    if not weights:
        none = np.zeros(0 if splits.test is None else len(splits.test), np.bool_)
        return np.full(3, np.nan), np.full(classes, np.nan), np.full(scenarios, np.nan), none
    classifier = load_classifier(spec, weights, classes)
    parts, readers = (splits.validation, splits.test, held_out), spec.resources.readers
    right = [
        np.zeros(0, np.bool_)
        if images is None
        else predict(classifier, images, readers=readers) == images.labels
        for images in parts
    ]
    overall = [float(hits.mean()) if len(hits) else math.nan for hits in right]
    per_class: F64 = np.full(classes, np.nan)
    if splits.test is not None:
        per_class = class_accuracy(right[1], splits.test.labels, classes)
    scenario = right[2].reshape(scenarios, -1).mean(axis=1) if scenarios else np.zeros(0)
    return np.array(overall), per_class, scenario, right[1]


def latent_map(spec: RunFile, found: Findings, train: Images, store: Store) -> tuple[F32, I64, I64]:
    """Return t-SNE points (P, 2), their kind and component (P,), as Evaluation holds them (Figure 2, B.5).

    For a training image the component is its class.
    """
    rng = generator(spec.seed, "report", "sample")
    scenarios, accepted = found.scenarios, found.verdicts.accepted
    rows = random_rows(len(train), spec.report.tsne_images, rng)
    codes = encode_images(load_vae(spec, found.models.vae), train.take(rows))
    failures = subsample_psi(spec, found.psi, store).codes
    shares = shares_of_mixture(scenarios, failures)
    if len(accepted):
        near = (shares[:, accepted] > MIN_RESPONSIBILITY).any(axis=1)
        failures, shares = failures[near], shares[near]
    chosen = random_rows(len(failures), spec.report.tsne_failures, rng)
    failures, shares = failures[chosen], shares[chosen]
    owner = shares.argmax(axis=1) if len(scenarios) else np.full(len(failures), -1)
    means = np.where(np.isin(np.arange(len(scenarios)), accepted), ACCEPTED, REJECTED)
    points = embed(spec, np.concatenate([codes, failures, scenarios.means.astype(np.float32)]))
    kind = np.concatenate([np.full(len(codes), TRAINING), np.full(len(failures), FAILURE), means])
    component = np.concatenate([train.labels[rows], owner, np.arange(len(scenarios))])
    return points, kind.astype(np.int64), component.astype(np.int64)


def shares_of_mixture(scenarios: Scenarios, codes: F32) -> F64:
    """Return the probability that (n, Z) codes belong to each component of `scenarios`, (n, S).

    Components that were dropped have their share, too, so that a row may sum to less than 1.
    """
    found = responsibilities(
        codes,
        np.concatenate([scenarios.weights, scenarios.all_weights]),
        np.concatenate([scenarios.means, scenarios.all_means]),
        np.concatenate([scenarios.covariances, scenarios.all_covariances]),
    )
    own, mixture = found[:, : len(scenarios)], found[:, len(scenarios) :]
    shares: F64 = own / mixture.sum(axis=1, keepdims=True)
    return shares


def embed(spec: RunFile, codes: F32) -> F32:
    """Return t-SNE of (P, Z) codes, (P, 2), by Barnes and Hut's approximation: some 45 s for 10,000 codes.

    On one thread, because sums in another order give another picture. Zeros where there are too few codes for one.
    """
    if len(codes) < MIN_CODES:
        return np.zeros((len(codes), 2), np.float32)
    from sklearn.manifold import TSNE  # late: its import takes a second

    perplexity = min(spec.report.perplexity, (len(codes) - 1) / 3)
    seed = torch_seed(spec.seed, "report", "t-SNE") % 2**32
    with threadpool_limits(limits=1):
        init = "pca" if codes.shape[1] > 1 else "random"
        tsne = TSNE(perplexity=perplexity, angle=ANGLE, init=init, random_state=seed, n_jobs=1)
        points: F32 = tsne.fit_transform(codes).astype(np.float32)
        return points
