"""The figures of §4 that need a model or a fit: accuracies, and the t-SNE of Figure 2; and the controls of evidence.

Controls are corrections that the chosen one is compared with: plain further training (λ = 0), and tuning without a
fold. Components are accepted because the classifier before fails on them, so almost any other model does better there.
The gain over plain further training comes from the scenarios. The result of one such training on a scenario depends on
the order of its minibatches, so there are P of them, and the correction is compared with each, on the same pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from threadpoolctl import threadpool_limits
from torch import nn

from defuse_core.artifacts import (
    F32,
    F64,
    I64,
    Anchors,
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
from defuse_core.distill.draws import in_any_region
from defuse_core.distill.mixture import responsibilities
from defuse_core.errors import ANOTHER_NAME, RunMismatchError
from defuse_core.evaluation.health import with_measured_health
from defuse_core.formatting import percent
from defuse_core.identify import subsample_psi
from defuse_core.intervals import MANY_CLASSES, class_accuracy, class_loss
from defuse_core.models import StoredVae, encode_images, load_classifier, load_vae, predict
from defuse_core.protocols import Progress
from defuse_core.review.verdicts import most_common_errors
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


def krippendorff_alpha(votes: Votes, images: int) -> float:
    """Return Krippendorff's α of the reviewers' answers (nominal); nan where fewer than two answered any image.

    Not by the package of that name, whose memory grows with the images and with the square of the answers.
    """
    answers, value = np.unique(votes.answer, return_inverse=True)
    units = votes.scenario * images + votes.image
    table = np.full((units.max(initial=-1) + 1, len(votes.annotators)), -1)
    table[units, votes.annotator] = value
    pairs: F64 = np.zeros((len(answers), len(answers)))  # of answers to one image: the coincidence matrix
    for row in table:
        given, count = np.unique(row[row >= 0], return_counts=True)
        if count.sum() > 1:
            pairs[np.ix_(given, given)] += (np.outer(count, count) - np.diag(count)) / (count.sum() - 1)
    total, differ = pairs.sum(axis=0), ~np.eye(len(answers), dtype=np.bool_)
    by_chance = (np.outer(total, total) - np.diag(total)) / (total.sum() - 1)
    with np.errstate(invalid="ignore"):  # nan where images with several answers have all the same one
        return float(1 - (pairs * differ).sum() / (by_chance * differ).sum())


@dataclass(frozen=True, eq=False)
class Controls:
    """Corrections that only evidence needs."""

    plain: tuple[Sweep, ...]  # P of λ = 0, which differ in their random numbers alone; never empty
    folds: tuple[Sweep, ...]  # each tuned without its fold's scenarios; empty with fewer than two scenarios

    @property
    def finished_plain(self) -> tuple[Sweep, ...]:
        """The plain trainings but those that failed for good; all if each did."""
        return tuple(sweep for sweep in self.plain if sweep.has_correction) or self.plain


def control_spec(spec: RunFile, lam: float, sweep: Sweep) -> RunFile:
    """Return the run file of a control with this λ, for as many epochs as the chosen correction."""
    epochs = sweep.chosen.epoch if sweep.chosen else spec.correct.epochs
    return spec.with_fields("correct", lambdas=(lam,), epochs=epochs, choose_by="last", stop_at_loss=None)


def folds(fixes: Corrections, sweep: Sweep) -> Sequence[int]:
    """Return the numbers of the folds: none with fewer than two accepted scenarios, or without a correction."""
    return (0, 1) if len(fixes.labels) > 1 and sweep.has_correction else ()


def fold_of(fixes: Corrections) -> I64:
    """Return which of the two folds each accepted scenario belongs to, (A,)."""
    return np.arange(len(fixes.labels)) % 2


def has_known_confusion(found: Findings, errors: I64) -> Bool:
    """Return the accepted scenarios whose label and wrong answer one has that is tuned on without them, (A,).

    `errors` (A,) are their most common wrong answers.
    """
    fixes = found.fixes
    confusions = np.stack([fixes.labels, errors], axis=1)  # (A, 2)
    fold, known = fold_of(fixes), np.zeros(len(errors), np.bool_)
    for number in (0, 1):
        tuned = np.isin(fixes.scenario, _outside(found, number).scenario)
        alike = (confusions[:, None] == confusions[tuned]).all(axis=2)
        known |= (fold == number) & alike.any(axis=1)
    return known


@cpu_threads(1)
def without_fold(found: Findings, fold: int) -> Corrections:
    """Return the corrections of all scenarios outside `fold`, without what is near one of it.

    Of the draws to tune on those are near that lie in its region. Of the unreviewed failures also those with its
    confusion, and the others of the source images, or tracks, of these codes.
    """
    fixes, kept = found.fixes, _outside(found, fold)
    codes = fixes.unreviewed
    if codes is None:
        return kept
    left_out = np.flatnonzero(fold_of(fixes) == fold)
    errors = most_common_errors(found.gallery, found.verdicts, fixes.scenario)
    near = in_any_region(found.scenarios, fixes.scenario[left_out], codes.codes)
    for row in left_out:
        near |= (codes.truth == fixes.labels[row]) & (codes.predicted == errors[row])
    return replace(kept, unreviewed=codes.take(~np.isin(codes.unit, codes.unit[near])))


def _outside(found: Findings, fold: int) -> Corrections:
    """Return the corrections of the scenarios outside `fold`, without draws to tune on in the region of one inside.

    The other draws of a scenario take their places, in turn. A scenario without another draw is left out, too.
    """
    inside = fold_of(found.fixes) == fold
    fixes, left_out = found.fixes.take(np.flatnonzero(~inside)), found.fixes.scenario[inside]
    accepted, count, dims = fixes.tune.shape
    near = in_any_region(found.scenarios, left_out, fixes.tune.reshape(-1, dims))
    away = ~near.reshape(accepted, count)
    rows = np.flatnonzero(away.any(axis=1))
    places = np.array([np.resize(np.flatnonzero(away[row]), count) for row in rows], np.int64)
    places = places.reshape(len(rows), count)  # (A, n_tune)
    kept, anchor = fixes.take(rows), None
    if kept.tune_anchor is not None:
        anchor = np.take_along_axis(kept.tune_anchor, places, axis=1)
    return replace(kept, tune=np.take_along_axis(kept.tune, places[..., None], axis=1), tune_anchor=anchor)


def units_of(anchors: Anchors | None, anchor: I64 | None, count: int) -> I64:
    """Return a number for each of `count` pictures, (count,); those with the same one are no independent evidence.

    It is that of the track that a picture is anchored at, of the image where images have no tracks, and its own with
    plain decoding. `anchor` holds indices into `anchors`.
    """
    if anchors is None or anchor is None:
        return np.arange(count)
    return anchors.unit[anchor.reshape(-1)]
