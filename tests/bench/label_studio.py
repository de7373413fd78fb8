"""Label Studio: tasks pushed and answers pulled per second, and how much memory the client takes for it.

    python tests/bench/label_studio.py

On a server of its own, with SQLite. Answers are imported together with their tasks, since only reading them is
measured; "listed" is that alone, with nothing kept: it shows what the number of tasks costs, and the rest of
"pulled" is the answers themselves. Memory is what Python allocates at most beyond the gallery itself.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from label_studio_live import annotator_accounts, live_server, review_run, settings_for
from sklearn.datasets import load_digits

from defuse_core.artifacts import Gallery
from services.labeling.annotators import LabelStudioAnnotators
from services.labeling.project import ReviewProject
from services.labeling.records import choice_result, read_state, write_state
from services.labeling.tasks import ReviewTasks, batches

SIZES, ANSWERS, IMAGES = (250, 1000, 4000, 16000), 5, 10


def gallery_of(tasks: int) -> Gallery:
    """Return tasks / 10 scenarios of 10 digits, 32x32."""
    data = load_digits()
    rows = np.arange(tasks) % len(data.images)
    pixels = np.kron(data.images[rows] / 16, np.ones((4, 4))).astype(np.float32)
    shape = (tasks // IMAGES, IMAGES)
    classes = tuple(str(n) for n in range(10))
    return Gallery(
        pixels.reshape(*shape, 1, 32, 32),
        np.zeros((*shape, 2), np.float32),
        data.target[rows].reshape(shape).astype(np.int64),
        classes,
    )


def peak_mb(work: Callable[[], object]) -> float:
    """Return the megabytes that `work` allocates at most."""
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def new_review(folder: Path, gallery: Gallery) -> LabelStudioAnnotators:
    run = review_run(folder, gallery, answers_per_task=ANSWERS, images=IMAGES)
    return LabelStudioAnnotators(run, settings_for(live_server()))


def fill(annotators: LabelStudioAnnotators, gallery: Gallery) -> None:
    """Create the run's project with tasks that every annotator has answered already."""
    run = annotators.run
    tasks = ReviewTasks(gallery, run.spec.review)
    project = ReviewProject(annotators.client, run, tasks)
    created = annotators.client.create_project(project.settings())
    accounts = annotator_accounts(ANSWERS)
    users = (account.http.get("/api/current-user/whoami").json() for account in accounts)
    label = [choice_result("label", "image", "8")]
    annotations = [{"completed_by": int(user["id"]), "result": label} for user in users]
    made = (tasks.task(index, secret=project.state.secret) for index in range(len(tasks)))
    for batch in batches(task | {"annotations": annotations} for task in made):
        annotators.client.import_tasks(created.id, batch)
    write_state(run.store, replace(project.state, project=created.id, pushed=True))


def listed(annotators: LabelStudioAnnotators, gallery: Gallery) -> int:
    """Read every task with its answers, keep none, and return how many there were."""
    return sum(1 for _ in annotators.client.tasks(read_state(annotators.run.store, gallery).number))


def main() -> None:
    logging.disable(logging.WARNING)
    folder = Path(tempfile.mkdtemp())
    print(
        f"{'tasks':>6} {'pushed/s':>9} {'peak MB':>8} {'answers':>8} {'pulled/s':>9} {'listed MB':>9} {'peak MB':>8}"
    )
    for size in SIZES:
        gallery, answers = gallery_of(size), size * ANSWERS
        pushed_s = seconds(partial(new_review(folder, gallery).push, gallery))
        push_mb = peak_mb(partial(new_review(folder, gallery).push, gallery))
        full = new_review(folder, gallery)
        fill(full, gallery)
        assert full.status(gallery).given == answers
        pulled_s = seconds(partial(full.status, gallery))
        list_mb = peak_mb(partial(listed, full, gallery))
        pull_mb = peak_mb(partial(full.status, gallery))
        pushed = f"{size:>6} {size / pushed_s:>9.0f} {push_mb:>8.1f}"
        print(f"{pushed} {answers:>8} {answers / pulled_s:>9.0f} {list_mb:>9.1f} {pull_mb:>8.1f}", flush=True)


if __name__ == "__main__":
    main()
