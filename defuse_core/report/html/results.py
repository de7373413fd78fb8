"""Sections of the page: what the correction did, and what the annotators said."""

from __future__ import annotations

from collections.abc import Mapping

from defuse_core.artifacts import Override
from defuse_core.report import Accuracy, ClassAccuracy, Report, TradeOff
from defuse_core.report.formatting import (
    NONE,
    change,
    count_of,
    lam_text,
    percent,
    spread,
)
from defuse_core.report.html.markup import (
    Child,
    Markup,
    figures_list,
    folded,
    join,
    table,
    tag,
)

SHOWN_CLASSES = 12
SHOWN_REFUSALS = 50
TOLD_ELSEWHERE = {"prelabel", "refused_answers"}  # of the annotators' notes
Pictures = Mapping[str, Markup]


CAPTIONS = {
    "tradeoff": (
        "Figure 5: the trade-off",
        "One point per λ at its chosen epoch; the ringed one is this run's result.",
    ),
    "lambdas": ("The same, λ by λ", "Dashed: the classifier before. Shaded: the λ that was chosen."),
    "latent": (
        "Figure 2: failures among the training images",
        "t-SNE of latent codes; far distances mean nothing.",
    ),
    "weights": ("Weights of the mixture", "Solid: kept for review. Pale: under the smallest weight."),
    "kl": (
        "Information per latent dimension",
        "KL to the prior. Red: collapsed, the dimension says next to nothing.",
    ),
    "curves": ("Learning curves", "One value per epoch."),
}
WIDE = {"weights", "kl", "curves"}  # scroll sideways on a narrow screen


def picture_card(pictures: Pictures, name: str) -> Markup | None:
    """Return a picture with its caption, or None where the run has no such picture."""
    if name not in pictures:
        return None
    title, text = CAPTIONS[name]
    shown = tag("div", pictures[name], class_="wide" if name in WIDE else None)
    return tag("figure", tag("figcaption", title, tag("span", text)), shown, class_="card")


def result_section(report: Report) -> Markup:
    """Figure 4."""
    accuracy, accepted = report.accuracy, report.scenarios.accepted
    rows = (
        ("Before", "", accuracy.before),
        ("Fine-tuned on the reviewed failures alone", NONE, accuracy.baseline),
        ("Defuse", str(accepted), accuracy.defuse),
    )
    cells = [(name, number, *_accuracies(row, accuracy.before)) for name, number, row in rows]
    head = ("Classifier", "Scenarios", "Validation", "Test", "Failure scenarios, held out")
    chosen = [
        f"{name}: λ = {lam_text(choice.lam)}, epoch {choice.epoch}"
        for name, choice in (("Defuse", report.chosen), ("the row above it", report.baseline_chosen))
        if choice
    ]
    note = tag("p", "Chosen for ", "; for ".join(chosen), ".", class_="quiet") if chosen else None
    return join([table(head, cells), _own_labels(report), note])


def _own_labels(report: Report) -> Markup | None:
    """The stricter figure: no image counts as right for showing its scenario's label and not its own."""
    own = report.scenarios.own_labels
    if own.before is None:
        return None
    moved = tag("b", f"{percent(own.before)} → {percent(own.defuse)}")
    images = count_of(own.images, "reviewed image")
    return tag("p", f"Right on {images} of the failure scenarios, each judged by its own label: ", moved, ".")


def _accuracies(row: Accuracy, before: Accuracy) -> list[Child]:
    cells: list[Child] = []
    for split, digits in (("validation", 2), ("test", 2), ("scenario", 1)):
        value, start = getattr(row, split), getattr(before, split)
        difference = change(start, value, digits) if row is not before else ""
        small = tag("small", difference) if difference else None
        cells.append(join([percent(value, digits), small]))
    return cells


def tradeoff_section(report: Report, pictures: Pictures) -> Markup:
    """Figure 5, the same by λ, and all numbers."""
    if not report.tradeoff:
        return tag("p", "Nothing was fine-tuned.", class_="quiet")
    head = ("λ", "Epoch", "Train", "Validation", "Test", "Scenarios, tuned on", "Scenarios, held out")
    cards = (picture_card(pictures, name) for name in ("tradeoff", "lambdas"))
    rows = (_tradeoff_row(row) for row in report.tradeoff)
    return join([tag("div", *cards, class_="pair"), folded("All numbers", table(head, rows))])


