"""§3.2.2: distill Ψ into failure scenarios with Dirichlet-process Gaussian mixtures.

The paper fits one mixture to all codes. `distill.by: cell` fits one to each cell (class of the source images, answer of
the classifier), so that no component straddles classes. The number of training images that its codes come from decides
whether a component is kept; how surely f gets these wrong itself, its place with `distill.order: source-error`.

Axis, beside those of artifacts/__init__.py: k components of one mixture.
"""

from __future__ import annotations

import itertools
import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from threadpoolctl import threadpool_limits

from defuse_core.artifacts import F32, F64, I64, NONE_OF_THE_ABOVE, DroppedComponent, Failures, Psi, Scenarios
from defuse_core.config import DistillSection, RunFile
from defuse_core.data import reopen_splits
from defuse_core.device import cpu_threads
from defuse_core.distill.draws import component_failures, drop_with_few_units
from defuse_core.distill.mixture import (
    FittedMixture,
    fit_dirichlet_process_mixture,
    prior_covariance,
    responsibilities,
    sample_covariance,
)
from defuse_core.formatting import count_of
from defuse_core.identify import subsample_psi
from defuse_core.intervals import exact_lower
from defuse_core.protocols import Progress
from defuse_core.seeds import generator
from defuse_core.store import Store

log = logging.getLogger("defuse")
Cell = tuple[int, int]  # class of the source images and answer of f; WHOLE for a single mixture
WHOLE = (NONE_OF_THE_ABOVE, NONE_OF_THE_ABOVE)  # the cell of a single mixture over all codes
LEAST_UNITS = 5  # fewest images, or tracks, of a scenario, whatever the run file says
# cells too small for a component are listed up to so many: the header of an artefact has at most 100 MB
MOST_SMALL_CELLS = 10_000


def distill(spec: RunFile, psi: Psi, store: Store, data_fingerprint: str, *, progress: Progress) -> Scenarios:
    """Return Λ: the components over Ψ, down-sampled, whose weight is over ε and whose support suffices.

    With vae.decode: anchored each component gets failures of its own, with their training images; these must have
    `data_fingerprint`, else RunMismatchError is raised.
    """
    failures = subsample_psi(spec, psi, store)
    fits = fit_mixtures(failures, spec.distill, spec.seed, progress)
    scenarios = fits.scenarios()
    if spec.vae.decode == "anchored" and len(scenarios):
        train = reopen_splits(spec, data_fingerprint).train
        anchored = component_failures(fits.members(), train, spec.seed)
        scenarios = drop_with_few_units(replace(scenarios, failures=anchored))
    log_scenarios(spec, scenarios)
    return scenarios


def log_scenarios(spec: RunFile, scenarios: Scenarios) -> None:
    """Log how many components there are, and how far the fit is from convergence; nothing where there was none."""
    if not scenarios.codes_used:
        return
    state = "converged"
    if not scenarios.converged:
        state = "had NOT converged"
        if (changed := scenarios.last_change) is not None:
            state += f" (its bound changed by {changed:.3g} nats, tolerance {spec.distill.tolerance:g})"
    weights = scenarios.all_weights
    log.info(
        "kept %s of %s components with weight over %g (lighter ones hold %.0f %% of the codes), from %s codes; the fit "
        "%s after %d iterations",
        f"{len(scenarios):,}",
        f"{len(weights):,}",
        spec.distill.min_weight,
        100 * weights[weights <= spec.distill.min_weight].sum(),
        f"{scenarios.codes_used:,}",
        state,
        scenarios.iterations,
    )
    if scenarios.dropped:
        share = 100 * sum(one.weight for one in scenarios.dropped)
        log.info(
            "dropped %s components or cells with too few codes or images, which hold %.0f %% of the codes",
            f"{len(scenarios.dropped):,}",
            share,
        )


