"""Algorithm 2: sample images from the components, for review and for the correction of the classifier; and what the
classifier and the reference models answer on such draws.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from torch import nn

from defuse_core.artifacts import (
    F32,
    I64,
    Bool,
    Corrections,
    Gallery,
    Models,
    MoreImages,
    ReferenceSet,
    Scenarios,
    Verdicts,
)
from defuse_core.config import RunFile
from defuse_core.device import cpu_threads
from defuse_core.distill.draws import Draws, anchors_of, draw_codes, spread_draws, stacked
from defuse_core.models import Decoder, load_classifier, load_vae, predict
from defuse_core.protocols import Compute, Progress, map_in_tasks
from defuse_core.review.verdicts import majority, outcomes, tally
from defuse_core.seeds import generator
from defuse_core.training.reference_models import (
    load_reference_models,
    model_probabilities,
    unanimous_labels,
    votes_of_models,
)

log = logging.getLogger("defuse")
MORE_DRAWS = 3  # times as many further draws where correct.filter leaves too few
FEW_AGREE = 0.1  # share of draws with the scenario's label below which its label is in doubt


def sample_gallery(spec: RunFile, models: Models, scenarios: Scenarios, *, progress: Progress) -> Gallery:
    """Return R decoded images of every component, with the classifier's answers."""
    review = spec.review
    progress("drawing images to review")
    images = anchors_of(scenarios)
    with cpu_threads(1):
        draws = [
            spread_draws(
                spec, scenarios, component, review.images, generator(spec.seed, "gallery", component)
            )
            for component in range(len(scenarios))
        ]
        codes, anchors = stacked(draws, review.images, spec.vae.latent_dim)  # (S, R, Z), (S, R)
        decoder = Decoder(load_vae(spec, models.vae), images)
        flat = decoder.decode(codes, anchors)
        predicted = predict(load_classifier(spec, models.classifier, len(models.classes)), flat)
    shape = codes.shape[:2]
    return Gallery(
        flat.reshape(*shape, *flat.shape[1:]),
        codes,
        predicted.reshape(shape),
        models.classes,
        source=None if images is None or anchors is None else images.source[anchors],
        track=None if images is None or anchors is None or images.track is None else images.track[anchors],
    )


def sample_more_images(examiner: Examiner, doubtful: Bool, *, progress: Progress) -> MoreImages:
    """Return review.more_images further draws of each doubtful component, (S,), as the reference models label them.

    Their label is the majority of the models' votes, also where review.consensus is crowdlab. With vae.decode: anchored
    they are at other images than those of the gallery, as long as there are any.
    """
    spec, scenarios = examiner.spec, examiner.scenarios
    count, images = spec.review.more_images, anchors_of(scenarios)
    drawn = np.zeros(len(scenarios), np.int64)
    unit, outcome = np.full((2, len(scenarios), count), -1, np.int64)
    with cpu_threads(1):
        components = np.flatnonzero(doubtful).tolist()
        for done, component in enumerate(components):
            progress("drawing more images", done, len(components), "components")
            rng = generator(spec.seed, "gallery", component, "more")
            draws = spread_draws(spec, scenarios, component, count, rng, after=spec.review.images)
            outcome[component] = outcomes(*examiner.by_majority(draws))
            drawn[component] = count
            if images is not None and draws.anchors is not None:
                unit[component] = images.unit[draws.anchors]
    labelled, wrong = (outcome >= 0).sum(axis=1), (outcome == 1).sum(axis=1)
    return MoreImages(drawn, labelled, wrong, *(() if images is None else (unit, outcome)))


@cpu_threads(1)
def sample_corrections(spec: RunFile, scenarios: Scenarios, verdicts: Verdicts) -> Corrections:
    """Return D_f: per failure scenario, codes to tune on and others to test on, under the scenario's one label.

    Those to tune on are drawn at correct.widen times the reviewed τ. With vae.decode: anchored both are anchored at
    other images.
    """
    section, accepted, factor = spec.correct, verdicts.accepted, spec.correct.tuning_factor
    if scenarios.failures is not None:
        return _anchored_corrections(spec, scenarios, verdicts)
    count = section.tune_images + section.test_images
    codes = np.zeros((len(accepted), count, spec.vae.latent_dim), np.float32)
    for row, component in enumerate(accepted.tolist()):
        rng = generator(spec.seed, "corrections", component)
        codes[row] = draw_codes(spec, scenarios, component, count, rng).codes
    tune, test = codes[:, : section.tune_images], codes[:, section.tune_images :]
    if factor != 1:
        for row, component in enumerate(accepted.tolist()):
            rng = generator(spec.seed, "corrections", component, "wide")
            tune[row] = draw_codes(spec, scenarios, component, section.tune_images, rng, factor=factor).codes
    return Corrections(accepted, verdicts.labels[accepted], tune, test)


