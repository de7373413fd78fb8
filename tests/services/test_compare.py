"""Failure scenarios over time: two runs side by side."""

from __future__ import annotations

import dataclasses
import io
import json
from typing import get_args

import numpy as np
import pytest
import torch
from rich.console import Console

from defuse_core.artifacts import NONE_OF_THE_ABOVE, Corrections, Models, Verdicts
from defuse_core.codec import encode
from defuse_core.errors import InputError
from defuse_core.export.compare import (
    MATCHING_SHARE,
    ComparedScenario,
    State,
    _is_same_classifier,
    _load,
    _matches,
    _state,
    _state_of_b_alone,
    compare_runs,
    matching_shares,
    share_inside,
)
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from services.cli.results import compare
from services.cli.tables import print_comparison
from tests.command_line import call, one_line
from tests.conftest import ROOT, tiny
from tests.services.suite_runs import planted_runs


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_models: Models) -> FolderStore:
    return planted_runs(tmp_path_factory.mktemp("store"), tiny_models)


def test_scenarios_persist_are_fixed_or_come_back(store):
    def states(later: str) -> dict[str, str]:
        rows, *_ = compare_runs(Run.open(store, "first"), Run.open(store, later))
        return {row.label: row.state for row in rows}

    assert states("same") == {"3": "persisting", "8": "persisting"}
    assert states("mended") == {"3": "fixed", "8": "fixed"}
    assert states("relapsed") == {"3": "back again", "8": "back again"}


def test_the_source_of_a_program_is_none_of_its_weights():
    """It holds the images that the program was traced on, which differ from run to run."""
    weights = {"net.a": np.ones(2), "source": np.zeros(3, np.uint8)}
    assert _is_same_classifier(weights, {**weights, "source": np.ones(4, np.uint8)})
    assert not _is_same_classifier(weights, {**weights, "net.a": np.zeros(2)})
    larger = {**weights, "net.b": np.ones(2)}
    assert not _is_same_classifier(weights, larger) and not _is_same_classifier(larger, weights)


def test_a_scenario_of_the_later_run_alone_is_found_now_where_the_earlier_classifier_fails_too(store):
    rows, *_ = compare_runs(Run.open(store, "only-three"), Run.open(store, "same"))
    assert [(row.label, row.state, row.number_a, row.number_b) for row in rows] == [
        ("3", "persisting", 0, 0),
        ("8", "found now", None, 1),
    ]
    assert rows[0].before_a < 0.5 < rows[0].after_a


def test_scenarios_that_the_earlier_classifier_passes_are_new_or_right_in_both(store):
    def states(earlier: str, later: str) -> dict[str, str]:
        rows, *_ = compare_runs(Run.open(store, earlier), Run.open(store, later))
        return {row.label: row.state for row in rows}

    assert states("never-wrong", "first") == {"3": "new", "8": "new"}
    assert states("mended", "mended") == {"3": "was right", "8": "was right"}


def test_a_scenario_that_a_correction_breaks_is_neither_fixed_nor_new(store, monkeypatch, capsys):
    def states(earlier: str, later: str) -> dict[str, str]:
        rows, *_ = compare_runs(Run.open(store, earlier), Run.open(store, later))
        assert all(row.before_a < 0.5 < row.after_a for row in rows if earlier == "first")
        return {row.label: row.state for row in rows}

    assert states("first", "broken") == {"3": "broken by B", "8": "broken by B"}
    assert states("mended", "broken") == {"3": "broken by B", "8": "broken by B"}
    assert states("broken-unseen", "first") == {"3": "broken by A", "8": "broken by A"}
    monkeypatch.setenv("COLUMNS", "80")
    out = call(monkeypatch, capsys, "compare", "first", "broken", "--store", store.address)[1]
    assert out.splitlines()[-1].strip() == "2 broken by B"
    assert all(f"{run} {when}" in out for run in "AB" for when in ("before", "after"))


