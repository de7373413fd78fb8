"""Numbers, names and dates as people read them: in messages, in the page, in the pictures and in the terminal."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from urllib.parse import urlsplit

NONE = "–"  # shown in place of a number that does not exist
MOST_DIGITS, SMALLEST = 4, 1e-6  # of a percentage, and the fraction that so many digits still show
MOST_LETTERS = 120  # of a value in a message
POWERS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
CONTROL = {"Cc", "Cs", "Zl", "Zp"}  # Unicode categories: control characters, broken bytes, line separators


def percent(value: float | None, digits: int | None = 1) -> str:
    """Return a fraction of 1 as a percentage: 98.97 %; with `digits` None as short as it is: 5 %, 12.5 %.

    Only 0 and 1 are 0 and 100 %: others that would be rounded to these get more digits, up to MOST_DIGITS. Nearer than
    SMALLEST to 1 is 1, as after a sum that was rounded.
    """
    if value is None:
        return NONE
    if digits is None:
        return f"{100 * value:g} %"
    if 0 < value < SMALLEST:
        return f"under {100 * SMALLEST:g} %"
    return f"{100 * value:.{digits_of(digits, value)}f} %"


def digits_of(digits: int, *shares: float) -> int:
    """Return `digits`, or more, up to MOST_DIGITS, where shares between 0 and 1 would be rounded to 0 or 100 %."""
    between = [100 * share for share in shares if SMALLEST <= share <= 1 - SMALLEST]
    while digits < MOST_DIGITS and any(float(f"{share:.{digits}f}") in (0, 100) for share in between):
        digits += 1
    return digits


def decimal(value: float, digits: int) -> str:
    """Return a number between 0 and 1, 0.97, with the `digits_of` it needs."""
    return f"{value:.{digits_of(digits - 2, value) + 2}f}"


def with_bounds(value: float, low: float, high: float, digits: int) -> str:
    """Return a number between 0 and 1 with the bounds of its interval: 0.97 (0.95–0.98)."""
    return f"{decimal(value, digits)} ({decimal(low, digits)}–{decimal(high, digits)})"


def before_after(before: float | None, after: float | None, digits: int = 1) -> str:
    """Return an accuracy before and after the correction, 7.0 % → 99.8 %; 7.0 % where nothing was corrected."""
    return (
        percent(before, digits) if after is None else f"{percent(before, digits)} → {percent(after, digits)}"
    )


def range_text(low: float, high: float, digits: int = 1) -> str:
    """Return the ends of an interval in percent, without the sign: 4.7–11.3."""
    digits = digits_of(digits, low, high)
    return f"{100 * low:.{digits}f}–{100 * high:.{digits}f}"


def spread_of(values: Sequence[float | None]) -> str:
    """Return the lowest and highest of several shares, in percent: 69.0–89.1 %; empty for fewer than two."""
    known = [value for value in values if value is not None]
    return f"{range_text(min(known), max(known))} %" if len(known) > 1 else ""


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


def lam_text(lam: float) -> str:
    """Return λ as a number or a power of ten: 0.1, 20, 10⁻⁷."""
    if lam == 0 or 1e-3 <= lam < 1e4:
        return f"{lam:g}"
    mantissa, exponent = f"{lam:e}".split("e")
    power = "10" + str(int(exponent)).translate(POWERS)
    return power if float(mantissa) == 1 else f"{float(mantissa):g}·{power}"


def count_of(number: float, noun: str) -> str:
    """Return `1 image`, `2 images`, `12,345 images`, `1.5 minutes`. The plural of the noun ends in s."""
    text = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{text} {noun}" if number == 1 else f"{text} {noun}s"


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


def text_of(value: object) -> str:
    """Return a value of the annotators' notes as text."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    if value is None:
        return NONE
    return f"{value:g}" if isinstance(value, float) else str(value)


def value_text(value: object) -> str:
    """Return a value as a message shows it: null and true as in the run file, a long one without its middle."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    # Python writes no number of 5,000 digits
    text = hex(value) if isinstance(value, int) and value.bit_length() > MOST_LETTERS else repr(value)
    return without_middle(text)


def without_middle(text: str) -> str:
    """Return a text as a message shows it: whole, or without its middle where it is long."""
    half = MOST_LETTERS // 2
    return text if len(text) <= MOST_LETTERS else f"{text[:half]}...{text[-half:]}"


def listed(names: Sequence[str]) -> str:
    """Return all names in one line: a, b and c."""
    return " and ".join((", ".join(names[:-1]), names[-1]) if len(names) > 1 else names)


def first_few(names: Sequence[str], most: int = 5) -> str:
    """Return the first names in one line, with the number of the others."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"


def class_difference(first: Sequence[str], second: Sequence[str], one: str, other: str) -> str:
    """Return how two lists of classes, of `one` and of `other`, differ: in names, or where first in their order."""
    shared = {*first} & {*second}
    left = [[name for name in names if name not in shared] for names in (first, second)]
    if any(left):
        pairs = zip(left, (one, other), strict=True)
        return "; ".join(f"{first_few(names)} only in {where}" for names, where in pairs if names)
    for number, (name, found) in enumerate(zip(first, second, strict=False)):
        if name != found:
            return f"class {number} is {name} in {one}, {found} in {other}"
    return f"{len(first):,} classes in {one}, {len(second):,} in {other}"


def sole_difference(name: str, other: str) -> str | None:
    """Return in what alone two names differ: case, or the Unicode form of letters; None where they differ in more."""
    if name.casefold() == other.casefold():
        return "case"
    return "the Unicode form of its letters" if folded(name) == folded(other) else None


def folded(name: str) -> str:
    """Return what is the same of names that differ only in case, or the Unicode form of letters."""
    return unicodedata.normalize("NFC", name).casefold()


def before_punctuation(name: str) -> str:
    """Return a name of right-to-left letters with a left-to-right mark, so that the text after it stays there."""
    is_right_to_left = any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in name)
    return f"{name}\N{LEFT-TO-RIGHT MARK}" if is_right_to_left else name


def unbroken(text: str) -> str:
    """Return the text with no line break possible between a number and its percent sign, and in p = 0.05."""
    return re.sub(r"\bp = (?=\d)", "p\u00a0=\u00a0", re.sub(r"(\d) %", "\\1\u00a0%", text))


def one_line(error: Exception | str, limit: int = 200) -> str:
    """Return at most `limit` characters of an error, or of its message, on one line."""
    return " ".join(str(error).split())[:limit]


def has_control_characters(text: str) -> bool:
    """Whether `text` would change the terminal, the page or the log line that shows it."""
    return any(unicodedata.category(letter) in CONTROL for letter in text)


def escape_control_characters(text: str) -> str:
    """Return `text` with each control character as an escape such as \\x1b."""
    return "".join(
        ascii(letter)[1:-1] if unicodedata.category(letter) in CONTROL else letter for letter in text
    )


def without_credentials(text: str, address: str | None = None) -> str:
    """Return `text` with user names and passwords of addresses, as in http://ana:secret@host, replaced by ***.

    Those of `address` are replaced wherever they occur: an error can quote a part of an address.
    """
    scheme, _, rest = (address or "").partition("://")
    if scheme in ("http", "https"):
        for part in filter(None, re.split("[/?#]", rest.rpartition("@")[0])):
            text = text.replace(part, "***")
    return re.sub(r"(?<=://)\S*@", "***@", text)


def proxy_remedy(address: str) -> str:
    """Return what to do where requests to `address` go through a proxy of the environment, and it is not reached."""
    return f"if the proxy of the environment does not reach it, add {urlsplit(address).hostname} to NO_PROXY"
