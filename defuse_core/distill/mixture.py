"""The Dirichlet-process Gaussian mixture of §3.2.2 in float64 on torch: scikit-learn's updates, over blocks of rows.

The initialisation, the variational updates and the lower bound are those of
`sklearn.mixture.BayesianGaussianMixture(covariance_type="full")` (Bishop, Pattern Recognition and Machine Learning,
§10.2; Blei and Jordan 2006), but that the prior's covariance is regularised, too (`prior_covariance`). Every update
reads the codes only through sums over rows, so each pass goes over blocks that fit into the cache. On a GPU the codes
stay there.

Axes: n codes, Z latent dimensions, K components, P monomials of a code up to degree 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import betaln, digamma, gammaln, softmax
from torch import Tensor

from defuse_core.artifacts import F32, F64, I64
from defuse_core.device import device

BLOCK_ROWS = 512
KEPT_MONOMIALS = 2**28  # bytes of monomials that a fit keeps; more are made again in every pass
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
class Statistics:
    """Sums over all rows under one set of responsibilities; means and covariances follow from them."""

    count: F64  # (K,)
    first: F64  # (K, Z) sum of r x
    second: F64  # (K, Z, Z) sum of r x x^T
    entropy: float  # of the responsibilities, -sum r log r


@dataclass(frozen=True, eq=False)
class Posterior:
    """Parameters of the variational posterior."""

    sticks: tuple[F64, F64]  # (K,) each: parameters of the Beta distributions of the sticks
    mean_precision: F64  # (K,)
    means: F64  # (K, Z)
    degrees_of_freedom: F64  # (K,)
    covariances: F64  # (K, Z, Z)
    precision_roots: F64  # (K, Z, Z) upper triangular; root @ root^T is the precision


class VariationalFit:
    """A fit under way: whoever holds the codes returns their sums under `coefficients`, and `step` takes them."""

    def __init__(self, start: Posterior, prior: F64, center: F64, *, max_iterations: int, tolerance: float):
        """`prior` is that of `maximise`. `center` (Z,) is subtracted from every code, so that sums of squares keep
        their digits.
        """
        self.posterior, self.prior, self.center = start, prior, center
        self.max_iterations, self.tolerance = max_iterations, tolerance
        self.bound, self.change, self.iteration = -math.inf, math.inf, 0

    @property
    def converged(self) -> bool:
        """Whether the lower bound changed by less than `tolerance` nats in the last iteration."""
        return abs(self.change) < self.tolerance

    @property
    def done(self) -> bool:
        """Whether it has converged, or used up its iterations."""
        return self.converged or self.iteration >= self.max_iterations

    def coefficients(self) -> F64:
        """Return what each monomial contributes to the expected log of weight times density, (P, K)."""
        roots, means = self.posterior.precision_roots, self.posterior.means
        return _quadratic_coefficients(roots, means, _log_constants(self.posterior))

    def step(self, statistics: Statistics) -> None:
        """Take the M step on the sums over all rows, and note the lower bound."""
        self.posterior = maximise(self.prior, statistics)
        before, self.bound = self.bound, _lower_bound(self.posterior, statistics.entropy)
        self.change, self.iteration = self.bound - before, self.iteration + 1

    def fitted(self) -> FittedMixture:
        """Return the mixture as it is now."""
        return FittedMixture(
            weights=_weights(self.posterior),
            means=self.posterior.means + self.center,
            covariances=self.posterior.covariances,
            converged=self.converged,
            iterations=self.iteration,
            lower_bound=self.bound,
            last_change=self.change,
        )


def fit_dirichlet_process_mixture(
    codes: F64, components: int, *, max_iterations: int, tolerance: float, seed: int
) -> FittedMixture:
    """Return the mixture of `components` Gaussians over (n, Z) `codes`, n >= `components`.

    The fit has converged once the lower bound changes by less than `tolerance` nats in one iteration. Computes on
    this process's GPU or on as many CPU threads as torch has now.
    """
    from sklearn.cluster import KMeans  # late: its import takes a second

    center = codes.mean(axis=0)  # sums of squares about the mean keep their digits
    rows = _Rows.of(torch.from_numpy(codes - center).to(device()))
    prior = prior_covariance(sample_covariance(codes))
    labels = KMeans(n_clusters=components, n_init=1, random_state=seed).fit(codes).labels_
    start = maximise(prior, _hard_statistics(rows, labels.astype(np.int64), components))
    fit = VariationalFit(start, prior, center, max_iterations=max_iterations, tolerance=tolerance)
    while not fit.done:
        fit.step(_expect(rows, fit.coefficients()))
    return fit.fitted()


def prior_covariance(covariance: F64) -> F64:
    """Return the (Z, Z) covariance of the prior for codes of this one.

    It has REGULARISATION on its diagonal, since that of a component without codes is the prior's, and few codes, or
    many equal ones, have a singular covariance.
    """
    regular: F64 = covariance + REGULARISATION * np.eye(len(covariance))
    return regular


def _monomials(rows: Tensor) -> Tensor:
    """Return 1, x and the products x_i x_j, i <= j, of each row: (n, P) with P = 1 + Z + Z (Z + 1) / 2.

    The exponent of a Gaussian is linear in them, and so are the sums that an update needs.
    """
    ones = torch.ones(len(rows), 1, dtype=rows.dtype, device=rows.device)
    # a third of the time of indexing the upper triangle
    products = (rows[:, i : i + 1] * rows[:, i:] for i in range(rows.shape[1]))
    return torch.cat([ones, rows, *products], dim=1)


def _monomial_count(width: int) -> int:
    """Return P for Z = `width`."""
    return (width + 1) * (width + 2) // 2


@dataclass(frozen=True, eq=False)
class _Rows:
    """All codes of a fit, in blocks of monomials, which are kept from pass to pass where they are small."""

    centred: Tensor  # (n, Z)
    monomials: Tensor | None  # (n, P)

    @classmethod
    def of(cls, centred: Tensor) -> _Rows:
        size = centred.element_size() * len(centred) * _monomial_count(centred.shape[1])
        return cls(centred, _monomials(centred) if size <= KEPT_MONOMIALS else None)

    def blocks(self) -> Iterator[Tensor]:
        """Return (BLOCK_ROWS, P) monomials after each other; the last ones may be fewer."""
        for start in range(0, len(self.centred), BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            yield _monomials(self.centred[block]) if self.monomials is None else self.monomials[block]


def _hard_statistics(rows: _Rows, labels: I64, components: int) -> Statistics:
    """Return the statistics of the k-means partition that the fit starts from."""
    sums = rows.centred.new_zeros(components, _monomial_count(rows.centred.shape[1]))
    assigned = torch.from_numpy(labels).to(sums.device)
    for number, block in enumerate(rows.blocks()):
        own = assigned[number * BLOCK_ROWS :][:BLOCK_ROWS]
        sums += torch.nn.functional.one_hot(own, components).to(block.dtype).T @ block
    return _unpacked(sums, 0.0)


def _expect(rows: _Rows, coefficients: F64) -> Statistics:
    """The E step: return the sums over all rows under the responsibilities that the (P, K) coefficients give."""
    tensor = torch.from_numpy(coefficients).to(rows.centred.device)
    return soft_statistics(*_sums(rows.blocks(), tensor), tensor)


def _sums(blocks: Iterator[Tensor], coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums over blocks of rows, (K, P), under the (P, K) coefficients, and the log evidence of the rows."""
    sums, log_evidence = coefficients.new_zeros(coefficients.T.shape), coefficients.new_zeros(())
    for block in blocks:
        log_joint = block @ coefficients  # (n, K)
        largest = log_joint.amax(dim=1, keepdim=True)
        share = log_joint.sub_(largest).exp_()
        total = share.sum(dim=1, keepdim=True)
        sums += share.div_(total).T @ block
        log_evidence += (largest + total.log()).sum()
    return sums, log_evidence


