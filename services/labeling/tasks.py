"""The tasks of a review, each under a key that names its image or scenario, with the pictures that it shows.

The pictures are data: addresses, so Label Studio needs no access to the store of the run.
"""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from defuse_core.artifacts import F32, I64, NONE_OF_THE_ABOVE, Bool, Gallery
from defuse_core.config import ReviewSection
from defuse_core.data.images import data_address
from defuse_core.review.verdicts import LEAST_ANSWERS, stops_when_sure
from defuse_core.store import Store
from services.labeling.interface import LABEL, choice_names, instructions, label_config
from services.labeling.records import (
    ImageData,
    PageData,
    PageSample,
    PreselectedAnswer,
    ProjectSettings,
    Task,
    TaskImport,
    TaskMeta,
    choice_result,
)

PRELABEL_MODEL = "reference models"  # the model version of predictions in Label Studio
BATCH_TASKS = 250
BATCH_BYTES = 900_000  # proxies such as nginx refuse requests over 1 MiB unless told otherwise


@dataclass(frozen=True)
class TaskSubject:
    """The subject of a task: one image of a scenario, or (image None) the page of the whole scenario."""

    scenario: int
    image: int | None

    @property
    def key(self) -> str:
        """The sample_key, such as s003-i07."""
        return f"s{self.scenario:03d}" + ("" if self.image is None else f"-i{self.image:02d}")


class ReviewTasks:
    """All T tasks of a review, numbered scenario by scenario and created one at a time.

    Memory does not grow with their number.
    """

    def __init__(self, gallery: Gallery, review: ReviewSection, store: Store) -> None:
        self.gallery, self.review, self.store = gallery, review, store
        self.names = choice_names(gallery.classes)
        self.whole_pages = review.form == "scenario"
        self.per_scenario = 1 if self.whole_pages else gallery.predicted.shape[1]

    @property
    def first_answers(self) -> int:
        """Answers for which a task is open at first: all, or as many as CROWDLAB needs to be sure of an image."""
        asked = self.review.answers_per_task
        return min(asked, LEAST_ANSWERS) if stops_when_sure(self.review) else asked

    def __len__(self) -> int:
        return len(self.gallery) * self.per_scenario

    def subject(self, index: int) -> TaskSubject:
        """Return the subject of the task with that index."""
        scenario, image = divmod(index, self.per_scenario)
        return TaskSubject(scenario, None if self.whole_pages else image)

    def index_of(self, key: str | None) -> int | None:
        """Return the index of the task with this sample_key; None if it is not a task of this review."""
        found = re.fullmatch(r"s(\d{3,9})(?:-i(\d{2,9}))?", key or "")
        if found is None:
            return None
        index = int(found[1]) * self.per_scenario + int(found[2] or 0)
        return index if index < len(self) and self.subject(index).key == key else None

    def task(self, index: int, prelabel: PreselectedAnswer | None = None, *, secret: str) -> TaskImport:
        """Return the task as Label Studio imports it, with a preselected answer if there is one.

        `secret` is that of the run's ProjectState.
        """
        subject = self.subject(index)
        if subject.image is None:
            data: PageData | ImageData = self._page(subject)
        else:
            data = ImageData(image=data_address(self.gallery.images[subject.scenario, subject.image]))
        # The key is no data: annotators see all data in Label Studio's list of tasks.
        meta = TaskMeta(sample_key=subject.key, digest=digest(subject.key, data, secret))
        task = TaskImport(data=data, meta=meta)
        if prelabel is not None:
            task["predictions"] = [prelabel]
        return task

    def _page(self, subject: TaskSubject) -> PageData:
        samples = [
            PageSample(image=data_address(image), prediction=f"classifier: {self.names[answer]}")
            for image, answer in zip(
                self.gallery.images[subject.scenario],
                self.gallery.predicted[subject.scenario].tolist(),
                strict=True,
            )
        ]
        return PageData(page="Pictures", samples=samples)


