"""The image size of a run, and pixel range and class order of a classifier of the user's own: what a probe tells."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from defuse_core.config import RunFile, parse_run_file
from defuse_core.data import Images, open_splits
from defuse_core.data.images import PictureFiles
from defuse_core.errors import InputError, ModelError
from defuse_core.formatting import first_few, percent
from defuse_core.models import (
    build_classifier,
    check_outputs,
    expect_trainable,
    load_pretrained,
    probe_classifier,
    to_device,
)
from defuse_core.models.checks import ANY_SIZE, CallError, ProbabilitiesError
from defuse_core.models.inference import returns_nan
from defuse_core.models.probe import (
    FAR_BETTER,
    LIKE_SIGMOID,
    MOSTLY,
    ON_AVERAGE,
    ClassifierProbe,
    least_plausible,
    rows_of_all_classes,
)
from defuse_core.protocols import Progress
from defuse_core.suggest.inspect import DataFacts

VALIDATION_SHARE = 0.15  # held out where the data set has no validation part
SMALLEST, LARGEST = 8, 512  # of data.image_size
USUAL_SIZES = {16, 28, 32, 48, 64, 96, 128, 224, 256}
DENSE_SIDE = 32  # height and width up to which the β-VAE's dense layers stay small
SAMPLE = 64  # training images, evenly spaced, on which sizes are compared, and some more of rare classes
AS_RIGHT = 0.04  # accuracy, on average over the classes, that a smaller size may lose


@dataclass(frozen=True, eq=False)
class SizedClassifier:
    """A classifier, and the sections data, classifier and vae with the image size that was chosen for it."""

    module: nn.Module
    tree: dict[str, Any]
    # where the pictures have other sizes or colours than their owner's classifier gets
    notes: tuple[str, ...]


def fit_image_size(
    facts: DataFacts, own: dict[str, Any] | None, asked: int | None, progress: Progress
) -> SizedClassifier:
    """Return the classifier with its weights, and the sections for the size that is asked for or suits it.

    `own` is section `classifier` for a classifier of the user's own, without what the probe finds. That one gets the
    pictures' own size where it takes it and they are square: most were trained on it. Otherwise, or where it is far
    more often right at another, one with weights gets the smallest of the usual sizes, from the suggested one on, at
    which it is about as often right as at any. One that takes no size of them gets the pictures in colour instead of
    grey, or in grey instead of colour, if it takes those.
    Raises InputError for a size that cannot be, ModelError where the classifier takes none.
    """
    if asked is not None:
        _expect_usable(asked, facts)
    try:
        return _with_outputs(facts, own, asked, progress)
    except ModelError:
        if own is None or (facts.name == "npz" and facts.channels == 3):  # colour arrays are not made grey
            raise
        sized = _in_other_colours(facts, own, asked, progress)
        if sized is None:
            raise
        return sized


def _in_other_colours(
    facts: DataFacts, own: dict[str, Any], asked: int | None, progress: Progress
) -> SizedClassifier | None:
    """Return the classifier for grey pictures in colour, or colour ones in grey; None where it does not take them."""
    channels, look, takes = (3, "grey", "colour") if facts.channels == 1 else (1, "in colour", "grey")
    try:
        sized = _with_outputs(replace(facts, channels=channels), own, asked, progress)
    except ModelError:
        return None
    note = f"the pictures look {look}, but the classifier takes {takes} ones, so data.channels is {channels}"
    return replace(sized, notes=(*sized.notes, note))


def _with_outputs(
    facts: DataFacts, own: dict[str, Any] | None, asked: int | None, progress: Progress
) -> SizedClassifier:
    """Return the sized classifier, with outputs: probabilities where it returns those."""
    try:
        return _sized(facts, own, asked, progress)
    except ProbabilitiesError:
        if own is None:
            raise
    sized = _sized(facts, own | {"outputs": "probabilities"}, asked, progress)
    note = "classifier.outputs is set to probabilities, as the classifier ends with a softmax or its like"
    return replace(sized, notes=(*sized.notes, note))


def _sized(
    facts: DataFacts, own: dict[str, Any] | None, asked: int | None, progress: Progress
) -> SizedClassifier:
    sizes = [asked] if asked is not None else _sizes_to_try(facts, own=own is not None)
    spec = _run_file(_sections(facts, own, sizes[0]))
    classifier, train = _built(spec, len(facts.classes)), open_splits(spec.data, spec.seed).train
    compared = own is not None and bool(own.get("weights")) and len(sizes) > 1
    accuracies, probed = dict[int, float](), 0
    least = least_plausible(1 / len(facts.classes))
    errors: list[ModelError] = []
    for done, size in enumerate(sizes):
        progress("trying image sizes", done, len(sizes), "sizes")
        spec = _run_file(_sections(facts, own, size))
        images = _of_size(train, size)
        try:
            check_outputs(classifier, spec.classifier, images, len(facts.classes), _remedy(facts, asked))
        except ProbabilitiesError:
            raise
        except ModelError as error:
            errors.append(error)
            continue
        expect_trainable(classifier, images)
        if not compared:
            accuracies[size] = 1.0
            break
        probe = _probe(classifier, spec, images, facts)
        accuracies[size], probed = probe.accuracy_as_set(spec.classifier.input_range), probe.images
        best = _best_size(facts, accuracies, least)
        # no later size is taken: none can be far better than the pictures' own, or clearly better than another one
        if accuracies[best] > (1 - FAR_BETTER if best == _own_side(facts) else max(least, 1 - AS_RIGHT)):
            break
    if not accuracies:
        raise _no_size(errors, sizes)
    size = _best_size(facts, accuracies, least)
    notes = [] if own is None or asked is not None else _notes(facts, size, accuracies, probed)
    notes += _dense_notes(size)
    return SizedClassifier(classifier, _sections(facts, own, size), tuple(notes))


def _of_size(images: Images, size: int) -> Images:
    """Return image files as they are read at another size; arrays as they are."""
    if not isinstance(images.pixels, PictureFiles):
        return images
    return replace(images, pixels=PictureFiles(images.pixels.paths, images.pixels.shape[1], size))


def _remedy(facts: DataFacts, asked: int | None) -> str:
    """Return what to do where the classifier fails on images of one size."""
    if asked is not None and facts.name != "npz":
        return f"leave --image-size {asked} out, or give the size that it was trained on"
    of_file = (
        ", and that the pictures in the file are as those that it was trained on"
        if facts.name == "npz"
        else ""
    )
    return f"check {ANY_SIZE}{of_file}"


def _sizes_to_try(facts: DataFacts, own: bool) -> list[int]:
    """Return sizes as they are tried: the pictures' own, larger ones from the suggested one on, and smaller ones.

    Images of an .npz file are never resized.
    """
    if not own or facts.name == "npz":
        return [facts.image_size]
    side = _own_side(facts)
    others = sorted({facts.image_size, *USUAL_SIZES} - {side}, key=partial(_rank, facts))
    return others if side is None else [side, *others]


def _rank(facts: DataFacts, size: int) -> tuple[bool, int]:
    """Return what orders sizes: the suggested one and larger ones come first, the smallest first."""
    return size < facts.image_size, size


def _own_side(facts: DataFacts) -> int | None:
    """Return height and width of the pictures where they are square and the β-VAE can halve them often enough."""
    side = facts.height
    usable = SMALLEST <= side <= LARGEST and side % 2 == 0 and side >> vae_stages(side) <= DENSE_SIDE
    return side if side == facts.width and usable else None


def _expect_usable(asked: int, facts: DataFacts) -> None:
    if facts.name == "npz" and asked != facts.image_size:
        raise InputError(
            f"--image-size {asked}: images of an .npz file are used as they are ({facts.width}x{facts.height}); resize "
            "them in the file"
        )
    if asked % 2:
        raise InputError(
            f"--image-size {asked}: expected an even number, which the β-VAE can halve; give {asked + 1}, and let "
            f"a classifier of {asked} resize them: F.interpolate(images, {asked}, mode='bilinear', antialias=True)"
        )


def _probe(classifier: nn.Module, spec: RunFile, images: Images, facts: DataFacts) -> ClassifierProbe:
    """Return what SAMPLE training images, or some more, show about the classifier at the image size of `spec`."""
    classes = len(facts.classes)
    rows = rows_of_all_classes(images.labels, classes, SAMPLE, SAMPLE // (2 * classes))
    return probe_classifier(classifier, spec.classifier, images.take(rows), facts.classes)


def _best_size(facts: DataFacts, accuracies: dict[int, float], least: float) -> int:
    """Return the pictures' own size where no other is far better, else the smallest that is about as good as any.

    Sizes under `least` count only where all are: at these the classifier may give one answer for all images.
    """
    own = _own_side(facts)
    plausible = {size: right for size, right in accuracies.items() if right >= least}
    if own in accuracies and max(plausible.values(), default=0.0) < accuracies[own] + FAR_BETTER:
        return own
    compared = plausible or accuracies
    as_right = [size for size, right in compared.items() if right >= max(compared.values()) - AS_RIGHT]
    return min(as_right, key=partial(_rank, facts))


def _no_size(errors: list[ModelError], sizes: list[int]) -> ModelError:
    """Return the error of a classifier that takes none of the sizes, with what to do.

    Where it returns something at some of them, and the same is wrong at each of those, the size is not the matter.
    """
    wrong = {str(error): error for error in errors if not isinstance(error, CallError)}
    if len(wrong) == 1:
        return next(iter(wrong.values()))
    if len(sizes) == 1:
        return errors[0]
    tried = ", ".join(map(str, sizes))
    return ModelError(
        f"{errors[0]}; tried sizes {tried}: give the one that it was trained on ({SMALLEST} to {LARGEST}) with "
        "--image-size; if that is odd, give the next even one, and let the classifier resize its images"
    )


def _notes(facts: DataFacts, size: int, accuracies: dict[int, float], probed: int) -> list[str]:
    """Return what to know where the classifier gets another size than the pictures have, or several were compared."""
    resized = (facts.height, facts.width) != (size, size)
    if not resized and len(accuracies) == 1:
        return []
    but = f"but the pictures have {facts.width}x{facts.height}" if resized else "as the pictures have"
    line = f"the classifier gets {size}x{size} pixels, {but}"
    if len(accuracies) > 1:
        by_size = ", ".join(f"{percent(right, 0)} at {side}" for side, right in sorted(accuracies.items()))
        line += f"; of {probed} training images it is right on {by_size}, {ON_AVERAGE}"
    return [f"{line}; if it was trained on another size, give that with --image-size"]


def _dense_notes(size: int) -> list[str]:
    """Return what to know where the β-VAE cannot halve a size down to DENSE_SIDE."""
    dense = size >> vae_stages(size)
    if dense <= DENSE_SIDE:
        return []
    return [
        f"the β-VAE can halve {size} pixels only to {dense}, so its dense layers are large and slow; pad or resize the "
        "images to a multiple of 16"
    ]


def _sections(facts: DataFacts, own: dict[str, Any] | None, size: int) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": facts.name,
        "root": str(facts.root),
        "image_size": size,
        "channels": facts.channels,
    }
    if "validation" not in facts.counts:
        data["validation_share"] = VALIDATION_SHARE
    return {
        "data": data,
        "classifier": dict(own) if own is not None else _new_classifier(facts, size),
        "vae": _vae(size, facts.channels) | ({"decode": "anchored"} if facts.photographs else {}),
    }


def _new_classifier(facts: DataFacts, size: int) -> dict[str, Any]:
    """Return section `classifier` where the user has none: Figure 7 for small grey images, else a ResNet-18."""
    optimizer: dict[str, Any] = {"optimizer": "adam", "learning_rate": 0.001}
    if facts.channels == 1 and size <= 32:
        stages = min(int(math.log2(size)) - 1, _halvings(size))
        return {"architecture": "cnn", "stages": max(1, stages), **optimizer}
    return {"architecture": "resnet18", "stem": "small" if size <= 64 else "imagenet", **optimizer}


def _vae(size: int, channels: int) -> dict[str, Any]:
    """Return the β-VAE for images of a size: width and codes by size and colour."""
    small = size <= 32 and channels == 1
    return {
        "architecture": "convolutional",
        "latent_dim": 16 if size <= 32 else 32,
        "encoder_stages": vae_stages(size),
        "channels": 16 if small else 32,
        "beta": 1.0,
        "class_weight": 20.0,
        "learning_rate": 0.003,
        "schedule": "one_cycle",
    }


def vae_stages(size: int) -> int:
    """Return how often the β-VAE halves images of a size: down to 4 pixels or so, and once at least."""
    return max(1, min(_halvings(size), int(math.log2(size)) - 2))


def _halvings(size: int) -> int:
    """Return how often a number of pixels can be halved."""
    return (size & -size).bit_length() - 1


def _run_file(tree: dict[str, Any]) -> RunFile:
    return parse_run_file(tree, "the suggested run file")


def _built(spec: RunFile, classes: int) -> nn.Module:
    classifier = build_classifier(spec, classes)
    load_pretrained(classifier, spec.classifier.weights, trained_on=False)
    return to_device(classifier).eval()


def set_probed(section: dict[str, Any], probe: ClassifierProbe) -> list[str]:
    """Write into section `classifier` what the classifier plainly needs and the section does not say.

    Returns notes of what was written, of what is better by little, since that may be due to the fault that is sought,
    and of nan, which ends a run.
    """
    notes = []
    if "input_range" not in section:
        notes += _set_range(section, probe, "0..1")
    if "class_order" not in section and probe.class_order is not None:
        notes.append(_set_order(section, probe, list(probe.class_order)))
    if nan := probe.nan_by_range[section.get("input_range", "0..1")]:
        notes.append(f"a run would end with an error: {returns_nan(nan, probe.images)}")
    return notes


def _set_range(section: dict[str, Any], probe: ClassifierProbe, given: str) -> list[str]:
    best = probe.best_range(given)
    if best == given:
        return []
    right = probe.in_best_range(given)
    if probe.range_to_set(given) == given:
        return [f"the classifier is {right}; set classifier.input_range: {best} if it was trained on that"]
    section["input_range"] = best
    order = "" if probe.class_order is None else ", before the classes are reordered"
    return [
        f"classifier.input_range is set to {best}: {right}{order}; remove it if it was trained on {given}"
    ]


def _set_order(section: dict[str, Any], probe: ClassifierProbe, order: list[int]) -> str:
    right = f"right on {percent(probe.reordered)} of training images that the order was not fitted to, {ON_AVERAGE}"
    wrong = probe.by_range[probe.needed_range] < least_plausible(probe.constant) <= probe.reordered
    if not (wrong and probe.order_is_certain and probe.as_bgr is None):
        some = "" if probe.order_is_certain else ", perhaps not for every class"
        return (
            f"the classifier seems to number the classes differently ({right}); set classifier.class_order: {order} "
            f"if it does{some}"
        )
    section["class_order"] = order
    return (
        f"classifier.class_order is set, since the classifier seems to number the classes differently ({right}); "
        "remove it if it does not"
    )


def probe_notes(probe: ClassifierProbe | None) -> list[str]:
    if probe is None:
        return []
    lines = [f"the classifier: {LIKE_SIGMOID}"] if probe.like_sigmoid else []
    lines += [f"the classifier is {line}" for line in probe.bgr_lines()]
    if probe.answers == 1 and probe.constant < 1:
        lines.append(
            f"the classifier gives all of {probe.images} training images one answer; check its weights and what it "
            "expects"
        )
    elif probe.best_accuracy < MOSTLY:
        lines.append(
            f"the classifier is right on only {percent(probe.best_accuracy, 0)} of {probe.images} training images, "
            f"{ON_AVERAGE}, in every input range and order of the classes; check its weights and what it expects"
        )
    elif probe.unanswered and probe.class_order is None:
        lines.append(
            f"the classifier never answers {first_few(probe.unanswered)} on {probe.images} training images, so many "
            "scenarios may show this alone; check its weights, and the labels"
        )
    return lines