def soft_statistics(sums: Tensor, log_evidence: Tensor, coefficients: Tensor) -> Statistics:
    """Return the statistics of (K, P) sums over all rows under the responsibilities of `coefficients`."""
    # log r = log joint - log evidence, and the sum of r log joint is linear in the sums
    entropy = log_evidence - torch.dot(sums.T.reshape(-1), coefficients.reshape(-1))
    return _unpacked(sums, float(entropy))


class PartialSums(NamedTuple):
    """What a part of the rows adds to the statistics under coefficients (P, K)."""

    monomials: F64  # (K, P) sums of the monomials of the rows, by responsibility
    log_evidence: float


def partial_sums(codes: F32, center: F64, coefficients: F64) -> PartialSums:
    """Return the sums over some rows, (n, Z), under the (P, K) coefficients; on the CPU.

    Holds one block of rows in float64 at a time. Partial sums added up in one order give the same bits wherever they
    are made.
    """
    parts = (codes[start : start + BLOCK_ROWS] for start in range(0, len(codes), BLOCK_ROWS))
    blocks = (_monomials(torch.from_numpy(part.astype(np.float64) - center)) for part in parts)
    sums, log_evidence = _sums(blocks, torch.from_numpy(coefficients))
    return PartialSums(sums.numpy(), float(log_evidence))


