"""The labelling interface: names, keys, and which edits change what answers mean."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatch
from pathlib import Path
from xml.etree import ElementTree

import pytest

from services.labeling.interface import (
    NONE,
    answers_by_name,
    choice_names,
    controls,
    difference,
    hotkeys,
    instructions,
    label_config,
)

DIGITS = tuple(str(n) for n in range(10))
SIGNS = ("Speed limit (20km/h)", 'No <entry> & "stop"', "Café", *(f"sign {n}" for n in range(40)))


@pytest.mark.parametrize("form", ["image", "scenario"])
@pytest.mark.parametrize("classes", [DIGITS, SIGNS, ("cat",)])
def test_every_class_and_none_of_the_above_can_be_chosen_by_name(form, classes):
    config = label_config(form, classes)
    assert controls(config)["label"].choices == (*classes, NONE)
    assert ElementTree.fromstring(config).tag == "View"


def test_digits_answer_to_their_own_keys_and_others_to_the_keyboard_in_order():
    assert hotkeys(choice_names(DIGITS)) == {name: name for name in DIGITS} | {NONE: "n"}
    keys = hotkeys(choice_names(SIGNS))
    assert keys[SIGNS[0]] == "1" and keys[SIGNS[10]] == "q" and keys[NONE] == "n"
    assert len(set(keys.values())) == len(keys)


def test_classes_that_look_alike_or_like_none_of_the_above_are_told_apart():
    names = ("stop", "stop ", NONE, "", "$image")
    assert len(set(choice_names(names))) == 6
    assert not any(name.startswith("$") for name in choice_names(names))
    assert sorted(answers_by_name(names).values()) == [-1, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("form", ["image", "scenario"])
def test_instructions_hold_an_example_with_the_classes(form):
    told = instructions(form, ("<cat>", "dog"))
    assert "Example" in told and "&lt;cat&gt;" in told and "dog" in told and NONE in told


def test_only_edits_that_change_what_answers_mean_are_differences():
    pushed = label_config("image", DIGITS)
    assert difference(pushed, pushed.replace("What does", "What do you think")) is None
    assert (
        difference(pushed, pushed.replace('<Choice value="7" hotkey="7"/>', "")) == "the choice '7' is gone"
    )
    assert difference(pushed, pushed.replace('name="label"', 'name="digit"')) == "the control label is gone"
    assert (
        difference(pushed, pushed.replace('toName="image"', 'toName="other"'))
        == "the control label was changed"
    )
    added = '<TextArea name="note" toName="image"/></View>'
    assert difference(pushed, pushed[: -len("</View>")] + added) == "a control note was added"
    assert "not XML" in str(difference(pushed, "<View"))


def test_every_template_is_part_of_the_installed_package():
    root = Path(__file__).parents[3]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["services.labeling.interface"]
    files = [path.name for path in (root / "services/labeling/interface").iterdir() if path.is_file()]
    templates = [name for name in files if not name.endswith(".py")]
    assert len(templates) == 5
    assert all(any(fnmatch(name, pattern) for pattern in patterns) for name in templates)
