"""CROWDLAB: the label of each image by its votes and by models that did not vote, and how sure it is."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass

import numpy as np

from defuse_core.artifacts import F32, F64, I64, NONE_OF_THE_ABOVE, Bool, Votes
from defuse_core.config import ReviewSection
from defuse_core.errors import RunFileError
from defuse_core.review.verdicts import majority, tally

LEAST_ANSWERS = 2  # for the label, so that the models and a single person never decide


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
    if importlib.util.find_spec("cleanlab") is None:
        raise RunFileError(
            "review.consensus: crowdlab needs the package cleanlab; pip install 'defuse[crowdlab]'"
        )


def crowdlab_consensus(votes: Votes, probabilities: F32) -> Consensus:
    """Return the label of each image and its quality, for class probabilities (S, R, C) of a model that did not vote.

    Annotators count by how often they agree with the others and with the model. An image for which nobody chose a
    class has no label. Where no image has two answers, each has the one that was given, of unknown quality. Raises
    RunFileError without the package cleanlab.
    """
    expect_cleanlab()
    from cleanlab.multiannotator import get_label_quality_multiannotator

    scenarios, images, classes = probabilities.shape
    answers = np.full((scenarios * images, len(votes.annotators)), np.nan)
    named = votes.answer != NONE_OF_THE_ABOVE
    row = votes.scenario * images + votes.image
    answers[row[named], votes.annotator[named]] = votes.answer[named]
    answered = ~np.isnan(answers)
    if answered.sum(axis=1).max(initial=0) < 2:  # nobody agrees or disagrees with anybody
        given = tally(votes, (scenarios, images), classes)
        return Consensus(majority(given), np.zeros((scenarios, images)), given.max(axis=2))
    voted, used = answered.any(axis=1), answered.any(axis=0)  # images and annotators with an answer
    # A tie of votes and probabilities would be broken by numpy's global generator: let no two classes be equal.
    apart = np.float64(probabilities.reshape(-1, classes)[voted]) + 1e-6 / np.arange(1, classes + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on few votes, which the intervals of the report state
        found = get_label_quality_multiannotator(
            answers[np.ix_(voted, used)],
            apart / apart.sum(axis=1, keepdims=True),
            verbose=False,
            return_detailed_quality=False,
            return_annotator_stats=False,
        )["label_quality"]
    labels: I64 = np.full(len(answers), NONE_OF_THE_ABOVE, np.int64)
    labels[voted] = found["consensus_label"].to_numpy().astype(np.int64)
    quality = np.zeros(len(answers))
    quality[voted] = found["consensus_quality_score"].to_numpy()
    chosen, shape = (answers == labels[:, None]).sum(axis=1), (scenarios, images)
    return Consensus(labels.reshape(shape), quality.reshape(shape), chosen.reshape(shape))
