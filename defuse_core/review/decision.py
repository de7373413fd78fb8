"""What the decision on a component counts, images or the photographs that they show, and its reason in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from defuse_core.artifacts import F64, I64, NONE_OF_THE_ABOVE, Bool, Gallery, MoreImages
from defuse_core.errors import count_of


@dataclass(frozen=True, eq=False)
class Units:
    """What pictures of components with vae.decode: anchored show: images of the training set, or tracks of them.

    Pictures of one unit succeed or fail together, so that they are one piece of evidence.
    """

    failing: I64  # (S,) units whose labelled pictures are misclassified in more than rho
    total: I64  # (S,) units with a labelled picture
    name: str  # of one of them


def outcomes(predicted: I64, labels: I64) -> I64:
    """Return 1 for each misclassified image, 0 for one that is right, -1 for one without a label."""
    return np.where(labels == NONE_OF_THE_ABOVE, -1, labels != predicted).astype(np.int64)


def count_units(gallery: Gallery, labels: I64, more: MoreImages | None, rho: float) -> Units | None:
    """Return the units of the images with `labels` (S, R), and of `more`; None where images are decoded plainly."""
    if gallery.unit is None:
        return None
    unit, outcome = gallery.unit, outcomes(gallery.predicted, labels)
    if more is not None and more.unit is not None and more.outcome is not None:
        unit = np.concatenate([unit, more.unit], axis=1)
        outcome = np.concatenate([outcome, more.outcome], axis=1)
    failing, total = np.zeros((2, len(unit)), np.int64)
    for component, known in enumerate(outcome >= 0):
        names, row = np.unique(unit[component, known], return_inverse=True)
        hits, of = np.bincount(row, outcome[component, known], len(names)), np.bincount(row)
        failing[component], total[component] = (hits / of > rho).sum(), len(names)
    return Units(failing, total, "photograph" if gallery.track is None else "track")


@dataclass(frozen=True, eq=False)
class Shares:
    """The share of each component's labelled images that is misclassified, and what it is held against."""

    misclassified: F64  # (S,)
    labelled: I64  # (S,)
    rho: float
    max_false: float | None  # None where the share itself decides
    units: Units | None

    def found(self, component: int) -> str:
        """Return what was found on one component."""
        share = float(self.misclassified[component])
        count = int(self.labelled[component])
        images, verb = count_of(count, "labelled image"), "is" if count == 1 else "are"
        if self.units is None:
            return f"{share:.0%} of {images} {verb} misclassified"
        failing, total = int(self.units.failing[component]), int(self.units.total[component])
        of = count_of(total, self.units.name)
        at = "" if failing == total else f", over {self.rho:.0%} at {failing} of them"
        return f"{share:.0%} of {images} of {of} {verb} misclassified{at}"

    def why_not(self, component: int) -> str:
        """Return the requirement that one component does not meet."""
        if self.max_false is None:
            return f"not over {self.rho:.0%}"
        needed = fewest_units(self.rho, self.max_false)
        if self.units is None or self.units.total[component] >= needed:
            return f"not over {self.rho:.0%} with certainty"
        return f"not over {self.rho:.0%} with certainty, for which at least {needed} {self.units.name}s are needed"


def fewest_units(rho: float, max_false: float) -> int:
    """Return the fewest units that can show a share over rho at a false discovery rate: all of them failing."""
    return 1 if rho == 0 else math.ceil(math.log(max_false) / math.log(rho))


def decide(
    fails: Bool, voted: I64, reviewed: Bool, shares: Shares, classes: tuple[str, ...]
) -> tuple[I64, list[str]]:
    """Return the label of each component, (S,), NONE_OF_THE_ABOVE for a rejected one, and the reasons.

    `fails` (S,) says which shares are high enough, `voted` (S,) has the majority's labels, NONE_OF_THE_ABOVE for a tie,
    and `reviewed` (S,) says which components have a reviewed image with a label.
    """
    labels, reasons = np.full(len(voted), NONE_OF_THE_ABOVE, np.int64), []
    for component, label in enumerate(voted):
        if shares.labelled[component] == 0:
            reasons.append("rejected: no image has a label")
        elif not fails[component]:
            reasons.append(f"rejected: {shares.found(component)}, {shares.why_not(component)}")
        elif label == NONE_OF_THE_ABOVE:
            why = "labels are tied" if reviewed[component] else "no reviewed image has a label"
            reasons.append(f"rejected: {shares.found(component)}, but {why}")
        else:
            labels[component] = label
            reasons.append(f"accepted as {classes[label]}: {shares.found(component)}")
    return labels, reasons
