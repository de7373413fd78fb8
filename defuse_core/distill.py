"""§3.2.2: distill Ψ into failure scenarios with a Dirichlet-process Gaussian mixture."""

from __future__ import annotations

import itertools
import logging
import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import BayesianGaussianMixture
from threadpoolctl import threadpool_limits

from defuse_core.artifacts import (
    F32,
    F64,
    I64,
    Psi,
    Scenarios,
    Shard,
)
from defuse_core.codec import decode
from defuse_core.config import DistillSection, RunFile
from defuse_core.errors import StoreError
from defuse_core.identify import shard_key
from defuse_core.progress import Progress
from defuse_core.seeds import generator
from defuse_core.store import Store

log = logging.getLogger("defuse")


def distill(spec: RunFile, psi: Psi, store: Store, *, progress: Progress) -> Scenarios:
    """Return Λ: the components of the mixture over Ψ, down-sampled, whose weight is over ε."""
    progress("fitting the mixture", 0, 1, "fits")
    scenarios = fit_mixture(sample_codes(spec, psi, store), spec.distill, spec.seed)
    log.info(
        "kept %d of %d components with weight over %g; the fit %s after %d iterations",
        len(scenarios),
        len(scenarios.all_weights),
        spec.distill.min_weight,
        "converged" if scenarios.converged else "had NOT converged",
        scenarios.iterations,
    )
    return scenarios


def sample_codes(spec: RunFile, psi: Psi, store: Store) -> F32:
    """Return at most max_codes rows of Ψ, (n, Z), drawn without replacement; reads one shard at a time."""
    wanted: I64 = np.arange(psi.total)
    if psi.total > spec.distill.max_codes:
        rng = generator(spec.seed, "distill", "sample")
        wanted = np.sort(rng.choice(psi.total, spec.distill.max_codes, replace=False))
    starts = np.concatenate([[0], np.cumsum(psi.codes)])
    parts = [np.zeros((0, spec.vae.latent_dim), np.float32)]
    for index, (start, end) in enumerate(itertools.pairwise(starts)):
        rows = wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, end)] - start
        if len(rows):
            parts.append(_shard(store, index).failures.codes[rows])
    return np.concatenate(parts)


def _shard(store: Store, index: int) -> Shard:
    """Return a shard of Ψ. Raises StoreError where it is gone, or other bytes than were written."""
    key = shard_key(index)
    try:
        return decode(Shard, store.read(key), key)
    except FileNotFoundError as error:
        record = key.removesuffix(".safetensors") + ".json"
        raise StoreError(
            f"{store.address}/{key} is gone, or lies on a node that does not share this store; delete {record} "
            "and psi.safetensors there, and run again to make it again"
        ) from error


def fit_mixture(codes: F32, section: DistillSection, seed: int) -> Scenarios:
    """Return the mixture over (n, Z) codes, by scikit-learn's variational inference (the paper says EM) and defaults.

    One BLAS thread, so that the sums round alike on every machine. Fewer codes than K bound the number of components;
    fewer than two give none.
    """
    if len(codes) < 2:
        return _no_scenarios(codes)
    mixture = BayesianGaussianMixture(
        n_components=min(section.max_components, len(codes)),
        covariance_type="full",
        weight_concentration_prior_type="dirichlet_process",
        max_iter=section.max_iterations,
        tol=section.tolerance,
        random_state=int(generator(seed, "distill", "fit").integers(2**31)),
    )
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # told in the report
        mixture.fit(codes.astype(np.float64))
    kept = np.flatnonzero(mixture.weights_ > section.min_weight)
    kept = kept[np.argsort(-mixture.weights_[kept], kind="stable")]
    return Scenarios(
        weights=mixture.weights_[kept],
        means=mixture.means_[kept],
        covariances=mixture.covariances_[kept],
        all_weights=mixture.weights_,
        codes_used=len(codes),
        converged=bool(mixture.converged_),
        iterations=int(mixture.n_iter_),
        lower_bound=float(mixture.lower_bound_),
    )


def _no_scenarios(codes: F32) -> Scenarios:
    width = codes.shape[1]
    nothing: F64 = np.zeros(0)
    return Scenarios(
        nothing, np.zeros((0, width)), np.zeros((0, width, width)), nothing, len(codes), True, 0, 0.0
    )
