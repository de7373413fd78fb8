"""Section, the frozen model that every section of a run file is, and what several sections, and verdicts, share."""

from __future__ import annotations

import math
import re
import typing
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from defuse_core.formatting import has_control_characters, value_text

Schedule = Literal["constant", "one_cycle"]  # of a learning rate
NUMBERS = {int: "an integer", float: "a number"}
LARGEST_INTEGER = 2**31 - 1  # of fields without a smaller bound: libraries hold no larger one
MOST_IMAGES = 1000  # of review.images


def fewest_units(rho: float, max_false: float) -> int:
    """Return the fewest units that can show a share over rho at a false discovery rate: all of them failing."""
    if rho == 0:
        return 1
    return math.ceil(math.log(max_false) / math.log(rho) - 1e-9)  # 0.2^2 is slightly over 0.04 in floats


def expect_printable(text: str) -> str:
    """Refuse text that would change the terminal or the page that shows it."""
    if has_control_characters(text):
        raise ValueError(f"expected text without control characters, found {text!a}")
    return text


PrintableText = Annotated[str, AfterValidator(expect_printable)]


def _expect_one_group(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"expected a regular expression, found {pattern!r} ({error})") from error
    if groups != 1:
        raise ValueError(
            f"expected one group in brackets that names the object, found {groups} in {pattern!r}"
        )
    return pattern


PatternOfOneGroup = Annotated[str, AfterValidator(_expect_one_group)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _a_number(cls, value: object, info: ValidationInfo) -> object:
        """Refuse true and text where a number is expected: pydantic converts both.

        A float may be text, since YAML reads 1e-3 as text.
        """
        kinds = _leaves(cls.model_fields[str(info.field_name)].annotation)
        numbers = [kind for kind in kinds if kind in NUMBERS or isinstance(kind, int | float)]
        if not numbers or bool in kinds:
            return value
        for each in value if isinstance(value, list | tuple) else [value]:
            is_text = isinstance(each, str) and float not in numbers and each not in kinds
            if isinstance(each, bool) or is_text:
                words = [NUMBERS.get(number, str(number)) for number in numbers]
                words += [kind for kind in kinds if isinstance(kind, str)]
                raise ValueError(f"expected {' or '.join(words)}, found {value_text(each)}")
        return value

    @field_validator("*")
    @classmethod
    def _not_huge(cls, value: object) -> object:
        for each in value if isinstance(value, tuple) else [value]:
            if isinstance(each, int) and abs(each) > LARGEST_INTEGER:
                raise ValueError(f"expected at most {LARGEST_INTEGER}, found {value_text(each)}")
        return value

    @field_validator("*")
    @classmethod
    def _printable(cls, value: object) -> object:
        if isinstance(value, str | Path):
            expect_printable(str(value))
        return value


def _leaves(kind: Any) -> list[Any]:
    """Return the types, and values of a Literal, that a type is made of: [int, "auto"] for int | Literal["auto"]."""
    if typing.get_origin(kind) is Annotated:
        return _leaves(typing.get_args(kind)[0])
    parts = typing.get_args(kind)
    return [leaf for part in parts for leaf in _leaves(part)] if parts else [kind]


def _whole_above_one(gpus: float) -> float:
    """Refuse 1.5 GPUs, since Ray splits one GPU, not several; and less than a hundredth of one."""
    if 0 < gpus < 0.01:
        raise ValueError(f"{gpus:g} GPUs: expected 0, or at least 0.01")
    if gpus > 1 and not gpus.is_integer():
        raise ValueError(f"{gpus:g} GPUs: expected a fraction of one, or a whole number")
    return gpus


def _given(path: object) -> object:
    """Refuse an empty path, which Path takes for the current folder, and a name that YAML takes for no text."""
    if path == "":
        raise ValueError("expected a path, found an empty one; write . for the current folder")
    if isinstance(path, int | float | date):
        kind = "date" if isinstance(path, date) else "value" if isinstance(path, bool) else "number"
        raise ValueError(
            f"expected a path, found the {kind} {str(path).lower()}; put the name in quotes, "
            "with --set in two: 'a.b=\"...\"'"
        )
    return path


def _with_home(path: Path) -> Path:
    """Expand ~, which no shell expands in a run file."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: expected the home of an existing user") from error


UserPath = Annotated[Path, BeforeValidator(_given), AfterValidator(_with_home)]
GpuShare = Annotated[float, Field(ge=0, le=1024), AfterValidator(_whole_above_one)]
