"""Numbers, names and dates as people read them: in the page, in the pictures and in the terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence

from defuse_core.errors import NONE, digits_of, percent, with_bounds
from defuse_core.report.evidence_schema import Pairs, Share
from defuse_core.report.schema import Mean

# Below this the images of the scenarios show several classes, and accuracy by the scenario's label means little.
LOW_PURITY = 0.8
POWERS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
FINE_TUNINGS = {  # fine-tunings that only evidence needs
    "plain": "plain further training 1",
    "plain_1": "plain further training 2",
    "plain_2": "plain further training 3",
    "left_out_0": "without half 1 of the scenarios",
    "left_out_1": "without half 2 of the scenarios",
}
SHORT = 3  # class names with at most so many letters fit on an image; other classes are shown by number


def sweep_text(name: str) -> str:
    """Return what is fine-tuned in a sweep of that name, where only evidence needs it."""
    return FINE_TUNINGS.get(name, name)


def spread(mean: Mean) -> str:
    """Return a mean with its standard error: 91.2 ± 2.3 %."""
    if mean.mean is None:
        return NONE
    digits = digits_of(1, mean.mean)
    error = "" if mean.standard_error is None else f" ± {100 * mean.standard_error:.{digits}f}"
    return f"{100 * mean.mean:.{digits}f}{error} %"


def before_after(before: float | None, after: float | None, digits: int = 1) -> str:
    """Return an accuracy before and after the correction, 7.0 % → 99.8 %; 7.0 % where nothing was corrected."""
    return (
        percent(before, digits) if after is None else f"{percent(before, digits)} → {percent(after, digits)}"
    )


def interval(share: Share, digits: int = 1) -> str:
    """Return a share with its 95 % interval: 98.5 % (97.2–99.1); alone where it is no measurement."""
    value, ends = interval_parts(share, digits)
    return f"{value} ({ends})" if ends else value


def interval_parts(share: Share, digits: int = 1) -> tuple[str, str]:
    """Return a share and the ends of its 95 % interval, which are empty where it is no measurement.

    All three have the digits that keep each of them from being rounded to 0 or 100 %.
    """
    if share.value is None or share.low is None or share.high is None:
        return percent(share.value, digits), ""
    digits = digits_of(digits, share.value, share.low, share.high)
    return percent(share.value, digits), range_text(share.low, share.high, digits)


def range_text(low: float, high: float, digits: int = 1) -> str:
    """Return the ends of an interval in percent, without the sign: 4.7–11.3."""
    digits = digits_of(digits, low, high)
    return f"{100 * low:.{digits}f}–{100 * high:.{digits}f}"


def spread_of(values: Sequence[float | None]) -> str:
    """Return the lowest and highest of several shares, in percent: 69.0–89.1 %; empty for fewer than two."""
    known = [value for value in values if value is not None]
    return f"{range_text(min(known), max(known))} %" if len(known) > 1 else ""


def score(share: Share) -> str:
    """Return a number between 0 and 1 with its 95 % interval, not as a percentage: 0.970 (0.951–0.982)."""
    if share.value is None or share.low is None or share.high is None:
        return NONE
    return with_bounds(share.value, share.low, share.high, 3)


def change(before: float | None, after: float | None, digits: int = 2) -> str:
    """Return the signed difference of two fractions of 1 in percentage points; empty where either is missing."""
    if before is None or after is None:
        return ""
    points = round(100 * (after - before), digits)
    return f"{'+' if points > 0 else '−' if points < 0 else '±'}{abs(points):.{digits}f}"


def points(share: float) -> str:
    """Return a fraction of 1 in percentage points: 0.5 points, 1 point."""
    count = f"{100 * share:g}"
    return f"{count} point" if count == "1" else f"{count} points"


def is_low(purity: float | None) -> bool:
    """Whether the images of a scenario are mixed."""
    return purity is not None and purity < LOW_PURITY


def lam_text(lam: float) -> str:
    """Return λ as a number or a power of ten: 0.1, 20, 10⁻⁷."""
    if lam == 0 or 1e-3 <= lam < 1e4:
        return f"{lam:g}"
    mantissa, exponent = f"{lam:e}".split("e")
    power = "10" + str(int(exponent)).translate(POWERS)
    return power if float(mantissa) == 1 else f"{float(mantissa):g}·{power}"


def numbers_text(numbers: Sequence[int]) -> str:
    """Return ascending numbers; three or more neighbours form a range: `0–10, 12, 13`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def duration(seconds: float) -> str:
    """Return a time in the units that fit it: 0.4 s, 12 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: float) -> str:
    """Return a number of bytes in the unit that fits it: 12 B, 1.5 kB, 12 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def date_time(iso: str) -> str:
    """Return an ISO 8601 time to the minute, without its letters: 2025-01-01 10:00."""
    return iso.replace("T", " ")[:16] or NONE


def unbroken(text: str) -> str:
    """Return the text with no line break possible between a number and its percent sign, and in p = 0.05."""
    return re.sub(r"\bp = (?=\d)", "p\u00a0=\u00a0", re.sub(r"(\d) %", "\\1\u00a0%", text))


def text_of(value: object) -> str:
    """Return a value of the annotators' notes as text."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    if value is None:
        return NONE
    return f"{value:g}" if isinstance(value, float) else str(value)


def names_are_short(classes: tuple[str, ...]) -> bool:
    """Whether class names fit on an image."""
    return max(map(len, classes)) <= SHORT


def answer_text(classes: tuple[str, ...], answer: int) -> str:
    """Return what an image shows for an answer: the class name, or the class number where names are long."""
    return classes[answer] if names_are_short(classes) else str(answer)


def pairs_text(pairs: Pairs | None) -> str:
    """Return on how many pairs the correction is better and worse: +54 −82, p = 0.02."""
    return NONE if pairs is None else f"+{pairs.better} −{pairs.worse}, p = {pairs.p_value:.2g}"
