"""From votes to verdicts (§4.1): which components are failure scenarios, with which label, and what people override."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

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
from defuse_core.errors import DamagedError, InputError, first_few
from defuse_core.intervals import probability_not_over, significantly_over, wilson
from defuse_core.review.decision import Shares, count_units, decide
from defuse_core.runs import FROM_VERDICTS, Run, utc_now
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


def most_common_error(predicted: I64, label: int, image_labels: I64) -> int | None:
    """Return the most common wrong answer among a component's (R,) images, the lowest of equals; None without one.

    An answer is wrong if it is neither the component's label nor the image's own. Where no image with a label of its
    own has one, as in components that an override accepts, it is wrong if it is not the component's label.
    """
    other = predicted != label
    misclassified = other & is_misclassified(predicted, image_labels)
    wrong = predicted[misclassified if misclassified.any() else other]
    return int(np.bincount(wrong).argmax()) if len(wrong) else None


def most_common_errors(gallery: Gallery, verdicts: Verdicts, components: I64) -> I64:
    """Return the most common wrong answer among the images of accepted components, (A,); the label where none is."""
    errors: I64 = verdicts.labels[components]
    for row, component in enumerate(components.tolist()):
        wrong = most_common_error(
            gallery.predicted[component], int(errors[row]), verdicts.image_labels[component]
        )
        if wrong is not None:
            errors[row] = wrong
    return errors


def most_common(labels: I64) -> int | None:
    """Return the most common of (R,) labels, the lowest of equals; None where no image has one."""
    known = labels[labels != NONE_OF_THE_ABOVE]
    return int(np.bincount(known).argmax()) if len(known) else None


def false_discovery_rate(review: ReviewSection) -> float | None:
    """Return the rate at which review.accept: lower-bound accepts; None for the paper's rule.

    It is half of max_false where two decisions follow each other, so that both together keep it.
    """
    if review.accept != "lower-bound":
        return None
    return review.max_false / 2 if decides_twice(review) else review.max_false


def decides_twice(review: ReviewSection) -> bool:
    """Whether components that remain in doubt are decided again on more images, which only models can label."""
    return (
        review.accept == "lower-bound" and review.annotators == "reference-models" and review.more_images > 0
    )


@dataclass(frozen=True, eq=False)
class _ReviewedImages:
    """The votes on every image, and the label that each has."""

    counts: I64  # (S, R, C) annotators that chose each class
    labels: I64  # (S, R)

    @property
    def labelled(self) -> Bool:
        """(S, R) whether an image has a label."""
        labelled: Bool = self.labels != NONE_OF_THE_ABOVE
        return labelled

    def wrong(self, predicted: I64, more: MoreImages | None) -> tuple[I64, I64]:
        """Return how many labelled images of each component are misclassified, (S,), and how many there are, (S,)."""
        hits, total = is_misclassified(predicted, self.labels).sum(axis=1), self.labelled.sum(axis=1)
        return (hits, total) if more is None else (hits + more.misclassified, total + more.labelled)

    def agreement(self) -> F64:
        """Return the share of each image's votes for the class that most chose, or for one of several in a tie, (S, R).

        nan for an image with a single vote, which agrees with nothing but itself, and for one without votes.
        """
        votes = self.counts.sum(axis=-1)
        with np.errstate(invalid="ignore", divide="ignore"):
            shares: F64 = self.counts.max(axis=-1) / votes
        return np.where(votes > 1, shares, np.nan)

    def voted(self) -> I64:
        """Return the label that most images of each component have, (S,), or NONE_OF_THE_ABOVE for a tie."""
        return majority((self.labels[..., None] == np.arange(self.counts.shape[-1])).sum(axis=1))

    def purity(self, leading: I64) -> F64:
        """Return the share of each component's images with its label of `leading`, (S,)."""
        purity: F64 = (self.labelled & (self.labels == leading[:, None])).mean(axis=1)
        return purity


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
    label, or for one label of a tie (§4.4). The newest override of a component, if any, replaces the vote.

    With `max_false` the share has to be significantly more than rho, at that false discovery rate over all components,
    and counts the images of `more` as well. With vae.decode: anchored it is then the share of units (`count_units`).
    `image_labels` (S, R) replaces the majority over annotators.
    """
    scenarios, per_scenario = gallery.predicted.shape
    counts = tally(votes, (scenarios, per_scenario), len(gallery.classes))
    images = _ReviewedImages(counts, majority(counts) if image_labels is None else image_labels)
    hits, total = images.wrong(gallery.predicted, more)
    voted = images.voted()
    with np.errstate(invalid="ignore", divide="ignore"):
        misclassified = hits / total
    units = count_units(gallery, images.labels, more, rho)
    tested = (hits, total) if units is None else (units.failing, units.total)
    fails = misclassified > rho if max_false is None else significantly_over(*tested, rho, max_false)
    shares = Shares(misclassified, total, rho, max_false, units)
    reviewed = images.labelled.sum(axis=1) > 0
    labels, reasons = decide(fails, voted, reviewed, shares, gallery.classes)
    accepted = labels != NONE_OF_THE_ABOVE
    false = probability_not_over(*tested, rho)[accepted]
    _apply(overrides, labels, reasons, gallery.classes)
    leading = np.where(labels == NONE_OF_THE_ABOVE, voted, labels)
    return Verdicts(
        labels=labels,
        misclassified=misclassified,
        purity=images.purity(leading),
        image_labels=images.labels,
        agreement=images.agreement(),
        ties=int((~images.labelled & (counts.sum(axis=-1) > 0)).sum()),
        no_class_chosen=int((counts.sum(axis=-1) == 0).sum()),
        reasons=tuple(reasons),
        overrides=tuple(overrides),
        labelled=total,
        false_share=float(false.mean()) if len(false) else 0.0,
        units=None if units is None else units.total,
        failing_units=None if units is None else units.failing,
    )


def doubtful(verdicts: Verdicts, rho: float) -> Bool:
    """Return which components are rejected although their true share may be more than rho, (S,)."""
    total = verdicts.labelled
    hits = np.rint(np.nan_to_num(verdicts.misclassified) * total).astype(np.int64)
    if verdicts.units is not None and verdicts.failing_units is not None:
        hits, total = verdicts.failing_units, verdicts.units
    high = wilson(hits, total, 0.9)[1]
    unsure: Bool = (verdicts.labels == NONE_OF_THE_ABOVE) & (high > rho)
    return unsure


def _apply(overrides: Sequence[Override], labels: I64, reasons: list[str], classes: tuple[str, ...]) -> None:
    for override in overrides:
        label = override.label
        labels[override.scenario] = NONE_OF_THE_ABOVE if label is None else label
        decision = "rejected" if label is None else f"accepted as {classes[label]}"
        reasons[override.scenario] = f"{decision} by {override.author}: {override.reason}"


def read_overrides(store: Store) -> tuple[Override, ...]:
    """Return the human decisions of a run, oldest first. Raises DamagedError for a file that is no decision."""
    found = (_read_override(store, key) for key in store.list(OVERRIDES))
    return tuple(entry for entry in found if entry is not None)


def _read_override(store: Store, key: str) -> Override | None:
    """Return one decision; None where its author has withdrawn it since it was listed."""
    try:
        return TypeAdapter(Override).validate_json(store.read(key))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise DamagedError(
            f"{store.address}/{key}: expected a decision with scenario, label, author, reason and when, found "
            f"{error.errors()[0]['msg']}; delete the file and record the decision again with `defuse review set`"
        ) from error


FROM_VOTES = ("votes", *FROM_VERDICTS)
FILES_FROM_VERDICTS = ("trials/", "report.json", "report.html", "figures/")


def _judged_without(run: Run, entry: Override) -> bool:
    verdicts = run.load(Verdicts)
    return verdicts is not None and entry not in verdicts.overrides


def override_verdict(
    run: Run, scenario: int, label: str | None, *, author: str, reason: str, redo: bool = False
) -> str:
    """Store that `scenario` has `label` (a class's name or index), or is rejected (None); return a sentence about it.

    Raises InputError for an unknown scenario or class, and if the run already has verdicts: `redo` deletes them and
    what follows from them, and `defuse run` makes that again.
    """
    gallery = run.load(Gallery)
    if gallery is None:
        raise InputError(
            f"run {run.name} has no scenarios yet; `defuse status {run.name}` shows how far it is"
        )
    if not 0 <= scenario < len(gallery):
        raise InputError(f"scenario {scenario}: run {run.name} has scenarios 0 to {len(gallery) - 1}")
    if not reason.strip():
        raise InputError("--reason: expected a sentence for the readers of the report, found none")
    index = None if label is None else class_index(label, gallery.classes)
    when = utc_now()
    entry = Override(scenario, index, author, " ".join(reason.split()), when)
    if run.load(Verdicts) is None:
        key = _store(run, entry)
        if _judged_without(run, entry):  # a driver has judged in the meantime
            run.store.delete(key)
            if _judged_without(run, entry):
                raise InputError(_judged_message(run))
            _store(run, entry)  # the driver had read it before, and judged again with it
    elif redo:
        with run.store.lock():
            _delete_artefacts(run, FROM_VERDICTS)
            # Last: beside verdicts that were made without it, it would be recorded and ignored.
            _store(run, entry)
    else:
        raise InputError(_judged_message(run))
    return f"scenario {scenario} is " + (
        "rejected" if index is None else f"a failure: {gallery.classes[index]}"
    )


def class_index(label: str, classes: tuple[str, ...]) -> int:
    """Return the class called `label`, or else of that index. Raises InputError."""
    if label in classes:
        return classes.index(label)
    if label.isdecimal() and int(label) < len(classes):
        return int(label)
    shown = first_few(classes, most=12)
    raise InputError(f"--label {label}: expected a class or its index, of 0 to {len(classes) - 1} ({shown})")


def _store(run: Run, entry: Override) -> str:
    """Store the decision beside all others, and return its key: of two that are made at once, both count."""
    number = len(run.store.list(OVERRIDES)) + 1
    while not run.store.create(f"{OVERRIDES}{number:04d}.json", json.dumps(asdict(entry), indent=1).encode()):
        number += 1
    return f"{OVERRIDES}{number:04d}.json"


def _judged_message(run: Run) -> str:
    return (
        f"run {run.name} has its verdicts already, and maybe a corrected model; --redo deletes these, and "
        "`defuse run` makes them again with this decision"
    )


def reopen_vote(run: Run) -> None:
    """Delete the votes and what follows from them, so that `defuse run` takes in all answers that people have given.

    Raises InputError if the run has no votes yet, or if reference models gave them.
    """
    if run.spec.review.annotators != "label-studio":
        raise InputError(f"run {run.name} asks reference models; only a vote of people can be reopened")
    if not run.store.exists("votes.safetensors"):
        raise InputError(f"the vote of run {run.name} is still open: all answers will count")
    with run.store.lock():
        _delete_artefacts(run, FROM_VOTES)


def _delete_artefacts(run: Run, names: tuple[str, ...]) -> None:
    """Delete artefacts and the files that follow from the verdicts; the first one last, to be safe to repeat."""
    files = [key for key in run.store.list() if key.startswith(FILES_FROM_VERDICTS)]
    for key in (*files, *(f"{name}.safetensors" for name in reversed(names))):
        run.store.delete(key)
    manifest = run.manifest()
    for name in names:
        manifest["artefacts"].pop(name, None)
    run.store.write("manifest.json", json.dumps(manifest, indent=1).encode())