def digest(key: str, data: Mapping[str, object], secret: str) -> str:
    """Return a digest of a task's key and data, by which a later edit is recognised.

    It is part of the task, where every annotator can write, so it needs the run's secret (HMAC, RFC 2104).
    """
    text = json.dumps([key, data], sort_keys=True).encode()
    return hmac.digest(secret.encode(), text, "sha256").hex()[:32]


def is_edited(task: Task, secret: str) -> bool:
    """Whether someone edited a task of a review since it was pushed."""
    return task.data is None or digest(str(task.key), task.data, secret) != task.digest


def batches(tasks: Iterable[TaskImport]) -> Iterator[list[TaskImport]]:
    """Yield the tasks in lists that are bounded in number and bytes."""
    batch: list[TaskImport] = []
    size = 0
    for task in tasks:
        grown = size + len(str(task))
        if batch and (len(batch) == BATCH_TASKS or grown > BATCH_BYTES):
            yield batch
            batch, grown = [], len(str(task))
        batch.append(task)
        size = grown
    if batch:
        yield batch


def prelabels_by_task(tasks: ReviewTasks, probabilities: F32) -> dict[int, PreselectedAnswer]:
    """Return the answer that is preselected in each task, by its index, the least certain first.

    That is the order in which annotators get the tasks. `probabilities` (W, S, R, C) are those of the reference models.
    """
    mean = probabilities.mean(axis=0)  # (S, R, C)
    if tasks.whole_pages:
        mean = mean.mean(axis=1, keepdims=True)  # (S, 1, C)
    best, confidence = mean.argmax(axis=2), mean.max(axis=2)
    least, target = tasks.review.reference.min_confidence, "page" if tasks.whole_pages else "image"
    prelabels: dict[int, PreselectedAnswer] = {}
    for index in np.argsort(confidence, axis=None, kind="stable").tolist():
        certainty = float(confidence.flat[index])
        answer = int(best.flat[index]) if certainty >= least else NONE_OF_THE_ABOVE
        result = choice_result(LABEL, target, tasks.names[answer])
        prelabels[index] = {"model_version": PRELABEL_MODEL, "score": certainty, "result": [result]}
    return prelabels


@dataclass(eq=False)
class PresentTasks:
    """The tasks that are in the project already, of T."""

    ids: I64  # (T,) ids in Label Studio; 0 for a task that is missing
    answered: Bool  # (T,)

    @classmethod
    def none(cls, count: int) -> PresentTasks:
        return cls(np.zeros(count, np.int64), np.zeros(count, bool))

    def add(self, index: int, task: Task) -> int:
        """Add a task. Of two equal ones return the id of the one to delete: never one that somebody answered."""
        first = int(self.ids[index])
        if first and not task.annotations:
            return task.id
        if first and self.answered[index]:
            return 0  # annotations.py reads two answered ones as one
        self.ids[index], self.answered[index] = task.id, bool(task.annotations)
        return first


def run_label(run: str) -> str:
    """Return what the descriptions of the projects of all runs of this name have in common."""
    return f"its run {run}. Leave this mark"


def project_settings(tasks: ReviewTasks, run: str, mark: str) -> ProjectSettings:
    """Return the settings that the project of a run should have; it is known by its mark."""
    review, classes = tasks.review, tasks.gallery.classes
    return ProjectSettings(
        title=f"Defuse {run}"[:50],
        description=f"Made by Defuse for {run_label(run)}: {mark}",
        label_config=label_config(review.form, classes),
        expert_instruction=instructions(review.form, classes),
        show_instruction=True,
        show_skip_button=False,  # none-of-the-above is the answer to give
        maximum_annotations=tasks.first_answers,
        sampling="Sequential sampling",
        show_collab_predictions=review.prelabel,
        model_version=PRELABEL_MODEL if review.prelabel else "",
    )
