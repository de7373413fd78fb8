"""How the time of a run is divided among its steps, from speeds measured in a few seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from defuse_core.config import DistillSection, ReviewSection, RunFile, VaeSection, parse_run_file
from defuse_core.data import Images, Splits, open_splits
from defuse_core.data.images import MAX_LOADED
from defuse_core.device import cpu_threads, device
from defuse_core.formatting import count_of
from defuse_core.models import (
    ReferenceCnn,
    build_vae,
    decode_codes,
    predict,
    probe_classifier,
    to_device,
    to_tensor,
)
from defuse_core.models.adapters import with_stated_range
from defuse_core.models.probe import LIKE_SIGMOID, ClassifierProbe
from defuse_core.protocols import Progress, silent
from defuse_core.runs import CONTROL_NAMES
from defuse_core.suggest.classifier_inputs import VALIDATION_SHARE, fit_image_size, probe_notes, set_probed
from defuse_core.suggest.inspect import DataFacts, plan_reading

TRIAL_S = 0.5  # each speed is measured for so long
TRIAL_BATCH = 64
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
TOO_LONG = 1.5  # times longer or shorter than asked for, from which a plan gets a note


@dataclass(frozen=True)
class Speeds:
    """Images per second of each kind of work, on this machine."""

    vae: float  # training the β-VAE
    decode: float  # decoding a code and classifying the decoding
    classifier: float  # training the classifier
    reference: float  # training one reference model
    read: float = math.inf  # reading image files that stay on disk

    def up_to(self, read: float) -> Speeds:
        """Return the speeds where so many training images per second are read; a decoding needs few of them."""
        vae, classifier, reference = (min(read, own) for own in (self.vae, self.classifier, self.reference))
        return replace(self, vae=vae, classifier=classifier, reference=reference)


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
        speeds = _measured(spec, classifier, sample, channels, progress)
    largest = max(splits.parts().values(), key=lambda images: images.stays_on_disk * len(images))
    readers, read = plan_reading(largest, max(speeds.vae, speeds.classifier, speeds.reference))
    speeds = replace(speeds.up_to(read) if splits.train.stays_on_disk else speeds, read=read)
    if own is not None and own.get("weights") and "validation" not in facts.counts:
        notes.append(
            f"validation images are {100 * VALIDATION_SHARE:g} % of the training images, which the classifier probably "
            "has seen; separate validation images (a folder `validation`, or validation= in Python) would show the "
            "cost of a correction more reliably"
        )
    needed, more = _set_sizes(tree, splits, speeds, minutes, own=own is not None)
    if facts.are_converted(spec.data.image_size, spec.data.channels):
        tree["serve"] = {"resize": True}
    if readers:
        tree["resources"] = {"readers": readers}
    parse_run_file(tree, "the suggested run file")
    return Plan(tree, needed, facts, speeds, probe, (*notes, *more, *probe_notes(probe)))


def _measured(
    spec: RunFile, classifier: nn.Module, sample: Images, channels: int, progress: Progress
) -> Speeds:
    """Measure each kind of work for a moment, with reference models of so many channels."""
    to_device(vae := build_vae(spec))
    reference = to_device(ReferenceCnn(spec.data.image_size, spec.data.channels, channels, 100))
    batch = to_tensor(sample.batch(np.arange(TRIAL_BATCH) % len(sample)))
    labels = torch.zeros(TRIAL_BATCH, dtype=torch.long, device=device())
    codes = np.zeros((TRIAL_BATCH, spec.vae.latent_dim), np.float32)
    works: dict[str, Callable[[], object]] = {
        "vae": _step(vae, lambda: vae.decode(vae.encode(batch)[0]).sum()),
        "decode": lambda: predict(classifier.eval(), decode_codes(vae, codes)),
        "classifier": _step(classifier, lambda: F.cross_entropy(classifier.train()(batch), labels)),
        "reference": _step(reference, lambda: F.cross_entropy(reference(batch), labels)),
    }
    rates = {}
    for done, (name, work) in enumerate(works.items(), start=1):
        rates[name] = _rate(work)
        progress("measuring speeds", done, len(works), "speeds")
    return Speeds(**rates)


def _step(module: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """Return one training step with a learning rate of 0, which changes no weight."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _rate(work: Callable[[], object]) -> float:
    """Return images per second of work on batches of TRIAL_BATCH; the first batch does not count."""
    work()
    started, batches = time.monotonic(), 0
    while time.monotonic() - started < TRIAL_S:
        work()
        batches += 1
    if device().type == "cuda":
        torch.cuda.synchronize()
    return batches * TRIAL_BATCH / (time.monotonic() - started)


