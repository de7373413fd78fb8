"""What annotators get: the labelling page in both forms, how an edit of it is recognised, and the tasks of a review.

Form "image" is the paper's Figure 14: one picture, the class names and "None of the above", without the classifier's
answer. Form "scenario" shows the R pictures of one scenario with the classifier's answer under each, and takes one
label for the page; a picture that shows something else may get its own. The templates are in interface/: image.xml and
scenario.xml are the labelling configuration, with style.css in both, and instructions_*.html is shown before the first
task.

A task has a key that names its image or scenario. The pictures are data: addresses, so Label Studio needs no access to
the store of the run.

Page and tasks are compared with what was pushed. So a review that is under way keeps them when a template changes here;
only what a repair puts back, and tasks that are imported later, are of the new form.
"""

from __future__ import annotations

import hmac
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from defuse_core.artifacts import F32, NONE_OF_THE_ABOVE, Gallery
from defuse_core.config import ReviewSection
from defuse_core.data.images import data_address
from defuse_core.review.verdicts import LEAST_ANSWERS, stops_when_sure
from services.labeling.records import (
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

Form = Literal["image", "scenario"]

NONE = "None of the above"
LABEL = "label"  # the control that takes the label of a picture, or of a page
MANY = 16  # choices from which on they are drawn small
DIGITS, LETTERS = "1234567890", "qwertyuiopasdfghjklzxcvbm"  # n is for none of the above
# Held with a key. On a page a plain key would also change its label while the list of a single picture is open.
MODIFIERS = {
    "image": ("", "shift+", "alt+shift+"),
    "scenario": ("shift+", "alt+shift+", "ctrl+alt+shift+"),
}
NO_KEY = "ctrl+alt+shift+f19"  # Label Studio gives a free plain key to each choice without one
SHOWN_KEYS = "what is shown in small letters after the name"  # the key of a choice, by Label Studio
# Styles are no layout: they can hide a class, or show another name on its button.
LAYOUT_TAGS = {"View"}
LAYOUT_ATTRIBUTES = {"size", "zoom", "showInline"}

_templates = Environment(
    loader=PackageLoader("services.labeling", "interface"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True)
class InterfaceEdit:
    """How a labelling interface differs from the one that was pushed."""

    description: str
    changes_answers: bool  # whether answers can mean something else, or only the layout differs

    def __str__(self) -> str:
        """The edit, and what it means for the answers that were given on the edited page."""
        doubt = "; answers given on that page count as they are stored, so look at the newest ones"
        return self.description + (doubt if self.changes_answers else "")


def label_config(form: Form, classes: Sequence[str]) -> str:
    """Return the labelling interface as Label Studio's XML."""
    names = choice_names(classes)
    return _templates.get_template(f"{form}.xml").render(
        keys=hotkeys(names, form), no_key=NO_KEY, many=len(names) > MANY, none_of_the_above=NONE
    )


def instructions(form: Form, classes: Sequence[str]) -> str:
    """Return the instructions for annotators as HTML, with an example that uses the classes."""
    names = choice_names(classes)
    return _templates.get_template(f"instructions_{form}.html").render(
        keys=_keys_in_words(names, form),
        first=names[0],
        second=names[min(1, len(names) - 2)],
        none_of_the_above=NONE,
    )


def choice_names(classes: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the choices: the C class names, made distinct, then none-of-the-above."""
    names: list[str] = []
    for index, name in enumerate(classes):
        # a $ would be replaced with a field of the task, {{idx}} with the number of a picture
        shown = " ".join(name.replace("$", "＄").replace("{{", "｛｛").split()) or f"class {index}"
        while shown in (*names, NONE):
            shown = f"{shown} (class {index})"
        names.append(shown)
    return (*names, NONE)


def answers_by_name(classes: Sequence[str]) -> dict[str, int]:
    """Return the answer that each choice means: a class, or NONE_OF_THE_ABOVE."""
    *names, none = choice_names(classes)
    return {name: index for index, name in enumerate(names)} | {none: NONE_OF_THE_ABOVE}


def hotkeys(names: Sequence[str], form: Form = "image") -> dict[str, str]:
    """Return a key per choice: a digit's own key, and the keyboard's others in order, first with fewest modifiers.

    Where numbers are among the classes, the others are letters: no number's key is a digit of another one.
    """
    *classes, none = names
    digits = "" if any(name.isdecimal() for name in classes) else DIGITS
    others = iter([modifier + key for modifier in MODIFIERS[form] for key in digits + LETTERS])
    first = MODIFIERS[form][0]
    keys = {
        name: first + name if len(name) == 1 and name in DIGITS else next(others, NO_KEY) for name in classes
    }
    return keys | {none: f"{first}n"}


def _keys_in_words(names: Sequence[str], form: Form) -> str:
    """Return which key chooses which class, for the instructions."""
    keys = {name: key for name, key in hotkeys(names).items() if name != names[-1]}
    hold = "hold Shift and press " if form == "scenario" else ""
    if all(name == key for name, key in keys.items()):
        return f"{hold}{', '.join(keys.values())} for the digit of that name"
    if NO_KEY in keys.values():
        return f"{SHOWN_KEYS}, and {NO_KEY} stands for none; Ctrl and F together (on a Mac Command and F) find a name"
    if len(keys) > MANY:
        return SHOWN_KEYS
    return hold + ", ".join(f"{key} for “{name}”" for name, key in keys.items())


def interface_edit(pushed: str, found: str) -> InterfaceEdit | None:
    """Return how the configuration `found` differs from the one that was pushed; None if only spaces differ."""
    try:
        if _canonical(pushed) == _canonical(found):
            return None
        before, now = _parts(pushed), _parts(found)
    except ElementTree.ParseError as error:
        return InterfaceEdit(f"not XML: {error}", changes_answers=True)
    if before == now:
        return InterfaceEdit("the layout", changes_answers=False)
    changes = [
        f"{part:.100} was {how}"
        for some, others, how in ((before, now, "removed"), (now, before, "added"))
        for part in list(Counter(some) - Counter(others))[:2]
    ]
    return InterfaceEdit("; ".join(changes) or "the order of its parts", changes_answers=True)


def _canonical(config: str) -> str:
    return ElementTree.canonicalize(config, strip_text=True)


def _parts(config: str) -> list[str]:
    """Return all that can change the meaning of an answer, in order: elements, and attributes that are no layout."""
    found: list[str] = []
    for element in ElementTree.fromstring(config).iter():
        attributes = {name: value for name, value in element.attrib.items() if name not in LAYOUT_ATTRIBUTES}
        name = attributes.get("name") or attributes.get("value")
        if element.tag == "Style":
            attributes["css"] = " ".join("".join(element.itertext()).split())
        if element.tag not in LAYOUT_TAGS or attributes:
            shown = f"{element.tag} {name!r}" if name else element.tag
            found += [shown, *(f"{shown} {each}={value!r}" for each, value in sorted(attributes.items()))]
    return found


PRELABEL_MODEL = "reference models"  # the model version of predictions in Label Studio
BATCH_TASKS = 250
BATCH_BYTES = 900_000  # proxies such as nginx refuse requests over 1 MiB unless told otherwise


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

    def __init__(self, gallery: Gallery, review: ReviewSection) -> None:
        self.gallery, self.review = gallery, review
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
            data = ImageData(image=data_address(self.gallery.images[subject.scenario, subject.image]))
        # The key is no data: annotators see all data in Label Studio's list of tasks.
        meta = TaskMeta(sample_key=subject.key, digest=digest(subject.key, data, secret))
        task = TaskImport(data=data, meta=meta)
        if prelabel is not None:
            task["predictions"] = [prelabel]
        return task

    def _page(self, subject: TaskSubject) -> PageData:
        samples = [
            PageSample(image=data_address(image), prediction=f"classifier: {self.names[answer]}")
            for image, answer in zip(
                self.gallery.images[subject.scenario],
                self.gallery.predicted[subject.scenario].tolist(),
                strict=True,
            )
        ]
        return PageData(page="Pictures", samples=samples)


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
