"""What Label Studio's API accepts and returns, under its own names of fields; Task has names of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Literal, NotRequired, TypedDict

from pydantic import TypeAdapter

# ---- what Defuse sends


class ChoiceValue(TypedDict):
    choices: list[str]


class ChoiceResult(TypedDict):
    """One choice, as the labelling page submits it."""

    from_name: str  # the control
    to_name: str  # the object that it labels
    type: Literal["choices"]
    value: ChoiceValue


def choice_result(control: str, target: str, choice: str) -> ChoiceResult:
    """Return one choice in the form in which Label Studio's page submits it."""
    return {"from_name": control, "to_name": target, "type": "choices", "value": {"choices": [choice]}}


class PreselectedAnswer(TypedDict):
    """A prediction of Label Studio: the answer that a task begins with."""

    model_version: str
    score: float
    result: list[ChoiceResult]


class ImageData(TypedDict):
    """What a task of one image shows."""

    image: str  # address


class PageSample(TypedDict):
    """One image on the page of a scenario."""

    image: str  # address
    prediction: str  # the classifier's answer, in words


class PageData(TypedDict):
    """What a task of a whole scenario shows."""

    page: str
    samples: list[PageSample]


class TaskMeta(TypedDict):
    """What Defuse stores with a task, which annotators do not see."""

    sample_key: str
    digest: str  # of the key and the data


class TaskImport(TypedDict):
    """A task as it is imported."""

    data: ImageData | PageData
    meta: TaskMeta
    predictions: NotRequired[list[PreselectedAnswer]]


@dataclass(frozen=True)
class BucketStorage:
    """The S3 storage of a project, from which the server shows pictures."""

    title: str
    bucket: str
    prefix: str
    s3endpoint: str | None  # None: AWS, or what the server's operator set
    region_name: str | None
    aws_access_key_id: str
    aws_secret_access_key: str = field(repr=False)
    aws_session_token: str = field(repr=False)  # an empty one replaces an old one
    presign: bool = False  # Label Studio proxies the pictures, so the bucket needs no CORS
    use_blob_urls: bool = True

    def fields(self) -> dict[str, str | bool]:
        """Return the fields that have a value."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class ProjectSettings:
    """The settings of a project that Defuse sets, by their names in Label Studio's API."""

    title: str
    description: str
    label_config: str
    expert_instruction: str
    show_instruction: bool
    show_skip_button: bool
    maximum_annotations: int
    sampling: str
    show_collab_predictions: bool
    model_version: str


# ---- what the server returns: it checks nothing that annotators send


@dataclass(frozen=True, slots=True)
class UserRow:
    id: int


@dataclass(frozen=True, slots=True)
class Annotation:
    """One annotation; what is in its result is unchecked."""

    id: int
    created_at: datetime
    updated_at: datetime
    completed_by: UserRow | int | None = None
    result: object = None
    was_cancelled: bool | None = None  # a skip

    @property
    def annotator(self) -> int | None:
        """The user id; None where the account was deleted."""
        return self.completed_by.id if isinstance(self.completed_by, UserRow) else self.completed_by


@dataclass(frozen=True, slots=True)
class Task:
    """One task with all its annotations."""

    id: int
    key: str | None  # the sample_key that tasks.py gave it; None for a task that Defuse did not import
    digest: str | None  # of its data when it was imported
    overlap: int
    labeled: bool  # whether Label Studio has taken it out of the queue
    annotations: tuple[Annotation, ...]
    data: Mapping[str, object] | None  # None unless asked for


@dataclass(frozen=True)
class Project:
    id: int
    settings: ProjectSettings


@dataclass(frozen=True, slots=True)
class ValueRow:
    choices: list[object] | None = None


@dataclass(frozen=True, slots=True)
class ResultRow:
    """One part of an annotation: what was chosen in one control."""

    value: ValueRow
    from_name: str = ""


@dataclass(frozen=True, slots=True)
class MetaRow:
    sample_key: str | None = None  # None: a task that Defuse did not import


@dataclass(frozen=True, slots=True)
class QueuedTaskRow:
    """The next task of an annotator's queue."""

    id: int
    data: Mapping[str, object]
    predictions: list[object]
    meta: MetaRow | None = None

    @property
    def key(self) -> str | None:
        return None if self.meta is None else self.meta.sample_key


ANNOTATION = TypeAdapter(Annotation)
RESULT_ROW = TypeAdapter(ResultRow)
QUEUED_TASK_ROW = TypeAdapter(QueuedTaskRow)
