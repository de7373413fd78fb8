"""What a sample of images shows about a classifier: the inputs that it expects, and the order of its classes.

Accuracies of a probe are means over the classes: where few images are of one class, most inputs that a classifier does
not expect leave it about as often right.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from defuse_core.artifacts import F32, F64, I64, Bool
from defuse_core.config import ClassifierSection, RunFile
from defuse_core.data import Images, Splits
from defuse_core.data.images import evenly_spaced
from defuse_core.device import device, is_device_failure, is_out_of_memory
from defuse_core.formatting import first_few, one_line, percent
from defuse_core.intervals import class_accuracy
from defuse_core.models.adapters import EXTERNAL, INPUT_RANGES, as_logits, classifier_failure, raw_output
from defuse_core.models.inference import map_batches
from defuse_core.models.layout import to_tensor
from defuse_core.models.programs import class_names_of, copy_for_inference, load_program

log = logging.getLogger("defuse")
MOST_SHOWN = 20  # classes in a line of the log
SAMPLE = 512  # training images, evenly spaced, of the accuracies by input range
COMPARED_IMAGES, COMPARED_AT_ONCE = 1_000, 100  # evenly spaced, that two classifiers are compared on
CLEARLY_BETTER, BETTER_RANGE = 0.05, 0.02  # in accuracy: another order of the classes, another input range
# accuracy from which another input range is likely the right one, and how much more than in the given one
MOSTLY, FAR_BETTER = 0.5, 0.2
LIKE_SIGMOID = (
    "its logits all lie in [0, 1], as after a sigmoid; if it ends in one, return what its sigmoid is given"
)
ON_AVERAGE = "on average over the classes"
SIGNIFICANT = 3.0  # standard errors of the share of images gained less that of images lost


@dataclass(frozen=True)
class ClassifierProbe:
    """What a sample of the training images shows about a classifier that is used as it is."""

    images: int
    by_range: dict[str, float]  # input range that it takes -> accuracy, the mean over the classes
    plain_by_range: dict[str, float]  # input range -> share of all images that are right
    best: str  # the best input range; of those that are about as good, the one that is right on most images
    constant: float  # accuracy of a constant answer, the mean over the classes
    best_is_certain: bool  # whether the best input range is better by more than chance explains
    needed_range: str  # the given one, unless it is under least_plausible() and another one far better
    # index of each class's logit, where another order is clearly better on images it was not fitted to
    class_order: tuple[int, ...] | None
    order_is_certain: bool  # whether the orders that fit either half of the images are one
    reordered: float  # accuracy in the other order, the mean over the classes, on images it was not fitted to
    names: tuple[str, ...] | None  # class names of the model's own configuration, in the order of its logits
    answers: int  # different classes among its answers
    like_sigmoid: bool  # whether all logits lie in [0, 1]
    nan_by_range: dict[str, int]  # input range -> images with a logit that is nan
    as_bgr: float | None = None  # accuracy with the channels reversed, where that explains the errors
    unanswered: tuple[str, ...] = ()  # classes of these images that are none of its answers

    @property
    def best_accuracy(self) -> float:
        """The accuracy in the best input range, in another order of the classes, or with the channels reversed."""
        return max([*self.by_range.values(), self.reordered if self.class_order else 0.0, self.as_bgr or 0.0])

    def accuracy_as_set(self, given: str) -> float:
        """Return `best_accuracy` without the input ranges that are not set: the gain may be by chance."""
        as_set = self.range_to_set(given)
        return replace(self, by_range={as_set: self.by_range[as_set]}).best_accuracy

    def bgr_lines(self) -> list[str]:
        """Return a line, to follow "the classifier is", where it seems to expect BGR images."""
        if self.as_bgr is None:
            return []
        rgb = percent(self.by_range[self.needed_range])
        return [
            f"right on {percent(self.as_bgr)} of {self.images} training images with the channels reversed, as OpenCV "
            f"reads them, on {rgb} in the order RGB, {ON_AVERAGE}; if it was trained on BGR, let its forward begin "
            "with images = images.flip(1)"
        ]

    def in_best_range(self, given: str) -> str:
        """Return how often it is right in `best_range` and in the given one, to follow "the classifier is"."""
        best = self.best_range(given)
        return (
            f"right on {percent(self.by_range[best])} of {self.images} training images with pixels in the range "
            f"{best}, on {percent(self.by_range[given])} with {given}, {ON_AVERAGE}"
        )

    def best_range(self, given: str) -> str:
        """Return the needed input range, or one that is clearly better where neither order nor BGR explains that."""
        if self.needed_range != given or self.class_order is not None or self.as_bgr is not None:
            return self.needed_range
        is_better = self.best_is_certain and self.by_range[self.best] > self.by_range[given] + BETTER_RANGE
        return self.best if is_better else given

    def range_to_set(self, given: str) -> str:
        """Return `best_range` where it is needed, or clearly better on average over the classes and of all images.

        Where a rare class is mostly missed, a wrong range that makes it the answer more often is better on average.
        """
        best = self.best_range(given)
        gains = [right[best] - right[given] for right in (self.by_range, self.plain_by_range)]
        return best if self.needed_range != given or min(gains) > CLEARLY_BETTER else given


def least_plausible(constant: float) -> float:
    """Return the accuracy below which a classifier hardly tells more than a constant answer, of accuracy `constant`.

    Both are means over the classes, or both shares of all images.
    """
    return max(MOSTLY, constant + CLEARLY_BETTER * (1 - constant))


def far_better_range(by_range: dict[str, float], given: str) -> str | None:
    """Return the input range that is far more often right than the given one, and mostly right; None without one."""
    best = max(by_range, key=lambda name: by_range[name])
    return best if by_range[best] >= max(MOSTLY, by_range[given] + FAR_BETTER) else None


def probe_classifier(
    classifier: nn.Module, section: ClassifierSection, images: Images, classes: Sequence[str]
) -> ClassifierProbe:
    """Return what SAMPLE training images, or some more, show: accuracy by input range, and the order of the classes.

    At least two images of each class are taken, where it has them, and of few classes more. The order is that of the
    model's own class names where it has those of the data set. Else it is fitted, and counts where it is clearly better
    on half of the images, which the order that is judged was not fitted to, and not clearly worse than images in BGR.
    Where a fitted order and BGR explain the errors alike, as those of classes that differ in colour, it has both.
    """
    least = max(2, SAMPLE // (4 * len(classes)))
    # each input range needs all of them
    sample = images.take(rows_of_all_classes(images.labels, len(classes), SAMPLE, least)).loaded()
    external = section.architecture in EXTERNAL
    logits = _logits_by_range(classifier, section, sample)
    answers = {name: found.argmax(axis=1) for name, found in logits.items()}
    right = {name: found == sample.labels for name, found in answers.items()}
    by_range = {name: mean_over_classes(found, sample.labels) for name, found in right.items()}
    plain = {name: float(found.mean()) for name, found in right.items()}
    # rare classes have more than their share of the sample
    weights = (np.bincount(images.labels) / np.maximum(1, np.bincount(sample.labels)))[sample.labels]
    of_all = {name: float(np.average(found, weights=weights)) for name, found in right.items()}
    most_common = float(np.bincount(sample.labels).max() / len(sample))
    names = class_names_of(classifier)
    is_named = set(names or ()) == set(classes)

    def order_in(input_range: str) -> _Order:
        if names is not None and is_named:
            named = np.array([names.index(name) for name in classes])
            return _named_order(answers[input_range], sample.labels, named)
        return _fitted_order(answers[input_range], sample.labels, len(classes))

    needed: str = section.input_range
    as_good = [name for name in logits if by_range[name] >= max(by_range.values()) - BETTER_RANGE]
    best = max(as_good, key=lambda name: of_all[name])
    before, after = right[needed], right[best]
    best_is_certain = _clearly_better(before, after, sample.labels, len(classes), BETTER_RANGE)
    other = order_in(needed)
    if max(plain[needed], other.reached) < least_plausible(most_common):
        orders = {name: order_in(name) for name in logits}  # each costs three assignments of all classes
        reached = {name: max(plain[name], orders[name].reached) for name in logits}
        reached[needed] = max(plain[needed], most_common)
        needed = far_better_range(reached, needed) or needed
        other = orders[needed]
    before, bgr = right[needed], _right_in_bgr(classifier, section, sample, needed)
    is_bgr = (
        _clearly_better(before, bgr, sample.labels, len(classes))
        and bgr.mean() >= other.reached - BETTER_RANGE
        and not (is_named and other.is_clearly_better)
    )
    is_reordered = other.is_clearly_better and not (is_bgr and bgr.mean() > other.reached + BETTER_RANGE)
    given = section.class_order or range(len(classes))  # the logits were reordered by it already
    order = tuple(given[index] for index in other.order) if is_reordered else None
    return ClassifierProbe(
        images=len(sample),
        by_range=by_range,
        plain_by_range=of_all,
        best=best,
        constant=1 / len(np.unique(sample.labels)),
        best_is_certain=best_is_certain,
        needed_range=needed,
        class_order=order,
        order_is_certain=other.is_certain,
        reordered=other.mean_right,
        names=names,
        answers=len(np.unique(answers[needed])),
        like_sigmoid=bool(external and ((logits[needed] >= 0) & (logits[needed] <= 1)).all()),
        nan_by_range={name: int(np.isnan(found).any(axis=1).sum()) for name, found in logits.items()},
        as_bgr=mean_over_classes(bgr, sample.labels) if is_bgr else None,
        unanswered=tuple(classes[label] for label in np.setdiff1d(sample.labels, answers[needed])),
    )


def rows_of_all_classes(labels: I64, classes: int, most: int, least: int) -> I64:
    """Return `most` evenly spaced rows, and evenly spaced ones of each class that has fewer than `least` there."""
    rows = evenly_spaced(len(labels), most)
    rare = np.flatnonzero(np.bincount(labels[rows], minlength=classes) < least)
    of_rare = [np.flatnonzero(labels == label) for label in rare]
    more = [own[evenly_spaced(len(own), least)] for own in of_rare if len(own)]
    sample: I64 = np.unique(np.concatenate([rows, *more]))
    return sample


def mean_over_classes(right: Bool, labels: I64) -> float:
    """Return the mean over the classes with an image of the share of it that is right."""
    return float(np.nanmean(class_accuracy(right, labels, int(labels.max()) + 1)))


@dataclass(frozen=True, eq=False)
class _Order:
    """An order of the logits, and what it does on images that it was not fitted to."""

    order: I64  # (C,) index of each class's logit
    is_clearly_better: bool
    is_certain: bool
    right: float  # share of these images
    mean_right: float  # mean over the classes

    @property
    def reached(self) -> float:
        return self.right if self.is_clearly_better else 0.0


def _named_order(answers: I64, labels: I64, order: I64) -> _Order:
    """Return the order of the model's own class names, which is not fitted, so that all images count."""
    before, after = answers == labels, answers == order[labels]
    is_better = after.mean() > before.mean() + CLEARLY_BETTER
    return _Order(order, bool(is_better), True, float(after.mean()), mean_over_classes(after, labels))


