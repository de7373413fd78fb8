"""What the templates beside this file show: `report.html`, a page that works without a network, and notebooks' HTML."""

from __future__ import annotations

import base64
import functools
import inspect
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from defuse_core import formatting
from defuse_core.artifacts import F32, NONE_OF_THE_ABOVE, Evaluation
from defuse_core.config import RunFile, dump_run_file
from defuse_core.data.images import data_address
from defuse_core.evaluation import Findings
from defuse_core.evaluation.describe import NearestReal
from defuse_core.evaluation.evidence import AT_FAULT_PURITY
from defuse_core.intervals import SIGNIFICANT
from defuse_core.report.build import FinishedRun
from defuse_core.report.correction_caveats import class_parts, has_no_plain, may_be_equal
from defuse_core.report.evidence_schema import Pairs
from defuse_core.report.schema import ClassAccuracy, Report, Scenario, is_low

PIXEL_ART = 64  # images of at most so many pixels a side are enlarged without smoothing
LARGE = 64  # images of at least so many pixels a side are shown larger, five a row
IMAGE_BYTES = 100_000_000  # most bytes of a page's images; where they take more, all are thumbnails
THUMBNAIL = 112  # pixels a side that a thumbnail has at most
SHOWN_REAL = 100  # scenarios whose nearest real images are shown beside thumbnails
SHOWN_CLASSES = 12
SHORT = 3  # class names with at most so many letters fit on an image; other classes are shown by number
SHOWN_ANSWERS = 50
PARTS = ("train", "validation", "test")
DECIDED_EARLY = "decided_early"  # note of the annotators with numbers of scenarios
DISCARDED = "discarded_answers"  # note of the annotators that the page shows as a table
NOT_LISTED = {"prelabel", "pseudonyms", DISCARDED}  # notes that are shown elsewhere, or only identify people


@dataclass(frozen=True)
class Badge:
    """The classifier's answer on a review image."""

    text: str
    kind: str  # "right", "wrong", or "" where the image has no label


@dataclass(frozen=True)
class ImageTile:
    """One review image."""

    address: str  # data: address of its pixels
    description: str
    pixelated: bool
    before: Badge
    after: Badge | None  # None for a real image, and where nothing was corrected
    own_label: str | None  # the annotators' label, where it differs from the scenario's


@dataclass(frozen=True)
class ScenarioCard:
    """One component with its review images (Figure 3), and the real images nearest to it."""

    row: Scenario
    tiles: tuple[ImageTile, ...]
    real: tuple[ImageTile, ...]  # empty without judges


