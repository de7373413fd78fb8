"""Every error that Defuse raises on purpose, and the exit code each one means.

DefuseError
├── CheckFailed              1  a check on a model did not pass
├── InputError               2  something given to Defuse is not usable
│   ├── RunFileError            the run file, or a --set
│   ├── DataError               images or labels
│   ├── ModelError              a model given by the user: its code or its weights
│   ├── VaeHealthError          the β-VAE draws images that are of no use (vae.accept)
│   └── RunMismatchError        the run file no longer matches the run it names
├── LabelsPending            3  people have not answered yet; the same command later goes on
└── MachineryError           4  the machinery failed: try again, nothing is lost
    ├── StoreError              the run's folder or bucket
    │   ├── NoAnswerError           it does not answer now, and may at the next attempt
    │   ├── DamagedError     2      a file there is damaged, or of another version: a person must look
    │   └── StoreSettingsError 2    the bucket's name, region, credentials or certificate, or a folder's name, are wrong
    ├── RunBusyError            another driver is writing this run
    ├── ComputeError            a worker, a task or a trial
    └── ServiceError            Label Studio or another server

A message is one line: what was expected, what was found and what to do. All of them pickle, since Ray carries them.
"""

import re
import unicodedata
from collections.abc import Sequence

ANOTHER_NAME = "another name (--name, or name= in Python)"  # remedy for a run's name, in messages
OTHER_FORMAT_REMEDY = f"use the version of Defuse that wrote it, or run again under {ANOTHER_NAME}"
MOST_DIGITS, SMALLEST = 4, 1e-6  # of a percentage, and the fraction that so many digits still show
NONE = "–"  # shown in place of a number that does not exist
CONTROL = {"Cc", "Cs", "Zl", "Zp"}  # Unicode categories: control characters, broken bytes, line separators


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


def first_few(names: Sequence[str], most: int = 5) -> str:
    """Return the first names in one line, with the number of the others."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"


def listed(names: Sequence[str]) -> str:
    """Return all names in one line: a, b and c."""
    return " and ".join((", ".join(names[:-1]), names[-1]) if len(names) > 1 else names)


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


def count_of(number: float, noun: str) -> str:
    """Return `1 image`, `2 images`, `12,345 images`, `1.5 minutes`. The plural of the noun ends in s."""
    text = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{text} {noun}" if number == 1 else f"{text} {noun}s"


def before_punctuation(name: str) -> str:
    """Return a name of right-to-left letters with a left-to-right mark, so that the text after it stays there."""
    is_right_to_left = any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in name)
    return f"{name}\N{LEFT-TO-RIGHT MARK}" if is_right_to_left else name


def no_lambda_chosen(tuned: int, failed: int) -> str:
    """Return why no λ is chosen, as a clause: `failed` of them failed, and the `tuned` others cost too much."""
    costs = "more clean accuracy than correct.max_loss and max_class_loss allow"
    if not failed:
        return f"every λ costs {costs}"
    return f"{failed} of {tuned + failed} λ failed, and {tuned} cost{'s' if tuned == 1 else ''} {costs}"


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


def one_line(error: Exception | str, limit: int = 200) -> str:
    """Return at most `limit` characters of an error, or of its message, on one line."""
    return " ".join(str(error).split())[:limit]


class DefuseError(Exception):
    """Base of the tree. `str(error)` is the one line to show; `exit_code` is what the command exits with."""

    exit_code = 4

    def __init__(self, message: str) -> None:
        super().__init__(escape_control_characters(re.sub(r"\s*[\n\r]\s*", " ", message.strip())))


class CheckFailed(DefuseError):  # noqa: N818 - reads as the outcome that it is
    exit_code = 1


class InputError(DefuseError):
    exit_code = 2


class RunFileError(InputError): ...


class DataError(InputError): ...


class ModelError(InputError): ...


class VaeHealthError(InputError): ...


class RunMismatchError(InputError): ...


class LabelsPending(DefuseError):  # noqa: N818
    exit_code = 3


class MachineryError(DefuseError): ...


class StoreError(MachineryError): ...


class NoAnswerError(StoreError): ...


class DamagedError(StoreError):
    exit_code = InputError.exit_code


class StoreSettingsError(StoreError):
    exit_code = InputError.exit_code


class RunBusyError(MachineryError): ...


class ComputeError(MachineryError): ...


class ServiceError(MachineryError): ...
