"""The tasks of a review, each under a key that names its image or scenario, and the pictures that they show.

Small pictures are inline in their task, large ones in the run's bucket. Label Studio reads these with credentials of
its own. Every member of its organisation can read what these can read, so they must be limited to the pictures.
"""

from __future__ import annotations

import base64
import hmac
import io
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np

from defuse_core.artifacts import F32, I64, NONE_OF_THE_ABOVE, Bool, Gallery
from defuse_core.config import ReviewSection
from defuse_core.data.images import to_levels, to_picture
from defuse_core.errors import InputError, without_credentials
from defuse_core.review.verdicts import LEAST_ANSWERS, stops_when_sure
from defuse_core.runs import Run
from defuse_core.store import Store
from services.labeling.interface import LABEL, choice_names, instructions, label_config
from services.labeling.records import (
    BucketStorage,
    ImageData,
    PageData,
    PageSample,
    PreselectedAnswer,
    ProjectSettings,
    Task,
    TaskImport,
    TaskMeta,
    choice_result,
)
from services.settings import BucketAccess

if TYPE_CHECKING:
    from services.storage.s3 import S3Store

log = logging.getLogger("defuse")

PRELABEL_MODEL = "reference models"  # the model version of predictions in Label Studio
BATCH_TASKS = 250
BATCH_BYTES = 900_000  # proxies such as nginx refuse requests over 1 MiB unless told otherwise
PICTURES_FOLDER = "pictures"
# Header, palette and the deflate stream's own bytes, for pictures of any usual size.
PNG_OVERHEAD_BYTES = 1024


@dataclass(frozen=True)
class TaskSubject:
    """The subject of a task: one image of a scenario, or (image None) the page of the whole scenario."""

    scenario: int
    image: int | None

    @property
    def key(self) -> str:
        """The sample_key, such as s003-i07."""
        return f"s{self.scenario:03d}" + ("" if self.image is None else f"-i{self.image:02d}")


class ReviewTasks:
    """All T tasks of a review, numbered scenario by scenario and created one at a time.

    Memory does not grow with their number.
    """

    def __init__(self, gallery: Gallery, review: ReviewSection, store: Store) -> None:
        self.gallery, self.review, self.store = gallery, review, store
        self.names = choice_names(gallery.classes)
        self.whole_pages = review.form == "scenario"
        self.per_scenario = 1 if self.whole_pages else gallery.predicted.shape[1]

    @property
    def first_answers(self) -> int:
        """Answers for which a task is open at first: all, or as many as CROWDLAB needs to be sure of an image."""
        asked = self.review.answers_per_task
        return min(asked, LEAST_ANSWERS) if stops_when_sure(self.review) else asked

    def __len__(self) -> int:
        return len(self.gallery) * self.per_scenario

    def subject(self, index: int) -> TaskSubject:
        """Return the subject of the task with that index."""
        scenario, image = divmod(index, self.per_scenario)
        return TaskSubject(scenario, None if self.whole_pages else image)

    def index_of(self, key: str | None) -> int | None:
        """Return the index of the task with this sample_key; None if it is not a task of this review."""
        found = re.fullmatch(r"s(\d{3,9})(?:-i(\d{2,9}))?", key or "")
        if found is None:
            return None
        index = int(found[1]) * self.per_scenario + int(found[2] or 0)
        return index if index < len(self) and self.subject(index).key == key else None

    def task(self, index: int, prelabel: PreselectedAnswer | None = None, *, secret: str) -> TaskImport:
        """Return the task as Label Studio imports it, with a preselected answer if there is one.

        `secret` is that of the run's ProjectState.
        """
        subject = self.subject(index)
        if subject.image is None:
            data: PageData | ImageData = self._page(subject)
        else:
            data = ImageData(image=self.picture(subject.scenario, subject.image))
        # The key is no data: annotators see all data in Label Studio's list of tasks.
        meta = TaskMeta(sample_key=subject.key, digest=digest(subject.key, data, secret))
        task = TaskImport(data=data, meta=meta)
        if prelabel is not None:
            task["predictions"] = [prelabel]
        return task

    def _page(self, subject: TaskSubject) -> PageData:
        samples = [
            PageSample(
                image=self.picture(subject.scenario, image), prediction=f"classifier: {self.names[answer]}"
            )
            for image, answer in enumerate(self.gallery.predicted[subject.scenario].tolist())
        ]
        return PageData(page="Pictures", samples=samples)

    def picture(self, scenario: int, image: int) -> str:
        """Return a data: address with the picture itself, or, if it is large, its address in the run's S3 store.

        Raises InputError for a large picture of a run that is not in S3.
        """
        data = png(self.gallery.images[scenario, image])
        if len(data) <= self.review.inline_kb * 1024:
            return f"data:image/png;base64,{base64.b64encode(data).decode()}"
        if not self.store.address.startswith("s3://"):
            raise InputError(
                f"a picture has {len(data) / 1024:.0f} KB and review.inline_kb is {self.review.inline_kb}: raise it "
                "(--set; the run goes on), or keep the run in S3 (--store s3://bucket/prefix), which larger pictures "
                "are shown from"
            )
        key = f"{PICTURES_FOLDER}/{TaskSubject(scenario, image).key}.png"
        self.store.write(key, data)
        return f"{self.store.address}/{key}"

    def shows_moved_pictures(self, task: Task) -> bool:
        """Whether a task shows pictures from where the run was in S3 before it was moved to where it is there now."""
        if not self.store.address.startswith("s3://"):
            return False
        shown = re.findall(rf'"(s3://[^"]+)/{PICTURES_FOLDER}/', json.dumps(task.data, ensure_ascii=False))
        return any(address != self.store.address for address in shown)

    def first_in_bucket(self) -> tuple[int, int] | None:
        """Return scenario and image of the first picture that is too large to be inline; None if none is."""
        limit = self.review.inline_kb * 1024
        scenarios, images, channels, height, width = self.gallery.images.shape
        if _most_bytes(channels, height, width) <= limit:
            return None
        places = ((scenario, image) for scenario in range(scenarios) for image in range(images))
        return next((place for place in places if len(png(self.gallery.images[place])) > limit), None)


