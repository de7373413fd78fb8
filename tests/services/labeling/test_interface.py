"""The labelling interface: names, keys, and which edits change what answers mean."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from xml.etree import ElementTree

import pytest

from services.labeling.tasks import (
    NO_KEY,
    NONE,
    answers_by_name,
    choice_names,
    hotkeys,
    instructions,
    interface_edit,
    label_config,
)

DIGITS = tuple(str(n) for n in range(10))
SIGNS = ("Speed limit (20km/h)", 'No <entry> & "stop"', "Café", *(f"sign {n}" for n in range(40)))


@pytest.mark.parametrize("form", ["image", "scenario"])
@pytest.mark.parametrize("classes", [DIGITS, SIGNS, ("cat",)])
def test_every_class_and_none_of_the_above_can_be_chosen_by_name(form, classes):
    config = label_config(form, classes)
    (control,) = (
        found for found in ElementTree.fromstring(config).iter("Choices") if found.get("name") == "label"
    )
    assert tuple(choice.get("value") for choice in control) == (*classes, NONE)


def test_digits_answer_to_their_own_keys_and_others_to_the_keyboard_in_order():
    assert hotkeys(choice_names(DIGITS)) == {name: name for name in DIGITS} | {NONE: "n"}
    keys = hotkeys(choice_names(SIGNS))
    assert keys[SIGNS[0]] == "1" and keys[SIGNS[10]] == "q" and keys[NONE] == "n"
    assert len(set(keys.values())) == len(keys)


@pytest.mark.parametrize("form", ["image", "scenario"])
@pytest.mark.parametrize("count", [1, 35, 36, 43, 105])
@pytest.mark.parametrize("name", ["sign {}", "{}"])
def test_every_choice_has_a_key_of_its_own_which_label_studio_would_otherwise_choose(form, count, name):
    """On a page Label Studio's choice would be a plain key, which others take with Shift for another class."""
    (control,) = (
        found
        for found in ElementTree.fromstring(label_config(form, [name.format(n) for n in range(count)])).iter(
            "Choices"
        )
        if found.get("name") == "label"
    )
    keys = [choice.get("hotkey") for choice in control]
    given = [key for key in keys if key != NO_KEY]
    assert None not in keys and len(set(given)) == len(given) >= min(count + 1, 76)
    assert (min(len(key) for key in keys) == 1) == (form == "image")


def test_classes_that_look_alike_or_like_none_of_the_above_are_told_apart():
    names = ("stop", "stop ", NONE, "", "$image")
    assert len(set(choice_names(names))) == 6
    assert not any(name.startswith("$") for name in choice_names(names))
    assert sorted(answers_by_name(names).values()) == [-1, 0, 1, 2, 3, 4]


def test_no_name_has_what_label_studio_replaces_with_the_number_of_a_picture():
    names = ("{{idx}}", "0", "a {{idx}}", "{b}")
    config = ElementTree.fromstring(label_config("scenario", names))
    shown = {choice.get("value") for choice in config.iter("Choice")}
    assert shown == set(choice_names(names)) == set(answers_by_name(names))
    assert "{b}" in shown and len(shown) == 5 and not any("{{idx}}" in name for name in shown)


