"""What judges say of a finished correction: models that took no part in making it (judges of the run file).

The paper scores a correction by the one label of each scenario. That figure rises even where the classifier only learns
to give every picture of a scenario the same answer. Here every generated image has its own label, the majority of the
judges. Controls are the baseline and *plain further training*: the same fine-tuning with λ = 0.

Axes, beside those of artifacts/__init__.py: B = 4 classifiers (before, baseline, plain, defuse),
J = 3 numbers of a share (share, low, high).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import krippendorff
import numpy as np
from torch import nn

from defuse_core.artifacts import (
    F32,
    F64,
    I64,
    NONE_OF_THE_ABOVE,
    Bool,
    Sweep,
    Votes,
)
from defuse_core.config import RunFile
from defuse_core.correct import held_out_images
from defuse_core.data import Splits, reopen_splits
from defuse_core.data.splits import random_rows
from defuse_core.device import cpu_threads
from defuse_core.distill.draws import anchors_of, stacked, wide_draws
from defuse_core.evaluation.against_plain import is_better, pairs_of, tracks_of, units_of
from defuse_core.evaluation.controls import Controls, fold_of
from defuse_core.evaluation.describe import describe_scenarios
from defuse_core.evaluation.evaluate import Findings
from defuse_core.evaluation.nearest_real import NearestReal, find_nearest_real
from defuse_core.identify import draw_noise, encode_posterior
from defuse_core.intervals import mcnemar, mean_with_bounds, share_with_bounds
from defuse_core.models import (
    decoder_at,
    decoder_of,
    load_classifier,
    load_vae,
    predict,
)
from defuse_core.progress import Progress
from defuse_core.review.verdicts import majority
from defuse_core.seeds import generator
from defuse_core.training.reference_models import (
    load_reference_models,
    mean_probabilities,
    model_probabilities,
)

CLASSIFIERS = ("before", "baseline", "plain", "defuse")
BEFORE, _, PLAIN, DEFUSE = range(len(CLASSIFIERS))
WIDER = (2.0, 4.0)  # factors on τ at which the correction is tried on draws wider than those reviewed
WIDER_IMAGES = 64  # per scenario and factor
FRESH_IMAGES = 2000  # test images that fresh noise is added to
FRESH_DRAWS = 10  # per image
AT_FAULT_PURITY = (0.5, 0.9)  # below the first the β-VAE is at fault, from the second on the classifier


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the judges find. A share is nan three times where it cannot be measured, or its classifier was not made.

    For an interval or a test, pictures that are anchored at the same image, or track, count once: they are one unit.
    Where nothing was corrected, defuse is the classifier before, as in Evaluation.
    """

    judges: F64  # (W,) test accuracy of each judge (validation where there is no test set)
    before_test: float  # the classifier's own, on the same images as the judges'
    labelled: float  # share of the held-out images on which most judges agree
    purity: F64  # (J,) share of held-out images of accepted scenarios that show its label; a tie shows none
    own_label: F64  # (B, J) accuracy on held-out images by the judges' own label of each
    one_label: F64  # (B, J) accuracy on the same images by the scenario's label (the paper's figure)
    # (3, J) before, defuse, plain: own-label accuracy on scenarios left out of the tuning (two folds); without plain in
    # runs of earlier versions
    left_out: F64
    wider: F64  # (2, 2, J) factor of τ x (before, defuse): own-label accuracy on wider draws
    real_failures: F64  # (B, J) accuracy on failing draws around test images that judges still recognise
    real_failure_images: int
    scenario_purity: F64  # (A,) share of held-out images that show the label
    scenario_own_label: F64  # (A, B) own-label accuracy
    scenario_left_out: F64  # (A,) own-label accuracy of a classifier that was not tuned on the scenario
    # (A,) whether the correction is better than plain further training, significantly, by own labels; in runs of
    # earlier versions, which have no pairs, than before
    confirmed: Bool
    names: tuple[
        str, ...
    ]  # (A,) what sets the pictures apart, such as "7 read as 2: thin, slanted to the right"
    at_fault: tuple[str, ...]  # (A,) "classifier", "β-VAE" or "unclear"
    real: NearestReal
    mcnemar: F64  # (2, 3) plain, defuse against before on the test set: gained, lost, p-value
    krippendorff: float  # α of the reviewers' answers, nominal; nan where it is undefined
    # (J,) of the real failures, the share that identify.screen keeps; nan without it and in runs of earlier versions
    screen_recall: F64 = field(default_factory=lambda: np.full(3, np.nan))
    # (A, 3) of each scenario: units, those on which defuse, and plain, is more often right; None in earlier versions
    pairs: I64 | None = None
    real_failure_pairs: I64 | None = None  # (3,) likewise, of the real failures


