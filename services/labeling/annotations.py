"""From Label Studio's annotations to the answers that count.

The server validates nothing, so each annotation is validated here; those that do not count are listed with the reason.
It also forgets who gave an annotation when that account is deleted, so the authors are stored in the run at each pull.
People can still answer once the votes are stored: `answer_changes` counts what they gave, changed and deleted since.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from defuse_core.artifacts import I64, Votes
from defuse_core.errors import InputError
from defuse_core.formatting import count_of
from defuse_core.store import Store
from services.labeling.records import RESULT_ROW, Annotation, Task
from services.labeling.tasks import LABEL, ReviewTasks, TaskSubject, answers_by_name

if TYPE_CHECKING:
    from services.labeling.client import LabelStudioClient

log = logging.getLogger("defuse")

AUTHORS_KEY = "annotation_authors.json"  # key in the run's store: user id -> ids of annotations
PSEUDONYMS = "pseudonyms"  # note of votes under real names: the annotators' pseudonyms, in the same order
UNKNOWN = 0  # the user id of annotators whose account was deleted before their answers were first pulled

# One annotator's answer to one task. `task` is its index in ReviewTasks, `labels_row` is an index into
# PulledAnnotations.labels; times are seconds since 1970, `when` that of the last change.
ANSWER_DTYPE = np.dtype(
    [
        ("task", "i4"),
        ("labels_row", "i4"),
        ("annotation", "i8"),
        ("annotator", "i8"),
        ("created", "f8"),
        ("when", "f8"),
    ]
)
AnswerTable: TypeAlias = NDArray[np.void]  # of ANSWER_DTYPE
Authors: TypeAlias = dict[int, int]  # annotation id -> user id
BY_USER = TypeAdapter(dict[int, list[int]])  # user id -> ids of annotations, as they are stored
Labels: TypeAlias = tuple[int, ...]  # a class or none-of-the-above for each image of a task
Answers: TypeAlias = tuple[tuple[int, int], ...]  # of one annotator to one task: images by row, and classes


@dataclass(frozen=True, slots=True)
class DiscardedAnnotation:
    """An annotation that does not count, and the reason."""

    subject: TaskSubject
    annotator: int  # user id
    annotation: int
    reason: str


@dataclass(frozen=True, slots=True)
class SkippedTask:
    """A task that an annotator skipped or answered unreadably, which Label Studio does not offer to them again."""

    index: int  # in ReviewTasks
    annotator: int  # user id
    task: int
    annotation: int
    reason: str = ""  # why the answer is not readable; empty for a skip


@dataclass(frozen=True, slots=True)
class QueuedTask:
    """The place of a task in Label Studio's queue."""

    index: int  # in ReviewTasks; twice where a late import left a duplicate
    task: int
    overlap: int
    labeled: bool  # out of the queue
    submitted: int  # annotations without skips


@dataclass(frozen=True, eq=False)
class PulledAnnotations:
    """All annotations of a project so far, in 40 bytes an answer."""

    answers: AnswerTable  # those that count, by task and then by the time of their annotator's first answer
    labels: list[Labels]
    discarded: list[DiscardedAnnotation]
    skips: list[SkippedTask]
    unreadable: list[SkippedTask]  # those without a readable answer of the same annotator
    queue: list[QueuedTask]
    foreign: int = 0  # tasks that Defuse did not import

    def annotators(self) -> list[int]:
        """Return the user ids of all annotators, by the time of their first counted answer."""
        order = np.lexsort((self.answers["annotator"], self.answers["created"]))
        first = dict.fromkeys(self.answers["annotator"][order].tolist())
        others = {discarded.annotator for discarded in self.discarded}
        others |= {skip.annotator for skip in self.skips}
        return [*first, *sorted(others - set(first))]

    def authors(self) -> Authors:
        """Return the annotator of each annotation whose annotator is known."""
        table = zip(self.answers["annotation"].tolist(), self.answers["annotator"].tolist(), strict=True)
        listed = ((discarded.annotation, discarded.annotator) for discarded in self.discarded)
        return {
            annotation: annotator for annotation, annotator in chain(table, listed) if annotator != UNKNOWN
        }

    def missing_since(self, authors: Authors) -> Counter[int]:
        """Return how many annotations of each annotator in `authors`, those of earlier pulls, this one lacks."""
        found = {discarded.annotation for discarded in self.discarded}
        found.update(self.answers["annotation"].tolist(), (skip.annotation for skip in self.skips))
        return Counter(annotator for annotation, annotator in authors.items() if annotation not in found)


