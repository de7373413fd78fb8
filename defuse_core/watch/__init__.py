"""The watch's alarm: a calibrated probability that an answer of the classifier is wrong.

Three methods compete. Each turns one or two scores of an answer into a probability by logistic regression:

    max-softmax             log-odds of the other classes, after temperature scaling (Guo et al., 2017)
    energy                  negative logsumexp of the logits (Liu et al., 2020)
    softmax-and-distance    the first, and the log distance of mu(x) from the codes of the predicted class (after Lee
                            et al., 2018)

They are fitted on validation images, and chosen there by cross-validated log loss; test images only measure them. The
distance from failure scenarios explains an alarm and raises none: as a detector of wrong answers it is at chance.

Axes, beside those of artifacts/__init__.py: X scores of a method, U validation images, T test images.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import expit, log_softmax
from threadpoolctl import threadpool_limits
from torch import nn

from defuse_core.artifacts import F32, F64, I64, Bool, Models, Weights, rows_of
from defuse_core.config import RunFile, ServeSection
from defuse_core.data import Images, Splits, reopen_splits
from defuse_core.data.read_ahead import batches_of
from defuse_core.data.splits import random_rows
from defuse_core.device import cpu_threads
from defuse_core.formatting import first_few, with_bounds
from defuse_core.intervals import ROUNDING, auroc
from defuse_core.models import Vae, encode_images, load_classifier, load_vae, predict_logits
from defuse_core.models.inference import BATCH
from defuse_core.protocols import Progress
from defuse_core.seeds import generator, torch_seed
from defuse_core.watch.scenario_regions import class_gaussians, own_distances, training_codes

log = logging.getLogger("defuse")
LOGITS_ONLY = ("max-softmax", "energy")
METHODS = (*LOGITS_ONLY, "softmax-and-distance")  # the simplest first
FOLDS = 5
MIN_ANSWERS = 10  # wrong ones, and right ones, that a detector can be fitted on
CHANCE = 0.6  # lower bound of the AUROC that a detector must exceed
# of the validation images and of the test images that a detector is fitted or measured on
MOST_IMAGES = 50_000
# answers whose scores are computed at once, and that a temperature is fitted on: each needs some copies of the logits
MOST_AT_ONCE = 10_000
# share of the classes with training images from which on so many without a validation image leave too much unknown
MOST_MISSING = 0.05
MOST_CERTAIN = -50.0  # log-odds of an error below which differences are rounding
SEEN = (  # Models.validation_from_training: errors are rarer on such images, and easier to find
    "Failing inputs cannot be found: the validation images are a share of the training images, which the classifier "
    "has probably seen, so nothing can be calibrated on them; give validation images that it was not trained on (such "
    "as a folder named validation)."
)


@dataclass(frozen=True, eq=False)
class FailureDetector:
    """One fitted method: a logistic regression on standardised scores."""

    method: str  # one of METHODS
    temperature: float
    center: F64  # (X,)
    scale: F64  # (X,)
    weights: F64  # (X,)
    bias: float

    @property
    def uses_codes(self) -> bool:
        """Whether it needs the encoder beside the classifier."""
        return self.method not in LOGITS_ONLY

    def probability(self, logits: F32 | F64, distance: F32 | F64 | None = None) -> F64:
        """Return the probability that each answer is wrong, (n,).

        `logits` are (n, C); `distance` (n,) is the Mahalanobis distance of the codes from the predicted class.
        """
        return self.probability_of(answer_scores(self.method, self.temperature, logits, distance))

    def probability_of(self, scores: F64) -> F64:
        """Return the probability that each answer with these `answer_scores` (n, X) is wrong, (n,)."""
        probability: F64 = expit(((scores - self.center) / self.scale) @ self.weights + self.bias)
        return probability


@dataclass(frozen=True, eq=False)
class MeasuredDetector:
    """A detector and what it gives the validation and test images."""

    detector: FailureDetector
    validation: F64  # (U,) by detectors of FOLDS folds, each for the images that it was not fitted on
    test: F64  # (T,) by `detector`

    def losses(self, wrong: Bool) -> F64:
        """Return the log loss of each validation image, (U,), nats."""
        given = np.clip(np.where(wrong, self.validation, 1 - self.validation), 1e-12, 1)
        losses: F64 = -np.log(given)
        return losses


@dataclass(frozen=True, eq=False)
class FailureWatch:
    """All methods, measured on one classifier, with what the best of them needs to run."""

    methods: tuple[MeasuredDetector, ...]  # in the order of METHODS; empty where none can be fitted
    problem: str  # why none can be fitted; empty where they are
    means: F64  # (C, Z) of the codes of each class
    covariances: F64  # (C, Z, Z)
    validation_wrong: Bool  # (U,) whether the answer is wrong
    test_wrong: Bool  # (T,)
    # (U,) of validation images of one track, which are no independent evidence; None where images have no tracks
    validation_tracks: I64 | None = None
    test_tracks: I64 | None = None  # (T,) likewise

    def best(self, codes: bool = True) -> MeasuredDetector | None:
        """Return the method of least log loss; a more complex one only where it is better by a standard error.

        Without `codes`, only methods that need no encoder. None where nothing was fitted.
        """
        allowed = [one for one in self.methods if codes or not one.detector.uses_codes]
        if not allowed:
            return None
        found = allowed[0]
        for other in allowed[1:]:
            gain = found.losses(self.validation_wrong) - other.losses(self.validation_wrong)
            if gain.mean() > _standard_error(gain, self.validation_tracks):
                found = other
        return found

    def threshold(self, chosen: MeasuredDetector, section: ServeSection) -> float:
        """Return `serve.failure_threshold`, or the largest that flags `serve.failure_recall` of the errors."""
        if section.failure_threshold is not None:
            return section.failure_threshold
        errors = np.sort(chosen.validation[self.validation_wrong])[::-1]
        return float(errors[max(1, math.ceil(section.failure_recall * len(errors) - ROUNDING)) - 1])

    def objection(self, chosen: MeasuredDetector | None) -> str:
        """Return why `chosen` gives no failure probability, as a sentence; empty where it does."""
        if chosen is None:
            return self.problem or "No method was fitted."
        area, low, high = auroc(chosen.validation, self.validation_wrong, self.validation_tracks)
        if low >= CHANCE:
            return ""
        return (
            f"No method finds failing inputs: the AUROC of the best, {chosen.detector.method}, is "
            f"{with_bounds(area, low, high, 2)} on validation images, and 0.5 is chance."
        )


def _standard_error(values: F64, tracks: I64 | None) -> float:
    """Return the standard error of the mean of (n,) values; those of one track are not independent."""
    deviation = values - values.mean()
    if tracks is not None:
        deviation = np.bincount(np.unique(tracks, return_inverse=True)[1], deviation)
    units = len(deviation)
    return float(np.sqrt(units / (units - 1) * (deviation**2).sum()) / len(values))


def answer_scores(
    method: str, temperature: float, logits: F32 | F64, distance: F32 | F64 | None = None
) -> F64:
    """Return the scores of a method, (n, X); each grows with the doubt in the answer."""
    if len(logits) > MOST_AT_ONCE:
        parts = [slice(start, start + MOST_AT_ONCE) for start in range(0, len(logits), MOST_AT_ONCE)]
        distances = [None if distance is None else distance[part] for part in parts]
        pairs = zip(parts, distances, strict=True)
        return np.concatenate([answer_scores(method, temperature, logits[part], far) for part, far in pairs])
    raw = np.asarray(logits, np.float64)
    best = raw.max(axis=1, keepdims=True)
    if method == "energy":  # not scipy's logsumexp, which takes longer than the rest of an answer
        energy: F64 = -(best + np.log(np.exp(raw - best).sum(axis=1, keepdims=True)))
        return energy
    shifted = (raw - best) / temperature
    others = np.exp(shifted)
    others[np.arange(len(raw)), raw.argmax(axis=1)] = 0  # not 1 minus the best: that cancels
    doubt = np.log(np.maximum(others.sum(axis=1), np.exp(MOST_CERTAIN)))
    columns = [doubt]
    if method not in LOGITS_ONLY:
        assert distance is not None
        columns.append(np.log(np.maximum(distance, 1e-12)))
    return np.stack(columns, axis=1)


def fit_temperature(logits: F64, labels: I64) -> float:
    """Return the temperature of least cross-entropy on n logits (n, C), within e^-10 and e^10.

    Cosines need a low one, and logits in the hundreds a high one, both outside the bounds of the first search.
    """
    from scipy.optimize import minimize_scalar  # takes a quarter of a second to import, in every replica

    rows = np.arange(len(labels))

    def loss(exponent: float) -> float:
        logs = log_softmax(logits / np.exp(exponent), axis=1)
        return -float(logs[rows, labels].mean())

    exponent = minimize_scalar(loss, bounds=(-3, 3), method="bounded").x
    if abs(exponent) > 3 - 1e-4:  # the search only approaches a bound
        exponent = minimize_scalar(loss, bounds=(-10, 10), method="bounded").x
    return float(np.exp(exponent))


@dataclass(frozen=True, eq=False)
class Answers:
    """A classifier's answers on n images of one part of the data."""

    logits: F64  # (n, C)
    labels: I64  # (n,)
    distance: F64  # (n,) of the codes from those of the predicted class
    tracks: I64 | None = None  # (n,) as in FailureWatch

    @property
    def wrong(self) -> Bool:
        found: Bool = self.logits.argmax(axis=1) != self.labels
        return found

    def take(self, rows: I64) -> Answers:
        return replace(self, **rows_of(self, rows))


