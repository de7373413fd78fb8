"""What `defuse review status` prints, counted by hand for a review of three scenarios of two images each."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from label_studio_live import review_run
from planted_review import STATE, annotation, task_of
from rich.console import Console

from defuse_core.artifacts import NO_SCENARIO, Gallery, Override, Votes
from defuse_core.review.verdicts import decide_verdicts
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from services.cli.review_tables import (
    ROWS_SHOWN,
    print_closed,
    print_result,
    print_skips,
    print_status,
    summarize_result,
)
from services.labeling.annotations import AnswerChanges, read_annotations
from services.labeling.records import Task
from services.labeling.status import ReviewStatus, review_status
from services.labeling.tasks import ReviewTasks
from tests.conftest import tiny
from tests.sample_components import review_section

NAMES = {1: "Ada", 2: "Ben", 3: "Cem"}


def gallery_of_three() -> Gallery:
    """Of inputs from traffic: component 7, those of no scenario, and component 3."""
    failure = np.array([[0.2, 0.3], [np.nan, np.nan], [0.4, 0.6]])
    images, codes = np.zeros((3, 2, 1, 8, 8), np.float32), np.zeros((3, 2, 2), np.float32)
    classes = tuple(str(label) for label in range(10))
    return Gallery(images, codes, np.zeros((3, 2), np.int64), classes, (7, NO_SCENARIO, 3), failure)


def status_of(
    folder: Path, answers: dict[int, str], odd: int = 0, skips: int = 0, foreign: int = 0
) -> ReviewStatus:
    """Return the status after these answers, of Ada and then Ben, to tasks; scenario 3 was decided above the vote.

    `odd` answers of Cem to task 4 name no class, and he skipped task 3 `skips` times, and task 0 once. `foreign` tasks
    with an answer each were added by hand.
    """
    gallery = gallery_of_three()
    tasks = ReviewTasks(gallery, review_run(folder, gallery, images=2, answers_per_task=2).spec.review)
    given = {
        task: [annotation(10 * task + n, n + 1, choice) for n, choice in enumerate(choices)]
        for task, choices in answers.items()
    }
    given.setdefault(4, []).extend(annotation(1000 + n, 3, "zebra") for n in range(odd))
    given.setdefault(3, []).extend(annotation(2000 + n, 3, None) for n in range(skips))
    given.setdefault(0, []).extend(annotation(3000, 3, None) for _ in range(min(skips, 1)))
    found = [task_of(tasks, task, *answers) for task, answers in given.items()]
    others = [
        Task(900 + n, None, None, 1, False, (annotation(900 + n, 1, "8"),), None) for n in range(foreign)
    ]
    pulled = read_annotations([*found, *others], tasks)
    return review_status(
        tasks, pulled, STATE, NAMES, [Override(2, None, "Ada", "blurred", "2026-01-31T12:00:00Z")]
    )


def shown(show: Callable[[Console], object]) -> list[str]:
    """Return the lines that were printed, with single spaces."""
    console = Console(width=200, file=io.StringIO(), markup=False)
    show(console)
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


def test_tasks_that_were_added_by_hand_are_told_and_their_answers_not_counted(tmp_path: Path) -> None:
    for foreign, told in ((0, []), (1, ["1 task"]), (2, ["2 tasks"])):
        status = status_of(tmp_path / str(foreign), {0: "88"}, foreign=foreign)
        lines = shown(lambda console, status=status: print_status(mine(tmp_path), status, console))
        assert lines[0].startswith("2 of 12 answers")
        found = [line for line in lines if "did not import" in line]
        assert found == [
            f"{each} that Defuse did not import: answers there are not counted." for each in told
        ]


def test_the_answers_so_far_are_counted_and_each_scenario_has_its_state(tmp_path: Path) -> None:
    status = status_of(tmp_path, {0: "88", 1: "88", 2: "89", 3: "8"})
    lines = shown(lambda console: print_status(mine(tmp_path), status, console))
    assert lines[:5] == [
        "7 of 12 answers are in; 1 are still wanted.",
        "4 more are not needed: their scenarios are decided.",
        "Ada: 4",
        "Ben: 3",
        "Agreement so far: 83.3 % of an image's votes are for its most chosen label.",
    ]
    assert [line for line in lines[5:] if line and "─" not in line] == [
        "scenario answers missing expected wrong state",
        "7 0 25 % 100 % of 2 labelled images are misclassified",
        "none 1 unknown open",
        "3 4 50 % rejected by Ada: blurred",
    ]


def test_nothing_is_said_of_an_agreement_before_an_image_has_two_votes(tmp_path: Path) -> None:
    status = status_of(tmp_path, {0: "8", 3: "8"})
    assert not [
        line
        for line in shown(lambda console: print_status(mine(tmp_path), status, console))
        if "Agreement" in line
    ]


def test_the_way_out_of_a_review_of_traffic_is_in_the_commands_of_that_review(tmp_path: Path) -> None:
    run = Run(FolderStore(tmp_path), "mine/traffic-1", tiny())
    status = status_of(tmp_path, dict.fromkeys(range(6), "8"))
    assert shown(lambda console: print_status(run, status, console))[3] == (
        "Of those who answered so far, nobody can still answer; if nobody else will, `defuse review push "
        f"mine/traffic-1 --set review.answers_per_task=1 --store {tmp_path}`, then `defuse review status "
        f"mine/traffic-1 --store {tmp_path}`, ends the review with fewer answers."
    )


@pytest.mark.parametrize("beyond", [0, 1, 5])
def test_the_first_answers_that_do_not_count_are_listed_and_the_others_counted(
    beyond: int, tmp_path: Path
) -> None:
    status = status_of(tmp_path, {0: "8"}, odd=ROWS_SHOWN + beyond)
    lines = shown(lambda console: print_status(mine(tmp_path), status, console))
    listed = [line for line in lines if line.startswith("Not counted: Cem on scenario 3, image 0: ")]
    assert len(listed) == ROWS_SHOWN and "'zebra' is not one of the classes" in listed[0]
    assert [line for line in lines if "more that" in line] == (
        [f"... and {beyond} more that are not counted"] if beyond else []
    )


def test_the_first_skips_of_tasks_that_lack_answers_are_listed_and_all_counted(tmp_path: Path) -> None:
    def skips_of(status: ReviewStatus) -> list[str]:
        return shown(
            lambda console: print_skips(mine(tmp_path), status, lambda task: f"/task/{task}", console)
        )

    full = {0: "88"}
    lines = skips_of(status_of(tmp_path, full, skips=ROWS_SHOWN + 2))
    assert lines[:-1] == ["Skipped: Cem on no scenario, image 1, /task/103"] * ROWS_SHOWN
    assert lines[-1].startswith(f"{ROWS_SHOWN + 2} skipped or not readable, in tasks that lack answers.")
    assert skips_of(status_of(tmp_path / "none", full)) == []
    odd = status_of(tmp_path / "odd", full, odd=1)
    unreadable, _ = skips_of(replace(odd, overrides=()))
    assert unreadable.startswith("Not readable, the choice 'zebra") and "Cem on scenario 3" in unreadable


@pytest.mark.parametrize("traffic", [True, False])
def test_stored_votes_are_counted_by_annotator_with_the_verdicts(traffic: bool) -> None:
    rows = [(0, 0, 0, 8), (0, 0, 1, 8), (0, 1, 1, 8), (0, 1, 2, 8), (2, 0, 1, 0), (2, 0, 2, 3), (2, 0, 0, 0)]
    columns = np.array(rows, np.int64).T
    votes = Votes(*columns, np.zeros(len(rows)), ("Ada", "[b]Ben", "Cem"), "people", {})
    gallery = gallery_of_three()
    verdicts = decide_verdicts(review_section(), gallery, votes)
    gallery = gallery if traffic else replace(gallery, failure=None)
    lines = shown(lambda console: print_result(gallery, votes, verdicts, console))
    assert lines[:4] == ["7 votes of people stored.", "Ada: 2", "[b]Ben: 3", "Cem: 2"]
    assert lines[4] == "Agreement: 88.9 % of an image's votes are for its most chosen label."
    table = [line for line in lines[5:] if line and "─" not in line]
    expected = [
        "scenario expected wrong found",  # and nothing is decided
        "7 25 % 100 % of 2 labelled images are misclassified",
        "none unknown no image has a label",
        "3 50 % 0 % of 1 labelled image is misclassified",
    ]
    if not traffic:
        expected = [
            "scenario verdict",
            *(f"{n} {why}" for n, why in zip((7, "none", 3), verdicts.reasons, strict=True)),
        ]
    assert table == expected


@pytest.mark.parametrize(("form", "answers"), [("image", 5), ("scenario", 3)])
def test_answers_of_people_with_one_name_are_added_and_a_page_is_one_answer(form: str, answers: int) -> None:
    rows = [(0, 0, 0, 8), (0, 1, 0, 8), (2, 0, 0, 3), (0, 0, 1, 8), (0, 1, 1, 8)]
    columns = np.array(rows, np.int64).T
    votes = Votes(*columns, np.zeros(len(rows)), ("Ana", "Ana"), "people", {"form": form})
    gallery = gallery_of_three()
    found = summarize_result(
        "mine", gallery, votes, decide_verdicts(review_section(), gallery, votes), None, "no server"
    )
    assert (found.given, found.annotators, found.problem) == (answers, {"Ana": answers}, "no server")
    assert [scenario.scenario for scenario in found.scenarios] == [7, None, 3]


def mine(folder: Path) -> Run:
    return Run(FolderStore(folder), "mine", tiny())


def test_a_closed_vote_says_what_came_since_and_where_that_is_not_known(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = mine(tmp_path / "runs")  # which commands take without --store
    closed = "Voting is closed: the votes of mine are stored."
    since = " since then, not counted; `defuse review reopen mine{}` uses the answers as they are now"
    given, lost = AnswerChanges(added=2), AnswerChanges(added=2, deleted=1)
    unknown = "It is unknown whether answers have come since then: no server"
    assert shown(lambda console: print_closed(run, AnswerChanges(), None, console)) == [closed]
    assert shown(lambda console: print_closed(run, given, None, console)) == [
        closed,
        f"2 given{since.format('')}.",
    ]
    assert shown(lambda console: print_closed(run, lost, None, console)) == [
        closed,
        f"2 given, 1 deleted{since.format(' --discard')}, and loses those that were deleted.",
    ]
    assert shown(lambda console: print_closed(run, None, "no server", console)) == [
        closed,
        unknown,
    ]
