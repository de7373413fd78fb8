"""Which annotations count and whose they are, without a server."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from planted_review import IMAGES, annotation, blank_review, task_of

from defuse_core.artifacts import NONE_OF_THE_ABOVE
from defuse_core.errors import InputError
from defuse_core.store import FolderStore
from services.labeling.annotations import (
    ANSWER_DTYPE,
    AUTHORS_KEY,
    UNKNOWN,
    delete_skips,
    read_annotations,
    read_authors,
    select_counted,
    store_authors,
)
from services.labeling.records import choice_result


@pytest.mark.parametrize(
    ("rows", "wanted", "expected"),
    [  # rows of task, labels, annotation, annotator, created, when
        (  # the first annotator changed the answer after the others had given theirs
            [(0, 0, 1, 7, 1.0, 30.0), (0, 1, 2, 8, 10.0, 10.0), (0, 2, 3, 9, 11.0, 11.0)],
            2,
            ([1, 2], [], [3]),
        ),
        # the earlier annotation was changed last
        ([(0, 0, 1, 7, 1.0, 30.0), (0, 1, 2, 7, 2.0, 2.0)], 1, ([1], [2], [])),
        # two at the same time
        ([(0, 0, 5, 7, 1.0, 1.0), (0, 1, 4, 8, 1.0, 1.0)], 1, ([4], [], [5])),
    ],
)
def test_a_changed_answer_keeps_its_annotators_place(rows, wanted, expected):
    table = np.array(rows, ANSWER_DTYPE)
    for shuffled in (table, table[::-1]):
        found = [shuffled["annotation"][part].tolist() for part in select_counted(shuffled, wanted)]
        assert tuple(found) == expected


def test_who_answered_first_counts_also_where_that_answer_was_changed_later(tmp_path):
    _, tasks = blank_review(tmp_path, 1, answers_per_task=1)
    given = annotation(1, 3, created=1.0, changed=30.0), annotation(2, 4, created=10.0)
    (counted,) = read_annotations([task_of(tasks, 0, *given)], tasks).answers
    assert (counted["annotation"], counted["created"], counted["when"]) == (1, 1.0, 30.0)


def test_annotators_are_listed_by_their_first_counted_answer_and_the_others_after_them(tmp_path):
    _, tasks = blank_review(tmp_path, 1)
    answers = [annotation(1, 3, created=20.0), annotation(2, 9, created=10.0)]
    others = [annotation(3, 6, "eleven"), annotation(4, 5, None)]
    pulled = read_annotations([task_of(tasks, 0, *answers, *others)], tasks)
    assert pulled.annotators() == [9, 3, 5, 6]


def test_authors_are_stored_beside_those_of_earlier_pulls_and_only_where_some_are_new(tmp_path):
    _, tasks = blank_review(tmp_path, 1)
    store = FolderStore(tmp_path / "authors")
    assert read_authors(store) == {}
    given = (annotation(1, 3), annotation(2, 4, "eleven"), annotation(3, None))
    pulled = read_annotations([task_of(tasks, 0, *given)], tasks)
    store.write(AUTHORS_KEY, b'{"5": [9]}')
    store_authors(store, {9: 5}, pulled)
    assert read_authors(store) == {9: 5, 1: 3, 2: 4}
    version = store.version(AUTHORS_KEY)
    store_authors(store, {9: 5, 1: 3, 2: 4}, pulled)
    assert store.version(AUTHORS_KEY) == version  # all were known
    store.write(AUTHORS_KEY, b'{"3": 1}')
    with pytest.raises(InputError, match="delete it, and the next pull writes it again"):
        read_authors(store)


def test_a_deleted_account_is_known_by_earlier_pulls_and_else_counts_as_one(tmp_path):
    _, tasks = blank_review(tmp_path, 1)
    known = task_of(tasks, 1, annotation(7, None), annotation(8, 5, created=2.0))
    unknown = task_of(tasks, 0, annotation(4, None), annotation(3, None, created=2.0))
    changed = task_of(tasks, 2, annotation(2, 6), annotation(1, 6, created=2.0))
    pulled = read_annotations([changed, known, unknown], tasks, {7: 3})
    assert pulled.answers["annotator"].tolist() == [UNKNOWN, 3, 5, 6]
    assert [(one.subject.key, one.annotation, one.reason) for one in pulled.discarded] == [
        ("s000-i00", 4, "may be of the same person as a later answer: the account was deleted"),
        ("s000-i02", 2, "the same person answered again later"),
    ]


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (None, "no label was chosen"),
        ([choice_result("label_1", "image_1", "8")], "no label was chosen"),
        ([choice_result("label", "page", "8")] * 2, "two answers for label"),
        (
            [choice_result(f"label_{IMAGES}", "image", "8")],
            f"an answer for 'label_{IMAGES}', which was not asked",
        ),
        ([choice_result("label", "page", "8") | {"value": {"choices": []}}], "no choices for label, not one"),
        (
            [choice_result("label", "page", "8") | {"value": {"choices": [["8"]]}}],
            "the choice ['8'] is not one of the classes",
        ),
    ],
)
def test_what_cannot_be_read_as_an_answer_to_a_page_is_discarded_with_the_reason(tmp_path, result, reason):
    _, tasks = blank_review(tmp_path, 1, form="scenario")
    given = replace(annotation(1, 3), result=result)
    pulled = read_annotations([task_of(tasks, 0, given)], tasks)
    assert len(pulled.answers) == 0 and [one.reason for one in pulled.discarded] == [reason]


def test_a_page_holds_a_label_of_its_own_for_single_images(tmp_path):
    _, tasks = blank_review(tmp_path, 1, form="scenario")
    own = [choice_result("label_1", "image_1", "3"), choice_result("label_9", "image_9", "None of the above")]
    given = annotation(1, 3, target="page")
    given = replace(given, result=[*own, *given.result])
    pulled = read_annotations([task_of(tasks, 0, given)], tasks)
    assert pulled.labels == [(8, 3, *[8] * 7, NONE_OF_THE_ABOVE)]


def test_answers_that_do_not_count_and_skips_are_not_lost(tmp_path):
    _, tasks = blank_review(tmp_path, 1)
    given = (annotation(1, 3), annotation(2, 4, "eleven"), annotation(3, 5, None))
    pulled = read_annotations([task_of(tasks, 0, *given)], tasks)
    assert pulled.missing_since({1: 3, 2: 4, 3: 5, 9: 4}) == {4: 1}


def test_a_repair_deletes_skips_and_unreadable_answers_to_tasks_that_lack_answers_and_forgets_them(tmp_path):
    run, tasks = blank_review(tmp_path, 1, answers_per_task=1)
    listed = [
        task_of(tasks, 0, annotation(1, 3), annotation(2, 4, "eleven")),
        task_of(tasks, 1, annotation(3, 3, None), annotation(4, 5, "eleven")),
    ]
    run.store.write(AUTHORS_KEY, b'{"3": [9]}')
    pulled = read_annotations(listed, tasks)
    store_authors(run.store, {9: 3}, pulled)
    known = read_authors(run.store)
    deleted = list[int]()
    delete_skips(SimpleNamespace(delete_annotation=deleted.append), listed, tasks, run.store)
    assert deleted == [3, 4]
    assert read_authors(run.store) == {1: 3, 2: 4}  # nothing of what is gone is missed
    store_authors(run.store, known, pulled)  # by a pull that began before the repair
    assert read_authors(run.store) == {1: 3, 2: 4}
