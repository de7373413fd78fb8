"""Figure 3 in the page: every component with its images, what was said of it, and the new answers."""

from __future__ import annotations

from defuse_core.artifacts import NONE_OF_THE_ABOVE, Evaluation
from defuse_core.evaluate import Findings
from defuse_core.report import Report, Scenario
from defuse_core.report.figures.gallery import answer_text, is_short
from defuse_core.report.formatting import LOW_PURITY, count_of, percent
from defuse_core.report.html.markup import (
    PIXEL_ART,
    Markup,
    folded,
    join,
    picture,
    tag,
)


def scenarios_section(report: Report, found: Findings, evaluation: Evaluation) -> Markup:
    """Return the failure scenarios, then, folded, the components that were rejected."""
    rows = report.scenarios.list
    accepted = [_card(row, found, evaluation) for row in rows if row.accepted]
    rejected = [_card(row, found, evaluation) for row in rows if not row.accepted]
    parts = [_legend(found), *accepted] if accepted else [tag("p", "There are none.", class_="quiet")]
    if rejected:
        title = f"{count_of(len(rejected), 'component')} that were not failure scenarios"
        parts.append(folded(title, tag("div", *rejected, class_="small-shots")))
    return join(parts)


def _legend(found: Findings) -> Markup:
    examples = (
        ("right", "✓", "answer as the annotators'"),
        ("wrong", "✗", "another answer"),
        ("", "?", "image without a label"),
        ("own", "#", "annotators' label, where it is not the scenario's"),
    )
    marks = [tag("span", tag("i", sign, class_=kind), text) for kind, sign, text in examples]
    numbers = (
        None if is_short(found.models.classes) else tag("span", "Numbers are class numbers; hover for names.")
    )
    return tag(
        "div", tag("span", "Left corner before, right corner after:"), *marks, numbers, class_="legend"
    )


def _card(row: Scenario, found: Findings, evaluation: Evaluation) -> Markup:
    shots = tag("div", *(_shot(row, i, found, evaluation) for i in range(_images(found))), class_="shots")
    name = _rejected(row) if row.label is None else _accepted(row)
    facts = None if row.label is None else _facts(row)
    return tag("article", name, tag("div", shots, facts), class_="card scenario", id=f"scenario-{row.number}")


def _images(found: Findings) -> int:
    return int(found.gallery.images.shape[1])


def _rejected(row: Scenario) -> Markup:
    return tag("div", tag("h3", f"Component {row.number}"), tag("div", row.reason, class_="purity"))


def _accepted(row: Scenario) -> Markup:
    low = row.purity is not None and row.purity < LOW_PURITY
    meter = tag("i", style=f"width:{100 * (row.purity or 0):.0f}%", class_="low" if low else None)
    said = tag("b", f"purity {percent(row.purity, 0)}", class_="doubt" if low else None)
    return tag(
        "div",
        tag("h3", f"Scenario {row.number}", class_="quiet"),
        tag("div", tag("small", "labelled "), row.label, class_="label"),
        tag("span", meter, class_="meter"),
        tag("div", said, " · mixed images" if low else None, class_="purity"),
        title=row.reason,
    )


def _facts(row: Scenario) -> Markup:
    facts = [
        tag(
            "span",
            "right ",
            tag("b", f"{percent(row.before)} → {percent(row.defuse)}"),
            " on held-out images",
        ),
        tag("span", "mistaken for ", tag("b", row.mistaken_for)) if row.mistaken_for else None,
        tag("span", f"agreement {percent(row.agreement, 0)}"),
        tag("span", f"weight {percent(row.weight)}"),
    ]
    return tag("div", *facts, class_="facts")


def _shot(row: Scenario, place: int, found: Findings, evaluation: Evaluation) -> Markup:
    classes, image = found.models.classes, found.gallery.images[row.number, place]
    said = int(found.verdicts.image_labels[row.number, place])
    before, after = (
        int(found.gallery.predicted[row.number, place]),
        int(evaluation.gallery_after[row.number, place]),
    )
    unclear = said == NONE_OF_THE_ABOVE
    told = "no label" if unclear else classes[said]
    text = f"annotators: {told}; classifier before: {classes[before]}, after: {classes[after]}"
    badges = [
        tag(
            "span",
            answer_text(classes, answer),
            class_=f"{when} {'' if unclear else 'right' if answer == said else 'wrong'}",
        )
        for when, answer in (("before", before), ("after", after))
    ]
    if row.label is not None and not unclear and classes[said] != row.label:
        badges.append(tag("span", answer_text(classes, said), class_="own"))
    small = "small" if max(image.shape[1:]) <= PIXEL_ART else None
    return tag(
        "div",
        tag("img", src=picture(image), alt=text, class_=small, loading="lazy"),
        *badges,
        class_="shot",
        title=text,
    )
