"""Algorithm 2: sample images from the components, for review and for the correction of the classifier."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from defuse_core.artifacts import (
    F64,
    I64,
    NONE_OF_THE_ABOVE,
    Anchors,
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
from defuse_core.distill.draws import (
    Draws,
    anchors_of,
    draw_codes,
    failure_rows,
    smoothed,
    stacked,
    truncated_codes,
)
from defuse_core.intervals import lower_bound
from defuse_core.models import decoder_of, load_classifier, load_vae, predict
from defuse_core.progress import Progress
from defuse_core.protocols import Call, Compute
from defuse_core.review.verdicts import is_misclassified, most_common
from defuse_core.seeds import generator
from defuse_core.training.reference_models import load_reference_models, mean_probabilities

log = logging.getLogger("defuse")
ROWS_PER_TASK = 8  # components or scenarios that one task examines
MORE_DRAWS = 3  # times as many further draws where correct.filter leaves too few


def sample_gallery(spec: RunFile, models: Models, scenarios: Scenarios, *, progress: Progress) -> Gallery:
    """Return R decoded images of every component, with the classifier's answers."""
    review = spec.review
    progress("drawing images to review", 0, 1, "galleries")
    draws = [
        draw_codes(spec, scenarios, component, review.images, generator(spec.seed, "gallery", component))
        for component in range(len(scenarios))
    ]
    codes, anchors = stacked(draws, review.images, spec.vae.latent_dim)  # (S, R, Z), (S, R)
    images = anchors_of(scenarios)
    with cpu_threads(1):
        decoder = decoder_of(load_vae(spec, models.vae), images)
        flat = decoder.decode(codes, anchors)
        predicted = predict(load_classifier(spec, models.classifier, len(models.classes)), flat)
    shape = codes.shape[:2]
    return Gallery(
        flat.reshape(*shape, *flat.shape[1:]),
        codes,
        predicted.reshape(shape),
        models.classes,
        source=None if images is None or anchors is None else images.source[anchors],
    )


class Examiner:
    """What the classifier and the reference models answer on decoded codes."""

    def __init__(self, spec: RunFile, models: Models, references: ReferenceSet, scenarios: Scenarios) -> None:
        self.classes = len(models.classes)
        self.decoder = decoder_of(load_vae(spec, models.vae), anchors_of(scenarios))
        self.classifier = load_classifier(spec, models.classifier, self.classes)
        self.references = load_reference_models(spec, spec.review.reference, references, self.classes)
        self.min_probability = spec.identify.min_probability

    def examine(self, draws: Draws) -> tuple[I64, I64]:
        """Return for n draws the classifier's answers and the labels that the reference models see, each (n,).

        A label has a mean probability of identify.min_probability at least; an image without such a class has none.
        """
        images = self.decoder.decode(draws.codes, draws.anchors)
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
        examiner = Examiner(spec, models, references, scenarios)
        for component in np.flatnonzero(doubtful):
            progress("drawing more images", int(component), len(scenarios), "components")
            rng = generator(spec.seed, "gallery", int(component), "more")
            draws = draw_codes(spec, scenarios, int(component), spec.review.more_images, rng)
            predicted, labels = examiner.examine(draws)
            drawn[component] = len(labels)
            labelled[component] = (labels != NONE_OF_THE_ABOVE).sum()
            wrong[component] = is_misclassified(predicted, labels).sum()
    return MoreImages(drawn, labelled, wrong)


def sample_corrections(spec: RunFile, scenarios: Scenarios, verdicts: Verdicts) -> Corrections:
    """Return D_f: per failure scenario, codes to tune on and others to test on, under the scenario's one label.

    With vae.decode: anchored both are anchored at other images.
    """
    section, accepted = spec.correct, verdicts.accepted
    if scenarios.failures is not None:
        return _anchored_corrections(spec, scenarios, verdicts)
    count = section.tune_images + section.test_images
    codes = np.zeros((len(accepted), count, spec.vae.latent_dim), np.float32)
    for row, component in enumerate(accepted):
        rng = generator(spec.seed, "corrections", int(component))
        codes[row] = draw_codes(spec, scenarios, int(component), count, rng).codes
    tune, test = codes[:, : section.tune_images], codes[:, section.tune_images :]
    return Corrections(accepted, verdicts.labels[accepted], tune, test)


