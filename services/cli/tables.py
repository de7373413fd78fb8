"""The results of a run, as tables in the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, get_args

from rich.console import Console
from rich.table import Table
from rich.text import Text

from defuse_core.formatting import NONE, change, count_of, percent
from defuse_core.report.evidence_schema import EvidenceFigures, Share
from defuse_core.report.schema import is_low
from services.cli.console import Terminal, drop_columns, needed_width, new_table, print_fitting, print_table
from services.cli.output import broken_lines

if TYPE_CHECKING:
    from defuse_core.export.compare import ComparedScenario
    from defuse_core.report import Report

SCENARIO_COLUMNS = ("", "Label", "Mistaken for", "Seen", "Purity", "Agreement", "Before", "Defuse")
COMPARED = ("State", "Label", "Mistaken for", "In A", "In B", "A before", "A after", "B before", "B after")
# in turn, until the table fits; numbers of scenarios stay together as long as they can
DROPPED_COMPARED = ("Mistaken for", "A before", "A after", "In B", "B after")
# left out, in turn, until the table of scenarios fits
DROPPED = ("Agreement", "Seen", "Purity", "Mistaken for")
TEXT_WIDTH = 100  # columns of a paragraph, also in a wider terminal: longer lines are hard to read


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the report: its headline and caveats, its tables, and a line for each other figure."""
    console = console or Terminal()
    print_text(console, report.headline, "bold")
    for caveat in report.caveats:
        console.print()
        print_text(console, caveat, "yellow")
    console.print()
    print_accuracy(report, console)
    if report.evidence is not None and (report.scenarios.accepted or report.tradeoff):
        _print_evidence(report.evidence, console)
    if report.scenarios.accepted:
        _print_scenarios(report, console)
    if report.agreement.all.images:
        print_table(console, _agreement_table(report))
    for line in _other_figures(report):
        print_text(console, line, "dim")


def print_text(console: Console, text: str, style: str, widest: int = TEXT_WIDTH) -> None:
    """Print text in lines of at most `widest` columns, but for commands and words that need more."""
    lines = broken_lines(text, min(console.width, widest))
    console.print(Text("\n".join(lines), style=style), soft_wrap=True)


def print_accuracy(report: Report, console: Console) -> None:
    """Print the accuracies before and after, on each part and on the scenario images."""
    table = new_table("Accuracy (Figure 4)", ("", "Scenarios", "Validation", "Test", "Scenario images"))
    table.caption = "Scenario images: held out, by the scenario's label."
    table.caption_justify = "left"
    accuracy = report.accuracy
    rows = [("Before", accuracy.before), ("Failures alone", accuracy.baseline)]
    if accuracy.plain is not None:
        rows.append(("Plain (λ = 0)", accuracy.plain))
    rows.append(("Defuse", accuracy.defuse))
    corrected = report.scenarios.accepted if report.chosen else 0
    for name, row in rows:
        number = str(corrected) if name == "Defuse" else NONE
        table.add_row(name, number, percent(row.validation, 2), percent(row.test, 2), percent(row.scenario))
    print_fitting(console, table, ["Scenarios"])


def _print_evidence(evidence: EvidenceFigures, console: Console) -> None:
    """Print the accuracies that independent models confirm, each with its 95 % interval if that fits."""
    whole = _evidence_table(evidence, lambda share: share.text(0))
    short = _evidence_table(evidence, lambda share: percent(share.value, 0))
    fitting = [table for table in (whole, short) if needed_width(console, table) <= console.width]
    print_table(console, next(iter(fitting), whole))


def _evidence_table(evidence: EvidenceFigures, text: Callable[[Share], str]) -> Table:
    count = len(evidence.own_label.plain_each)
    plain = f"λ = 0, mean of {count} trainings" if count > 1 else "further training with λ = 0"
    table = new_table(f"Evidence, by the judges' labels (plain: {plain})", ("", "Before", "Plain", "Defuse"))
    own, left_out, real = evidence.own_label, evidence.left_out, evidence.real_failures
    rows = [
        ("scenario images", own.before, own.plain, own.defuse),
        ("left-out scenarios", left_out.before, left_out.plain, left_out.defuse),
    ]
    if number := evidence.real_failure_images:
        rows.append((count_of(number, "failing test draw"), real.before, real.plain, real.defuse))
    for name, *shares in rows:
        table.add_row(name, *map(text, shares))
    return table