def _tradeoff_row(row: TradeOff) -> list[Child]:
    name = lam_text(row.lam)
    shares = [percent(value, 2) for value in (row.train, row.validation, row.test, row.tune, row.scenario)]
    return [tag("b", name, " · chosen") if row.chosen else name, row.epoch, *shares]


def agreement_section(report: Report) -> Markup:
    """Figure 6, and what the vote left undecided."""
    parts = (
        ("Failure scenarios", report.agreement.scenario),
        ("Other components", report.agreement.other),
        ("All", report.agreement.all),
    )
    votes = report.votes
    figures: list[tuple[str, Child]] = [
        ("annotators", votes.annotators),
        ("answers", f"{votes.answers:,}"),
        ("images with a label", f"{votes.labelled} of {votes.images}"),
        ("no label, tied", votes.ties),
        ("no label, no class chosen", votes.no_class_chosen),
    ]
    told = {name: value for name, value in votes.notes.items() if name not in TOLD_ELSEWHERE}
    figures += [(name.replace("_", " "), _plain(value)) for name, value in told.items()]
    rows = ((name, mean.images, spread(mean)) for name, mean in parts)
    return join([table(("Review images of", "Labelled images", "Agreement"), rows), figures_list(figures)])


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def classes_section(report: Report) -> Markup:
    """Accuracy per class on the test images, biggest change first."""
    if not report.per_class:
        return tag("p", "There are no test images.", class_="quiet")
    rows = sorted(report.per_class, key=lambda row: (-abs(_moved(row)), row.name))
    head = ("Class", "Test images", "Before", "Reviewed failures alone", "Defuse", "Change")
    cells = [_class_row(row) for row in rows]
    more = cells[SHOWN_CLASSES:]
    rest = folded(f"All other classes ({len(more)})", table(head, more)) if more else None
    return join([table(head, cells[:SHOWN_CLASSES]), rest])


def _moved(row: ClassAccuracy) -> float:
    return 0.0 if row.before is None or row.defuse is None else row.defuse - row.before


def _class_row(row: ClassAccuracy) -> list[Child]:
    moved = change(row.before, row.defuse)
    kind = "bad" if moved.startswith("−") else "good" if moved.startswith("+") else "quiet"
    shares = [percent(value, 2) for value in (row.before, row.baseline, row.defuse)]
    return [row.name, f"{row.images:,}", *shares, tag("span", moved or NONE, class_=kind)]


def exceptions_section(report: Report, classes: tuple[str, ...]) -> Markup | None:
    """Decisions above the vote, answers that do not count, fine-tunings that failed; None where there are none."""
    parts: list[Child] = []
    if report.overrides:
        head = ("Component", "Decision", "By", "Reason", "When")
        rows = (_override_row(override, classes) for override in report.overrides)
        parts += [tag("p", "Decided by a person, above the vote:"), table(head, rows, 5)]
    refused = report.votes.notes.get("refused_answers", [])
    if refused:
        names = ("Component", "Image", "Annotator", "Why")
        cells = [
            [_said(answer.get(name)) for name in ("scenario", "image", "annotator", "why")]
            for answer in refused
        ]
        said = count_of(len(refused), "answer")
        parts += [tag("p", f"{said} not counted:"), table(names, cells[:SHOWN_REFUSALS], 4)]
        if len(refused) > SHOWN_REFUSALS:
            parts.append(
                tag("p", f"and {len(refused) - SHOWN_REFUSALS} more, in report.json.", class_="quiet")
            )
    if report.failed_trials:
        failed = ((t.sweep, lam_text(t.lam), t.cause) for t in report.failed_trials)
        parts += [
            tag("p", "Fine-tunings that failed and were left out:"),
            table(("Sweep", "λ", "Cause"), failed, 3),
        ]
    return join(parts) if parts else None


def _said(value: object) -> str:
    return NONE if value is None else str(value)


def _override_row(override: Override, classes: tuple[str, ...]) -> list[Child]:
    decision = "rejected" if override.label is None else f"accepted as {classes[override.label]}"
    return [override.scenario, decision, override.author, override.reason, override.when]
