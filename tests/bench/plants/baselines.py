"""What else finds groups of failing images: fitted on the validation images, applied to the test images.

Written from the papers: Domino (arXiv 2203.14960) and PlaneSpot (arXiv 2207.04104); confusion cells and a plain mixture
over the codes of misclassified images are the simplest things that one would try.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp
from sklearn.manifold import TSNE
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestNeighbors

from defuse_core.artifacts import F32, F64, I64, Bool
from tests.bench.plants.scoring import TOP, Group

EPSILON = 1e-6


@dataclass(frozen=True, eq=False)
class View:
    """What a method sees of the images of one part."""

    labels: I64  # (N,) right labels
    probabilities: F32  # (N, C) of the classifier
    codes: F32  # (N, Z) means of the β-VAE's posterior
    features: F32  # (N, D) what the classifier's last layer sees

    @property
    def predicted(self) -> I64:
        return self.probabilities.argmax(axis=1).astype(np.int64)

    @property
    def wrong(self) -> Bool:
        return self.predicted != self.labels

    def take(self, rows: I64) -> View:
        return View(self.labels[rows], self.probabilities[rows], self.codes[rows], self.features[rows])


def confusion_cells(validation: View, test: View, names: tuple[str, ...]) -> list[Group]:
    """Return the cells (class, answer) off the diagonal, most images first."""
    cells, counts = np.unique(
        np.stack([validation.labels, validation.predicted])[:, validation.wrong], axis=1, return_counts=True
    )
    groups = []
    for cell in np.argsort(-counts, kind="stable")[: 3 * TOP]:
        label, answer = cells[:, cell]
        score = np.where(test.labels == label, np.log(test.probabilities[:, answer] + EPSILON), -np.inf)
        members = (test.labels == label) & (test.predicted == answer)
        groups.append(Group(f"{names[label]} read as {names[answer]}", score, members, score))
    return groups


def failure_mixture(validation: View, test: View, seed: int) -> list[Group]:
    """Return the components of a Gaussian mixture over the codes of misclassified images, heaviest first."""
    codes = validation.codes[validation.wrong].astype(np.float64)
    count = min(3 * TOP, max(1, len(codes) // 10))
    mixture = GaussianMixture(count, covariance_type="diag", reg_covar=1e-3, random_state=seed).fit(codes)
    density = _log_densities(mixture, test.codes)  # (N, K)
    owner = (density + np.log(mixture.weights_)).argmax(axis=1)
    failure = np.log(1 - test.probabilities[np.arange(len(test.labels)), test.labels] + EPSILON)
    return [
        Group(f"component {k}", density[:, k] + failure, test.wrong & (owner == k), density[:, k])
        for k in np.argsort(-mixture.weights_)
    ]


def planespot(validation: View, test: View, seed: int, most: int = 2000) -> list[Group]:
    """Return PlaneSpot's groups: a mixture over a 2-d embedding of the features, joined with the confidence.

    The embedding is t-SNE's in place of scvis; test images lie at the mean of their five nearest validation images.
    Confidence is the probability of the right label, scaled as the embedding is. K has the lowest BIC; groups are
    ranked by error rate times errors.
    """
    rows = np.random.default_rng(seed).permutation(len(validation.labels))[:most]
    known = validation.take(np.sort(rows))
    plane = TSNE(random_state=seed, max_iter=400, init="pca").fit_transform(known.features)
    plane = (plane - plane.min(axis=0)) / np.ptp(plane, axis=0)
    near = NearestNeighbors(n_neighbors=5).fit(known.features).kneighbors(test.features)[1]
    joined = np.column_stack([plane, _confidence(known)])
    placed = np.column_stack([plane[near].mean(axis=1), _confidence(test)])
    fits = [
        GaussianMixture(count, reg_covar=1e-5, random_state=seed).fit(joined)
        for count in (10, 20, 30, 45, 60, 80)
    ]
    mixture = min(fits, key=lambda fit: float(fit.bic(joined)))
    inside = mixture.predict(joined)
    rank = [known.wrong[inside == k].mean() * known.wrong[inside == k].sum() for k in np.unique(inside)]
    density, owner = _log_densities(mixture, placed), mixture.predict(placed)
    groups = []
    for k in np.unique(inside)[np.argsort(-np.array(rank), kind="stable")][: 3 * TOP]:
        score = np.where(owner == k, density[:, k], -np.inf)
        groups.append(Group(f"component {k}", score, owner == k, score))
    return groups


def domino(validation: View, test: View, seed: int, weight: float = 10.0) -> list[Group]:
    """Return Domino's slices: a mixture that models embedding (here the codes), label and answer together.

    Components start as the cells of the confusion matrix that are not empty, twice each with noise; label and answer
    weigh `weight` times the embedding's log-likelihood. The components whose answers differ most from their labels
    come first.
    """
    rng = np.random.default_rng(seed)
    classes = validation.probabilities.shape[1]
    cells = np.unique(np.stack([validation.labels, validation.predicted]), axis=1)
    cells = np.concatenate([cells, cells], axis=1)  # (2, K)
    onehot = np.eye(classes)[validation.labels]
    share = onehot[:, cells[0]] * validation.probabilities[:, cells[1]]
    share = share / (share.sum(axis=1, keepdims=True) + EPSILON) + 1e-3 * rng.random(share.shape)
    share /= share.sum(axis=1, keepdims=True)
    codes = validation.codes.astype(np.float64)
    for _ in range(60):
        count = share.sum(axis=0) + EPSILON
        fit = _DominoFit(
            np.log(count / len(codes)),
            share.T @ codes / count[:, None],
            np.maximum(share.T @ codes**2 / count[:, None] - (share.T @ codes / count[:, None]) ** 2, 1e-3),
            share.T @ onehot / count[:, None],
            share.T @ validation.probabilities / count[:, None],
        )
        share = np.exp(_responsibilities(fit, validation, weight))
    log_share = _responsibilities(fit, test, weight)  # (N, K)
    owner = log_share.argmax(axis=1)
    gap = np.abs((fit.answers - fit.labels).max(axis=1)) * (count > 2)
    groups = []
    for k in np.argsort(-gap, kind="stable")[: 3 * TOP]:
        distance = ((test.codes - fit.means[k]) ** 2 / fit.variances[k]).sum(axis=1)
        score = log_share[:, k] - 1e-4 * distance  # so that equal shares are told apart
        groups.append(Group(f"slice {k}", score, owner == k, score))
    return groups


@dataclass(frozen=True, eq=False)
class _DominoFit:
    log_weights: F64  # (K,)
    means: F64  # (K, Z)
    variances: F64  # (K, Z)
    labels: F64  # (K, C)
    answers: F64  # (K, C)


def _responsibilities(fit: _DominoFit, view: View, weight: float) -> F64:
    """Return the log of each component's share in each image, (N, K)."""
    precise = 1 / fit.variances
    squares = view.codes**2 @ precise.T - 2 * view.codes @ (fit.means * precise).T
    squares += (fit.means**2 * precise).sum(axis=1)
    joint = fit.log_weights - 0.5 * (squares + np.log(fit.variances).sum(axis=1))
    joint += weight * np.log(fit.labels[:, view.labels].T + EPSILON)
    joint += weight * np.log(view.probabilities @ fit.answers.T + EPSILON)
    found: F64 = joint - logsumexp(joint, axis=1, keepdims=True)
    return found


def _confidence(view: View) -> F64:
    return view.probabilities[np.arange(len(view.labels)), view.labels].astype(np.float64)


def _log_densities(mixture: GaussianMixture, rows: F32 | F64) -> F64:
    """Return the log density of each row under each component, (N, K)."""
    found: F64 = mixture._estimate_log_prob(rows.astype(np.float64))
    return found
