"""The mixture on torch equals scikit-learn's, which is the oracle."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import BayesianGaussianMixture
from threadpoolctl import threadpool_limits

from defuse_core.artifacts import F64
from defuse_core.device import cpu_threads
from defuse_core.distill import mixture
from defuse_core.distill.mixture import (
    FittedMixture,
    fit_dirichlet_process_mixture,
    mixture_coefficients,
    partial_sums,
    prior_covariance,
    responsibilities,
    sample_covariance,
)

TOLERANCE = 1e-3


def planted(clusters: int, width: int, rows: int) -> F64:
    rng = np.random.default_rng(clusters)
    parts = [
        rng.normal(rng.normal(0, 4, width), rng.uniform(0.1, 1, width), (rows, width))
        for _ in range(clusters)
    ]
    return np.concatenate(parts)


def digit_codes() -> F64:
    return PCA(6, random_state=0).fit_transform(load_digits().data / 16)


CASES = {
    "six planted clusters": (planted(6, 3, 200), 10, 40),
    "three blocks of rows, the last one short": (planted(3, 4, 431), 8, 15),
    "handwritten digits": (digit_codes(), 25, 30),
    "one dimension": (planted(3, 1, 60), 5, 40),
    "one component": (planted(2, 3, 50), 1, 10),
    "as many components as codes": (planted(1, 2, 7), 7, 20),
    "two codes": (planted(1, 3, 2), 2, 10),
    "every code five times": (np.repeat(planted(2, 3, 12), 5, axis=0), 6, 30),
    "codes on a line": (np.outer(np.linspace(-1, 1, 80), [1.0, 2.0, -1.0]), 5, 20),
    "fewer different codes than dimensions": (np.repeat(planted(1, 16, 7), 6, axis=0), 7, 30),
    "codes that hardly differ": (1e-4 * planted(2, 10, 20), 8, 30),
    "far from the origin": (planted(4, 3, 80) + 1000.0, 6, 30),
    "converged before the last iteration": (planted(2, 2, 400), 2, 200),
}


def oracle(codes: F64, components: int, iterations: int) -> BayesianGaussianMixture:
    sklearn_mixture = BayesianGaussianMixture(
        n_components=components,
        weight_concentration_prior_type="dirichlet_process",
        max_iter=iterations,
        tol=TOLERANCE,
        random_state=3,
        covariance_prior=prior_covariance(sample_covariance(codes)),
    )
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return sklearn_mixture.fit(codes)


def fitted(codes: F64, components: int, iterations: int) -> FittedMixture:
    with threadpool_limits(1), cpu_threads(1):
        return fit_dirichlet_process_mixture(
            codes, components, max_iterations=iterations, tolerance=TOLERANCE, seed=3
        )


@pytest.mark.parametrize("case", CASES)
def test_it_equals_scikit_learn(case: str) -> None:
    codes, components, iterations = CASES[case]
    expected, found = oracle(codes, components, iterations), fitted(codes, components, iterations)
    assert found.iterations == expected.n_iter_
    assert found.converged == expected.converged_
    assert found.lower_bound == pytest.approx(expected.lower_bound_, rel=1e-9, abs=1e-7)
    np.testing.assert_allclose(found.weights, expected.weights_, rtol=0, atol=1e-8)
    np.testing.assert_allclose(found.means, expected.means_, rtol=0, atol=1e-8)
    np.testing.assert_allclose(found.covariances, expected.covariances_, rtol=0, atol=1e-8)


def test_the_lower_bound_rises_with_every_iteration() -> None:
    codes = digit_codes()
    bounds = [fitted(codes, 10, iterations).lower_bound for iterations in range(1, 12)]
    assert np.diff(bounds).min() > 0


def test_the_last_change_of_the_bound_is_that_of_the_last_iteration() -> None:
    codes = digit_codes()
    last, before = fitted(codes, 10, 9), fitted(codes, 10, 8)
    assert last.last_change == pytest.approx(last.lower_bound - before.lower_bound, abs=1e-9)


def test_a_fit_is_the_same_each_time() -> None:
    codes = planted(4, 3, 500)
    first, second = fitted(codes, 8, 10), fitted(codes, 8, 10)
    assert first.lower_bound == second.lower_bound
    assert (first.means == second.means).all()


def test_responsibilities_equal_the_densities_weighted() -> None:
    rng = np.random.default_rng(0)
    roots = rng.normal(size=(3, 2, 2)) + 2 * np.eye(2)
    covariances, means = roots @ roots.transpose(0, 2, 1), rng.normal(size=(3, 2))
    weights, codes = np.array([0.2, 0.3, 0.5]), rng.normal(size=(7, 2)).astype(np.float32)
    densities = [multivariate_normal(m, c).pdf(codes) for m, c in zip(means, covariances, strict=True)]
    expected = weights * np.stack(densities, axis=1)
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(responsibilities(codes, weights, means, covariances), expected, rtol=1e-6)


def test_coefficients_of_a_mixture_give_its_responsibilities() -> None:
    codes, center = planted(4, 3, 60).astype(np.float32), np.ones(3)
    fit = fitted(codes.astype(np.float64), 6, 10)
    sums, _ = partial_sums(codes, center, mixture_coefficients(fit, center))
    expected = responsibilities(codes, fit.weights, fit.means, fit.covariances).sum(axis=0)
    np.testing.assert_allclose(sums[:, 0], expected, atol=1e-6)


def test_a_code_far_from_every_component_still_has_responsibilities() -> None:
    means, covariances = np.stack([np.zeros(4), np.ones(4)]), np.stack([np.eye(4), 2 * np.eye(4)])
    shares = responsibilities(np.full((1, 4), 1e4, np.float32), np.array([0.5, 0.5]), means, covariances)
    assert shares.sum() == pytest.approx(1)


def test_a_component_without_weight_is_responsible_for_nothing() -> None:
    means, covariances = np.zeros((2, 2)), np.stack([np.eye(2)] * 2)
    shares = responsibilities(np.zeros((3, 2), np.float32), np.array([1.0, 0.0]), means, covariances)
    np.testing.assert_array_equal(shares, [[1.0, 0.0]] * 3)


def test_no_component_gives_no_responsibilities() -> None:
    nothing = responsibilities(
        np.zeros((5, 2), np.float32), np.zeros(0), np.zeros((0, 2)), np.zeros((0, 2, 2))
    )
    assert nothing.shape == (5, 0)


def test_a_single_code_has_no_covariance_and_one_dimension_is_a_matrix_too() -> None:
    assert sample_covariance(np.ones((1, 3))).tolist() == np.zeros((3, 3)).tolist()
    assert sample_covariance(np.array([[1.0], [3.0]])).tolist() == [[2.0]]


def test_a_fit_that_keeps_no_monomials_has_the_same_bits(monkeypatch) -> None:
    codes, components, iterations = CASES["three blocks of rows, the last one short"]
    kept = fitted(codes, components, iterations)
    monkeypatch.setattr(mixture, "KEPT_MONOMIALS", 0)
    made_again = fitted(codes, components, iterations)
    for name, value in vars(kept).items():
        np.testing.assert_array_equal(getattr(made_again, name), value)


def test_monomials_are_kept_only_where_they_are_small() -> None:
    small, large = torch.zeros(2000, 8, dtype=torch.float64), torch.zeros(5000, 128, dtype=torch.float64)
    assert mixture._Rows.of(small).monomials is not None
    assert mixture._Rows.of(large).monomials is None  # 5,000 x 8,385 numbers would take 335 MB
