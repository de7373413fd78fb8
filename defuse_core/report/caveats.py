"""The headline of a report, and its caveats, which the page, the notebook and the terminal show beside it."""

from __future__ import annotations

from collections.abc import Sequence

from defuse_core.artifacts import NONE_OF_THE_ABOVE, Scenarios
from defuse_core.config import CorrectSection, DistillSection
from defuse_core.correct import no_lambda_chosen
from defuse_core.evaluation.undecided import are_worse
from defuse_core.formatting import count_of, first_few, percent
from defuse_core.intervals import share_with_bounds
from defuse_core.report.correction_caveats import (
    costs_a_class,
    fine_tuning_costs_too_much,
    no_better_than_baseline,
    no_better_than_plain_training,
    unconfirmed,
)
from defuse_core.report.schema import Report, is_low
from defuse_core.watch import FailureWatch


def headline(report: Report, correct: CorrectSection) -> str:
    """Return the result of the run in one or two sentences; `correct` is that of the run file."""
    components, accepted = report.scenarios.components, report.scenarios.accepted
    if report.scenarios.undecided is not None:
        return f"Could not tell: {report.scenarios.undecided}."
    if not components:
        return "No failure scenario was found: identification and distillation left nothing to review."
    if not accepted:
        none = f"None of the {components} candidate scenarios is"
        if components == 1:
            none = "The only candidate scenario is not"
        return f"{none} a failure scenario, so the classifier was left as it is."
    verb = "is a failure scenario" if accepted == 1 else "are failure scenarios"
    seen = _seen_in_real_images(report)
    result = f"{accepted} of {count_of(components, 'candidate scenario')} {verb}{seen and f' ({seen})'}."
    if report.chosen is None:
        failed = sum(trial.sweep == "defuse" for trial in report.failed_trials)
        return f"{result} Nothing was corrected: {no_lambda_chosen(len(report.tradeoff), failed)}."
    return f"{result} {_effect(report, correct)}"


def _seen_in_real_images(report: Report) -> str:
    """Return, as a clause, how many accepted scenarios real images show, and of how many these cannot tell.

    They are the nearest ones to a scenario, and its source images. Empty without judges.
    """
    rows = [(row.seen_in_training_images, row.evidence) for row in report.scenarios.list if row.evidence]
    if not rows:
        return ""
    known = [in_training or found.seen_in_real_data for in_training, found in rows]
    unknown = f", {known.count(None)} where these cannot tell" if None in known else ""
    shown = f"{known.count(True)} also" if True in known else "none"
    return f"{shown} seen in real images{unknown}"


def _effect(report: Report, correct: CorrectSection) -> str:
    before, after = report.accuracy.before, report.accuracy.defuse
    them = "its" if report.scenarios.accepted == 1 else "their"
    own = None if report.evidence is None or worse_judges(report) else report.evidence.own_label
    judged, others = "the scenario's label", list[str]()
    was_right, is_right = before.scenario, after.scenario
    if own is not None and own.before.value is not None:
        judged = "the judges' labels"
        was_right, is_right = own.before.value, own.defuse.value
        others = [f"{percent(own.plain.value)} after plain further training"]
        if own.baseline.value is not None:
            others.append(f"{percent(own.baseline.value)} after tuning on the reviewed failures alone")
    text = f"Accuracy on {them} held-out images, by {judged}: {percent(was_right)} before, {percent(is_right)} after"
    if others:
        text += f" ({', '.join(others)})"
    part = "test" if before.test is not None else "validation"
    was, now = getattr(before, part), getattr(after, part)
    if was is None or now is None:
        return f"{text}."
    plain = None if report.accuracy.plain is None else getattr(report.accuracy.plain, part)
    notes = [] if plain is None else [f"{percent(plain, 2)} after plain further training"]
    if part == "validation" and correct.choose_by in ("tune", "validation"):
        notes.append("not independent: λ was chosen on these images")
    noted = f" ({'; '.join(notes)})" if notes else ""
    return f"{text}. {part.capitalize()} set: {percent(was, 2)} before, {percent(now, 2)} after{noted}."


def nobody_judged(report: Report) -> str | None:
    """Return what is not known of a correction without judges; None with judges, or where nothing was corrected."""
    if report.evidence is not None or report.chosen is None:
        return None
    return (
        "Nobody judged the correction. Its accuracy on the scenarios is by the scenario's label, which it was tuned "
        "to give, and what plain further training (λ = 0) reaches there is unknown. Judges (judges.count in the run "
        "file) label every held-out image; with them the report compares the correction with plain further training."
    )