def read_annotations(
    tasks: Iterable[Task],
    review_tasks: ReviewTasks,
    authors: Authors | None = None,
    *,
    most_asked: int = 0,
) -> PulledAnnotations:
    """Return the answers: per task the newest of each annotator, of the first answers_per_task annotators.

    `authors` are those of earlier pulls, for annotations whose account was deleted since. `most_asked` is the largest
    answers_per_task so far: what was given before the review asked for fewer answers counts.
    """
    reader = AnnotationReader(review_tasks, authors or {})
    table = np.fromiter(reader.read(tasks), ANSWER_DTYPE)
    wanted = max(most_asked, review_tasks.review.answers_per_task)
    counted, replaced, surplus = select_counted(table, wanted)
    unknown = table["annotator"][replaced] == UNKNOWN
    reader.discard(table[replaced[~unknown]], "the same person answered again later")
    reader.discard(
        table[replaced[unknown]], "may be of the same person as a later answer: the account was deleted"
    )
    reader.discard(table[surplus], f"{wanted} others had answered before, as many as count")
    discarded = sorted(reader.discarded, key=lambda one: (one.subject.key, one.annotation))
    labels, skips, unreadable = list(reader.labels), reader.skips, reader.unreadable
    return PulledAnnotations(
        table[counted], labels, discarded, skips, unreadable, reader.queue, reader.foreign
    )


def read_authors(store: Store) -> Authors:
    """Return the authors of annotations as stored by earlier pulls."""
    try:
        by_user = BY_USER.validate_json(store.read(AUTHORS_KEY))
    except FileNotFoundError:
        return {}
    except ValidationError as error:
        raise InputError(
            f"{store.address}/{AUTHORS_KEY}: expected what Defuse wrote there, found something else; delete it, and "
            "the next pull writes it again"
        ) from error
    return {annotation: user for user, given in by_user.items() for annotation in given}


def store_authors(store: Store, known: Authors, pulled: PulledAnnotations) -> None:
    """Store the authors of the pulled annotations beside those that are stored by then.

    `known` are those that were stored before the pull: what a repair has removed since then is not added again.
    """
    stored, seen = read_authors(store), pulled.authors()
    authors = stored | {
        annotation: seen[annotation] for annotation in seen.keys() - (known.keys() - stored.keys())
    }
    if authors != stored:
        _write_authors(store, authors)


def _write_authors(store: Store, authors: Authors) -> None:
    by_user: dict[int, list[int]] = {}
    for annotation, user in sorted(authors.items()):
        by_user.setdefault(user, []).append(annotation)
    store.write(AUTHORS_KEY, json.dumps(by_user).encode())


def delete_skips(client: LabelStudioClient, listed: Iterable[Task], tasks: ReviewTasks, store: Store) -> None:
    """Delete skips, and unreadable answers to tasks that lack answers: the tasks are handed out again.

    `listed` are the tasks of the project, `store` is the run's. Forgets the authors of what is deleted, here or before.
    """
    pulled = read_annotations(listed, tasks, read_authors(store))
    given = np.bincount(pulled.answers["task"], minlength=len(tasks))
    lacking = given < tasks.review.answers_per_task
    unreadable = [answer for answer in pulled.unreadable if lacking[answer.index]]
    authors = pulled.authors()
    for skip in (*pulled.skips, *unreadable):
        client.delete_annotation(skip.annotation)
        authors.pop(skip.annotation, None)
    _write_authors(store, authors)
    if unreadable:
        deleted = count_of(len(unreadable), "unreadable answer")
        log.warning("review: deleted %s to tasks that lack answers", deleted)


def delete_unreadable(client: LabelStudioClient, project: int, tasks: ReviewTasks) -> None:
    """Delete all unreadable answers: Label Studio keeps the controls and choices that they name on its page."""
    reader = AnnotationReader(tasks, {})
    for _ in reader.read(client.tasks(project)):
        pass  # what is readable stays
    for discarded in reader.discarded:
        client.delete_annotation(discarded.annotation)
    if reader.discarded:
        log.warning("project %d: deleted %d answers under an edited page", project, len(reader.discarded))


def select_counted(table: AnswerTable, wanted: int) -> tuple[I64, I64, I64]:
    """Return the rows that count, those that their annotator replaced, and those beyond the `wanted` first annotators.

    The first annotators are those whose first answer came first, whatever they changed later. The rows that count are
    in that order within each task.
    """
    rows = np.lexsort([table[name] for name in ("annotation", "when", "annotator", "task")])
    newest = np.ones(len(rows), bool)  # of its annotator, for its task
    newest[:-1] = (np.diff(table["task"][rows]) != 0) | (np.diff(table["annotator"][rows]) != 0)
    replaced, kept = rows[~newest], rows[newest]
    since = np.minimum.reduceat(table["created"][rows], np.flatnonzero(np.roll(newest, 1)))
    kept = kept[np.lexsort((table["annotation"][kept], since, table["task"][kept]))]
    task = table["task"][kept]
    rank = np.arange(len(kept)) - np.searchsorted(task, task)
    return kept[rank < wanted], replaced, kept[rank >= wanted]


class UnreadableError(Exception):
    """Why an annotation is no answer."""


