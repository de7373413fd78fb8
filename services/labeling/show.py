"""How a review stands, in the terminal."""

from __future__ import annotations

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from services.labeling.standing import Standing

REFUSALS_SHOWN = 20


def print_standing(standing: Standing, address: str, console: Console | None = None) -> None:
    """Print answers, annotators, agreement, scenarios, refusals, and the address to open."""
    console = console or Console(markup=False)  # what annotators typed is no markup
    console.print(f"{standing.given} of {standing.wanted} answers are in; {standing.open} are still wanted.")
    if standing.saved:
        console.print(f"{standing.saved} more are not needed: their scenarios are decided.")
    for name, count in standing.per_annotator().items():
        console.print(f"  {name}: {count}", highlight=False)
    agreement = standing.verdicts().agreement
    if not np.isnan(agreement).all():
        console.print(
            f"Agreement so far: {np.nanmean(agreement):.1%} of an image's votes are for its majority label."
        )
    console.print(_scenarios(standing))
    _print_refusals(standing, console)
    console.print(f"Label at {address}", soft_wrap=True)


def _scenarios(standing: Standing) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("scenario", "answers missing", "state"):
        table.add_column(heading, justify="left" if heading == "state" else "right")
    reasons = standing.verdicts().reasons
    for scenario, decided in enumerate(standing.decided):
        missing = int(standing.missing[scenario].sum())
        table.add_row(
            str(standing.samples.gallery.number(scenario)),
            str(missing),
            _state(standing, scenario, reasons[scenario]) if decided else "open",
        )
    return table


def _state(standing: Standing, scenario: int, reason: str) -> str:
    if standing.overridden[scenario]:
        return "decided above the vote"
    return reason


def _print_refusals(standing: Standing, console: Console) -> None:
    refusals = standing.refusals()
    for refusal in refusals[:REFUSALS_SHOWN]:
        where = f"scenario {standing.samples.gallery.number(refusal['scenario'])}"
        where += "" if refusal["image"] is None else f", image {refusal['image']}"
        console.print(f"Not counted: {refusal['annotator']} on {where}: {refusal['why']}", soft_wrap=True)
    if len(refusals) > REFUSALS_SHOWN:
        console.print(f"... and {len(refusals) - REFUSALS_SHOWN} more that are not counted")