def low_purity(report: Report) -> str | None:
    """Return what a low purity means for the accuracy on the scenarios, or None where purity is not low.

    It is the lower one of what the reviewers and, unless they are worse than the classifier, the judges see.
    """
    purity, by, images = report.scenarios.purity, "", "images reviewed in"
    judged = None if report.evidence is None or worse_judges(report) else report.evidence.purity.value
    if judged is not None and (purity is None or judged < purity):
        purity, by, images = judged, " by the judges", "held-out images of"
    if purity is None or not is_low(purity):
        return None
    return (
        f"Purity{by} is {percent(purity, 0)}. Of the {images} the failure scenarios, "
        f"{percent(1 - purity, 0)} show another class than their scenario's label, or no clear class. "
        "Accuracy by the scenario's label counts that label as right for all of them, "
        f"so on mixed images a high accuracy is not yet a fix. {_by_image_labels(report)}"
    )


def _by_image_labels(report: Report) -> str:
    """Return the accuracy by the label of each image that can be trusted most: the judges', where it exists."""
    own, corrected = report.scenarios.own_labels, report.chosen is not None
    judged = None if report.evidence is None or worse_judges(report) else report.evidence.own_label
    if judged is not None and judged.before.value is not None:
        return (
            "By the judges' labels of the held-out images the classifier was right on "
            f"{percent(judged.before.value)} of them before"
            + (f", and is on {percent(judged.defuse.value)} now." if corrected else ".")
        )
    if own.tuned_on:
        now = f", {percent(own.defuse)} now" if corrected else ""
        return (
            "No accuracy by the annotators' labels is independent: the reviewed images are at photographs that are "
            f"tuned on ({percent(own.before)} right before{now}), and no judge labels held-out ones."
        )
    return (
        f"By the annotators' labels, {percent(own.before)} of the reviewed images were classified correctly before"
        f"{f', and {percent(own.defuse)} are now' if corrected else ''}."
    )


def worse_judges(report: Report) -> str | None:
    """Return what judges that are worse than the classifier mean, or None where they are not, or nobody judged."""
    if report.evidence is None or not report.evidence.judges.worse:
        return None
    judges = report.evidence.judges
    text = f"is {judges.worse_by_class}"
    if judges.worse_by_class is None:
        best = max(value for value in judges.accuracy if value is not None)
        text = f"gets {percent(best)} right, and the classifier before {percent(judges.classifier)}"
    return (
        "The judges are worse than the classifier. On real images the best of "
        f"{count_of(judges.count, 'judge')} {text}. Where they differ the judges "
        "may be wrong, so do not rely on figures by the judges' labels, purity by the judges, confirmed scenarios or "
        "verdicts on what is at fault; train better judges (section judges of the run file)."
    )


def uncompared_models(report: Report) -> str | None:
    """Return that no image shows whether judges are as good as the classifier; None where some do, or nobody judged."""
    run = report.run
    unseen = "validation" in run.images and not run.validation_from_training
    if report.evidence is None or unseen or "test" in run.images:
        return None
    why = "There are neither test nor validation images"
    if "validation" in run.images:
        why = (
            "There are no test images, and the classifier may have been trained on the validation images "
            "(data.validation_share), which the other models never saw"
        )
    return (
        "It is unknown whether judges and reference models are as accurate as the classifier. "
        f"{why}. Give test images (a folder named test)."
    )


def errors_without_codes(report: Report) -> str | None:
    """Return that most images that the classifier gets wrong have no code in Ψ, and why; None if that may be chance."""
    psi = report.psi
    if not _certainly_below_half(psi.wrong_kept, psi.wrong):
        return None
    if _certainly_below_half(psi.wrong_decoded, psi.wrong):
        why = (
            f"It gets {psi.wrong - psi.wrong_decoded:,} of them right once they are encoded and decoded, so the β-VAE "
            "does not draw what it fails on, which may be thin strokes or blur; train a sharper one, or try "
            "vae.decode: anchored."
        )
    elif psi.screened:
        why = (
            "On the others the classifier is right in every draw, or the reference models are not sure of the class "
            "(identify.min_probability), as where the image's label is wrong."
        )
    else:
        why = "On the others the classifier is right in every draw."
    return (
        "Scenarios cannot show most of the classifier's errors. "
        f"Of {count_of(psi.wrong, 'training image')} that it gets wrong, {psi.wrong_kept:,} "
        f"{'has' if psi.wrong_kept == 1 else 'have'} a failing draw in Ψ, and a scenario can come from no other. {why}"
    )


def _certainly_below_half(part: int, whole: int) -> bool:
    return bool(share_with_bounds(part, whole)[2] < 0.5)  # nan of no image


def made_worse(report: Report) -> str | None:
    """Return on which scenarios the classifier was right more often before; None where on none, or judges are worse."""
    rows = [(row.number, row.evidence) for row in report.scenarios.list if row.evidence is not None]
    worse = [(number, found) for number, found in rows if found.worse_than_before]
    if not worse or worse_judges(report):
        return None
    figures = [f"{number} ({percent(each.before)} to {percent(each.defuse)})" for number, each in worse]
    return (
        f"The correction makes the classifier worse on {count_of(len(worse), 'scenario')}. By the judges' labels of "
        f"the held-out images it was significantly more often right before, on: {', '.join(figures)}."
    )


