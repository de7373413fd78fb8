"""Reading, checking, comparing, describing and writing run files."""

from __future__ import annotations

import difflib
import functools
import itertools
import re
import shlex
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import yaml
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from yaml.error import MarkedYAMLError

from defuse_core.config.base import LARGEST_INTEGER
from defuse_core.config.run_file import RunFile
from defuse_core.errors import InputError, RunFileError
from defuse_core.formatting import value_text, without_middle


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key that is written twice is an error: the second one would silently replace the first.

    010 and 1:30 stay text, as in YAML 1.2, and only fields of floats accept text; YAML 1.1 reads them as 8 and 90.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:  # before `<<` is resolved: keys merged by `<<` may be repeated
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise MarkedYAMLError(problem=f"{key.value!r} a second time", problem_mark=key.start_mark)
            seen.add((key.tag, str(key.value)))
        return node

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        if re.match("[-+]?0[0-9_]|.*:", node.value):
            return node.value
        construct = self.construct_yaml_int if node.tag == YAML_INT else self.construct_yaml_float
        return construct(node)


YAML_INT, YAML_FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
UniqueKeyLoader.add_constructor(YAML_INT, UniqueKeyLoader.construct_number)
UniqueKeyLoader.add_constructor(YAML_FLOAT, UniqueKeyLoader.construct_number)


def parse_yaml(text: str | bytes) -> Any:
    """Return what YAML says. Raises yaml.YAMLError, or ValueError for no UTF-8, 2023-02-30 and too deep a nesting."""
    try:
        return yaml.load(text, UniqueKeyLoader)
    except RecursionError as error:
        raise ValueError("sections nested too deeply") from error


def load_run_file(path: Path, overrides: tuple[str, ...] = ()) -> RunFile:
    """Return the run file at `path` with `a.b=value` overrides applied. Raises RunFileError, in one line."""
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        remedy = "" if path.suffix else "; a run file ends in .yaml, see deploy/runs/"
        if isinstance(error, IsADirectoryError):
            remedy = f"; `defuse init {shlex.quote(str(path))}` writes one for a folder of images"
        raise RunFileError(f"{path}: cannot read this run file ({error.strerror}){remedy}") from error
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, MarkedYAMLError) and (mark := error.problem_mark) is not None:
            place = f"line {mark.line + 1}, column {mark.column + 1}"
            begun = error.context_mark
            since = f", in what begins in line {begun.line + 1}" if begun and begun.line < mark.line else ""
            fault = f"not valid YAML ({error.problem}{since}); check this line and its indentation"
            raise RunFileError(f"{path}: {place}: {fault}") from error
        found = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise RunFileError(f"{path}: expected YAML, found {found}") from error
    if not isinstance(tree, dict):
        raise RunFileError(
            f"{path}: expected sections such as `data:`, found {'nothing' if tree is None else type(tree).__name__}"
        )
    for override in overrides:
        apply_override(tree, override)
    return parse_run_file(tree, f"{path} with --set" if overrides else str(path))


def parse_run_file(tree: dict[str, Any], where: str) -> RunFile:
    """Return the checked run file. Raises RunFileError naming the first invalid field."""
    try:
        return RunFile.model_validate(tree)
    except ValidationError as error:
        raise RunFileError(f"{where}: {first_problem(error, RunFile)}") from error


def expect_fields(tree: dict[str, Any], where: str) -> None:
    """Raise RunFileError naming the first field of a part of a run file that is unknown or wrong in any run file.

    Fields that are missing, or that do not go with others, are left to parse_run_file.
    """
    try:
        RunFile.model_validate(tree)
    except ValidationError as error:
        wrong = [each for each in error.errors() if each["type"] not in {"missing", "value_error"}]
        if wrong:
            raise RunFileError(f"{where}: {_first_of(wrong, RunFile)}") from error


def first_problem(error: ValidationError, section: type[BaseModel]) -> str:
    """Return the first invalid field of `section` with what was expected and found, in one line.

    An unknown field comes first: the one that is missing may be the one that was misspelt.
    """
    return _first_of(error.errors(), section)


