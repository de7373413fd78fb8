"""CROWDLAB (arXiv 2210.06812, by cleanlab): an image's label from its votes and a model's probabilities."""

from __future__ import annotations

import warnings

import numpy as np

from defuse_core.artifacts import F32, I64, NONE_OF_THE_ABOVE, Votes
from defuse_core.errors import RunFileError


def crowdlab_labels(votes: Votes, probabilities: F32) -> I64:
    """Return the label of each image, (S, R), for class probabilities (S, R, C) of a model that did not vote.

    Annotators count by how often they agree with the others and with the model. An image for which nobody chose a
    class has no label. Raises RunFileError without the package cleanlab.
    """
    try:
        from cleanlab.multiannotator import get_label_quality_multiannotator
    except ImportError as error:
        raise RunFileError(
            "review.consensus: crowdlab needs the package cleanlab; pip install 'defuse[crowdlab]'"
        ) from error
    scenarios, images, classes = probabilities.shape
    answers = np.full((scenarios * images, len(votes.annotators)), np.nan)
    named = votes.answer != NONE_OF_THE_ABOVE
    row = votes.scenario * images + votes.image
    answers[row[named], votes.annotator[named]] = votes.answer[named]
    labels: I64 = np.full(len(answers), NONE_OF_THE_ABOVE, np.int64)
    voted = ~np.isnan(answers).all(axis=1)
    used = ~np.isnan(answers).all(axis=0)  # annotators with an answer
    if voted.any():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on few votes, which the intervals of the report state
            found = get_label_quality_multiannotator(
                answers[np.ix_(voted, used)],
                probabilities.reshape(-1, classes)[voted],
                verbose=False,
                return_detailed_quality=False,
                return_annotator_stats=False,
            )
        labels[voted] = found["label_quality"]["consensus_label"].to_numpy().astype(np.int64)
    return labels.reshape(scenarios, images)