def warn_of_large_pictures(run: Run) -> None:
    """Warn where pictures of the run's size may be too large for their tasks, and the run is not in S3."""
    data, limit = run.spec.data, run.spec.review.inline_kb
    largest = math.ceil(_most_bytes(data.channels, data.image_size, data.image_size) / 1024)
    if largest > limit and not run.store.address.startswith("s3://"):
        log.warning(
            "review: a picture can have up to %d KB, and review.inline_kb is %d: where pictures are larger, raise it, "
            "now or when the run stops at them, or keep the run in S3 from the start (--store s3://bucket/prefix)",
            largest,
            limit,
        )


def _most_bytes(channels: int, height: int, width: int) -> int:
    """Return an upper bound of a picture's PNG: uncompressed."""
    return channels * height * width + height + PNG_OVERHEAD_BYTES


def digest(key: str, data: Mapping[str, object], secret: str) -> str:
    """Return a digest of a task's key and data, by which a later edit is recognised.

    It is part of the task, where every annotator can write, so it needs the run's secret (HMAC, RFC 2104).
    """
    text = json.dumps([key, data], sort_keys=True).encode()
    return hmac.digest(secret.encode(), text, "sha256").hex()[:32]


def is_edited(task: Task, secret: str) -> bool:
    """Whether someone edited a task of a review since it was pushed."""
    return task.data is None or digest(str(task.key), task.data, secret) != task.digest


def batches(tasks: Iterable[TaskImport]) -> Iterator[list[TaskImport]]:
    """Yield the tasks in lists that are bounded in number and bytes."""
    batch: list[TaskImport] = []
    size = 0
    for task in tasks:
        grown = size + len(str(task))
        if batch and (len(batch) == BATCH_TASKS or grown > BATCH_BYTES):
            yield batch
            batch, grown = [], len(str(task))
        batch.append(task)
        size = grown
    if batch:
        yield batch


