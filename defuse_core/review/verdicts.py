"""From votes to verdicts (§4.1): the label of each image, and which components are failure scenarios, for what reason.

An image's label is the majority of its votes, or CROWDLAB's, from the votes and from models that did not vote.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from defuse_core.artifacts import (
    F32,
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
from defuse_core.config.base import fewest_units
from defuse_core.errors import RunFileError
from defuse_core.formatting import before_punctuation, count_of, percent
from defuse_core.intervals import ROUNDING, probability_not_over, significantly_over, wilson
from defuse_core.optional_packages import expect_packages

LEAST_ANSWERS = 2  # fewest answers for a label by CROWDLAB: the models and a single person never decide


def tally(votes: Votes, shape: tuple[int, int], classes: int) -> I64:
    """Return how many annotators chose each class for each image, (S, R, C). None-of-the-above votes are discarded."""
    counts = np.zeros((*shape, classes), np.int64)
    named = votes.answer != NONE_OF_THE_ABOVE
    np.add.at(counts, (votes.scenario[named], votes.image[named], votes.answer[named]), 1)
    return counts


def majority(counts: I64) -> I64:
    """(..., C) -> the class with the most votes, (...), or NONE_OF_THE_ABOVE for a tie or no vote."""
    most = counts.max(axis=-1, keepdims=True)
    unique = ((counts == most).sum(axis=-1) == 1) & (most[..., 0] > 0)
    return np.where(unique, counts.argmax(axis=-1), NONE_OF_THE_ABOVE).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Consensus:
    """The label of each image by CROWDLAB."""

    labels: I64  # (S, R)
    quality: F64  # (S, R) estimated probability that the label is right; 0 where it is not known
    chosen: I64  # (S, R) annotators that chose the label

    def sure(self, certainty: float) -> Bool:
        """Return where at least LEAST_ANSWERS chose the label and its quality is at least `certainty`, (S, R)."""
        sure: Bool = (self.chosen >= LEAST_ANSWERS) & (self.quality >= certainty)
        return sure


def stops_when_sure(review: ReviewSection) -> bool:
    """Return whether people are not asked about an image any more once CROWDLAB is sure of its label."""
    return review.stop_early and review.consensus == "crowdlab"


def expect_cleanlab() -> None:
    """Raise RunFileError without the package cleanlab."""
    expect_packages("review.consensus: crowdlab", "cleanlab", error=RunFileError)


def crowdlab_consensus(votes: Votes, probabilities: F32) -> Consensus:
    """Return the label of each image and its quality, for class probabilities (W, S, R, C) of models that did not vote.

    Annotators count by how often they agree with the others and with the mean of the models. The label is the likeliest
    of the classes that at least LEAST_ANSWERS annotators chose. Where no class has as many, it is the majority, of
    unknown quality unless a single annotator answered; a tie there has no label, and neither has an image for which
    nobody chose a class. Where no image has two answers, each has the one that was given, of unknown quality. Raises
    RunFileError without the package cleanlab.
    """
    expect_cleanlab()
    from cleanlab.multiannotator import get_label_quality_multiannotator

    _, scenarios, images, classes = probabilities.shape
    answers = np.full((scenarios * images, len(votes.annotators)), np.nan)
    named = votes.answer != NONE_OF_THE_ABOVE
    row = votes.scenario * images + votes.image
    answers[row[named], votes.annotator[named]] = votes.answer[named]
    answered, given = ~np.isnan(answers), tally(votes, (scenarios, images), classes)
    if answered.sum(axis=1).max(initial=0) < 2:  # nobody agrees or disagrees with anybody
        return Consensus(majority(given), np.zeros((scenarios, images)), given.max(axis=2))
    voted, used = answered.any(axis=1), answered.any(axis=0)  # images and annotators with an answer
    # A tie of votes and probabilities would be broken by numpy's global generator: let no two classes be equal.
    apart = np.float64(probabilities.mean(axis=0).reshape(-1, classes)[voted]) + 1e-6 / np.arange(
        1, classes + 1
    )
    asked = answers[np.ix_(voted, used)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on few votes, which the intervals of the report state
        found = get_label_quality_multiannotator(
            asked, apart / apart.sum(axis=1, keepdims=True), verbose=False, return_annotator_stats=False
        )["detailed_label_quality"].to_numpy()  # of each answer
    image, annotator = np.nonzero(~np.isnan(asked))
    likely = np.zeros((len(asked), classes))
    likely[image, asked[image, annotator].astype(np.int64)] = found[image, annotator]
    labels: I64 = np.full(len(answers), NONE_OF_THE_ABOVE, np.int64)
    quality, counts = np.zeros(len(answers)), given.reshape(-1, classes)
    labels[voted], quality[voted] = _likeliest(likely, counts[voted])
    chosen, shape = (answers == labels[:, None]).sum(axis=1), (scenarios, images)
    return Consensus(labels.reshape(shape), quality.reshape(shape), chosen.reshape(shape))


def _likeliest(likely: F64, counts: I64) -> tuple[I64, F64]:
    """Return the labels, (N,), and their quality, (N,): the likeliest class of those that enough annotators chose.

    `likely` (N, C) says how likely each class is, `counts` (N, C) how many annotators chose it. Where no class has
    enough of them the label is the majority, of unknown quality.
    """
    enough = counts >= np.minimum(LEAST_ANSWERS, counts.sum(axis=1, keepdims=True))
    best = np.where(enough, likely, -1.0).argmax(axis=1)
    known = enough.any(axis=1)
    return np.where(known, best, majority(counts)), np.where(known, likely[np.arange(len(best)), best], 0.0)


def count_not_majority(labels: I64, votes: Votes, classes: int) -> int:
    """Return how many images have a label, of (S, R), that is not the majority of their votes, or that breaks a tie."""
    by_majority = majority(tally(votes, (labels.shape[0], labels.shape[1]), classes))
    return int(((labels != NONE_OF_THE_ABOVE) & (labels != by_majority)).sum())


def is_misclassified(predicted: I64, labels: I64) -> Bool:
    """Return whether each answer differs from its label, in their shape; False where the label is missing."""
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


def scenario_name(label: str, mistaken_for: str, number: int) -> str:
    """Return `8 read as 3 (scenario 12)`; `8 misread` where it is mistaken for its label, as no answer was wrong."""
    confusion = "misread" if mistaken_for == label else f"read as {mistaken_for}"
    return f"{label} {confusion} (scenario {number})"


def most_common(labels: I64) -> int | None:
    """Return the most common of (R,) labels, the lowest of equals; None where no image has one."""
    known = labels[labels != NONE_OF_THE_ABOVE]
    return int(np.bincount(known).argmax()) if len(known) else None


@dataclass(frozen=True, eq=False)
class Units:
    """What pictures of components with vae.decode: anchored show: images of the training set, or tracks of them.

    Pictures of one unit succeed or fail together, so that they are one piece of evidence.
    """

    failing: F64  # (S,) sum over the units of the share of their labelled pictures that is misclassified
    total: I64  # (S,) units with a labelled picture
    name: str  # of a unit: "photograph" or "track"


def outcomes(predicted: I64, labels: I64) -> I64:
    """Return 1 for each misclassified image, 0 for one that is right, -1 for one without a label, in their shape."""
    return np.where(labels == NONE_OF_THE_ABOVE, -1, labels != predicted).astype(np.int64)


def count_units(gallery: Gallery, labels: I64, more: MoreImages | None) -> Units | None:
    """Return the units of the images with `labels` (S, R), and of `more`; None where images are decoded plainly."""
    if gallery.unit is None:
        return None
    unit, outcome = gallery.unit, outcomes(gallery.predicted, labels)
    if more is not None and more.unit is not None and more.outcome is not None:
        unit = np.concatenate([unit, more.unit], axis=1)
        outcome = np.concatenate([outcome, more.outcome], axis=1)
    failing, total = np.zeros(len(unit)), np.zeros(len(unit), np.int64)
    for component, known in enumerate(outcome >= 0):
        names, row = np.unique(unit[component, known], return_inverse=True)
        hits, of = np.bincount(row, outcome[component, known], len(names)), np.bincount(row)
        failing[component], total[component] = (hits / of).sum(), len(names)
    return Units(failing, total, "photograph" if gallery.track is None else "track")


def share_misclassified(share: float, labelled: int, of: str = "") -> str:
    """Return in words how much of a component's labelled images is misclassified; `of` names their photographs."""
    verb = "is" if labelled == 1 else "are"
    return f"{percent(share, 0)} of {count_of(labelled, 'labelled image')}{of} {verb} misclassified"


