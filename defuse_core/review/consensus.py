"""The rule of section `review`: the label of each image by its votes, and the verdicts that follow.

The label is the majority of the votes, or CROWDLAB's, from the votes and from models that did not vote.
"""

from __future__ import annotations

import importlib.util
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
from defuse_core.errors import RunFileError
from defuse_core.review.verdicts import decide_verdicts, majority, tally

LEAST_ANSWERS = 2  # for a label that CROWDLAB chooses, so that the models and a single person never decide


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


def review_consensus(review: ReviewSection, votes: Votes, probabilities: F32 | None) -> Consensus | None:
    """Return CROWDLAB's consensus; None where the section asks for the majority, or without probabilities.

    `probabilities` (W, S, R, C) are those of the run's reference models.
    """
    if review.consensus != "crowdlab" or probabilities is None:
        return None
    return crowdlab_consensus(votes, probabilities.mean(axis=0))


def review_verdicts(
    review: ReviewSection,
    gallery: Gallery,
    votes: Votes,
    overrides: Sequence[Override] = (),
    *,
    consensus: Consensus | None = None,
    more: MoreImages | None = None,
) -> Verdicts:
    """Return the verdicts by the section's rule; without a `consensus` an image's label is the majority."""
    return decide_verdicts(
        gallery,
        votes,
        review.rho,
        overrides,
        max_false=review.false_discovery_rate,
        more=more,
        image_labels=None if consensus is None else consensus.labels,
    )


def stops_when_sure(review: ReviewSection) -> bool:
    """Return whether people are not asked about an image any more once CROWDLAB is sure of its label."""
    return review.stop_early and review.consensus == "crowdlab"


def expect_cleanlab() -> None:
    """Raise RunFileError without the package cleanlab."""
    if importlib.util.find_spec("cleanlab") is None:
        raise RunFileError(
            "review.consensus: crowdlab needs the package cleanlab; pip install 'defuse[crowdlab]'"
        )


def crowdlab_consensus(votes: Votes, probabilities: F32) -> Consensus:
    """Return the label of each image and its quality, for class probabilities (S, R, C) of a model that did not vote.

    Annotators count by how often they agree with the others and with the model. The label is the likeliest of the
    classes that at least LEAST_ANSWERS annotators chose. Where no class has as many, it is the majority, of unknown
    quality unless a single annotator answered; a tie there has no label, and neither has an image for which nobody
    chose a class. Where no image has two answers, each has the one that was given, of unknown quality. Raises
    RunFileError without the package cleanlab.
    """
    expect_cleanlab()
    from cleanlab.multiannotator import get_label_quality_multiannotator

    scenarios, images, classes = probabilities.shape
    answers = np.full((scenarios * images, len(votes.annotators)), np.nan)
    named = votes.answer != NONE_OF_THE_ABOVE
    row = votes.scenario * images + votes.image
    answers[row[named], votes.annotator[named]] = votes.answer[named]
    answered, given = ~np.isnan(answers), tally(votes, (scenarios, images), classes)
    if answered.sum(axis=1).max(initial=0) < 2:  # nobody agrees or disagrees with anybody
        return Consensus(majority(given), np.zeros((scenarios, images)), given.max(axis=2))
    voted, used = answered.any(axis=1), answered.any(axis=0)  # images and annotators with an answer
    # A tie of votes and probabilities would be broken by numpy's global generator: let no two classes be equal.
    apart = np.float64(probabilities.reshape(-1, classes)[voted]) + 1e-6 / np.arange(1, classes + 1)
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
