"""A run and its scenarios as notebooks show them: HTML fragments of the templates beside this file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from defuse_core.artifacts import F32
from defuse_core.report import formatting
from defuse_core.report.html import PIXEL_ART, Badge, ScenarioCard, Shot, data_address, environment
from defuse_core.report.schema import Report


def render_run(report: Report | None, headline: str, page: str) -> str:
    """Return the headline, its caveats and the accuracies before and after; without a report the headline alone."""
    rows = []
    if report is not None:
        before, after = report.accuracy.before, report.accuracy.defuse
        for name, field in (
            ("scenario images", "scenario"),
            ("validation images", "validation"),
            ("test images", "test"),
        ):
            rows.append((name, getattr(before, field), getattr(after, field)))
    caveats = [] if report is None else formatting.caveats(report)
    return _render("run", report=report, headline=headline, page=page, rows=rows, caveats=caveats)


def render_scenarios(cards: Sequence[ScenarioCard], classes: tuple[str, ...]) -> str:
    """Return the reviewed images of each scenario, with what is known of it; rejected ones at the end."""
    return _render(
        "scenarios",
        accepted=[card for card in cards if card.row.accepted],
        others=[card for card in cards if not card.row.accepted],
        class_numbers=() if formatting.names_are_short(classes) else tuple(enumerate(classes)),
    )


def render_real(images: F32, labels: Sequence[str], answers: Sequence[str], title: str) -> str:
    """Return real images (n, channels, H, W) in a row, each with its class and the classifier's answer before."""
    shots = [
        Shot(
            address=data_address(image),
            description=f"image of {label}; classifier before: {answer}",
            pixelated=max(image.shape[1:]) <= PIXEL_ART,
            before=Badge(label, ""),
            after=Badge(answer, "right" if answer == label else "wrong"),
            own_label=None,
        )
        for image, label, answer in zip(images, labels, answers, strict=True)
    ]
    return _render("real", shots=shots, title=title)


def _render(name: str, **values: Any) -> str:
    text = environment().get_template(f"notebook_{name}.html.j2").render(**values)
    return formatting.unbroken(text)