def _anchored_corrections(spec: RunFile, scenarios: Scenarios, verdicts: Verdicts) -> Corrections:
    section, accepted, factor = spec.correct, verdicts.accepted, spec.correct.tuning_factor
    tune, test = list[Draws](), list[Draws]()
    for component in accepted.tolist():
        rng = generator(spec.seed, "corrections", component)
        tune.append(draw_codes(spec, scenarios, component, section.tune_images, rng, factor=factor))
        test.append(draw_codes(spec, scenarios, component, section.test_images, rng, held_out=True))
    tune_codes, tune_anchor = stacked(tune, section.tune_images, spec.vae.latent_dim)
    test_codes, test_anchor = stacked(test, section.test_images, spec.vae.latent_dim)
    failures = scenarios.failures
    return Corrections(
        accepted,
        verdicts.labels[accepted],
        tune_codes,
        test_codes,
        anchors=anchors_of(scenarios),
        tune_anchor=tune_anchor,
        test_anchor=test_anchor,
        held_out=None if failures is None else failures.held_out_anchors(accepted).source,
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
        anchors=fixes.anchors.take(used),
        tune_anchor=anchor[:, : fixes.tune.shape[1]],
        test_anchor=anchor[:, fixes.tune.shape[1] :],
    )


def filter_corrections(examiner: Examiner, fixes: Corrections, compute: Compute) -> Corrections:
    """Return D_f with only those codes to tune on in which the reference models see the scenario's label.

    Where fewer than tune_images remain, MORE_DRAWS times as many are drawn, then some as wide as the reviewed ones, and
    what remains of all is repeated. A scenario whose label the reference models see in no draw keeps the last ones: its
    label is the annotators'. The codes to test on are not filtered.
    """
    filtered = map_in_tasks(compute, "correct", len(fixes.labels), _filtered, examiner, fixes)
    kept = np.array([share for _, share in filtered])
    for component, share in zip(fixes.scenario, kept, strict=True):
        if share < FEW_AGREE:
            log.warning(
                "correct: the reference models see the label of scenario %d in %.0f %% of the images to tune on; "
                "check its label, or lower correct.widen",
                component,
                100 * share,
            )
    if not filtered:
        return replace(fixes, kept=kept)
    codes, anchor = stacked([draws for draws, _ in filtered], fixes.tune.shape[1], fixes.tune.shape[2])
    return replace(fixes, tune=codes, tune_anchor=anchor, kept=kept)


def _filtered(
    examiner: Examiner, fixes: Corrections, rows: range, *, progress: Progress
) -> list[tuple[Draws, float]]:
    """Return the draws to tune on of some accepted scenarios, and the share of the first ones that is usable."""
    spec, found = examiner.spec, []
    with cpu_threads(1):
        progress("filtering images to tune on", 0, len(fixes.labels), "scenarios")
        for done, row in enumerate(rows, 1):
            component, label = int(fixes.scenario[row]), fixes.labels[row]
            draws = Draws(fixes.tune[row], None if fixes.tune_anchor is None else fixes.tune_anchor[row])
            agrees = examiner.unanimous(draws)[1] == label
            usable = draws.take(agrees)
            count = spec.correct.tune_images
            rng = generator(spec.seed, "corrections", component, "more")
            for factor, number in ((spec.correct.tuning_factor, MORE_DRAWS * count), (1.0, count)):
                if len(usable) < count:
                    more = draw_codes(spec, examiner.scenarios, component, number, rng, factor=factor)
                    usable = usable.joined(more.take(examiner.unanimous(more)[1] == label))
            repeated = usable.take(np.resize(np.arange(len(usable)), count)) if len(usable) else more
            found.append((repeated, float(agrees.mean())))
            progress("filtering images to tune on", done, len(fixes.labels), "scenarios")
    return found


@dataclass(frozen=True, eq=False)
class Examiner:
    """What the classifier and the reference models answer on draws of `scenarios`, and on other images.

    It loads the networks when it is first asked; only their weights travel between processes.
    """

    spec: RunFile
    models: Models
    references: ReferenceSet
    scenarios: Scenarios

    def unanimous(self, draws: Draws) -> tuple[I64, I64]:
        """Return what `unanimous_on` does of the images of n draws."""
        return self.unanimous_on(self._decoder.decode(draws.codes, draws.anchors))

    def unanimous_on(self, images: F32) -> tuple[I64, I64]:
        """Return for n images the classifier's answers and the labels that the reference models see, each (n,).

        A label is a class of which every reference model is sure, to identify.min_probability at least; an image
        without such a class has none. Where only their mean is sure, independent models often see another class.
        """
        predicted, probabilities = self._answers(images)
        return predicted, unanimous_labels(probabilities, self.spec.identify.min_probability)

    def by_majority(self, draws: Draws) -> tuple[I64, I64]:
        """Return for n draws the classifier's answers and the labels that a review gives them, each (n,).

        A label is the majority of the reference models' votes, as it is for the images of the gallery.
        """
        predicted, probabilities = self._answers(self._decoder.decode(draws.codes, draws.anchors))
        votes = votes_of_models(probabilities[:, None], self.spec.review.reference.min_confidence)
        return predicted, majority(tally(votes, (1, len(predicted)), len(self.models.classes)))[0]

    def _answers(self, images: F32) -> tuple[I64, F32]:
        """Return the classifier's answers, (n,), and the reference models' probabilities, (W, n, C)."""
        return predict(self._classifier, images), model_probabilities(self._reference_models, images)

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder(load_vae(self.spec, self.models.vae), anchors_of(self.scenarios))

    @cached_property
    def _classifier(self) -> nn.Module:
        return load_classifier(self.spec, self.models.classifier, len(self.models.classes))

    @cached_property
    def _reference_models(self) -> list[nn.Module]:
        section, classes = self.spec.review.reference, len(self.models.classes)
        return load_reference_models(self.spec, section, self.references, classes)

    def __getstate__(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("spec", "models", "references", "scenarios")}
