"""§3.2.2: distill Ψ into failure scenarios with Dirichlet-process Gaussian mixtures.

The paper fits one mixture to all codes. `distill.by: cell` fits one to each cell (class of the source images, answer of
the classifier), so that no component straddles classes.
"""

from __future__ import annotations

import functools
import itertools
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import BayesianGaussianMixture
from threadpoolctl import threadpool_limits

from defuse_core.artifacts import (
    F32,
    F64,
    I64,
    NONE_OF_THE_ABOVE,
    Anchors,
    ComponentFailures,
    DroppedComponent,
    Failures,
    Psi,
    Scenarios,
    Shard,
)
from defuse_core.config import DistillSection, RunFile
from defuse_core.data import Images, reopen_splits
from defuse_core.device import cpu_threads
from defuse_core.errors import StoreError
from defuse_core.identify import load_shard, shard_key
from defuse_core.mixture import FittedMixture, fit_dirichlet_process_mixture, responsibilities
from defuse_core.progress import Progress
from defuse_core.seeds import generator
from defuse_core.store import Store

log = logging.getLogger("defuse")
FAILURES_KEPT = 256  # L, with vae.decode: anchored
IMAGES_KEPT = 64  # training images that the failures of one component come from at most


def distill(spec: RunFile, psi: Psi, store: Store, data_fingerprint: str, *, progress: Progress) -> Scenarios:
    """Return Λ: the components over Ψ, down-sampled, whose weight is over ε and whose support suffices.

    With vae.decode: anchored each component gets failures of its own, with their training images; these must have
    `data_fingerprint`, else RunMismatchError is raised.
    """
    failures = sample_failures(spec, psi, store)
    if spec.distill.by == "cell":
        fits = _fit_cells(failures, spec.distill, spec.seed, progress)
    else:
        progress("fitting the mixture", 0, 1, "fits")
        fits = _fit_all(failures, spec.distill, spec.seed)
    scenarios = fits.scenarios()
    if spec.vae.decode == "anchored" and len(scenarios):
        train = reopen_splits(spec.data, spec.seed, data_fingerprint).train
        scenarios = replace(scenarios, failures=component_failures(fits.members(), train, spec.seed))
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
    """Return at most max_codes rows of Ψ, drawn without replacement; reads one shard at a time."""
    wanted: I64 = np.arange(psi.total)
    if psi.total > spec.distill.max_codes:
        rng = generator(spec.seed, "distill", "sample")
        wanted = np.sort(rng.choice(psi.total, spec.distill.max_codes, replace=False))
    starts = np.concatenate([[0], np.cumsum(psi.codes)])
    nothing: I64 = np.zeros(0, np.int64)
    parts = [Failures(np.zeros((0, spec.vae.latent_dim), np.float32), nothing, nothing, nothing)]
    for index, (start, end) in enumerate(itertools.pairwise(starts)):
        rows = wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, end)] - start
        if len(rows):
            parts.append(_shard(store, psi, index).failures.take(rows))
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
    return _fit_all(failures, section, seed).scenarios()


def _fit_all(failures: Failures, section: DistillSection, seed: int) -> _Fits:
    parts = []
    if len(failures) > 1:
        fit = _fit(failures.codes, section.max_components, section, seed, ())
        parts = [_Part(fit, failures, 1.0, (NONE_OF_THE_ABOVE, NONE_OF_THE_ABOVE))]
    return _Fits(parts, failures, section)


def fit_cells(failures: Failures, section: DistillSection, seed: int, progress: Progress) -> Scenarios:
    """Return the components of one mixture per cell; K is shared out by the cells' weight, at least 1 each.

    A cell whose weight is at most ε holds no component over ε: it is dropped, with its reason.
    """
    return _fit_cells(failures, section, seed, progress).scenarios()


def _fit_cells(failures: Failures, section: DistillSection, seed: int, progress: Progress) -> _Fits:
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
    return _Fits(parts, failures, section, tuple(small))


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

    def shares(self) -> list[Failures]:
        """Return the failures that belong most to each of the k components."""
        fit = self.fit
        owner = responsibilities(self.members.codes, fit.weights, fit.means, fit.covariances).argmax(axis=1)
        return [self.members.take(owner == component) for component in range(len(self.weights))]


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


@dataclass(frozen=True, eq=False)
class _Fits:
    """All mixtures of a run, over `failures`."""

    parts: list[_Part]
    failures: Failures
    section: DistillSection
    small: tuple[DroppedComponent, ...] = ()  # cells without a mixture

    @functools.cached_property
    def shares(self) -> list[Failures]:
        """The failures that belong most to each component of all parts."""
        with threadpool_limits(1):
            return [share for part in self.parts for share in part.shares()]

    def scenarios(self) -> Scenarios:
        """Return the components of all parts over ε with enough support, the heaviest first."""
        parts, section = self.parts, self.section
        if not parts:
            return _no_scenarios(self.failures.codes.shape[1], len(self.failures), self.small)
        weights, support = self._weights(), self._support()
        cells = np.concatenate([np.tile(part.cell, (len(part.weights), 1)) for part in parts])
        kept, thin = self._over_min_weight()
        without_support = (_without_support(weights, cells, support, row, section) for row in thin)
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
            dropped=self.small + tuple(without_support),
        )

    def members(self) -> list[Failures]:
        """Return the failures that belong most to each component of `scenarios`, in their order."""
        return [self.shares[row] for row in self._over_min_weight()[0]]

    def _weights(self) -> F64:
        return np.concatenate([part.weights for part in self.parts])

    def _support(self) -> I64:
        return np.array([len(np.unique(share.source)) for share in self.shares], np.int64)

    def _over_min_weight(self) -> tuple[I64, I64]:
        """Return the components over ε, the heaviest first: those with enough support, and the others."""
        weights, support = self._weights(), self._support()
        over = np.flatnonzero(weights > self.section.min_weight)
        over = over[np.argsort(-weights[over], kind="stable")]
        enough = support[over] >= self.section.min_support
        return over[enough], over[~enough]


def component_failures(members: Sequence[Failures], train: Images, seed: int) -> ComponentFailures:
    """Return FAILURES_KEPT of the failures of each component, from as many images as there are, up to IMAGES_KEPT.

    They are drawn by seed, and each image gives as many as the others where it has so many.
    """
    chosen = [
        own.take(_spread(own.source, generator(seed, "distill", "failures", component)))
        for component, own in enumerate(members)
    ]
    sources = np.stack([own.source for own in chosen])  # (S, L)
    used, anchor = np.unique(sources, return_inverse=True)
    pixels = train.take(used).pixels[:]
    codes = np.stack([own.codes for own in chosen])
    return ComponentFailures(codes, anchor.reshape(sources.shape).astype(np.int64), Anchors(pixels, used))


def _spread(source: I64, rng: np.random.Generator) -> I64:
    """Return FAILURES_KEPT rows of (n,) failures: one of each image, then a second one of each, and so on."""
    rows = rng.permutation(len(source))
    images, of_image = np.unique(source[rows], return_inverse=True)
    rows = rows[np.isin(of_image, rng.permutation(len(images))[:IMAGES_KEPT])]
    order = np.argsort(source[rows], kind="stable")
    _, first, counts = np.unique(source[rows][order], return_index=True, return_counts=True)
    turn = np.empty(len(rows), np.int64)  # how many failures of the same image come before
    turn[order] = np.arange(len(rows)) - np.repeat(first, counts)
    return np.resize(rows[np.argsort(turn, kind="stable")], FAILURES_KEPT)


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
