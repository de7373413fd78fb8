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
from difflib import SequenceMatcher
from typing import Literal
from xml.etree import ElementTree

from jinja2 import Environment, PackageLoader, StrictUndefined

from defuse_core.artifacts import NONE_OF_THE_ABOVE

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
class Element:
    """One element of a labelling configuration."""

    tag: str
    attributes: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        attributes = dict(self.attributes)
        name = attributes.get("name") or attributes.get("value") or ""
        return f"{self.tag} {name!r}" if name else self.tag

    def is_edit_of(self, other: Element) -> bool:
        """Whether this can be `other` with some attributes changed."""
        shared = {
            name for name in ("name", "value") if (name, dict(self.attributes).get(name)) in other.attributes
        }
        return self.tag == other.tag and (bool(shared) or self.tag in ("Header", "View", "Style"))

    def change_to(self, other: Element) -> str:
        """Return the changed attributes in words."""
        if self.tag == "Style":
            return "Style was edited"
        before, now = dict(self.attributes), dict(other.attributes)
        names = [name for name in before | now if before.get(name) != now.get(name)]
        changed = (f"{name} is {now.get(name)!r}, was {before.get(name)!r}" for name in names)
        return f"{self}: {', '.join(changed)}"


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
        # a $ would be replaced with a field of the task
        shown = " ".join(name.replace("$", "＄").split()) or f"class {index}"
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
        before, now = _elements(pushed), _elements(found)
    except ElementTree.ParseError as error:
        return InterfaceEdit(f"not XML: {error}", changes_answers=True)
    changes = _changes(before, now)
    if not changes:
        return InterfaceEdit("the layout", changes_answers=False)
    return InterfaceEdit("; ".join(changes[:3]), changes_answers=True)


def _canonical(config: str) -> str:
    return ElementTree.canonicalize(config, strip_text=True)


def _elements(config: str) -> list[Element]:
    """Return all elements that can change the meaning of an answer, in order, without attributes of layout."""
    found = []
    for element in ElementTree.fromstring(config).iter():
        attributes = {name: value for name, value in element.attrib.items() if name not in LAYOUT_ATTRIBUTES}
        if element.tag == "Style":
            attributes["css"] = " ".join("".join(element.itertext()).split())
        if element.tag not in LAYOUT_TAGS or attributes:
            found.append(Element(element.tag, tuple(sorted(attributes.items()))))
    return found


def _changes(before: list[Element], now: list[Element]) -> list[str]:
    """Return each change of an element in words; elements of one tag at one place are the same element."""
    changes = []
    for kind, i, j, k, m in SequenceMatcher(None, before, now, autojunk=False).get_opcodes():
        if kind == "equal":
            continue
        gone, added = before[i:j], now[k:m]
        for old in gone:
            new = next((element for element in added if element.is_edit_of(old)), None)
            changes.append(f"{old} was removed" if new is None else old.change_to(new))
            if new is not None:
                added.remove(new)
        changes += [f"{new} was added" for new in added]
    return changes
