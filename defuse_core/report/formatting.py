"""Figures and sentences as people read them: in the page, in the pictures and in the terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence

from defuse_core.intervals import SIGNIFICANT
from defuse_core.report.evidence_schema import Pairs
from defuse_core.report.schema import Mean, Report
from defuse_core.review.verdicts import why_inconclusive
from defuse_core.watch.figures import Share

# Below this the images of the scenarios show several classes, and accuracy on their one label means little.
LOW_PURITY = 0.8
# A best judge whose accuracy on real images is so much below the classifier's is often wrong where that one is right.
WORSE_JUDGE = 0.02
POWERS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
SHORT = 3  # class names with at most so many letters fit on an image; other classes are shown by number
NONE = "–"


def percent(value: float | None, digits: int = 1) -> str:
    """Return a fraction of 1 as a percentage: 98.97 %."""
    return NONE if value is None else f"{100 * value:.{digits}f} %"


def spread(mean: Mean) -> str:
    """Return a mean with its standard error: 91.2 ± 2.3 %."""
    error = "" if mean.standard_error is None else f" ± {100 * mean.standard_error:.1f}"
    return NONE if mean.mean is None else f"{100 * mean.mean:.1f}{error} %"


def interval(share: Share, digits: int = 1) -> str:
    """Return a share with its 95 % interval: 98.5 % (97.2–99.1); alone where it is no measurement."""
    if share.value is None or share.low is None or share.high is None:
        return percent(share.value, digits)
    return f"{percent(share.value, digits)} ({100 * share.low:.{digits}f}–{100 * share.high:.{digits}f})"


def score(share: Share) -> str:
    """Return a number between 0 and 1 with its 95 % interval, not as a percentage: 0.97 (0.95–0.98)."""
    if share.value is None or share.low is None or share.high is None:
        return NONE
    return f"{share.value:.3f} ({share.low:.3f}–{share.high:.3f})"


def change(before: float | None, after: float | None, digits: int = 2) -> str:
    """Return the signed difference of two fractions of 1 in percentage points; empty where either is missing."""
    if before is None or after is None:
        return ""
    points = round(100 * (after - before), digits)
    return f"{'+' if points > 0 else '−' if points < 0 else '±'}{abs(points):.{digits}f}"


def is_low(purity: float | None) -> bool:
    """Whether the images of a scenario are mixed."""
    return purity is not None and purity < LOW_PURITY


def lam_text(lam: float) -> str:
    """Return λ as a number or a power of ten: 0.1, 20, 10⁻⁷."""
    if lam == 0 or 1e-3 <= lam < 1e4:
        return f"{lam:g}"
    mantissa, exponent = f"{lam:e}".split("e")
    power = "10" + str(int(exponent)).translate(POWERS)
    return power if float(mantissa) == 1 else f"{float(mantissa):g}·{power}"


def lam_ranges(lams: Sequence[float], members: Sequence[int]) -> str:
    """Return the λ at the ascending indices `members`; three or more neighbours form a range: `10⁻⁷ – 0.1, 10`."""
    parts: list[str] = []
    start = 0
    for end in range(1, len(members) + 1):
        if end < len(members) and members[end] == members[end - 1] + 1:
            continue
        names = [lam_text(lams[i]) for i in members[start:end]]
        parts += names if len(names) < 3 else [f"{names[0]} – {names[-1]}"]
        start = end
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Return a time in the units that fit it: 0.4 s, 12 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: float) -> str:
    """Return a number of bytes in the unit that fits it: 12 B, 1.5 kB, 12 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def date_time(iso: str) -> str:
    """Return an ISO 8601 time to the minute, without its letters: 2025-01-01 10:00."""
    return iso.replace("T", " ")[:16] or NONE


def unbroken(text: str) -> str:
    """Return the text with no line break possible between a number and its percent sign."""
    return re.sub(r"(\d) %", "\\1\u00a0%", text)


def count_of(number: int, noun: str) -> str:
    """Return `1 image`, `2 images`, `12,345 images`. The plural of the noun ends in s."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def text_of(value: object) -> str:
    """Return a value of the annotators' notes as text."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    if value is None:
        return NONE
    return f"{value:g}" if isinstance(value, float) else str(value)


def names_are_short(classes: tuple[str, ...]) -> bool:
    """Whether class names fit on an image."""
    return max(map(len, classes)) <= SHORT


def answer_text(classes: tuple[str, ...], answer: int) -> str:
    """Return what an image shows for an answer: the class name, or the class number where names are long."""
    return classes[answer] if names_are_short(classes) else str(answer)