def test_the_comparison_is_printed_with_accuracies_side_by_side(store, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    code, out, _ = call(monkeypatch, capsys, "compare", "first", "relapsed", "--store", store.address)
    assert code == 0
    assert out.splitlines()[-1].strip() == "2 back again"
    assert "Mistaken for" in out
    for columns in (80, 60, 40):
        monkeypatch.setenv("COLUMNS", str(columns))
        out = call(monkeypatch, capsys, "compare", "first", "relapsed", "--store", store.address)[1]
        assert "…" not in out and "back again" in out and "B before" in out
        assert max(map(len, out.splitlines())) <= columns
    code, out, _ = call(monkeypatch, capsys, "compare", "first", "mended", "--store", store.address, "--json")
    assert {row["state"] for row in json.loads(out)["scenarios"]} == {"fixed"}
    code, out, _ = call(monkeypatch, capsys, "compare", "nothing", "nothing", "--store", store.address)
    assert "neither nothing nor nothing accepted" in out


def test_runs_on_other_images_cannot_be_compared(store, monkeypatch, capsys):
    Run.start(store, "larger", tiny(data={"image_size": 32}))
    code, _, err = call(monkeypatch, capsys, "compare", "first", "larger", "--store", store.address)
    assert code == 2
    assert "cannot be compared: data.image_size is 16 in one, 32 in the other" in one_line(err)
    models = Run.open(store, "first").require(Models)
    renamed = Run.start(store, "renamed", tiny())
    renamed.store.write(
        "models.safetensors", encode(dataclasses.replace(models, classes=("none", *models.classes[1:])))
    )
    with pytest.raises(InputError, match=r"their classes differ: 0 only in first; none only in renamed$"):
        compare_runs(Run.open(store, "first"), renamed)


def test_runs_of_other_classes_cannot_be_compared_and_of_many_only_those_are_named_that_differ(
    store, monkeypatch, capsys
):
    first = Run.open(store, "first")
    many = tuple(f"class {number}" for number in range(1000))
    for name, classes in (("many", many), ("more", (*many, "new")), ("turned", many[::-1])):
        models = dataclasses.replace(first.require(Models), classes=classes)
        Run.start(store, name, first.spec).store.write("models.safetensors", encode(models))
    for pair, told in (
        (("many", "more"), "new only in more"),
        (("more", "many"), "new only in more"),
        (("many", "turned"), "class 0 is class 0 in many, class 999 in turned"),
        (("first", "many"), "0, 1, 2, 3, 4 and 5 more only in first; class 0, class 1, class 2, class 3, class 4 and "
                            "995 more only in many"),
    ):  # fmt: skip
        code, _, err = call(monkeypatch, capsys, "compare", *pair, "--store", store.address)
        line = f"runs {' and '.join(pair)} cannot be compared, since their classes differ: {told}"
        assert code == 2 and one_line(err).endswith(line)


@pytest.mark.parametrize("pair", [("begun", "first"), ("first", "begun"), ("begun", "begun")])
def test_a_run_that_is_not_finished_is_named_on_either_side(pair, store, monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, "compare", *pair, "--store", store.address)
    assert code == 2
    assert (
        "run begun is not finished; the `defuse run` command that began it, without --until, or in Python"
        in one_line(err)
    )


def test_codes_of_one_cloud_lie_inside_it_and_not_inside_another():
    rng = np.random.default_rng(0)
    cloud, same = rng.normal(size=(200, 3)), rng.normal(size=(100, 3))
    assert share_inside(same.astype(np.float32), cloud.astype(np.float32)) > 0.97
    assert share_inside((same + 9).astype(np.float32), cloud.astype(np.float32)) == 0
    cloud[:, 2], same[:, 2] = 1e-6 * cloud[:, 2], 0.01  # a dimension that the β-VAE does not use
    assert share_inside(same.astype(np.float32), cloud.astype(np.float32)) > 0.97


def test_a_scenario_whose_draws_became_narrower_matches_itself_whichever_run_is_first():
    """A component at τ / 4: few of the wide draws are inside the ellipsoid of the narrow ones, and all the reverse."""
    codes = np.random.default_rng(0).normal(size=(2, 256, 16)).astype(np.float32)
    wide, narrow = codes[0], codes[1] / 2
    assert share_inside(wide, narrow) < MATCHING_SHARE < share_inside(narrow, wide)
    for pair in ((wide, narrow), (narrow, wide)):
        assert matching_shares(*pair, True)[0] > 0.9 and matching_shares(pair[0], pair[1] + 9, True) == (0, 0)
    assert matching_shares(wide, narrow, False)[0] < MATCHING_SHARE  # mistaken for other classes


@pytest.mark.parametrize(
    ("before_a", "after_a", "before_b", "after_b", "state"),
    [
        (0.0, 0.0, 0.8, 0.8, "fixed"),  # 0.8 is the limit
        (0.0, 0.9, 0.8, 0.79, "broken by B"),
        (0.8, 0.9, 0.8, 0.8, "was right"),
        (0.8, 0.9, 0.9, 0.7, "broken by B"),
        (0.79, 0.0, 0.8, 0.8, "fixed"),
        (0.0, 0.8, 0.79, 0.9, "back again"),
        (0.0, 0.79, 0.79, 0.9, "persisting"),
    ],
)
def test_the_state_of_a_scenario_of_a_is_decided_at_the_limit(before_a, after_a, before_b, after_b, state):
    scores = (before_a, after_a, before_b, after_b)
    assert _state(scores, 0.8, same_classifier=False) == state
    same = "persisting" if state == "back again" else state
    assert _state(scores, 0.8, same_classifier=True) == same


@pytest.mark.parametrize(
    ("before_a", "after_a", "state"),
    [(0.8, 0.8, "new"), (0.8, 0.79, "broken by A"), (0.79, 0.8, "found now"), (0.79, 0.79, "found now")],
)
def test_the_state_of_a_scenario_of_b_alone_is_decided_at_the_limit(before_a, after_a, state):
    assert _state_of_b_alone((before_a, after_a, 0.0, 1.0), 0.8) == state


def test_a_run_whose_classifier_guesses_is_told_beside_the_comparison(
    store, tmp_path, caplog, monkeypatch, capsys
):
    models = Run.open(store, "same").load(Models)
    one_answer = {part: np.eye(10)[0] for part in models.class_accuracy}
    copied = FolderStore(tmp_path)
    for name in ("first", "same"):
        for key in store.within(name).list():
            copied.within(name).write(key, store.within(name).read(key))
    copied.within("same").write(
        "models.safetensors", encode(dataclasses.replace(models, class_accuracy=one_answer))
    )
    code, out, _ = call(monkeypatch, capsys, "compare", "first", "same", "--store", tmp_path, "--json")
    guessing = json.loads(out)["guessing"]
    assert (code, guessing["a"]) == (0, None) and "hardly better than guessing" in guessing["b"]
    told = [line for line in caplog.messages if "hardly better than guessing" in line]
    assert len(told) == 1 and told[0].startswith("run same: ")


def test_a_run_that_could_not_tell_is_told_beside_the_comparison(
    store, tmp_path, caplog, monkeypatch, capsys
):
    for name in ("first", "same"):
        for key in store.within(name).list():
            FolderStore(tmp_path).within(name).write(key, store.within(name).read(key))
    run = Run.open(FolderStore(tmp_path), "same")
    models, verdicts, fixes = run.require(Models), run.require(Verdicts), run.require(Corrections)
    blind = dataclasses.replace(models, health=dataclasses.replace(models.health, verdict="blind"))
    labels = np.full_like(verdicts.labels, NONE_OF_THE_ABOVE)
    run.store.write("models.safetensors", encode(blind))
    run.store.write("verdicts.safetensors", encode(dataclasses.replace(verdicts, labels=labels)))
    run.store.write("corrections.safetensors", encode(fixes.take(np.zeros(0, np.int64))))
    code, out, _ = call(monkeypatch, capsys, "compare", "first", "same", "--store", tmp_path, "--json")
    page, text = json.loads(out), (ROOT / "services/README.md").read_text(encoding="utf-8")
    assert code == 0 and page["undecided"]["a"] is None and "the β-VAE is blind" in page["undecided"]["b"]
    assert all(f"`{name}.{side}`" in text for name in ("undecided", "guessing") for side in page[name])
    assert [
        line for line in caplog.messages if line.startswith("run same could not tell whether its classifier")
    ]


def test_the_help_names_each_state_that_the_json_has():
    text = " ".join(compare.help.split()).lower()
    assert [state for state in get_args(State) if state.lower() not in text] == []


@pytest.mark.parametrize(
    "words", [["compare", "first", "same"], ["suite", "save", "first", "--out", "suite"]]
)
def test_runs_of_a_classifier_whose_code_has_changed_are_neither_compared_nor_saved_as_a_suite(
    words, store, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.nn.ReLU", torch.nn.Sigmoid)  # the weights fit as before
    code, _, err = call(monkeypatch, capsys, *words, "--store", store.address)
    assert code == 2 and "stored images otherwise than when the run began" in one_line(err)


def test_an_accuracy_just_below_the_limit_is_not_shown_as_the_limit():
    console = Console(file=io.StringIO(), width=100)
    shares = (0.1, 0.95, 230 / 256, 231 / 256)
    print_comparison("a", "b", [ComparedScenario("back again", "8", "3", 0, None, *shares)], 0.9, console)
    text = console.file.getvalue()
    assert (
        "Right: at least 90 % of the pictures by the scenario's label (check.min_scenario_accuracy of B)."
        in text
    )
    assert "89.8 %" in text and "90.2 %" in text


def test_a_narrow_comparison_names_the_scenario_in_both_runs():
    console = Console(file=io.StringIO(), width=60)
    row = ComparedScenario("back again", "8", "3", 0, None, 0.1, 0.95, 0.9, 0.9)
    print_comparison("a", "b", [row], 0.9, console)
    headings = "State Label In A In B B before B after"
    assert headings in " ".join(console.file.getvalue().split())


def test_a_scenario_of_the_later_run_matches_one_of_two_equal_ones_of_the_earlier(store):
    later, rows = _load(Run.open(store, "first")), np.array([0, 0, 1])
    found = dataclasses.replace(later.found, fixes=later.found.fixes.take(rows))
    earlier = dataclasses.replace(later, found=found, pictures=[later.pictures[row] for row in rows])
    assert _matches(earlier, later) == {0: 0, 2: 1}


def test_scenarios_match_in_the_order_of_their_shares_each_once_from_half_on(store, monkeypatch):
    side, rows = _load(Run.open(store, "first")), np.array([0, 0, 1])
    found = dataclasses.replace(side.found, fixes=side.found.fixes.take(rows))
    both = dataclasses.replace(side, found=found, pictures=[side.pictures[row] for row in rows])
    # of the pairs (0, 0), (0, 1), (1, 0), (1, 1) and (2, 2), which have the same label
    shares, alike = iter([(0.5, 0.4), (0.9, 0.0), (0.5, 0.5), (0.8, 0.8), (0.49, 0.49)]), list[bool]()

    def share(_: object, __: object, same_error: bool) -> tuple[float, float]:
        alike.append(same_error)
        return next(shares)

    monkeypatch.setattr("defuse_core.export.compare.matching_shares", share)
    assert _matches(both, both) == {0: 1, 1: 0} and alike == [True] * 5
