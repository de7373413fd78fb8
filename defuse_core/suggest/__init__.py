"""A run file suggested for a folder of images, a classifier and a time: what `defuse init` writes.

What was found is in inspect.py, the size of the images and what a classifier expects in classifier_inputs.py, the
speeds of this machine in speeds.py, the plan in plan.py. Here is the text of the file: YAML, with a comment beside
every field.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import yaml

from defuse_core.config.loading import FieldDescription, describe_fields
from defuse_core.formatting import count_of, escape_control_characters, first_few, percent
from defuse_core.models.probe import ON_AVERAGE
from defuse_core.suggest.classifier_inputs import VALIDATION_SHARE
from defuse_core.suggest.inspect import DataFacts, inspect_data, quoted
from defuse_core.suggest.plan import Plan, plan_run

COMMENT_COLUMN = 40
COMMENT_WIDTH = 78


def write_run_file(plan: Plan) -> str:
    """Return the run file as text: what was found at its top, and each field with its meaning."""
    described = {field.name: field for field in describe_fields()}
    lines = [f"# {escape_control_characters(line)}".rstrip() for line in _header(plan)]
    for section, fields in plan.tree.items():
        lines += ["", f"{section}:", *_fields(fields, section, described, 1)]
    lines += ["", "# All other fields have their defaults: `defuse fields` lists them.", ""]
    return "\n".join(lines)


def _header(plan: Plan) -> list[str]:
    facts, speeds = plan.facts, plan.speeds
    counts = ", ".join(f"{count:,} {part}" for part, count in facts.counts.items())
    minutes = count_of(plan.minutes, "minute")
    colours = "grey" if facts.channels == 1 else "colour"
    lines = [
        f"Written by `defuse init` for about {minutes} on a machine like the one where it ran.",
        f"Images: {counts}; {facts.width}x{facts.height} pixels (median), {colours}.",
        f"Classes: {first_few([*map(quoted, facts.classes)], most=12)}.",
        f"Measured, images/s: β-VAE {speeds.vae:,.0f}, decoding and classifying {speeds.decode:,.0f}, "
        f"training the classifier {speeds.classifier:,.0f}.",
    ]
    if "resources" in plan.tree:
        lines.append(
            "Not all images fit into memory: trainings and scores take no more of these than resources.readers read."
        )
    if plan.probe is not None:
        lines.append(f"Classifier: right on {describe_accuracy(plan)}.")
    if plan.tree["vae"].get("decode") == "anchored":
        lines += [
            "vae.decode is anchored, since these are colour pictures without a plain ground: a small β-VAE draws "
            "photographs",
            "as blobs, which say nothing about a classifier, but it can move photographs, which stay sharp.",
            "Only a share of them is moved (identify.share): a model that judges a move must not know the photograph.",
        ]
    return lines + [f"Note: {note}." for note in plan.notes]


def describe_accuracy(plan: Plan) -> str:
    """Return how often the classifier is right with the run file's inputs and order of classes; then with others."""
    probe, section = plan.probe, plan.tree["classifier"]
    assert probe is not None
    used = section.get("input_range", "0..1")
    shares = sorted(probe.by_range.items(), key=lambda item: item[0] != used)
    (first, share), *others = shares
    text = f"training images with inputs in {first}"
    if probe.class_order is not None and section.get("class_order") == list(probe.class_order):
        right = f"{percent(probe.reordered)} of {text} and the classes reordered (used); not reordered: "
        right += f"{percent(share)} in {first}"
    else:
        right = f"{percent(share)} of {probe.images} {text} (used)"
    return ", ".join([right, *(f"{percent(share)} in {name}" for name, share in others), ON_AVERAGE])


def _fields(
    fields: dict[str, Any], prefix: str, described: dict[str, FieldDescription], depth: int
) -> list[str]:
    lines = []
    for name, value in fields.items():
        indent = "  " * depth
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", *_fields(value, f"{prefix}.{name}", described, depth + 1)]
            continue
        text = f"{indent}{name}: {_as_yaml(value)}"
        lines += _commented(text, _comment(described[f"{prefix}.{name}"], value))
    return lines


def _commented(text: str, comment: str) -> list[str]:
    """Return a line with a comment beside it, which goes on below where it is long."""
    first, *others = textwrap.wrap(comment, COMMENT_WIDTH) or [""]
    below = [f"{'':<{COMMENT_COLUMN}}  # {line}" for line in others]
    return [f"{text:<{COMMENT_COLUMN}}  # {first}" if first else text, *below]


def _as_yaml(value: Any) -> str:
    return (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
        .removesuffix("\n...\n")
        .strip()
    )


def _comment(field: FieldDescription, value: Any) -> str:
    """Return what the field means, without what the paper has; of a field with named values, nothing about others."""
    text = field.meaning.partition(" Paper:")[0].removesuffix(" Ours.").rstrip(".")
    names = field.values.split(" | ")
    if not (isinstance(value, str) and value in names):
        return _short(text)
    clauses = re.split("[.;] ", text)
    own = [clause for clause in clauses if _explains(clause, value)]
    if not any(_explains(clauses[0], name) for name in names):
        own.append(clauses[0])
    fitting = [clause for clause in own if len(clause) <= COMMENT_WIDTH]
    return (fitting or [_short(clause) for clause in own] or [""])[0]


def _explains(clause: str, name: str) -> bool:
    """Whether a clause begins with a named value, as in `small is ...`, or `resnet18: small is ...`."""
    return re.match(rf"([^:]*: )?{re.escape(name)}(?![\w-])", clause) is not None


def _short(text: str) -> str:
    """Return a text, its first sentence, or the first clause, whichever fits on one line; else the first sentence."""
    parts = (text, text.partition(". ")[0], text.partition("; ")[0])
    return next((part for part in parts if len(part) <= COMMENT_WIDTH), parts[1])