def _fitted_order(answers: I64, labels: I64, classes: int) -> _Order:
    """Return the order that fits all images; that which fits one half of each class is judged on the other."""
    by_class = np.argsort(labels, kind="stable")
    fitted, unseen = by_class[::2], by_class[1::2]  # both have images of every class that has two
    one, other = (fitting_order(answers[half], labels[half], classes) for half in (fitted, unseen))
    before, after = answers[unseen] == labels[unseen], answers[unseen] == one[labels[unseen]]
    present = np.unique(labels)
    return _Order(
        order=fitting_order(answers, labels, classes),
        is_clearly_better=_clearly_better(before, after, labels[unseen], classes),
        # of one class without an image, the others leave its logit
        is_certain=len(present) >= classes - 1 and bool((one == other)[present].all()),
        right=float(after.mean()) if len(after) else 0.0,
        mean_right=mean_over_classes(after, labels[unseen]) if len(after) else 0.0,
    )


def fitting_order(answers: I64, labels: I64, classes: int) -> I64:
    """Return for each class the answer that fits it in the best one-to-one assignment.

    A class without an image keeps its own answer, unless another class takes it.
    """
    from scipy.optimize import linear_sum_assignment  # takes a quarter of a second to import, in every worker

    table = 0.5 * np.eye(classes)  # less than one image
    np.add.at(table, (labels, answers), 1)
    order: I64 = linear_sum_assignment(table, maximize=True)[1]
    return order