def known_validation_images(report: Report) -> str | None:
    """Return what validation images mean that the classifier was probably trained on; None where nothing says so."""
    before, images = report.accuracy.before, report.run.images.get("test")
    if not report.run.validation_from_training or before.validation is None or before.test is None:
        return None
    if not are_worse([before.test], before.validation, images):
        return None
    return (
        "The classifier has probably seen the validation images, which are a share of the training images "
        f"(data.validation_share). It gets {percent(before.validation)} of them right and {percent(before.test)} of "
        "the test images, so they show little about the accuracy that a λ costs; give validation images that it was "
        "not trained on (a folder named validation)."
    )


def images_without_tracks(scenarios: Scenarios, watch: FailureWatch | None) -> str | None:
    """Return that some images count as independent although others have tracks, "; " and what to do; or None."""
    if watch is None:
        return None
    parts = {
        "validation": (watch.validation_wrong, watch.validation_tracks),
        "test": (watch.test_wrong, watch.test_tracks),
    }
    without = [part for part, (wrong, tracks) in parts.items() if len(wrong) and tracks is None]
    known = (scenarios.source_tracks, watch.validation_tracks, watch.test_tracks)
    if not without or all(tracks is None for tracks in known):
        return None
    return (
        f"{' and '.join(without)} images may show one object several times and count as independent here, so their "
        "intervals are too narrow and their p-values too small; other images of the run have tracks and these have "
        "none: give theirs if you know them"
    )


def unreviewed_classes(scenarios: Scenarios, classes: Sequence[str], distill: DistillSection) -> str | None:
    """Return which classes fail in cells (class, answer) of too little weight alone, "; " and what to do; or None."""
    heavy = {one.source for one in scenarios.dropped if one.weight > distill.min_weight}
    failing = {one.source for one in scenarios.dropped if one.cause == "few codes"}
    reviewed = {*scenarios.cells[:, 0].tolist(), *heavy, NONE_OF_THE_ABOVE}
    names = [classes[label] for label in sorted(failing - reviewed)]
    if not names:
        return None
    return (
        f"no failure of {first_few(names)} was reviewed: no cell (class, answer) of such images has over "
        f"{distill.min_weight:g} of the codes of Ψ; lower distill.min_weight"
    )


def answered_by_models(report: Report) -> str | None:
    """Return the caveat that no person answered, or None where people did."""
    if report.annotators == "people" or not report.votes.answers:
        return None
    return (
        "Reference models answered, not people. "
        f"The labels below come from {count_of(report.votes.annotators, 'classifier')} instead of annotators; "
        "use them as a rehearsal, not as ground truth."
    )


def prelabelled(report: Report) -> str | None:
    """Return the caveat that annotators saw a preselected answer, or None where they did not."""
    if "prelabel" not in report.votes.notes:
        return None
    return f"Answers were preselected. In the review {report.votes.notes['prelabel']}."


def not_the_majority(report: Report) -> str | None:
    """Return the caveat that CROWDLAB gave images another label than most people, or None where it did not."""
    votes = report.votes
    if not votes.not_majority:
        return None
    return (
        "Not every label is the majority's. With review.consensus: crowdlab, "
        f"{votes.not_majority:,} of {count_of(votes.labelled, 'labelled image')} "
        f"{'has' if votes.not_majority == 1 else 'have'} a label that is not the one most annotators chose, or that "
        "breaks a tie; at least two of them chose it."
    )


def caveats_of(report: Report, correct: CorrectSection, doubts: Sequence[str]) -> list[str]:
    """Return what a reader must know before the figures; the first sentence of each is its title.

    `correct` is that of the run file, whose limits chose λ; `doubts` are those about its models and what was reviewed.
    """
    judged = (unconfirmed, no_better_than_plain_training, no_better_than_baseline)
    found = (
        *[_as_sentences(doubt) for doubt in doubts if doubt not in (report.scenarios.undecided or "")],
        known_validation_images(report),
        worse_judges(report),
        uncompared_models(report),
        fine_tuning_costs_too_much(report, correct),
        made_worse(report),
        costs_a_class(report, correct),
        *([] if worse_judges(report) else [caveat(report) for caveat in judged]),
        nobody_judged(report),
        answered_by_models(report),
        prelabelled(report),
        not_the_majority(report),
        low_purity(report),
        errors_without_codes(report),
    )
    return [text for text in found if text]


def _as_sentences(doubt: str) -> str:
    """Return a clause and what to do, which the last "; " parts, as two sentences.

    The clause may name a class with "; ".
    """
    return " ".join(f"{part[0].upper()}{part[1:]}." for part in doubt.rsplit("; ", 1))