def _anchored_corrections(spec: RunFile, scenarios: Scenarios, verdicts: Verdicts) -> Corrections:
    section, accepted = spec.correct, verdicts.accepted
    tune, test = list[Draws](), list[Draws]()
    for component in accepted.tolist():
        rng = generator(spec.seed, "corrections", component)
        tune.append(draw_codes(spec, scenarios, component, section.tune_images, rng))
        test.append(draw_codes(spec, scenarios, component, section.test_images, rng, held_out=True))
    tune_codes, tune_anchor = stacked(tune, section.tune_images, spec.vae.latent_dim)
    test_codes, test_anchor = stacked(test, section.test_images, spec.vae.latent_dim)
    return Corrections(
        accepted,
        verdicts.labels[accepted],
        tune_codes,
        test_codes,
        anchors=anchors_of(scenarios),
        tune_anchor=tune_anchor,
        test_anchor=test_anchor,
    )


def with_used_anchors(fixes: Corrections) -> Corrections:
    """Return D_f with only the images that its codes are anchored at, of those of all components."""
    if fixes.anchors is None or fixes.tune_anchor is None or fixes.test_anchor is None:
        return fixes
    both = np.concatenate([fixes.tune_anchor, fixes.test_anchor], axis=1)
    used, anchor = np.unique(both, return_inverse=True)
    anchor = anchor.reshape(both.shape).astype(np.int64)
    return replace(
        fixes,
        anchors=Anchors(fixes.anchors.pixels[used], fixes.anchors.source[used]),
        tune_anchor=anchor[:, : fixes.tune.shape[1]],
        test_anchor=anchor[:, fixes.tune.shape[1] :],
    )


def filter_corrections(
    spec: RunFile,
    models: Models,
    references: ReferenceSet,
    scenarios: Scenarios,
    fixes: Corrections,
    compute: Compute,
) -> Corrections:
    """Return D_f with only those codes to tune on in which the reference models see the scenario's label.

    Where fewer than tune_images remain, MORE_DRAWS times as many are drawn, and what remains of both is repeated. A
    scenario whose label the reference models see in no draw keeps them all: its label is the annotators'. The codes
    to test on are not filtered.
    """
    calls = [
        Call(_filtered, spec, models, references, scenarios, fixes, rows)
        for rows in _in_tasks(len(fixes.labels))
    ]
    filtered = list(itertools.chain(*compute.tasks("correct", calls)))
    kept = np.array([share for _, share in filtered])
    for component, share in zip(fixes.scenario, kept, strict=True):
        if share < spec.review.rho:
            log.warning(
                "correct: the reference models see the label of scenario %d in %.0f %% of its draws",
                component,
                100 * share,
            )
    if not filtered:
        return replace(fixes, kept=kept)
    codes, anchor = stacked([draws for draws, _ in filtered], fixes.tune.shape[1], fixes.tune.shape[2])
    return replace(fixes, tune=codes, tune_anchor=anchor, kept=kept)


def _filtered(
    spec: RunFile,
    models: Models,
    references: ReferenceSet,
    scenarios: Scenarios,
    fixes: Corrections,
    rows: range,
    *,
    progress: Progress,
) -> list[tuple[Draws, float]]:
    """Return the draws to tune on of some accepted scenarios, and the share of the first ones that is usable."""
    found = []
    with cpu_threads(1):
        examiner = Examiner(spec, models, references, scenarios)
        for row in rows:
            progress("filtering images to tune on", row, len(fixes.labels), "scenarios")
            component, label = int(fixes.scenario[row]), fixes.labels[row]
            draws = Draws(fixes.tune[row], None if fixes.tune_anchor is None else fixes.tune_anchor[row])
            agrees = examiner.examine(draws)[1] == label
            if not agrees.all():
                rng = generator(spec.seed, "corrections", component, "more")
                count = MORE_DRAWS * spec.correct.tune_images
                more = draw_codes(spec, scenarios, component, count, rng)
                draws = _repeated(draws, more, np.concatenate([agrees, examiner.examine(more)[1] == label]))
            found.append((draws, float(agrees.mean())))
    return found


def _repeated(draws: Draws, more: Draws, usable: Bool) -> Draws:
    """Return as many draws as `draws` has, from the usable ones of both; `draws` itself where none is usable."""
    if not usable.any():
        return draws
    rows = np.resize(np.flatnonzero(usable), len(draws.codes))
    codes = np.concatenate([draws.codes, more.codes])[rows]
    if draws.anchors is None or more.anchors is None:
        return Draws(codes)
    return Draws(codes, np.concatenate([draws.anchors, more.anchors])[rows])


Examine = Callable[[Draws], tuple[I64, I64]]
TAUS = tuple(2.0**-step for step in range(7))  # the widest first
DRAWS = 64  # per component and tau