def _clearly_better(
    before: Bool, after: Bool, labels: I64, classes: int, least: float = CLEARLY_BETTER
) -> bool:
    """Whether more of the same images are right after a change, by over `least`, and by more than chance explains.

    By the mean over the classes, above that of one answer for all: a classifier that knows nothing is more often right
    in an order that gives the largest class its most frequent answer.
    """
    counts = np.maximum(np.bincount(labels, minlength=classes), 1)  # (C,)
    changed = np.bincount(labels[after != before], minlength=classes) + 1  # few images may be right by luck
    right, gained = (float((each / counts[labels]).sum()) / classes for each in (after, after * 1.0 - before))
    by_chance = float((changed / counts**2).sum()) ** 0.5 / classes
    return right > 1 / classes + CLEARLY_BETTER and gained > max(least, SIGNIFICANT * by_chance)


def _logits_by_range(classifier: nn.Module, section: ClassifierSection, images: Images) -> dict[str, F64]:
    """Return the logits by input range, without those that a user's code refuses; Defuse's own get the given one."""
    found = {}
    for name in INPUT_RANGES if section.architecture in EXTERNAL else [section.input_range]:
        try:
            found[name] = _logits(classifier, section, images, name)
        except Exception as error:
            if name == section.input_range or is_out_of_memory(error) or is_device_failure(error):
                raise
            log.info("the classifier takes no images in %s: %s", name, one_line(error))
    return found


