"""What judges say of a finished correction: models that took no part in making it (judges of the run file).

The paper scores a correction by the one label of each scenario. That figure rises even where the classifier only learns
to give every picture of a scenario the same answer. Here each image measured has its own label, the majority of the
judges. Controls are the baseline and *plain further training*: the same fine-tuning with λ = 0, several times with
other random numbers. Its figures are the means over these trainings.

Axes, beside those of artifacts/__init__.py: B = 4 classifiers (before, baseline, plain, defuse), P plain trainings,
J = 3 numbers of a share (share, low, high).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from torch import nn

from defuse_core.artifacts import F32, F64, I64, NONE_OF_THE_ABOVE, Bool, Sweep
from defuse_core.config import RunFile
from defuse_core.data import Images, Splits, reopen_splits
from defuse_core.data.splits import random_rows
from defuse_core.device import cpu_threads
from defuse_core.distill.draws import anchors_of, draw_codes, stacked, units_of
from defuse_core.evaluation import Findings
from defuse_core.evaluation.controls import Controls, fold_of
from defuse_core.evaluation.describe import NearestReal, describe_scenarios, find_nearest_real
from defuse_core.evaluation.undecided import compared_part
from defuse_core.identify import draw_noise, encode_posterior
from defuse_core.intervals import (
    is_better,
    is_confirmed,
    is_worse,
    mean_with_bounds,
    pairs_by_scenario,
    pairs_of,
    share_of_units,
    swapped,
)
from defuse_core.models import Decodings, StoredVae, decoder_at, images_of, load_classifier, predict
from defuse_core.protocols import Progress
from defuse_core.review.verdicts import krippendorff_alpha, majority
from defuse_core.seeds import generator
from defuse_core.training.reference_models import (
    answers_of_models,
    load_reference_models,
    mean_probabilities,
    model_probabilities,
    sees_class,
)
from defuse_core.tuning_data import held_out_images

CLASSIFIERS = ("before", "baseline", "plain", "defuse")
BEFORE, BASELINE, PLAIN, DEFUSE = range(len(CLASSIFIERS))
COMPARED = (BEFORE, DEFUSE, PLAIN)  # the order of Evidence.left_out and of each row of Evidence.wider
CLEAN = ("validation", "test")
IN_EACH = ("own_label", "one_label", "left_out", "real_failures")  # figures of each plain training
WIDER = (2.0, 4.0)  # factors on τ at which the correction is tried on draws wider than those reviewed
WIDER_IMAGES = 64  # per scenario and factor
FRESH_IMAGES = 2000  # test images that fresh noise is added to
FRESH_DRAWS = 10  # per image
# below the first the β-VAE is at fault, from the second on the classifier, where it fails on over review.rho
AT_FAULT_PURITY = (0.5, 0.9)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the judges find. A share is (nan, nan, nan) where it cannot be measured, or its classifier was not made.

    For an interval or a test, pictures that are anchored at the same image, or track, count once: they are one unit.
    Where nothing was corrected, defuse is the classifier before, as in Evaluation.
    """

    judges: F64  # (W,) test accuracy of each judge (validation where there is no test set)
    before_test: float  # the classifier's own, on the same images; nan where it may have been trained on them
    labelled: float  # share of the held-out images on which most judges agree
    purity: F64  # (J,) share of held-out images of accepted scenarios that show its label; a tie shows none
    own_label: F64  # (B, J) accuracy on held-out images by the judges' labels
    one_label: F64  # (B, J) accuracy on the same images by the scenario's label (the paper's figure)
    left_out: F64  # (3, J) of COMPARED: own-label accuracy on scenarios left out of the tuning (two folds)
    wider: F64  # (2, 3, J) factor of τ x COMPARED: own-label accuracy on wider draws
    real_failures: F64  # (B, J) accuracy on failing draws around test images that judges still recognise
    real_failure_images: int
    scenario_purity: F64  # (A,) share of held-out images that show the label
    scenario_own_label: F64  # (A, B) own-label accuracy
    scenario_left_out: F64  # (A,) own-label accuracy of a classifier that was not tuned on the scenario
    confirmed: Bool  # (A,) by the judges: mostly right, and more than plain trainings reach (is_confirmed)
    # (A,) what sets the pictures apart, such as "7 read as 2: thin, slanted to the right"
    names: tuple[str, ...]
    at_fault: tuple[str, ...]  # (A,) "classifier", "β-VAE" or "unclear"
    real: NearestReal
    krippendorff: float  # α of the reviewers' answers, nominal; nan where it is undefined
    screen_recall: F64  # (J,) of the failing test draws, the share that identify.screen keeps; nan without it
    pairs: I64  # (P, A, 3) of each scenario: units, those on which defuse, and the plain training, is more often right
    real_failure_pairs: I64  # (P, 3) likewise, of the failing draws from test images
    worse: Bool  # (A,) by the judges: right on less than plain trainings reach (is_worse)
    plain_each: F64  # (4, P) IN_EACH x share after each plain training
    scenario_plain: F64  # (P, A) own-label accuracy after each plain training
    # (A, 3) as in `pairs`, with the classifier before in the place of a plain training
    pairs_with_before: I64
    plain_clean: F64  # (2, P) validation and test accuracy after each plain training
    test_pairs: I64  # (P, 3) as in `pairs`, of test images
    test_pairs_with_before: I64  # (2, 3) likewise, of the first plain training, and of defuse, with before
    # (3,) as in `pairs`, of the failing draws from test images, with the baseline in the place of a plain training
    real_failure_pairs_with_baseline: I64
    judges_by_class: F64 | None = None  # (W, C) `judges` within each class

    @property
    def units(self) -> I64:
        """Photographs or tracks that the judged held-out images of each scenario show, (A,)."""
        units: I64 = self.pairs[0, :, 0]
        return units

    @property
    def worse_than_before(self) -> Bool:
        """On which scenarios the classifier before is right significantly more often than the correction, (A,)."""
        return is_better(swapped(self.pairs_with_before[None]))


