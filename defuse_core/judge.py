"""From votes to verdicts (§4.1): which components are failure scenarios, and what is right there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import TypeAdapter, ValidationError

from defuse_core.artifacts import I64, NONE_OF_THE_ABOVE, Bool, Gallery, Override, Verdicts, Votes
from defuse_core.errors import StoreError
from defuse_core.store import Store

OVERRIDES = "overrides/"  # human decisions above the vote, an object each: overrides/0001.json is the first


def tally(votes: Votes, shape: tuple[int, int], classes: int) -> I64:
    """Return how many annotators chose each class for each image, (S, R, C). None-of-the-above votes are discarded."""
    counts = np.zeros((*shape, classes), np.int64)
    named = votes.answer != NONE_OF_THE_ABOVE
    np.add.at(counts, (votes.scenario[named], votes.image[named], votes.answer[named]), 1)
    return counts


def majority(counts: I64) -> I64:
    """Return the class with the most votes along the last axis, or NONE_OF_THE_ABOVE where none or several have it."""
    most = counts.max(axis=-1, keepdims=True)
    unique = ((counts == most).sum(axis=-1) == 1) & (most[..., 0] > 0)
    return np.where(unique, counts.argmax(axis=-1), NONE_OF_THE_ABOVE).astype(np.int64)


def is_misclassified(predicted: I64, labels: I64) -> Bool:
    """Return whether the classifier's answer is another than the label; False where there is no label."""
    wrong: Bool = (labels != NONE_OF_THE_ABOVE) & (labels != predicted)
    return wrong


def most_common_error(predicted: I64, label: int) -> int | None:
    """Return the answer that most of a component's (R,) images were given instead of its label, the lowest of equals.

    None where all were answered with the label.
    """
    wrong = predicted[predicted != label]
    return int(np.bincount(wrong).argmax()) if len(wrong) else None


def judge(gallery: Gallery, votes: Votes, rho: float, overrides: Sequence[Override] = ()) -> Verdicts:
    """Return the verdict on every component.

    An image's label is the majority over its annotators, a tie giving none. A component is a failure scenario if more
    than rho of its labelled images are misclassified; its label is the majority over its images' labels, and a tie
    there accepts nothing. Agreement is the share of an image's votes, none-of-the-above left out, for its majority
    label (§4.4). The newest override of a component, if any, stands above the vote.
    """
    shape, classes = gallery.predicted.shape, len(gallery.classes)
    counts = tally(votes, (shape[0], shape[1]), classes)
    image_labels = majority(counts)  # (S, R)
    labelled = image_labels != NONE_OF_THE_ABOVE
    wrong = is_misclassified(gallery.predicted, image_labels)
    with np.errstate(invalid="ignore", divide="ignore"):
        misclassified = wrong.sum(axis=1) / labelled.sum(axis=1)
        agreement = np.where(labelled, counts.max(axis=-1) / counts.sum(axis=-1), np.nan)
    per_class = (image_labels[..., None] == np.arange(classes)).sum(axis=1)  # (S, C)
    voted = majority(per_class)
    labels, reasons = _decide(misclassified, voted, labelled, rho, gallery.classes)
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
    )


def _decide(
    misclassified: np.ndarray,  # type: ignore[type-arg]
    voted: I64,
    labelled: np.ndarray,  # type: ignore[type-arg]
    rho: float,
    classes: tuple[str, ...],
) -> tuple[I64, list[str]]:
    labels, reasons = np.full(len(voted), NONE_OF_THE_ABOVE, np.int64), []
    for component, label in enumerate(voted):
        share, count = misclassified[component], int(labelled[component].sum())
        if count == 0:
            reasons.append("rejected: no image has a label")
        elif not share > rho:
            reasons.append(
                f"rejected: {share:.0%} of {count} labelled images are misclassified, not over {rho:.0%}"
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
