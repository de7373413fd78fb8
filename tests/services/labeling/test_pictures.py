"""Large pictures are in the run's bucket; Label Studio shows them, and can read nothing else there."""

from __future__ import annotations

import base64
import io
import json
import time
import traceback
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import numpy as np
import pytest
from label_studio_live import digits_gallery, pictures_address, review_run, settings_for
from PIL import Image
from s3_servers import one_loader, rclone_server

from defuse_core.config import ReviewSection, RunFile
from defuse_core.errors import InputError, StoreSettingsError
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from services.labeling.annotators import RENEWAL_S, LabelStudioAnnotators
from services.labeling.records import BucketStorage
from services.labeling.tasks import ReviewTasks, bucket_storage, png
from services.settings import BucketAccess, read_settings
from services.storage import open_store
from tests.ports import free_port
from tests.waiting import wait_until

OWN = {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "hush-hush-hush"}
PICTURES_ONLY = (
    "--read-only",
    "--include=/*/**/pictures/**",
    "--dir-cache-time=1s",
)  # as deploy/compose.yaml


@pytest.fixture
def bucket(tmp_path, monkeypatch, no_project_stays):
    monkeypatch.setattr("botocore.session.create_loader", one_loader)
    for name, value in OWN.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "buckets" / "bucket").mkdir(parents=True)
    with rclone_server(tmp_path / "buckets", *OWN.values()) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield open_store("s3://bucket/runs")


@pytest.fixture
def access(bucket, tmp_path):
    """A server of the same bucket that has a key of its own, and serves pictures alone, to be read only."""
    port = urlsplit(pictures_address()).port
    with rclone_server(tmp_path / "buckets", "pictures", "pictures-secret", port, PICTURES_ONLY):
        yield BucketAccess("pictures", "pictures-secret", endpoint=pictures_address())


def review_of(store, server, gallery, access, **review):
    settings = replace(settings_for(server), label_studio_s3=access)
    return LabelStudioAnnotators(review_run(store, gallery, **review), settings)


def read_through_label_studio(account, task, address):
    """Request any key of the bucket, as a member of Label Studio's organisation can."""
    wanted = base64.urlsafe_b64encode(address.encode()).decode()
    return account.http.get(f"/tasks/{task}/resolve/?fileuri={wanted}")


@pytest.mark.parametrize("form", ["image", "scenario"])
def test_annotators_see_pictures_over_the_bound_and_read_nothing_else_of_the_run(
    access, bucket, server, accounts, form, caplog
):
    gallery = digits_gallery(size=96)
    annotators = review_of(bucket, server, gallery, access, inline_kb=1, form=form)
    number = annotators.push(gallery).number
    task = accounts[0].next_task(number)
    shown = task.data["image"] if form == "image" else task.data["samples"][0]["image"]
    reply = accounts[0].http.get(shown, follow_redirects=True)
    reply.raise_for_status()
    seen = np.asarray(Image.open(io.BytesIO(reply.content)), np.float32) / 255
    assert np.abs(seen - gallery.images[0, 0, 0]).max() < 1 / 254
    picture = f"{annotators.run.store.address}/pictures/s003-i02.png"
    time.sleep(1.5)  # the server of pictures lists a folder anew after a second (--dir-cache-time)
    wait_until(lambda: read_through_label_studio(accounts[0], task.id, picture).status_code == 200)
    for key in ("run.yaml", "gallery.safetensors", "labeling.json"):
        address = f"{annotators.run.store.address}/{key}"
        assert read_through_label_studio(accounts[0], task.id, address).status_code >= 400
    assert "can read all" not in caplog.text
    assert annotators.push(gallery).number == number


def test_without_credentials_of_its_own_label_studio_gets_none_and_nothing_is_pushed(bucket, server):
    gallery = digits_gallery(size=96)
    annotators = review_of(bucket, server, gallery, BucketAccess(), inline_kb=1)
    with pytest.raises(InputError, match="set LABEL_STUDIO_S3_ACCESS_KEY_ID"):
        annotators.push(gallery)
    assert not annotators.run.store.exists("labeling.json")


def test_the_credentials_of_this_process_are_not_accepted_under_another_name(bucket, server):
    gallery = digits_gallery(size=96)
    annotators = review_of(bucket, server, gallery, BucketAccess(*OWN.values()), inline_kb=1)
    with pytest.raises(InputError, match="every annotator could read what it can read"):
        annotators.push(gallery)
    assert not annotators.run.store.exists("labeling.json")


