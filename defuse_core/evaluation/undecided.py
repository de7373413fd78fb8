"""Why a run could not tell where its classifier fails: doubts about its models, and about what was not reviewed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from defuse_core.artifacts import (
    F64,
    I64,
    NONE_OF_THE_ABOVE,
    Bool,
    Gallery,
    Health,
    Models,
    Psi,
    ReferenceSet,
    Scenarios,
    Verdicts,
)
from defuse_core.config import ReviewSection, RunFile, VaeSection
from defuse_core.config.base import fewest_units
from defuse_core.distill.components import MOST_SMALL_CELLS
from defuse_core.formatting import count_of, first_few, percent
from defuse_core.intervals import (
    SIGNIFICANT,
    binomial_tail,
    certain_loss,
    certain_mean_loss,
    discoveries,
    only_guesses,
)
from defuse_core.review.verdicts import tested_counts

if TYPE_CHECKING:
    from defuse_core.evaluation import Findings  # which imports health, and that this module

MOST_LOW_WEIGHT = 0.5  # share of Ψ in cells of little weight over which a run decides nothing
# share of Ψ in components whose draws could not be judged over which a run decides nothing, whatever was reviewed
MOST_UNJUDGED = 0.5
MOST_UNLABELLED = 0.5  # share of the components without a labelled image over which a run decides nothing
# share of the training images from which on failures, each too lonely for a scenario, leave it open
MANY_FAILING = 0.05
NEARLY_CERTAIN = 0.1  # p-value, uncorrected, up to which a component that is not significant stays undecided
# in accuracy on real images: models that are so much worse are often wrong where the classifier is right
WORSE_BY = 0.02
CHECK_CLASSIFIER = "check its weights, the input range and class order that it expects, and the labels"
BETTER_REFERENCES = (
    "train better ones, or use a pretrained network (review.reference.architecture: custom, import_path)"
)


def why_undecided(spec: RunFile, found: Findings) -> str | None:
    """Return why a run that accepted nothing could decide nothing, and what to do; None where it decided.

    A component that a person rejected is decided, and so is one that the classifier gets right; but a classifier that
    guesses, or a β-VAE or reference models that show too little, leave it open what the review was not shown. Where
    most of Ψ is in parts too small for a scenario, too, nothing shows which of both hid the failures: it names both.
    """
    gallery, verdicts, psi, scenarios = found.gallery, found.verdicts, found.psi, found.scenarios
    if len(verdicts.accepted):
        return None
    doubt = next(iter(doubts_about_models(spec, found.models, found.references)), None)
    small = _low_weight(spec, scenarios) or _scattered(scenarios, psi)
    if doubt is not None and small is not None:
        return f"{doubt}; also, {small}"
    cause = (
        doubt
        or _nothing_kept(psi)
        or small
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


def doubts_about_models(spec: RunFile, models: Models, references: ReferenceSet | None) -> list[str]:
    """Return why the models of a run may hide failures of the classifier, or show others, from the worst on.

    Each is a clause, "; " and what to do.
    """
    worse = worse_references(spec, models, references)
    causes = (why_guessing(models), _unfit_vae(spec.vae, models.health, worse), worse)
    return [cause for cause in causes if cause is not None]


def not_reviewed(scenarios: Scenarios) -> str | None:
    """Return how many components are not reviewed, since too few photographs show them, and what to do; or None."""
    few = [one for one in scenarios.dropped if one.cause == "uncertain"]
    if not few:
        return None
    return (
        f"{count_of(len(few), 'component')} {'is' if len(few) == 1 else 'are'} not reviewed ({few[0].reason}); try "
        "more photographs or tracks of these classes (data.train_images)"
    )


def are_worse(models: Sequence[float | None], classifier: float | None, images: int | None) -> bool:
    """Whether the best of some models is right on clearly fewer real images than the classifier, if both are known.

    Of so few `images` that the difference could be by chance (`certain_loss`), it is not.
    """
    known = [value for value in models if value is not None and math.isfinite(value)]
    if not known or classifier is None:
        return False
    best = max(known)
    loss = certain_loss(np.array([classifier]), np.array([best]), np.array([images or 0]))
    return classifier - best > WORSE_BY and (images is None or loss.item() > 0)


def worse_on_average(by_class: F64 | None, models: Models) -> str | None:
    """Return, in words, that the best of some models is right on clearly fewer images on average over the classes.

    `by_class` (W, C) are their accuracies on images of `compared_part`. Where nearly all images are of one class,
    models that always answer it are right on about as many as any. None where they are not worse, or it is not known.
    """
    part = compared_part(models)
    if by_class is None or part is None:
        return None
    right, images = models.class_accuracy[part], models.class_images[part]
    best = by_class[np.nanmean(by_class, axis=1).argmax()]
    mean, theirs = models.balanced_accuracy[part], float(np.nanmean(best))
    if mean - theirs <= WORSE_BY or not certain_mean_loss(right, best, images):
        return None
    loss = certain_loss(right, best, images, level=SIGNIFICANT / len(images))
    lost, least = "", int(loss.argmax())
    if loss[least]:
        lost = f" (of {models.classes[least]} on {percent(best[least])}, and the classifier on {percent(right[least])})"
    return (
        f"right on {percent(theirs)} of the {part} images on average over the classes, and the classifier on "
        f"{percent(mean)}{lost}"
    )


def unseen_part(accuracy: Mapping[str, float]) -> str | None:
    """Return the part whose images show best what a classifier knows: test, validation, or None."""
    return next((part for part in ("test", "validation") if part in accuracy), None)


def compared_part(models: Models) -> str | None:
    """Return the part that the classifier and other models are compared on, which none was trained on, or None.

    Validation images that may be of the classifier's own training (validation_from_training) are none.
    """
    part = unseen_part(models.accuracy)
    return None if part == "validation" and models.validation_from_training else part


def why_guessing(models: Models) -> str | None:
    """Return that the classifier is hardly better than guessing, and what to look at; None where it is better."""
    part = unseen_part(models.balanced_accuracy)
    if part is None:
        return None
    right = models.class_accuracy[part]
    if not only_guesses(right, models.class_images[part]):
        return None
    classes = int(np.isfinite(right).sum())  # that have images there
    of = count_of(models.images[part], f"{part} image")
    return (
        f"the classifier is hardly better than guessing (right on {percent(models.accuracy[part])} of {of}, and on "
        f"{percent(models.balanced_accuracy[part])} on average over their {classes} classes); {CHECK_CLASSIFIER}"
    )


def never_right(accuracy: Mapping[str, F64], images: Mapping[str, I64], classes: Sequence[str]) -> str | None:
    """Return which classes the classifier gets no image of right, in any part, and what to look at; None for none.

    `accuracy` and `images`, each (C,), are those of each part: the share that is right, nan of no image, and how many.
    """
    total = np.sum([images[part] for part in accuracy], axis=0)
    right = np.sum([np.nan_to_num(share) for share in accuracy.values()], axis=0)
    missed = np.flatnonzero((total > 0) & (right == 0))
    if not len(missed):
        return None
    of = count_of(int(total[missed].sum()), "image")
    return (
        f"the classifier is right on none of {of} of {first_few([classes[label] for label in missed])}, so many "
        f"scenarios may show this alone; {CHECK_CLASSIFIER}"
    )


def worse_references(spec: RunFile, models: Models, references: ReferenceSet | None) -> str | None:
    """Return that the reference models know less than the classifier, so that they cannot tell where it fails.

    None where they do not, or where nothing depends on what they tell.
    """
    used = "reference-models" in (spec.identify.screen, spec.review.annotators) or spec.review.tau == "auto"
    part = compared_part(models)
    if references is None or part is None or not used:
        return None
    if on_average := worse_on_average(references.class_accuracy.get(part), models):
        return (
            f"the reference models, which tell failures from unclear pictures, are at best {on_average}, so they may "
            f"take one for the other; {BETTER_REFERENCES}"
        )
    known = [share for share in getattr(references, part).tolist() if math.isfinite(share)]
    if not are_worse(known, models.accuracy[part], models.images[part]):
        return None
    return (
        f"the reference models, which tell failures from unclear pictures, are right on fewer {part} images (at best "
        f"{percent(max(known))}) than the classifier ({percent(models.accuracy[part])}), so they may take one for the "
        f"other; {BETTER_REFERENCES}"
    )


def _unfit_vae(section: VaeSection, health: Health, worse: str | None) -> str | None:
    """Return why the β-VAE is not fit; None where it is, or where only reference models say so that are `worse`."""
    collapsed = 2 * health.collapsed >= health.dimensions
    told_by_worse = worse is not None and health.judged_by != "classifier"
    if health.verdict == "fit" or (told_by_worse and not collapsed):
        return None
    on_average = "" if health.kept_on_average is None else ", on average over the classes,"
    kept = f"{percent(health.kept, 0)} of the right answers{on_average} are kept on"
    if collapsed:
        why = f"{health.collapsed} of {health.dimensions} latent dimensions are collapsed"
        shown, remedy = "may show few of the failures", "lower vae.beta or vae.latent_dim"
    elif health.anchored:
        why, shown = f"{kept} images moved by the noise", "may show no class any more"
        remedy = "compare reconstructions.png, and lower identify.scale"
    else:
        why, shown = f"{kept} reconstructions", "may show failures of its own"
        another = (
            "vae.architecture: convolutional"
            if section.architecture == "paper"
            else "a larger vae.latent_dim"
        )
        remedy = f"compare reconstructions.png, and train it longer, or with a smaller vae.beta or {another}"
    return f"the β-VAE is {health.verdict} ({why}), so its pictures {shown}; {remedy}"