def test_a_name_that_was_made_distinct_is_no_other_class_of_that_name():
    names = ("a", "a (class 2)", "a", "b", "b", "b (class 4)")
    assert len(set(choice_names(names))) == 7
    assert sorted(answers_by_name(names).values()) == [-1, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("form", ["image", "scenario"])
def test_instructions_hold_an_example_with_the_classes(form):
    shown = instructions(form, ("<cat>", "dog"))
    assert "Example" in shown and "&lt;cat&gt;" in shown and "dog" in shown and NONE in shown


@pytest.mark.parametrize(
    "old, new, description",
    [
        (
            '<Choice value="7" hotkey="7"/>',
            "",
            "Choice '7' was removed; Choice '7' hotkey='7' was removed",
        ),
        (
            "</Choices>",
            '<Choice value="ten"/></Choices>',
            "Choice 'ten' was added; Choice 'ten' value='ten' was added",
        ),
        ('value="7"', 'value="7" alias="3"', "Choice '7' alias='3' was added"),
        (
            'hotkey="7"',
            'hotkey="x"',
            "Choice '7' hotkey='7' was removed; Choice '7' hotkey='x' was added",
        ),
        (
            '"single-radio"',
            '"multiple"',
            "Choices 'label' choice='single-radio' was removed; Choices 'label' choice='multiple' was added",
        ),
        (
            'toName="image"',
            'toName="other"',
            "Choices 'label' toName='image' was removed; Choices 'label' toName='other' was added",
        ),
        (
            'value="$image"',
            'value="$other"',
            "Image 'image' value='$image' was removed; Image 'image' value='$other' was added",
        ),
        (
            "What does this picture show?",
            "What is wrong here?",
            "Header 'What does this picture show?' was removed; "
            "Header 'What does this picture show?' value='What does this picture show?' was removed; "
            "Header 'What is wrong here?' was added; "
            "Header 'What is wrong here?' value='What is wrong here?' was added",
        ),
        (
            'name="label"',
            'name="digit"',
            "Choices 'label' was removed; Choices 'label' choice='single-radio' was removed; "
            "Choices 'digit' was added; Choices 'digit' choice='single-radio' was added",
        ),
        (
            '<View className="question">',
            '<View className="question" whenTagName="x">',
            "View whenTagName='x' was added",
        ),
        (
            "<Choices ",
            '<Taxonomy name="label" toName="image"/><Choices ',
            "Taxonomy 'label' was added; Taxonomy 'label' name='label' was added",
        ),
        ('<Choice value="7"', '<Choice value="7" style="x"', "Choice '7' style='x' was added"),
        (
            '<View className="picture">',
            '<View className="page">',
            "View className='picture' was removed; View className='page' was added",
        ),
        (
            "</Style>",
            '</Style><TextArea name="note" toName="image"/>',
            "TextArea 'note' was added; TextArea 'note' name='note' was added",
        ),
    ],
)
def test_every_edit_that_can_change_what_an_answer_means_is_described(old, new, description):
    pushed = label_config("image", DIGITS)
    assert old in pushed
    edit = interface_edit(pushed, pushed.replace(old, new))
    assert edit is not None and edit.changes_answers and edit.description == description


def test_an_edit_of_the_styles_is_described_by_their_beginnings_and_one_of_the_order_as_such():
    pushed = label_config("image", DIGITS)
    hidden = pushed.replace(
        ".answers .lsf-choice{", ".answers .lsf-choice:nth-child(7){display:none}.lsf-choice{"
    )
    edit = interface_edit(pushed, hidden)
    assert hidden != pushed and edit.changes_answers
    assert re.fullmatch(r"Style css='.{89} was removed; Style css='.{89} was added", edit.description)
    seven, eight = (f'<Choice value="{name}" hotkey="{name}"/>' for name in "78")
    swapped = pushed.replace(seven, "SEVEN").replace(eight, seven).replace("SEVEN", eight)
    edit = interface_edit(pushed, swapped)
    assert edit.changes_answers and edit.description == "the order of its parts"


def test_an_edit_of_the_layout_is_described_as_one_and_spaces_are_no_edit():
    pushed = label_config("scenario", DIGITS)
    edit = interface_edit(pushed, pushed.replace('size="5"', 'size="4"'))
    assert edit is not None and not edit.changes_answers and edit.description == "the layout"
    assert interface_edit(pushed, pushed.replace(">\n<", ">\n\n  <")) is None
    broken = interface_edit(pushed, "<View")
    assert broken is not None and broken.changes_answers and "not XML" in broken.description


def test_a_control_of_another_kind_is_no_edit_of_the_one_in_its_place():
    pushed = label_config("image", ("cat",))
    edit = interface_edit(pushed, pushed.replace("<Choices", "<Taxonomy").replace("</Choices", "</Taxonomy"))
    assert edit.description.startswith("Choices 'label' was removed; ")
    assert "; Taxonomy 'label' was added; " in edit.description


@pytest.mark.parametrize("attribute", ['zoom="false"', 'showInline="true"', 'size="5"'])
def test_attributes_that_only_move_things_are_layout(attribute):
    pushed = label_config("scenario", DIGITS)
    assert attribute in pushed
    edit = interface_edit(pushed, pushed.replace(attribute, ""))
    assert edit is not None and not edit.changes_answers


def test_of_many_edits_the_first_ones_are_described():
    pushed = label_config("image", DIGITS)
    edit = interface_edit(pushed, pushed.replace(' hotkey="', ' hotkey="shift+'))
    assert edit.description == (
        "Choice '0' hotkey='0' was removed; Choice '1' hotkey='1' was removed; "
        "Choice '0' hotkey='shift+0' was added; Choice '1' hotkey='shift+1' was added"
    )


def test_no_number_is_chosen_by_the_key_of_another_one():
    assert hotkeys(("12", "3", NONE)) == {"12": "q", "3": "3", NONE: "n"}
    for names in (range(43), sorted(map(str, range(12))), ("7", "cat", "10")):
        for name, key in hotkeys((*map(str, names), NONE)).items():
            assert not key.isdecimal() or key == name


def test_a_page_takes_its_label_with_shift_so_that_keys_in_a_list_do_not_change_it():
    keys = {
        form: [
            choice.get("hotkey")
            for control in ElementTree.fromstring(label_config(form, ("cat", "dog"))).iter("Choices")
            if control.get("name") == "label"
            for choice in control
        ]
        for form in ("image", "scenario")
    }
    assert keys == {"image": ["1", "2", "n"], "scenario": ["shift+1", "shift+2", "shift+n"]}


@pytest.mark.parametrize(("classes", "small"), [(15, False), (16, True), (43, True)])
def test_many_choices_are_drawn_small(classes, small):
    config = label_config("image", [f"sign {n}" for n in range(classes)])  # and none of the above
    assert ('className="answers many"' in config) is small


def test_instructions_tell_each_key_up_to_sixteen_classes_and_need_no_second_class():
    told = instructions("image", [f"sign {n}" for n in range(16)])
    assert "y for “sign 15”" in told
    assert "shown in small letters" in instructions("image", [f"sign {n}" for n in range(17)])
    assert "1 for “1”, q for “cat”" in instructions("image", ("1", "cat"))
    assert "the classifier's answer is “cat”" in instructions("scenario", ("cat",))


@pytest.mark.parametrize("form", ["image", "scenario"])
def test_where_classes_outnumber_the_keys_instructions_tell_how_to_find_a_name(form):
    for classes, is_told in ((105, False), (106, True), (1000, True)):
        names = [f"sign {n}" for n in range(classes)]
        told = " ".join(instructions(form, names).split())
        without_key = NO_KEY in hotkeys(choice_names(names), form).values()
        assert is_told is without_key is (f"{NO_KEY} stands for none" in told) is ("Ctrl and F" in told)


def test_the_default_of_a_list_has_label_studio_s_own_colour_which_contrasts_in_both_its_themes():
    (rule,) = re.findall(r'{content:"same as page"(.*)}', label_config("scenario", DIGITS))
    assert "color" not in rule


def test_instructions_name_the_keys_and_point_to_them_where_there_are_many():
    assert "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 for the digit of that name" in instructions("image", DIGITS)
    assert "hold Shift and press 1 for “cat”, 2 for “dog”" in instructions("scenario", ("cat", "dog"))
    for form in ("image", "scenario"):
        assert "what is shown in small letters after the name. " in instructions(form, SIGNS)
    assert "hold Shift and press 0, 1, 2" in instructions("scenario", DIGITS)


@pytest.mark.parametrize("form", ["image", "scenario"])
def test_instructions_name_the_keys_that_submit_also_those_of_a_mac(form):
    told = " ".join(instructions(form, DIGITS).split())
    assert "Ctrl and Enter together (on a Mac Command and Enter) submit the" in told


def test_every_template_is_part_of_the_installed_package():
    root = Path(__file__).parents[3]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["services.labeling"]
    templates = [f"interface/{path.name}" for path in (root / "services/labeling/interface").iterdir()]
    assert len(templates) == 5
    assert all(any(fnmatch(name, pattern) for pattern in patterns) for name in templates)