def print_comparison(
    run_a: str,
    run_b: str,
    rows: Sequence[ComparedScenario],
    right_from: float,
    console: Console | None = None,
) -> None:
    """Print the scenarios of two runs side by side, and how many there are of each state that occurs.

    `right_from` is the accuracy from which on a classifier is right on a scenario.
    """
    console = console or Terminal()
    console.print(Text(f"A: {run_a}, B: {run_b}"), soft_wrap=True)
    limit = f"Right: at least {percent(right_from, None)} of the pictures by the scenario's label"
    print_text(console, f"{limit} (check.min_scenario_accuracy of B).", "")
    print_fitting(console, _comparison_table(rows), DROPPED_COMPARED)
    counts = Counter[str](row.state for row in rows)
    shown = ", ".join(f"{counts[state]} {state}" for state in _states() if counts[state])
    print_text(console, shown, "", console.width)


def _states() -> tuple[str, ...]:
    from defuse_core.export.compare import State  # late: torch takes a second

    return get_args(State)


def _comparison_table(rows: Sequence[ComparedScenario]) -> Table:
    table = new_table(None, COMPARED, texts=3)
    table.columns[0].min_width = max(map(len, _states()))
    for row in rows:
        numbers = (NONE if number is None else str(number) for number in (row.number_a, row.number_b))
        shares = (percent(share) for share in (row.before_a, row.after_a, row.before_b, row.after_b))
        table.add_row(row.state, row.label, row.mistaken_for, *numbers, *shares)
    return table


def _print_scenarios(report: Report, console: Console) -> None:
    table = new_table("Failure scenarios", SCENARIO_COLUMNS, texts=4)
    table.columns[0].min_width = len(str(len(report.scenarios.list)))
    for row in report.scenarios.list:
        if row.accepted:
            table.add_row(
                str(row.number),
                row.label or NONE,
                row.mistaken_for or NONE,
                "yes" if row.seen_in_training_images else NONE,
                Text(percent(row.purity, 0), style="yellow" if is_low(row.purity) else ""),
                percent(row.agreement, 0),
                percent(row.before),
                percent(row.defuse),
            )
    drop_columns(console, table, DROPPED)
    table.caption = "Before, Defuse: on held-out images, by the scenario's label."
    table.caption_justify = "left"
    if any(column.header == "Seen" for column in table.columns):
        seen = "Seen: the classifier is wrong on significantly more than a fifth of the training images behind it."
        table.caption += f"\n{seen}"
    print_table(console, table)


def _agreement_table(report: Report) -> Table:
    agreement = report.agreement
    table = new_table("Agreement of the annotators (Figure 6)", ("", "Images", "Agreement"))
    parts = (
        ("Failure scenarios", agreement.scenario),
        ("Rejected candidates", agreement.other),
        ("All", agreement.all),
    )
    for name, mean in parts:
        table.add_row(name, f"{mean.images:,}", mean.text())
    return table


def _other_figures(report: Report) -> list[str]:
    psi, vae, mixture = report.psi, report.vae, report.mixture
    of_wrong = ""
    if psi.wrong:
        of_wrong = f"; of {psi.wrong:,} that the classifier gets wrong, {psi.wrong_kept:,} have a code"
    lines = [
        f"Ψ: {count_of(psi.codes, 'code')}; {percent(psi.images_with_any)} of {count_of(psi.images, 'image')} "
        f"have a failing draw, {percent(psi.zero_noise_flip_rate)} are wrong without noise{of_wrong}.",
        f"β-VAE: {vae.collapsed} of {count_of(len(vae.kl_per_dimension), 'dimension')} collapsed; "
        f"squared error {vae.reconstruction:.4f} per pixel.",
    ]
    if report.evidence is not None and report.evidence.purity.value is not None:
        judges = count_of(report.evidence.judges.count, "judge")
        lines.append(f"Purity by {judges}: {percent(report.evidence.purity.value)}.")
    if report.chosen is not None:
        before, plain = report.accuracy.before.test, report.accuracy.plain
        moved = change(before, report.accuracy.defuse.test)
        cost = f"; {moved} points on the test set" if moved else ""
        if moved and plain is not None and plain.test is not None:
            cost += f", plain further training {change(before, plain.test)}"
        lines.append(f"Chosen: λ = {report.chosen.lam:g}, epoch {report.chosen.epoch}{cost}.")
    if not mixture.converged:
        rest = ""
        if mixture.last_change is not None:
            rest = f"; its bound still changed by {mixture.last_change:.3g} nats"
        lines.append(f"The mixture did NOT converge in {count_of(mixture.iterations, 'iteration')}{rest}.")
    if report.watch is not None:
        lines.append(f"Watch: {report.watch.verdict}")
    lines += [f"Failed: {t.fine_tuning}, λ = {t.lam:g}: {t.cause}" for t in report.failed_trials]
    return lines
