"""Every field of the run file with its meaning, its default and its bounds, read from the pydantic models."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from defuse_core.config.run_file import RunFile
from defuse_core.errors import InputError

NAMES: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "true or false",
    Path: "path",
    None: "null",
}
BOUNDS = {Ge: "≥", Gt: ">", Le: "≤", Lt: "<"}


@dataclass(frozen=True)
class FieldDescription:
    """One field as `defuse fields` shows it."""

    name: str  # review.reference.count
    values: str  # "integer ≥ 1", "cnn | resnet18", ...
    default: str  # as YAML; "required" where there is none
    meaning: str


def describe_fields(section: str | None = None) -> list[FieldDescription]:
    """Return the fields of a section, such as `vae` or `review.reference`, or of the whole run file.

    Raises InputError for a section that does not exist.
    """
    found = list(_fields(RunFile, ""))
    if section is None:
        return found
    wanted = [field for field in found if field.name == section or field.name.startswith(f"{section}.")]
    if not wanted:
        names = ", ".join(dict.fromkeys(field.name.partition(".")[0] for field in found))
        raise InputError(f"fields {section}: the run file has no such section or field; it has {names}")
    return wanted


def _fields(model: type[BaseModel], prefix: str) -> Iterator[FieldDescription]:
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _fields(kind, f"{prefix}{name}.")
        else:
            default = "required" if info.is_required() else _as_yaml(info.default)
            meaning = " ".join((info.description or "").split())
            yield FieldDescription(prefix + name, _values(info), default, meaning)


def _values(info: FieldInfo) -> str:
    text, bounds = _type_text(info.annotation), _bounds(info.metadata)
    if bounds and text.endswith(" | null"):
        return f"{text.removesuffix(' | null')}{bounds} | null"
    return text + bounds


def _bounds(metadata: typing.Iterable[Any]) -> str:
    """Return " ≥ 1, < 5" for the bounds among a field's metadata."""
    parts = []
    for item in metadata:
        if isinstance(item, FieldInfo):
            parts += [_bounds(item.metadata).strip()]
        for kind, sign in BOUNDS.items():
            if isinstance(item, kind):
                parts.append(f"{sign} {getattr(item, kind.__name__.lower())}")
        if isinstance(item, MinLen):
            parts.append(f"{item.min_length} or more")
    text = ", ".join(filter(None, parts))
    return f" {text}" if text else ""


def _type_text(kind: Any) -> str:
    """Return a type as people read it: `integer ≥ 1 | auto`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return f"{_type_text(arguments[0])}{_bounds(arguments[1:])}"
    if origin is typing.Literal:
        return " | ".join(str(value) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_text(argument) for argument in arguments)
    if origin is tuple:
        return f"list of {_type_text(arguments[0])}"
    return NAMES.get(None if kind is type(None) else kind, getattr(kind, "__name__", str(kind)))


def _as_yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(f'{item:g}' if isinstance(item, float) else str(item) for item in value)}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
