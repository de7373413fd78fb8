"""Figures and sentences as people read them: in the page, in the pictures and in the terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence

from defuse_core.intervals import SIGNIFICANT
from defuse_core.report.evidence_schema import EvidenceFigures, FourShares, Pairs
from defuse_core.report.schema import Mean, Report
from defuse_core.review.verdicts import why_inconclusive
from defuse_core.watch.figures import Share

# Below this the images of the scenarios show several classes, and accuracy on their one label means little.
LOW_PURITY = 0.8
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


def spread_of(values: Sequence[float | None], digits: int = 1) -> str:
    """Return the lowest and highest of several shares, in percent: 69.0–89.1 %; empty for fewer than two."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return ""
    return f"{100 * min(known):.{digits}f}–{percent(max(known), digits)}"


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
    health = None if report.vae.health is None else report.vae.health.verdict
    failing = report.psi.failing_draws or 0
    cause = why_inconclusive(accepted, health, failing, report.psi.codes)
    if cause == "β-VAE":
        return (
            "Could not tell: no component is a failure scenario, but the β-VAE's pictures are too "
            f"{'poor' if health == 'poor' else 'bad'} to find one."
        )
    if cause == "screen":
        return (
            "Could not tell: the reference models see the class of the image in none of "
            f"{count_of(failing, 'failing draw')}; train better ones, or lower identify.min_probability."
        )
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


def _effect(report: Report) -> str:
    before, after = report.accuracy.before, report.accuracy.defuse
    them = "it" if report.scenarios.accepted == 1 else "them"
    text = f"On {them} the classifier goes from {percent(before.scenario)} to {percent(after.scenario)}"
    own = None if report.evidence is None else report.evidence.own_label
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
    own = report.scenarios.own_labels
    return (
        f"Purity is {percent(purity, 0)}. Of the images reviewed in the failure scenarios, "
        f"{percent(1 - purity, 0)} show another class than their scenario's label, or no clear class. "
        "Scenario accuracy counts the scenario's one label as right for all of them, "
        "so on mixed images a high accuracy is not yet a fix. Judged each by its own label, "
        f"{percent(own.before)} of the reviewed images were classified correctly before, and "
        f"{percent(own.defuse)} are now."
    )


def pairs_text(pairs: Pairs | None) -> str:
    """Return how many pairs are better and worse than with plain further training: +54 −82, p = 0.02."""
    return NONE if pairs is None else f"+{pairs.better} −{pairs.worse}, p = {pairs.p_value:.2g}"


def pairs_in_words(pairs: Pairs) -> str:
    """Return the same for a sentence: better on 54, worse on 82, p = 0.02."""
    return f"better on {pairs.better}, worse on {pairs.worse}, p = {pairs.p_value:.2g}"


def unconfirmed(report: Report) -> str | None:
    """Return on which scenarios the correction does no more, or less, than plain further training; None where on none.

    Scenarios with too few images to tell are no failures of a test.
    """
    tested = [
        row
        for row in report.scenarios.list
        if row.evidence is not None and row.evidence.confirmed is not None
    ]
    rows = [row for row in tested if row.evidence is not None and not row.evidence.confirmed]
    if not rows:
        return None
    worse = [str(row.number) for row in rows if row.evidence is not None and row.evidence.worse]
    equal = [str(row.number) for row in rows if row.evidence is not None and not row.evidence.worse]
    than = "than after plain further training (λ = 0), which has not seen the scenarios, on: "
    claims = []
    if worse:
        claims.append(f"significantly less often right {than}{', '.join(worse)}")
        than = "on: "
    if equal:
        claims.append(f"not significantly more often right {than}{', '.join(equal)}")
    title = f"The correction is confirmed on {len(tested) - len(rows)} of {count_of(len(tested), 'scenario')}"
    if worse:
        title += f", and worse than plain further training on {len(worse)}"
    return f"{title}. By the judges' label of each held-out image the classifier is {'; '.join(claims)}."


def no_better_than_plain_training(report: Report) -> str | None:
    """Return on what the same fine-tuning without scenarios does as much or more; None where it does less."""
    evidence = report.evidence
    if evidence is None or report.chosen is None:
        return None
    against, own = evidence.against_plain, evidence.own_label
    worse, equal, figures = list[str](), list[str](), list[str]()
    real = evidence.real_failures
    for name, after, plain, pairs in (
        ("the scenarios", own.defuse.value, own.plain.value, against.scenarios),
        _left_out_against_plain(evidence),
        ("real failures", real.defuse.value, real.plain.value, against.real_failures),
    ):
        if pairs is None:
            continue
        certain = pairs.p_value < SIGNIFICANT
        if certain and pairs.better > pairs.worse:
            continue
        (worse if certain and pairs.worse > pairs.better else equal).append(name)
        figures.append(f"{name} {percent(after)} and {percent(plain)} ({pairs_in_words(pairs)})")
    claims = []
    if worse:
        claims.append(f"does more for {' and '.join(worse)}")
    if equal:
        claims.append(f"may do as much for {' and '.join(equal)}")
    if not claims:
        return None
    return (
        f"Plain further training {', and '.join(claims)}. It is the same fine-tuning without scenarios (λ = 0). By the "
        f"judges' labels are right, after the correction and after plain further training{_mean_of(own)}: "
        f"{', '.join(figures)}."
    )


def _left_out_against_plain(
    evidence: EvidenceFigures,
) -> tuple[str, float | None, float | None, Pairs | None]:
    """Return name, accuracy after both, and pairs of the left-out scenarios: those with a new confusion where any are.

    The others are near to what is tuned on.
    """
    new, all_of_them = evidence.left_out_new_confusion, evidence.left_out
    if new.count:
        return "left-out scenarios with a new confusion", new.defuse, new.plain, new.against_plain
    pairs = evidence.against_plain.left_out
    return "scenarios left out of the tuning", all_of_them.defuse.value, all_of_them.plain.value, pairs


def _mean_of(own: FourShares) -> str:
    """Return what the figures of plain further training are, where there are several."""
    count = len(own.plain_each)
    return (
        f" (mean of {count} trainings; in brackets against the one least favourable to the correction)"
        if count > 1
        else ""
    )


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
        unconfirmed(report),
        no_better_than_plain_training(report),
        answered_by_models(report),
        prelabelled(report),
        purity_warning(report),
    )
    return [text for text in notices if text]