def summed_statistics(partial: Sequence[PartialSums], coefficients: F64) -> Statistics:
    """Return the statistics of all rows from their partial sums under the (P, K) coefficients, added up in order."""
    tensor = torch.from_numpy(coefficients)
    sums, log_evidence = tensor.new_zeros(tensor.T.shape), tensor.new_zeros(())
    for part in partial:
        sums += torch.from_numpy(np.array(part.monomials))
        log_evidence += part.log_evidence
    return soft_statistics(sums, log_evidence, tensor)


def one_component_coefficients(width: int) -> F64:
    """Return (P, 1) coefficients under which every row belongs to one component."""
    return np.zeros((_monomial_count(width), 1))


def sample_covariance(codes: F64) -> F64:
    """Return the covariance (Z, Z) of codes (n, Z); zeros for a single code, which has none."""
    latent = codes.shape[1]
    if len(codes) < 2:
        return np.zeros((latent, latent))
    return np.asarray(np.cov(codes.T), np.float64).reshape(latent, latent)


def covariance_of(partial: Sequence[PartialSums]) -> F64:
    """Return the (Z, Z) covariance of all rows, about their mean, from sums under `one_component_coefficients`."""
    total = _unpacked(torch.from_numpy(np.sum([part.monomials for part in partial], axis=0)), 0.0)
    mean = total.first[0] / total.count[0]
    covariance: F64 = (total.second[0] - total.count[0] * np.outer(mean, mean)) / (total.count[0] - 1)
    return covariance


def mixture_coefficients(fit: FittedMixture, center: F64) -> F64:
    """Return what each monomial of a code about `center` contributes to the log of weight times density, (P, K)."""
    roots = _precision_roots(fit.covariances)
    with np.errstate(divide="ignore"):
        log_weights = np.maximum(np.log(fit.weights), np.log(np.finfo(np.float64).tiny))
    constant = log_weights + _log_det_roots(roots) - 0.5 * fit.means.shape[1] * math.log(2 * math.pi)
    return _quadratic_coefficients(roots, fit.means - center, constant)


def _unpacked(sums: Tensor, entropy: float) -> Statistics:
    """Return the statistics that (K, P) sums of monomials hold."""
    table: F64 = sums.cpu().numpy()
    width = (math.isqrt(8 * table.shape[1] + 1) - 3) // 2  # of P = (Z + 1) (Z + 2) / 2
    second = np.zeros((len(table), width, width))
    i, j = np.triu_indices(width)
    second[:, i, j] = second[:, j, i] = table[:, 1 + width :]
    return Statistics(table[:, 0] + MIN_COUNT, table[:, 1 : 1 + width], second, entropy)


def _quadratic_coefficients(roots: F64, means: F64, constants: F64) -> F64:
    """Return constants (K,) minus half the squared Mahalanobis distances as coefficients of monomials, (P, K)."""
    precisions = roots @ roots.transpose(0, 2, 1)  # (K, Z, Z)
    linear = (precisions @ means[:, :, None])[:, :, 0]  # (K, Z)
    constant = constants - 0.5 * (linear * means).sum(axis=1)
    i, j = np.triu_indices(means.shape[1])
    quadratic = np.where(i == j, -0.5, -1.0) * precisions[:, i, j]
    return np.ascontiguousarray(np.concatenate([constant[:, None], linear, quadratic], axis=1).T)


