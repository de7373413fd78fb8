"""The texts about fields: the comments of a written run file, and what `defuse fields` shows."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from defuse_core.config import RunFile
from defuse_core.config.loading import describe_fields
from defuse_core.models.probe import ClassifierProbe
from defuse_core.suggest import _comment, _commented, write_run_file
from defuse_core.suggest.inspect import DataFacts, _suggested_size
from defuse_core.suggest.plan import Plan
from defuse_core.suggest.speeds import Speeds
from services.cli.run import init
from tests.command_line import call, one_line
from tests.core.test_probe import some_probe


def test_a_long_comment_goes_on_in_a_second_line_to_the_end_of_its_sentence():
    described = {field.name: field for field in describe_fields()}
    comment = _comment(described["data.validation_share"], 0.15)
    assert comment.endswith("where the data set has no validation part of its own")
    first, second = _commented("  validation_share: 0.15", comment)
    assert first.startswith("  validation_share: 0.15 ")
    assert second.startswith(" " * 42 + "# ") and second.endswith("of its own")
    assert not [each.name for each in described.values() if _comment(each, None).endswith("...")]
    assert _commented("  engine: scikit-learn", "") == ["  engine: scikit-learn"]


def test_the_help_of_init_names_the_sizes_that_pictures_get_without_a_classifier():
    (option,) = (each for each in init.params if each.name == "image_size")
    sizes = sorted({_suggested_size(side) for side in range(8, 513)})
    assert f"without --classifier {', '.join(map(str, sizes[:-1]))} or {sizes[-1]}]" in option.help


def test_the_name_of_a_file_adds_no_line_to_a_run_file(tmp_path):
    facts = DataFacts(
        name="folder",
        root=tmp_path,
        height=16,
        width=16,
        image_size=16,
        channels=1,
        photographs=False,
        classes=("cat", "dog"),
        counts={"train": 20},
        notes=("such as x\ncheck: {max_loss: 1}\n#\x1b[2J.png",),
    )
    text = write_run_file(Plan({"vae": {"epochs": 3}}, 1.0, facts, Speeds(1, 1, 1, 1), None, facts.notes))
    assert "# Note: such as x\\ncheck: {max_loss: 1}\\n#\\x1b[2J.png." in text.splitlines()
    assert yaml.safe_load(text) == {"vae": {"epochs": 3}}


def test_the_head_of_a_run_file_tells_what_was_found(tmp_path):
    facts = DataFacts("npz", tmp_path, 20, 16, 16, 3, False, ("cat", "dog"), {"train": 2000, "test": 20}, ())
    probe = replace(some_probe(), images=204, by_range={"0..1": 0.5, "-1..1": 0.9}, class_order=(1, 0))
    probe = replace(probe, reordered=0.97)
    classifier = {"epochs": 0, "input_range": "-1..1"}

    def head(facts: DataFacts, probe: ClassifierProbe | None, **tree: dict[str, object]) -> str:
        tree = {"classifier": classifier, "vae": {"epochs": 3}} | tree
        text = write_run_file(Plan(tree, 2.0, facts, Speeds(1, 2, 3, 4), probe, ()))
        assert yaml.safe_load(text) == tree and "\n  epochs: 3 " in text
        assert ("\n  reference:\n    epochs: 4 " in text) == ("review" in tree)
        return text.partition("\n\n")[0]

    plain = head(facts, None, review={"reference": {"epochs": 4}})
    assert plain.splitlines()[1:3] == [
        "# Images: 2,000 train, 20 test; 16x20 pixels (median), colour.",
        "# Classes: cat, dog.",
    ]
    assert len(plain.splitlines()) == 4 and "grey." in head(replace(facts, channels=1), None)
    readers = head(facts, None, resources={"readers": 1}).splitlines()
    assert len(readers) == 5 and readers[-1].startswith("# Not all images fit into memory: ")
    moved = head(facts, None, vae={"epochs": 3, "decode": "anchored"}).splitlines()
    assert len(moved) == 7 and moved[4].startswith("# vae.decode is anchored, since ")
    right = (
        "# Classifier: right on 90.0 % of 204 training images with inputs in -1..1 (used), 50.0 % in 0..1, on"
    )
    assert right in head(facts, probe) and right in head(facts, replace(probe, class_order=None))
    ordered = head(facts, probe, classifier=classifier | {"class_order": [1, 0]})
    assert (
        "right on 97.0 % of training images with inputs in -1..1 and the classes reordered (used); not reordered: "
        "90.0 % in -1..1, 50.0 % in 0..1, on average over the classes."
    ) in ordered


def test_fields_are_as_wide_as_the_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    lines = call(monkeypatch, capsys, "fields", "vae.class_weight")[1].splitlines()[1:]
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
    assert _comment(described["correct.choose_by"], "tune").startswith(
        "tune: the best on the scenarios within"
    )
    assert "for program its own file, for transformers its folder" in _comment(
        described["classifier.weights"], "parts.pt2"
    )


def test_every_field_is_described_with_a_meaning():
    described = describe_fields()
    assert all(field.meaning for field in described)
    assert [field.name for field in described if field.meaning.startswith(("Paper:", "Ours"))] == []
    names = {field.name for field in described}
    for section, info in RunFile.model_fields.items():
        fields = getattr(info.annotation, "model_fields", None)
        assert fields or section == "seed"
        assert {f"{section}.{name}" for name in fields or () if name != "reference"} <= names


@pytest.mark.parametrize(("kind", "bold"), [("dumb", False), ("xterm", True)])
def test_the_headings_of_fields_are_bold_where_the_terminal_can_show_it(kind, bold, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", kind)
    assert ("\x1b" in call(monkeypatch, capsys, "fields")[1]) is bold


def test_fields_shows_values_bounds_and_defaults(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "fields", "vae")
    assert code == 0
    assert "vae.latent_dim: integer ≥ 1, ≤ 512 [10]" in out
    assert "identify" not in out
    every = call(monkeypatch, capsys, "fields")[1]
    assert "data.train_images: integer ≥ 2 | null [null]" in every
    headings = [line for line in every.splitlines() if re.fullmatch("[a-z]+", line)]
    told = call(monkeypatch, capsys, "fields", "--help")[1]
    assert f"Sections: {', '.join(headings)}." in " ".join(told.split())
    code, _, err = call(monkeypatch, capsys, "fields", "vea")
    assert code == 2 and "did you mean vae?" in err
    code, _, err = call(monkeypatch, capsys, "fields", "nothing")
    assert code == 2
    assert "no such section or field; the run file has seed, data, classifier" in one_line(err)


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_a_pipe_is_not_replaced_by_a_run_file(force, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    code, _, err = call(monkeypatch, capsys, "init", tmp_path, "--out", "pipe", *force)
    assert code == 2
    assert "--out pipe: cannot be written (no ordinary file); choose another place" in one_line(err)
    assert Path("pipe").is_fifo()


def test_a_run_file_that_is_replaced_stays_where_the_disk_is_full(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("defuse_core.suggest.plan.measure_speeds", lambda *_: Speeds(1e3, 1e3, 1e3, 1e3))
    images = np.random.default_rng(0).integers(0, 255, (100, 16, 16), np.uint8)
    np.savez("parts.npz", train_images=images, train_labels=np.arange(100) % 2)
    mine, link = Path("mine.yaml"), Path("link.yaml")
    mine.write_text("# edited for days")
    link.symlink_to(mine)

    def disk_full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    command = ("init", "parts.npz", "--minutes", 1, "--out", link, "--force")
    with monkeypatch.context() as full:
        full.setattr("os.fsync", disk_full)
        code, _, err = call(monkeypatch, capsys, *command)
    assert (code, mine.read_text()) == (2, "# edited for days")
    assert "--out link.yaml: cannot be written (No space left on device); choose" in one_line(err)
    assert call(monkeypatch, capsys, *command)[0] == 0
    assert link.is_symlink() and "parts.npz" in mine.read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"parts.npz", "mine.yaml", "link.yaml"}
