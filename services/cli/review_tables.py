"""What `defuse review status` prints: the answers so far, or the result that is stored, as tables or as JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from defuse_core.formatting import count_of, percent
from services.cli.console import new_table, print_table

if TYPE_CHECKING:
    from defuse_core.artifacts import Gallery, Verdicts, Votes
    from defuse_core.runs import Run
    from services.labeling.annotations import AnswerChanges
    from services.labeling.status import ReviewStatus
    from services.labeling.tasks import TaskSubject

ROWS_SHOWN = 20


@dataclass(frozen=True)
class ScenarioSummary:
    """What `defuse review status --json` says of one scenario, by the answers so far and by decisions above them."""

    scenario: int | None  # None: inputs from traffic that lie in no scenario
    accepted: bool | None  # None of traffic: what was served wrongly is counted, and nothing is decided
    label: str | None  # the class of an accepted scenario
    reason: str
    decided: bool  # no further answer is asked for
    final: bool  # nor can answers to other scenarios change the verdict
    missing: int  # answers


@dataclass(frozen=True)
class ReviewSummary:
    """What `defuse review status --json` says of a review."""

    run: str
    closed: bool  # the votes are stored, and no answer is taken in any more
    given: int  # answers that count: to images, or with review.form: scenario to pages
    wanted: int  # answers that people still have to give
    annotators: dict[str, int]  # answers of each
    agreement: float | None  # mean share of an image's votes for its most chosen label
    scenarios: tuple[ScenarioSummary, ...]
    label_at: str | None = None  # None once it is closed
    invitation: str | None = None  # where annotators get an account
    not_counted: int = 0  # answers
    skipped: tuple[str, ...] = ()  # addresses of skipped or unreadable tasks that lack answers
    # answers added, changed and deleted after the votes; empty where nobody looked
    changes: dict[str, int] = field(default_factory=dict)
    problem: str | None = None  # why the changes are not known


def summarize_result(
    name: str,
    gallery: Gallery,
    votes: Votes,
    verdicts: Verdicts,
    changes: AnswerChanges | None,
    unknown: str | None,
) -> ReviewSummary:
    """Return the summary of a review whose votes are stored; `changes` as for print_closed."""
    counts, every = _answers_by_annotator(votes), [True] * len(gallery)
    return ReviewSummary(
        run=name,
        closed=True,
        given=counts.total(),
        wanted=0,
        annotators=dict(counts),
        agreement=_mean_agreement(verdicts),
        scenarios=_scenarios(gallery, verdicts, every, every, [0] * len(gallery)),
        changes={} if changes is None else asdict(changes),
        problem=unknown,
    )


def _answers_by_annotator(votes: Votes) -> Counter[str]:
    """Return how many tasks each annotator answered: images, or with review.form: scenario pages."""
    rows = zip(votes.annotator.tolist(), votes.scenario.tolist(), votes.image.tolist(), strict=True)
    is_page = votes.notes.get("form") == "scenario"
    tasks = {(annotator, scenario, 0 if is_page else image) for annotator, scenario, image in rows}
    return Counter(votes.annotators[annotator] for annotator, *_ in sorted(tasks))  # two may have one name


def summarize_status(name: str, status: ReviewStatus, task_url: Callable[[int], str]) -> ReviewSummary:
    """Return the summary of a review whose votes are not stored yet."""
    missing = status.missing_per_task.sum(axis=1) * ~status.decided
    verdicts = status.verdicts()
    return ReviewSummary(
        run=name,
        closed=False,
        given=status.given,
        wanted=status.outstanding,
        annotators=status.per_annotator(),
        agreement=_mean_agreement(verdicts),
        scenarios=_scenarios(
            status.tasks.gallery,
            verdicts,
            status.decided.tolist(),
            (status.decided & ~status.provisional).tolist(),
            missing.tolist(),
        ),
        not_counted=len(status.pulled.discarded),
        skipped=tuple(task_url(skip.task) for skip in status.blocking_skips()),
    )


def _scenarios(
    gallery: Gallery,
    verdicts: Verdicts,
    decided: Sequence[bool],
    final: Sequence[bool],
    missing: Sequence[int],
) -> tuple[ScenarioSummary, ...]:
    is_traffic = gallery.failure is not None
    accepted = set() if is_traffic else set(verdicts.accepted.tolist())
    return tuple(
        ScenarioSummary(
            scenario=_scenario_number(gallery, scenario),
            accepted=None if is_traffic else scenario in accepted,
            label=gallery.classes[verdicts.labels[scenario]] if scenario in accepted else None,
            reason=reason,
            decided=decided[scenario],
            final=final[scenario],
            missing=missing[scenario],
        )
        for scenario, reason in enumerate(_findings(gallery, verdicts))
    )


def _findings(gallery: Gallery, verdicts: Verdicts) -> Sequence[str]:
    """Return the reason of each verdict; of traffic, where nothing is decided, how often the served model is wrong."""
    if gallery.failure is None:
        return verdicts.reasons
    from defuse_core.review.verdicts import share_misclassified  # imports scipy

    counts = zip(verdicts.misclassified.tolist(), verdicts.labelled.tolist(), strict=True)
    return [share_misclassified(wrong, total) if total else "no image has a label" for wrong, total in counts]


def print_result(gallery: Gallery, votes: Votes, verdicts: Verdicts, console: Console) -> None:
    console.print(f"{count_of(len(votes.answer), 'vote')} of {votes.answered_by} stored.")
    for number, count in sorted(Counter(votes.annotator.tolist()).items()):
        console.print(f"  {votes.annotators[number]}: {count}", highlight=False)
    _print_agreement("Agreement", verdicts, console)
    table = _table(gallery, "verdict" if gallery.failure is None else "found")
    for scenario, reason in enumerate(_findings(gallery, verdicts)):
        table.add_row(*_scenario_cells(gallery, scenario), reason)
    print_table(console, table)


def print_status(run: Run, status: ReviewStatus, console: Console) -> None:
    """Print answers, annotators, agreement, scenarios, and discarded annotations."""
    console.print(f"{status.given:,} of {status.requested:,} answers are in; {status.still_wanted}.")
    if status.stops_when_sure:
        sure, certainty = int(status.sure.sum()), status.tasks.review.certainty
        console.print(f"{sure} of {status.sure.size} images are sure (review.certainty: {certainty:g}).")
    if status.not_majority:
        console.print(
            f"CROWDLAB gives {count_of(status.not_majority, 'image')} a label that is not the one most people chose, "
            "or that breaks a tie; at least two people chose it.",
            soft_wrap=True,
        )
    if status.saved:
        reason = "their images are sure or their" if status.stops_when_sure else "their"
        console.print(f"{status.saved} more are not needed: {reason} scenarios are decided.")
    for name, count in status.per_annotator().items():
        console.print(f"  {name}: {count}", highlight=False)
    if way_out := status.way_out(run):
        console.print(f"{way_out[0].upper()}{way_out[1:]}.", soft_wrap=True)
    _print_agreement("Agreement so far", status.verdicts(), console)
    if status.tasks.review.consensus == "crowdlab" and status.consensus is None:
        print_by_majority(console)
    print_table(console, _scenario_table(status))
    _print_discarded(status, console)


def print_by_majority(console: Console) -> None:
    """Print that the verdicts are not those of review.consensus: crowdlab, since the models' answers are missing."""
    console.print(
        "The verdicts below are by majority; `defuse run` decides with review.consensus: crowdlab, and stores the "
        "reference models' answers, before which no image is sure.",
        soft_wrap=True,
    )


