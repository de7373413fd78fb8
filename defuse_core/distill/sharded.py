"""§3.2.2 over all of Ψ (distill.max_codes: null): the codes stay where they were loaded, sums over them travel.

Ψ is cut into parts of consecutive shards that depend on Ψ alone. Every iteration adds up the sums of the parts in their
order, in float64, so any number of workers gives the same bits. Each fit starts from the fit to a sample of Ψ, which
leaves few iterations to do over all codes. The parts are always worked on by the CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from defuse_core.artifacts import F32, F64, I64, ComponentFailures, Failures, Psi, Scenarios
from defuse_core.config import DistillSection, RunFile
from defuse_core.data import reopen_splits
from defuse_core.device import cpu_threads
from defuse_core.distill.components import (
    LEAST_UNITS,
    WHOLE,
    Cell,
    FittedCell,
    Sources,
    components_of,
    count_sources,
    failures_by_component,
    fit_mixture,
    join_small_cells,
    kept_components,
    log_scenarios,
    scenarios_of,
    small_cell,
)
from defuse_core.distill.draws import component_failures, drop_with_few_units
from defuse_core.distill.mixture import (
    FittedMixture,
    PartialSums,
    VariationalFit,
    covariance_of,
    maximise,
    mixture_coefficients,
    one_component_coefficients,
    partial_sums,
    prior_covariance,
    summed_statistics,
)
from defuse_core.identify import shard_of_psi, subsample_psi
from defuse_core.protocols import Compute, Partitions, Progress
from defuse_core.store import Store

log = logging.getLogger("defuse")
PART_CODES = 2**16  # fewest codes of a part, if Ψ has so many
MOST_PARTS = 1024
LOG_EVERY = 10  # iterations


@dataclass(frozen=True, eq=False)
class CellCodes:
    """The codes of consecutive shards, cell by cell."""

    failures: Failures
    rows: dict[Cell, slice]

    def of(self, cell: Cell) -> F32:
        """Return the codes of a cell, none where there is none."""
        return self.failures.codes[self.rows.get(cell, slice(0, 0))]


@dataclass(frozen=True, eq=False)
class CellSummary:
    """What is known of a cell before its fit."""

    count: int
    support: int  # distinct training images; those of different shards are different
    units: I64  # tracks of these images, or these images without tracks; no more than make a scenario
    total: F64  # (Z,) sum of the codes


def distill_all(spec: RunFile, psi: Psi, store: Store, data_fingerprint: str, compute: Compute) -> Scenarios:
    """Return Λ, fitted to all codes of Ψ. With vae.decode: anchored the failures of a component are of the sample."""
    spans = part_spans(psi.codes)
    parts = compute.partitions(
        "distill", load_part, [(store, psi.fingerprint, spec.distill.by, *span) for span in spans]
    )
    cells = _merged_cells(parts.map(summarise, max(spec.distill.min_support, LEAST_UNITS)))
    kept = {
        cell: summary
        for cell, summary in cells.items()
        if summary.count > 1 and summary.count / psi.total > spec.distill.min_weight
    }
    sample = compute.task("distill", fit_samples, spec, psi, store, kept)
    dropped = [
        small_cell(
            cell, summary.count, summary.count / psi.total, summary.support, len(summary.units), spec.distill
        )
        for cell, summary in cells.items()
        if cell not in kept
    ]
    small = join_small_cells(dropped)
    if not kept:
        return Scenarios.none(spec.vae.latent_dim, psi.total, small)
    with cpu_threads(1):
        fits = _fit(spec.distill, parts, kept, sample, compute.progress)
    fitted = _with_support(psi, cells, fits, parts)
    scenarios = scenarios_of(fitted, spec.distill, small)
    if spec.vae.decode == "anchored" and len(scenarios):
        failures = compute.task("distill", sampled_failures, spec, psi, store, data_fingerprint, fitted)
        scenarios = drop_with_few_units(replace(scenarios, failures=failures))
    log_scenarios(spec, scenarios)
    return scenarios


def part_spans(codes: I64) -> list[tuple[int, int]]:
    """Return the first shard of each part and the one after its last, for the (G,) numbers of codes of the shards."""
    enough = max(PART_CODES, -(-int(codes.sum()) // MOST_PARTS))
    spans, first, held = [], 0, 0
    for shard, count in enumerate(codes.tolist(), start=1):
        held += count
        if held >= enough or shard == len(codes):
            spans.append((first, shard))
            first, held = shard, 0
    return spans


def load_part(store: Store, fingerprint: str, by: str, first: int, after: int) -> CellCodes:
    """Return the codes of the shards from `first`, grouped by cell, in the order of Ψ within each."""
    shards = [shard_of_psi(store, fingerprint, index).failures for index in range(first, after)]
    merged = Failures.concatenate(shards)
    if by == "all":
        return CellCodes(merged, {WHOLE: slice(0, len(merged))})
    order = np.lexsort((merged.predicted, merged.truth))
    labels = np.stack([merged.truth, merged.predicted], axis=1)[order]
    cells, starts = np.unique(labels, axis=0, return_index=True)
    edges = pairwise([*starts.tolist(), len(merged)])  # none where the shards hold no code
    rows = {
        (source, answer): slice(start, end)
        for (source, answer), (start, end) in zip(cells.tolist(), edges, strict=True)
    }
    return CellCodes(merged.take(order), rows)


def summarise(part: CellCodes, enough: int) -> dict[Cell, CellSummary]:
    """Return the number of codes and of training images, `enough` units, and the sum of the codes, of each cell."""
    return {
        cell: CellSummary(
            rows.stop - rows.start,
            len(np.unique(part.failures.source[rows])),
            np.unique(part.failures.unit[rows])[:enough],
            part.failures.codes[rows].astype(np.float64).sum(axis=0),
        )
        for cell, rows in part.rows.items()
    }


def _merged_cells(parts: Sequence[dict[Cell, CellSummary]]) -> dict[Cell, CellSummary]:
    """Return the summaries over all parts, by cell."""
    of = dict[Cell, list[CellSummary]]()
    for part in parts:
        for cell, summary in part.items():
            of.setdefault(cell, []).append(summary)
    return {
        cell: CellSummary(
            sum(each.count for each in found),
            sum(each.support for each in found),
            # `enough` or more where a part has these
            np.unique(np.concatenate([each.units for each in found])),
            np.sum([each.total for each in found], axis=0),
        )
        for cell, found in sorted(of.items())
    }


def fit_samples(
    spec: RunFile, psi: Psi, store: Store, cells: dict[Cell, CellSummary], *, progress: Progress
) -> dict[Cell, FittedMixture]:
    """Return a mixture for each cell with two codes or more in a sample of Ψ, fitted to these."""
    sample, fits = subsample_psi(spec, psi, store), {}
    for number, (cell, summary) in enumerate(cells.items()):
        progress("fitting the mixtures to a sample", number, len(cells), "fits")
        codes = _of_cell(sample, cell).codes
        if len(codes) < 2:
            continue
        components = components_of(summary.count / psi.total, spec.distill)
        fits[cell] = fit_mixture(codes, components, spec.distill, spec.seed, cell)
    return fits


def _fit(
    section: DistillSection,
    parts: Partitions,
    cells: dict[Cell, CellSummary],
    sample: dict[Cell, FittedMixture],
    progress: Progress,
) -> dict[Cell, FittedMixture]:
    """Return the mixtures over all codes, begun from those over a sample. Every iteration reads all codes once.

    A cell of which the sample has fewer than two codes begins, and stays, with one component.
    """
    centers = {cell: summary.total / summary.count for cell, summary in cells.items()}
    single = {cell: one_component_coefficients(len(center)) for cell, center in centers.items()}
    spreads = _summed(parts, centers, single)
    tables = single | {cell: mixture_coefficients(fit, centers[cell]) for cell, fit in sample.items()}
    start_sums = _summed(parts, centers, tables)
    fits = {}
    for cell, table in tables.items():
        prior = prior_covariance(covariance_of(spreads[cell]))
        posterior = maximise(prior, summed_statistics(start_sums[cell], table))
        fits[cell] = VariationalFit(
            posterior,
            prior,
            centers[cell],
            max_iterations=section.max_iterations,
            tolerance=section.tolerance,
        )
    while running := {cell: fit for cell, fit in fits.items() if not fit.done}:
        _iterate(parts, centers, running)
        done = max(fit.iteration for fit in running.values())
        progress("fitting the mixtures to all codes", done, section.max_iterations, "iterations")
        if done % LOG_EVERY == 0:
            change = max(abs(fit.change) for fit in running.values())
            log.debug("distill: iteration %d, the bound changed by %.3g nats", done, change)
    return {cell: fit.fitted() for cell, fit in fits.items()}


def _iterate(parts: Partitions, centers: dict[Cell, F64], running: dict[Cell, VariationalFit]) -> None:
    """One E step over all codes and the M step, for every fit that has not converged."""
    tables = {cell: fit.coefficients() for cell, fit in running.items()}
    sums = _summed(parts, centers, tables)
    for cell, fit in running.items():
        fit.step(summed_statistics(sums[cell], tables[cell]))


def _summed(
    parts: Partitions, centers: dict[Cell, F64], tables: dict[Cell, F64]
) -> dict[Cell, list[PartialSums]]:
    """Return the partial sums of each cell, in the order of the parts."""
    of_parts = parts.map(part_sums, {cell: centers[cell] for cell in tables}, tables)
    return {cell: [part[cell] for part in of_parts if cell in part] for cell in tables}


def part_sums(part: CellCodes, centers: dict[Cell, F64], tables: dict[Cell, F64]) -> dict[Cell, PartialSums]:
    """Return the sums over a part's codes of each cell that it holds, under that cell's coefficients."""
    with cpu_threads(1):
        return {
            cell: partial_sums(part.of(cell), centers[cell], table)
            for cell, table in tables.items()
            if cell in part.rows
        }


def part_support(part: CellCodes, fits: dict[Cell, FittedMixture]) -> dict[Cell, Sources]:
    """Return count_sources of each component within a part."""
    counts = {}
    for cell, fit in fits.items():
        if cell in part.rows:
            counts[cell] = count_sources(failures_by_component(fit, part.failures.take(part.rows[cell])))
    return counts


def _with_support(
    psi: Psi, cells: dict[Cell, CellSummary], fits: dict[Cell, FittedMixture], parts: Partitions
) -> list[FittedCell]:
    counted = parts.map(part_support, fits)
    fitted = []
    for cell, fit in fits.items():
        sources = Sources.summed([part[cell] for part in counted if cell in part])
        count = cells[cell].count
        fitted.append(FittedCell(fit, cell, count, count / psi.total, sources))
    return fitted


def sampled_failures(
    spec: RunFile,
    psi: Psi,
    store: Store,
    data_fingerprint: str,
    fitted: list[FittedCell],
    *,
    progress: Progress,
) -> ComponentFailures:
    """Return failures of each component that is kept, out of the sample of Ψ."""
    progress("collecting failures of the components")
    sample, found = subsample_psi(spec, psi, store), list[Failures]()
    for cell in fitted:
        members = _of_cell(sample, cell.cell)
        if not len(members):  # a rare cell, which the sample misses
            members = _all_of_cell(psi, store, cell.cell)
        # all of the cell's for a component that no code of the sample belongs to
        by_component = failures_by_component(cell.fit, members)
        found.extend(own if len(own) else members for own in by_component)
    train = reopen_splits(spec, data_fingerprint).train
    kept, _ = kept_components(fitted, spec.distill)
    return component_failures([found[row] for row in kept], train, spec.seed)


def _all_of_cell(psi: Psi, store: Store, cell: Cell) -> Failures:
    """Return all failures of a cell, from every shard."""
    shards = np.flatnonzero(psi.codes).tolist()
    return Failures.concatenate(
        [_of_cell(shard_of_psi(store, psi.fingerprint, index).failures, cell) for index in shards]
    )


def _of_cell(sample: Failures, cell: Cell) -> Failures:
    if cell == WHOLE:
        return sample
    return sample.take((sample.truth == cell[0]) & (sample.predicted == cell[1]))
