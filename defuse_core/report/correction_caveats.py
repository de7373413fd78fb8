"""The caveats of a report on the correction: what the choice of λ costs, and what plain further training does."""

from __future__ import annotations

from dataclasses import dataclass

from defuse_core.config import CorrectSection
from defuse_core.formatting import before_punctuation, count_of, listed, numbers_text, percent
from defuse_core.intervals import MIN_CONFIRMED, ROUNDING, SIGNIFICANT
from defuse_core.report.evidence_schema import EvidenceFigures, Pairs, ScenarioEvidence
from defuse_core.report.schema import Report

TEST_DRAWS = "failing draws from test images"
LISTED_CLASSES = 5  # most classes that a caveat names


def fine_tuning_costs_too_much(report: Report, correct: CorrectSection) -> str | None:
    """Return that smaller λ will not help: none was chosen, and λ = 0 costs more than max_loss, too. Else None."""
    plain, before = report.accuracy.plain, report.accuracy.before.validation
    if report.chosen is not None or plain is None or plain.validation is None or before is None:
        return None
    if before - plain.validation <= correct.max_loss + ROUNDING:
        return None
    return (
        "Smaller λ will not help: fine-tuning itself costs too much clean accuracy. Plain further training (λ = 0) "
        f"takes validation accuracy from {percent(before)} to {percent(plain.validation)} on average, and "
        f"correct.max_loss allows a loss of {percent(correct.max_loss, None)}. Lower correct.learning_rate (now "
        f"{correct.learning_rate:g}), or raise correct.epochs with schedule one_cycle, under another --name."
    )


def costs_a_class(report: Report, correct: CorrectSection) -> str | None:
    """Return which classes lose more on test images than `defuse check` allows to any; None where none does."""
    if report.chosen is None:
        return None
    lost = [row for row in report.per_class if row.loses_too_much]
    if not lost:
        return None
    figures = [
        f"{before_punctuation(row.name)} ({percent(row.before)} to {percent(row.defuse)})"
        for row in lost[:LISTED_CLASSES]
    ]
    more = f" and {len(lost) - LISTED_CLASSES} more" if len(lost) > LISTED_CLASSES else ""
    return (
        "The correction costs single classes more accuracy than check.max_class_loss allows. On test "
        f"images: {', '.join(figures)}{more}. {_less_for_a_class(report, correct)}"
    )


def class_parts(report: Report) -> list[str]:
    """Return the images on which a λ may cost no class more than its limit: training (plain decoding), validation."""
    training = [] if report.vae.health.anchored else ["training"]
    return [*training, *(["validation"] if "validation" in report.run.images else [])]


def _less_for_a_class(report: Report, correct: CorrectSection) -> str:
    """Return what makes the choice of λ cost a class less."""
    parts = class_parts(report)
    remedy = f"give {'more ' if 'validation' in parts else ''}validation images, or smaller correct.lambdas"
    if correct.choose_by != "tune":
        return "Only correct.choose_by: tune considers what a λ costs a class."
    if not parts:
        return f"Without validation images no λ is left out for what it costs a class; {remedy}."
    if correct.class_loss_allowed > 0:
        return "A smaller correct.max_class_loss may choose another λ."
    return f"On {' and '.join(parts)} images no class lost significantly; {remedy}."


def unconfirmed(report: Report) -> str | None:
    """Return on which scenarios the correction does no more, or less, than plain further training; None where on none.

    Scenarios with too few images to tell are no failures of a test; it says how many there are.
    """
    judged = [(row.number, row.evidence) for row in report.scenarios.list if row.evidence is not None]
    tested = [(number, found) for number, found in judged if found.confirmed is not None]
    few = sum(found.confirmed is None and found.independent_images is not None for _, found in judged)
    agree = "the judges agree on too few independent images to tell"
    untested = f"On {count_of(few, 'scenario')} {agree}" if few else ""
    if few and not tested and any(has_no_plain(found) for _, found in judged):
        return (
            "No plain training finished. So nothing tells whether the correction does more than plain further training "
            "(λ = 0); see Exceptions."
        )
    if few and not tested:
        return f"{untested} whether the correction does more than plain further training (λ = 0)."
    rows = [number for number, found in tested if not found.confirmed]
    if not rows and not few:
        return None
    worse = [number for number, found in tested if found.worse]
    others = {number: found.defuse for number, found in tested if not (found.confirmed or found.worse)}
    wrong = [number for number, right in others.items() if right is not None and right <= MIN_CONFIRMED]
    equal = [number for number in others if number not in wrong]
    than, claims = "than plain further training (λ = 0) ", list[str]()
    if worse:
        claims.append(f"is worse {than}on: {numbers_text(worse)}")
        than = ""
    if equal:
        claims.append(f"may be no better {than}on: {numbers_text(equal)}")
    if wrong:
        claims.append(f"is right on at most half of the images of: {numbers_text(wrong)}")
    title = f"The correction is confirmed on {len(tested) - len(rows)} of {count_of(len(tested), 'scenario')}"
    if few:
        title += " that can be tested"
    if worse:
        title += f", and worse than plain further training on {len(worse)}"
    by_judges = f"By the judges' labels of the held-out images it {'; '.join(claims)}"
    return " ".join(f"{text}." for text in (title, by_judges if claims else "", untested) if text)