def _mean_agreement(verdicts: Verdicts) -> float | None:
    """Return the mean agreement; None where no image has two votes."""
    import numpy as np

    known = verdicts.agreement[~np.isnan(verdicts.agreement)]
    return float(known.mean()) if known.size else None


def _print_agreement(title: str, verdicts: Verdicts, console: Console) -> None:
    if (mean := _mean_agreement(verdicts)) is not None:
        console.print(f"{title}: {percent(mean)} of an image's votes are for its most chosen label.")


def _scenario_table(status: ReviewStatus) -> Table:
    """Return a row per scenario; for inputs from traffic with the share that the server expects to be wrong."""
    gallery = status.tasks.gallery
    table = _table(gallery, "state", "answers missing")
    verdicts = status.verdicts()
    reasons = _findings(gallery, verdicts)
    states = zip(status.decided, status.provisional, strict=True)
    for scenario, (decided, provisional) in enumerate(states):
        state = "open"
        if decided:
            state = (verdicts.reasons if status.overridden[scenario] else reasons)[scenario]
        if provisional:
            state = f"its answers are in; so far {state}"
        missing = int(status.missing_per_task[scenario].sum())
        table.add_row(*_scenario_cells(gallery, scenario, f"{missing:,}"), state)
    return table


def _table(gallery: Gallery, last: str, *beside: str) -> Table:
    """Return a table without rows; `last` is its last column, of text, and `beside` are those beside the scenario's."""
    expected = () if gallery.failure is None else ("expected wrong",)
    table = new_table(None, ("scenario", *beside, *expected, last), texts=0)
    table.columns[-1].justify, table.columns[-1].no_wrap = "left", False
    return table