def gather_evidence(spec: RunFile, found: Findings, controls: Controls, *, progress: Progress) -> Evidence:
    """Return what the judges find. Raises RunMismatchError if the images changed since the run was trained."""
    splits = reopen_splits(spec, found.models.data_fingerprint)
    with cpu_threads(spec.resources.train_threads):
        return _Judging(spec, found, controls, splits, progress).gather()


class _Judging:
    """The models and images that all figures share, loaded once."""

    def __init__(
        self, spec: RunFile, found: Findings, controls: Controls, splits: Splits, progress: Progress
    ) -> None:
        self.spec, self.found, self.progress = spec, found, progress
        self.splits, self.classes, self.readers = splits, len(found.models.classes), spec.resources.readers
        self.vae = StoredVae(spec, found.models.vae)
        self.before = load_classifier(spec, found.models.classifier, self.classes)
        self.baseline, self.corrected = self._chosen(found.baseline), self._chosen(found.sweep)
        self.plain = [self._chosen(sweep) for sweep in controls.finished_plain]
        self.folds = [self._chosen(sweep) for sweep in controls.folds]
        self.defuse = self.before if self.corrected is None else self.corrected
        self.plain_rows = [sweep.chosen for sweep in controls.finished_plain]
        assert found.judges is not None
        self.judges = load_reference_models(spec, spec.judges, found.judges, self.classes)
        self.held_out = held_out_images(self.vae, found.fixes)  # (A·n,)
        self.own = self.labels(self.held_out)  # (A·n,)
        self.units = units_of(found.fixes.anchors, found.fixes.test_anchor, len(self.own))  # (A·n,)
        self.shape = found.fixes.test.shape[:2]  # (A, n)

    def _chosen(self, sweep: Sweep) -> nn.Module | None:
        """Return the classifier that a sweep chose; None where it chose none."""
        return load_classifier(self.spec, sweep.weights, self.classes) if sweep.has_correction else None

    def labels(self, images: F32 | Images) -> I64:
        """Return the label that most judges give each image, (n,), or NONE_OF_THE_ABOVE where they are tied."""
        answers = answers_of_models(model_probabilities(self.judges, images))  # (W, n)
        votes: I64 = (answers[..., None] == np.arange(self.classes)).sum(axis=0)
        return majority(votes)

    def gather(self) -> Evidence:
        """Return all figures."""
        found, fixes = self.found, self.found.fixes
        self.progress("asking the judges", 0, 4, "figures")
        answers = self._all_answers(self.held_out)
        right, plain = _right(answers, self.own)  # (B, A·n), (P, A·n)
        scenario_labels = np.repeat(fixes.labels, self.shape[1])
        one, plain_one = _right(answers, scenario_labels)
        # an image that judges disagree on shows no label
        shows = (self.own == scenario_labels).astype(np.float64)
        scenario_purity = self._of_each(shows)
        self.progress("asking the judges", 1, 4, "figures")
        fold_right = self._fold_right()
        left_out = np.where(np.isnan(fold_right), np.nan, [right[BEFORE], fold_right, right[PLAIN], *plain])
        wider = self._wider()
        self.progress("asking the judges", 2, 4, "figures")
        fresh, truth, fresh_units = self._failing_draws()
        fresh_right, fresh_plain = _right(self._all_answers(fresh), truth)
        fresh_defuse = fresh_right[DEFUSE]
        self.progress("asking the judges", 3, 4, "figures")
        scenarios, near = found.scenarios, self._real_images()
        real = find_nearest_real(self.vae.loaded, self.before, scenarios, fixes, near, self.readers)
        has_test, rho = self.splits.test is not None, self.spec.review.rho
        compared = compared_part(found.models)
        if compared is None:  # no error on images that the classifier was trained on shows nothing
            real = replace(real, testable=real.testable & real.seen)
        pairs, pairs_with_before = self._pairs(right, plain)
        tested, tested_plain, test_units = self._on_test_images()
        corrected = tested[DEFUSE] if self.corrected is not None else np.full_like(tested[DEFUSE], np.nan)
        defuse, scenario_plain = self._of_each(right[DEFUSE]), self._of_each(plain)
        assert found.judges is not None
        return Evidence(
            judges=found.judges.test if has_test else found.judges.validation,
            before_test=float("nan") if compared is None else found.models.accuracy[compared],
            labelled=float((self.own != NONE_OF_THE_ABOVE).mean()) if len(self.own) else float("nan"),
            purity=self._held_out_share(shows),
            own_label=np.stack([self._held_out_share(row) for row in right]),
            one_label=np.stack([self._held_out_share(row) for row in one]),
            left_out=np.stack([self._held_out_share(row) for row in left_out[:3]]),
            wider=wider,
            real_failures=np.stack([_known_share(row, fresh_units) for row in fresh_right]),
            real_failure_images=len(truth),
            scenario_purity=scenario_purity,
            scenario_own_label=self._of_each(right).T,
            scenario_left_out=self._of_each(fold_right),
            confirmed=is_confirmed(pairs, defuse, scenario_plain),
            names=describe_scenarios(self.spec, found, self.held_out, self.splits),
            at_fault=tuple(map(partial(_at_fault, rho), scenario_purity, self._of_each(right[BEFORE]))),
            real=real,
            krippendorff=krippendorff_alpha(found.votes, found.gallery.predicted.shape[1]),
            screen_recall=self._screen_recall(fresh, truth, fresh_units),
            pairs=pairs,
            real_failure_pairs=np.stack([pairs_of(fresh_defuse, row, fresh_units) for row in fresh_plain]),
            worse=is_worse(pairs, defuse, scenario_plain),
            plain_each=np.array(
                [
                    *(
                        [self._held_out_share(row)[0] for row in rows]
                        for rows in (plain, plain_one, left_out[3:])
                    ),
                    [_known_share(row, fresh_units)[0] for row in fresh_plain],
                ]
            ),
            scenario_plain=scenario_plain,
            pairs_with_before=pairs_with_before,
            plain_clean=np.array(
                [[getattr(row, part, None) for row in self.plain_rows] for part in CLEAN], float
            ),
            test_pairs=np.stack([pairs_of(corrected, row, test_units) for row in tested_plain]),
            test_pairs_with_before=np.stack(
                [pairs_of(row, tested[BEFORE], test_units) for row in (tested_plain[0], corrected)]
            ),
            real_failure_pairs_with_baseline=pairs_of(fresh_defuse, fresh_right[BASELINE], fresh_units),
            judges_by_class=found.judges.class_accuracy.get("test" if has_test else "validation"),
        )

    def _real_images(self) -> Images:
        """Return images that the classifier has not seen where there are any: validation if it is none of its training,
        test, or else what there is."""
        validation, test, train = self.splits.validation, self.splits.test, self.splits.train
        known = self.found.models.validation_from_training
        first, second = (test, validation) if known else (validation, test)
        return first or second or train

    def _held_out_share(self, hits: F64) -> F64:
        """Return the `_share` of hits on held-out images, (A·n,)."""
        return _share(hits, self.shape[1], self.units)

    def _of_each(self, hits: F64) -> F64:
        """Return the mean over the held-out images of each scenario, nan left out: (..., A·n) -> (..., A)."""
        return _nanmean(hits.reshape(*hits.shape[:-1], *self.shape))

    def _pairs(self, right: F64, plain: F64) -> tuple[I64, I64]:
        """Return Evidence.pairs, (P, A, 3), and pairs_with_before, (A, 3), of (B, A·n) and (P, A·n) hits."""
        others = np.concatenate([right[[BEFORE]], plain]).reshape(1 + len(plain), *self.shape)
        defuse, units = right[DEFUSE].reshape(self.shape), self.units.reshape(self.shape)
        with_before, *pairs = [pairs_by_scenario(defuse, other, units) for other in others]
        return np.stack(pairs), with_before

    def _all_answers(self, images: F32 | Images) -> _AllAnswers:
        """Return the answers of all classifiers to n images; nan without one."""
        before, baseline, defuse, *plain = (
            _answers(classifier, images, self.readers)
            for classifier in (self.before, self.baseline, self.defuse, *self.plain)
        )
        return _AllAnswers(before, baseline, np.stack(plain), defuse)

    def _fold_right(self) -> F64:
        """Return whether each held-out image is right after a correction without its scenario's fold, (A·n,)."""
        fold = np.repeat(fold_of(self.found.fixes), self.shape[1])
        right: F64 = np.full(len(self.own), np.nan)
        for number, classifier in enumerate(self.folds):
            rows = np.flatnonzero(fold == number)
            right[rows] = _hits(_answers(classifier, self.held_out.take(rows)), self.own[rows])
        return right

    def _wider(self) -> F64:
        """Return own-label accuracy of COMPARED on draws at WIDER times τ, (2, 3, J)."""
        scenarios, fixes = self.found.scenarios, self.found.fixes
        table = np.full((len(WIDER), len(COMPARED), 3), np.nan)
        for row, factor in enumerate(WIDER):
            draws = []
            for number in fixes.scenario.tolist():
                rng = generator(self.spec.seed, "evidence", "wider", number)
                draws.append(
                    draw_codes(self.spec, scenarios, number, WIDER_IMAGES, rng, held_out=True, factor=factor)
                )
            if not draws:
                continue
            codes, anchors = stacked(draws, WIDER_IMAGES, scenarios.means.shape[1])
            decodings = Decodings(self.vae, codes, images_of(anchors_of(scenarios)), anchors)
            images = Images(decodings.loaded(), np.zeros(len(decodings), np.int64))
            labels = self.labels(images)
            units = units_of(anchors_of(scenarios), anchors, len(images))
            right, _ = _right(self._all_answers(images), labels)
            table[row] = [_share(right[place], WIDER_IMAGES, units) for place in COMPARED]
        return table

    def _failing_draws(self) -> tuple[F32, I64, I64]:
        """Return failing draws around test images in which the judges still see the image's class, classes and tracks.

        At most one draw an image, the first, so that they are independent. No step has seen these images or draws.
        """
        none = np.zeros(0, np.int64)
        if self.splits.test is None:
            return np.zeros((0, *self.found.gallery.images.shape[2:]), np.float32), none, none
        rng = generator(self.spec.seed, "evidence", "fresh")
        images = self.splits.test.take(random_rows(len(self.splits.test), FRESH_IMAGES, rng))
        section = self.spec.identify.model_copy(update={"draws": min(FRESH_DRAWS, self.spec.identify.draws)})
        mu, sigma = encode_posterior(self.vae.loaded, images, section.batch_size)
        codes = mu[:, None, :] + draw_noise(section, sigma, rng)  # (n, Q, Z)
        decoder = decoder_at(self.spec, self.vae.loaded, images)
        waiting, found, truth, units = np.arange(len(images)), [], [], []
        for draw in range(codes.shape[1]):
            labels = images.labels[waiting]
            decoded = decoder.decode(np.ascontiguousarray(codes[waiting, draw]), waiting)
            failing = np.flatnonzero(predict(self.before, decoded) != labels)
            real = failing[self.labels(decoded[failing]) == labels[failing]]
            found.append(decoded[real])
            truth.append(labels[real])
            units.append(images.unit[waiting[real]])
            waiting = np.delete(waiting, real)
        return np.concatenate(found), np.concatenate(truth), np.concatenate(units)

    def _screen_recall(self, images: F32, truth: I64, units: I64) -> F64:
        """Return the share of failing draws (n, channels, H, W) in which the screen sees their classes, (J,)."""
        spec, references = self.spec, self.found.references
        if spec.identify.screen == "none" or references is None or not len(images):
            return np.full(3, np.nan)
        models = load_reference_models(spec, spec.review.reference, references, self.classes)
        seen = sees_class(mean_probabilities(models, images), truth, spec.identify.min_probability)
        return _known_share(seen.astype(np.float64), units)

    def _on_test_images(self) -> tuple[F64, F64, I64]:
        """Return the `_right` of all test images, (B, N) and (P, N), and their units; of none where there are none."""
        test = self.splits.test
        if test is None:
            return *_right(self._all_answers(self.held_out.take(slice(0))), self.own[:0]), self.units[:0]
        return *_right(self._all_answers(test.loaded()), test.labels), test.unit


