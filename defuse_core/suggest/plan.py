"""How the time of a run is divided among its steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from defuse_core.config import DistillSection, ReviewSection, VaeSection, parse_run_file
from defuse_core.data import Splits, open_splits
from defuse_core.data.images import MAX_LOADED
from defuse_core.device import cpu_threads
from defuse_core.formatting import count_of
from defuse_core.models import probe_classifier
from defuse_core.models.adapters import with_stated_range
from defuse_core.models.probe import LIKE_SIGMOID, ClassifierProbe
from defuse_core.protocols import Progress, silent
from defuse_core.runs import CONTROL_NAMES
from defuse_core.suggest.classifier_inputs import VALIDATION_SHARE, fit_image_size, probe_notes, set_probed
from defuse_core.suggest.inspect import DataFacts
from defuse_core.suggest.speeds import TRIAL_BATCH, Speeds, measure_speeds, plan_reading

THREADS = 2  # resources.train_threads
RESERVE = 0.85  # share of the time that is planned, without reading images, the mixture and the report
SHARES = {"classifier": 0.15, "vae": 0.25, "identify": 0.1, "references": 0.2, "correct": 0.3}
# Of fewer training images half would train no reference model well, so that each is trained on all of them, a small one
# in so many steps at least. On 1,560 images of six signs the models were right on 29 to 38 % of the test images after
# 37 steps on fewer than half, on 65 to 71 % after 390 on all, and on 90 to 95 % after 975.
FEW_IMAGES, FEW_CHANNELS, LEAST_STEPS, MOST_EPOCHS = 5000, 16, 1000, 60
MOST_TIMES = 2.5  # their share of the time, for these steps
# images per class on average, where there are so many, that reference models, judges and the correction get at least
PER_CLASS = 20
SCORINGS = 18  # times that classifiers score validation and test images, beside once after each fine-tuning
LAMBDAS = {2: [0.1, 1.0], 3: [0.1, 1.0, 10.0], 4: [0.01, 0.1, 1.0, 10.0]}
SCALE = 2.0  # identify.scale
# review.purity and identify.share of photographs: all reference models are sure on 84 % of real signs, so 0.9 rejects
# most draws; and a model recognises almost any move of a photograph that it was trained on
ANCHORED_PURITY, ANCHORED_SHARE = 0.7, 0.34
EQUAL_CLASSES, LEAST_WEIGHT = 20, 0.01  # with more, or a rarer one, distill.min_weight is less than this
MOST_CLASSES = 100  # small networks with random initial weights learn few of more classes
FEW_EPOCHS = 6  # fewer epochs of the β-VAE get a note
WITH_LESS = (
    "fewer images (--train-images), smaller ones (--image-size) or more --minutes (in Python data.train_images, "
    "minutes=)"
)
MODELS = "the reference models and judges"
TOO_LONG = 1.5  # times longer or shorter than asked for, from which a plan gets a note


@dataclass(frozen=True)
class Plan:
    """A run file as a tree, what was found, and what a person should know."""

    tree: dict[str, Any]
    minutes: float  # of the run on this machine: as asked for, unless it needs more, or cannot use as many
    facts: DataFacts
    speeds: Speeds
    probe: ClassifierProbe | None  # of a classifier of the user's own with weights
    notes: tuple[str, ...]


def plan_run(
    facts: DataFacts,
    own: dict[str, Any] | None,
    minutes: float,
    progress: Progress = silent,
    image_size: int | None = None,
    train_images: int | None = None,
) -> Plan:
    """Return a run file for these images and this classifier, whose run needs about so many minutes here.

    `own` is section `classifier` for a classifier of the user's own, without what the probe finds. Without
    `image_size`, the size follows from the images and the classifier; `train_images` is data.train_images.
    """
    own, stated = with_stated_range(own)
    sized = fit_image_size(facts, own, image_size, progress)
    classifier, tree = sized.module, sized.tree
    if train_images is not None:
        tree["data"]["train_images"] = train_images
    spec = parse_run_file(tree, "the suggested run file")
    splits = open_splits(spec.data, spec.seed)
    sample = splits.train.take(slice(0, None, max(1, len(splits.train) // TRIAL_BATCH))).loaded()
    with cpu_threads(THREADS):
        probe, notes = None, [*facts.notes, *stated, *sized.notes]
        if own is not None:
            progress("trying the classifier on training images")
            found = probe_classifier(classifier, spec.classifier, splits.train, splits.classes)
            if own.get("weights"):
                probe = found
                notes += set_probed(tree["classifier"], probe)
            elif found.like_sigmoid:  # all else of it is random, and the run trains it
                notes.append(f"the classifier: {LIKE_SIGMOID}")
        channels = FEW_CHANNELS if len(splits.train) < FEW_IMAGES else spec.review.reference.channels
        progress("measuring speeds")
        speeds = measure_speeds(spec, classifier, sample, channels, progress)
    largest = max(splits.parts().values(), key=lambda images: images.stays_on_disk * len(images))
    readers, read = plan_reading(largest, max(speeds.vae, speeds.classifier, speeds.reference))
    speeds = replace(speeds.up_to(read) if splits.train.stays_on_disk else speeds, read=read)
    if own is not None and not own.get("weights"):
        notes.append(
            "the classifier has no file of weights, so the run trains it; save its state_dict() to a file and give "
            "--weights to use it as it is"
        )
    elif own is not None and "validation" not in facts.counts:
        notes.append(
            f"validation images are {100 * VALIDATION_SHARE:g} % of the training images, which the classifier probably "
            "has seen; separate validation images (a folder `validation`, or validation= in Python) would show the "
            "cost of a correction more reliably"
        )
    needed, more = TimeBudget(tree, splits, speeds, minutes, own=own is not None).divide()
    if facts.are_converted(spec.data.image_size, spec.data.channels):
        tree["serve"] = {"resize": True}
    if readers:
        tree["resources"] = {"readers": readers}
    parse_run_file(tree, "the suggested run file")
    return Plan(tree, needed, facts, speeds, probe, (*notes, *more, *probe_notes(probe)))


class TimeBudget:
    """The time of a run, and how it is divided: epochs, draws, λ and samples of each step, in the run file's tree."""

    def __init__(
        self, tree: dict[str, Any], splits: Splits, speeds: Speeds, minutes: float, *, own: bool
    ) -> None:
        self.tree, self.splits, self.speeds, self.minutes, self.own = tree, splits, speeds, minutes, own
        self.count = len(splits.train)
        # images of the rarest class that has any
        self.rarest = int(np.unique(splits.train.labels, return_counts=True)[1].min())
        self.anchored = tree["vae"].get("decode") == "anchored"
        self.perturbed = max(1, round((ANCHORED_SHARE if self.anchored else 1.0) * self.count))
        # images from which reference models and judges learn
        self.others = self.count - self.perturbed or self.count

    def divide(self) -> tuple[float, list[str]]:
        """Set the sizes of all steps. Returns the minutes that these take, and what a person should know."""
        self._set_sizes()
        planned, notes_on_time = self._planned()
        return planned, [*self._notes_on_models(), *self._notes_on_review(), *notes_on_time]

    def _set_sizes(self) -> None:
        tree, count, speeds = self.tree, self.count, self.speeds
        shares = {**SHARES, "classifier": 0.0, "vae": 0.4} if self.own else SHARES
        seconds = {step: 60 * self.minutes * RESERVE * share for step, share in shares.items()}
        if self.own:
            trained: dict[str, Any] = {"epochs": 5, "optimizer": "adam", "learning_rate": 0.001}
            tree["classifier"] |= {"epochs": 0} if tree["classifier"].get("weights") else trained
        else:
            epochs = _clamp(seconds["classifier"] * speeds.classifier / count, 3, 40)
            trained = {"epochs": epochs, "batch_size": _batch(count, 128), "keep": "best_validation"}
            tree["classifier"] |= trained
        epochs, batch = _clamp(seconds["vae"] * speeds.vae / count, 2, 100), _batch(count, 256)
        steps = epochs * max(1, count // batch)
        tree["vae"] |= {"epochs": epochs, "batch_size": batch, "kl_warmup_steps": min(500, steps // 4)}
        draws = _clamp(seconds["identify"] * speeds.decode / self.perturbed, 2, 50)
        share = {"share": ANCHORED_SHARE} if self.anchored else {}
        tree["identify"] = {**share, "draws": draws, "scale": SCALE}
        tree["distill"] = _distill(tree, len(self.splits.classes), self.rarest / count)
        least = max(500, PER_CLASS * len(self.splits.classes))
        reference = _reference(self.others, seconds["references"], speeds, least)
        purity = {"purity": ANCHORED_PURITY} if self.anchored else {}
        tree["review"] = {"annotators": "reference-models", **purity, "reference": reference}
        tree["judges"] = {"share": 0.0, **reference} if self.others < FEW_IMAGES else dict(reference)
        tree["correct"] = _correct(count, seconds["correct"], speeds, least)

    def _notes_on_models(self) -> list[str]:
        """Return why the reference models and judges may know too little of some classes."""
        notes, classes = list[str](), len(self.splits.classes)
        each = self._images_of_each_model / self.count * self.rarest
        if each < PER_CLASS:
            notes.append(
                f"{MODELS} are trained on {count_of(float(f'{each:.3g}'), 'image')} of the rarest class, too few to "
                "rely on their answers; add images"
            )
        if classes > MOST_CLASSES:
            notes.append(
                f"{MODELS}, small networks that begin with random weights, learn few of {classes:,} classes; use "
                "pretrained ones: review.reference.architecture: custom, import_path, count: 1 and epochs: 0, and the "
                "same of judges"
            )
        return notes

    def _notes_on_review(self) -> list[str]:
        """Return how many scenarios of many classes there may be, and which have too few photographs for one."""
        tree, splits = self.tree, self.splits
        notes, review = list[str](), ReviewSection.model_validate(tree["review"])
        if least_weight := len(splits.classes) > EQUAL_CLASSES and tree["distill"]["min_weight"]:
            notes.append(
                f"up to {int(1 / least_weight):,} candidate scenarios may be found, each with {review.images} pictures "
                "to review; raise distill.min_weight for fewer"
            )
        if not self.anchored:
            return notes
        _, first = np.unique(splits.train.unit, return_index=True)
        units = np.bincount(splits.train.labels[first], minlength=len(splits.classes))
        perturbed = np.ceil(ANCHORED_SHARE * units)
        few = np.ceil(perturbed / 2) < review.least_units
        if few.any():
            what = "photographs" if splits.train.tracks is None else "tracks"
            notes.append(
                f"{few.sum()} of {len(few)} classes have too few {what} for a scenario: at most "
                f"{int(perturbed[few].max())} of one are perturbed (identify.share), half of these are reviewed, and "
                f"significance takes {review.least_units}; add {what}, or set review.accept: share"
            )
        return notes

    @property
    def _images_of_each_model(self) -> int:
        """How many images each reference model and judge is trained on."""
        judges = self.tree["judges"]
        shared = self.others if judges.get("share") == 0 else self.others // 2
        return min(int(judges.get("train_images", self.others)), shared)

    def _planned(self) -> tuple[float, list[str]]:
        """Return the minutes of the run: as asked for, unless it needs more, or cannot use as many; and notes."""
        notes, minutes = list[str](), count_of(self.minutes, "minute")
        trained, enough = self.tree["review"]["reference"]["epochs"], _enough_epochs(self.others)[1]
        if self.others < FEW_IMAGES and 2 * trained <= enough:
            notes.append(
                f"{MODELS} are trained for {trained} epochs, and need about {enough} on so few images to be as "
                f"accurate as the classifier; give more than {minutes} (--minutes, or minutes= in Python)"
            )
        scored = self._seconds_scored() / (60 * RESERVE)
        planned = self._seconds_computed() / (60 * RESERVE) + scored
        if planned > TOO_LONG * self.minutes:
            side = self.tree["data"]["image_size"]
            mostly = f", {scored:,.0f} of them for validation and test images" if scored > planned / 2 else ""
            notes.append(
                f"{minutes} cannot be enough: a run of {self.count:,} images of {side}x{side} pixels takes about "
                f"{planned:,.0f} minutes here{mostly}; give {WITH_LESS}"
            )
            return round(planned), notes
        if (epochs := self.tree["vae"]["epochs"]) < FEW_EPOCHS:
            notes.append(f"only {count_of(epochs, 'epoch')} for the β-VAE fit in {minutes}; give {WITH_LESS}")
        if TOO_LONG * planned < self.minutes:  # every step has its most epochs, draws and λ
            return max(1, round(planned)), notes
        return self.minutes, notes

    def _seconds_computed(self) -> float:
        """Return the seconds of training, identification and fine-tuning."""
        tree, count, speeds = self.tree, self.count, self.speeds
        reference, correct = tree["review"]["reference"], tree["correct"]
        visits = self._trainings * _visits(correct["epochs"]) * correct.get("train_images", count)
        return float(
            tree["classifier"]["epochs"] * count / speeds.classifier
            + tree["vae"]["epochs"] * count / speeds.vae
            + tree["identify"]["draws"] * self.perturbed / speeds.decode
            + 8 * reference["epochs"] * self._images_of_each_model / speeds.reference
            + visits / speeds.classifier
        )

    def _seconds_scored(self) -> float:
        """Return the seconds in which classifiers answer the validation and test images, over and over."""
        speeds, scored = self.speeds, list(self.splits.parts().values())[1:]
        from_disk = min(speeds.decode, speeds.read)
        once = sum(len(images) / (from_disk if images.stays_on_disk else speeds.decode) for images in scored)
        return (self._trainings + SCORINGS) * once

    @property
    def _trainings(self) -> int:
        """How often the run fine-tunes: in two sweeps, and for the controls."""
        return 2 * len(self.tree["correct"]["lambdas"]) + len(CONTROL_NAMES)


def _distill(tree: dict[str, Any], classes: int, rarest: float) -> dict[str, Any]:
    """Return section distill. Each class has several cells (class, answer), and all of many classes share the codes.

    If enough draws fail, the lightest component has twice as many codes as these have dimensions; with decode: anchored
    fewer where their photographs, about one for four codes, would not fit into memory. A rare one of few classes, with
    the share `rarest` of the images, counts as one of many; the others get no more components for that than 50.
    """
    section, vae = dict[str, Any](order="source-error"), VaeSection.model_validate(tree["vae"])
    if classes > EQUAL_CLASSES:
        section["min_weight"] = float(f"{LEAST_WEIGHT * EQUAL_CLASSES / classes:.3g}")
    elif (equal := EQUAL_CLASSES * rarest) < 1:
        section |= {"min_weight": float(f"{LEAST_WEIGHT * max(0.1, equal):.3g}"), "max_components": 50}
    if "min_weight" in section:
        codes = math.ceil(2 * vae.latent_dim / section["min_weight"])
        if vae.decode == "anchored":
            codes = min(codes, 4 * MAX_LOADED // (3 * tree["data"]["image_size"] ** 2))
        if codes > (DistillSection().max_codes or codes):
            section["max_codes"] = codes
    return section


def _reference(count: int, seconds: float, speeds: Speeds, least: int) -> dict[str, Any]:
    """Return the training of the reference models and judges: eight in all, each on half of the images, or on all few.

    If four epochs on all would take too long they get fewer images, but at least `least` where half of all are so many.
    """
    visits = seconds * speeds.reference / 8
    if count < FEW_IMAGES:
        batch, enough = _enough_epochs(count)
        fewest = min(enough, max(8, int(MOST_TIMES * visits / count)))
        epochs = _clamp(visits / count, fewest, max(20, fewest))
        return {"channels": FEW_CHANNELS, "epochs": epochs, "batch_size": batch}
    epochs = _clamp(2 * visits / count, 4, 20)
    section: dict[str, Any] = {"epochs": epochs, "batch_size": _batch(count, 128)}
    if 2 * visits < epochs * count:
        section["train_images"] = max(min(count // 2, least), int(visits / epochs))
    return section


def _enough_epochs(count: int) -> tuple[int, int]:
    """Return the batch size of reference models on few images, and the epochs after which they know them well."""
    batch = _batch(count, 32)
    return batch, min(MOST_EPOCHS, math.ceil(LEAST_STEPS * batch / count))


def _visits(epochs: int) -> int:
    """Return how often a fine-tuning computes with as many images as D has: twice an epoch, with D_f, and to score."""
    return 2 * epochs + 1


def _correct(count: int, seconds: float, speeds: Speeds, least: int) -> dict[str, Any]:
    """Return section correct: two sweeps and the controls. D has at least `least` images, or all."""
    epochs, visits = 3, seconds * speeds.classifier
    per_training = float(_visits(epochs) * count)
    lambdas = _clamp((visits / per_training - len(CONTROL_NAMES)) / 2, 2, 4)
    all_trainings = (2 * lambdas + len(CONTROL_NAMES)) * per_training
    section: dict[str, Any] = {
        "lambdas": LAMBDAS[lambdas],
        "epochs": epochs,
        "batch_size": _batch(count, 64),
        "choose_by": "tune",
        "max_loss": 0.005,
    }
    if visits < all_trainings:
        section["train_images"] = max(min(count, least), int(count * visits / all_trainings))
    return section


def _clamp(value: float, least: int, most: int) -> int:
    return max(least, min(most, int(value)))


def _batch(count: int, most: int) -> int:
    """Return a power of two: at least some 20 steps an epoch, where there are so many images."""
    return max(16, min(most, 1 << int(math.log2(max(16, count / 20)))))