def fit_detector(method: str, answers: Answers, rows: I64, seed: int) -> tuple[FailureDetector, F64]:
    """Return the method fitted on `rows` of the answers, of which some are wrong, and the scores of all, (n, X).

    The temperature is that of MOST_AT_ONCE of the rows, drawn by seed, where there are more.
    """
    from sklearn.linear_model import LogisticRegression  # late: its import takes a second

    temperature = 1.0
    if method != "energy":
        drawn = random_rows(len(rows), MOST_AT_ONCE, generator(seed, "watch", "temperature"))
        some = answers.take(rows[drawn])
        temperature = fit_temperature(some.logits, some.labels)
    scores = answer_scores(method, temperature, answers.logits, answers.distance)
    fit_on = scores[rows]
    center, scale = fit_on.mean(axis=0), np.maximum(fit_on.std(axis=0), 1e-9)
    fitted = LogisticRegression(max_iter=1000).fit((fit_on - center) / scale, answers.wrong[rows])
    found = fitted.coef_[0], float(fitted.intercept_[0])
    return FailureDetector(method, temperature, center, scale, *found), scores


def measure_detector(method: str, validation: Answers, test: Answers, seed: int) -> MeasuredDetector:
    """Return the method fitted on all validation images, and what it gives those (out of fold) and the test images.

    All images of a track are in one fold.
    """
    # late: its import takes a second
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    out_of_fold = np.zeros(len(validation.labels))
    kind = StratifiedKFold if validation.tracks is None else StratifiedGroupKFold
    folds = kind(FOLDS, shuffle=True, random_state=torch_seed(seed, "watch", "folds") % 2**32)
    for kept, held in folds.split(validation.logits, validation.wrong, validation.tracks):
        fitted, scores = fit_detector(method, validation, kept, seed)
        out_of_fold[held] = fitted.probability_of(scores[held])
    detector, _ = fit_detector(method, validation, np.arange(len(validation.labels)), seed)
    return MeasuredDetector(detector, out_of_fold, detector.probability(test.logits, test.distance))