def render_page(report: Report, spec: RunFile, finished: FinishedRun, pictures: Mapping[str, str]) -> str:
    """Return the page: pictures inside it, nothing loaded from elsewhere, all text from the run escaped."""
    found = finished.found
    cards = [scenario_card(row, finished) for row in report.scenarios.list]
    image_bytes = sum(len(tile.address) for card in cards for tile in (*card.tiles, *card.real))
    as_thumbnails = image_bytes > IMAGE_BYTES
    if as_thumbnails:
        cards = _with_thumbnails(cards)
    classes = found.models.classes
    notes = report.votes.notes
    page = environment().get_template("report.html.j2")
    text = page.render(
        report=report,
        pictures={name: Markup(picture) for name, picture in pictures.items()},
        accepted=[card for card in cards if card.row.accepted],
        rejected=[card for card in cards if not card.row.accepted],
        as_thumbnails=as_thumbnails,
        limits={"megabytes": IMAGE_BYTES // 10**6, "side": THUMBNAIL, "real": SHOWN_REAL},
        class_numbers=() if _names_are_short(classes) else tuple(enumerate(classes)),
        classes=sorted(report.per_class, key=lambda row: (-abs(_change(row)), row.name)),
        shown_classes=SHOWN_CLASSES,
        notes={
            name.replace("_", " "): _note_text(name, value)
            for name, value in notes.items()
            if name not in NOT_LISTED
        },
        not_answered=int((~found.votes.answered(found.gallery.predicted.shape)).sum()),
        discarded_answers=notes.get(DISCARDED, []),
        shown_answers=SHOWN_ANSWERS,
        image_counts=", ".join(
            f"{report.run.images[part]:,} {part}" for part in PARTS if part in report.run.images
        ),
        large_images=spec.data.image_size >= LARGE,
        max_per_image=spec.identify.max_per_image,
        class_images=_class_images(report),
        rho=spec.review.rho,
        at_fault_purity=AT_FAULT_PURITY,
        correct=spec.correct,
        widen=spec.correct.tuning_factor,
        run_file=dump_run_file(spec),
    )
    return formatting.unbroken(text) + "\n"


def _note_text(name: str, value: object) -> str:
    text = formatting.text_of(value)
    if name != DECIDED_EARLY or not isinstance(value, list) or not value:
        return text
    return f"{'scenario' if len(value) == 1 else 'scenarios'} {text}"


@functools.cache
def environment() -> Environment:
    """Return the environment of the templates beside this file: text is escaped, a missing value is an error."""
    made = Environment(
        loader=PackageLoader("defuse_core.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["percent"] = formatting.percent
    made.globals.update(
        inspect.getmembers(formatting, inspect.isfunction),
        has_no_plain=has_no_plain,
        is_low=is_low,
        may_be_equal=may_be_equal,
        pairs_text=_pairs_text,
        SIGNIFICANT=SIGNIFICANT,
    )
    return made


def _pairs_text(pairs: Pairs | None) -> str:
    """Return on how many pairs the correction is better and worse: +54 −82, p = 0.02."""
    return formatting.NONE if pairs is None else f"+{pairs.better} −{pairs.worse}, p = {pairs.p_value:.2g}"


def _class_images(report: Report) -> str:
    """Return in words on which images a λ may cost no class more than its limit; empty where on none."""
    parts = class_parts(report)
    images = f"{' or on '.join(parts)} images" if parts else ""
    return f"{images} alone" if parts == ["validation"] else images


def _names_are_short(classes: tuple[str, ...]) -> bool:
    """Whether class names fit on an image."""
    return max(map(len, classes)) <= SHORT


def _answer_text(classes: tuple[str, ...], answer: int) -> str:
    """Return what an image shows for an answer: the class name, or the class number where names are long."""
    return classes[answer] if _names_are_short(classes) else str(answer)


def _change(row: ClassAccuracy) -> float:
    return 0.0 if row.before is None or row.defuse is None else row.defuse - row.before


def scenario_card(row: Scenario, finished: FinishedRun) -> ScenarioCard:
    """Return what the page shows of one component."""
    found, evaluation, evidence, _ = finished
    count = found.gallery.images.shape[1]
    tiles = tuple(_reviewed_tile(row, place, found, evaluation) for place in range(count))
    if evidence is None or row.evidence is None:
        return ScenarioCard(row, tiles, ())
    column = int(np.flatnonzero(found.fixes.scenario == row.number)[0])
    return ScenarioCard(row, tiles, _real_tiles(found.models.classes, evidence.real, column))


def _real_tiles(classes: tuple[str, ...], real: NearestReal, column: int) -> tuple[ImageTile, ...]:
    """Return the real images nearest to the accepted scenario at place `column`, each once, with the answer before.

    There are none where no real image has the scenario's label.
    """
    if np.isnan(real.error[column]):
        return ()
    tiles = []
    for pixels, label, answer in zip(
        real.images[column], real.labels[column], real.predicted[column], strict=True
    ):
        badge = Badge(_answer_text(classes, answer), "right" if answer == label else "wrong")
        description = f"real image of {classes[label]}; classifier before: {classes[answer]}"
        tiles.append(_image_tile(pixels.astype(np.float32) / 255, description, badge))
    return tuple({tile.address: tile for tile in tiles}.values())


def _reviewed_tile(row: Scenario, place: int, found: Findings, evaluation: Evaluation) -> ImageTile:
    classes, image = found.models.classes, found.gallery.images[row.number, place]
    label = int(found.verdicts.image_labels[row.number, place])
    before = int(found.gallery.predicted[row.number, place])
    after = int(evaluation.gallery_after[row.number, place])
    unlabelled = label == NONE_OF_THE_ABOVE
    named = "no label" if unlabelled else classes[label]

    def badge(answer: int) -> Badge:
        kind = "" if unlabelled else "right" if answer == label else "wrong"
        return Badge(_answer_text(classes, answer), kind)

    corrected = found.sweep.has_correction
    differs = row.label is not None and not unlabelled and classes[label] != row.label
    return _image_tile(
        image,
        f"annotators: {named}; classifier before: {classes[before]}"
        + (f", after: {classes[after]}" if corrected else ""),
        badge(before),
        badge(after) if corrected else None,
        _answer_text(classes, label) if differs else None,
    )


def _image_tile(
    image: F32, description: str, before: Badge, after: Badge | None = None, own_label: str | None = None
) -> ImageTile:
    """Return the tile of an image (channels, H, W) in [0, 1]."""
    pixelated = max(image.shape[1:]) <= PIXEL_ART
    return ImageTile(data_address(image), description, pixelated, before, after, own_label)


def _with_thumbnails(cards: Sequence[ScenarioCard]) -> list[ScenarioCard]:
    """Return the cards with smaller images; the nearest real images stay with the first SHOWN_REAL that have some."""
    shown = [card.row.number for card in cards if card.real][:SHOWN_REAL]
    return [
        replace(
            card,
            tiles=tuple(map(_thumbnail, card.tiles)),
            real=tuple(map(_thumbnail, card.real)) if card.row.number in shown else (),
        )
        for card in cards
    ]


def _thumbnail(tile: ImageTile) -> ImageTile:
    """Return a tile with its image as a JPEG of at most THUMBNAIL pixels a side."""
    file = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(tile.address.partition(",")[2]))) as picture:
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        picture.save(file, "jpeg", quality=80)
    return replace(tile, address=f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}")


def render_run(report: Report | None, headline: str, page: str) -> str:
    """Return a run in a notebook: headline, caveats, accuracies; the headline alone without report.

    Those are before the correction, after plain further training, where it was measured, and after the correction.
    """
    rows = list[tuple[str, float | None, float | None, float | None]]()
    if report is not None:
        before, plain, after = report.accuracy.before, report.accuracy.plain, report.accuracy.defuse
        if report.evidence is not None and not report.evidence.judges.worse:
            own = report.evidence.own_label
            shares = own.before.value, own.plain.value, own.defuse.value
            rows.append(("scenario images, by the judges' labels", *shares))
        for name, field in (
            ("scenario images, by the scenario's label", "scenario"),
            ("validation images", "validation"),
            ("test images", "test"),
        ):
            rows.append((name, getattr(before, field), getattr(plain, field, None), getattr(after, field)))
    return _notebook_html("run", report=report, headline=headline, page=page, rows=rows)


def render_scenarios(cards: Sequence[ScenarioCard], classes: tuple[str, ...]) -> str:
    """Return the scenarios in a notebook: the reviewed images of each, and what is known of it; rejected ones last."""
    return _notebook_html(
        "scenarios",
        accepted=[card for card in cards if card.row.accepted],
        others=[card for card in cards if not card.row.accepted],
        class_numbers=() if _names_are_short(classes) else tuple(enumerate(classes)),
        corrected=any(tile.after for card in cards for tile in card.tiles),
    )


def render_real(images: F32, labels: Sequence[str], answers: Sequence[str], title: str) -> str:
    """Return real images (n, channels, H, W) as a row in a notebook, each with its class and the answer before."""
    tiles = [
        _image_tile(
            image,
            f"image of {label}; classifier before: {answer}",
            Badge(label, ""),
            Badge(answer, "right" if answer == label else "wrong"),
        )
        for image, label, answer in zip(images, labels, answers, strict=True)
    ]
    return _notebook_html("real", tiles=tiles, title=title)


def _notebook_html(name: str, **values: Any) -> str:
    text = environment().get_template(f"notebook_{name}.html.j2").render(**values)
    return formatting.unbroken(text)
