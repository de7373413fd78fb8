"""The labelling interface that annotators see, in both forms, and how an edit of it is recognised.

Form "image" is the paper's Figure 14: one picture, the class names and "None of the above", without the classifier's
answer. Form "scenario" shows the R pictures of one scenario with the classifier's answer under each, and takes one
label for the page; a picture that shows something else may get its own.

The templates beside this module are what Label Studio gets: image.xml and scenario.xml are its labelling configuration,
with style.css in both, and instructions_*.html is shown before the first task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree

from jinja2 import Environment, PackageLoader, StrictUndefined

from defuse_core.artifacts import NONE_OF_THE_ABOVE

Form = Literal["image", "scenario"]

NONE = "None of the above"
LABEL = "label"  # the control that takes the label of a picture, or of a page
MANY = 16  # choices from which on they are drawn small
KEYS = "1234567890qwertyuiopasdfghjklzxcvbm"  # n is for none of the above

_templates = Environment(
    loader=PackageLoader("services.labeling", "interface"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True)
class Choice:
    """One choice of the interface, with the key that selects it if there is one."""

    name: str
    key: str | None


@dataclass(frozen=True)
class Control:
    """What an answer through one control of a labelling configuration can be."""

    target: str  # the control's kind and the object that it labels
    choices: tuple[str, ...]


def label_config(form: Form, classes: Sequence[str]) -> str:
    """Return the labelling interface as Label Studio's XML."""
    names = choice_names(classes)
    keys = hotkeys(names)
    choices = [Choice(name, keys.get(name)) for name in names]
    return _templates.get_template(f"{form}.xml").render(
        choices=choices, many=len(names) > MANY, none_of_the_above=NONE
    )


def instructions(form: Form, classes: Sequence[str]) -> str:
    """Return the instructions for annotators as HTML, with an example that uses the classes."""
    names = choice_names(classes)
    return _templates.get_template(f"instructions_{form}.html").render(
        first=names[0], second=names[min(1, len(names) - 2)], none_of_the_above=NONE
    )


def choice_names(classes: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the choices: the C class names, made distinct, then none-of-the-above."""
    names: list[str] = []
    for index, name in enumerate(classes):
        # a $ would be replaced with a field of the task
        shown = " ".join(name.replace("$", "＄").split()) or f"class {index}"
        names.append(f"{shown} (class {index})" if shown in (*names, NONE) else shown)
    return (*names, NONE)


def answers_by_name(classes: Sequence[str]) -> dict[str, int]:
    """Return the answer that each choice means: a class, or NONE_OF_THE_ABOVE."""
    *names, none = choice_names(classes)
    return {name: index for index, name in enumerate(names)} | {none: NONE_OF_THE_ABOVE}


def hotkeys(names: Sequence[str]) -> dict[str, str]:
    """Return a key per choice: a digit's own key if all classes are digits, else the keyboard's keys in order.

    Choices after the last key have none.
    """
    digits = [name for name in names[:-1] if len(name) == 1 and name in "0123456789"]
    if len(digits) == len(names) - 1:
        keys = {name: name for name in digits}
    else:
        keys = dict(zip(names[:-1], KEYS, strict=False))
    return keys | {names[-1]: "n"}


def controls(config: str) -> dict[str, Control]:
    """Return the controls of a labelling configuration by name, whatever its layout.

    Raises ValueError if `config` is not XML.
    """
    try:
        root = ElementTree.fromstring(config)
    except ElementTree.ParseError as error:
        raise ValueError(f"not XML: {error}") from error
    found = {}
    for control in root.iter():
        if control.get("toName"):
            choices = tuple(
                choice.get("alias") or choice.get("value") or "" for choice in control.iter("Choice")
            )
            found[control.get("name") or ""] = Control(f"{control.tag} of {control.get('toName')}", choices)
    return found


def difference(pushed: str, found: str) -> str | None:
    """Return how the meaning of answers differs between two configurations; None where only the layout differs."""
    try:
        before, now = controls(pushed), controls(found)
    except ValueError as error:
        return str(error)
    for name in before | now:
        if name not in now:
            return f"the control {name} is gone"
        if name not in before:
            return f"a control {name} was added"
        gone = [choice for choice in before[name].choices if choice not in now[name].choices]
        added = [choice for choice in now[name].choices if choice not in before[name].choices]
        if gone or added or before[name].target != now[name].target:
            return "; ".join(
                [f"the choice {choice!r} is gone" for choice in gone]
                + [f"a choice {choice!r} was added" for choice in added]
                or [f"the control {name} was changed"]
            )
    return None
