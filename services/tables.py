"""The results and the progress of a run, as tables in the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from defuse_core.artifacts import Models
from defuse_core.config import STEPS
from defuse_core.errors import DefuseError, InputError, RunFileError, StoreError
from defuse_core.report.formatting import (
    NONE,
    caveats,
    change,
    count_of,
    date_time,
    duration,
    headline,
    interval,
    is_low,
    lam_text,
    percent,
    size,
    spread,
    unbroken,
)
from defuse_core.runs import Run
from defuse_core.store import Store
from services.console import Terminal

if TYPE_CHECKING:
    from defuse_core.report import Report
    from defuse_core.report.schema import EvidenceFigures

FIGURES_WIDTH = 61  # columns of the terminal that the figures in the table of scenarios need
WIDE = 110  # columns from which the list of runs also shows when and how long
ARTEFACTS = {  # step -> what it stores in the run
    "train": ("models",),
    "identify": ("psi",),
    "distill": ("scenarios",),
    "draw": ("gallery",),
    "review": ("votes", "verdicts"),
    "correct": ("corrections", "baseline", "sweep"),
    "report": ("evaluation",),
}


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the report: Figure 4, the scenarios, Figure 6, and one line each on Ψ and the β-VAE."""
    console = console or Terminal()
    _print_text(console, headline(report), "bold")
    for warning in caveats(report):
        _print_text(console, warning, "yellow")
    console.print(_accuracy_table(report))
    if report.evidence is not None:
        console.print(_evidence_table(report.evidence))
    if report.scenarios.accepted:
        console.print(_scenario_table(report, console.width))
    console.print(_agreement_table(report))
    for line in _lines(report):
        _print_text(console, line, "dim")


def _print_text(console: Console, text: str, style: str) -> None:
    """Print text in lines that do not break before a percent sign."""
    lines = textwrap.wrap(unbroken(text), console.width)
    console.print(Text("\n".join(lines).replace("\u00a0", " "), style=style), soft_wrap=True)


def _table(title: str | None, columns: Sequence[str], texts: int = 1) -> Table:
    """Return an empty table whose first `texts` columns hold text, and the others numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for place, column in enumerate(columns):
        if place < texts:
            table.add_column(column, no_wrap=True, overflow="ellipsis")
        else:
            table.add_column(column, justify="right", no_wrap=True)
    return table


def _add(table: Table, *cells: str | Text) -> None:
    """Add a row; square brackets in a class name are text, not rich's markup."""
    table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in cells))


def _accuracy_table(report: Report) -> Table:
    table = _table("Accuracy (Figure 4)", ("", "Scenarios", "Validation", "Test", "Scenario images"))
    accuracy = report.accuracy
    rows = (("Before", accuracy.before), ("Failures alone", accuracy.baseline), ("Defuse", accuracy.defuse))
    corrected = report.scenarios.accepted if report.chosen else 0
    for name, row in rows:
        number = str(corrected) if name == "Defuse" else NONE
        shares = (percent(row.validation, 2), percent(row.test, 2), percent(row.scenario))
        _add(table, name, number, *shares)
    return table


def _evidence_table(evidence: EvidenceFigures) -> Table:
    """Return the accuracies that independent models confirm, each with its 95 % interval."""
    title = f"Evidence of {count_of(evidence.judges.count, 'judge')} (plain: further training with λ = 0)"
    table = _table(title, ("By own label", "Before", "Plain", "Defuse"))
    own, left_out, real = evidence.own_label, evidence.left_out, evidence.real_failures
    rows = (
        ("scenario images", own.before, own.plain, own.defuse),
        ("left-out scenarios", left_out.before, None, left_out.defuse),
        (f"{evidence.real_failure_images:,} real failures", real.before, real.plain, real.defuse),
    )
    for name, *shares in rows:
        _add(table, name, *(NONE if share is None else interval(share, 0) for share in shares))
    return table