def prelabels_by_task(tasks: ReviewTasks, probabilities: F32) -> dict[int, PreselectedAnswer]:
    """Return the answer that is preselected in each task, by its index, the least certain first.

    That is the order in which annotators get the tasks. `probabilities` (W, S, R, C) are those of the reference models.
    """
    mean = probabilities.mean(axis=0)  # (S, R, C)
    if tasks.whole_pages:
        mean = mean.mean(axis=1, keepdims=True)  # (S, 1, C)
    best, confidence = mean.argmax(axis=2), mean.max(axis=2)
    least, target = tasks.review.reference.min_confidence, "page" if tasks.whole_pages else "image"
    prelabels: dict[int, PreselectedAnswer] = {}
    for index in np.argsort(confidence, axis=None, kind="stable").tolist():
        certainty = float(confidence.flat[index])
        answer = int(best.flat[index]) if certainty >= least else NONE_OF_THE_ABOVE
        result = choice_result(LABEL, target, tasks.names[answer])
        prelabels[index] = {"model_version": PRELABEL_MODEL, "score": certainty, "result": [result]}
    return prelabels


@dataclass(eq=False)
class PresentTasks:
    """The tasks that are in the project already, of T."""

    ids: I64  # (T,) ids in Label Studio; 0 for a task that is missing
    answered: Bool  # (T,)

    @classmethod
    def none(cls, count: int) -> PresentTasks:
        return cls(np.zeros(count, np.int64), np.zeros(count, bool))

    def add(self, index: int, task: Task) -> int:
        """Add a task. Of two equal ones return the id of the one to delete: never one that somebody answered."""
        first = int(self.ids[index])
        if first and not task.annotations:
            return task.id
        if first and self.answered[index]:
            return 0  # annotations.py reads two answered ones as one
        self.ids[index], self.answered[index] = task.id, bool(task.annotations)
        return first


def run_label(run: str) -> str:
    """Return what the descriptions of the projects of all runs of this name have in common."""
    return f"its run {run}. Leave this mark"


def project_settings(tasks: ReviewTasks, run: str, mark: str) -> ProjectSettings:
    """Return the settings that the project of a run should have; it is known by its mark."""
    review, classes = tasks.review, tasks.gallery.classes
    return ProjectSettings(
        title=f"Defuse {run}"[:50],
        description=f"Made by Defuse for {run_label(run)}: {mark}",
        label_config=label_config(review.form, classes),
        expert_instruction=instructions(review.form, classes),
        show_instruction=True,
        show_skip_button=False,  # none-of-the-above is the answer to give
        maximum_annotations=tasks.first_answers,
        sampling="Sequential sampling",
        show_collab_predictions=review.prelabel,
        model_version=PRELABEL_MODEL if review.prelabel else "",
    )


def pictures_storage(
    tasks: ReviewTasks, run: str, access: BucketAccess, pushed: int | None
) -> BucketStorage | None:
    """Return the storage that shows pictures in the run's bucket; None if all pictures are inline.

    The first picture in the bucket is written and read with Label Studio's credentials, before any task exists.
    `pushed` is the number of the project, once it has all tasks.
    """
    place, store = tasks.first_in_bucket(), tasks.store
    if place is None:
        return None
    if not store.address.startswith("s3://") and pushed is not None:
        log.warning("project %d shows pictures from the bucket that the run was pushed from", pushed)
        return None
    tasks.picture(*place)  # raises InputError for a run that is not in S3
    return bucket_storage(cast("S3Store", store), f"Pictures of {run}", access)


def bucket_storage(store: S3Store, title: str, access: BucketAccess) -> BucketStorage:
    """Return the Label Studio storage that shows the run's pictures.

    Raises InputError if Label Studio has no credentials of its own, or if they cannot read the pictures.
    """
    key, endpoint = _key(store, access), access.endpoint or store.endpoint
    storage = BucketStorage(
        title=title,
        bucket=store.bucket,
        prefix=f"{store.prefix}{PICTURES_FOLDER}",
        # without user name and password: every annotator can read the storages of a project
        s3endpoint=endpoint and without_credentials(endpoint).replace("***@", ""),
        region_name=store.region,
        aws_access_key_id=key.access_key_id or "",
        aws_secret_access_key=key.secret_access_key or "",
        aws_session_token=key.session_token or "",
    )
    _check_access(store, storage)
    return storage