def tighten(
    spec: RunFile, models: Models, references: ReferenceSet, scenarios: Scenarios, compute: Compute
) -> Scenarios:
    """Return the components with a tau each; those that fail the requirements at every tau are dropped."""
    calls = [
        Call(_search_taus, spec, models, references, scenarios, components)
        for components in _in_tasks(len(scenarios))
    ]
    return with_taus(spec, scenarios, list(itertools.chain(*compute.tasks("distill", calls))))


def _in_tasks(count: int) -> list[range]:
    """Return `count` rows in ranges for a task each. No result depends on them: every row has its own seed."""
    return [range(first, min(first + ROWS_PER_TASK, count)) for first in range(0, count, ROWS_PER_TASK)]


def _search_taus(
    spec: RunFile,
    models: Models,
    references: ReferenceSet,
    scenarios: Scenarios,
    components: range,
    *,
    progress: Progress,
) -> list[FoundTau]:
    with cpu_threads(1):
        examiner = Examiner(spec, models, references, scenarios)
        return find_taus(spec, scenarios, components, examiner.examine, progress)


def find_taus(
    spec: RunFile, scenarios: Scenarios, components: range, examine: Examine, progress: Progress
) -> list[FoundTau]:
    """Return the largest tau of each of some components, for any `examine`: n draws -> answers and labels, each (n,).

    Required are lower bounds (95 %): of the share of draws with one label, review.purity; of the share of labelled
    draws that the classifier gets wrong, review.rho.
    """
    found = []
    for component in components:
        progress("tightening components", component, len(scenarios), "components")
        found.append(_Search(spec, examine, scenarios, component).largest_tau())
    return found


def with_taus(spec: RunFile, scenarios: Scenarios, found: Sequence[FoundTau]) -> Scenarios:
    """Return the components that have a tau, with it; the others become dropped ones."""
    dropped = [
        _dropped(scenarios, component, narrowest.reason(spec))
        for component, (tau, narrowest) in enumerate(found)
        if tau is None
    ]
    kept = np.array([number for number, (tau, _) in enumerate(found) if tau is not None], np.int64)
    taus = np.array([tau for tau, _ in found if tau is not None], np.float64)
    log.info("%d of %d components are pure and misclassified at some tau", len(kept), len(scenarios))
    return scenarios.take(kept, taus=taus, dropped=(*scenarios.dropped, *dropped))


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


FoundTau = tuple[
    float | None, _Outcome
]  # the largest that passes, if any does; what the last one tried shows


class _Search:
    """The search for the largest tau of one component. The same normal draws serve every tau."""

    def __init__(self, spec: RunFile, examine: Examine, scenarios: Scenarios, component: int) -> None:
        self.spec, self.examine, self.component = spec, examine, component
        self.scenarios = replace(scenarios, taus=np.ones(len(scenarios)))
        rng = generator(spec.seed, "tighten", component)
        self.normal: F64 = rng.standard_normal((DRAWS, scenarios.means.shape[1]))
        self.failures: I64 | None = None
        if scenarios.failures is not None:
            self.failures = failure_rows(scenarios.failures, component, DRAWS, rng, held_out=False)

    def largest_tau(self) -> FoundTau:
        """Return the largest tau that passes, if any does, and the outcome at the last one tried.

        All are tried, since the share that the classifier gets wrong may fall towards the mean.
        """
        for tau in TAUS:
            outcome = self._outcome(tau)
            if outcome.passes(self.spec):
                return tau, outcome
        return None, outcome

    def _outcome(self, tau: float) -> _Outcome:
        predicted, labels = self.examine(self._draws(tau))
        label = most_common(labels)
        labelled = labels != NONE_OF_THE_ABOVE
        pure = 0 if label is None else int((labels == label).sum())
        return _Outcome(pure, int(labelled.sum()), int((labelled & (labels != predicted)).sum()))

    def _draws(self, tau: float) -> Draws:
        scenarios, component = self.scenarios, self.component
        if self.failures is not None:
            return smoothed(scenarios, component, self.failures, tau, self.normal)
        covariance = tau * scenarios.covariances[component]
        return Draws(truncated_codes(scenarios.means[component], covariance, self.normal))


def _dropped(scenarios: Scenarios, component: int, reason: str) -> DroppedComponent:
    cells, support = scenarios.cells, scenarios.support
    none = NONE_OF_THE_ABOVE
    source, answer = (none, none) if cells is None else (int(cells[component, 0]), int(cells[component, 1]))
    images = 0 if support is None else int(support[component])
    return DroppedComponent(float(scenarios.weights[component]), source, answer, images, reason)