def _answers(classifier: nn.Module | None, images: F32 | Images, readers: int = 0) -> F64:
    """Return the classifier's answer for each image, (n,); nan without a classifier."""
    if classifier is None or not len(images):
        return np.full(len(images), np.nan)
    return predict(classifier, images, readers=readers).astype(np.float64)


class _AllAnswers(NamedTuple):
    """The answers to n images; nan without a classifier."""

    before: F64  # (n,)
    baseline: F64  # (n,)
    plain: F64  # (P, n) of each training
    defuse: F64  # (n,)


def _right(answers: _AllAnswers, labels: I64) -> tuple[F64, F64]:
    """Return `_hits` of each classifier, (B, n), of plain the mean over its trainings, and of each of these, (P, n)."""
    before, baseline, plain, defuse = (_hits(each, labels) for each in answers)
    return np.stack([before, baseline, plain.mean(axis=0), defuse]), plain


def _hits(answers: F64, labels: I64) -> F64:
    """Return 1 where the answer is the label, 0 where not, nan where either is missing, (..., n)."""
    missing = np.isnan(answers) | (labels == NONE_OF_THE_ABOVE)
    return np.where(missing, np.nan, answers == labels)


def _share(hits: F64, per_scenario: int, units: I64) -> F64:
    """Return the mean over scenarios of (A·n,) hits, nan left out, and its 95 % interval, (J,)."""
    means = _nanmean(hits.reshape(-1, max(1, per_scenario)))
    return mean_with_bounds(means[np.isfinite(means)], _known_share(hits, units))


def _known_share(hits: F64, units: I64) -> F64:
    """Return the share of hits, nan left out, with Wilson's interval of the draws that their units are worth, (J,)."""
    known = np.isfinite(hits)
    return share_of_units(hits[known].sum(), known, units)


def _nanmean(table: F64) -> F64:
    """Return the mean along the last axis, nan left out; nan where nothing is left."""
    known = np.isfinite(table)
    with np.errstate(invalid="ignore"):
        means: F64 = np.where(known, table, 0.0).sum(axis=-1) / known.sum(axis=-1)
    return means


def _at_fault(rho: float, purity: float, before: float) -> str:
    """Return whose fault a scenario is: the β-VAE's where most of its pictures do not show the label.

    The classifier's only where it fails: where it is wrong on over `rho` of the pictures, by the judges' labels.
    """
    low, high = AT_FAULT_PURITY
    if purity < low and not np.isnan(before):  # nan where the judges label no picture
        return "β-VAE"
    return "classifier" if purity >= high and 1 - before > rho else "unclear"
