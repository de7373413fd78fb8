"""From votes to verdicts (§4.1): which components are failure scenarios, and with which label."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import TypeAdapter, ValidationError

from defuse_core.artifacts import (
    F64,
    I64,
    NONE_OF_THE_ABOVE,
    Bool,
    Gallery,
    MoreImages,
    Override,
    Verdicts,
    Votes,
)
from defuse_core.config import ReviewSection
from defuse_core.errors import StoreError
from defuse_core.intervals import lower_bound, probability_not_over, significantly_over, wilson
from defuse_core.store import Store

OVERRIDES = "overrides/"  # human decisions that replace the vote, one object each, from overrides/0001.json


def tally(votes: Votes, shape: tuple[int, int], classes: int) -> I64:
    """Return how many annotators chose each class for each image, (S, R, C). None-of-the-above votes are discarded."""
    counts = np.zeros((*shape, classes), np.int64)
    named = votes.answer != NONE_OF_THE_ABOVE
    np.add.at(counts, (votes.scenario[named], votes.image[named], votes.answer[named]), 1)
    return counts


def majority(counts: I64) -> I64:
    """Return the class with the most votes along the last axis, or NONE_OF_THE_ABOVE for a tie or no vote."""
    most = counts.max(axis=-1, keepdims=True)
    unique = ((counts == most).sum(axis=-1) == 1) & (most[..., 0] > 0)
    return np.where(unique, counts.argmax(axis=-1), NONE_OF_THE_ABOVE).astype(np.int64)


def is_misclassified(predicted: I64, labels: I64) -> Bool:
    """Return whether the classifier's answer differs from the label; False where the label is missing."""
    wrong: Bool = (labels != NONE_OF_THE_ABOVE) & (labels != predicted)
    return wrong


def most_common_error(predicted: I64, label: int) -> int | None:
    """Return the most common wrong answer among a component's (R,) images, the lowest of equals; None without one."""
    wrong = predicted[predicted != label]
    return int(np.bincount(wrong).argmax()) if len(wrong) else None


def most_common(labels: I64) -> int | None:
    """Return the most common of (R,) labels, the lowest of equals; None where no image has one."""
    known = labels[labels != NONE_OF_THE_ABOVE]
    return int(np.bincount(known).argmax()) if len(known) else None


def false_discovery_rate(review: ReviewSection) -> float | None:
    """Return the rate at which review.accept: lower-bound accepts; None for the paper's rule."""
    return review.max_false if review.accept == "lower-bound" else None


