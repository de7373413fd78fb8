"""What a review keeps in memory: bytes per answer, and none of the tasks themselves."""

from __future__ import annotations

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from label_studio_live import review_run

from defuse_core.artifacts import Gallery
from services.labeling.answers import ANSWER, choose, pull
from services.labeling.client import Annotation, Task
from services.labeling.push import Wanted, push
from services.labeling.record import Record, read_record, write_record
from services.labeling.simulate import chosen
from services.labeling.standing import stand
from services.labeling.tasks import Samples

PEOPLE, IMAGES = 5, 10


def samples_of(folder, scenarios, **review):
    shape = (scenarios, IMAGES)
    gallery = Gallery(
        np.zeros((*shape, 1, 8, 8), np.float32),
        np.zeros((*shape, 2), np.float32),
        np.zeros(shape, np.int64),
        tuple(str(n) for n in range(10)),
    )
    run = review_run(folder, gallery, answers_per_task=PEOPLE, images=IMAGES, **review)
    return run, Samples(gallery, run.spec.review, run.store)


def answered(samples):
    """Every task with five answers and the data it shows, one after the other as a server's pages bring them."""
    for number in range(len(samples)):
        made = samples.task(number)
        annotations = tuple(
            Annotation(10 * number + n, 1000 + n, [chosen("label", "image", "8")], False, 1.7e9, 1.7e9 + n)
            for n in range(PEOPLE)
        )
        meta = made["meta"]
        yield Task(10**6 + number, meta["sample_key"], meta["digest"], 5, False, annotations, made["data"])


def peak_bytes(work):
    work()  # what is imported or made once
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_pulling_keeps_some_bytes_per_answer(tmp_path):
    def per_answer(scenarios):
        _, samples = samples_of(tmp_path, scenarios)
        names = {1000 + n: str(n) for n in range(PEOPLE)}
        return peak_bytes(lambda: stand(samples, pull(answered(samples), samples), names, ())) / (
            scenarios * IMAGES * PEOPLE
        )

    assert per_answer(100) < 300


def test_pushing_again_keeps_some_bytes_per_task(tmp_path):
    def peak(scenarios):
        run, samples = samples_of(tmp_path, scenarios)
        wanted = Wanted(run, samples.gallery, samples, {})
        record = read_record(run.store, samples.gallery)
        write_record(run.store, record)
        project = SimpleNamespace(
            id=1, title="t", description=record.mark, config=wanted.config, overlap=PEOPLE
        )
        server = SimpleNamespace(
            address="http://labels",
            find_projects=lambda mark: [project],
            project=lambda number: project,
            tasks=lambda number, with_data: answered(samples),
        )
        return peak_bytes(lambda: push(server, wanted))

    small, large = peak(10), peak(100)
    assert (large - small) / (90 * IMAGES) < 100


def test_of_two_answers_of_one_person_the_newest_counts_and_of_the_people_the_first():
    rows = [  # task, labels, annotation, person, created, when
        (0, 0, 1, 7, 10.0, 10.0),
        (0, 1, 2, 7, 11.0, 20.0),  # in the place of the first
        (0, 2, 3, 8, 5.0, 5.0),
        (0, 3, 4, 9, 30.0, 30.0),  # the third person, where two are wanted
        (1, 4, 5, 7, 1.0, 1.0),
        (2, 5, 6, 7, 1.0, 1.0),
        (2, 6, 7, 8, 10.0, 10.0),
        (2, 7, 8, 9, 11.0, 11.0),
        (2, 8, 9, 7, 20.0, 20.0),  # again, and still the first person
    ]
    table = np.array(rows, ANSWER)
    for order in ([0, 1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 2, 1, 0], [2, 4, 8, 0, 6, 3, 1, 7, 5]):
        shuffled = table[order]
        found = [shuffled["annotation"][rows].tolist() for rows in choose(shuffled, 2)]
        assert found == [[3, 2, 5, 9, 7], [1, 6], [4, 8]]


@pytest.mark.parametrize("form", ["image", "scenario"])
def test_every_task_is_found_by_its_key_and_nothing_else_is(tmp_path, form):
    _, samples = samples_of(tmp_path, 3, form=form)
    numbers = range(len(samples))
    assert [samples.number(samples.place(n).key) for n in numbers] == list(numbers)
    for stranger in (
        None,
        "",
        "s003",
        "s003-i00",
        "s000-i10",
        "s0000",
        "s0000-i00",
        "s001-i1",
        "s001-i001",
        "x",
    ):
        assert samples.number(stranger) is None
    assert samples.number("s001" if form == "image" else "s001-i00") is None


def test_a_review_of_no_scenarios_is_complete(tmp_path):
    _, samples = samples_of(tmp_path, 0)
    standing = stand(samples, pull([], samples), {}, ())
    assert (standing.wanted, standing.given, standing.open, standing.saved) == (0, 0, 0, 0)
    assert len(standing.finished(Record("mark", "digest", project=1)).answer) == 0


def test_people_whose_accounts_were_deleted_stay_different_people(tmp_path):
    _, samples = samples_of(tmp_path, 1)
    label = [chosen("label", "image", "8")]
    annotations = tuple(Annotation(n, None, label, False, 1.0 + n, 1.0 + n) for n in (11, 12))
    pulled = pull([Task(1, "s000-i00", "", 5, False, annotations, None)], samples)
    assert len(pulled.answers) == len(pulled.people()) == 2 and not pulled.refused