def maximise(prior: F64, statistics: Statistics) -> Posterior:
    """The M step: return the posterior that the statistics of K components amount to.

    The prior is scikit-learn's default for codes of mean 0: that mean with precision 1, the (Z, Z) covariance `prior`
    with Z degrees of freedom, and concentration 1/K of the stick-breaking weights.
    """
    count = statistics.count
    averages = statistics.first / count[:, None]
    scatter = statistics.second / count[:, None, None] - averages[:, :, None] * averages[:, None, :]
    scatter += REGULARISATION * np.eye(len(prior))
    mean_precision = 1.0 + count
    means = count[:, None] * averages / mean_precision[:, None]
    degrees = len(prior) + count
    pull = (count / mean_precision)[:, None, None]
    covariances = prior + count[:, None, None] * scatter + pull * averages[:, :, None] * averages[:, None, :]
    covariances /= degrees[:, None, None]
    behind = np.append(np.cumsum(count[::-1])[-2::-1], 0.0)  # what all later sticks hold
    return Posterior(
        sticks=(1 + count, 1 / len(count) + behind),
        mean_precision=mean_precision,
        means=means,
        degrees_of_freedom=degrees,
        covariances=covariances,
        precision_roots=_precision_roots(covariances),
    )


def _precision_roots(covariances: F64) -> F64:
    """Return upper triangular roots U, (K, Z, Z), with U Uᵀ the inverse of each covariance."""
    inverse: F64 = np.linalg.inv(np.linalg.cholesky(covariances))
    return np.ascontiguousarray(np.tril(inverse).transpose(0, 2, 1))


def _log_constants(posterior: Posterior) -> F64:
    """Return, (K,), what the expected log of weight times density has beside the Mahalanobis term."""
    width = posterior.means.shape[1]
    degrees = posterior.degrees_of_freedom
    log_lambda = width * math.log(2) + digamma(0.5 * (degrees - np.arange(width)[:, None])).sum(axis=0)
    gaussian = _log_det_roots(posterior.precision_roots) - 0.5 * width * (
        math.log(2 * math.pi) + np.log(degrees)
    )
    constants: F64 = (
        gaussian + 0.5 * (log_lambda - width / posterior.mean_precision) + _log_weights(posterior)
    )
    return constants


def _log_weights(posterior: Posterior) -> F64:
    """Return E[log weight] of every component, (K,)."""
    alpha, beta = posterior.sticks
    whole = digamma(alpha + beta)
    left_over = np.cumsum(digamma(beta) - whole)[:-1]
    log_weights: F64 = digamma(alpha) - whole + np.concatenate([[0.0], left_over])
    return log_weights


def _log_det_roots(roots: F64) -> F64:
    """Return the log determinant of each precision root, (K,)."""
    log_det: F64 = np.log(np.diagonal(roots, axis1=1, axis2=2)).sum(axis=1)
    return log_det


def _lower_bound(posterior: Posterior, entropy: float) -> float:
    """Return the lower bound of the evidence, up to constants, as scikit-learn computes it."""
    width, degrees = posterior.means.shape[1], posterior.degrees_of_freedom
    log_det = _log_det_roots(posterior.precision_roots) - 0.5 * width * np.log(degrees)
    log_gamma = gammaln(0.5 * (degrees - np.arange(width)[:, None])).sum(axis=0)
    log_wishart = -(degrees * log_det + degrees * width * 0.5 * math.log(2) + log_gamma)
    log_weight = -betaln(*posterior.sticks).sum()
    log_means = 0.5 * width * np.log(posterior.mean_precision).sum()
    return float(entropy - log_wishart.sum() - log_weight - log_means)


def _weights(posterior: Posterior) -> F64:
    """Return the expected weights, (K,), which sum to 1."""
    alpha, beta = posterior.sticks
    rest = beta / (alpha + beta)
    weights = alpha / (alpha + beta) * np.concatenate([[1.0], np.cumprod(rest[:-1])])
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
