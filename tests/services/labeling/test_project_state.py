"""What a run stores about its project: numbers that stay, a digest of what people see, and nothing unreadable."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from label_studio_live import digits_gallery
from planted_review import answered_tasks, blank_review

from defuse_core.errors import InputError
from defuse_core.store import FolderStore
from services.labeling.annotations import AUTHORS_KEY, read_authors
from services.labeling.annotators import LabelStudioAnnotators
from services.labeling.project import ReviewProject
from services.labeling.records import (
    Project,
    ProjectState,
    Task,
    gallery_digest,
    read_state,
    update_state,
    write_state,
)
from services.settings import read_environment


def test_the_number_of_an_annotator_never_changes():
    state = ProjectState("mark", "digest", "secret").with_annotators([9, 3]).with_annotators([3, 5, 9])
    assert state.people == {"9": 1, "3": 2, "5": 3}
    assert state.pseudonym(3) == "annotator-2"


def test_a_change_is_made_to_what_is_stored_by_then(tmp_path):
    store, early = FolderStore(tmp_path), ProjectState("mark", "digest", "secret")
    write_state(store, replace(early, simulated=True))  # by another command
    changed = update_state(store, early, lambda known: known.with_annotators([7]))
    assert changed.simulated and changed.people == {"7": 1}


def test_a_pull_stores_nothing_in_a_run_that_is_deleted_meanwhile(tmp_path):
    run, tasks = blank_review(tmp_path, 1)
    run.until, run.store.existing = "draw", None  # as in a bucket, where a write makes a deleted folder again
    first = ReviewProject(None, run, tasks)
    write_state(run.store, first.state)
    project = Project(1, first.settings())

    def listed(number: int, with_data: bool = True) -> Iterator[Task]:
        yield from answered_tasks(tasks, first.state.secret)

    def listed_during_a_deletion(number: int, with_data: bool = True) -> Iterator[Task]:
        yield from listed(number)
        for key in run.store.list():
            run.store.delete(key)

    annotators = LabelStudioAnnotators(run, read_environment())
    annotators.client = SimpleNamespace(
        address="http://labels", organization=lambda: 1, project=lambda number: project,
        find_projects=lambda mark: [project], tasks=listed,
    )  # fmt: skip
    annotators.push(tasks.gallery)
    annotators.client.tasks = listed_during_a_deletion
    with pytest.raises(InputError, match="labeling.json is missing: this run is gone"):
        annotators.status(tasks.gallery)
    assert run.store.list() == []


def planted_annotators(run, tasks, found, projects):
    """Annotators of a server that has these projects, by number, with the same tasks in each."""
    run.until = "draw"

    def create(settings):
        projects[99] = Project(99, settings)
        return projects[99]

    annotators = LabelStudioAnnotators(run, read_environment())
    annotators.client = SimpleNamespace(
        address="http://labels", organization=lambda: 1, project=projects.get, create_project=create,
        find_projects=lambda text: [each for each in projects.values() if text in each.settings.description],
        tasks=lambda *_: found(read_state(run.store, tasks.gallery).secret), labeling_url=str,
        set_overlap=lambda *_: None, update_project=lambda *_, **fields: None, check_access=lambda to_create: None,
    )  # fmt: skip
    return annotators


def test_answers_that_were_given_before_the_review_asked_for_fewer_still_count(tmp_path):
    run, tasks = blank_review(tmp_path, 1, answers_per_task=4)
    annotators = planted_annotators(run, tasks, partial(answered_tasks, tasks), {})
    annotators.push(tasks.gallery)  # every task has five answers
    for asked in (2, 3):
        run.spec = run.spec.with_fields("review", answers_per_task=asked)
        status = annotators.status(tasks.gallery)
        assert set(status.given_per_task) == {4} and (status.outstanding, status.saved) == (0, 0)
        assert status.pulled.discarded[0].reason == "4 others had answered before, as many as count"
        assert status.state.most_asked == 4


def test_no_answer_of_another_project_is_said_to_be_lost(tmp_path, caplog):
    run, tasks = blank_review(tmp_path, 1)
    projects = dict[int, Project]()
    annotators = planted_annotators(run, tasks, partial(answered_tasks, tasks), projects)

    def pull():
        run.store.write(
            AUTHORS_KEY, b'{"70": [1000000000]}'
        )  # as after pulls of the project that was there before
        annotators.push(tasks.gallery)
        annotators.status(tasks.gallery)
        assert 70 not in read_authors(run.store).values() and "has lost" not in caplog.text

    pull()  # a new project
    projects[12] = replace(projects.pop(99), id=12)  # moved by an export and an import
    pull()
    assert "project 99 is now project 12" in caplog.text
    run.store.delete("labeling.json")
    pull()
    assert sorted(projects) == [12, 99]


def test_the_digest_is_of_all_that_people_see_and_of_the_answers():
    gallery = digits_gallery()
    images, predicted = gallery.images.copy(), gallery.predicted.copy()
    images[1, 2, 0, 3, 4] += 1 / 255 if images[1, 2, 0, 3, 4] < 0.5 else -1 / 255
    predicted[3, 0] += 1
    others = [
        replace(gallery, images=images),
        replace(gallery, predicted=predicted),
        replace(gallery, classes=(*gallery.classes[:-1], "nine")),
        replace(gallery, images=gallery.images.reshape(4, 3, 1, 8, 32)),
    ]
    digests = {gallery_digest(one) for one in (gallery, *others)}
    assert len(digests) == 5
    assert gallery_digest(replace(gallery, images=gallery.images + np.float32(1e-5))) in digests


@pytest.mark.parametrize(
    "damage",
    [{"note": "by hand"}, {"people": {"7": "one"}}, {"version": "two"}, {"version": 4}, {"version": 6}],
)
def test_a_state_that_this_version_of_defuse_did_not_write_is_refused(tmp_path, damage):
    store, gallery = FolderStore(tmp_path), digits_gallery()
    write_state(store, read_state(store, gallery))
    read_state(store, gallery)
    text = json.loads(store.read("labeling.json")) | damage
    store.write("labeling.json", json.dumps(text).encode())
    with pytest.raises(InputError, match="expected what this version of Defuse wrote there"):
        read_state(store, gallery)


def test_a_run_that_has_lost_its_project_says_so() -> None:
    with pytest.raises(
        InputError, match=r"^labeling\.json is missing: this run is gone; was its folder moved"
    ):
        _ = ProjectState("mark", "digest", "secret").number


def test_each_project_has_a_mark_and_a_secret_of_its_own() -> None:
    states = [ProjectState.new("digest") for _ in range(2)]
    assert len({text for state in states for text in (state.mark, state.secret)}) == 4
