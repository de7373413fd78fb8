"""Inputs from traffic that lie in a failure scenario: a bounded sample of them in the store.

    traffic/<run>/003/0007.safetensors     one Seen, in slot 7 of scenario 3

Every replica samples what it sees since it started (Vitter's algorithm R) into the same slots, so the store never holds
more than `serve.reservoir` inputs per scenario, however many replicas there are and however often they are restarted.
The sample is uniform over what each replica saw; one that has seen little writes as readily as another.
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
from defuse_core.errors import DefuseError, InputError
from defuse_core.store import Store

log = logging.getLogger("defuse")
WAITING = 64  # writes that may wait; more are dropped, since traffic goes before its sample


@dataclass(frozen=True, eq=False)
class Seen:
    """One input that lay in a failure scenario."""

    image: F32  # (channels, H, W) in [0, 1]
    scenario: int  # index among the run's components
    predicted: int
    version: str
    when: float  # seconds since 1970
    classes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Traffic:
    """All inputs kept of one run, M of them, oldest first."""

    images: F32  # (M, channels, H, W) in [0, 1]
    scenario: I64  # (M,) index among the run's components
    predicted: I64  # (M,) what the version that saw it answered
    when: F64  # (M,) seconds since 1970
    classes: tuple[str, ...]  # (C,)

    def __len__(self) -> int:
        return len(self.scenario)

    def without(self, shown: Collection[bytes]) -> Traffic:
        """Return the inputs whose pixels are not among `shown`, each of them once."""
        fresh, met = [], set(shown)
        for row, image in enumerate(self.images):
            pixels = image.tobytes()
            if pixels not in met:
                met.add(pixels)
                fresh.append(row)
        return Traffic(
            self.images[fresh], self.scenario[fresh], self.predicted[fresh], self.when[fresh], self.classes
        )

    def gallery(self, images: int) -> Gallery:
        """Return the newest `images` inputs of every scenario that has so many.

        The codes of such a Gallery are empty, (S, R, 0): these images were not drawn from a component.
        """
        full = [s for s in np.unique(self.scenario) if (self.scenario == s).sum() >= images]
        rows = np.array([np.flatnonzero(self.scenario == s)[-images:] for s in full], np.int64).reshape(
            -1, images
        )
        codes = np.zeros((*rows.shape, 0), np.float32)
        numbers = tuple(int(scenario) for scenario in full)
        return Gallery(self.images[rows], codes, self.predicted[rows], self.classes, numbers)


def read_traffic(store: Store, run: str) -> Traffic:
    """Return the inputs kept of `run`. `store` is the one that holds the runs. Raises InputError if there are none."""
    folder = store.within("traffic").within(run)
    found: list[Seen] = []
    for key in folder.list():
        try:
            found.append(decode(Seen, folder.read(key), f"{folder.address}/{key}"))
        except FileNotFoundError:
            continue  # replaced while this was reading
    if not found:
        raise InputError(
            f"no inputs were kept of run {run}; serve it with `--set serve.reservoir=50`, and wait for traffic"
        )
    found.sort(key=lambda seen: seen.when)
    return Traffic(
        images=np.stack([seen.image for seen in found]),
        scenario=np.array([seen.scenario for seen in found], np.int64),
        predicted=np.array([seen.predicted for seen in found], np.int64),
        when=np.array([seen.when for seen in found]),
        classes=found[0].classes,
    )


class Reservoir:
    """One replica's part in the sample. Writing happens in a thread of its own and never holds up an answer."""

    def __init__(self, store: Store, capacity: int) -> None:
        self.store = store.within("traffic")
        self.capacity = capacity
        self._met: dict[tuple[str, int], int] = {}  # (run, scenario) -> inputs met so far
        self._random = np.random.default_rng()
        self._waiting = 0
        self._thread = ThreadPoolExecutor(1, "reservoir")

    def offer(self, run: str, seen: Seen) -> None:
        """Keep the input, in place of another one, or not: each one met is as likely to be kept as any other."""
        place = (run, seen.scenario)
        self._met[place] = met = self._met.get(place, 0) + 1
        slot = met - 1 if met <= self.capacity else int(self._random.integers(met))
        if slot >= self.capacity or self._waiting >= WAITING:
            return
        self._waiting += 1
        self._thread.submit(self._write, f"{run}/{seen.scenario:03d}/{slot:04d}.safetensors", seen)

    def _write(self, key: str, seen: Seen) -> None:
        try:
            self.store.write(key, encode(seen))
        except DefuseError as error:
            log.warning("an input was not kept: %s", error)
        finally:
            self._waiting -= 1


def seen_now(image: F32, scenario: int, predicted: int, version: str, classes: tuple[str, ...]) -> Seen:
    """Return the record of an input that came in now."""
    return Seen(np.array(image), scenario, predicted, version, time.time(), classes)
