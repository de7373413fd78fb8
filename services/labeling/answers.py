"""From annotations to answers.

The server checks nothing, so each annotation is, and what is refused is listed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from defuse_core.artifacts import I64
from services.labeling.client import Annotation, Task
from services.labeling.config import LABEL, answers_by_name
from services.labeling.tasks import Place, Samples

# One person's answer to one task. `task` is its number in Samples, `labels` points into Pulled.labels; times are
# seconds since 1970, `when` that of the last change.
ANSWER = np.dtype(
    [
        ("task", "i4"),
        ("labels", "i4"),
        ("annotation", "i8"),
        ("person", "i8"),
        ("created", "f8"),
        ("when", "f8"),
    ]
)
Answers: TypeAlias = NDArray[np.void]  # of ANSWER
Labels: TypeAlias = tuple[int, ...]  # a class or none-of-the-above for each image of a task


@dataclass(frozen=True, slots=True)
class Refusal:
    """An annotation that is not counted, and why."""

    place: Place
    person: int
    annotation: int
    why: str


@dataclass(frozen=True, slots=True)
class Slot:
    """A task as Label Studio hands it out."""

    number: int  # in Samples; twice where a late import left a copy
    task: int
    overlap: int
    labeled: bool  # out of the queue
    submitted: int  # annotations, skips left out


@dataclass(frozen=True, eq=False)
class Pulled:
    """All that people answered so far, in 40 bytes an answer."""

    answers: Answers  # those that count, by task and then by the time that they were first given
    labels: list[Labels]
    refused: list[Refusal]
    skips: int
    slots: list[Slot]

    def people(self) -> list[int]:
        """Return who answered or was refused, by the time of their first counted answer."""
        order = np.lexsort((self.answers["person"], self.answers["created"]))
        first = dict.fromkeys(self.answers["person"][order].tolist())
        others = sorted({refusal.person for refusal in self.refused} - set(first))
        return [*first, *others]


def pull(tasks: Iterable[Task], samples: Samples) -> Pulled:
    """Return the answers: per task the newest of each person, of the first answers_per_task people."""
    reader = Reader(samples)
    table = np.fromiter(reader.read(tasks), ANSWER)
    wanted = samples.review.answers_per_task
    counted, replaced, surplus = choose(table, wanted)
    reader.refuse(table[replaced], "the same person answered again later")
    reader.refuse(table[surplus], f"{wanted} others had answered before, as many as were asked for")
    reader.refused.sort(key=lambda refusal: (refusal.place.key, refusal.annotation))
    return Pulled(table[counted], list(reader.labels), reader.refused, reader.skips, reader.slots)


def choose(table: Answers, wanted: int) -> tuple[I64, I64, I64]:
    """Return the rows that count, those that their person replaced, and those beyond the `wanted` first people.

    First is who gave a first answer first, whatever they changed later. The rows that count are in that order
    within each task.
    """
    rows = np.lexsort([table[name] for name in ("annotation", "when", "person", "task")])
    newest = np.ones(len(rows), bool)  # of its person, for its task
    newest[:-1] = (np.diff(table["task"][rows]) != 0) | (np.diff(table["person"][rows]) != 0)
    replaced, kept = rows[~newest], rows[newest]
    since = np.minimum.reduceat(table["created"][rows], np.flatnonzero(np.roll(newest, 1)))
    kept = kept[np.lexsort((table["annotation"][kept], since, table["task"][kept]))]
    task = table["task"][kept]
    rank = np.arange(len(kept)) - np.searchsorted(task, task)
    return kept[rank < wanted], replaced, kept[rank >= wanted]


class Reader:
    """Reads annotations under the labelling interface that was pushed, and notes what it cannot read."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        self.images = samples.gallery.predicted.shape[1]
        self.meanings = answers_by_name(samples.gallery.classes)
        self.labels: dict[Labels, int] = {}  # each once, since most answers are alike
        self.refused: list[Refusal] = []
        self.slots: list[Slot] = []
        self.skips = 0

    def read(self, tasks: Iterable[Task]) -> Iterator[tuple[Any, ...]]:
        """Return a row of ANSWER for each annotation that answers a task of the run."""
        for task in tasks:
            number = self.samples.number(task.key)
            if number is None:
                continue
            submitted = [annotation for annotation in task.annotations if not annotation.cancelled]
            self.skips += len(task.annotations) - len(submitted)
            self.slots.append(Slot(number, task.id, task.overlap, task.labeled, len(submitted)))
            yield from self._rows(number, submitted)

    def refuse(self, answers: Answers, why: str) -> None:
        for answer in answers:
            place = self.samples.place(int(answer["task"]))
            self.refused.append(Refusal(place, int(answer["person"]), int(answer["annotation"]), why))

    def _rows(self, number: int, annotations: Iterable[Annotation]) -> Iterator[tuple[Any, ...]]:
        place = self.samples.place(number)
        for annotation in annotations:
            person = annotation.person or -annotation.id  # of a deleted account, which may be anybody's
            labels = self._labels(place, annotation)
            if isinstance(labels, str):
                self.refused.append(Refusal(place, person, annotation.id, labels))
                continue
            known = self.labels.setdefault(labels, len(self.labels))
            yield number, known, annotation.id, person, annotation.created, annotation.updated

    def _labels(self, place: Place, annotation: Annotation) -> Labels | str:
        """Return a label per image of the task, or why there are none."""
        labels: dict[str, int] = {}
        results = annotation.result if isinstance(annotation.result, list) else []
        for result in results:
            name, label = self._one(place, result)
            if isinstance(label, str):
                return label
            if name in labels:
                return f"two answers for {name}"
            labels[name] = label
        if LABEL not in labels:
            return "no label was chosen"
        if place.image is not None:
            return (labels[LABEL],)
        return tuple(labels.get(f"{LABEL}_{image}", labels[LABEL]) for image in range(self.images))

    def _one(self, place: Place, result: Any) -> tuple[str, int | str]:
        """Return the control and what it says, or why it says nothing."""
        if not isinstance(result, dict) or not isinstance(result.get("value"), dict):
            return "", "not an answer of this interface"
        name, choices = str(result.get("from_name")), result["value"].get("choices")
        allowed = (
            [LABEL]
            if place.image is not None
            else [LABEL, *(f"{LABEL}_{image}" for image in range(self.images))]
        )
        if name not in allowed:
            return name, f"an answer for {name!r:.40}, which was not asked"
        if not isinstance(choices, list) or len(choices) != 1:
            return name, f"{len(choices) if isinstance(choices, list) else 'no'} choices for {name}, not one"
        if not isinstance(choices[0], str) or choices[0] not in self.meanings:
            return name, f"the choice {str(choices[0])!r:.60} is not one of the classes"
        return name, self.meanings[choices[0]]