def decide_verdicts(
    gallery: Gallery,
    votes: Votes,
    rho: float,
    overrides: Sequence[Override] = (),
    *,
    max_false: float | None = None,
    more: MoreImages | None = None,
    image_labels: I64 | None = None,
) -> Verdicts:
    """Return the verdict on every component.

    An image's label is the majority over its annotators, a tie gives none. A component is a failure scenario if more
    than rho of its labelled images are misclassified; its label is the majority over its images' labels, and a tie
    there accepts nothing. Agreement is the share of an image's votes, none-of-the-above left out, for its majority
    label (§4.4). The newest override of a component, if any, replaces the vote.

    With `max_false` the share has to be significantly more than rho, at that false discovery rate over all components,
    and counts the images of `more` as well. `image_labels` (S, R) replaces the majority over annotators.
    """
    shape, classes = gallery.predicted.shape, len(gallery.classes)
    counts = tally(votes, (shape[0], shape[1]), classes)
    image_labels = majority(counts) if image_labels is None else image_labels  # (S, R)
    labelled = image_labels != NONE_OF_THE_ABOVE
    wrong = is_misclassified(gallery.predicted, image_labels)
    hits, total = wrong.sum(axis=1), labelled.sum(axis=1)
    if more is not None:
        hits, total = hits + more.misclassified, total + more.labelled
    with np.errstate(invalid="ignore", divide="ignore"):
        misclassified = hits / total
        agreement = np.where(labelled, counts.max(axis=-1) / counts.sum(axis=-1), np.nan)
    per_class = (image_labels[..., None] == np.arange(classes)).sum(axis=1)  # (S, C)
    voted = majority(per_class)
    with np.errstate(invalid="ignore"):
        fails = misclassified > rho if max_false is None else significantly_over(hits, total, rho, max_false)
    threshold = f"{rho:.0%}" if max_false is None else f"{rho:.0%} with certainty"
    labels, reasons = _decide(fails, voted, (misclassified, total), threshold, gallery.classes)
    accepted = labels != NONE_OF_THE_ABOVE
    false = probability_not_over(hits, total, rho)[accepted]
    _apply(overrides, labels, reasons, gallery.classes)
    leading = np.where(labels == NONE_OF_THE_ABOVE, voted, labels)
    return Verdicts(
        labels=labels,
        misclassified=misclassified,
        purity=(labelled & (image_labels == leading[:, None])).mean(axis=1),
        image_labels=image_labels,
        agreement=agreement,
        ties=int((~labelled & (counts.sum(axis=-1) > 0)).sum()),
        no_class_chosen=int((counts.sum(axis=-1) == 0).sum()),
        reasons=tuple(reasons),
        overrides=tuple(overrides),
        labelled=total,
        lower=lower_bound(hits, total),
        false_share=float(false.mean()) if len(false) else 0.0,
    )


def doubtful(verdicts: Verdicts, rho: float) -> Bool:
    """Return which components are rejected although their true share may be more than rho, (S,)."""
    total = np.zeros(len(verdicts.labels), np.int64) if verdicts.labelled is None else verdicts.labelled
    hits = np.rint(np.nan_to_num(verdicts.misclassified) * total).astype(np.int64)
    high = wilson(hits, total, 0.9)[1]
    unsure: Bool = (verdicts.labels == NONE_OF_THE_ABOVE) & (high > rho)
    return unsure


def _decide(
    fails: Bool, voted: I64, shares: tuple[F64, I64], threshold: str, classes: tuple[str, ...]
) -> tuple[I64, list[str]]:
    labels, reasons = np.full(len(voted), NONE_OF_THE_ABOVE, np.int64), []
    for component, label in enumerate(voted):
        share, count = float(shares[0][component]), int(shares[1][component])
        if count == 0:
            reasons.append("rejected: no image has a label")
        elif not fails[component]:
            reasons.append(
                f"rejected: {share:.0%} of {count} labelled images are misclassified, not over {threshold}"
            )
        elif label == NONE_OF_THE_ABOVE:
            reasons.append(
                f"rejected: {share:.0%} of {count} labelled images are misclassified, but labels are tied"
            )
        else:
            labels[component] = label
            reasons.append(
                f"accepted as {classes[label]}: {share:.0%} of {count} labelled images are misclassified"
            )
    return labels, reasons


def _apply(overrides: Sequence[Override], labels: I64, reasons: list[str], classes: tuple[str, ...]) -> None:
    for override in overrides:
        label = override.label
        labels[override.scenario] = NONE_OF_THE_ABOVE if label is None else label
        decision = "rejected" if label is None else f"accepted as {classes[label]}"
        reasons[override.scenario] = f"{decision} by {override.author}: {override.reason}"


def read_overrides(store: Store) -> tuple[Override, ...]:
    """Return the human decisions of a run, oldest first. Raises StoreError for a file that is no decision."""
    return tuple(_read_override(store, key) for key in store.list(OVERRIDES))


def _read_override(store: Store, key: str) -> Override:
    try:
        return TypeAdapter(Override).validate_json(store.read(key))
    except ValidationError as error:
        raise StoreError(
            f"{store.address}/{key}: expected a decision with scenario, label, author, reason and when, found "
            f"{error.errors()[0]['msg']}; delete the file and record the decision again with `defuse review set`"
        ) from error