@pytest.mark.usefixtures("no_project_stays")
def test_shared_credentials_work_and_the_log_warns_what_annotators_can_read(
    tmp_path, monkeypatch, server, accounts, caplog
):
    monkeypatch.setattr("botocore.session.create_loader", one_loader)
    for name, value in OWN.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "bucket").mkdir()
    port, flags = urlsplit(pictures_address()).port, ("--auth-key=renewed,renewed-secret",)
    with rclone_server(tmp_path, *OWN.values(), port, flags) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        store, gallery = open_store("s3://bucket/runs"), digits_gallery(size=96)
        annotators = review_of(store, server, gallery, BucketAccess(share_own=True), inline_kb=1)
        number = annotators.push(gallery).number
        task = accounts[0].next_task(number)
        address = f"{annotators.run.store.address}/run.yaml"
        assert read_through_label_studio(accounts[0], task.id, address).status_code == 200
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "renewed")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "renewed-secret")
        connect, given = annotators.client.connect_bucket, []

        def connect_and_note(project: int, storage: BucketStorage) -> None:
            connect(project, storage)
            given.append((project, storage.aws_access_key_id, storage.aws_secret_access_key))

        monkeypatch.setattr(annotators.client, "connect_bucket", connect_and_note)
        annotators._renew_credentials(gallery)  # too early
        annotators.renewed_s -= RENEWAL_S
        annotators._renew_credentials(gallery)
        annotators._renew_credentials(gallery)
        assert given == [(number, "renewed", "renewed-secret")]
        assert read_through_label_studio(accounts[0], task.id, address).status_code == 200
    assert f"can read all of {annotators.run.store.address}" in caplog.text


def test_credentials_of_this_process_that_cannot_be_read_are_an_error_of_the_store(bucket, monkeypatch):
    for name in OWN:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/nonexistent/token")
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/x")
    with pytest.raises(StoreSettingsError, match=r"^s3://bucket/runs: .*/nonexistent/token: No such file"):
        bucket_storage(bucket, "shared", BucketAccess(share_own=True))


def test_wrong_credentials_are_found_before_anything_is_pushed(access, bucket, server):
    gallery = digits_gallery(size=96)
    wrong = replace(access, secret_access_key="something-else")
    annotators = review_of(bucket, server, gallery, wrong, inline_kb=1)
    with pytest.raises(
        InputError, match=r"cannot list and read .*LABEL_STUDIO_S3_SESSION_TOKEN \(which expires\)"
    ):
        annotators.push(gallery)
    assert not annotators.run.store.exists("labeling.json")


def test_an_address_that_label_studio_alone_reaches_is_left_to_it_with_a_warning(access, bucket, caplog):
    bucket.write("pictures/s000-i00.png", b"picture")
    elsewhere = replace(access, endpoint=f"http://127.0.0.1:{free_port()}")  # nothing listens there
    assert bucket_storage(bucket, "elsewhere", elsewhere).s3endpoint == elsewhere.endpoint
    assert f"{elsewhere.endpoint} is not reached from here" in caplog.text


@pytest.mark.parametrize("address", ["pictures:9000", "http://ana:sup3r@my_pictures:9000"])
def test_an_address_of_the_bucket_that_is_none_is_said_without_its_password(access, bucket, address):
    with pytest.raises(
        InputError, match="LABEL_STUDIO_S3_ENDPOINT: expected such as http://host:9000"
    ) as refused:
        bucket_storage(bucket, "elsewhere", replace(access, endpoint=address))
    assert "sup3r" not in "".join(traceback.format_exception(refused.value))


def test_label_studio_gets_no_password_in_the_address_of_the_bucket(access, bucket, caplog):
    bucket.write("pictures/s000-i00.png", b"picture")
    port = free_port()
    elsewhere = replace(access, endpoint=f"http://ana:sup3r@127.0.0.1:{port}")
    assert bucket_storage(bucket, "elsewhere", elsewhere).s3endpoint == f"http://127.0.0.1:{port}"
    assert "is not reached from here" in caplog.text and "sup3r" not in caplog.text


def test_a_bucket_that_label_studio_blocks_is_named_with_the_cause_before_any_task_is_pushed(bucket, server):
    gallery = digits_gallery(size=96)
    annotators = review_of(bucket, server, gallery, BucketAccess(share_own=True), inline_kb=1)
    with pytest.raises(InputError, match=r"blocks the bucket's address .*LABEL_STUDIO_S3_ENDPOINT="):
        annotators.push(gallery)
    mark = json.loads(annotators.run.store.read("labeling.json"))["mark"]
    (project,) = annotators.client.find_projects(mark)
    assert list(annotators.client.tasks(project.id)) == []


def test_a_run_that_was_copied_out_of_the_bucket_continues_with_its_project(
    access, bucket, server, tmp_path, caplog
):
    gallery = digits_gallery(size=96)
    annotators = review_of(bucket, server, gallery, access, inline_kb=1)
    number, run = annotators.push(gallery).number, annotators.run
    copied = FolderStore(tmp_path / "copy").within(run.name)
    for key in run.store.list():
        copied.write(key, run.store.read(key))
    run = Run.open(FolderStore(tmp_path / "copy"), run.name)
    assert LabelStudioAnnotators(run, settings_for(server)).push(gallery).number == number
    assert "the bucket that the run was pushed from" in caplog.text


