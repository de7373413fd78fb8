"""Reading, checking, comparing and writing run files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from defuse_core.config.run_file import RunFile
from defuse_core.errors import RunFileError


def load_run_file(path: Path, overrides: tuple[str, ...] = ()) -> RunFile:
    """Return the run file at `path` with `a.b=value` overrides applied. Raises RunFileError, in one line."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunFileError(f"{path}: cannot read this run file ({error.strerror})") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or 2023-02-30
        raise RunFileError(f"{path}: expected YAML, found {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise RunFileError(f"{path}: expected sections such as `data:`, found {type(tree).__name__}")
    for override in overrides:
        apply_override(tree, override)
    return parse_run_file(tree, str(path))


def parse_run_file(tree: dict[str, Any], where: str) -> RunFile:
    """Return the checked run file. Raises RunFileError naming the first invalid field."""
    try:
        return RunFile.model_validate(tree)
    except ValidationError as error:
        raise RunFileError(f"{where}: {first_problem(error, RunFile)}") from error


def first_problem(error: ValidationError, section: type[BaseModel]) -> str:
    """Return the first invalid field of `section` with what was expected and found, in one line."""
    problems: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        problems.setdefault(_field_at(detail["loc"], section), []).append(detail)
    field, (first, *others) = next(iter(problems.items()))
    if first["type"] == "extra_forbidden":
        return f"{field}: unknown field"
    message = first["msg"].removeprefix("Value error, ")
    for other in others:  # the field has a union of types
        message += " or " + other["msg"].removeprefix("Input should be ")
    found = "" if first["type"] in {"missing", "value_error"} else f", found {first['input']!r}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{field + ': ' if field else ''}{message}{found}{more}"


def _field_at(place: tuple[int | str, ...], section: type[BaseModel]) -> str:
    """Return a location as a dotted name, without pydantic's names for the types of a union."""
    names: list[int | str] = []
    for number, part in enumerate(place):
        names.append(part)
        kind = section.model_fields[part].annotation if part in section.model_fields else None
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            names += [deeper for deeper in place[number + 1 :] if isinstance(deeper, int)]
            break
        section = kind
    return ".".join(map(str, names))


def dump_run_file(spec: RunFile) -> str:
    """Return the run file as YAML, with every field; load_run_file reads it back to an equal one."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def changed_field(recorded: RunFile, given: RunFile) -> str | None:
    """Return the first field that differs and would change results, as `a.b: 1 in the run, 2 now`, or None."""
    before, now = _flat(recorded.model_dump(mode="json")), _flat(given.model_dump(mode="json"))
    for field in before | now:
        free = field in {"data.root", "data.download", "vae.accept"} or field.startswith(
            ("resources.", "check.", "serve.")
        )
        if field.endswith(".weights") and before.get(field) and now.get(field):
            continue  # the content of the file counts, not its path
        if before.get(field) != now.get(field) and (not free or field == "resources.train_threads"):
            return f"{field}: {before.get(field)!r} in the run, {now.get(field)!r} now"
    return None


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one `a.b=value`; the value is read as YAML."""
    path, equals, text = override.partition("=")
    *sections, field = path.strip().split(".")
    if not equals or not field:
        raise RunFileError(f"--set {override}: expected section.field=value")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise RunFileError(f"--set {override}: {section} is not a section")
    try:
        tree[field] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise RunFileError(f"--set {override}: the value is not YAML") from error
