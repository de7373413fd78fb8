"""From annotations to answers.

The server checks nothing, so each annotation is, and what is refused is listed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from services.labeling.client import Annotation, Task
from services.labeling.config import LABEL, answers_by_name
from services.labeling.tasks import Place, Samples

UNKNOWN_PERSON = 0  # whose account was deleted


@dataclass(frozen=True, slots=True)
class Answer:
    """One person's answer to one task: a label per image of it."""

    person: int  # user id
    labels: tuple[tuple[int, int], ...]  # (image, class or none-of-the-above) pairs
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
    """All that people answered so far."""

    answers: dict[str, list[Answer]] = field(default_factory=dict)  # per sample key, oldest first
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
    given: dict[str, list[tuple[Annotation, Answer | str]]] = defaultdict(list)
    reader = Reader(samples)
    for task in tasks:
        if task.key not in samples.places:
            continue
        place = samples.places[task.key]
        submitted = [annotation for annotation in task.annotations if not annotation.cancelled]
        pulled.skips += len(task.annotations) - len(submitted)
        slot = Slot(task.id, task.overlap, task.labeled, len(submitted))
        pulled.slots.setdefault(task.key, []).append(slot)
        given[task.key] += [(replace(one, result=None), reader.read(place, one)) for one in submitted]
    while given:
        key, read = given.popitem()
        pulled.answers[key] = _choose(pulled, samples, key, read)
    pulled.refused.sort(key=lambda refusal: (refusal.place.key, refusal.annotation))
    return pulled


def _choose(
    pulled: Pulled, samples: Samples, key: str, read: list[tuple[Annotation, Answer | str]]
) -> list[Answer]:
    """Return the answers that count, and add the others to pulled.refused."""
    wanted, place = samples.review.answers_per_task, samples.places[key]

    def refuse(annotation: Annotation, why: str) -> None:
        pulled.refused.append(Refusal(place, annotation.person or UNKNOWN_PERSON, annotation.id, why))

    newest: dict[int, tuple[Annotation, Answer]] = {}
    for annotation, answer in sorted(read, key=lambda pair: (pair[0].updated, pair[0].id)):
        if isinstance(answer, str):
            refuse(annotation, answer)
            continue
        if answer.person in newest:
            refuse(newest[answer.person][0], "the same person answered again later")
        newest[answer.person] = (annotation, answer)
    ranked = sorted(newest.values(), key=lambda pair: (pair[0].created, pair[0].id))
    for annotation, _ in ranked[wanted:]:
        refuse(annotation, f"{wanted} others had answered before, as many as were asked for")
    return [answer for _, answer in ranked[:wanted]]


class Reader:
    """Reads annotations under the labelling interface that was pushed."""

    def __init__(self, samples: Samples) -> None:
        self.images = samples.gallery.predicted.shape[1]
        self.meanings = answers_by_name(samples.gallery.classes)

    def read(self, place: Place, annotation: Annotation) -> Answer | str:
        """Return the answer, or why there is none."""
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
        person = annotation.person or UNKNOWN_PERSON
        return Answer(person, tuple(chosen), annotation.created, annotation.updated)

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
