"""Reviews without a server: tasks of blank images, and annotations as pages of the server contain them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from label_studio_live import review_run

from defuse_core.artifacts import Gallery
from defuse_core.runs import Run
from services.labeling.records import Annotation, ProjectState, Task, choice_result
from services.labeling.tasks import ReviewTasks

ANNOTATORS, IMAGES = 5, 10
STATE = ProjectState("mark", "digest", "secret", project=1)


def blank_review(folder: Path, scenarios: int, **review: object) -> tuple[Run, ReviewTasks]:
    """Return a run with so many scenarios of IMAGES blank images, and its tasks."""
    shape = (scenarios, IMAGES)
    gallery = Gallery(
        np.zeros((*shape, 1, 8, 8), np.float32),
        np.zeros((*shape, 2), np.float32),
        np.zeros(shape, np.int64),
        tuple(str(n) for n in range(10)),
    )
    run = review_run(folder, gallery, **{"answers_per_task": ANNOTATORS, "images": IMAGES, **review})
    return run, ReviewTasks(gallery, run.spec.review)


def annotation(
    number: int,
    annotator: int | None,
    choice: str | None = "8",
    *,
    created: float = 1.0,
    changed: float | None = None,
    target: str = "image",
) -> Annotation:
    """Return an annotation with one choice, or a skip where it is None."""
    result = [] if choice is None else [choice_result("label", target, choice)]
    return Annotation(number, at(created), at(changed or created), annotator, result, choice is None)


def at(seconds: float) -> datetime:
    """Return the time so many seconds after 1970 began."""
    return datetime.fromtimestamp(seconds, UTC)


def task_of(
    tasks: ReviewTasks,
    index: int,
    *annotations: Annotation,
    number: int = 0,
    overlap: int = 1,
    labeled: bool = False,
) -> Task:
    """Return one task of the review with its annotations; its number in Label Studio is 100 + `index` by default."""
    key = tasks.subject(index).key
    return Task(number or 100 + index, key, None, overlap, labeled, annotations, None)


def answered_tasks(tasks: ReviewTasks, secret: str = "") -> Iterator[Task]:
    """Yield every task with five answers and the data that it shows, pushed with the secret of a run's state."""
    for index in range(len(tasks)):
        task = tasks.task(index, secret=secret)
        annotations = tuple(
            Annotation(
                id=10 * index + n,
                created_at=at(1.7e9),
                updated_at=at(1.7e9 + n),
                completed_by=1000 + n,
                result=[choice_result("label", "image", "8")],
                was_cancelled=False,
            )
            for n in range(ANNOTATORS)
        )
        meta = task["meta"]
        yield Task(10**6 + index, meta["sample_key"], meta["digest"], 5, False, annotations, task["data"])