def headline(report: Report) -> str:
    """Return the result of the run in one or two sentences."""
    components, accepted = report.scenarios.components, report.scenarios.accepted
    unknown = _could_not_tell(report)
    if unknown is not None:
        return f"Could not tell: {unknown}."
    if not components:
        return "No failure scenario was found: identification and distillation left nothing to review."
    if not accepted:
        none = "The only component is not" if components == 1 else f"None of the {components} components is"
        return f"{none} a failure scenario, so the classifier was left as it is."
    verb = "is a failure scenario" if accepted == 1 else "are failure scenarios"
    result = f"{accepted} of {count_of(components, 'component')} {verb}."
    if report.chosen is None:
        return (
            f"{result} Nothing was corrected: every λ costs more clean accuracy than correct.max_loss allows."
        )
    return f"{result} {_effect(report)}"


def _could_not_tell(report: Report) -> str | None:
    """Return why a run without a failure scenario could not tell whether there is any; None where it could."""
    health = None if report.vae.health is None else report.vae.health.verdict
    failing = report.psi.failing_draws or 0
    cause = why_inconclusive(report.scenarios.accepted, health, failing, report.psi.codes)
    if cause == "β-VAE":
        return (
            "no component is a failure scenario, but the β-VAE's pictures are too "
            f"{'poor' if health == 'poor' else 'bad'} to find one"
        )
    if cause == "screen":
        return (
            "the reference models see the class of the image in none of "
            f"{count_of(failing, 'failing draw')}; train better ones, or lower identify.min_probability"
        )
    return report.scenarios.undecided


def _effect(report: Report) -> str:
    before, after = report.accuracy.before, report.accuracy.defuse
    them = "it" if report.scenarios.accepted == 1 else "them"
    text = f"On {them} the classifier goes from {percent(before.scenario)} to {percent(after.scenario)}"
    own = None if report.evidence is None or worse_judges(report) else report.evidence.own_label
    if own is not None and own.before.value is not None:
        text = f"Judged image by image, the classifier goes on {them} from {percent(own.before.value)} to "
        text += percent(own.defuse.value)
    clean = (("test", before.test, after.test), ("validation", before.validation, after.validation))
    for split, was, now in clean:
        if was is not None and now is not None:
            return f"{text}; on the {split} set from {percent(was, 2)} to {percent(now, 2)}."
    return f"{text}."


def purity_warning(report: Report) -> str | None:
    """Return what a low purity means for the accuracy on the scenarios, or None where purity is not low."""
    purity = report.scenarios.purity
    if purity is None or not is_low(purity):
        return None
    return (
        f"Purity is {percent(purity, 0)}. Of the images reviewed in the failure scenarios, "
        f"{percent(1 - purity, 0)} show another class than their scenario's label, or no clear class. "
        "Scenario accuracy counts the scenario's one label as right for all of them, "
        f"so on mixed images a high accuracy is not yet a fix. {_by_own_label(report)}"
    )


def _by_own_label(report: Report) -> str:
    """Return the accuracy by own label that can be trusted most: the judges' on held-out images, where it exists."""
    own = report.scenarios.own_labels
    judged = None if report.evidence is None or worse_judges(report) else report.evidence.own_label
    if judged is not None and judged.before.value is not None:
        return (
            "By the judges' label of each held-out image the classifier was right on "
            f"{percent(judged.before.value)} of them before, and is on {percent(judged.defuse.value)} now."
        )
    if own.tuned_on:
        return (
            "No figure by own label is independent: the reviewed images are at photographs that are tuned on "
            f"({percent(own.before)} right before, {percent(own.defuse)} now), and no judge labels held-out ones."
        )
    return (
        f"Judged each by its own label, {percent(own.before)} of the reviewed images were classified correctly "
        f"before, and {percent(own.defuse)} are now."
    )


def worse_judges(report: Report) -> str | None:
    """Return what judges that are worse than the classifier mean, or None where they are not, or nobody judged."""
    if report.evidence is None:
        return None
    judges = report.evidence.judges
    best = max((value for value in judges.accuracy if value is not None), default=None)
    if best is None or judges.classifier is None or best >= judges.classifier - WORSE_JUDGE:
        return None
    return (
        f"The judges are worse than the classifier. On real images the best of {count_of(judges.count, 'judge')} gets "
        f"{percent(best)} right, and the classifier before {percent(judges.classifier)}. Where both differ the judges "
        "may be wrong, so no figure by own label, no purity by the judges, no confirmed scenario and no verdict on "
        "what is at fault can be relied on; train better judges (section judges of the run file)."
    )


def pairs_text(pairs: Pairs | None) -> str:
    """Return how many pairs are better and worse than with plain further training: +54 −82, p = 0.02."""
    return NONE if pairs is None else f"+{pairs.better} −{pairs.worse}, p = {pairs.p_value:.2g}"


def pairs_in_words(pairs: Pairs) -> str:
    """Return the same for a sentence: better on 54, worse on 82, p = 0.02."""
    return f"better on {pairs.better}, worse on {pairs.worse}, p = {pairs.p_value:.2g}"


