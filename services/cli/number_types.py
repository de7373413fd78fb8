"""Types of options and arguments that are numbers, whose refusals read as those of all others."""

from __future__ import annotations

import math
from typing import Any

import click

from services.cli.options import EMPTY


class WholeNumber(click.IntRange):
    """A whole number within bounds."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return int(super().convert(value, param, ctx))
        except click.BadParameter:
            self.fail(_refusal("a whole number", self.min, self.max, value), param, ctx)


class Number(click.FloatRange):
    """A number within bounds. nan is none, which click takes for a number within any."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            found = float(super().convert(value, param, ctx))
        except click.BadParameter:
            found = math.nan
        if math.isnan(found):
            self.fail(_refusal("a number", self.min, self.max, value), param, ctx)
        return found


def _refusal(kind: str, least: float | None, most: float | None, value: object) -> str:
    if value == "":
        return EMPTY
    bounds = f"of at least {least:,}" if most is None else f"from {least:,} to {most:,}"
    return f"expected {kind} {bounds}, found {value!r}"
