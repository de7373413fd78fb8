"""§3.2.2: distill Ψ into failure scenarios with Dirichlet-process Gaussian mixtures.

The paper fits one mixture to all codes. `distill.by: cell` fits one to each cell (class of the source images, answer of
the classifier), so that no component straddles classes.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import BayesianGaussianMixture
from threadpoolctl import threadpool_limits

from defuse_core.artifacts import (
    F32,
    F64,
    I64,
    NONE_OF_THE_ABOVE,
    DroppedComponent,
    Failures,
    Psi,
    Scenarios,
    Shard,
)
from defuse_core.config import DistillSection, RunFile
from defuse_core.device import cpu_threads
from defuse_core.errors import StoreError
from defuse_core.identify import load_shard, shard_key
from defuse_core.mixture import FittedMixture, fit_dirichlet_process_mixture, responsibilities
from defuse_core.progress import Progress
from defuse_core.seeds import generator
from defuse_core.store import Store, map_ahead

log = logging.getLogger("defuse")


def distill(spec: RunFile, psi: Psi, store: Store, *, progress: Progress) -> Scenarios:
    """Return Λ: the components over Ψ, down-sampled, whose weight is over ε and whose support suffices."""
    failures = sample_failures(spec, psi, store)
    if spec.distill.by == "cell":
        scenarios = fit_cells(failures, spec.distill, spec.seed, progress)
    else:
        progress("fitting the mixture", 0, 1, "fits")
        scenarios = fit_all(failures, spec.distill, spec.seed)
    log.info(
        "kept %d of %d components with weight over %g; the fit %s after %d iterations",
        len(scenarios),
        len(scenarios.all_weights),
        spec.distill.min_weight,
        "converged" if scenarios.converged else "had NOT converged",
        scenarios.iterations,
    )
    if scenarios.dropped:
        log.info("dropped %d components or cells with too few codes or images", len(scenarios.dropped))
    return scenarios


def sample_codes(spec: RunFile, psi: Psi, store: Store) -> F32:
    """Return the codes of sample_failures, (n, Z)."""
    return sample_failures(spec, psi, store).codes


def sample_failures(spec: RunFile, psi: Psi, store: Store) -> Failures:
    """Return at most max_codes rows of Ψ, drawn without replacement, in order; a few shards are in memory at once."""
    wanted: I64 = np.arange(psi.total)
    if psi.total > spec.distill.max_codes:
        rng = generator(spec.seed, "distill", "sample")
        wanted = np.sort(rng.choice(psi.total, spec.distill.max_codes, replace=False))
    starts = np.concatenate([[0], np.cumsum(psi.codes)])
    nothing: I64 = np.zeros(0, np.int64)
    first, last = np.searchsorted(wanted, starts[:-1]), np.searchsorted(wanted, starts[1:])

    def drawn_from(shard: int) -> Failures:
        rows = wanted[first[shard] : last[shard]] - starts[shard]
        return _shard(store, psi, shard).failures.take(rows)

    parts = [Failures(np.zeros((0, spec.vae.latent_dim), np.float32), nothing, nothing, nothing)]
    parts.extend(map_ahead(drawn_from, np.flatnonzero(first < last).tolist()))
    return Failures.concatenate(parts)


def _shard(store: Store, psi: Psi, index: int) -> Shard:
    """Return a shard of Ψ. Raises StoreError where it is gone or damaged."""
    remedy = f"delete {store.address}/psi.safetensors and run again: only this shard is made again"
    try:
        return load_shard(store, index, psi.fingerprint, remedy)
    except FileNotFoundError as error:
        where = f"{store.address}/{shard_key(index)}"
        raise StoreError(
            f"{where}: expected a shard of psi.safetensors, found no such file; {remedy}"
        ) from error


def fit_all(failures: Failures, section: DistillSection, seed: int) -> Scenarios:
    """Return the paper's single mixture over all codes, with the support of each component."""
    if len(failures) < 2:
        return _no_scenarios(failures.codes.shape[1], len(failures))
    fit = _fit(failures.codes, section.max_components, section, seed, ())
    return _scenarios([_Part(fit, failures, 1.0, (NONE_OF_THE_ABOVE, NONE_OF_THE_ABOVE))], section)


def fit_cells(failures: Failures, section: DistillSection, seed: int, progress: Progress) -> Scenarios:
    """Return the components of one mixture per cell; K is shared out by the cells' weight, at least 1 each.

    A cell whose weight is at most ε holds no component over ε: it is dropped, with its reason.
    """
    cells, owner = np.unique(
        np.stack([failures.truth, failures.predicted], axis=1), axis=0, return_inverse=True
    )
    parts, small = [], []
    for number, (source, answer) in enumerate(cells.tolist()):
        progress("fitting the mixtures", number, len(cells), "fits")
        members = failures.take(np.flatnonzero(owner == number))
        weight = len(members) / len(failures)
        if len(members) < 2 or not weight > section.min_weight:
            support = len(np.unique(members.source))
            reason = f"the cell's {len(members)} codes are too few for a weight over {section.min_weight:g}"
            small.append(DroppedComponent(weight, source, answer, support, reason))
            continue
        components = max(1, round(section.max_components * weight))
        fit = _fit(members.codes, components, section, seed, (source, answer))
        parts.append(_Part(fit, members, weight, (source, answer)))
    if not parts:
        return _no_scenarios(failures.codes.shape[1], len(failures), tuple(small))
    return _scenarios(parts, section, tuple(small))