def unconfirmed(report: Report) -> str | None:
    """Return on which scenarios the correction does no more than plain further training, or None where on none.

    Scenarios with too few images to tell are no failures of a test; where none has enough, it says so.
    """
    judged = [(row.number, row.evidence) for row in report.scenarios.list if row.evidence is not None]
    tested = [(number, found) for number, found in judged if found.confirmed is not None]
    few = sum(found.confirmed is None and found.independent_images is not None for _, found in judged)
    untold = f"On {count_of(few, 'scenario')} there are too few photographs to tell" if few else ""
    if few and not tested:
        return f"{untold} whether the correction does more than plain further training (λ = 0)."
    rows = [number for number, found in tested if not found.confirmed]
    if not rows:
        return None
    numbers = ", ".join(map(str, rows))
    return (
        f"The correction is confirmed on {len(tested) - len(rows)} of {count_of(len(tested), 'scenario')}. By the "
        "judges' label of each held-out image the classifier is not significantly more often right than after plain "
        f"further training (λ = 0), which has not seen the scenarios, on: {numbers}."
        + (f" {untold}." if few else "")
    )


def no_better_than_plain_training(report: Report) -> str | None:
    """Return on what the same fine-tuning without scenarios does as much or more; None where it does less."""
    evidence = report.evidence
    if evidence is None or report.chosen is None:
        return None
    against, own, left_out = evidence.against_plain, evidence.own_label, evidence.left_out
    worse, equal, untold, figures = list[str](), list[str](), list[str](), list[str]()
    scenarios = report.scenarios.accepted
    for name, shares, pairs in (
        ("the scenarios", own, against.scenarios),
        ("scenarios left out of the tuning", left_out, against.left_out),
        ("real failures", evidence.real_failures, against.real_failures),
    ):
        if pairs is None:
            continue
        certain = pairs.p_value < SIGNIFICANT
        if certain and pairs.better > pairs.worse:
            continue
        too_few = name != "real failures" and not can_be_significant(scenarios)
        (worse if certain else untold if too_few else equal).append(name)
        defuse, plain = percent(shares.defuse.value), percent(shares.plain.value)
        figures.append(f"{name} {defuse} and {plain} ({pairs_in_words(pairs)})")
    claims = [f"does more for {' and '.join(worse)}"] if worse else []
    if equal:
        claims.append(f"may do as much for {' and '.join(equal)}")
    notices = [f"Plain further training {', and '.join(claims)}."] if claims else []
    if untold:
        notices.append(
            f"{count_of(scenarios, 'scenario')} {'is' if scenarios == 1 else 'are'} too few to tell whether plain "
            f"further training does as much for {' and '.join(untold)}."
        )
    if not notices:
        return None
    return (
        f"{' '.join(notices)} It is the same fine-tuning without scenarios (λ = 0). By the judges' labels are right, "
        f"after the correction and after plain further training: {', '.join(figures)}."
    )


def can_be_significant(pairs: int) -> bool:
    """Whether the two-sided sign test over so many pairs could be significant, if all were better."""
    return bool(2 * 0.5**pairs < SIGNIFICANT)


def unfit_vae(report: Report) -> str | None:
    """Return what a poor or blind β-VAE means for the result, or None where it is fit or was not measured."""
    health = report.vae.health
    if health is None or health.verdict == "fit":
        return None
    if health.anchored:
        judges = "reference models get" if health.judged_by != "classifier" else "classifier gets"
        return (
            f"The β-VAE is {health.verdict}. The {judges} {percent(health.originals_right)} of the training images "
            f"right, and {percent(health.reconstructions_right)} of them once the noise has moved them, so many of the "
            "failures found may show no class any more. Compare reconstructions.png, and lower identify.scale."
        )
    return (
        f"The β-VAE is {health.verdict}. The classifier gets {percent(health.originals_right)} of the training images "
        f"right, and {percent(health.reconstructions_right)} of their reconstructions, so many of the failures found "
        "may be failures of the β-VAE. Compare reconstructions.png, and train it longer, or with "
        "a smaller vae.beta or vae.architecture: convolutional."
    )


def answered_by_models(report: Report) -> str | None:
    """Return the notice that no person answered, or None where people did."""
    if report.annotators == "people":
        return None
    return (
        "Reference models answered, not people. "
        f"The labels below come from {count_of(report.votes.annotators, 'classifier')} in place of annotators; "
        "use them as a rehearsal, not as ground truth."
    )


def prelabelled(report: Report) -> str | None:
    """Return the notice that annotators saw a preselected answer, or None where they did not."""
    if "prelabel" not in report.votes.notes:
        return None
    return f"Answers were preselected. In the review {report.votes.notes['prelabel']}."


def caveats(report: Report) -> list[str]:
    """Return what a reader must know before the figures. The first sentence of each is its title."""
    notices = (
        unfit_vae(report),
        worse_judges(report),
        unconfirmed(report),
        no_better_than_plain_training(report),
        answered_by_models(report),
        prelabelled(report),
        purity_warning(report),
    )
    return [text for text in notices if text]