def has_no_plain(found: ScenarioEvidence) -> bool:
    """Whether the judges label images of the scenario, but no plain training finished that could be compared there."""
    return found.before is not None and found.plain is None


def no_better_than_plain_training(report: Report) -> str | None:
    """Return on what the same fine-tuning without scenarios does as much or more; None where it does less."""
    evidence = report.evidence
    if evidence is None or report.chosen is None:
        return None
    count = len(evidence.own_label.plain_each)
    other = _Other(
        "plain further training",
        "It is the same fine-tuning without scenarios (λ = 0)",
        f"plain further training{f', the mean of {count}' if count > 1 else ''}",
        f"the strongest of the {count} plain trainings" if count > 1 else "it",
    )
    return _no_better(other, _against_plain(evidence, report.scenarios.accepted))


def no_better_than_baseline(report: Report) -> str | None:
    """Return on what tuning on the reviewed failures alone does as much or more; None where it does less."""
    evidence, votes = report.evidence, report.votes
    if evidence is None or report.chosen is None:
        return None
    failures = count_of(round((votes.misclassified or 0.0) * votes.labelled), "reviewed failure")
    other = _Other(
        f"tuning on the {failures} alone",
        "It is the paper's baseline",
        "tuning on the reviewed failures alone",
        "it",
    )
    against, own, real = evidence.against_baseline, evidence.own_label, evidence.real_failures
    accepted, scenarios, draws = report.scenarios.accepted, against.scenarios, against.real_failures
    compared = []
    if scenarios is not None:
        shares = own.defuse.value, own.baseline.value
        compared.append(_Compared("the scenarios", accepted, *shares, scenarios))
    if draws is not None:
        compared.append(_Compared(TEST_DRAWS, None, real.defuse.value, real.baseline.value, draws))
    return _no_better(other, compared)


@dataclass(frozen=True)
class _Other:
    """What the correction is compared with, in words."""

    name: str
    meaning: str
    figures: str  # after "after"
    pairs: str  # after "compared with"


@dataclass(frozen=True)
class _Compared:
    """One kind of images on which the correction is compared with another fine-tuning."""

    name: str
    possible: int | None  # pairs that there can be, where these are few
    after: float | None
    other: float | None
    pairs: Pairs

    @property
    def too_few(self) -> bool:
        return self.possible is not None and not can_be_significant(self.possible)

    def figures(self, other: _Other) -> str:
        """Return both accuracies and the pairs, as two sentences."""
        name = self.name.removeprefix("the ")
        better, worse = count_of(self.pairs.better, self.pairs.pair), self.pairs.worse
        return (
            f"{name[0].upper()}{name[1:]}: {percent(self.after)} after the correction, {percent(self.other)} after "
            f"{other.figures}. Compared with {other.pairs}: better on {better}, worse on {worse}, "
            f"p = {self.pairs.p_value:.2g}."
        )


def _no_better(other: _Other, compared: list[_Compared]) -> str | None:
    """Return on what the other fine-tuning does as much or more; None where it does less on all."""
    compared = [each for each in compared if may_be_equal(each.pairs)]
    worse = [each.name for each in compared if each.pairs.worse_than_each]
    too_few = [each.name for each in compared if each.too_few and not each.pairs.worse_than_each]
    equal = [each.name for each in compared if each.name not in (*worse, *too_few)]
    claims = [f"does more for {listed(worse)}"] if worse else []
    if equal:
        claims.append(f"may do as much for {listed(equal)}")
    name = f"{other.name[0].upper()}{other.name[1:]}"
    sentences = [f"{name} {', and '.join(claims)}."] if claims else []
    if too_few:
        few = listed([name.removeprefix("the ") for name in too_few])
        sentences.append(f"There are too few {few} to tell whether {other.name} does as much for them.")
    if not sentences:
        return None
    figures = " ".join(each.figures(other) for each in compared)
    return f"{' '.join(sentences)} {other.meaning}; accuracies are by the judges' labels. {figures}"


def _against_plain(evidence: EvidenceFigures, accepted: int) -> list[_Compared]:
    """Return what was compared: scenarios, left-out scenarios, and failing draws from test images.

    Left-out scenarios are those with a new confusion, where there are any: the others are near to what is tuned on.
    """
    against, own, real = evidence.against_plain, evidence.own_label, evidence.real_failures
    new, left_out = evidence.left_out_new_confusion, evidence.left_out
    shares = left_out.defuse.value, left_out.plain.value
    without = ("scenarios left out of the tuning", accepted, *shares, against.left_out)
    if new.count:
        name = "left-out scenarios with a new confusion"
        without = (name, new.count, new.defuse, new.plain, new.against_plain)
    rows = (
        ("the scenarios", accepted, own.defuse.value, own.plain.value, against.scenarios),
        without,
        (TEST_DRAWS, None, real.defuse.value, real.plain.value, against.real_failures),
    )
    return [
        _Compared(name, possible, after, plain, pairs)
        for name, possible, after, plain, pairs in rows
        if pairs is not None
    ]


def may_be_equal(pairs: Pairs) -> bool:
    """Whether the correction is not significantly more often better."""
    return not (pairs.p_value < SIGNIFICANT and pairs.better > pairs.worse)


def can_be_significant(pairs: int) -> bool:
    """Whether the two-sided sign test over so many pairs could be significant, if all were better."""
    return bool(2 * 0.5**pairs < SIGNIFICANT)
