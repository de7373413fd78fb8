"""The memory that a review takes: bytes per answer, and none for the tasks themselves."""

from __future__ import annotations

import tracemalloc
from types import SimpleNamespace

from planted_review import ANNOTATORS, IMAGES, STATE, answered_tasks, blank_review

from services.labeling.annotations import read_annotations
from services.labeling.project import ReviewProject
from services.labeling.records import Project, write_state
from services.labeling.status import review_status


def peak_bytes(work):
    work()  # imports, and what is made once
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_pulling_takes_some_bytes_per_answer(tmp_path):
    def per_answer(scenarios):
        _, tasks = blank_review(tmp_path, scenarios)
        names = {1000 + n: str(n) for n in range(ANNOTATORS)}

        def pull():
            return review_status(tasks, read_annotations(answered_tasks(tasks), tasks), STATE, names, ())

        return peak_bytes(pull) / (scenarios * IMAGES * ANNOTATORS)

    assert per_answer(100) < 300


def test_pushing_again_takes_some_bytes_per_task(tmp_path):
    def peak(scenarios):
        run, tasks = blank_review(tmp_path, scenarios)
        first = ReviewProject(None, run, tasks)
        write_state(run.store, first.state)
        project = Project(1, first.settings())
        client = SimpleNamespace(
            address="http://labels",
            organization=lambda: 1,
            find_projects=lambda mark: [project],
            project=lambda number: project,
            tasks=lambda number, with_data: answered_tasks(tasks, first.state.secret),
        )
        return peak_bytes(lambda: ReviewProject(client, run, tasks).push())

    small, large = peak(10), peak(100)
    assert (large - small) / (90 * IMAGES) < 100
