"""Algorithm 2: sample images from the components, for review and for the correction of the classifier."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

from defuse_core.artifacts import (
    F32,
    F64,
    I64,
    NONE_OF_THE_ABOVE,
    Bool,
    Corrections,
    DroppedComponent,
    Gallery,
    Models,
    MoreImages,
    ReferenceSet,
    Scenarios,
    Verdicts,
)
from defuse_core.config import RunFile
from defuse_core.device import cpu_threads
from defuse_core.intervals import lower_bound
from defuse_core.models import decode_codes, load_classifier, load_vae, predict
from defuse_core.progress import Progress
from defuse_core.reference_models import load_reference_models, mean_probabilities
from defuse_core.seeds import generator
from defuse_core.verdicts import is_misclassified, most_common

log = logging.getLogger("defuse")
COVERAGE = 0.9  # share of a Gaussian that a truncated draw comes from: the part nearest to its mean
MORE_DRAWS = 3  # times as many further draws where correct.filter leaves too few


def sample_codes_from(
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
    within = stats.chi2.ppf(COVERAGE * stats.chi2.cdf(square, width), width)
    shrunk = normal * np.sqrt(within / square)[:, None]
    codes: F32 = (mean + shrunk @ np.linalg.cholesky(covariance).T).astype(np.float32)
    return codes


def draw_codes(
    spec: RunFile, scenarios: Scenarios, component: int, count: int, rng: np.random.Generator
) -> F32:
    """Return `count` codes of one component, (count, Z): at review.tau, or truncated at the component's own tau."""
    if scenarios.taus is None:
        if spec.review.tau == "auto":
            raise ValueError("review.tau: auto needs components with a tau each")
        return sample_codes_from(scenarios, component, count, spec.review.tau, rng)
    normal = rng.standard_normal((count, scenarios.means.shape[1]))
    covariance = scenarios.taus[component] * scenarios.covariances[component]
    return truncated_codes(scenarios.means[component], covariance, normal)


def sample_gallery(spec: RunFile, models: Models, scenarios: Scenarios, *, progress: Progress) -> Gallery:
    """Return R decoded images of every component, with the classifier's answers."""
    review = spec.review
    progress("drawing images to review", 0, 1, "galleries")
    codes = np.zeros((len(scenarios), review.images, spec.vae.latent_dim), np.float32)
    for component in range(len(scenarios)):
        rng = generator(spec.seed, "gallery", component)
        codes[component] = draw_codes(spec, scenarios, component, review.images, rng)
    with cpu_threads(1):
        flat = decode_codes(load_vae(spec, models.vae), codes.reshape(-1, spec.vae.latent_dim))
        predicted = predict(load_classifier(spec, models.classifier, len(models.classes)), flat)
    shape = codes.shape[:2]
    return Gallery(flat.reshape(*shape, *flat.shape[1:]), codes, predicted.reshape(shape), models.classes)


class Examiner:
    """What the classifier and the reference models answer on decoded codes."""

    def __init__(self, spec: RunFile, models: Models, references: ReferenceSet) -> None:
        self.classes = len(models.classes)
        self.vae = load_vae(spec, models.vae)
        self.classifier = load_classifier(spec, models.classifier, self.classes)
        self.references = load_reference_models(spec, spec.review.reference, references, self.classes)
        self.min_probability = spec.identify.min_probability

    def examine(self, codes: F32) -> tuple[I64, I64]:
        """Return for (n, Z) codes the classifier's answers and the labels that the reference models see, each (n,).

        A label has a mean probability of identify.min_probability at least; an image without such a class has none.
        """
        images = decode_codes(self.vae, codes)
        seen = mean_probabilities(self.references, images)  # (n, C)
        clear = seen.max(axis=1) >= self.min_probability
        labels = np.where(clear, seen.argmax(axis=1), NONE_OF_THE_ABOVE).astype(np.int64)
        return predict(self.classifier, images), labels


def sample_more_images(
    spec: RunFile,
    models: Models,
    references: ReferenceSet,
    scenarios: Scenarios,
    doubtful: Bool,
    *,
    progress: Progress,
) -> MoreImages:
    """Return review.more_images further draws of each doubtful component, (S,), as the reference models label them."""
    drawn, labelled, wrong = np.zeros((3, len(scenarios)), np.int64)
    with cpu_threads(1):
        examiner = Examiner(spec, models, references)
        for component in np.flatnonzero(doubtful):
            progress("drawing more images", int(component), len(scenarios), "components")
            rng = generator(spec.seed, "gallery", int(component), "more")
            codes = draw_codes(spec, scenarios, int(component), spec.review.more_images, rng)
            predicted, labels = examiner.examine(codes)
            drawn[component] = len(codes)
            labelled[component] = (labels != NONE_OF_THE_ABOVE).sum()
            wrong[component] = is_misclassified(predicted, labels).sum()
    return MoreImages(drawn, labelled, wrong)


def sample_corrections(spec: RunFile, scenarios: Scenarios, verdicts: Verdicts) -> Corrections:
    """Return D_f: per failure scenario, codes to tune on and others to test on, under the scenario's one label."""
    section, accepted = spec.correct, verdicts.accepted
    count = section.tune_images + section.test_images
    codes = np.zeros((len(accepted), count, spec.vae.latent_dim), np.float32)
    for row, component in enumerate(accepted):
        rng = generator(spec.seed, "corrections", int(component))
        codes[row] = draw_codes(spec, scenarios, int(component), count, rng)
    tune, test = codes[:, : section.tune_images], codes[:, section.tune_images :]
    return Corrections(accepted, verdicts.labels[accepted], tune, test)