def _right_in_bgr(
    classifier: nn.Module, section: ClassifierSection, images: Images, input_range: str
) -> Bool:
    """Return which answers to the images in BGR are right, (n,): none for grey images and Defuse's own classifiers."""
    if section.architecture not in EXTERNAL or images.pixels.shape[1] != 3:
        return np.zeros(len(images), bool)
    logits = _logits(classifier, section, images, input_range, lambda batch: to_tensor(batch[:, ::-1].copy()))
    right: Bool = logits.argmax(axis=1) == images.labels
    return right


def _logits(
    classifier: nn.Module,
    section: ClassifierSection,
    images: Images,
    input_range: str,
    prepare: Callable[[F32], Tensor] = to_tensor,
) -> F64:
    def compute(rows: slice) -> Tensor:
        batch = prepare(images.batch(rows))
        if section.architecture not in EXTERNAL:
            logits: Tensor = classifier(batch)
            return logits
        return as_logits(raw_output(classifier, batch, input_range), section.outputs, section.class_order)

    return map_batches(compute, len(images), 64)


def log_classifier(
    spec: RunFile, classifier: nn.Module, splits: Splits, accuracies: dict[str, float]
) -> None:
    """Log what a classifier is that is used as it is, and warn of what looks wrong."""
    section = spec.classifier
    probe = probe_classifier(classifier, section, splits.train, splits.classes)
    right = ", ".join(
        f"{percent(share)} of {len(splits.parts()[part]):,} {part}" for part, share in accuracies.items()
    )
    log.info("classifier: right on %s images", right)
    log.info("classes, in the order of the logits: %s", _listed(splits.classes))
    if section.architecture in EXTERNAL:
        shares = ", ".join(f"{name} {percent(share)}" for name, share in probe.by_range.items())
        log.info(
            "classifier: balanced accuracy by input range on %d training images: %s", probe.images, shares
        )
    for warning in warnings_of(probe, section, splits.classes, accuracies["train"]):
        log.warning("classifier: %s", warning)


def warnings_of(
    probe: ClassifierProbe, section: ClassifierSection, classes: Sequence[str], accuracy: float
) -> list[str]:
    """Return one line for each thing that looks wrong with the classifier, with what to set."""
    lines, given = [], section.input_range
    if (best := probe.best_range(given)) != given:
        text = f"it is {probe.in_best_range(given)}; set classifier.input_range: {best} if it was trained on that"
        lines.append(text)
    lines += [f"it is {line}" for line in probe.bgr_lines()]
    if probe.class_order is not None:
        order = f"set classifier.class_order: [{', '.join(map(str, probe.class_order))}]"
        if len(classes) > MOST_SHOWN:
            order = "set classifier.class_order to what `defuse init` writes for these images and weights"
        lines.append(
            f"it seems to number the classes differently ({percent(probe.reordered)} right in another order, "
            f"{ON_AVERAGE}); if it does, {order}"
        )
    elif probe.names is not None and set(probe.names) != set(classes):
        lines.append(f"its configuration names other classes than the data set: {_listed(probe.names)}")
    if probe.like_sigmoid:
        lines.append(LIKE_SIGMOID)
    if probe.answers == 1:
        lines.append(f"it gives one answer for all of {probe.images} training images")
    if accuracy < 0.5:
        lines.append(
            f"it is right on only {percent(accuracy, 0)} of the training images; does it number the classes in this "
            f"order? {first_few(classes, most=MOST_SHOWN)}"
        )
    return lines


def _listed(names: Sequence[str]) -> str:
    return first_few([f"{index} {name}" for index, name in enumerate(names)], most=MOST_SHOWN)


def is_same_program(classifier: nn.Module, stored: bytes, images: Images) -> bool:
    """Whether the stored program has the classifier's weights, and gives its answers on images all over the set.

    Raises ModelError where the classifier fails on them.
    """
    program = load_program(stored, "the stored classifier").to(device())
    copied = copy_for_inference(classifier).to(device())
    own, same = copied.state_dict(), program.net.state_dict()
    if any(not torch.equal(own[name], same[name]) for name in own.keys() & same.keys()):
        return False
    sample = images.take(evenly_spaced(len(images), COMPARED_IMAGES))
    answer, recorded = (
        map_batches(partial(_logits_of_code, net, sample), len(sample), COMPARED_AT_ONCE)
        for net in (copied, program)
    )
    return answer.shape == recorded.shape and np.allclose(answer, recorded, rtol=1e-3, atol=1e-4)


def _logits_of_code(net: nn.Module, images: Images, rows: slice) -> Tensor:
    batch = torch.from_numpy(images.batch(rows)).to(device())  # in the layout that the user's code may expect
    try:
        return as_logits(net(batch), "logits", None)
    except Exception as error:
        raise classifier_failure(net, batch, error) from error