def watch_run(spec: RunFile, models: Models, corrected: Weights, *, progress: Progress) -> FailureWatch:
    """Return the watch of a run's corrected classifier, or of the one before where nothing was corrected."""
    splits = reopen_splits(spec, models.data_fingerprint)
    progress("measuring how well failing inputs are found")
    return watch_classifier(spec, models, corrected, splits)


def watch_classifier(spec: RunFile, models: Models, corrected: Weights, splits: Splits) -> FailureWatch:
    """Return the watch of a classifier with the weights `corrected`, or of the one before where there are none."""
    classes = len(models.classes)
    with cpu_threads(spec.resources.train_threads):
        vae = load_vae(spec, models.vae)
        classifier = load_classifier(spec, corrected or models.classifier, classes)
        gaussians = class_gaussians(*training_codes(spec, vae, splits.train), classes)
        parts = [
            _answers(classifier, vae, _drawn(images, spec.seed), gaussians, spec.resources.readers)
            for images in (splits.validation, splits.test)
        ]
    known = parts[0].labels if splits.validation is None else splits.validation.labels
    missing = _missing_classes(known, splits.train.labels, models.classes)
    problem = SEEN if models.validation_from_training else missing or _problem(*parts)
    return _measure(spec, parts[0], parts[1], gaussians, problem)


