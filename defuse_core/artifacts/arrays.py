"""Array types by element, and the check that the arrays of an artefact agree on their axes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
Bool = npt.NDArray[np.bool_]
Weights = dict[str, npt.NDArray[Any]]  # a torch state dict as arrays

NO_SCENARIO = -1  # in place of the number of a component
NONE_OF_THE_ABOVE = -1  # an answer, and also "no label" wherever a label is expected


def expect_shapes(owner: object, axes: dict[str, str]) -> None:
    """Bind each axis letter to the first length seen and raise ValueError where a later one differs."""
    bound: dict[str, int] = {}
    for name, letters in axes.items():
        shape = getattr(owner, name).shape
        expected = letters.split()
        if len(shape) != len(expected):
            raise ValueError(f"{type(owner).__name__}.{name}: expected axes ({letters}), found shape {shape}")
        for letter, length in zip(expected, shape, strict=True):
            if bound.setdefault(letter, length) != length:
                raise ValueError(
                    f"{type(owner).__name__}.{name}: axis {letter} has length {length}, elsewhere {bound[letter]}"
                )
