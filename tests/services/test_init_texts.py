"""The texts about fields: the comments of a written run file, and what `defuse fields` shows."""

from __future__ import annotations

import re

from defuse_core.config import RunFile
from defuse_core.config.loading import describe_fields
from defuse_core.suggest import _comment, _commented
from tests.e2e.test_cli import call, one_line


def test_a_long_comment_goes_on_in_a_second_line_to_the_end_of_its_sentence():
    described = {field.name: field for field in describe_fields()}
    comment = _comment(described["data.validation_share"], 0.15)
    assert comment.endswith("where the data set has no validation part of its own")
    first, second = _commented("  validation_share: 0.15", comment)
    assert first.startswith("  validation_share: 0.15 ")
    assert second.startswith(" " * 42 + "# ") and second.endswith("of its own")
    assert not [each.name for each in described.values() if _comment(each, None).endswith("...")]


def test_fields_are_as_wide_as_the_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    lines = call(monkeypatch, capsys, "fields", "vae.guide_weight")[1].splitlines()[1:]
    assert 50 < max(map(len, lines)) <= 60


def test_no_comment_explains_another_value_than_the_one_beside_it():
    wrong = []
    for field in describe_fields():
        names = field.values.split(" | ")
        for value in names:
            comment = _comment(field, value)
            begins = {comment.partition(" ")[0], comment.partition(": ")[2].partition(" ")[0]}
            if {word.rstrip(":,") for word in begins} & set(names) - {value}:
                wrong.append((field.name, value, comment))
    assert wrong == []


def test_a_comment_prefers_the_clause_of_the_value_and_else_says_what_all_values_are():
    described = {field.name: field for field in describe_fields()}
    assert _comment(described["classifier.stem"], "small").startswith("small is a 3x3 stride-2 convolution")
    assert _comment(described["vae.decode"], "anchored").startswith("anchored, for photographs, moves")
    assert _comment(described["classifier.keep"], "last") == "Which epoch's weights are kept"
    assert _comment(described["distill.engine"], "scikit-learn") == ""


def test_every_field_is_described_with_a_meaning():
    described = describe_fields()
    assert all(field.meaning for field in described)
    names = {field.name for field in described}
    for section, info in RunFile.model_fields.items():
        fields = getattr(info.annotation, "model_fields", None)
        assert fields or section == "seed"
        assert {f"{section}.{name}" for name in fields or () if name != "reference"} <= names


def test_fields_shows_values_bounds_and_defaults(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "fields", "vae")
    assert code == 0
    assert "vae.latent_dim: integer ≥ 1, ≤ 512 [10]" in out
    assert "identify" not in out
    every = call(monkeypatch, capsys, "fields")[1]
    assert "data.train_images: integer ≥ 1 | null [null]" in every
    headings = [line for line in every.splitlines() if re.fullmatch("[a-z]+", line)]
    told = call(monkeypatch, capsys, "fields", "--help")[1]
    assert f"Sections: {', '.join(headings)}." in " ".join(told.split())
    code, _, err = call(monkeypatch, capsys, "fields", "vea")
    assert code == 2
    assert "no such section or field; the run file has seed, data, classifier" in one_line(err)