def _scenario_table(report: Report, width: int) -> Table:
    columns = ("", "Label", "Mistaken for", "Seen", "Purity", "Agreement", "Before", "Defuse")
    table = _table("Failure scenarios", columns, texts=4)
    table.caption = "Seen: the classifier is wrong on the training images behind it, too."
    table.caption_justify = "left"
    for row in report.scenarios.list:
        if row.accepted:
            purity = Text(percent(row.purity, 0), style="yellow" if is_low(row.purity) else "")
            names = (str(row.number), *(_cut(name or NONE, width) for name in (row.label, row.mistaken_for)))
            seen = "yes" if row.seen_in_training_images else NONE
            figures = (percent(row.agreement, 0), percent(row.before), percent(row.defuse))
            _add(table, *names, seen, purity, *figures)
    return table


def _cut(name: str, width: int) -> str:
    """Return a class name, shortened in the middle so that two of them fit beside the figures."""
    limit = max(6, (width - FIGURES_WIDTH) // 2)
    return name if len(name) <= limit else f"{name[: limit // 2 - 1]}…{name[limit // 2 - limit :]}"


def _agreement_table(report: Report) -> Table:
    agreement = report.agreement
    table = _table("Agreement of the annotators (Figure 6)", ("", "Images", "Agreement"))
    parts = (
        ("Failure scenarios", agreement.scenario),
        ("Other components", agreement.other),
        ("All", agreement.all),
    )
    for name, mean in parts:
        _add(table, name, f"{mean.images:,}", spread(mean))
    return table


def _lines(report: Report) -> list[str]:
    psi, vae, mixture = report.psi, report.vae, report.mixture
    lines = [
        f"Ψ: {count_of(psi.codes, 'code')} from {percent(psi.images_with_any)} "
        f"of {count_of(psi.images, 'image')}; "
        f"{percent(psi.zero_noise_flip_rate)} of the images are wrong without noise.",
        *_screen(report),
        f"β-VAE: {_reconstructions(report)}; "
        f"{vae.collapsed} of {count_of(len(vae.kl_per_dimension), 'dimension')} collapsed; "
        f"squared error {vae.reconstruction:.4f} per pixel.",
        *_verdicts(report),
    ]
    if report.chosen is not None:
        moved = change(report.accuracy.before.test, report.accuracy.defuse.test)
        cost = f"; {moved} points on the test set" if moved else ""
        lines.append(f"Chosen: λ = {lam_text(report.chosen.lam)}, epoch {report.chosen.epoch}{cost}.")
    if not mixture.converged:
        rest = ""
        if mixture.last_change is not None:
            rest = f"; its bound still changed by {mixture.last_change:.3g} nats"
        lines.append(f"The mixture did NOT converge in {count_of(mixture.iterations, 'iteration')}{rest}.")
    if report.watch is not None:
        lines.append(f"Watch: {report.watch.verdict}")
    lines += [f"Failed: {t.sweep}, λ = {lam_text(t.lam)}: {t.cause}" for t in report.failed_trials]
    return lines


def _screen(report: Report) -> list[str]:
    """Return what screening keeps, as a line; none without a screen, and for a run of an earlier version."""
    psi = report.psi
    if not psi.screened or psi.kept_share is None:
        return []
    line = f"Ψ keeps {percent(psi.kept_share)} of {count_of(psi.failing_draws or 0, 'failing draw')}"
    if report.evidence is not None and report.evidence.screen_recall.value is not None:
        line += f"; the screen would keep {interval(report.evidence.screen_recall, 0)} of the real failures"
    return [f"{line}."]


def _verdicts(report: Report) -> list[str]:
    """Return how far the accepted scenarios can be trusted, as a line; none where neither figure exists."""
    false, agreement = report.scenarios.expected_false_share, report.scenarios.tuning_agreement
    parts = [] if false is None else [f"{percent(false)} of the accepted are expected to be false"]
    if agreement is not None:
        parts.append(f"the reference models see the label in {percent(agreement)} of the draws to tune on")
    return [f"Scenarios: {'; '.join(parts)}."] if parts else []


def _reconstructions(report: Report) -> str:
    health = report.vae.health
    if health is None or not health.anchored:
        return f"{percent(report.vae.reconstruction_flips)} of the reconstructions are misclassified"
    kept = percent(health.kept_right)
    return f"{kept} of the answers of the {health.judged_by} outlast the noise (anchored decoding)"


@dataclass(frozen=True)
class StepState:
    """The state of one step: "done", "under way", "waits for people" or "to do"."""

    step: str
    state: str
    detail: str
    seconds: float | None
    bytes: int | None
    made: str


def step_states(run: Run) -> list[StepState]:
    """Return the state of each step, from what the run's store holds."""
    keys = set(run.store.list())
    entries = run.manifest().get("artefacts", {})
    return [_step_state(run, step, keys, entries) for step in STEPS]


def _step_state(run: Run, step: str, keys: set[str], entries: dict[str, Any]) -> StepState:
    names = ARTEFACTS[step]
    made = [name for name in names if f"{name}.safetensors" in keys]
    known = [entries[name] for name in made if name in entries]
    detail = _detail(run, step, keys)
    if len(made) == len(names) and (step != "report" or "report.json" in keys):
        state, detail = "done", ""
    elif step == "review" and run.spec.review.annotators == "label-studio" and "gallery.safetensors" in keys:
        state = "waits for people"
    else:
        state = "under way" if made or detail else "to do"
    return StepState(
        step,
        state,
        detail,
        seconds=sum(entry["seconds"] for entry in known) if known else None,
        bytes=sum(entry["bytes"] for entry in known) if known else None,
        made=max((entry["made"] for entry in known), default=""),
    )


def _detail(run: Run, step: str, keys: set[str]) -> str:
    """Return the progress of an unfinished step: epochs kept, shards of Ψ, fine-tunings begun."""
    if step == "train":
        return _epochs(run) if "models.safetensors" not in keys else ""
    if step == "identify":
        done = sum(key.startswith("psi/") for key in keys)
        return (
            f"{done} of {count_of(_shards(run), 'shard')}" if done and "psi.safetensors" not in keys else ""
        )
    if step == "correct":
        total = len(run.spec.correct.lambdas)
        sweeps = ("baseline", "defuse")
        begun = {name: sum(key.startswith(f"trials/{name}/") for key in keys) for name in sweeps}
        return ", ".join(f"{name} {count} of {total} λ begun" for name, count in begun.items() if count)
    return ""


def _epochs(run: Run) -> str:
    from defuse_core.artifacts import Checkpoint
    from defuse_core.codec import decode

    trainings = {"classifier": run.spec.classifier.epochs, "vae": run.spec.vae.epochs}
    kept = []
    for name, epochs in trainings.items():
        key, shown = f"training/{name}.safetensors", "β-VAE" if name == "vae" else name
        if not run.store.exists(key):
            continue
        data = run.store.read(key)
        try:
            done = len(decode(Checkpoint, data, key).history)
        except StoreError:  # as in training, which then begins again
            kept.append(f"{shown} begins again, its checkpoint is damaged")
        else:
            kept.append(f"{shown} {done} of {count_of(epochs, 'epoch')}")
    return ", ".join(kept)


def _shards(run: Run) -> int:
    from defuse_core.identify import shard_count

    models = run.load(Models)
    return 0 if models is None else shard_count(models.images["train"], run.spec.identify)


def print_status(run: Run, console: Console | None = None) -> None:
    """Print the state, the time and the size of each step of a run, the β-VAE's health, and the result."""
    console = console or Terminal()
    states = step_states(run)
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("Step", "State", "Made (UTC)"):
        table.add_column(name, no_wrap=name == "Step")
    for name in ("Time", "Size"):
        table.add_column(name, justify="right", no_wrap=True)
    for state in states:
        _add(table, state.step, _state_text(state), date_time(state.made), *_cost(state))
    seconds = sum(state.seconds or 0 for state in states)
    console.print(Text(f"{run.name} · {run.spec.data.name} · seed {run.spec.seed}", style="bold"))
    console.print(table)
    if models := run.load(Models):
        _print_health(console, run, models)
    if report := _stored_report(run):
        _print_text(console, headline(report), "bold")
        console.print(_accuracy_table(report))
    console.print(Text(f"{duration(seconds)} so far · {run.store.address}", style="dim", overflow="fold"))


def _print_health(console: Console, run: Run, models: Models) -> None:
    """Print the verdict on the β-VAE with its figures; nothing for a run of a version without one."""
    from defuse_core.evaluation.health import judge_gets, pictures_judged, with_measured_health

    health = with_measured_health(run, models).health
    if health is None:
        return
    text = (
        f"β-VAE: {health.verdict}. {judge_gets(health).capitalize()} {percent(health.originals_right)} of "
        f"{count_of(health.images, 'training image')} right, and {percent(health.reconstructions_right)} of "
        f"{pictures_judged(health)}; {health.collapsed} of {count_of(health.dimensions, 'latent dimension')} "
        "collapsed."
    )
    _print_text(console, text, "" if health.verdict == "fit" else "yellow")


def _stored_report(run: Run) -> Report | None:
    """Return the run's report.json, or None where it is not written yet or another version of Defuse wrote it."""
    from defuse_core.report import parse_report

    try:
        return parse_report(run.store.read("report.json"), f"{run.store.address}/report.json")
    except (FileNotFoundError, InputError):
        return None


def _state_text(state: StepState) -> Text:
    style = {"done": "green", "to do": "dim"}.get(state.state, "yellow")
    return Text(f"{state.state}: {state.detail}" if state.detail else state.state, style=style)


def _cost(state: StepState) -> tuple[str, str]:
    return (
        NONE if state.seconds is None else duration(state.seconds),
        NONE if state.bytes is None else size(state.bytes),
    )


def print_runs(store: Store, console: Console | None = None) -> None:
    """Print the runs in a store, with the current step of each."""
    console = console or Terminal()
    folders = (key.partition("/") for key in store.list())
    names = [name for name, _, rest in folders if rest == "run.yaml"]
    if not names:
        console.print(Text(f"no runs in {store.address}", overflow="fold"))
        return
    made = ("Last made (UTC)", "Time") if console.width >= WIDE else ()
    table = _table(None, ("Run", "Data", "At", "Scenarios", "Test", *made), texts=3)
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"  # shown whole, for use in a command
    problems = []
    for name in names:
        try:
            row = _run_row(Run.open(store, name))
        except DefuseError as error:
            problems.append(str(error))
            shown = "unreadable run.yaml" if isinstance(error, RunFileError) else "unreadable"
            row = name, NONE, Text(shown, style="red"), NONE, NONE, NONE, NONE
        _add(table, *row[: len(table.columns)])
    console.print(table)
    for problem in problems:
        _print_text(console, problem, "red")


def _run_row(run: Run) -> tuple[str | Text, ...]:
    """Return the cells of a run in the list. Raises StoreError for a file that is damaged."""
    states = step_states(run)
    at = next((state for state in states if state.state != "done"), None)
    shown = Text("done", style="green") if at is None else Text(f"{at.step}, {at.state}", style="yellow")
    return (
        run.name,
        run.spec.data.name,
        shown,
        *_outcome(_stored_report(run)),
        date_time(max(state.made for state in states)),
        duration(sum(state.seconds or 0 for state in states)),
    )


def _outcome(report: Report | None) -> tuple[str, str]:
    """Return the accepted scenarios with the accuracy on them, and the accuracy on the test set: before → after."""
    if report is None:
        return NONE, NONE
    before, after = report.accuracy.before, report.accuracy.defuse
    scenarios = str(report.scenarios.accepted)
    if report.scenarios.accepted:
        scenarios += f": {percent(before.scenario, 0)} → {percent(after.scenario, 0)}"
    return scenarios, NONE if before.test is None else f"{percent(before.test)} → {percent(after.test)}"
