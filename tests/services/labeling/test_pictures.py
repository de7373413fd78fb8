"""Large pictures lie in the run's bucket, and Label Studio shows them from there with the run's own credentials."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from label_studio_live import digits_gallery, review_run, settings_for
from PIL import Image
from s3_servers import rclone_server

from defuse_core.runs import Run
from defuse_core.store import FolderStore
from services.labeling import LabelStudioAnnotators
from services.storage import open_store

KEYS = {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "hush-hush-hush"}


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "bucket").mkdir()
    with rclone_server(tmp_path, *KEYS.values()) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield open_store("s3://bucket/runs")


@pytest.mark.parametrize("form", ["image", "scenario"])
def test_pictures_over_the_bound_are_shown_from_the_bucket(bucket, server, accounts, form):
    gallery = digits_gallery(size=96)
    run = review_run(bucket, gallery, inline_kb=1, form=form)
    annotators = LabelStudioAnnotators(run, settings_for(server))
    number = annotators.push(gallery).number
    task = accounts[0].next_task(number)
    shown = task["data"]["image"] if form == "image" else task["data"]["samples"][0]["image"]
    pictures = [address for address in [shown] if address]
    reply = accounts[0].http.get(pictures[0], follow_redirects=True)
    reply.raise_for_status()
    seen = np.asarray(Image.open(io.BytesIO(reply.content)), np.float32) / 255
    assert np.abs(seen - gallery.images[0, 0, 0]).max() < 1 / 254
    assert annotators.push(gallery).number == number


def test_a_run_that_was_copied_out_of_the_bucket_goes_on_with_its_project(bucket, server, tmp_path, caplog):
    gallery = digits_gallery(size=96)
    run = review_run(bucket, gallery, inline_kb=1)
    number = LabelStudioAnnotators(run, settings_for(server)).push(gallery).number
    copied = FolderStore(tmp_path / "copy").within(run.name)
    for key in run.store.list():
        copied.write(key, run.store.read(key))
    run = Run.open(FolderStore(tmp_path / "copy"), run.name)
    assert LabelStudioAnnotators(run, settings_for(server)).push(gallery).number == number
    assert "the bucket that the run was pushed from" in caplog.text


def test_pictures_within_the_bound_stay_in_their_task(bucket, server):
    gallery = digits_gallery()
    annotators = LabelStudioAnnotators(review_run(bucket, gallery), settings_for(server))
    number = annotators.push(gallery).number
    task = next(annotators.client.tasks(number, with_data=True))
    assert base64.b64decode(task.data["image"].partition(",")[2]).startswith(b"\x89PNG")