def _first_of(details: list[ErrorDetails], section: type[BaseModel]) -> str:
    problems: dict[str, list[ErrorDetails]] = {}
    for detail in details:
        problems.setdefault(_field_at(detail["loc"], section), []).append(detail)
    # a section in a union of types fails in a field of its own, and for not being one of the other types
    problems = {
        at: found for at, found in problems.items() if not any(p.startswith(f"{at}.") for p in problems)
    }
    for field, (first, *_) in problems.items():
        if first["type"] == "extra_forbidden":
            return f"{field}: unknown field{_meant(field, section)}"
    field, (first, *others) = next(iter(problems.items()))
    message = _message(first).removeprefix("Value error, ")
    for other in others:  # the field has a union of types
        message += " or " + _message(other).removeprefix("expected ")
    found = "" if first["type"] in {"missing", "value_error"} else f", found {value_text(first['input'])}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{field + ': ' if field else ''}{message}{found}{more}"


def _meant(field: str, section: type[BaseModel]) -> str:
    """Return which field is spelt much like one that does not exist, or how its dotted name is written."""
    parts = (each.name.split(".") for each in _fields(section, ""))
    # a, a.b and a.b.c of a.b.c
    known = dict.fromkeys(name for names in parts for name in itertools.accumulate(names, "{}.{}".format))
    if field in known:
        *sections, last = field.split(".")
        fields = functools.reduce(
            lambda inner, name: f"{name}: {{{inner}}}", reversed(sections), f"{last}: ..."
        )
        return f"; write it in its section: {{{fields}}}, without a dot"
    at, dot, last = field.lower().rpartition(".")  # every field is in lower case
    beside = [name.removeprefix(at + dot) for name in known if name.rpartition(".")[0] == at]
    close = difflib.get_close_matches(last, beside, 1)
    return f"; did you mean {at}{dot}{close[0]}?" if close else ""


def _message(detail: ErrorDetails) -> str:
    """Return pydantic's message in the words of Defuse and YAML."""
    return {
        "missing": "expected a value, found none",
        "path_type": "expected a path",
        "too_short": f"expected a list of at least {detail.get('ctx', {}).get('min_length')}",
        "tuple_type": "expected a list",
        "model_type": "expected a section with fields",
        "int_parsing_size": f"expected an integer of at most {LARGEST_INTEGER}",
    }.get(detail["type"], detail["msg"].replace("Input should be ", "expected "))


def _field_at(place: tuple[int | str, ...], section: type[BaseModel]) -> str:
    """Return a location as a dotted name, without pydantic's names for the types of a union."""
    names: list[int | str] = []
    kind: Any = section
    for part in place:
        if _is_section(kind):
            names.append(part)
            field = kind.model_fields.get(str(part))
            kind = None if field is None else field.annotation
            continue
        sections = {each.__name__: each for each in typing.get_args(kind) if _is_section(each)}
        if part in sections:  # of a union
            kind = sections[str(part)]
        elif isinstance(part, int):
            names.append(part)
    return ".".join(map(str, names))