@dataclass(frozen=True, eq=False)
class Shares:
    """The share of each component's labelled images that is misclassified, and what it is compared with."""

    misclassified: F64  # (S,)
    labelled: I64  # (S,)
    more: I64  # (S,) of the labelled images, those drawn because the verdict was in doubt
    rho: float
    rate: float | None  # of false discoveries; None where the share itself decides
    units: Units | None

    def found(self, component: int) -> str:
        """Return what was found on one component."""
        share = float(self.misclassified[component])
        count, more = int(self.labelled[component]), int(self.more[component])
        in_doubt = f" ({more:,} of them drawn in doubt)" if more else ""
        if self.units is None:
            return share_misclassified(share, count, in_doubt)
        total = int(self.units.total[component])
        mean = float(self.units.failing[component]) / total
        text = share_misclassified(share, count, f"{in_doubt} of {count_of(total, self.units.name)}")
        if abs(mean - share) < ROUNDING:
            return text
        return f"{text}, {percent(mean, 0)} on average over the {self.units.name}s"

    def why_not(self, component: int) -> str:
        """Return the requirement that one component does not meet."""
        over = f"over {percent(self.rho, 0)}"
        if self.rate is None:
            return f"not {over}"
        needed = fewest_units(self.rho, self.rate)
        if self.units is None or self.units.total[component] >= needed:
            return f"not significantly {over}"
        return f"not significantly {over}, for which at least {needed} {self.units.name}s are needed"


