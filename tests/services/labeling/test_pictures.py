"""Tasks hold their pictures, photographs as well, and a push that is repeated recognises them."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from label_studio_live import photographs_gallery
from PIL import Image

from defuse_core.data.images import to_levels, to_picture


def pixels_at(address: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))), np.float32) / 255


@pytest.mark.parametrize("form", ["image", "scenario"])
def test_tasks_hold_their_photographs_and_label_studio_gets_no_access_to_the_store(
    make_review, accounts, form
):
    review = make_review(gallery=photographs_gallery(), form=form)
    number = review.annotators.push(review.gallery).number
    task = accounts[0].next_task(number)
    shown = (
        [task["data"]["image"]] if form == "image" else [each["image"] for each in task["data"]["samples"]]
    )
    for address, image in zip(shown, review.gallery.images[0], strict=False):
        assert address.startswith("data:image/jpeg;base64,") and len(address) < 50_000
        assert np.abs(pixels_at(address) - image.transpose(1, 2, 0)).mean() < 0.03
    storages = accounts[0].http.get("/api/storages/", params={"project": number})
    assert (storages.status_code, storages.json()) == (200, [])
    seen = json.dumps([accounts[0].http.get(f"/api/projects/{number}/").json(), task["data"]])
    assert review.run.store.address not in seen


def test_a_repeated_push_and_a_lost_mark_leave_photographs_that_another_encoder_wrote(
    make_review, monkeypatch
):
    def lossless(image: np.ndarray) -> str:
        file = io.BytesIO()
        to_picture(to_levels(image)).save(file, "png")
        return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"

    review = make_review(gallery=photographs_gallery())
    first, before = review.annotators.push(review.gallery), review.tasks()
    monkeypatch.setattr("services.labeling.tasks.data_address", lossless)  # as in another version of Pillow
    assert review.annotators.push(review.gallery) == first
    review.api.update_project(first.number, description="")
    assert review.annotators.push(review.gallery, repair=True) == first
    assert first.mark in review.api.project(first.number).settings.description
    assert review.tasks() == before
