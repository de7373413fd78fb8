"""Reviews of `digits_gallery`: the right answers, and the answers that were given."""

from __future__ import annotations

from defuse_core.artifacts import Votes
from services.labeling.tasks import TaskSubject

TRUTH = (8, 3, 0, 1)  # of the scenarios


def truth_of(subject: TaskSubject) -> str:
    """Return the name of the right choice."""
    return str(TRUTH[subject.scenario])


def answers_of(votes: Votes, scenario: int, image: int) -> dict[str, int]:
    """Return each annotator's answer to one image."""
    rows = (votes.scenario == scenario) & (votes.image == image)
    names = (votes.annotators[annotator] for annotator in votes.annotator[rows])
    return dict(zip(names, votes.answer[rows].tolist(), strict=True))
