"""From annotations to answers.

The server checks nothing, so each annotation is, and what is refused is listed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from services.labeling.client import Annotation, Task
from services.labeling.config import LABEL, answers_by_name
from services.labeling.tasks import Place, Samples

UNKNOWN_PERSON = 0  # whose account was deleted
Labels: TypeAlias = tuple[tuple[int, int], ...]  # (image, class or none-of-the-above) pairs


@dataclass(frozen=True, slots=True)
class Answer:
    """One person's answer to one task: a label per image of it."""

    annotation: int
    person: int  # user id
    labels: Labels
    created: float
    when: float  # seconds since 1970; the last change


@dataclass(frozen=True)
class Refusal:
    """An annotation that is not counted, and why."""

    place: Place
    person: int
    annotation: int
    why: str


@dataclass(frozen=True, slots=True)
class Slot:
    """A task as Label Studio hands it out."""

    task: int
    overlap: int
    labeled: bool  # out of the queue
    submitted: int  # annotations, skips left out


@dataclass
class Pulled:
    """All that people answered so far. Some 200 bytes an answer: the pictures weigh more."""

    answers: dict[str, list[Answer]]  # per sample key, oldest first
    refused: list[Refusal] = field(default_factory=list)
    skips: int = 0
    slots: dict[str, list[Slot]] = field(
        default_factory=dict
    )  # more than one only where a copy has answers, too

    def people(self) -> list[int]:
        """Return who answered or was refused, by the time of their first counted answer."""
        first: dict[int, float] = {}
        for answer in (answer for answers in self.answers.values() for answer in answers):
            first[answer.person] = min(answer.created, first.get(answer.person, answer.created))
        others = sorted({refusal.person for refusal in self.refused} - set(first))
        return sorted(first, key=lambda person: (first[person], person)) + others


def pull(tasks: Iterable[Task], samples: Samples) -> Pulled:
    """Return the answers: per task the newest of each person, of the first answers_per_task people."""
    pulled = Pulled(answers={key: [] for key in samples.places})
    reader = Reader(samples)
    for task in tasks:
        if task.key not in samples.places:
            continue
        submitted = [annotation for annotation in task.annotations if not annotation.cancelled]
        pulled.skips += len(task.annotations) - len(submitted)
        slot = Slot(task.id, task.overlap, task.labeled, len(submitted))
        pulled.slots.setdefault(task.key, []).append(slot)
        _read(pulled, reader, samples.places[task.key], submitted)
    for key, place in samples.places.items():
        pulled.answers[key] = _choose(pulled, place, samples.review.answers_per_task)
    pulled.refused.sort(key=lambda refusal: (refusal.place.key, refusal.annotation))
    return pulled


def _read(pulled: Pulled, reader: Reader, place: Place, annotations: Iterable[Annotation]) -> None:
    """Add the annotations to the answers, or to those refused."""
    for annotation in annotations:
        person = annotation.person or UNKNOWN_PERSON
        labels = reader.read(place, annotation)
        if isinstance(labels, str):
            pulled.refused.append(Refusal(place, person, annotation.id, labels))
            continue
        answer = Answer(annotation.id, person, labels, annotation.created, annotation.updated)
        pulled.answers[place.key].append(answer)


def _choose(pulled: Pulled, place: Place, wanted: int) -> list[Answer]:
    """Return the answers to the task that count, and add the others to pulled.refused."""

    def refuse(answer: Answer, why: str) -> None:
        pulled.refused.append(Refusal(place, answer.person, answer.annotation, why))

    newest: dict[int, Answer] = {}
    for answer in sorted(pulled.answers[place.key], key=lambda one: (one.when, one.annotation)):
        if answer.person in newest:
            refuse(newest[answer.person], "the same person answered again later")
        newest[answer.person] = answer
    ranked = sorted(newest.values(), key=lambda one: (one.created, one.annotation))
    for answer in ranked[wanted:]:
        refuse(answer, f"{wanted} others had answered before, as many as were asked for")
    return ranked[:wanted]


class Reader:
    """Reads annotations under the labelling interface that was pushed."""

    def __init__(self, samples: Samples) -> None:
        self.images = samples.gallery.predicted.shape[1]
        self.meanings = answers_by_name(samples.gallery.classes)
        self._known: dict[Labels, Labels] = {}  # one copy of each, since most answers are alike

    def read(self, place: Place, annotation: Annotation) -> Labels | str:
        """Return the (image, class) pairs, or why there are none."""
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
            chosen = [(place.image, labels[LABEL])]
        else:
            chosen = [(image, labels.get(f"{LABEL}_{image}", labels[LABEL])) for image in range(self.images)]
        return self._known.setdefault(tuple(chosen), tuple(chosen))

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
        if choices[0] not in self.meanings:
            return name, f"the choice {str(choices[0])!r:.60} is not one of the classes"
        return name, self.meanings[choices[0]]