def gather_evidence(spec: RunFile, found: Findings, controls: Controls, *, progress: Progress) -> Evidence:
    """Return what the judges find. Raises RunMismatchError if the images changed since the run was trained."""
    splits = reopen_splits(spec.data, spec.seed, found.models.data_fingerprint)
    with cpu_threads(spec.resources.train_threads):
        return _Evidence(spec, found, controls, splits, progress).gather()


class _Evidence:
    """The models and images that all figures share, loaded once."""

    def __init__(
        self, spec: RunFile, found: Findings, controls: Controls, splits: Splits, progress: Progress
    ) -> None:
        self.spec, self.found, self.progress = spec, found, progress
        self.splits, self.classes = splits, len(found.models.classes)
        self.vae = load_vae(spec, found.models.vae)
        self.before = load_classifier(spec, found.models.classifier, self.classes)
        sweeps = (found.baseline, controls.plain, found.sweep, *controls.folds)
        self.baseline, self.plain, self.corrected, *self.folds = map(self._chosen, sweeps)
        self.defuse = self.before if self.corrected is None else self.corrected
        self.classifiers = (self.before, self.baseline, self.plain, self.defuse)
        assert found.judges is not None
        self.judges = load_reference_models(spec, spec.judges, found.judges, self.classes)
        held_out = held_out_images(self.vae, found.fixes)
        self.held_out = held_out.batch()  # (A·n, channels, H, W)
        self.own = self.labels(self.held_out)  # (A·n,)
        self.units = units_of(
            found.fixes.anchors, found.fixes.test_anchor, splits.train, len(self.own)
        )  # (A·n,)

    def _chosen(self, sweep: Sweep) -> nn.Module | None:
        """Return the classifier that a sweep chose; None where it chose none."""
        return load_classifier(self.spec, sweep.weights, self.classes) if sweep.weights else None

    def labels(self, images: F32) -> I64:
        """Return the label that most judges give each image, (n,), or NONE_OF_THE_ABOVE where they are tied."""
        if not len(images):
            return np.zeros(0, np.int64)
        answers = model_probabilities(self.judges, images).argmax(axis=2)  # (W, n)
        votes: I64 = (answers[..., None] == np.arange(self.classes)).sum(axis=0)
        return majority(votes)

    def gather(self) -> Evidence:
        """Return all figures."""
        found, fixes = self.found, self.found.fixes
        accepted = len(fixes.labels)
        per_scenario = fixes.test.shape[1]
        self.progress("asking the judges", 0, 4, "figures")
        answers = [_answers(net, self.held_out) for net in self.classifiers]
        right = np.stack([_hits(each, self.own) for each in answers])  # (B, A·n)
        scenario_labels = np.repeat(fixes.labels, per_scenario)
        one = [_hits(each, scenario_labels) for each in answers]
        # an image that judges disagree on shows no label
        shows = (self.own == scenario_labels).astype(np.float64)
        self.progress("asking the judges", 1, 4, "figures")
        fold_right = self._fold_right(per_scenario)
        left_out = np.where(np.isnan(fold_right), np.nan, [right[BEFORE], fold_right, right[PLAIN]])
        wider = self._wider()
        self.progress("asking the judges", 2, 4, "figures")
        fresh, truth, fresh_units = self._real_failures()
        fresh_right = np.stack([_hits(_answers(net, fresh), truth) for net in self.classifiers])
        self.progress("asking the judges", 3, 4, "figures")
        real_images = self.splits.validation or self.splits.test or self.splits.train
        real = find_nearest_real(self.vae, self.before, found.scenarios, fixes, real_images)
        by_scenario = right.reshape(len(CLASSIFIERS), accepted, per_scenario)
        units = self.units.reshape(accepted, per_scenario)
        rows = zip(by_scenario[DEFUSE], by_scenario[PLAIN], units, strict=True)
        pairs = np.array([pairs_of(*row) for row in rows], np.int64).reshape(-1, 3)
        has_test = self.splits.test is not None
        assert found.judges is not None
        return Evidence(
            judges=found.judges.test if has_test else found.judges.validation,
            before_test=found.models.accuracy.get("test" if has_test else "validation", float("nan")),
            labelled=float((self.own != NONE_OF_THE_ABOVE).mean()) if len(self.own) else float("nan"),
            purity=_share(shows, per_scenario, self.units),
            own_label=np.stack([_share(row, per_scenario, self.units) for row in right]),
            one_label=np.stack([_share(row, per_scenario, self.units) for row in one]),
            left_out=np.stack([_share(row, per_scenario, self.units) for row in left_out]),
            wider=wider,
            real_failures=np.stack([_known_share(row, fresh_units) for row in fresh_right]),
            real_failure_images=len(truth),
            scenario_purity=_nanmean(shows.reshape(accepted, per_scenario)),
            scenario_own_label=_nanmean(by_scenario).T,
            scenario_left_out=_nanmean(fold_right.reshape(accepted, per_scenario)),
            confirmed=is_better(pairs),
            names=describe_scenarios(self.spec, found, self.held_out, self.splits),
            at_fault=tuple(map(_at_fault, _nanmean(shows.reshape(accepted, per_scenario)))),
            real=real,
            mcnemar=np.stack([self._mcnemar(self.plain), self._mcnemar(self.corrected)]),
            krippendorff=krippendorff_alpha(found.votes, found.gallery.predicted.shape[1]),
            screen_recall=self._screen_recall(fresh, truth, fresh_units),
            pairs=pairs,
            real_failure_pairs=pairs_of(fresh_right[DEFUSE], fresh_right[PLAIN], fresh_units),
        )

    def _fold_right(self, per_scenario: int) -> F64:
        """Return whether each held-out image is right after a correction without its scenario's fold, (A·n,)."""
        fold = np.repeat(fold_of(self.found.fixes), per_scenario)
        right: F64 = np.full(len(self.own), np.nan)
        for number, classifier in enumerate(self.folds):
            rows = np.flatnonzero(fold == number)
            right[rows] = _hits(_answers(classifier, self.held_out[rows]), self.own[rows])
        return right

    def _wider(self) -> F64:
        """Return own-label accuracy before and after on draws at WIDER times τ, (2, 2, J)."""
        scenarios, fixes = self.found.scenarios, self.found.fixes
        table = np.full((len(WIDER), 2, 3), np.nan)
        decoder = decoder_of(self.vae, anchors_of(scenarios))
        for row, factor in enumerate(WIDER):
            draws = []
            for number in fixes.scenario.tolist():
                rng = generator(self.spec.seed, "evidence", "wider", number)
                draws.append(
                    wide_draws(self.spec, scenarios, number, WIDER_IMAGES, factor, rng, held_out=True)
                )
            if not draws:
                continue
            codes, anchors = stacked(draws, WIDER_IMAGES, scenarios.means.shape[1])
            images = decoder.decode(codes, anchors)
            labels = self.labels(images)
            units = units_of(anchors_of(scenarios), anchors, self.splits.train, len(images))
            for column, classifier in enumerate((self.before, self.defuse)):
                hits = _hits(_answers(classifier, images), labels)
                table[row, column] = _share(hits, WIDER_IMAGES, units)
        return table

    def _real_failures(self) -> tuple[F32, I64, I64]:
        """Return failing draws around test images in which the judges still see the image's class, classes and tracks.

        At most one draw an image, the first, so that they are independent. No step has seen these images or draws.
        """
        none = np.zeros(0, np.int64)
        if self.splits.test is None:
            return np.zeros((0, *self.found.gallery.images.shape[2:]), np.float32), none, none
        rng = generator(self.spec.seed, "evidence", "fresh")
        images = self.splits.test.take(random_rows(len(self.splits.test), FRESH_IMAGES, rng))
        tracks, units = tracks_of(images), []
        section = self.spec.identify.model_copy(update={"draws": min(FRESH_DRAWS, self.spec.identify.draws)})
        mu, sigma = encode_posterior(self.vae, images, section.batch_size)
        codes = mu[:, None, :] + draw_noise(section, sigma, rng)  # (n, Q, Z)
        decoder = decoder_at(self.spec, self.vae, images)
        waiting, found, truth = np.arange(len(images)), [], []
        for draw in range(codes.shape[1]):
            labels = images.labels[waiting]
            decoded = decoder.decode(np.ascontiguousarray(codes[waiting, draw]), waiting)
            failing = np.flatnonzero(predict(self.before, decoded) != labels)
            real = failing[self.labels(decoded[failing]) == labels[failing]]
            found.append(decoded[real])
            truth.append(labels[real])
            units.append(tracks[waiting[real]])
            waiting = np.delete(waiting, real)
        return np.concatenate(found), np.concatenate(truth), np.concatenate(units)

    def _screen_recall(self, images: F32, truth: I64, units: I64) -> F64:
        """Return the share of real failures (n, channels, H, W) in which the screen sees their classes, (J,)."""
        spec, references = self.spec, self.found.references
        if spec.identify.screen == "none" or references is None or not len(images):
            return np.full(3, np.nan)
        models = load_reference_models(spec, spec.review.reference, references, self.classes)
        seen = mean_probabilities(models, images)[np.arange(len(truth)), truth]
        return _known_share((seen >= spec.identify.min_probability).astype(np.float64), units)

    def _mcnemar(self, classifier: nn.Module | None) -> F64:
        """Return images that became right, that became wrong, and McNemar's exact p-value, on the test set, (3,).

        nan without a classifier or test images.
        """
        test = self.splits.test
        if classifier is None or test is None:
            return np.full(3, np.nan)
        before, after = (predict(net, test) == test.labels for net in (self.before, classifier))
        gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
        return np.array([gained, lost, mcnemar(gained, lost)])


