"""Doubts whether a run can tell where its classifier fails: of its models, and of what was not reviewed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from defuse_core.artifacts import F64, I64, Health, Models, ReferenceSet, Scenarios
from defuse_core.config import RunFile
from defuse_core.formatting import count_of, percent
from defuse_core.intervals import SIGNIFICANT, certain_loss, certain_mean_loss, highest_mean, wilson

# in accuracy on real images: models that are so much worse are often wrong where the classifier is right
WORSE_BY = 0.02
LEAST_SKILL = 0.1  # skill below which a classifier guesses: 0 is as right as guessing, 1 is always right
GOOD_SKILL = 0.5  # skill of a good one: images so few that it may be one do not show that it guesses
CHECK_CLASSIFIER = "check its weights, the input range and class order that it expects, and the labels"
BETTER_REFERENCES = (
    "train better ones, or use a pretrained network (review.reference.architecture: custom, import_path)"
)


def doubts_about_models(spec: RunFile, models: Models, references: ReferenceSet | None) -> list[str]:
    """Return why the models of a run may hide failures of the classifier, or show others, from the worst on.

    Each is a clause, "; " and what to do.
    """
    worse = worse_references(spec, models, references)
    causes = (why_guessing(models), _unfit_vae(models.health, worse), worse)
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


def only_guesses(right: F64, counts: I64) -> bool:
    """Whether a classifier is hardly better than one that does not look at the images.

    It is right on shares (C,) of the `counts` (C,) images of each class, none of which it was trained on. The mean over
    the classes is at most 1/classes for all answers that do not depend on the image, such as the most frequent class.
    False for images of a single class, and for so few that a good classifier could be right on such shares by chance:
    the only image of a class shows next to nothing.
    """
    classes, images = int((counts > 0).sum()), int(counts.sum())
    if classes < 2:
        return False
    chance, mean = 1 / classes, float(np.nanmean(right))
    possible = wilson(np.array([mean * images]), np.array([images]))[1].item()
    return (
        mean < 2 * chance
        and mean - chance < LEAST_SKILL * (1 - chance)
        and possible - chance < GOOD_SKILL * (1 - chance)
        and highest_mean(right, counts) - chance < GOOD_SKILL * (1 - chance)
    )


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


def _unfit_vae(health: Health, worse: str | None) -> str | None:
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
        remedy = (
            "compare reconstructions.png, and train it longer, or with a smaller vae.beta or vae.architecture: "
            "convolutional"
        )
    return f"the β-VAE is {health.verdict} ({why}), so its pictures {shown}; {remedy}"