def _set_sizes(
    tree: dict[str, Any], splits: Splits, speeds: Speeds, minutes: float, own: bool
) -> tuple[float, list[str]]:
    """Divide the time: epochs, draws, λ and samples of every step. Returns the minutes that it takes, and notes."""
    count, seconds = len(splits.train), 60 * minutes * RESERVE
    shares = {**SHARES, "classifier": 0.0, "vae": 0.4} if own else SHARES
    if own:
        trained = {"epochs": 5, "optimizer": "adam", "learning_rate": 0.001}
        tree["classifier"] |= {"epochs": 0} if tree["classifier"].get("weights") else trained
    else:
        epochs = _clamp(seconds * shares["classifier"] * speeds.classifier / count, 3, 40)
        tree["classifier"] |= {"epochs": epochs, "batch_size": _batch(count, 128), "keep": "best_validation"}
    epochs, batch = _clamp(seconds * shares["vae"] * speeds.vae / count, 2, 100), _batch(count, 256)
    steps = epochs * max(1, count // batch)
    tree["vae"] |= {"epochs": epochs, "batch_size": batch, "kl_warmup_steps": min(500, steps // 4)}
    anchored = tree["vae"].get("decode") == "anchored"
    tree["identify"] = {"share": ANCHORED_SHARE} if anchored else {}
    perturbed, others = _perturbed_and_others(tree, count)
    draws = _clamp(seconds * shares["identify"] * speeds.decode / perturbed, 2, 50)
    tree["identify"] |= {"draws": draws, "scale": SCALE}
    rarest = int(np.unique(splits.train.labels, return_counts=True)[1].min())  # of classes with images
    tree["distill"] = _distill(tree, len(splits.classes), rarest / count)
    least = max(500, PER_CLASS * len(splits.classes))
    reference = _reference(others, seconds * shares["references"], speeds, least)
    tree["review"] = {"annotators": "reference-models", **({"purity": ANCHORED_PURITY} if anchored else {})}
    tree["review"]["reference"] = reference
    tree["judges"] = {"share": 0.0, **reference} if others < FEW_IMAGES else dict(reference)
    tree["correct"] = _correct(count, seconds * shares["correct"], speeds, least)
    notes = []
    each = _images_of_each_model(tree, others) / count * rarest
    if each < PER_CLASS:
        notes.append(
            f"the reference models and judges are trained on {count_of(float(f'{each:.3g}'), 'image')} of the rarest "
            "class, too few to rely on their answers; add images"
        )
    if len(splits.classes) > MOST_CLASSES:
        notes.append(
            f"the reference models and judges, small networks that begin with random weights, learn few of "
            f"{len(splits.classes):,} classes; use pretrained ones: review.reference.architecture: custom, "
            "import_path, count: 1 and epochs: 0, and the same of judges"
        )
    notes += _notes_on_review(tree, splits)
    trained, enough = reference["epochs"], _enough_epochs(others)[1]
    if others < FEW_IMAGES and 2 * trained <= enough:
        notes.append(
            f"the reference models and judges are trained for {trained} epochs, and need about {enough} on so few "
            f"images to be as accurate as the classifier; give more than {count_of(minutes, 'minute')} (--minutes, or "
            "minutes= in Python)"
        )
    if own and tree["classifier"]["epochs"]:
        notes.append(
            "the classifier has no file of weights, so the run trains it; save its state_dict() to a file and give "
            "--weights to use it as it is"
        )
    scored = _seconds_scored(tree, splits, speeds) / (60 * RESERVE)
    planned = _seconds_planned(tree, count, speeds) / (60 * RESERVE) + scored
    if planned > TOO_LONG * minutes:
        side = tree["data"]["image_size"]
        mostly = f", {scored:,.0f} of them for validation and test images" if scored > planned / 2 else ""
        notes.append(
            f"{count_of(minutes, 'minute')} cannot be enough: a run of {count:,} images of {side}x{side} "
            f"pixels takes about {planned:,.0f} minutes here{mostly}; give {WITH_LESS}"
        )
        return round(planned), notes
    if epochs < FEW_EPOCHS:
        notes.append(
            f"only {count_of(epochs, 'epoch')} for the β-VAE fit in {count_of(minutes, 'minute')}; give {WITH_LESS}"
        )
    if TOO_LONG * planned < minutes:  # every step has its most epochs, draws and λ
        return max(1, round(planned)), notes
    return minutes, notes


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


def _notes_on_review(tree: dict[str, Any], splits: Splits) -> list[str]:
    """Return how many scenarios of many classes there may be, and which classes have too few photographs for one."""
    notes, review = list[str](), ReviewSection.model_validate(tree["review"])
    if least_weight := len(splits.classes) > EQUAL_CLASSES and tree["distill"]["min_weight"]:
        notes.append(
            f"up to {int(1 / least_weight):,} candidate scenarios may be found, each with {review.images} pictures to "
            "review; raise distill.min_weight for fewer"
        )
    if tree["vae"].get("decode") != "anchored":
        return notes
    _, first = np.unique(splits.train.unit, return_index=True)
    units = np.bincount(splits.train.labels[first], minlength=len(splits.classes))
    perturbed = np.ceil(tree["identify"]["share"] * units)
    few = np.ceil(perturbed / 2) < review.least_units
    if few.any():
        what = "photographs" if splits.train.tracks is None else "tracks"
        notes.append(
            f"{few.sum()} of {len(few)} classes have too few {what} for a scenario: at most "
            f"{int(perturbed[few].max())} of one are perturbed (identify.share), half of these are reviewed, and "
            f"significance takes {review.least_units}; add {what}, or set review.accept: share"
        )
    return notes


def _seconds_planned(tree: dict[str, Any], count: int, speeds: Speeds) -> float:
    """Return the seconds of training, identification and fine-tuning as planned, on `count` training images."""
    reference, correct = tree["review"]["reference"], tree["correct"]
    visits = _trainings(tree) * _visits(correct["epochs"]) * correct.get("train_images", count)
    perturbed, others = _perturbed_and_others(tree, count)
    return float(
        tree["classifier"]["epochs"] * count / speeds.classifier
        + tree["vae"]["epochs"] * count / speeds.vae
        + tree["identify"]["draws"] * perturbed / speeds.decode
        + 8 * reference["epochs"] * _images_of_each_model(tree, others) / speeds.reference
        + visits / speeds.classifier
    )


def _seconds_scored(tree: dict[str, Any], splits: Splits, speeds: Speeds) -> float:
    """Return the seconds in which classifiers answer the validation and test images, over and over."""
    from_disk, scored = min(speeds.decode, speeds.read), list(splits.parts().values())[1:]
    once = sum(len(images) / (from_disk if images.stays_on_disk else speeds.decode) for images in scored)
    return (_trainings(tree) + SCORINGS) * once


def _trainings(tree: dict[str, Any]) -> int:
    """Return how often the run fine-tunes: in two sweeps, and for the controls."""
    return 2 * len(tree["correct"]["lambdas"]) + len(CONTROL_NAMES)


def _perturbed_and_others(tree: dict[str, Any], count: int) -> tuple[int, int]:
    """Return how many of `count` training images are perturbed, and from how many reference models and judges learn."""
    perturbed = max(1, round(tree["identify"].get("share", 1.0) * count))
    return perturbed, count - perturbed or count


def _images_of_each_model(tree: dict[str, Any], count: int) -> int:
    """Return how many of the `count` images that models learn from each reference model and judge is trained on."""
    shared = count if tree["judges"].get("share") == 0 else count // 2
    return min(int(tree["judges"].get("train_images", count)), shared)


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
