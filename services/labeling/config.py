"""What annotators see: the labelling interface in both forms, and how to tell that someone edited it.

Form "image" is the paper's Figure 14: one picture, the class names and "None of the above", no prediction
shown. Form "scenario" shows the R pictures of one scenario with the classifier's answer under each, and takes
one label for the page; a picture that shows something else may get its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal
from xml.etree import ElementTree
from xml.sax.saxutils import escape, quoteattr

from defuse_core.artifacts import NONE_OF_THE_ABOVE

Form = Literal["image", "scenario"]

NONE = "None of the above"
LABEL = "label"  # the control that takes a picture's label, or a page's
MANY = 16  # choices from which on they are drawn small
KEYS = "1234567890qwertyuiopasdfghjklzxcvbm"  # n is for none of the above

STYLE = """
.lsf-sidepanels{padding-right:0 !important}
.lsf-sidepanels__wrapper{display:none}
.review .lsf-toolbar{display:none}
.review{display:flex;flex-wrap:wrap;gap:16px 32px;padding:8px 8px 24px}
.picture{width:min(320px,45vh)}
.pictures{width:650px;max-width:100%;display:flex;flex-wrap:wrap;gap:12px 16px;align-content:flex-start}
.pictures div:has(.cell){display:contents}
.cell{width:116px}
.cell h4{margin:4px 0 !important;font-size:14px !important;font-weight:500 !important}
.cell button{height:32px !important;font-size:13px}
.cell .lsf-choices{margin:0}
.page{display:none}
.question{flex:1;min-width:280px}
.question h3{margin:0 0 12px !important}
.question h4{margin:0 0 12px !important;font-size:15px !important;font-weight:400 !important}
.answers .lsf-choices{display:flex;flex-wrap:wrap;gap:8px;margin:0}
.answers .lsf-choice{margin:0}
.answers .lsf-choice__checkbox{display:flex;align-items:center;margin:0;padding:6px 12px}
.answers .lsf-choice__checkbox{border:1px solid #8888;border-radius:8px;font-size:17px}
.many .lsf-choices{gap:4px}
.many .lsf-choice__checkbox{padding:2px 8px;font-size:13px}
.answers .lsf-choice__checkbox:hover{border-color:#4c5fa9}
.answers .lsf-choice__checkbox:has(input:checked){border-color:#4c5fa9;background:#4c5fa922}
"""

IMAGE_FORM = """<View>
<Style>{style}</Style>
<View className="review">
<View className="picture"><Image name="image" value="$image" zoom="false"/></View>
<View className="question">
<Header value="What does this picture show?"/>
<View className="{answers}"><Choices name="label" toName="image" choice="single-radio" showInline="true" \
required="true" requiredMessage="Choose what the picture shows, or None of the above.">
{choices}
</Choices></View>
</View></View>
</View>"""

SCENARIO_FORM = """<View>
<Style>{style}</Style>
<View className="review">
<View className="page"><Text name="page" value="$title"/></View>
<View className="pictures">
<Repeater on="$samples" indexFlag="{{{{idx}}}}">
<View className="cell">
<Image name="image_{{{{idx}}}}" value="$samples[{{{{idx}}}}].image" zoom="false"/>
<Header value="$samples[{{{{idx}}}}].says" size="5"/>
<Choices name="label_{{{{idx}}}}" toName="image_{{{{idx}}}}" layout="select">
{plain}
</Choices>
</View>
</Repeater>
</View>
<View className="question">
<Header value="What do these pictures show?"/>
<Header value="One label for all. Choose below a picture only where it shows something else." size="5"/>
<View className="{answers}"><Choices name="label" toName="page" choice="single-radio" showInline="true" \
required="true" requiredMessage="Choose what the pictures show, or None of the above.">
{choices}
</Choices></View>
</View></View>
</View>"""


def label_config(form: Form, classes: Sequence[str]) -> str:
    """Return the labelling interface as Label Studio's XML."""
    names = choice_names(classes)
    keys = hotkeys(names)
    choices = [f"<Choice value={quoteattr(name)}{_hotkey(keys.get(name))}/>" for name in names]
    plain = [f"<Choice value={quoteattr(name)}/>" for name in names]
    layout = IMAGE_FORM if form == "image" else SCENARIO_FORM
    answers = "answers many" if len(names) > MANY else "answers"
    return layout.format(style=STYLE, answers=answers, choices="\n".join(choices), plain="\n".join(plain))


def choice_names(classes: Sequence[str]) -> tuple[str, ...]:
    """Return what the choices say: the C class names, made distinct, then none-of-the-above."""
    names: list[str] = []
    for number, name in enumerate(classes):
        shown = (
            " ".join(name.replace("$", "＄").split()) or f"class {number}"
        )  # a $ would ask for a field of the task
        names.append(f"{shown} (class {number})" if shown in (*names, NONE) else shown)
    return (*names, NONE)


def answers_by_name(classes: Sequence[str]) -> dict[str, int]:
    """Return the answer that each choice stands for: a class, or NONE_OF_THE_ABOVE."""
    *names, none = choice_names(classes)
    return {name: number for number, name in enumerate(names)} | {none: NONE_OF_THE_ABOVE}


def hotkeys(names: Sequence[str]) -> dict[str, str]:
    """Return a key per choice: the digit it is, else its place on the keyboard.

    Choices after the last key have none.
    """
    digits = [name for name in names[:-1] if len(name) == 1 and name in "0123456789"]
    if len(digits) == len(names) - 1:
        keys = {name: name for name in digits}
    else:
        keys = dict(zip(names[:-1], KEYS, strict=False))
    return keys | {names[-1]: "n"}


def _hotkey(key: str | None) -> str:
    return f' hotkey="{key}"' if key else ""


INSTRUCTIONS = {
    "image": """<p>You will see one picture at a time. Say what it shows: click the name, or press its key.</p>
<p>Judge by what you see, not by what you think a computer would say.</p>
<p>Example: a blurred picture in which you still recognise “{first}” is “{first}”. A picture that could as well be
“{first}” as “{second}”, or that is neither, is “{none}” (key n).</p>""",
    "scenario": """<p>Each page shows pictures that a computer found alike, each with the answer of a classifier under
it, which may be wrong. Say what the pictures show: one label for the whole page. If a picture shows something else,
choose its own label below it; leave the others empty.</p>
<p>Judge by what you see, not by what the classifier says.</p>
<p>Example: on a page of ten pictures you see “{first}” in nine, although the classifier says “{second}” under most of
them, and the last is a smudge. Label the page “{first}”, and choose “{none}” below the smudge. If most of the page is
a smudge, the page is “{none}” (key n).</p>""",
}


def instructions(form: Form, classes: Sequence[str]) -> str:
    """Return what annotators are told before they begin, as HTML, with an example."""
    names = [escape(name) for name in choice_names(classes)]
    return INSTRUCTIONS[form].format(first=names[0], second=names[min(1, len(names) - 2)], none=NONE)


def meaning(config: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return what answers under `config` can say, whatever the layout: per control its object and choices.

    Raises ValueError where `config` is not XML.
    """
    try:
        root = ElementTree.fromstring(config)
    except ElementTree.ParseError as error:
        raise ValueError(f"not XML: {error}") from error
    controls = {}
    for control in root.iter():
        if control.get("toName"):
            choices = tuple(
                choice.get("alias") or choice.get("value") or "" for choice in control.iter("Choice")
            )
            controls[control.get("name") or ""] = (f"{control.tag} of {control.get('toName')}", choices)
    return controls


def difference(pushed: str, found: str) -> str | None:
    """Return how `found` reads answers otherwise than `pushed`; None where only the layout differs."""
    try:
        before, now = meaning(pushed), meaning(found)
    except ValueError as error:
        return str(error)
    for name in before | now:
        if name not in now:
            return f"the control {name} is gone"
        if name not in before:
            return f"a control {name} was added"
        gone = [choice for choice in before[name][1] if choice not in now[name][1]]
        added = [choice for choice in now[name][1] if choice not in before[name][1]]
        if gone or added or before[name][0] != now[name][0]:
            return "; ".join(
                [f"the choice {choice!r} is gone" for choice in gone]
                + [f"a choice {choice!r} was added" for choice in added]
                or [f"the control {name} was changed"]
            )
    return None
