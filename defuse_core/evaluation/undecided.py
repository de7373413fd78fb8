"""Whether a run without a failure scenario shows that the classifier has none, or could not tell."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from defuse_core.artifacts import NONE_OF_THE_ABOVE, Bool, Gallery, Psi, Scenarios, Verdicts
from defuse_core.config import ReviewSection, RunFile
from defuse_core.config.base import fewest_units
from defuse_core.distill.components import MOST_SMALL_CELLS
from defuse_core.evaluation import Findings
from defuse_core.formatting import count_of, percent
from defuse_core.intervals import binomial_tail, discoveries
from defuse_core.review.undecided import BETTER_REFERENCES, doubts_about_models, not_reviewed
from defuse_core.review.verdicts import tested_counts

MOST_LOW_WEIGHT = 0.5  # share of Ψ in cells of little weight over which a run decides nothing
# share of Ψ in components whose draws could not be judged over which a run decides nothing, whatever was reviewed
MOST_UNJUDGED = 0.5
MOST_UNLABELLED = 0.5  # share of the components without a labelled image over which a run decides nothing
# share of the training images from which on failures, each too lonely for a scenario, leave it open
MANY_FAILING = 0.05
NEARLY_CERTAIN = 0.1  # p-value, uncorrected, up to which a component that is not significant stays undecided


def why_undecided(spec: RunFile, found: Findings) -> str | None:
    """Return why a run that accepted nothing could decide nothing, and what to do; None where it decided.

    A component that a person rejected is decided, and so is one that the classifier gets right; but a classifier that
    guesses, or a β-VAE or reference models that show too little, leave it open what the review was not shown.
    """
    gallery, verdicts, psi, scenarios = found.gallery, found.verdicts, found.psi, found.scenarios
    if len(verdicts.accepted):
        return None
    doubts = doubts_about_models(spec, found.models, found.references)
    cause = (
        next(iter(doubts), None)
        or _nothing_kept(psi)
        or _low_weight(spec, scenarios)
        or _scattered(scenarios, psi)
        or _most_unjudged(spec.review, scenarios, psi.total, len(gallery))
    )
    if cause is not None or not len(gallery):
        return cause
    open_ones = np.ones(len(gallery), np.bool_)
    open_ones[[override.scenario for override in verdicts.overrides]] = False
    unlabelled = int((open_ones & (verdicts.image_labels == NONE_OF_THE_ABOVE).all(axis=1)).sum())
    if unlabelled > MOST_UNLABELLED * len(gallery):
        of = f"in {unlabelled} of {count_of(len(gallery), 'candidate scenario')} no"
        return (
            f"{'no' if unlabelled == len(gallery) else of} reviewed image has a label, since nobody chose a class or "
            "the votes are tied; ask more annotators, or find out why the images show no class"
        )
    return _too_few_units(spec.review, gallery, verdicts, open_ones) or not_reviewed(scenarios)


def _nothing_kept(psi: Psi) -> str | None:
    """Return that the screen left nothing of what fails."""
    if psi.total or not psi.failing:
        return None
    return (
        f"the reference models see the class of the image in none of {count_of(psi.failing, 'failing draw')}; "
        f"{BETTER_REFERENCES}, or lower identify.min_probability"
    )


def _low_weight(spec: RunFile, scenarios: Scenarios) -> str | None:
    """Return that most of Ψ is in cells, not of few images, or components that were dropped for their weight."""
    least = spec.distill.min_weight
    cells = [one.weight for one in scenarios.dropped if one.cause == "few codes"]
    components = scenarios.all_weights[scenarios.all_weights <= least]
    low = sum(cells) + float(components.sum())
    if low <= MOST_LOW_WEIGHT:
        return None
    where = f"{_number_of(cells)} cells (class, answer)" if cells else "components"
    if cells and components.any():
        where += ", or in components,"
    return (
        f"{percent(low, 0)} of the codes of Ψ are in {where} of at most {least:g} of them each; lower "
        "distill.min_weight"
    )


def _number_of(cells: Sequence[object]) -> str:
    """Return in words how many cells there are, of which some may count as one."""
    return f"over {MOST_SMALL_CELLS:,}" if len(cells) > MOST_SMALL_CELLS else str(len(cells))


def _scattered(scenarios: Scenarios, psi: Psi) -> str | None:
    """Return that most of Ψ is in components and cells too small for a scenario, although many images fail."""
    small = [one for one in scenarios.dropped if one.small]
    weight, support = sum(one.weight for one in small), sum(one.support for one in small)
    if weight <= MOST_LOW_WEIGHT or support <= MANY_FAILING * psi.images:
        return None
    return (
        f"{percent(weight, 0)} of the codes of Ψ, of up to {percent(support / psi.images, 0)} of the training images, "
        f"are in {_number_of(small)} components or cells (class, answer) of too few codes or images each; try more "
        "training images (data.train_images), more identify.draws, or a smaller distill.min_support"
    )


def _too_few_units(
    review: ReviewSection, gallery: Gallery, verdicts: Verdicts, open_ones: Bool
) -> str | None:
    """Return how many components are misclassified in over rho, but in too few pictures to be certain.

    Those with enough pictures count if their own p-value is small, but not significant among so many tests.
    """
    max_false = review.false_discovery_rate
    if max_false is None:
        return None
    needed = fewest_units(review.rho, max_false)
    hits, total = tested_counts(verdicts)
    tail = binomial_tail(hits, total, review.rho)
    nearly = (tail <= NEARLY_CERTAIN) & ~discoveries(tail, max_false)
    found = open_ones & (hits > review.rho * total) & (nearly | (total < needed))
    count = int(found.sum())
    if not count:
        return None
    noun, remedy = "image", "review more images of each (review.images)"
    if verdicts.units is not None:
        noun = "photograph" if gallery.track is None else "track"
        remedy += ", or give identification more photographs"
    lack = "that is not significant (review.max_false)"
    if (total[found] < needed).all():
        lack = (
            f"show{'s' if count == 1 else ''} fewer than the {count_of(needed, noun)} that significance takes"
        )
    return (
        f"{count} of {count_of(len(gallery), 'candidate scenario')} fail{'s' if count == 1 else ''} in over "
        f"{percent(review.rho, 0)} (review.rho), but {lack}; {remedy}"
    )


def _most_unjudged(review: ReviewSection, scenarios: Scenarios, codes: int, reviewed: int) -> str | None:
    """Return why no component was left to review, or little of Ψ; None where the others say that it does not fail.

    They do where components are small, since few codes are no scenario, and where the classifier is right on most of
    the other ones: those hold more codes than the ones whose draws could not be judged.
    """
    dropped = scenarios.dropped
    if not codes:
        return None
    unjudged = [one for one in dropped if not (one.small or one.cause == "right")]
    weight = sum(one.weight for one in unjudged)
    right = sum(one.weight for one in dropped if one.cause == "right")
    if not unjudged or right > weight or (reviewed and weight <= MOST_UNJUDGED):
        return None
    if all(one.cause == "uncertain" for one in unjudged):
        return not_reviewed(scenarios)  # in its words, which are then no caveat, too
    heaviest = max(unjudged, key=lambda one: one.weight)
    remedy = "more identify.draws or better reference models"
    if heaviest.cause in ("undivided", "uncertain"):
        remedy = "more photographs or tracks of these classes (data.train_images)"
    elif review.tau == "auto":
        remedy = "more identify.draws, better reference models, or a smaller review.purity or review.failing"
    left = f"only {count_of(reviewed, 'component')}" if reviewed else "no component"
    return (
        f"Ψ has {count_of(codes, 'code')}, but {left} {'were' if reviewed > 1 else 'was'} left to review "
        f"({len(unjudged)} could not be judged, the heaviest since {heaviest.reason}); try {remedy}"
    )
