"""Codes drawn from the components (Algorithm 2, lines 4 and 5), and the image that each is decoded at.

With vae.decode: anchored these are training images, of which held-out draws have their own half. A unit is what
photographs share: a track of images, or one image where there are no tracks. It is in the same half for all components,
so that none is tuned on by one component and held out by another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from defuse_core.artifacts import F32, F64, I64, Anchors, Bool, Cause, ComponentFailures, Failures, Scenarios
from defuse_core.config import RunFile
from defuse_core.data import Images
from defuse_core.formatting import count_of
from defuse_core.intervals import chi2_quantile
from defuse_core.seeds import generator

REGION = 0.99  # share of a Gaussian within its region
COVERAGE = 0.9  # share of a Gaussian that a truncated draw comes from: the part nearest to its mean
FAILURES_KEPT = 256  # L, with vae.decode: anchored
IMAGES_KEPT = 64  # training images that the failures of one component come from at most
REPAIRS = 5000  # units that change halves at most
SIDEWAYS = 0.1  # share of the repairs that change a random unit


def gaussian_codes(
    scenarios: Scenarios, component: int, count: int, tau: float, rng: np.random.Generator
) -> F32:
    """Return `count` codes from N(mu_j, τ·Σ_j) of one component, (count, Z). τ multiplies the covariance."""
    root = np.linalg.cholesky(tau * scenarios.covariances[component])
    normal = rng.standard_normal((count, scenarios.means.shape[1]))
    codes: F32 = (scenarios.means[component] + normal @ root.T).astype(np.float32)
    return codes


def truncated_codes(mean: F64, covariance: F64, normal: F64) -> F32:
    """Return codes of N(mean, covariance) within the ellipsoid that holds COVERAGE of it, (n, Z).

    `normal` holds (n, Z) standard normal draws; each is moved towards 0 along its direction.
    """
    width = normal.shape[1]
    square = (normal**2).sum(axis=1)
    share = COVERAGE * special.chdtr(width, square)  # of the χ² distribution
    within = chi2_quantile(share, width)
    shrunk = normal * np.sqrt(within / square)[:, None]
    codes: F32 = (mean + shrunk @ np.linalg.cholesky(covariance).T).astype(np.float32)
    return codes


@dataclass(frozen=True, eq=False)
class Draws:
    """Codes, and with vae.decode: anchored the image that each is decoded at."""

    codes: F32  # (n, Z)
    anchors: I64 | None = None  # (n,) index into scenarios.failures.anchors

    def __len__(self) -> int:
        return len(self.codes)

    def take(self, rows: I64 | Bool) -> Draws:
        """Return some of them."""
        return Draws(self.codes[rows], None if self.anchors is None else self.anchors[rows])

    def joined(self, others: Draws) -> Draws:
        """Return these and others, both with anchors or both without."""
        codes = np.concatenate([self.codes, others.codes])
        if self.anchors is None or others.anchors is None:
            return Draws(codes)
        return Draws(codes, np.concatenate([self.anchors, others.anchors]))


def draw_codes(
    spec: RunFile,
    scenarios: Scenarios,
    component: int,
    count: int,
    rng: np.random.Generator,
    *,
    held_out: bool = False,
    factor: float = 1.0,
) -> Draws:
    """Return `count` codes of one component: at review.tau, or truncated at the component's own tau.

    With vae.decode: anchored they are draws near failures of the component (`smoothed`), from the half of its images
    that is held out, or from the other half. `factor` multiplies the covariance of a Gaussian, or of the noise alone
    near failures, so that a draw stays near its failure; where it is not 1, nothing is truncated.
    """
    tau, width = tau_of(spec, scenarios, component), scenarios.means.shape[1]
    truncated = scenarios.taus is not None and factor == 1
    if scenarios.failures is not None:
        rows = failure_rows(scenarios.failures, component, count, rng, held_out=held_out)
        normal = np.sqrt(factor) * rng.standard_normal((count, width))
        return smoothed(scenarios, component, rows, tau, normal, truncated=truncated)
    if not truncated:
        return Draws(gaussian_codes(scenarios, component, count, factor * tau, rng))
    covariance = tau * scenarios.covariances[component]
    normal = rng.standard_normal((count, width))
    return Draws(truncated_codes(scenarios.means[component], covariance, normal))


def tau_of(spec: RunFile, scenarios: Scenarios, component: int) -> float:
    """Return the τ that a component is drawn with: its own, or review.tau."""
    if scenarios.taus is not None:
        return float(scenarios.taus[component])
    if spec.review.tau == "auto":
        raise ValueError("review.tau: auto needs components with a tau each")
    return spec.review.tau


def failure_rows(
    failures: ComponentFailures, component: int, count: int, rng: np.random.Generator, *, held_out: bool
) -> I64:
    """Return `count` random failures of one component, (count,): at its held-out images, or at the others."""
    return rng.choice(_half(failures, component, held_out), count).astype(np.int64)


def spread_draws(
    spec: RunFile, scenarios: Scenarios, component: int, count: int, rng: np.random.Generator, after: int = 0
) -> Draws:
    """Return what `draw_codes` does, for review: an image is used as an anchor again only after all others were.

    The order of the images, in which tracks take turns, follows from the seed alone; the first `after` are skipped.
    """
    if scenarios.failures is None:
        return draw_codes(spec, scenarios, component, count, rng)
    order = _image_order(scenarios.failures, component, generator(spec.seed, "gallery", component, "images"))
    half = _half(scenarios.failures, component, held_out=False)
    anchor = scenarios.failures.anchor[component, half]
    images = order[np.arange(after, after + count) % len(order)]
    rows = np.array([rng.choice(half[anchor == image]) for image in images], np.int64)
    normal, tau = rng.standard_normal((count, scenarios.means.shape[1])), tau_of(spec, scenarios, component)
    return smoothed(scenarios, component, rows, tau, normal, truncated=scenarios.taus is not None)


def _image_order(failures: ComponentFailures, component: int, rng: np.random.Generator) -> I64:
    """Return the images that are not held out, shuffled: one of each track, then a second one of each, and so on."""
    half = _half(failures, component, held_out=False)
    images: I64 = rng.permutation(np.unique(failures.anchor[component, half]))
    track = failures.anchors.track
    return images if track is None else images[np.argsort(_turns(track[images]), kind="stable")]


def _half(failures: ComponentFailures, component: int, held_out: bool) -> I64:
    """Return the failures of one component at its held-out images, or at the others.

    There are some of either after `drop_with_few_units`.
    """
    half: I64 = np.flatnonzero(failures.anchors.held_out[failures.anchor[component]] == held_out)
    return half


def smoothed(
    scenarios: Scenarios, component: int, rows: I64, tau: float, normal: F64, *, truncated: bool
) -> Draws:
    """Return a draw near each failure z in `rows` of one component, anchored at the image of that failure.

    The draw is mu_j + sqrt(1 - τ)·(z - mu_j) + N(0, τ·Σ_j), a smoothed bootstrap: at any τ up to 1 its mean and
    covariance are those of the component, and at small τ it is the failure itself. `normal` (n, Z) are standard normal
    draws, of which the noise is made; `truncated`: as of `truncated_codes`.
    """
    failures, mean = scenarios.failures, scenarios.means[component]
    assert failures is not None
    covariance = tau * scenarios.covariances[component]
    if not truncated:
        noise: F64 = normal @ np.linalg.cholesky(covariance).T
    else:
        noise = truncated_codes(np.zeros_like(mean), covariance, normal).astype(np.float64)
    shrink = np.sqrt(max(0.0, 1 - tau))
    codes = mean + shrink * (failures.codes[component, rows] - mean) + noise
    return Draws(codes.astype(np.float32), failures.anchor[component, rows])


def anchors_of(scenarios: Scenarios) -> Anchors | None:
    """Return the images that draws of the components are decoded at; None where they are decoded plainly."""
    return None if scenarios.failures is None else scenarios.failures.anchors


def units_of(anchors: Anchors | None, anchor: I64 | None, count: int) -> I64:
    """Return a number for each of `count` pictures, (count,); those with the same one are no independent evidence.

    It is that of the track that a picture is anchored at, of the image where images have no tracks, and its own with
    plain decoding. `anchor` holds indices into `anchors`.
    """
    if anchors is None or anchor is None:
        return np.arange(count)
    return anchors.unit[anchor.reshape(-1)]


def stacked(draws: Sequence[Draws], count: int, width: int) -> tuple[F32, I64 | None]:
    """Return the codes (n, count, Z) and the anchors (n, count), if they have any, of n components."""
    codes = np.array([drawn.codes for drawn in draws], np.float32).reshape(len(draws), count, width)
    anchors = [drawn.anchors for drawn in draws if drawn.anchors is not None]
    return codes, np.stack(anchors) if anchors else None


def component_failures(members: Sequence[Failures], train: Images, seed: int) -> ComponentFailures:
    """Return FAILURES_KEPT of the failures of each component, from as many images as there are, up to IMAGES_KEPT.

    They are drawn by seed, and each image gives as many as the others where it has so many. Images of one track are
    held out together, since they show the same object. Components whose images are all in one half are among them
    (see `drop_with_few_units`).
    """
    chosen = [
        own.take(_spread(own.source, generator(seed, "distill", "failures", component)))
        for component, own in enumerate(members)
    ]
    sources = np.stack([own.source for own in chosen])  # (S, L)
    used, anchor = np.unique(sources, return_inverse=True)
    pixels = train.take(used).pixels[:]
    codes = np.stack([own.codes for own in chosen])
    anchor = anchor.reshape(sources.shape).astype(np.int64)
    units = used if train.tracks is None else train.tracks[used]
    names, unit = np.unique(units, return_inverse=True)
    rng = generator(seed, "distill", "held out")
    held_out = held_out_half(unit[anchor], len(names), rng)[unit]
    track = None if train.tracks is None else train.tracks[used]
    return ComponentFailures(codes, anchor, Anchors(pixels, used, held_out, track))


def _spread(source: I64, rng: np.random.Generator) -> I64:
    """Return FAILURES_KEPT rows of (n,) failures: one of each image, then a second one of each, and so on."""
    rows = rng.permutation(len(source))
    images, of_image = np.unique(source[rows], return_inverse=True)
    rows = rows[np.isin(of_image, rng.permutation(len(images))[:IMAGES_KEPT])]
    return np.resize(rows[np.argsort(_turns(source[rows]), kind="stable")], FAILURES_KEPT)


def _turns(groups: I64) -> I64:
    """Return for each of (n,) elements how many equal ones come before it."""
    order = np.argsort(groups, kind="stable")
    _, first, counts = np.unique(groups[order], return_index=True, return_counts=True)
    turn = np.empty(len(groups), np.int64)
    turn[order] = np.arange(len(groups)) - np.repeat(first, counts)
    return turn


def held_out_half(used: I64, units: int, rng: np.random.Generator) -> Bool:
    """Return which units held-out draws are anchored at, (units,).

    They are about half of those that each component uses, a row of `used` (S, L). Components of few units choose first;
    one of a single unit has none to hold out and does not choose. Where a component has all units in one half, units
    change halves until each has some in both, or until REPAIRS have.
    """
    several = [own for own in map(np.unique, used) if len(own) > 1]
    held, free = np.zeros(units, np.bool_), np.ones(units, np.bool_)
    for own in sorted(several, key=len):
        missing = max(0, len(own) // 2 - int(held[own].sum()))
        held[rng.permutation(own[free[own]])[:missing]] = True
        free[own] = False
    return _with_fewest_undivided(several, held, rng)


def _with_fewest_undivided(several: list[I64], held: Bool, rng: np.random.Generator) -> Bool:
    """Return the halves in which the fewest components are undivided, of those that a local search passes.

    The search is WalkSAT: a unit of a random undivided component changes halves, the one that leaves the fewest
    components undivided, or now and then a random one.
    """
    uses = np.zeros((len(several), len(held)), np.bool_)
    for component, own in enumerate(several):
        uses[component, own] = True
    size = uses.sum(axis=1)
    # (S,) units of each component that are held out
    count: I64 = (uses & held).sum(axis=1)
    best, fewest = held.copy(), len(held) + len(several)
    for _ in range(REPAIRS + 1):
        undivided = np.flatnonzero((count == 0) | (count == size))
        if len(undivided) < fewest:
            best, fewest = held.copy(), len(undivided)
        if not len(undivided):
            break
        own = several[rng.choice(undivided)]
        if rng.random() < SIDEWAYS:
            unit = rng.choice(own)
        else:
            # (S, n) held-out units of each component after the change of each of the n
            after = count[:, None] + uses[:, own] * np.where(held[own], -1, 1)
            left = ((after == 0) | (after == size[:, None])).sum(axis=0)
            unit = rng.choice(own[left == left.min()])
        held[unit] = ~held[unit]
        count = count + uses[:, unit] * (1 if held[unit] else -1)
    return best


def drop_with_few_units(scenarios: Scenarios, least: int = 1) -> Scenarios:
    """Return the components with photographs in both halves and `least` of them to review; the others become dropped.

    Without both halves they would be measured on the photographs that they are tuned on, or tuned on photographs that
    others are measured on; with fewer to review no verdict could accept them (`ReviewSection.least_units`).
    """
    failures = scenarios.failures
    if failures is None:
        return scenarios
    reasons = [_why_dropped(failures, component, least) for component in range(len(scenarios))]
    dropped = [
        scenarios.dropped_component(component, *reason)
        for component, reason in enumerate(reasons)
        if reason is not None
    ]
    if not dropped:
        return scenarios
    kept = np.array([component for component, reason in enumerate(reasons) if reason is None], np.int64)
    return scenarios.take(kept, dropped=(*scenarios.dropped, *dropped))


def _why_dropped(failures: ComponentFailures, component: int, least: int) -> tuple[Cause, str] | None:
    anchor, what = failures.anchor[component], "photograph" if failures.anchors.track is None else "track"
    units, held = failures.anchors.unit[anchor], failures.anchors.held_out[anchor]
    count, reviewed = len(np.unique(units)), len(np.unique(units[~held]))
    if held.all() or not held.any():
        shared = f"other components share its {count_of(count, what)}"
        why = f"all are of one {what}" if count == 1 else shared
        return "undivided", f"too few photographs to hold out: {why}"
    if reviewed < least:
        found = f"{count_of(reviewed, what)} to review, and significance takes {least}"
        return "uncertain", f"too few photographs or tracks for certainty: {found}"
    return None


def in_region(scenarios: Scenarios, component: int, codes: F32) -> Bool:
    """Return which of (n, Z) codes lie within the ellipsoid that holds REGION of one component, (n,)."""
    limit = chi2_quantile(REGION, codes.shape[1])
    inside: Bool = distances_from(scenarios, component, codes) ** 2 <= limit
    return inside


def in_any_region(scenarios: Scenarios, components: I64, codes: F32) -> Bool:
    """Return which of (n, Z) codes lie `in_region` of one of the components, (n,)."""
    inside: Bool = np.zeros(len(codes), np.bool_)
    for component in components.tolist():
        inside |= in_region(scenarios, component, codes)
    return inside


def distances_from(scenarios: Scenarios, component: int, codes: F32) -> F64:
    """Return the Mahalanobis distances of (n, Z) codes from the mean of one component, (n,)."""
    from scipy.spatial.distance import cdist  # late: its import takes 0.2 s, in every worker

    inverse = np.linalg.inv(scenarios.covariances[component])
    mean = scenarios.means[component][None]
    distances: F64 = cdist(mean, codes.astype(np.float64), "mahalanobis", VI=inverse)[0]
    return distances