def fit_mixtures(failures: Failures, section: DistillSection, seed: int, progress: Progress) -> Fits:
    """Return one mixture per cell, which with distill.by: all is a single one, WHOLE.

    Each has its share of K (`components_of`). A cell whose weight is at most ε holds no component over ε: it is
    dropped, with its reason.
    """
    of_failures = np.stack([failures.truth, failures.predicted], axis=1)
    if section.by == "all":
        of_failures[:] = WHOLE
    cells, owner, counts = np.unique(of_failures, axis=0, return_inverse=True, return_counts=True)
    rows = np.split(np.argsort(owner.ravel(), kind="stable"), np.cumsum(counts)[:-1])
    fits = Fits(failures, section)
    for number, (source, answer) in enumerate(cells.tolist()):
        progress("fitting the mixtures", number, len(cells), "fits")
        members = failures.take(rows[number])
        weight = len(members) / len(failures)
        if len(members) < 2 or not weight > section.min_weight:
            support, units = len(np.unique(members.source)), len(np.unique(members.unit))
            fits.small.append(small_cell((source, answer), len(members), weight, support, units, section))
            continue
        fit = fit_mixture(members.codes, components_of(weight, section), section, seed, (source, answer))
        fits.add(fit, (source, answer), members)
    return fits


def components_of(weight: float, section: DistillSection) -> int:
    """Return how many components a cell gets: max_components times its share of all codes, one per 2 ε, at least 1."""
    least = 2 * section.min_weight if section.by == "cell" else 0.0
    return max(1, round(weight / max(least, 1 / section.max_components)))


def small_cell(
    cell: Cell, codes: int, weight: float, support: int, units: int, section: DistillSection
) -> DroppedComponent:
    """Return a cell that is dropped, since it holds no component over ε, or a single code, which is no cluster.

    Its codes come from `support` training images, of `units` tracks where images have these.
    """
    reason = f"the cell's {codes} codes are too few for a weight over {section.min_weight:g}"
    if codes < 2:
        reason = "a single code is no cluster"
    enough = units >= max(section.min_support, LEAST_UNITS)
    return DroppedComponent(weight, *cell, support, "few codes" if enough else "few images", reason)


def join_small_cells(small: list[DroppedComponent]) -> tuple[DroppedComponent, ...]:
    """Return MOST_SMALL_CELLS cells, of few codes (whose number is told) and then of most images; join the others.

    Those that are joined count as one of each cause.
    """
    order = sorted(range(len(small)), key=lambda row: (small[row].cause != "few codes", -small[row].support))
    kept, others = sorted(order[:MOST_SMALL_CELLS]), [small[row] for row in order[MOST_SMALL_CELLS:]]
    joined = []
    for cause in sorted({one.cause for one in others}):
        cells, reason = [one for one in others if one.cause == cause], f"cells of too {cause} each"
        log.info("dropped %s %s; they count as one", f"{len(cells):,}", reason)
        weight, support = sum(one.weight for one in cells), sum(one.support for one in cells)
        joined.append(DroppedComponent(weight, *WHOLE, support, cause, reason))
    return (*(small[row] for row in kept), *joined)


