"""The report as one page that works without a network: `report.html`."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from defuse_core.artifacts import Evaluation
from defuse_core.config import RunFile
from defuse_core.evaluate import Findings
from defuse_core.report import Report
from defuse_core.report.figures import svg
from defuse_core.report.formatting import (
    LOW_PURITY,
    caveats,
    change,
    headline,
    percent,
    unbroken,
)
from defuse_core.report.html.health import latent_section, making_section, vae_section
from defuse_core.report.html.markup import (
    Child,
    Markup,
    join,
    tag,
)
from defuse_core.report.html.results import (
    agreement_section,
    classes_section,
    exceptions_section,
    result_section,
    tradeoff_section,
)
from defuse_core.report.html.scenarios import scenarios_section
from defuse_core.report.html.style import CSS

IN_PAGE = ("tradeoff", "lambdas", "latent", "kl", "weights", "curves")
SECTIONS = {  # key -> title, what stands below it
    "result": ("Result", "Accuracy of the three classifiers (Figure 4). Small: points gained or lost."),
    "scenarios": (
        "Failure scenarios",
        "Each row is drawn from one component of the mixture. Purity is the share of its reviewed images "
        "whose own label is the scenario's: at 100 % all of them show the class that is now taught.",
    ),
    "tradeoff": ("Trade-off", "λ is how hard the scenarios pull while fine-tuning."),
    "agreement": (
        "Agreement",
        "Share of an image's votes for its majority label, none-of-the-above left out: mean and standard error "
        "(Figure 6).",
    ),
    "classes": ("Classes", "Accuracy on the test images, biggest change first."),
    "failures": ("Where the failures lie", "Identification (Algorithm 1) and distillation."),
    "vae": ("The β-VAE", "How good it is decides how much of the review is spent on real failures."),
    "exceptions": ("Exceptions", "Where this run departs from the vote or from its plan."),
    "making": ("How it was made", "Time, versions, settings."),
}


def page(
    report: Report, spec: RunFile, found: Findings, evaluation: Evaluation, figures: Mapping[str, Figure]
) -> str:
    """Return the page: pictures inside it, nothing fetched, all text from the run escaped."""
    pictures = {name: Markup(svg(figures[name], name)) for name in IN_PAGE if name in figures}
    bodies = {
        "result": result_section(report),
        "scenarios": scenarios_section(report, found, evaluation),
        "tradeoff": tradeoff_section(report, pictures),
        "agreement": agreement_section(report),
        "classes": classes_section(report),
        "failures": latent_section(report, pictures),
        "vae": vae_section(report, pictures),
        "exceptions": exceptions_section(report, found.models.classes),
        "making": making_section(report, spec),
    }
    shown = {key: body for key, body in bodies.items() if body is not None}
    main = tag("main", _header(report, shown), *(_section(key, body) for key, body in shown.items()))
    whole = tag("html", _head(report), tag("body", main), lang="en")
    return "<!doctype html>\n" + unbroken(whole) + "\n"


def _section(key: str, body: Markup) -> Markup:
    title, lead = SECTIONS[key]
    return tag("section", tag("h2", title), tag("p", lead, class_="lead"), body, id=key)


def _head(report: Report) -> Markup:
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{report.run.name} – Defuse report"),
        tag("style", Markup(CSS)),
    )


def _header(report: Report, bodies: Mapping[str, Markup]) -> Markup:
    return tag(
        "header",
        tag("p", "Defuse report · ", tag("b", report.run.name), f" · {report.run.dataset}", class_="kicker"),
        tag("h1", headline(report)),
        *(_note(text) for text in caveats(report)),
        _tiles(report),
        tag("nav", *(tag("a", SECTIONS[key][0], href=f"#{key}") for key in bodies)),
    )


def _note(text: str) -> Markup:
    first, dot, rest = text.partition(". ") if ". " in text else (text, "", "")
    return tag("p", tag("b", first + dot), rest, class_="note")


def _tiles(report: Report) -> Markup:
    before, after, scenarios = report.accuracy.before, report.accuracy.defuse, report.scenarios
    accepted = join([scenarios.accepted, tag("small", f" of {scenarios.components}")])
    tiles = [
        _tile("Failure scenarios", accepted, "components"),
        _moved_tile("Accuracy on the scenarios", before.scenario, after.scenario, 1),
        _moved_tile("Accuracy on the test set", before.test, after.test, 2),
    ]
    low = scenarios.purity is not None and scenarios.purity < LOW_PURITY
    shown = tag("span", percent(scenarios.purity, 0), class_="doubt" if low else None)
    tiles.append(_tile("Purity of the scenarios", shown, "mixed images" if low else "mean over scenarios"))
    return tag("div", *tiles, class_="tiles")


def _moved_tile(what: str, before: float | None, after: float | None, digits: int) -> Markup:
    moved = change(before, after, digits)
    kind = "good" if moved.startswith("+") else "bad" if moved.startswith("−") else "quiet"
    below: Child = join([f"before {percent(before, digits)}, ", tag("span", f"{moved} points", class_=kind)])
    return _tile(what, percent(after, digits), below if moved else "not measured")


def _tile(what: str, figure: Child, below: Child) -> Markup:
    inside = (
        tag("div", what, class_="what"),
        tag("div", figure, class_="figure"),
        tag("div", below, class_="was"),
    )
    return tag("div", *inside, class_="card tile")