def _scenario_cells(gallery: Gallery, scenario: int, *beside: str) -> list[str]:
    number = _scenario_number(gallery, scenario)
    cells = ["none" if number is None else str(number), *beside]
    if gallery.failure is not None:
        share = float(gallery.failure[scenario].mean())
        cells.append("unknown" if math.isnan(share) else percent(share, 0))
    return cells


def _scenario_number(gallery: Gallery, scenario: int) -> int | None:
    """Return the number under which people see a scenario; None for inputs from traffic that lie in none."""
    from defuse_core.artifacts import NO_SCENARIO

    number = gallery.number(scenario)
    return None if number == NO_SCENARIO else number


def _print_discarded(status: ReviewStatus, console: Console) -> None:
    for discarded in status.pulled.discarded[:ROWS_SHOWN]:
        place = _place(status, discarded.subject)
        console.print(
            f"Not counted: {status.name_of(discarded)} on {place}: {discarded.reason}", soft_wrap=True
        )
    more = len(status.pulled.discarded) - ROWS_SHOWN
    if more > 0:
        console.print(f"... and {more} more that are not counted")
    if status.pulled.foreign:
        foreign = count_of(status.pulled.foreign, "task")
        console.print(f"{foreign} that Defuse did not import: answers there are not counted.")


def print_skips(run: Run, status: ReviewStatus, task_url: Callable[[int], str], console: Console) -> None:
    """Print the skips and unreadable answers that keep a task from its answers, and how to resolve them."""
    skips = status.blocking_skips()
    for skip in skips[:ROWS_SHOWN]:
        place = _place(status, status.tasks.subject(skip.index))
        what = f"Not readable, {skip.reason}" if skip.reason else "Skipped"
        console.print(f"{what}: {status.name_of(skip)} on {place}, {task_url(skip.task)}", soft_wrap=True)
    if skips:
        console.print(
            f"{len(skips)} skipped or not readable, in tasks that lack answers. Label Studio does not hand these out "
            f"to the same people again: let others answer, or `{run.command('review push', '--repair')}` "
            "deletes the skips and the unreadable answers (end a waiting `defuse run --wait` first; nothing is lost).",
            soft_wrap=True,
        )


def print_closed(run: Run, changes: AnswerChanges | None, unknown: str | None, console: Console) -> None:
    """Print that answers are not taken in any more, and people's changes since, or why these are `unknown`."""
    console.print(f"Voting is closed: the votes of {run.name} are stored.")
    if unknown is not None:
        console.print(f"It is unknown whether answers have come since then: {unknown}", soft_wrap=True)
    if changes is not None and str(changes):
        lost = ", and loses those that were deleted" if changes.deleted else ""
        command = run.command("review reopen", *(["--discard"] if changes.deleted else []))
        console.print(
            f"{changes} since then, not counted; `{command}` uses the answers as they are now{lost}.",
            soft_wrap=True,
        )


def _place(status: ReviewStatus, subject: TaskSubject) -> str:
    number = _scenario_number(status.tasks.gallery, subject.scenario)
    place = "no scenario" if number is None else f"scenario {number}"
    return place if subject.image is None else f"{place}, image {subject.image}"