@dataclass(frozen=True, eq=False)
class Sources:
    """The training images of k components. Those of one track show the same object: together they count once."""

    support: I64  # (k,) distinct training images of the codes that belong most to each component
    wrong: F64  # (k,) how many of these images f itself gets wrong
    # k of (n, 3): the tracks of these images, how many images each has, and how many of them f gets wrong; None where
    # images have no tracks
    tracks: tuple[F64, ...] | None = None

    @staticmethod
    def summed(parts: Sequence[Sources]) -> Sources:
        """Return the sources of the same components over all parts of Ψ, which have no image in common."""
        support = np.sum([part.support for part in parts], axis=0)
        wrong = np.sum([part.wrong for part in parts], axis=0)
        tables = [part.tracks for part in parts if part.tracks is not None]
        if len(tables) < len(parts):
            return Sources(support, wrong)
        return Sources(support, wrong, tuple(_merged(of_parts) for of_parts in zip(*tables, strict=True)))

    @staticmethod
    def concatenated(mixtures: Sequence[Sources]) -> Sources:
        """Return the sources of the components of all mixtures, one mixture after the other."""
        tables = [part.tracks for part in mixtures if part.tracks is not None]
        return Sources(
            np.concatenate([part.support for part in mixtures]),
            np.concatenate([part.wrong for part in mixtures]),
            tuple(itertools.chain(*tables)) if len(tables) == len(mixtures) else None,
        )

    def units(self) -> I64:
        """Return how many images, or tracks where images have these, the codes of each component come from, (k,)."""
        tracks = self.wrong_tracks()
        return self.support if tracks is None else tracks[0]

    def error(self) -> F64:
        """Return the share of the images of each component that f itself gets wrong, (k,); nan where it has none."""
        error: F64 = self.wrong / np.maximum(self.support, 1)
        return np.where(self.support > 0, error, np.nan)

    def certain_error(self) -> F64:
        """Return the lower 95 % bound of the error on the images of each component, (k,); 0 without any.

        Where images have tracks it is that of the error on tracks. The bound is Clopper and Pearson's, which holds for
        one or two of either.
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


@dataclass(frozen=True, eq=False)
class FittedCell:
    """A mixture that was fitted to `codes` codes, which are the share `weight` of all."""

    fit: FittedMixture
    cell: Cell
    codes: int
    weight: float
    sources: Sources

    @property
    def weights(self) -> F64:
        """(k,) weights of its components among all codes."""
        weights: F64 = self.weight * self.fit.weights
        return weights


def failures_by_component(fit: FittedMixture, members: Failures) -> list[Failures]:
    """Return the failures that belong most to each of the k components."""
    with threadpool_limits(1):
        owner = responsibilities(members.codes, fit.weights, fit.means, fit.covariances).argmax(axis=1)
    return [members.take(owner == component) for component in range(len(fit.weights))]


def fit_mixture(codes: F32, components: int, section: DistillSection, seed: int, cell: Cell) -> FittedMixture:
    """Return the mixture over (n, Z) codes, by scikit-learn's variational inference (the paper names EM).

    The defaults are scikit-learn's, too, but for `prior_covariance`. One thread, so that sums round alike on every
    machine. There are at most as many components as different codes.
    """
    components = min(components, len(np.unique(codes, axis=0)))
    path = () if cell == WHOLE else cell
    random_state = int(generator(seed, "distill", "fit", *path).integers(2**31))
    if section.engine == "torch":
        with threadpool_limits(1), cpu_threads(1):
            return fit_dirichlet_process_mixture(
                codes.astype(np.float64),
                components,
                max_iterations=section.max_iterations,
                tolerance=section.tolerance,
                seed=random_state,
            )
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import BayesianGaussianMixture  # late: its import takes a second

    with threadpool_limits(1), warnings.catch_warnings():
        mixture = BayesianGaussianMixture(
            n_components=components,
            covariance_type="full",
            weight_concentration_prior_type="dirichlet_process",
            max_iter=section.max_iterations,
            tol=section.tolerance,
            random_state=random_state,
            covariance_prior=prior_covariance(sample_covariance(codes.astype(np.float64))),
        )
        warnings.simplefilter("ignore", ConvergenceWarning)  # the report states it
        mixture.fit(codes.astype(np.float64))
    bounds = mixture.lower_bounds_
    return FittedMixture(
        weights=mixture.weights_,
        means=mixture.means_,
        covariances=mixture.covariances_,
        converged=bool(mixture.converged_),
        iterations=int(mixture.n_iter_),
        lower_bound=float(mixture.lower_bound_),
        last_change=float(bounds[-1] - bounds[-2]) if len(bounds) > 1 else math.nan,
    )


@dataclass(eq=False)
class Fits:
    """All mixtures of a run, over `failures`."""

    failures: Failures
    section: DistillSection
    cells: list[FittedCell] = field(default_factory=list)
    by_component: list[Failures] = field(default_factory=list)  # that belong most to each, cell by cell
    small: list[DroppedComponent] = field(default_factory=list)  # cells without a mixture

    def add(self, fit: FittedMixture, cell: Cell, members: Failures) -> None:
        """Add the mixture of a cell, which was fitted to `members`."""
        own, weight = failures_by_component(fit, members), len(members) / len(self.failures)
        self.cells.append(FittedCell(fit, cell, len(members), weight, count_sources(own)))
        self.by_component.extend(own)

    def scenarios(self) -> Scenarios:
        """Return the components of all cells over ε with enough support, in the order of `section.order`."""
        small = join_small_cells(self.small)
        if not self.cells:
            return Scenarios.none(self.failures.codes.shape[1], len(self.failures), small)
        return scenarios_of(self.cells, self.section, small)

    def members(self) -> list[Failures]:
        """Return the failures that belong most to each component of `scenarios`, in their order."""
        return [self.by_component[row] for row in kept_components(self.cells, self.section)[0]]


def kept_components(cells: Sequence[FittedCell], section: DistillSection) -> tuple[I64, I64]:
    """Return the components over ε in the order of `section.order`: those with enough support, and the others."""
    weights = np.concatenate([cell.weights for cell in cells])
    sources = Sources.concatenated([cell.sources for cell in cells])
    over = np.flatnonzero(weights > section.min_weight)
    over = over[np.argsort(-weights[over], kind="stable")]
    if section.order == "source-error":
        over = over[np.argsort(-sources.certain_error()[over], kind="stable")]
    enough = sources.units()[over] >= section.min_support
    return over[enough], over[~enough]


def scenarios_of(
    fitted: Sequence[FittedCell], section: DistillSection, small: tuple[DroppedComponent, ...] = ()
) -> Scenarios:
    """Return the components of all mixtures over ε with enough support, in the order of `section.order`."""
    weights = np.concatenate([cell.weights for cell in fitted])
    sources = Sources.concatenated([cell.sources for cell in fitted])
    tracks, wrong = sources.wrong_tracks() or (None, None)
    cells = np.concatenate([np.tile(cell.cell, (len(cell.weights), 1)) for cell in fitted])
    means = np.concatenate([cell.fit.means for cell in fitted])
    covariances = np.concatenate([cell.fit.covariances for cell in fitted])
    kept, thin = kept_components(fitted, section)
    return Scenarios(
        weights=weights[kept],
        means=means[kept],
        covariances=covariances[kept],
        all_weights=weights,
        codes_used=sum(cell.codes for cell in fitted),
        converged=all(cell.fit.converged for cell in fitted),
        iterations=max(cell.fit.iterations for cell in fitted),
        lower_bound=float(sum(cell.fit.lower_bound for cell in fitted)),
        cells=cells[kept],
        support=sources.support[kept],
        source_error=sources.error()[kept],
        source_tracks=None if tracks is None else tracks[kept],
        wrong_tracks=None if wrong is None else wrong[kept],
        last_change=_largest_change([cell.fit for cell in fitted]),
        dropped=small
        + tuple(_without_support(weights[row], cells[row], sources, row, section) for row in thin),
        all_means=means,
        all_covariances=covariances,
    )


def _largest_change(fits: list[FittedMixture]) -> float | None:
    """Return the largest change of a bound in the last iteration, in nats; None where no fit had two iterations."""
    changes = [abs(fit.last_change) for fit in fits if math.isfinite(fit.last_change)]
    return max(changes, default=None)


def _without_support(
    weight: float, cell: I64, sources: Sources, row: int, section: DistillSection
) -> DroppedComponent:
    source, answer = cell.tolist()
    found = count_of(int(sources.units()[row]), "training image" if sources.tracks is None else "track")
    reason = f"its codes come from {found}, fewer than {section.min_support}"
    return DroppedComponent(float(weight), source, answer, int(sources.support[row]), "few images", reason)


def certain_source_error(scenarios: Scenarios) -> F64:
    """Return the `Sources.certain_error` of components whose shares of wrong images are stored, (S,)."""
    total, wrong = scenarios.source_tracks, scenarios.wrong_tracks
    if total is None or wrong is None:
        total, wrong = scenarios.support, np.nan_to_num(scenarios.source_error) * scenarios.support
    return exact_lower(np.rint(wrong).astype(np.int64), total)
