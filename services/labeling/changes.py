"""How people's answers changed in Label Studio after the votes of a review were stored."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from defuse_core.artifacts import Votes
from services.labeling.tasks import ReviewTasks

Answers = tuple[tuple[int, int], ...]  # of one annotator to one task: images by row, and classes


@dataclass(frozen=True)
class AnswerChanges:
    """How many answers were added, changed and deleted after the votes were stored."""

    added: int = 0
    changed: int = 0
    deleted: int = 0

    def __str__(self) -> str:
        counts = {"given": self.added, "changed": self.changed, "deleted": self.deleted}
        return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def answer_changes(tasks: ReviewTasks, before: Votes, now: Votes) -> AnswerChanges:
    """Return how the answers of `now` differ from those of `before`, by task and annotator.

    With review.real_names an account that was renamed or deleted since then has another name: equal answers to a task
    under a name that was not there before and under one that is not there any more are then the same ones.
    """
    old, new = _by_task(tasks, before), _by_task(tasks, now)
    changed = sum(new[key] != answers for key, answers in old.items() if key in new)
    added = Counter(new[key] for key in new.keys() - old.keys())
    deleted = Counter(old[key] for key in old.keys() - new.keys())
    if tasks.review.real_names:
        added, deleted = added - deleted, deleted - added
    return AnswerChanges(added.total(), changed, deleted.total())


def _by_task(tasks: ReviewTasks, votes: Votes) -> dict[tuple[int, str], Answers]:
    """Return the answers by task and annotator's name."""
    images = tasks.gallery.predicted.shape[1]
    position = votes.scenario * images + votes.image
    found: dict[tuple[int, str], list[tuple[int, int]]] = {}
    columns = (position.tolist(), votes.annotator.tolist(), votes.answer.tolist())
    for row, annotator, answer in zip(*columns, strict=True):
        task = row // (images // tasks.per_scenario)
        found.setdefault((task, votes.annotators[annotator]), []).append((row, answer))
    return {key: tuple(sorted(answers)) for key, answers in found.items()}
