"""Paths of many files as one buffer with offsets: 10 bytes a file beside its name, where a Python string takes 100."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from defuse_core.artifacts import I64, U8


@dataclass(frozen=True, eq=False)
class FilePaths:
    """N paths below one root. Ray's object store holds it once per node, whatever the number of workers."""

    root: str  # what every path begins with
    names: U8  # the rest of all paths, one after the other, in the encoding of the file system
    starts: I64  # (N,) where each begins
    lengths: npt.NDArray[np.uint16]  # (N,)

    @staticmethod
    def pack(paths: Sequence[str], root: str = "") -> FilePaths:
        """Return `paths`, each of which begins with `root`."""
        names = [os.fsencode(path.removeprefix(root)) for path in paths]
        lengths = np.fromiter(map(len, names), np.uint16, len(names))
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        return FilePaths(root, np.frombuffer(b"".join(names), np.uint8), starts, lengths)

    @staticmethod
    def concatenate(parts: Sequence[FilePaths]) -> FilePaths:
        """Return the paths of all parts, in order. Raises ValueError where their roots differ."""
        if len({part.root for part in parts}) != 1:
            raise ValueError(f"FilePaths: expected one root, found {sorted({part.root for part in parts})}")
        sizes = np.cumsum([0, *(len(part.names) for part in parts)])
        return FilePaths(
            parts[0].root,
            np.concatenate([part.names for part in parts]),
            np.concatenate([part.starts + size for part, size in zip(parts, sizes, strict=False)]),
            np.concatenate([part.lengths for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, row: int) -> str:
        start = int(self.starts[row])
        return self.root + os.fsdecode(self.names[start : start + int(self.lengths[row])].tobytes())

    def __iter__(self) -> Iterator[str]:
        return (self[row] for row in range(len(self)))

    def take(self, rows: slice | I64) -> FilePaths:
        """Return the paths of `rows`, which share the buffer of names."""
        return FilePaths(self.root, self.names, self.starts[rows], self.lengths[rows])
