"""The training images that the codes of components come from, and how surely f gets these wrong itself.

Axis, beside those of artifacts/__init__.py: k components of one mixture.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from defuse_core.artifacts import F64, I64, Failures, Scenarios
from defuse_core.intervals import exact_lower


@dataclass(frozen=True, eq=False)
class Sources:
    """The training images of k components. Those of one track show the same object: together they count once."""

    support: I64  # (k,) distinct training images of the codes that belong most to each component
    wrong: F64  # (k,) how many of these images f itself gets wrong
    # k of (n, 3): the tracks of these images, how many images each has, and how many of them f gets wrong; None where
    # images have no tracks
    tracks: tuple[F64, ...] | None = None

    @staticmethod
    def joined(parts: Sequence[Sources]) -> Sources:
        """Return the sources of the same components over all parts of Ψ, which have no image in common."""
        support = np.sum([part.support for part in parts], axis=0)
        wrong = np.sum([part.wrong for part in parts], axis=0)
        tables = [part.tracks for part in parts if part.tracks is not None]
        if len(tables) < len(parts):
            return Sources(support, wrong)
        return Sources(support, wrong, tuple(_merged(of_parts) for of_parts in zip(*tables, strict=True)))

    @staticmethod
    def of_all(mixtures: Sequence[Sources]) -> Sources:
        """Return the sources of the components of all mixtures, one mixture after the other."""
        tables = [part.tracks for part in mixtures if part.tracks is not None]
        return Sources(
            np.concatenate([part.support for part in mixtures]),
            np.concatenate([part.wrong for part in mixtures]),
            tuple(itertools.chain(*tables)) if len(tables) == len(mixtures) else None,
        )

    def error(self) -> F64:
        """Return the share of the images of each component that f itself gets wrong, (k,); nan where it has none."""
        error: F64 = self.wrong / np.maximum(self.support, 1)
        return np.where(self.support > 0, error, np.nan)

    def certain_error(self) -> F64:
        """Return the lower 95 % bound of the error on the images of each component, (k,); 0 without any.

        Where images have tracks it is that of the error on tracks. The bound is Clopper and Pearson's, since there may
        be one or two of either.
        """
        total, wrong = self.wrong_tracks() or (self.support, self.wrong)
        return exact_lower(wrong.astype(np.int64), total)

    def wrong_tracks(self) -> tuple[I64, F64] | None:
        """Return how many tracks each component has, (k,), and of how many f gets most images wrong; None without."""
        if self.tracks is None:
            return None
        count = np.array([len(table) for table in self.tracks], np.int64)
        wrong = [(2 * table[:, 2] > table[:, 1]).sum() for table in self.tracks]
        return count, np.array(wrong, np.float64)


def count_sources(by_component: Sequence[Failures]) -> Sources:
    """Return the training images that the failures of each component come from."""
    support, wrong = np.zeros(len(by_component), np.int64), np.zeros(len(by_component))
    tables = list[F64]()
    for row, failures in enumerate(by_component):
        images, first = np.unique(failures.source, return_index=True)
        support[row] = len(images)
        of_image: F64 = failures.source_wrong[first].astype(np.float64)
        wrong[row] = of_image.sum()
        if failures.source_track is not None:
            table = [failures.source_track[first], np.ones(len(images)), of_image]
            tables.append(_merged([np.stack(table, axis=1)]))
    return Sources(support, wrong, tuple(tables) if len(tables) == len(by_component) else None)


def _merged(tables: Sequence[F64]) -> F64:
    """Return one row of each track, (n, 3), with the sums over its rows in all tables."""
    rows = np.concatenate(tables)
    tracks, of_track = np.unique(rows[:, 0], return_inverse=True)
    counts = [np.bincount(of_track, rows[:, column], minlength=len(tracks)) for column in (1, 2)]
    return np.stack([tracks, *counts], axis=1)


def certain_source_error(scenarios: Scenarios) -> F64:
    """Return the `Sources.certain_error` of components whose shares of wrong images are stored, (S,)."""
    total, wrong = scenarios.source_tracks, scenarios.wrong_tracks
    if total is None or wrong is None:
        total, wrong = scenarios.support, np.nan_to_num(scenarios.source_error) * scenarios.support
    return exact_lower(np.rint(wrong).astype(np.int64), total)