def _labels_and_reasons(
    is_high: Bool, voted: I64, reviewed: Bool, shares: Shares, classes: tuple[str, ...]
) -> tuple[I64, list[str]]:
    """Return the label of each component, (S,), NONE_OF_THE_ABOVE for a rejected one, and the reasons.

    `is_high` (S,) says which shares are high enough, `voted` (S,) has the majority's labels, NONE_OF_THE_ABOVE for a
    tie, and `reviewed` (S,) says which components have a reviewed image with a label.
    """
    labels, reasons = np.full(len(voted), NONE_OF_THE_ABOVE, np.int64), []
    for component, label in enumerate(voted):
        if shares.labelled[component] == 0:
            reasons.append("rejected: no image has a label")
        elif not is_high[component]:
            reasons.append(f"rejected: {shares.found(component)}, {shares.why_not(component)}")
        elif label == NONE_OF_THE_ABOVE:
            why = "labels are tied" if reviewed[component] else "no reviewed image has a label"
            reasons.append(f"rejected: {shares.found(component)}, but {why}")
        else:
            labels[component] = label
            name = before_punctuation(classes[label])
            reasons.append(f"accepted as {name}: {shares.found(component)}")
    return labels, reasons


def decide_verdicts(
    review: ReviewSection,
    gallery: Gallery,
    votes: Votes,
    overrides: Sequence[Override] = (),
    *,
    consensus: Consensus | None = None,
    more: MoreImages | None = None,
) -> Verdicts:
    """Return the verdict on every component, by the section's rule.

    An image's label is the majority over its annotators, a tie gives none. A component is a failure scenario if more
    than rho of its labelled images are misclassified; its label is the majority over its images' labels, and a tie
    there accepts nothing. Agreement is the share of an image's votes, none-of-the-above left out, for its majority
    label, or for one label of a tie (§4.4). The newest override of a component, if any, replaces the vote.

    With accept: lower-bound the share has to be significantly more than rho, at its false discovery rate over all
    components, and counts the images of `more` as well. With vae.decode: anchored it is then the mean of the shares of
    the units (`count_units`). The labels of `consensus` replace the majority over annotators.
    """
    rho, rate = review.rho, review.false_discovery_rate
    scenarios, per_scenario = gallery.predicted.shape
    counts = tally(votes, (scenarios, per_scenario), len(gallery.classes))
    image_labels = majority(counts) if consensus is None else consensus.labels
    labelled = image_labels != NONE_OF_THE_ABOVE
    wrong, total = is_misclassified(gallery.predicted, image_labels).sum(axis=1), labelled.sum(axis=1)
    if more is not None:
        wrong, total = wrong + more.misclassified, total + more.labelled
    with np.errstate(invalid="ignore", divide="ignore"):
        misclassified = wrong / total
    units = count_units(gallery, image_labels, more)
    tested: tuple[I64 | F64, I64] = (wrong, total) if units is None else (units.failing, units.total)
    is_high = misclassified > rho if rate is None else significantly_over(*tested, rho, rate)
    drawn = np.zeros_like(total) if more is None else more.labelled
    shares = Shares(misclassified, total, drawn, rho, rate, units)
    # the label that most images of each component have
    voted = majority((image_labels[..., None] == np.arange(len(gallery.classes))).sum(axis=1))
    labels, reasons = _labels_and_reasons(is_high, voted, labelled.any(axis=1), shares, gallery.classes)
    overridden = np.isin(np.arange(scenarios), [override.scenario for override in overrides])
    by_vote = (labels != NONE_OF_THE_ABOVE) & ~overridden
    false = probability_not_over(*tested, rho)[by_vote]
    _apply(overrides, labels, reasons, gallery.classes)
    leading = np.where(labels == NONE_OF_THE_ABOVE, voted, labels)
    asked = votes.answered(gallery.predicted.shape).sum(axis=1)
    return Verdicts(
        labels=labels,
        misclassified=misclassified,
        purity=(labelled & (image_labels == leading[:, None])).sum(axis=1) / np.where(asked, asked, np.nan),
        image_labels=image_labels,
        agreement=_agreement(counts),
        ties=int((~labelled & (counts.sum(axis=-1) > 0)).sum()),
        no_class_chosen=int((counts.sum(axis=-1) == 0).sum()),
        reasons=tuple(reasons),
        overrides=tuple(overrides),
        labelled=total,
        false_share=float(false.mean()) if len(false) else 0.0,
        units=None if units is None else units.total,
        failing_units=None if units is None else units.failing,
    )


