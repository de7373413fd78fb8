"""The progress of a run, and the runs in a store, as tables in the terminal."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from defuse_core.artifacts import Models
from defuse_core.errors import DefuseError, InputError, RunFileError, StoreError
from defuse_core.formatting import NONE, before_after, count_of, date_time, duration, size
from defuse_core.runs import CONTROL_NAMES, UNFINISHED, Run
from defuse_core.steps import STEPS
from defuse_core.store import Store
from services.cli.console import Terminal, new_table, print_fitting
from services.cli.tables import print_accuracy, print_text
from services.labeling.records import STATE_KEY

if TYPE_CHECKING:
    from defuse_core.report import Report

NAME_WIDTH = 20  # columns of a run's name that the list shows in one line
DROPPED_OF_RUNS = ("Last made (UTC)", "Time", "Data", "Test")  # left out, in turn, until the list fits
DROPPED_OF_STATUS = ("Made (UTC)", "Size", "Time")  # likewise
ARTEFACTS = {  # step -> what it has stored in the run when it is done, apart from the report
    "train": ("models",),
    "identify": ("psi",),
    "distill": ("scenarios",),
    "draw": ("gallery",),
    "review": ("votes", "verdicts"),
    "correct": ("corrections", "baseline", "sweep"),
    "report": ("evaluation",),
}


@dataclass(frozen=True)
class StepState:
    """The state of one step: "done", "under way", "stopped" (begun, and no driver works on the run), "waits for people"
    or "to do". `bytes` are of its artefacts, without shards, trials and checkpoints.
    """

    step: str
    state: str
    detail: str
    seconds: float | None
    bytes: int | None
    made: str | None


@dataclass(frozen=True)
class RunSummary:
    """What `defuse status --json` says of a run; None where it is not known yet."""

    run: str
    data: str | None = None
    step: str | None = None  # the first that is not done
    # of that step, as in StepState; "done" after the last one; "unreadable" or "unreadable run.yaml"
    state: str | None = None
    seconds: float | None = None  # of all steps so far
    made: str | None = None  # time of the last artefact, 2026-01-31T12:00:00Z
    accepted: int | None = None  # failure scenarios
    accuracy: dict[str, Any] | None = None  # as in report.json: before, baseline and defuse
    problem: str | None = None  # why the run or its report cannot be read

    @property
    def is_unreadable(self) -> bool:
        return self.state is not None and self.state.startswith("unreadable")


def step_states(run: Run) -> list[StepState]:
    """Return the state of each step, from what the run's store holds and whether a driver holds its lock.

    The first step that is not done has begun also where a driver works on the run and nothing of it is stored yet.
    """
    keys = set(run.store.list())
    entries = run.manifest().get("artefacts", {})
    is_locked = functools.cache(run.store.is_locked)  # asked only of an unfinished run
    states = [_step_state(run, step, keys, entries, is_locked) for step in STEPS]
    at = next((place for place, state in enumerate(states) if state.state != "done"), None)
    if at is not None and states[at].state == "to do" and is_locked():
        states[at] = replace(states[at], state="under way")
    return states


def _step_state(
    run: Run, step: str, keys: set[str], entries: dict[str, Any], is_locked: Callable[[], bool]
) -> StepState:
    names = ARTEFACTS[step]
    made = [name for name in names if f"{name}.safetensors" in keys]
    # an entry is written before its file
    known = [
        entry for name, entry in entries.items() if f"{name}.safetensors" in keys and entry["step"] == step
    ]
    is_done = len(made) == len(names) and (step != "report" or "report.json" in keys)
    detail = "" if is_done else _detail(run, step, keys)
    if is_done:
        state = "done"
    elif step == "review" and _waits_for_people(run, keys):
        state = "waits for people"
    elif made or known or detail:
        state = "under way" if is_locked() else "stopped"
    else:
        state = "to do"
    return StepState(
        step,
        state,
        detail,
        seconds=sum(entry["seconds"] for entry in known) if known else None,
        bytes=sum(entry["bytes"] for entry in known) if known else None,
        made=max((entry["made"] for entry in known), default=None),
    )


def _waits_for_people(run: Run, keys: set[str]) -> bool:
    """Whether people were asked, and the votes are not stored yet, as after `defuse review set --redo`."""
    asked = run.spec.review.annotators == "label-studio" and STATE_KEY in keys
    return asked and "votes.safetensors" not in keys


def _detail(run: Run, step: str, keys: set[str]) -> str:
    """Return the progress of an unfinished step: epochs kept, shards of Ψ, fine-tunings and controls begun."""
    if step == "train":
        return _epochs(run)
    if step == "identify":
        done = sum(key.startswith("psi/") for key in keys)
        return f"{done} of {count_of(_shards(run), 'shard')}" if done else ""
    if step == "correct":
        total = len(run.spec.correct.lambdas)
        sweeps = ("baseline", "defuse")
        begun = {name: sum(key.startswith(f"trials/{name}/") for key in keys) for name in sweeps}
        return ", ".join(f"{name} {count} of {total} λ begun" for name, count in begun.items() if count)
    # trials of controls outlast the sweep where a λ is added; those of the report before count until it is made again
    if step == "report" and "sweep.safetensors" in keys:
        controls = {key.split("/")[1] for key in keys if key.startswith("trials/")} & {*CONTROL_NAMES}
        return f"{count_of(len(controls), 'control')} begun" if controls else ""
    return ""


def _epochs(run: Run) -> str:
    from defuse_core.artifacts import Checkpoint
    from defuse_core.codec import decode

    trainings = {"classifier": run.spec.classifier.epochs, "vae": run.spec.vae.epochs}
    kept = []
    for name, epochs in trainings.items():
        key, shown = f"training/{name}.safetensors", "β-VAE" if name == "vae" else name
        try:
            done = len(decode(Checkpoint, run.store.read(key), key).history)
        except FileNotFoundError:
            continue
        except StoreError:  # as in training, which then begins again
            kept.append(f"{shown} begins again, its checkpoint is damaged")
        else:
            kept.append(f"{shown} {done} of {count_of(epochs, 'epoch')}")
    return ", ".join(kept)


def _shards(run: Run) -> int:
    from defuse_core.identify import shard_count

    models = run.load(Models)
    return 0 if models is None else shard_count(models.images["train"], run.spec.identify)


def summarize_runs(store: Store) -> list[RunSummary]:
    """Return the summary of each run in a store, also of those that cannot be read."""
    return [found for name in store.folders() if (found := _summary(store, name)) is not None]


def _summary(store: Store, name: str) -> RunSummary | None:
    """Return the summary of a folder in a store; None where it is no run."""
    try:
        if not store.exists(f"{name}/run.yaml"):
            return None
        run = Run.open(store, name)
        return summarize_run(run, step_states(run))
    except DefuseError as error:
        state = "unreadable run.yaml" if isinstance(error, RunFileError) else "unreadable"
        return RunSummary(name, state=state, problem=str(error))


def summarize_run(run: Run, states: list[StepState]) -> RunSummary:
    """Return how far a run is, and its result once `report.json` is written. Raises StoreError for a damaged file."""
    report = _stored_report(run)
    at = next((state for state in states if state.state != "done"), None)
    return RunSummary(
        run.name,
        run.spec.data.name,
        None if at is None else at.step,
        "done" if at is None else at.state,
        seconds=sum(state.seconds or 0 for state in states),
        made=max((state.made for state in states if state.made), default=None),
        accepted=None if report is None else report.scenarios.accepted,
        accuracy=None if report is None else report.accuracy.model_dump(mode="json"),
        problem=_unread_report(run) if report is None and run.store.exists("report.json") else None,
    )


def print_status(run: Run, console: Console | None = None) -> None:
    """Print the state, the time and the size of each step of a run, the β-VAE's health, and the result."""
    console = console or Terminal()
    states = step_states(run)
    is_finished = all(state.state == "done" for state in states)
    known = [state.seconds for state in states if state.seconds is not None]
    # the first step has no time until its end
    spent = f"{duration(sum(known))} {'in all' if is_finished else 'so far'} · " if known else ""
    console.print(Text(f"{run.name} · {run.spec.data.name} · seed {run.spec.seed}", style="bold"))
    print_fitting(console, _steps_table(states), DROPPED_OF_STATUS)
    if models := run.load(Models):
        _print_health(console, run, models)
    if report := _stored_report(run):
        print_text(console, report.headline, "bold")
        console.print()
        print_accuracy(report, console)
    elif run.store.exists("report.json"):
        print_text(console, _unread_report(run), "yellow", console.width)
    if not is_finished and "under way" not in {state.state for state in states}:
        print_text(console, f"The run {UNFINISHED}.", "")
    console.print(Text(f"{spent}{run.store.address}", style="dim", overflow="fold"))