def filter_corrections(
    spec: RunFile,
    models: Models,
    references: ReferenceSet,
    scenarios: Scenarios,
    fixes: Corrections,
    *,
    progress: Progress,
) -> Corrections:
    """Return D_f with only those codes to tune on in which the reference models see the scenario's label.

    Where fewer than tune_images remain, MORE_DRAWS times as many are drawn, and what remains of both is repeated. A
    scenario whose label the reference models see in no draw keeps them all: its label is the annotators'. The codes
    to test on are not filtered.
    """
    tune, kept = fixes.tune.copy(), np.zeros(len(fixes.labels))
    with cpu_threads(1):
        examiner = Examiner(spec, models, references)
        for row, (component, label) in enumerate(zip(fixes.scenario, fixes.labels, strict=True)):
            progress("filtering images to tune on", row, len(kept), "scenarios")
            codes, wanted = tune[row], spec.correct.tune_images
            agrees = examiner.examine(codes)[1] == label
            kept[row] = agrees.mean()
            if not agrees.all():
                rng = generator(spec.seed, "corrections", int(component), "more")
                more = draw_codes(spec, scenarios, int(component), MORE_DRAWS * wanted, rng)
                usable = np.concatenate([codes[agrees], more[examiner.examine(more)[1] == label]])
                tune[row] = np.resize(usable, codes.shape) if len(usable) else codes
    for component, share in zip(fixes.scenario, kept, strict=True):
        if share < spec.review.rho:
            log.warning(
                "correct: the reference models see the label of scenario %d in %.0f %% of its draws",
                component,
                100 * share,
            )
    return Corrections(fixes.scenario, fixes.labels, tune, fixes.test, kept)


Examine = Callable[[F32], tuple[I64, I64]]
TAUS = tuple(2.0**-step for step in range(7))  # the widest first
DRAWS = 64  # per component and tau


def tighten(
    spec: RunFile, models: Models, references: ReferenceSet, scenarios: Scenarios, *, progress: Progress
) -> Scenarios:
    """Return the components with a tau each; those that fail the requirements at every tau are dropped."""
    with cpu_threads(1):
        examiner = Examiner(spec, models, references)
        return find_taus(spec, scenarios, examiner.examine, progress)


def find_taus(spec: RunFile, scenarios: Scenarios, examine: Examine, progress: Progress) -> Scenarios:
    """Return what `tighten` does, for any `examine`: codes (n, Z) -> answers of f and reference labels, each (n,).

    Required are lower bounds (95 %): of the share of draws with one label, review.purity; of the share of labelled
    draws that the classifier gets wrong, review.rho.
    """
    taus, dropped = np.zeros(len(scenarios)), list(scenarios.dropped)
    for component in range(len(scenarios)):
        progress("tightening components", component, len(scenarios), "components")
        search = _Search(spec, examine, scenarios, component)
        tau, narrowest = search.largest_tau()
        if tau is None:
            dropped.append(_dropped(scenarios, component, narrowest.reason(spec)))
        else:
            taus[component] = tau
    kept = np.flatnonzero(taus > 0)
    log.info("%d of %d components are pure and misclassified at some tau", len(kept), len(scenarios))
    return scenarios.take(kept, taus=taus[kept], dropped=tuple(dropped))


@dataclass(frozen=True)
class _Outcome:
    """What the draws of one component at one tau show."""

    pure: int  # draws with the component's label
    labelled: int
    wrong: int  # labelled draws that the classifier gets wrong
    draws: int = DRAWS

    def passes(self, spec: RunFile) -> bool:
        return self._is_pure(spec) and _bound(self.wrong, self.labelled) > spec.review.rho

    def _is_pure(self, spec: RunFile) -> bool:
        return _bound(self.pure, self.draws) >= spec.review.purity

    def reason(self, spec: RunFile) -> str:
        if not self._is_pure(spec):
            return f"at its mean {self.pure} of {self.draws} draws have one label, too few for {spec.review.purity:.0%}"
        return f"at its mean f is wrong on {self.wrong} of {self.labelled} draws, too few for {spec.review.rho:.0%}"


def _bound(hits: int, total: int) -> float:
    return float(lower_bound(np.array([hits]), np.array([total]))[0])


class _Search:
    """The search for the largest tau of one component. The same normal draws serve every tau."""

    def __init__(self, spec: RunFile, examine: Examine, scenarios: Scenarios, component: int) -> None:
        self.spec, self.examine = spec, examine
        self.mean, self.covariance = scenarios.means[component], scenarios.covariances[component]
        rng = generator(spec.seed, "tighten", component)
        self.normal: F64 = rng.standard_normal((DRAWS, len(self.mean)))

    def largest_tau(self) -> tuple[float | None, _Outcome]:
        """Return the largest tau that passes, if any does, and the outcome at the last one tried.

        All are tried, since the share that the classifier gets wrong may fall towards the mean.
        """
        for tau in TAUS:
            outcome = self._outcome(tau)
            if outcome.passes(self.spec):
                return tau, outcome
        return None, outcome

    def _outcome(self, tau: float) -> _Outcome:
        codes: F32 = truncated_codes(self.mean, tau * self.covariance, self.normal)
        predicted, labels = self.examine(codes)
        label = most_common(labels)
        labelled = labels != NONE_OF_THE_ABOVE
        pure = 0 if label is None else int((labels == label).sum())
        return _Outcome(pure, int(labelled.sum()), int((labelled & (labels != predicted)).sum()))


def _dropped(scenarios: Scenarios, component: int, reason: str) -> DroppedComponent:
    cells, support = scenarios.cells, scenarios.support
    none = NONE_OF_THE_ABOVE
    source, answer = (none, none) if cells is None else (int(cells[component, 0]), int(cells[component, 1]))
    images = 0 if support is None else int(support[component])
    return DroppedComponent(float(scenarios.weights[component]), source, answer, images, reason)