@pytest.mark.parametrize("form", ["image", "scenario"])
def test_tasks_of_a_run_that_was_moved_in_the_bucket_show_its_pictures_there_and_keep_their_answers(
    access, bucket, server, accounts, form
):
    gallery = digits_gallery(size=96)
    annotators = review_of(bucket, server, gallery, access, inline_kb=1, form=form)
    number, before = annotators.push(gallery).number, annotators.run
    task = accounts[0].next_task(number)
    accounts[0].answer(task.id, "image" if form == "image" else "page", "8")
    store = open_store("s3://bucket/moved")
    for key in before.store.list():
        store.within(before.name).write(key, before.store.read(key))
    before.store.delete_all()
    run = Run.open(store, before.name)
    after = LabelStudioAnnotators(run, replace(settings_for(server), label_studio_s3=access))
    assert after.push(gallery).number == number
    shown = [json.dumps(task.data) for task in after.client.tasks(number, with_data=True)]
    assert len(shown) == (12 if form == "image" else 4)
    assert all(f'"{run.store.address}/pictures/' in text and "/runs/" not in text for text in shown)
    assert after.status(gallery)[0].given == 1
    shown = accounts[0].next_task(number).data
    address = shown["image"] if form == "image" else shown["samples"][0]["image"]
    wait_until(lambda: accounts[0].http.get(address, follow_redirects=True).status_code == 200)


def test_a_review_whose_answers_are_in_ends_without_credentials_for_its_pictures(
    access, bucket, server, accounts
):
    gallery = digits_gallery(labels=(8,), images=1, size=96)
    annotators = review_of(bucket, server, gallery, access, inline_kb=1, answers_per_task=1)
    number = annotators.push(gallery).number
    later = LabelStudioAnnotators(annotators.run, settings_for(server))  # none, as if they had expired
    with pytest.raises(InputError, match="Label Studio has no credentials"):
        later.review(gallery)
    accounts[0].answer(accounts[0].next_task(number).id, "image", "8")
    assert later.review(gallery).answer.tolist() == [8]


def test_pictures_within_the_bound_are_inline(bucket, server):
    gallery = digits_gallery()
    annotators = review_of(bucket, server, gallery, BucketAccess())
    number = annotators.push(gallery).number
    task = next(annotators.client.tasks(number, with_data=True))
    assert base64.b64decode(task.data["image"].partition(",")[2]).startswith(b"\x89PNG")


@pytest.mark.parametrize("channels, size", [(1, 64), (3, 20)])
def test_the_first_picture_that_is_too_large_is_found_by_its_file(tmp_path, channels, size):
    images = np.zeros((2, 3, channels, size, size), np.float32)
    gallery = replace(digits_gallery(labels=(8, 3)), images=images)
    tasks, roomy = (
        ReviewTasks(gallery, ReviewSection(inline_kb=size), FolderStore(tmp_path)) for size in (1, 64)
    )
    assert tasks.first_in_bucket() is None  # blank, so that their files are small
    images[1, 1:] = np.random.default_rng(0).random(images[1, 1:].shape)
    assert tasks.first_in_bucket() == (1, 1)
    assert roomy.first_in_bucket() is None


@pytest.mark.parametrize(
    ("size", "inline_kb", "warns"), [(224, 64, True), (224, 150, False), (128, 64, False)]
)
def test_a_run_warns_at_its_start_of_pictures_that_may_be_too_large_for_their_tasks(
    tmp_path, monkeypatch, caplog, size, inline_kb, warns
):
    monkeypatch.setattr(LabelStudioAnnotators, "client", SimpleNamespace(check_access=lambda: None))
    spec = RunFile.model_validate(
        {
            "data": {"name": "folder", "root": tmp_path, "image_size": size, "channels": 3},
            "vae": {"architecture": "convolutional"},
            "review": {"annotators": "label-studio", "inline_kb": inline_kb},
        }
    )
    LabelStudioAnnotators(Run.start(FolderStore(tmp_path), "large", spec), read_settings())
    assert (f"up to 149 KB, and review.inline_kb is {inline_kb}" in caplog.text) is warns


def test_a_picture_of_exactly_the_bound_is_inline(tmp_path):
    noise = np.random.default_rng(0).random((1, 48, 48), np.float32)
    covered = (np.where(np.arange(48 * 48).reshape(1, 48, 48) < n, noise, 0) for n in range(700, 1200))
    image = next(image for image in covered if len(png(image)) == 1024)
    gallery = replace(digits_gallery(labels=(8,), images=1), images=image[None, None])
    tasks = ReviewTasks(gallery, ReviewSection(inline_kb=1), FolderStore(tmp_path))
    assert base64.b64decode(tasks.picture(0, 0).partition(",")[2]) == png(image)
    assert tasks.first_in_bucket() is None


def test_compose_serves_label_studio_the_same_way_as_these_tests():
    compose = (Path(__file__).parents[3] / "deploy" / "compose.yaml").read_text()
    assert all(f"- {flag}\n" in compose for flag in PICTURES_ONLY)