def _steps_table(states: Sequence[StepState]) -> Table:
    table = new_table(None, ("Step", "State", "Made (UTC)", "Time", "Size"), texts=2)
    table.columns[1].no_wrap = False
    for state in states:
        took = NONE if state.seconds is None else duration(state.seconds)
        held = NONE if state.bytes is None else size(state.bytes)
        table.add_row(state.step, _state_text(state), date_time(state.made or ""), took, held)
    return table


def _print_health(console: Console, run: Run, models: Models) -> None:
    from defuse_core.evaluation.health import health_figures, with_measured_health

    health = with_measured_health(run, models).health
    figures = health_figures(health, models.classes)
    text = f"β-VAE: {health.verdict}. {figures[0].upper()}{figures[1:]}."
    print_text(console, text, "" if health.verdict == "fit" else "yellow")


def _stored_report(run: Run) -> Report | None:
    """Return the run's report.json, or None where it is not written yet or another version of Defuse wrote it."""
    from defuse_core.report import parse_report

    try:
        return parse_report(run.store.read("report.json"), f"{run.store.address}/report.json")
    except (FileNotFoundError, InputError):
        return None


def _unread_report(run: Run) -> str:
    return (
        f"{run.name}: report.json is another version's, or damaged; `{run.command('report')}` writes it again or "
        "says why not"
    )