def _drawn(images: Images | None, seed: int) -> Images | None:
    """Return at most MOST_IMAGES of the images, drawn by seed."""
    if images is None or len(images) <= MOST_IMAGES:
        return images
    return images.take(random_rows(len(images), MOST_IMAGES, generator(seed, "watch", "images")))


def _answers(
    classifier: nn.Module, vae: Vae, images: Images | None, gaussians: tuple[F64, F64], readers: int = 0
) -> Answers:
    """Return the answers on all images; an empty one for no images. Each image is read once."""
    if images is None or not len(images):
        return Answers(np.zeros((0, len(gaussians[0]))), np.zeros(0, np.int64), np.zeros(0))
    logits, codes = [], []
    order = (slice(start, start + BATCH) for start in range(0, len(images), BATCH))
    for pixels in batches_of(images, order, readers):
        logits.append(predict_logits(classifier, pixels).astype(np.float64))
        codes.append(encode_images(vae, pixels))
    table, latent = np.concatenate(logits), np.concatenate(codes)
    own = own_distances(latent, table.argmax(axis=1), *gaussians)
    return Answers(table, images.labels, own, images.tracks)


def _measure(
    spec: RunFile, validation: Answers, test: Answers, gaussians: tuple[F64, F64], problem: str
) -> FailureWatch:
    methods: tuple[MeasuredDetector, ...] = ()
    if not problem:
        with threadpool_limits(limits=1):  # sums in another order round otherwise
            methods = tuple(measure_detector(method, validation, test, spec.seed) for method in METHODS)
    watch = FailureWatch(
        methods=methods,
        problem=problem,
        means=gaussians[0],
        covariances=gaussians[1],
        validation_wrong=validation.wrong,
        test_wrong=test.wrong,
        validation_tracks=validation.tracks,
        test_tracks=test.tracks,
    )
    best = watch.best()
    log.info("watch: %s", watch.objection(best) or (best and f"{best.detector.method} finds failing inputs"))
    return watch


def _missing_classes(validation: I64, train: I64, classes: Sequence[str]) -> str:
    """Return which classes with training images have no validation image, as a sentence; empty where few lack any.

    How wrong answers on images of these look is then unknown. Without any validation image that is another problem.
    """
    trained = np.unique(train)
    missing = np.setdiff1d(trained, validation)
    if not len(validation) or len(missing) < max(1, MOST_MISSING * len(trained)):
        return ""
    names, them = first_few([classes[label] for label in missing]), "it" if len(missing) == 1 else "them"
    return (
        f"Failing inputs cannot be found: there is no validation image of {names}, so nothing can be calibrated for "
        f"{them}; add some."
    )


def _problem(validation: Answers, test: Answers) -> str:
    """Return why no detector can be fitted, as a sentence; empty where one can."""
    images, errors = len(validation.labels), int(validation.wrong.sum())
    if not images:
        return (
            "Failing inputs cannot be found: the data set has no validation images to calibrate on "
            "(data.validation_share)."
        )
    if not np.isfinite(validation.logits).all() or not np.isfinite(test.logits).all():
        return "Failing inputs cannot be found: some of the classifier's outputs are not finite."
    found = f"Failing inputs cannot be found: {errors} of {images} answers on validation images are wrong"
    needed = f"at least {MIN_ANSWERS} wrong and {MIN_ANSWERS} right ones"
    if min(errors, images - errors) < MIN_ANSWERS:
        return f"{found}, and {needed} are needed to calibrate a probability."
    if validation.tracks is None:
        return ""
    wrong, right = (len(np.unique(validation.tracks[rows])) for rows in (validation.wrong, ~validation.wrong))
    if min(wrong, right) < MIN_ANSWERS:
        return f"{found}, in {wrong} tracks, and {needed} of different tracks are needed to calibrate a probability."
    return ""
