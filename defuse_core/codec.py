"""Artefacts as bytes: safetensors, which holds no code.

Arrays are tensors, everything else is JSON in the header, with a SHA-256 over both that is checked on every read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from defuse_core.artifacts import Failures, Health
from defuse_core.errors import StoreError

T = TypeVar("T")


def encode(artefact: object) -> bytes:
    """Return the artefact as safetensors bytes: arrays as tensors, the rest as JSON, a digest over both."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    plain = _flatten(artefact, "", arrays)
    body = json.dumps({"kind": type(artefact).__name__, "fields": plain}, sort_keys=True)
    # one header entry: with several, safetensors writes them in an order that changes from call to call
    return save_tensors(arrays, metadata={"defuse": json.dumps([_digest(body, arrays), body])})


def decode(kind: type[T], data: bytes, where: str) -> T:
    """Return the artefact in `data`. Raises StoreError, naming `where`, for other, cut or altered bytes."""
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        arrays = load_tensors(data)
        digest, text = json.loads(header["defuse"])
    except (SafetensorError, ValueError, KeyError, OverflowError, MemoryError) as error:
        raise StoreError(
            f"{where}: expected a {kind.__name__} artefact, found unreadable bytes ({error})"
        ) from error
    if digest != _digest(text, arrays):
        raise StoreError(
            f"{where}: its bytes changed since they were written; delete it and run again to remake it"
        )
    body = json.loads(text)
    if body["kind"] != kind.__name__:
        raise StoreError(f"{where}: expected a {kind.__name__} artefact, found {body['kind']}")
    try:
        return _unflatten(kind, body["fields"], "", arrays)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{where}: another version of Defuse wrote it, with other fields ({error}); use that version"
        ) from error


def _digest(body: str, arrays: dict[str, npt.NDArray[Any]]) -> str:
    sha = hashlib.sha256(body.encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        sha.update(f"{name}{array.dtype}{array.shape}".encode())
        sha.update(array.data if array.size else b"")
    return sha.hexdigest()


def _flatten(artefact: Any, prefix: str, arrays: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """Move the arrays of a dataclass into `arrays` and return what is left, ready for JSON."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(artefact):
        value, name = getattr(artefact, field.name), prefix + field.name
        if isinstance(value, np.ndarray):
            arrays[name] = np.ascontiguousarray(value).reshape(value.shape)
        elif dataclasses.is_dataclass(value):
            plain[field.name] = _flatten(value, name + "/", arrays)
        elif field.type == "Weights":
            arrays.update(
                {f"{name}/{key}": np.ascontiguousarray(a).reshape(a.shape) for key, a in value.items()}
            )
        else:
            plain[field.name] = _finite(value)
    return plain


def _unflatten(kind: type[T], plain: dict[str, Any], prefix: str, arrays: dict[str, npt.NDArray[Any]]) -> T:
    values: dict[str, Any] = {}
    nested: dict[str, type[Any]] = {"Failures": Failures, "Health | None": Health}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        name = prefix + field.name
        if name in arrays:
            values[field.name] = arrays[name]
        elif field.type == "Weights":
            start = name + "/"
            values[field.name] = {key[len(start) :]: a for key, a in arrays.items() if key.startswith(start)}
        elif field.type in nested and plain.get(field.name) is not None:
            values[field.name] = _unflatten(nested[str(field.type)], plain[field.name], name + "/", arrays)
        elif field.name in plain or field.default is dataclasses.MISSING:
            value = plain[field.name]
            values[field.name] = tuple(value) if str(field.type).startswith("tuple") else value
    return kind(**values)


def _finite(value: Any) -> Any:
    """JSON has no NaN: an undefined figure is null there."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value