def _is_section(kind: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def dump_run_file(spec: RunFile) -> str:
    """Return the run file as YAML, with every field; load_run_file reads it back to an equal one."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def changed_field(recorded: RunFile, given: RunFile) -> str | None:
    """Return the first field that differs and would change results, as `a.b: 1 in the run, 2 now`, or None."""
    before, now = (flat_fields(spec.model_dump(mode="json")) for spec in (recorded, given))
    for field in {**before, **now}:
        free = field in {"data.root", "data.download", "vae.accept"} or field.startswith(
            ("resources.", "check.", "serve.")
        )
        if field.endswith(".weights") and before.get(field) and now.get(field):
            continue  # the content of the file counts, not its path
        numerics = field.startswith(("resources.train_", "resources.precision"))
        if before.get(field) != now.get(field) and (not free or numerics):
            was, is_now = ("null" if tree.get(field) is None else repr(tree[field]) for tree in (before, now))
            return f"{field}: {was} in the run, {is_now} now"
    return None


def added_lambdas(recorded: RunFile, given: RunFile) -> tuple[float, ...]:
    """Return the values of correct.lambdas that are new; none where one of the recorded values is missing."""
    before, now = recorded.correct.lambdas, given.correct.lambdas
    return tuple(lam for lam in now if lam not in before) if set(before) <= set(now) else ()


def flat_fields(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by their dotted names: {"a.b": 1} for {"a": {"b": 1}}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flat_fields(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one `a.b=value`; the value is read as YAML.

    Raises RunFileError for no value, which YAML takes for null, and for one that YAML would cut at a `#`.
    """
    shown = without_middle(override)
    path, equals, text = override.partition("=")
    *sections, field = path.strip().split(".")
    if not equals or not all((*sections, field)):
        raise RunFileError(f"--set {shown}: expected section.field=value")
    if not text.strip():
        takes_null = any(each.name == path.strip() and "null" in each.values for each in describe_fields())
        unset = (
            f"write {path.strip()}=null to unset the field"
            if takes_null
            else "leave --set out to keep what is set"
        )
        raise RunFileError(f"--set {shown}: expected a value, found none; is the variable set? {unset}")
    for section in sections:
        below = tree.get(section, {})
        if not isinstance(below, dict):
            raise RunFileError(f"--set {shown}: {section} is not a section")
        tree[section] = dict(below)  # another section can be a YAML alias of this one
        tree = tree[section]
    quoted = "'" + text.strip().replace("'", "''") + "'"
    remedy = "put the value in quotes of its own"
    if shown == override:
        remedy += f": --set {shlex.quote(f'{path}={quoted}')}"
    try:
        value, comment = parse_yaml(text), _comment_in(text)
    except (yaml.YAMLError, ValueError) as error:
        reason = getattr(error, "problem", None) or error
        raise RunFileError(
            f"--set {shown}: the value is not YAML ({reason}); if it is text, {remedy}"
        ) from error
    if comment:
        raise RunFileError(f"--set {shown}: YAML takes {value_text(comment)} for a comment; {remedy}")
    tree[field] = value


def _comment_in(text: str) -> str:
    """Return the comment at the end of a YAML value, such as `#2` of `/data/parts #2`; empty where there is none."""
    ends = (yaml.StreamEndToken, yaml.BlockEndToken)  # which YAML puts after the comment
    end = max(token.end_mark.index for token in yaml.scan(text) if not isinstance(token, ends))
    return text[end:].strip()


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
        raise InputError(
            f"fields {section}: no such section or field{_meant(section, RunFile) or _beside(section)}"
        )
    return wanted


def _beside(name: str) -> str:
    """Return, as a clause, the fields beside one that does not exist."""
    parts, at = [field.name.split(".") for field in _fields(RunFile, "")], name.split(".")[:-1]
    while not (beside := {names[len(at)]: None for names in parts if names[:-1][: len(at)] == at}):
        at.pop()
    return f"; {'.'.join(at) or 'the run file'} has {', '.join(beside)}"


def _fields(model: type[BaseModel], prefix: str) -> Iterator[FieldDescription]:
    for name, info in model.model_fields.items():
        kind = info.annotation
        if _is_section(kind):
            yield from _fields(kind, f"{prefix}{name}.")
        else:
            default = "required" if info.is_required() else _shown(info.default)
            meaning = " ".join((info.description or "").split())
            yield FieldDescription(prefix + name, _values(info), default, meaning)
            for inner in filter(_is_section, typing.get_args(kind)):
                yield from _fields(inner, f"{prefix}{name}.")


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
            parts.append(f"at least {'one' if item.min_length == 1 else item.min_length}")
    text = ", ".join(filter(None, parts))
    if not text:
        return ""
    return f", {text}" if text.startswith("at least") else f" {text}"


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
        return f"list of {_type_text(arguments[0])}s"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"{{{', '.join(kind.model_fields)}}}"
    return NAMES.get(None if kind is type(None) else kind, getattr(kind, "__name__", str(kind)))


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(f'{item:g}' if isinstance(item, float) else str(item) for item in value)}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
