"""The Dirichlet-process Gaussian mixture of §3.2.2 in float64 on torch: scikit-learn's updates, over blocks of rows.

The initialisation, the variational updates and the lower bound are those of
`sklearn.mixture.BayesianGaussianMixture(covariance_type="full")` (Bishop, Pattern Recognition and Machine Learning,
§10.2; Blei and Jordan 2006). Every update reads the codes only through sums over rows, so each pass goes over blocks
that fit into the cache. On a GPU the codes stay there.

Axes: n codes, Z latent dimensions, K components, M monomials of a code up to degree 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import betaln, digamma, gammaln, softmax
from sklearn.cluster import KMeans
from torch import Tensor

from defuse_core.artifacts import F32, F64, I64
from defuse_core.device import device

BLOCK_ROWS = 512
MIN_COUNT = 10 * np.finfo(np.float64).eps  # added to every count, as scikit-learn does
REGULARISATION = 1e-6  # added to the diagonal of every covariance, as scikit-learn does


@dataclass(frozen=True, eq=False)
class FittedMixture:
    """A fitted mixture, named and ordered as scikit-learn names and orders it."""

    weights: F64  # (K,)
    means: F64  # (K, Z)
    covariances: F64  # (K, Z, Z)
    converged: bool
    iterations: int
    lower_bound: float
    last_change: float  # of the lower bound, in nats, at the last iteration


@dataclass(frozen=True, eq=False)
class _Prior:
    concentration: float  # of the stick-breaking weights
    mean: F64  # (Z,)
    covariance: F64  # (Z, Z)
    mean_precision: float
    degrees_of_freedom: float


@dataclass(frozen=True, eq=False)
class _Statistics:
    """Sums over all rows under one set of responsibilities; means and covariances follow from them."""

    count: F64  # (K,)
    first: F64  # (K, Z) sum of r x
    second: F64  # (K, Z, Z) sum of r x x^T
    entropy: float  # of the responsibilities, -sum r log r


@dataclass(frozen=True, eq=False)
class _Posterior:
    """Parameters of the variational posterior."""

    sticks: tuple[F64, F64]  # (K,) each: parameters of the Beta distributions of the sticks
    mean_precision: F64  # (K,)
    means: F64  # (K, Z)
    degrees_of_freedom: F64  # (K,)
    covariances: F64  # (K, Z, Z)
    precision_roots: F64  # (K, Z, Z) upper triangular; root @ root^T is the precision


def fit_dirichlet_process_mixture(
    codes: F64, components: int, *, max_iterations: int, tolerance: float, seed: int
) -> FittedMixture:
    """Return the mixture of `components` Gaussians over (n, Z) `codes`, n >= `components`.

    The fit has converged once the lower bound changes by less than `tolerance` nats in one iteration. Computes on
    this process's GPU or on as many CPU threads as torch has now. Raises ValueError for a covariance that is not
    positive definite.
    """
    center = codes.mean(axis=0)  # sums of squares about the mean keep their digits
    monomials = _monomials(torch.from_numpy(codes - center).to(device()))
    prior = _Prior(
        concentration=1 / components,
        mean=np.zeros(codes.shape[1]),
        covariance=np.atleast_2d(np.cov(codes.T)),
        mean_precision=1.0,
        degrees_of_freedom=float(codes.shape[1]),
    )
    labels = KMeans(n_clusters=components, n_init=1, random_state=seed).fit(codes).labels_
    posterior = _maximise(prior, _hard_statistics(monomials, labels.astype(np.int64), components))
    bound, change, iteration = -math.inf, math.inf, 0
    for iteration in range(1, max_iterations + 1):  # noqa: B007 - its last value is in the result
        statistics = _expect(monomials, posterior)
        posterior = _maximise(prior, statistics)
        before, bound = bound, _lower_bound(posterior, statistics.entropy)
        change = bound - before
        if abs(change) < tolerance:
            break
    return FittedMixture(
        weights=_weights(posterior),
        means=posterior.means + center,
        covariances=posterior.covariances,
        converged=abs(change) < tolerance,
        iterations=iteration,
        lower_bound=bound,
        last_change=change,
    )


def _monomials(rows: Tensor) -> Tensor:
    """Return 1, x and the products x_i x_j, i <= j, of each row: (n, M) with M = 1 + Z + Z (Z + 1) / 2.

    The exponent of a Gaussian is linear in them, and so are the sums that an update needs.
    """
    upper = torch.triu_indices(rows.shape[1], rows.shape[1], device=rows.device)
    ones = torch.ones(len(rows), 1, dtype=rows.dtype, device=rows.device)
    return torch.cat([ones, rows, rows[:, upper[0]] * rows[:, upper[1]]], dim=1)


def _hard_statistics(monomials: Tensor, labels: I64, components: int) -> _Statistics:
    """Return the statistics of the k-means partition that the fit starts from."""
    sums = monomials.new_zeros(components, monomials.shape[1])
    assigned = torch.from_numpy(labels).to(monomials.device)
    for start in range(0, len(monomials), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        share = torch.nn.functional.one_hot(assigned[block], components).to(monomials.dtype)
        sums += share.T @ monomials[block]
    return _unpacked(sums, 0.0)


def _expect(monomials: Tensor, posterior: _Posterior) -> _Statistics:
    """The E step: return the sums over all rows under the responsibilities that `posterior` gives."""
    coefficients = torch.from_numpy(_log_joint_coefficients(posterior)).to(monomials.device)  # (M, K)
    sums = monomials.new_zeros(coefficients.T.shape)
    log_evidence = monomials.new_zeros(())
    for start in range(0, len(monomials), BLOCK_ROWS):
        block = monomials[start : start + BLOCK_ROWS]
        log_joint = block @ coefficients  # (n, K)
        largest = log_joint.amax(dim=1, keepdim=True)
        share = log_joint.sub_(largest).exp_()
        total = share.sum(dim=1, keepdim=True)
        sums += share.div_(total).T @ block
        log_evidence += (largest + total.log()).sum()
    # log r = log joint - log evidence, and the sum of r log joint is linear in the sums
    entropy = log_evidence - torch.dot(sums.T.reshape(-1), coefficients.reshape(-1))
    return _unpacked(sums, float(entropy))


def _unpacked(sums: Tensor, entropy: float) -> _Statistics:
    """Return the statistics that (K, M) sums of monomials hold."""
    table: F64 = sums.cpu().numpy()
    width = (math.isqrt(8 * table.shape[1] + 1) - 3) // 2  # of M = (Z + 1) (Z + 2) / 2
    second = np.zeros((len(table), width, width))
    i, j = np.triu_indices(width)
    second[:, i, j] = second[:, j, i] = table[:, 1 + width :]
    return _Statistics(table[:, 0] + MIN_COUNT, table[:, 1 : 1 + width], second, entropy)


def _log_joint_coefficients(posterior: _Posterior) -> F64:
    """Return what each monomial contributes to the expected log of weight times density, (M, K)."""
    width = posterior.means.shape[1]
    precisions = posterior.precision_roots @ posterior.precision_roots.transpose(0, 2, 1)  # (K, Z, Z)
    linear = (precisions @ posterior.means[:, :, None])[:, :, 0]  # (K, Z)
    constant = _log_constants(posterior) - 0.5 * (linear * posterior.means).sum(axis=1)
    i, j = np.triu_indices(width)
    quadratic = np.where(i == j, -0.5, -1.0) * precisions[:, i, j]
    return np.ascontiguousarray(np.concatenate([constant[:, None], linear, quadratic], axis=1).T)


def _maximise(prior: _Prior, statistics: _Statistics) -> _Posterior:
    """The M step: return the posterior that the statistics amount to under `prior`."""
    count = statistics.count
    averages = statistics.first / count[:, None]
    scatter = statistics.second / count[:, None, None] - averages[:, :, None] * averages[:, None, :]
    scatter += REGULARISATION * np.eye(len(prior.mean))
    mean_precision = prior.mean_precision + count
    means = (prior.mean_precision * prior.mean + count[:, None] * averages) / mean_precision[:, None]
    degrees = prior.degrees_of_freedom + count
    shift = averages - prior.mean
    pull = (count * prior.mean_precision / mean_precision)[:, None, None]
    covariances = (
        prior.covariance + count[:, None, None] * scatter + pull * shift[:, :, None] * shift[:, None, :]
    )
    covariances /= degrees[:, None, None]
    behind = np.append(np.cumsum(count[::-1])[-2::-1], 0.0)  # what all later sticks hold
    return _Posterior(
        sticks=(1 + count, prior.concentration + behind),
        mean_precision=mean_precision,
        means=means,
        degrees_of_freedom=degrees,
        covariances=covariances,
        precision_roots=_precision_roots(covariances),
    )


def _precision_roots(covariances: F64) -> F64:
    try:
        roots = np.linalg.cholesky(covariances)
    except np.linalg.LinAlgError as error:
        raise ValueError(
            "a covariance of the mixture is not positive definite; are codes duplicated?"
        ) from error
    inverse: F64 = np.linalg.inv(roots)
    return np.ascontiguousarray(np.tril(inverse).transpose(0, 2, 1))


def _log_constants(posterior: _Posterior) -> F64:
    """Return, (K,), what the expected log of weight times density has beside the Mahalanobis term."""
    width = posterior.means.shape[1]
    degrees = posterior.degrees_of_freedom
    log_lambda = width * math.log(2) + digamma(0.5 * (degrees - np.arange(width)[:, None])).sum(axis=0)
    gaussian = _log_det_roots(posterior) - 0.5 * width * (math.log(2 * math.pi) + np.log(degrees))
    constants: F64 = (
        gaussian + 0.5 * (log_lambda - width / posterior.mean_precision) + _log_weights(posterior)
    )
    return constants


def _log_weights(posterior: _Posterior) -> F64:
    """Return E[log weight] of every component, (K,)."""
    first, second = posterior.sticks
    whole = digamma(first + second)
    left_over = np.cumsum(digamma(second) - whole)[:-1]
    log_weights: F64 = digamma(first) - whole + np.concatenate([[0.0], left_over])
    return log_weights


def _log_det_roots(posterior: _Posterior) -> F64:
    log_det: F64 = np.log(np.diagonal(posterior.precision_roots, axis1=1, axis2=2)).sum(axis=1)
    return log_det


def _lower_bound(posterior: _Posterior, entropy: float) -> float:
    """Return the lower bound of the evidence, up to constants, as scikit-learn computes it."""
    width, degrees = posterior.means.shape[1], posterior.degrees_of_freedom
    log_det = _log_det_roots(posterior) - 0.5 * width * np.log(degrees)
    log_gamma = gammaln(0.5 * (degrees - np.arange(width)[:, None])).sum(axis=0)
    log_wishart = -(degrees * log_det + degrees * width * 0.5 * math.log(2) + log_gamma)
    log_weight = -betaln(*posterior.sticks).sum()
    log_means = 0.5 * width * np.log(posterior.mean_precision).sum()
    return float(entropy - log_wishart.sum() - log_weight - log_means)


def _weights(posterior: _Posterior) -> F64:
    """Return the expected weights, (K,), which sum to 1."""
    first, second = posterior.sticks
    rest = second / (first + second)
    weights = first / (first + second) * np.concatenate([[1.0], np.cumprod(rest[:-1])])
    normalised: F64 = weights / weights.sum()
    return normalised


def responsibilities(codes: F32 | F64, weights: F64, means: F64, covariances: F64) -> F64:
    """Return for (n, Z) codes the probability of each of K components, (n, K); rows sum to 1."""
    logs = np.zeros((len(codes), len(weights)))
    with np.errstate(divide="ignore"):
        log_weights = np.log(weights)  # -inf for a component that holds no code
    for j, (log_weight, mean, covariance) in enumerate(zip(log_weights, means, covariances, strict=True)):
        root = np.linalg.cholesky(covariance)
        whitened = np.linalg.solve(root, (codes - mean).T)  # (Z, n)
        logs[:, j] = log_weight - 0.5 * (whitened**2).sum(axis=0) - np.log(np.diag(root)).sum()
    return softmax(logs, axis=1) if len(weights) else logs
