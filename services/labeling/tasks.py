"""The tasks of a run: what each shows, under a key that says which image or scenario it is."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from defuse_core.artifacts import F32, Gallery
from defuse_core.config import ReviewSection
from defuse_core.errors import InputError
from defuse_core.store import Store
from services.labeling.config import LABEL, choice_names

MODEL = "reference models"  # who makes suggestions


@dataclass(frozen=True)
class Place:
    """What a task is about: one image of a scenario, or (image None) the whole page of it."""

    scenario: int
    image: int | None

    @property
    def key(self) -> str:
        """The sample_key, such as s003-i07."""
        return f"s{self.scenario:03d}" + ("" if self.image is None else f"-i{self.image:02d}")


@dataclass(frozen=True)
class Suggestion:
    """The answer preselected in a task, and how sure the models are of it."""

    answer: int  # class, or NONE_OF_THE_ABOVE
    confidence: float  # mean probability of their best class, in [0, 1]
    shown: str  # the object in the labelling interface: image, or page

    def prediction(self, names: Sequence[str]) -> dict[str, Any]:
        """Return it as Label Studio's prediction.

        `names` are those of the choices, none-of-the-above last.
        """
        choice = {"choices": [names[self.answer]]}
        result = {"from_name": LABEL, "to_name": self.shown, "type": "choices", "value": choice}
        return {"model_version": MODEL, "score": self.confidence, "result": [result]}


class Samples:
    """All tasks of a run, numbered scenario by scenario and made one at a time.

    Memory does not grow with their number.
    """

    def __init__(self, gallery: Gallery, review: ReviewSection, store: Store) -> None:
        self.gallery, self.review, self.store = gallery, review, store
        self.names = choice_names(gallery.classes)
        self.pages = review.form == "scenario"
        self.per_scenario = 1 if self.pages else gallery.predicted.shape[1]

    def __len__(self) -> int:
        return len(self.gallery) * self.per_scenario

    def place(self, number: int) -> Place:
        """Return what the task of that number is about."""
        scenario, image = divmod(number, self.per_scenario)
        return Place(scenario, None if self.pages else image)

    def number(self, key: str | None) -> int | None:
        """Return the number of the task with this sample_key; None for one that is not of this run."""
        found = re.fullmatch(r"s(\d{3,9})(?:-i(\d{2,9}))?", key or "")
        if found is None:
            return None
        number = int(found[1]) * self.per_scenario + int(found[2] or 0)
        return number if number < len(self) and self.place(number).key == key else None

    def task(self, number: int, suggestion: Suggestion | None = None) -> dict[str, Any]:
        """Return the task as Label Studio imports it, with a preselected answer if there is one."""
        place = self.place(number)
        data = self._page(place) if place.image is None else self._single(place.scenario, place.image)
        data |= {"sample_key": place.key, "scenario": place.scenario}
        task: dict[str, Any] = {"data": data, "meta": {"sample_key": place.key, "digest": digest(data)}}
        return task if suggestion is None else task | {"predictions": [suggestion.prediction(self.names)]}

    def _single(self, scenario: int, image: int) -> dict[str, Any]:
        return {"image": self._picture(scenario, image), "picture": image}

    def _page(self, place: Place) -> dict[str, Any]:
        samples = [
            {"image": self._picture(place.scenario, image), "says": f"classifier: {self.names[answer]}"}
            for image, answer in enumerate(self.gallery.predicted[place.scenario].tolist())
        ]
        return {"title": f"Scenario {self.gallery.number(place.scenario)}", "samples": samples}

    def _picture(self, scenario: int, image: int) -> str:
        """Return a picture as its own address, or, if it is large, its address in the run's S3 store."""
        data = png(self.gallery.images[scenario, image])
        if len(data) <= self.review.inline_kb * 1024:
            return f"data:image/png;base64,{base64.b64encode(data).decode()}"
        if not self.store.address.startswith("s3://"):
            raise InputError(
                f"a picture takes {len(data) / 1024:.0f} KB and review.inline_kb is {self.review.inline_kb}: raise "
                "it, or keep the run in S3 (--store s3://bucket/prefix), from where larger pictures are shown"
            )
        key = f"pictures/{Place(scenario, image).key}.png"
        self.store.write(key, data)
        return f"{self.store.address}/{key}"


def digest(data: Mapping[str, Any]) -> str:
    """Return what tells whether someone edited a task since it was pushed."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def png(image: F32) -> bytes:
    """Return one image, (channels, H, W) in [0, 1], as PNG."""
    pixels = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    shown = Image.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1))
    buffer = io.BytesIO()
    shown.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