def _key(store: S3Store, access: BucketAccess) -> BucketAccess:
    """Return the key with which Label Studio reads the pictures: its own, or this process's where it is shared."""
    import boto3

    from services.storage.s3_errors import translated_errors

    with translated_errors(store.address, store.endpoint):
        found = boto3.Session().get_credentials()
        own = None if found is None else found.get_frozen_credentials()
    if access.share_own and own is not None:
        return replace(
            access, access_key_id=own.access_key, secret_access_key=own.secret_key, session_token=own.token
        )
    if access.access_key_id is None or access.secret_access_key is None:
        raise InputError(
            f"pictures over review.inline_kb are in {store.address}/{PICTURES_FOLDER}, and Label Studio has no "
            "credentials to read them: set LABEL_STUDIO_S3_ACCESS_KEY_ID and LABEL_STUDIO_S3_SECRET_ACCESS_KEY to a "
            "key that can read that prefix only, or raise review.inline_kb"
        )
    if own is not None and access.access_key_id == own.access_key:
        raise InputError(
            "LABEL_STUDIO_S3_ACCESS_KEY_ID is this process's own key, and every annotator could read what it can "
            f"read: use a key that can read {store.address}/{PICTURES_FOLDER} only "
            "(LABEL_STUDIO_S3_SHARE_CREDENTIALS=1 shares the own one nonetheless)"
        )
    return access


def _check_access(store: S3Store, storage: BucketStorage) -> None:
    """Raise InputError if the storage's credentials cannot list and read the pictures; warn if they can read more.

    An address that Label Studio alone reaches is left to Label Studio, which connects to it next, with a warning.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError, ConnectTimeoutError, EndpointConnectionError

    from services.storage.s3_errors import EXPECTED_ENDPOINT

    try:
        client = boto3.client(
            "s3",
            endpoint_url=storage.s3endpoint,
            region_name=store.region,
            aws_access_key_id=storage.aws_access_key_id,
            aws_secret_access_key=storage.aws_secret_access_key,
            aws_session_token=storage.aws_session_token or None,
            config=Config(connect_timeout=10, read_timeout=20, retries={"max_attempts": 2}),
        )
    except ValueError:  # "Invalid endpoint: pictures:9000", with a password that it may hold
        raise InputError(f"LABEL_STUDIO_S3_ENDPOINT: {EXPECTED_ENDPOINT}") from None
    try:
        listed = client.list_objects_v2(Bucket=store.bucket, Prefix=storage.prefix, MaxKeys=1)
        client.head_object(Bucket=store.bucket, Key=listed["Contents"][0]["Key"])
    except (ClientError, BotoCoreError, KeyError) as error:
        unreachable = isinstance(error, EndpointConnectionError | ConnectTimeoutError)
        if unreachable and storage.s3endpoint != store.endpoint:
            log.warning(
                "%s is not reached from here, so whether Label Studio's credentials can read the pictures, and nothing "
                "else, is left unchecked (LABEL_STUDIO_S3_ENDPOINT)",
                storage.s3endpoint,
            )
            return
        raise InputError(
            f"Label Studio's credentials for the bucket cannot list and read {store.address}/{PICTURES_FOLDER} "
            f"({without_credentials(str(error))}): grant them s3:ListBucket and s3:GetObject there, or correct "
            "LABEL_STUDIO_S3_ACCESS_KEY_ID, LABEL_STUDIO_S3_SECRET_ACCESS_KEY, LABEL_STUDIO_S3_SESSION_TOKEN (which "
            "expires) and LABEL_STUDIO_S3_ENDPOINT"
        ) from None
    try:
        client.head_object(Bucket=store.bucket, Key=f"{store.prefix}run.yaml")
    except (ClientError, BotoCoreError):
        return
    log.warning(
        "Label Studio's credentials can read all of %s, and through Label Studio every annotator can; limit them to "
        "its folder %s",
        store.address,
        PICTURES_FOLDER,
    )


def png(image: F32) -> bytes:
    """Return one image, (channels, H, W) in [0, 1], as PNG."""
    buffer = io.BytesIO()
    to_picture(to_levels(image)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
