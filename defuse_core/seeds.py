"""Every random stream of a run, derived from the run's seed and the name of its purpose, never from a worker."""

import zlib

import numpy as np


def _entropy(seed: int, path: tuple[str | int, ...]) -> np.random.SeedSequence:
    return np.random.SeedSequence(
        [seed, *(zlib.crc32(p.encode()) if isinstance(p, str) else p for p in path)]
    )


def generator(seed: int, *path: str | int) -> np.random.Generator:
    """Return the stream for `path`, such as ("identify", block). Equal arguments give equal streams on any machine."""
    return np.random.Generator(np.random.PCG64(_entropy(seed, path)))


def torch_seed(seed: int, *path: str | int) -> int:
    """Return a seed in [0, 2^63) for torch, likewise."""
    return int(_entropy(seed, path).generate_state(1, np.uint64)[0] >> np.uint64(1))