def _answers(classifier: nn.Module | None, images: F32) -> F64:
    """Return the classifier's answer for each image, (n,); nan without a classifier."""
    if classifier is None or not len(images):
        return np.full(len(images), np.nan)
    return predict(classifier, images).astype(np.float64)


def _hits(answers: F64, labels: I64) -> F64:
    """Return 1 where the answer is the label, 0 where not, nan where either is missing, (n,)."""
    missing = np.isnan(answers) | (labels == NONE_OF_THE_ABOVE)
    return np.where(missing, np.nan, answers == labels)


def _share(hits: F64, per_scenario: int, units: I64) -> F64:
    """Return the mean over scenarios of (A·n,) hits, nan left out, and its 95 % interval, (J,)."""
    means = _nanmean(hits.reshape(-1, max(1, per_scenario)))
    return mean_with_bounds(means[np.isfinite(means)], _known_share(hits, units))


def _known_share(hits: F64, units: I64) -> F64:
    """Return the share of hits, nan left out, with Wilson's interval of as many draws as they have units, (J,)."""
    known = np.isfinite(hits)
    draws = len(np.unique(units[known]))
    return share_with_bounds(hits[known].sum() * draws / max(1, known.sum()), draws)


def _nanmean(table: F64) -> F64:
    """Return the mean along the last axis, nan left out; nan where nothing is left."""
    known = np.isfinite(table)
    with np.errstate(invalid="ignore"):
        means: F64 = np.where(known, table, 0.0).sum(axis=-1) / known.sum(axis=-1)
    return means


def _at_fault(purity: float) -> str:
    """Return whose fault a scenario is: the β-VAE's where most of its pictures do not show the label."""
    low, high = AT_FAULT_PURITY
    if purity >= high:
        return "classifier"
    return "β-VAE" if purity < low else "unclear"


def krippendorff_alpha(votes: Votes, images: int) -> float:
    """Return Krippendorff's α of the reviewers' answers (nominal); nan where fewer than two answered any image."""
    units, people = votes.scenario * images + votes.image, len(votes.annotators)
    if not len(units) or people < 2:
        return float("nan")
    table: F64 = np.full((people, int(units.max()) + 1), np.nan)
    table[votes.annotator, units] = votes.answer
    if len(np.unique(votes.answer)) < 2 or not (np.isfinite(table).sum(axis=0) > 1).any():
        return float("nan")
    return float(krippendorff.alpha(table, level_of_measurement="nominal"))
