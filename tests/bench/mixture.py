"""How much faster the mixture on torch is than scikit-learn's, at an equal lower bound.

    python tests/bench/mixture.py --codes 50000 --components 100 --iterations 100

Both run on one thread in one process, so quote the ratio.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import BayesianGaussianMixture
from threadpoolctl import threadpool_limits

from defuse_core.device import cpu_threads
from defuse_core.distill.mixture import (
    fit_dirichlet_process_mixture,
    prior_covariance,
    sample_covariance,
)

WIDTH, CLUSTERS, SEED = 10, 20, 5


def planted_codes(count: int) -> np.ndarray:
    """Return (count, 10) codes of 20 overlapping clusters."""
    rng = np.random.default_rng(0)
    sizes = np.full(CLUSTERS, count // CLUSTERS)
    sizes[: count % CLUSTERS] += 1
    return np.concatenate(
        [rng.normal(rng.normal(0, 1.5, WIDTH), rng.uniform(0.3, 1), (size, WIDTH)) for size in sizes]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--codes", type=int, default=50_000)
    parser.add_argument("--components", type=int, default=100)
    parser.add_argument("--iterations", type=int, default=100)
    arguments = parser.parse_args()
    codes = planted_codes(arguments.codes)
    warnings.simplefilter("ignore", ConvergenceWarning)
    with threadpool_limits(1), cpu_threads(1):
        begun = time.perf_counter()
        oracle = BayesianGaussianMixture(
            n_components=arguments.components,
            weight_concentration_prior_type="dirichlet_process",
            max_iter=arguments.iterations,
            random_state=SEED,
            covariance_prior=prior_covariance(sample_covariance(codes)),
        ).fit(codes)
        sklearn_s = time.perf_counter() - begun
        begun = time.perf_counter()
        found = fit_dirichlet_process_mixture(
            codes, arguments.components, max_iterations=arguments.iterations, tolerance=1e-3, seed=SEED
        )
        torch_s = time.perf_counter() - begun
    print(
        json.dumps(
            {
                "scikit_learn_s": round(sklearn_s, 2),
                "torch_s": round(torch_s, 2),
                "ratio": round(sklearn_s / torch_s, 2),
                "iterations": [int(oracle.n_iter_), found.iterations],
                "bound_difference": float(found.lower_bound - oracle.lower_bound_),
            }
        )
    )


if __name__ == "__main__":
    main()