def tested_counts(verdicts: Verdicts) -> tuple[I64 | F64, I64]:
    """Return how many units of each component fail, and how many there are, (S,) each; plainly decoded, of images."""
    if verdicts.units is not None and verdicts.failing_units is not None:
        return verdicts.failing_units, verdicts.units
    total = verdicts.labelled
    return np.rint(np.nan_to_num(verdicts.misclassified) * total).astype(np.int64), total


def doubtful(verdicts: Verdicts, rho: float) -> Bool:
    """Return which components are rejected although their true share may be more than rho, (S,)."""
    high = wilson(*tested_counts(verdicts), 0.9)[1]
    unsure: Bool = (verdicts.labels == NONE_OF_THE_ABOVE) & (high > rho)
    return unsure


def _agreement(counts: I64) -> F64:
    """Return the share of each image's votes for the class that most chose, or for one of several in a tie, (S, R).

    nan for an image with a single vote, which agrees with nothing but itself, and for one without votes.
    """
    votes = counts.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares: F64 = counts.max(axis=-1) / votes
    return np.where(votes > 1, shares, np.nan)


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


def _apply(overrides: Sequence[Override], labels: I64, reasons: list[str], classes: tuple[str, ...]) -> None:
    """Replace, in place, the labels, (S,), and reasons of overridden components."""
    for override in overrides:
        label = override.label
        labels[override.scenario] = NONE_OF_THE_ABOVE if label is None else label
        decision = "rejected" if label is None else f"accepted as {classes[label]}"
        reasons[override.scenario] = f"{decision} by {override.author}: {override.reason}"
