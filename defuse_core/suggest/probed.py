"""What `defuse init` writes and notes of a classifier of the user's own, by what a sample of images shows about it."""

from __future__ import annotations

from typing import Any

from defuse_core.errors import percent
from defuse_core.models.probe import CLEARLY_BETTER, LIKE_SIGMOID, MOSTLY, ClassifierProbe, least_plausible


def set_probed(section: dict[str, Any], probe: ClassifierProbe) -> list[str]:
    """Write into section `classifier` what the classifier plainly needs and the section does not say.

    Returns notes of what was written, and of what is better by little, since that may be due to the fault that is
    sought.
    """
    notes = []
    if "input_range" not in section:
        notes += _set_range(section, probe, "0..1")
    if "class_order" not in section and probe.class_order is not None:
        notes.append(_set_order(section, probe, list(probe.class_order)))
    return notes


def _set_range(section: dict[str, Any], probe: ClassifierProbe, given: str) -> list[str]:
    best = probe.best_range(given)
    if best == given:
        return []
    right = (
        f"right on {percent(probe.by_range[best])} of {probe.images} training images with pixels in the range {best}, "
        f"on {percent(probe.by_range[given])} with {given}"
    )
    if probe.needed_range == given and probe.by_range[best] <= probe.by_range[given] + CLEARLY_BETTER:
        return [f"the classifier is {right}; set classifier.input_range: {best} if it was trained on that"]
    section["input_range"] = best
    order = "" if probe.class_order is None else ", before the classes are reordered"
    return [
        f"classifier.input_range is set to {best}: {right}{order}; remove it if it was trained on {given}"
    ]


def _set_order(section: dict[str, Any], probe: ClassifierProbe, order: list[int]) -> str:
    right = f"right on {percent(probe.reordered)} of training images that the order was not fitted to"
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
            "in every input range and order of the classes; check its weights and what it expects"
        )
    return lines
