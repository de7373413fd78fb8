"""Artefacts as bytes: safetensors, which holds no code.

Arrays are tensors. Everything else is JSON in the header, in which `{"tensor": name}` is in the place of an array, and
`{"float": "nan"}` in that of a number that JSON lacks.
A SHA-256 over both is checked on every read.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from types import GenericAlias
from typing import Any, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from defuse_core.errors import OTHER_FORMAT_REMEDY, DamagedError

T = TypeVar("T")
Arrays = dict[str, npt.NDArray[Any]]

FORMAT = 7  # of every kind of artefact that is not in FORMATS
FORMATS = {"Psi": 8, "Shard": 8}  # a kind gets the next number here with each change of its stored fields
TENSOR = "tensor"
FLOAT = "float"  # nan, inf or -inf; in an optional field they become None


def encode(artefact: object) -> bytes:
    """Return the artefact as safetensors bytes. Equal artefacts give equal bytes."""
    arrays, body = _parts(artefact)
    # one header entry: with several, safetensors writes them in an order that changes from call to call
    return save_tensors(arrays, metadata={"defuse": json.dumps([array_digest(arrays, body), body])})


def artefact_digest(artefact: object) -> str:
    """Return the SHA-256, in hex, that `encode` stores of the artefact; nothing is copied."""
    return array_digest(*_parts(artefact))


def _parts(artefact: object) -> tuple[Arrays, str]:
    """Return the arrays of the artefact, and everything else as JSON."""
    arrays: Arrays = {}
    fields = _split(artefact, "", arrays)
    kind = type(artefact).__name__
    body = {"format": format_of(kind), "kind": kind, "fields": fields}
    return arrays, json.dumps(body, sort_keys=True)


def decode(
    kind: type[T], data: bytes, where: str, remedy: str | None = None, other_format_remedy: str | None = None
) -> T:
    """Return the artefact in `data`. Raises DamagedError, naming `where`, for other, truncated or altered bytes.

    `remedy` is what the error says to do, or what is done by itself; None stands for an artefact that a run makes.
    `other_format_remedy` says it for bytes of another version of Defuse, where `remedy` does not help.
    """
    made_again = remedy or "delete it and run again: it is made again"
    another = other_format_remedy or remedy or OTHER_FORMAT_REMEDY
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        arrays = load_tensors(data)
        digest, text = json.loads(header["defuse"])
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise DamagedError(
            f"{where}: expected a {kind.__name__} artefact, found unreadable bytes ({error}); {made_again}"
        ) from error
    if digest != array_digest(arrays, text):
        raise DamagedError(f"{where}: its bytes changed since they were written; {made_again}")
    body, name = json.loads(text), kind.__name__
    if body["kind"] != name:
        raise DamagedError(f"{where}: expected a {name} artefact, found {body['kind']}; {made_again}")
    if body.get("format") != format_of(name):
        _refuse_format(where, name, f"artefact format {body.get('format', 1)}", another)
    try:
        artefact: T = _adapter(kind).validate_python((_join(body["fields"], arrays),))[0]  # type: ignore[arg-type]
        return artefact
    except KeyError as error:
        _refuse_format(where, name, f"a {name} without the array {error}", another)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:])
        _refuse_format(where, name, f"a {name} with other fields ({field}: {first['msg']})", another)


def format_of(kind: str) -> int:
    """Return the format of a kind of artefact; files of another one are refused."""
    return FORMATS.get(kind, FORMAT)


def _refuse_format(where: str, kind: str, found: str, remedy: str) -> NoReturn:
    raise DamagedError(f"{where}: expected artefact format {format_of(kind)}, found {found}; {remedy}")


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    """Return what validates a tuple of one artefact: pydantic accepts no config for a dataclass on its own."""
    alone: Any = GenericAlias(tuple, (kind,))
    return TypeAdapter(alone, config=ConfigDict(arbitrary_types_allowed=True, extra="forbid"))


def array_digest(arrays: Arrays, text: str = "") -> str:
    """Return a SHA-256, in hex, over `text` and the arrays' names, types, shapes and bytes."""
    sha = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        sha.update(f"{name}{array.dtype}{array.shape}".encode())
        sha.update(array.data if array.size else b"")
    return sha.hexdigest()


def _split(value: Any, name: str, arrays: Arrays) -> Any:
    """Return `value` as JSON, with its arrays moved into `arrays` under the path of their field."""
    if isinstance(value, np.ndarray):
        arrays[name] = np.ascontiguousarray(value).reshape(value.shape)
        return {TENSOR: name}
    if dataclasses.is_dataclass(value):
        value = {field.name: _field(value, field) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {
            str(key): _split(item, f"{name}/{key}" if name else str(key), arrays)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_split(item, f"{name}/{place}", arrays) for place, item in enumerate(value)]
    value = value.item() if isinstance(value, np.generic) else value
    return {FLOAT: str(value)} if _is_not_finite(value) else value


def _field(artefact: Any, field: dataclasses.Field[Any]) -> Any:
    """Return the value of a field; None in place of a number that JSON lacks, where the field can be None."""
    value = getattr(artefact, field.name)
    return None if field.type not in (float, "float") and _is_not_finite(value) else value


def _is_not_finite(value: object) -> bool:
    """Whether `value` is a number that JSON lacks."""
    return isinstance(value, float | np.floating) and not math.isfinite(value)


def _join(value: Any, arrays: Arrays) -> Any:
    """Return the JSON `value` with each array back in its place."""
    if isinstance(value, dict):
        if value.keys() == {TENSOR}:
            return arrays[value[TENSOR]]
        if value.keys() == {FLOAT}:
            return float(value[FLOAT])
        return {key: _join(item, arrays) for key, item in value.items()}
    return [_join(item, arrays) for item in value] if isinstance(value, list) else value
