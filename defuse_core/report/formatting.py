"""How figures are said to people: in the page, in the pictures and in the terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from defuse_core.report import Mean, Report

LOW_PURITY = 0.8  # below this the scenarios' images are so mixed that their accuracy says little
POWERS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
NONE = "–"


def percent(value: float | None, digits: int = 1) -> str:
    """Return a fraction of 1 as people write it: 98.97 %."""
    return NONE if value is None else f"{100 * value:.{digits}f} %"


def spread(mean: Mean) -> str:
    """Return a mean with its standard error: 91.2 ± 2.3 %."""
    error = "" if mean.standard_error is None else f" ± {100 * mean.standard_error:.1f}"
    return NONE if mean.mean is None else f"{100 * mean.mean:.1f}{error} %"


def change(before: float | None, after: float | None, digits: int = 2) -> str:
    """Return the difference of two fractions of 1 in percentage points, signed; nothing where one lacks."""
    if before is None or after is None:
        return ""
    points = round(100 * (after - before), digits)
    return f"{'+' if points > 0 else '−' if points < 0 else '±'}{abs(points):.{digits}f}"


def lam_text(lam: float) -> str:
    """Return λ as people write it: 0.1, 20, 10⁻⁷."""
    if lam == 0 or 1e-3 <= lam < 1e4:
        return f"{lam:g}"
    mantissa, exponent = f"{lam:e}".split("e")
    power = "10" + str(int(exponent)).translate(POWERS)
    return power if float(mantissa) == 1 else f"{float(mantissa):g}·{power}"


def runs_text(lams: Sequence[float], members: Sequence[int]) -> str:
    """Return the λ at ascending places of `lams`, three or more neighbours joined: `10⁻⁷ – 0.1, 10`."""
    parts: list[str] = []
    start = 0
    for end in range(1, len(members) + 1):
        if end < len(members) and members[end] == members[end - 1] + 1:
            continue
        names = [lam_text(lams[i]) for i in members[start:end]]
        parts += names if len(names) < 3 else [f"{names[0]} – {names[-1]}"]
        start = end
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Return a time as people say it: 0.4 s, 12 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: float) -> str:
    """Return a number of bytes as people say it."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def unbroken(text: str) -> str:
    """Return the text with no line break possible between a number and its percent sign."""
    return re.sub(r"(\d) %", "\\1\u00a0%", text)


def count_of(number: int, noun: str) -> str:
    """Return `1 image`, `2 images`, `12,345 images`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def headline(report: Report) -> str:
    """Return what the run found, in plain words."""
    components, accepted = report.scenarios.components, report.scenarios.accepted
    if not components:
        return "No failure scenario was found: identification and distillation left nothing to review."
    if not accepted:
        kept = count_of(components, "component")
        return f"None of the {kept} is a failure scenario, so the classifier was left as it is."
    verb = "is a failure scenario" if accepted == 1 else "are failure scenarios"
    return f"{accepted} of {count_of(components, 'component')} {verb}. {_corrected(report)}"


def _corrected(report: Report) -> str:
    before, after = report.accuracy.before, report.accuracy.defuse
    them = "it" if report.scenarios.accepted == 1 else "them"
    text = f"On {them} the classifier goes from {percent(before.scenario)} to {percent(after.scenario)}"
    for split in ("test", "validation"):
        was, now = getattr(before, split), getattr(after, split)
        if was is not None and now is not None:
            return f"{text}; on the {split} set from {percent(was, 2)} to {percent(now, 2)}."
    return f"{text}."


def purity_warning(report: Report) -> str | None:
    """Return what a low purity means for the figures above it, or None where it is not low."""
    purity = report.scenarios.purity
    if purity is None or purity >= LOW_PURITY:
        return None
    own = report.scenarios.own_labels
    return (
        f"Purity is {percent(purity, 0)}. Of the images reviewed in the failure scenarios, "
        f"{percent(1 - purity, 0)} show another class than their scenario's label, or none that is clear. "
        "Scenario accuracy counts the scenario's one label as right for all of them, "
        "so on mixed images it is not yet a fix. Each judged by its own label, "
        f"{percent(own.before)} of the reviewed images were right before and {percent(own.defuse)} are now."
    )


def answered_by_models(report: Report) -> str | None:
    """Return the notice that no person answered, or None where people did."""
    if report.annotators == "people":
        return None
    return (
        "Reference models answered, not people. "
        f"The labels below come from {report.votes.annotators} classifiers that stand in for annotators; "
        "treat them as a rehearsal, not as ground truth."
    )


def prelabelled(report: Report) -> str | None:
    """Return the notice that annotators saw an answer preselected, or None where they did not."""
    if "prelabel" not in report.votes.notes:
        return None
    return "Answers were preselected. In the review " + str(report.votes.notes["prelabel"]) + "."


def caveats(report: Report) -> list[str]:
    """Return what a reader must know before the figures."""
    return [
        text for text in (answered_by_models(report), prelabelled(report), purity_warning(report)) if text
    ]