@dataclass(frozen=True, eq=False)
class _Part:
    """A mixture that was fitted to `members`, which are the share `weight` of all codes."""

    fit: FittedMixture
    members: Failures
    weight: float
    cell: tuple[int, int]  # class of the source images and answer of f

    @property
    def weights(self) -> F64:
        """(k,) weights of its components among all codes."""
        weights: F64 = self.weight * self.fit.weights
        return weights

    def support(self) -> I64:
        """(k,) distinct training images of the codes that belong most to each component."""
        fit = self.fit
        owner = responsibilities(self.members.codes, fit.weights, fit.means, fit.covariances).argmax(axis=1)
        sources = [self.members.source[owner == component] for component in range(len(self.weights))]
        return np.array([len(np.unique(source)) for source in sources], np.int64)


def _fit(
    codes: F32, components: int, section: DistillSection, seed: int, cell: tuple[int, ...]
) -> FittedMixture:
    """Return the mixture over (n, Z) codes, by scikit-learn's variational inference (the paper names EM) and defaults.

    One thread, so that sums round alike on every machine. There are at most as many components as codes.
    """
    components = min(components, len(codes))
    random_state = int(generator(seed, "distill", "fit", *cell).integers(2**31))
    if section.engine == "torch":
        with threadpool_limits(1), cpu_threads(1):
            return fit_dirichlet_process_mixture(
                codes.astype(np.float64),
                components,
                max_iterations=section.max_iterations,
                tolerance=section.tolerance,
                seed=random_state,
            )
    mixture = BayesianGaussianMixture(
        n_components=components,
        covariance_type="full",
        weight_concentration_prior_type="dirichlet_process",
        max_iter=section.max_iterations,
        tol=section.tolerance,
        random_state=random_state,
    )
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the report states it
        mixture.fit(codes.astype(np.float64))
    return FittedMixture(
        weights=mixture.weights_,
        means=mixture.means_,
        covariances=mixture.covariances_,
        converged=bool(mixture.converged_),
        iterations=int(mixture.n_iter_),
        lower_bound=float(mixture.lower_bound_),
        last_change=_last_change(mixture),
    )


def _last_change(mixture: BayesianGaussianMixture) -> float:
    """Return by how much the lower bound changed at the last iteration, in nats; nan after a single one."""
    bounds = mixture.lower_bounds_
    return float(bounds[-1] - bounds[-2]) if len(bounds) > 1 else float("nan")


def _scenarios(
    parts: list[_Part], section: DistillSection, small: tuple[DroppedComponent, ...] = ()
) -> Scenarios:
    """Return the components of all parts over ε with enough support, the heaviest first."""
    with threadpool_limits(1):
        support = np.concatenate([part.support() for part in parts])
    weights = np.concatenate([part.weights for part in parts])
    cells = np.concatenate([np.tile(part.cell, (len(part.weights), 1)) for part in parts])
    over = np.flatnonzero(weights > section.min_weight)
    over = over[np.argsort(-weights[over], kind="stable")]
    kept, thin = over[support[over] >= section.min_support], over[support[over] < section.min_support]
    return Scenarios(
        weights=weights[kept],
        means=np.concatenate([part.fit.means for part in parts])[kept],
        covariances=np.concatenate([part.fit.covariances for part in parts])[kept],
        all_weights=weights,
        codes_used=sum(len(part.members) for part in parts),
        converged=all(part.fit.converged for part in parts),
        iterations=max(part.fit.iterations for part in parts),
        lower_bound=float(sum(part.weight * part.fit.lower_bound for part in parts)),
        cells=cells[kept],
        support=support[kept],
        dropped=small + tuple(_without_support(weights, cells, support, row, section) for row in thin),
    )


def _without_support(
    weights: F64, cells: I64, support: I64, row: int, section: DistillSection
) -> DroppedComponent:
    source, answer = cells[row].tolist()
    reason = f"its codes come from {support[row]} training images, fewer than {section.min_support}"
    return DroppedComponent(float(weights[row]), source, answer, int(support[row]), reason)


def _no_scenarios(width: int, codes: int, dropped: tuple[DroppedComponent, ...] = ()) -> Scenarios:
    nothing: F64 = np.zeros(0)
    return Scenarios(
        nothing,
        np.zeros((0, width)),
        np.zeros((0, width, width)),
        nothing,
        codes,
        True,
        0,
        0.0,
        support=np.zeros(0, np.int64),
        dropped=dropped,
    )