def _state_text(state: StepState) -> Text:
    style = {"done": "green", "to do": "dim"}.get(state.state, "yellow")
    return Text(f"{state.state}: {state.detail}" if state.detail else state.state, style=style)


def print_runs(store: Store, console: Console | None = None) -> None:
    console = console or Terminal()
    runs = summarize_runs(store)
    if not runs:
        console.print(Text(f"no runs in {store.address}", overflow="fold"))
        return
    print_fitting(console, _runs_table(runs), DROPPED_OF_RUNS)
    for run in sorted(runs, key=lambda run: run.is_unreadable):
        if run.problem is not None:
            print_text(console, run.problem, "red" if run.is_unreadable else "yellow", console.width)


def _runs_table(runs: Sequence[RunSummary]) -> Table:
    columns = ("Run", "Data", "At", "Scenarios", "Test", "Last made (UTC)", "Time")
    table = new_table(None, columns, texts=3)
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"  # shown whole, for use in a command
    table.columns[0].min_width = min(NAME_WIDTH, max(len(run.run) for run in runs))
    for run in runs:
        table.add_row(*_run_row(run))
    return table


def _run_row(run: RunSummary) -> tuple[str | Text, ...]:
    if run.step is not None:
        state = Text(f"{run.step}, {run.state}", style="yellow")
    else:
        state = Text(run.state or "", style="red" if run.is_unreadable else "green")
    seconds = NONE if run.seconds is None else duration(run.seconds)
    return run.run, run.data or NONE, state, *_outcome(run), date_time(run.made or ""), seconds


def _outcome(run: RunSummary) -> tuple[str, str]:
    """Return the accepted scenarios with the accuracy on them, and the accuracy on the test set: before → after."""
    if run.accuracy is None:
        return NONE, NONE
    before, after = run.accuracy["before"], run.accuracy["defuse"]
    scenarios = str(run.accepted)
    if run.accepted:
        scenarios += f": {before_after(before['scenario'], after['scenario'], 0)}"
    test = before_after(before["test"], after["test"])
    return scenarios, test
