"""A bounded sample, in the store, of served inputs that are inside a failure scenario.

    traffic/<run>/003/0007.safetensors     one SampledInput, in slot 7 of scenario 3

Every replica samples the inputs that it receives (Vitter's algorithm R) into the same slots. So the store holds at most
`serve.reservoir` inputs per scenario, for any number of replicas and restarts. The sample is uniform over the inputs of
one replica since its start; replicas with little and much traffic write with equal weight.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from defuse_core.artifacts import (
    F32,
    F64,
    I64,
    Gallery,
)
from defuse_core.codec import decode, encode
from defuse_core.errors import DefuseError, InputError, StoreError
from defuse_core.store import Store

log = logging.getLogger("defuse")
MAX_PENDING_WRITES = 64  # inputs above this are dropped: answers have priority over samples


@dataclass(frozen=True, eq=False)
class SampledInput:
    """One input inside a failure scenario."""

    image: F32  # (channels, H, W) in [0, 1]
    scenario: int  # index among the run's components
    predicted: int
    version: str
    when: float  # seconds since 1970
    classes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Traffic:
    """All sampled inputs of one run, M of them, oldest first."""

    images: F32  # (M, channels, H, W) in [0, 1]
    scenario: I64  # (M,) index among the run's components
    predicted: I64  # (M,) answer of the version that received the input
    when: F64  # (M,) seconds since 1970
    classes: tuple[str, ...]  # (C,)

    def __len__(self) -> int:
        return len(self.scenario)

    def without(self, shown: Collection[bytes]) -> Traffic:
        """Return the inputs whose pixels are not in `shown`, without duplicates."""
        rows, known = [], set(shown)
        for row, image in enumerate(self.images):
            pixels = image.tobytes()
            if pixels not in known:
                known.add(pixels)
                rows.append(row)
        return Traffic(
            self.images[rows], self.scenario[rows], self.predicted[rows], self.when[rows], self.classes
        )

    def gallery(self, images: int) -> Gallery:
        """Return the newest `images` inputs of every scenario that has at least so many.

        The codes of this Gallery are empty, (S, R, 0): its images were not drawn from a component.
        """
        full = [s for s in np.unique(self.scenario) if (self.scenario == s).sum() >= images]
        rows = np.array([np.flatnonzero(self.scenario == s)[-images:] for s in full], np.int64).reshape(
            -1, images
        )
        codes = np.zeros((*rows.shape, 0), np.float32)
        numbers = tuple(int(scenario) for scenario in full)
        return Gallery(self.images[rows], codes, self.predicted[rows], self.classes, numbers)


def read_traffic(store: Store, run: str) -> Traffic:
    """Return the sampled inputs of `run`; `store` is the one that holds the runs. Raises InputError for none."""
    folder = store.within("traffic").within(run)
    found: list[SampledInput] = []
    for key in folder.list():
        try:
            found.append(decode(SampledInput, folder.read(key), f"{folder.address}/{key}"))
        except FileNotFoundError:
            continue  # replaced while this was reading
        except StoreError as error:
            raise StoreError(f"{error}; delete {folder.address} to start a new sample") from error
    if not found:
        raise InputError(
            f"no inputs of run {run} are stored; serve it with `--set serve.reservoir=50`, and wait for traffic"
        )
    found.sort(key=lambda sampled: sampled.when)
    return Traffic(
        images=np.stack([sampled.image for sampled in found]),
        scenario=np.array([sampled.scenario for sampled in found], np.int64),
        predicted=np.array([sampled.predicted for sampled in found], np.int64),
        when=np.array([sampled.when for sampled in found]),
        classes=found[0].classes,
    )


class Reservoir:
    """The sampler of one replica. It writes in a thread of its own and never delays an answer."""

    def __init__(self, store: Store, capacity: int) -> None:
        self.store = store.within("traffic")
        self.capacity = capacity
        self._counts: dict[tuple[str, int], int] = {}  # (run, scenario) -> inputs so far
        self._random = np.random.default_rng()
        self._pending = 0
        self._thread = ThreadPoolExecutor(1, "reservoir")

    def offer(self, run: str, sampled: SampledInput) -> None:
        """Store the input, or not: every input so far has the same chance to be in the sample."""
        scenario = (run, sampled.scenario)
        self._counts[scenario] = count = self._counts.get(scenario, 0) + 1
        slot = count - 1 if count <= self.capacity else int(self._random.integers(count))
        if slot >= self.capacity or self._pending >= MAX_PENDING_WRITES:
            return
        self._pending += 1
        self._thread.submit(self._write, f"{run}/{sampled.scenario:03d}/{slot:04d}.safetensors", sampled)

    def _write(self, key: str, sampled: SampledInput) -> None:
        try:
            self.store.write(key, encode(sampled))
        except DefuseError as error:
            log.warning("an input was not stored: %s", error)
        finally:
            self._pending -= 1


def sample_now(
    image: F32, scenario: int, predicted: int, version: str, classes: tuple[str, ...]
) -> SampledInput:
    """Return the record of an input that arrived now."""
    return SampledInput(np.array(image), scenario, predicted, version, time.time(), classes)