class AnnotationReader:
    """Reads annotations under the labelling interface that was pushed, and lists those that it cannot read."""

    def __init__(self, tasks: ReviewTasks, authors: Authors) -> None:
        self.tasks, self.authors = tasks, authors
        self.images = tasks.gallery.predicted.shape[1]
        self.answer_of = answers_by_name(tasks.gallery.classes)
        self.labels: dict[Labels, int] = {}  # each once, since most answers are alike
        self.discarded: list[DiscardedAnnotation] = []
        self.skips: list[SkippedTask] = []
        self.unreadable: list[SkippedTask] = []
        self.queue: list[QueuedTask] = []
        self.foreign = 0

    def read(self, tasks: Iterable[Task]) -> Iterator[tuple[Any, ...]]:
        """Yield a row of ANSWER_DTYPE for each annotation that answers a task of the review."""
        for task in tasks:
            index = self.tasks.index_of(task.key)
            if index is None:
                self.foreign += 1
                continue
            submitted = [annotation for annotation in task.annotations if not annotation.was_cancelled]
            self.skips.extend(
                SkippedTask(index, self._annotator(annotation), task.id, annotation.id)
                for annotation in task.annotations
                if annotation.was_cancelled
            )
            self.queue.append(QueuedTask(index, task.id, task.overlap, task.labeled, len(submitted)))
            yield from self._rows(index, task.id, submitted)

    def discard(self, answers: AnswerTable, reason: str) -> None:
        """List valid answers that do not count."""
        for answer in answers:
            subject = self.tasks.subject(int(answer["task"]))
            self.discarded.append(
                DiscardedAnnotation(subject, int(answer["annotator"]), int(answer["annotation"]), reason)
            )

    def _rows(self, index: int, task: int, annotations: Iterable[Annotation]) -> Iterator[tuple[Any, ...]]:
        subject = self.tasks.subject(index)
        readable: set[int] = set()  # annotators
        unreadable: list[SkippedTask] = []
        for annotation in annotations:
            annotator = self._annotator(annotation)
            try:
                labels = self._labels(subject, annotation)
            except UnreadableError as error:
                why = str(error)
                self.discarded.append(DiscardedAnnotation(subject, annotator, annotation.id, why))
                unreadable.append(SkippedTask(index, annotator, task, annotation.id, why))
                continue
            readable.add(annotator)
            known = self.labels.setdefault(labels, len(self.labels))
            created, updated = annotation.created_at.timestamp(), annotation.updated_at.timestamp()
            yield index, known, annotation.id, annotator, created, updated
        self.unreadable.extend(answer for answer in unreadable if answer.annotator not in readable)

    def _annotator(self, annotation: Annotation) -> int:
        """Return the user id. All annotations whose deleted account was never seen count as one annotator's."""
        return annotation.annotator or self.authors.get(annotation.id, UNKNOWN)

    def _labels(self, subject: TaskSubject, annotation: Annotation) -> Labels:
        """Return a label per image of the task. Raises UnreadableError."""
        labels: dict[str, int] = {}
        results = annotation.result if isinstance(annotation.result, list) else []
        for result in results:
            control, label = self._label(subject, result)
            if control in labels:
                raise UnreadableError(f"two answers for {control}")
            labels[control] = label
        if LABEL not in labels:
            raise UnreadableError("no label was chosen")
        if subject.image is not None:
            return (labels[LABEL],)
        return tuple(labels.get(f"{LABEL}_{image}", labels[LABEL]) for image in range(self.images))

    def _label(self, subject: TaskSubject, result: object) -> tuple[str, int]:
        """Return the control and its label. Raises UnreadableError."""
        try:
            row = RESULT_ROW.validate_python(result)
        except ValidationError:
            raise UnreadableError("not an answer of this interface") from None
        control, choices = row.from_name, row.value.choices
        shown_beside = range(self.images if subject.image is None else 0)
        allowed = [LABEL, *(f"{LABEL}_{image}" for image in shown_beside)]
        if control not in allowed:
            raise UnreadableError(f"an answer for {control!r:.40}, which was not asked")
        if choices is None or len(choices) != 1:
            raise UnreadableError(f"{len(choices or ()) or 'no'} choices for {control}, not one")
        if not isinstance(choices[0], str) or choices[0] not in self.answer_of:
            raise UnreadableError(f"the choice {choices[0]!r:.60} is not one of the classes")
        return control, self.answer_of[choices[0]]


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

    With review.real_names two annotators can have one name, and an account that was renamed or deleted since then has
    another: they are told apart by pseudonym.
    """
    old, new = (
        _by_task(tasks, votes, votes.notes.get(PSEUDONYMS, votes.annotators)) for votes in (before, now)
    )
    changed = sum(new[key] != old[key] for key in old.keys() & new.keys())
    return AnswerChanges(len(new.keys() - old.keys()), changed, len(old.keys() - new.keys()))


def _by_task(tasks: ReviewTasks, votes: Votes, annotators: Sequence[str]) -> dict[tuple[int, str], Answers]:
    images = tasks.gallery.predicted.shape[1]
    position = votes.scenario * images + votes.image
    found: dict[tuple[int, str], list[tuple[int, int]]] = {}
    columns = (position.tolist(), votes.annotator.tolist(), votes.answer.tolist())
    for row, annotator, answer in zip(*columns, strict=True):
        task = row // (images // tasks.per_scenario)
        found.setdefault((task, annotators[annotator]), []).append((row, answer))
    return {key: tuple(sorted(answers)) for key, answers in found.items()}
