"""What `defuse status` shows of a run at each stage, and of the runs in a store."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from sample_findings import finished_run, sample_findings

from defuse_core.artifacts import Checkpoint, ClassifierEpoch, Health
from defuse_core.codec import encode
from defuse_core.errors import InputError
from defuse_core.report import Report
from defuse_core.report.build import build_report
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from services.cli.run import status
from services.cli.status_tables import (
    RunSummary,
    print_runs,
    print_status,
    step_states,
    summarize_run,
    summarize_runs,
)
from tests.services.test_tables import ALL, BESIDE, a_run, finish, states_under_way, terminal, text_of


def status_of(run: Run, width: int = 120) -> str:
    console = terminal(width)
    print_status(run, console)
    return text_of(console)


def list_of(folder: Path, width: int = 120) -> str:
    console = terminal(width)
    print_runs(FolderStore(folder), console)
    return text_of(console)


def reported(run: Run, scenarios: int = 4, accepted: int = 2) -> Report:
    report = build_report(run, finished_run(*sample_findings(scenarios, accepted)))
    run.store.write("report.json", report.model_dump_json(by_alias=True).encode())
    return report


def test_the_report_is_under_way_until_its_file_is_written(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    finish(run, *ALL)
    assert states_under_way(run)[-1].state == "under way"
    run.store.write("report.json", b"{}")
    assert states_under_way(run)[-1].state == "done"


def test_people_are_not_asked_before_the_images_are_drawn(tmp_path: Path) -> None:
    assert {s.step: s.state for s in step_states(a_run(tmp_path, annotators="label-studio"))}[
        "review"
    ] == "to do"


def test_both_sweeps_and_both_trainings_under_way_show_their_progress(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    kept = Checkpoint({"w": np.zeros(1)}, {}, (ClassifierEpoch(1, 0.5),), {}, "")
    run.store.write("training/classifier.safetensors", encode(kept))
    run.store.write("training/vae.safetensors", b"half")
    for key in (
        "baseline/lam-1.0",
        "baseline/lam-2.0",
        "baseline/lam-4.0",
        "defuse/lam-1.0",
        "defuse/lam-2.0",
    ):
        run.store.write(f"trials/{key}.safetensors", b"")
    details = {state.step: state.detail for state in states_under_way(run)}
    trained = "classifier 1 of 5 epochs, β-VAE begins again, its checkpoint is damaged"
    assert details["train"] == trained
    assert details["correct"] == "baseline 3 of 4 λ begun, defuse 2 of 4 λ begun"
    lines = status_of(run, 45).splitlines()
    # the text wraps in its column
    assert any(line.split() == ["Step", "State", "Time", "Size"] for line in lines)
    assert not any("…" in line for line in lines)


def test_a_step_that_is_done_has_no_progress(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    finish(run, *ALL)
    for key in ("training/vae", "psi/000000", "trials/defuse/lam-1.0"):
        run.store.write(f"{key}.safetensors", b"half")
    run.store.write("report.json", b"{}")
    assert {(state.state, state.detail) for state in step_states(run)} == {("done", "")}


def test_a_step_was_made_when_the_last_of_it_was_and_a_run_when_the_last_step_was(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    finish(run, *ALL)
    manifest = json.loads(run.store.read("manifest.json"))
    for number, name in enumerate(("sweep", "baseline", "corrections")):
        manifest["artefacts"][name]["made"] = f"2025-01-0{4 - number}T10:0{number}:00Z"
    run.store.write("manifest.json", json.dumps(manifest).encode())
    row = next(line for line in status_of(run).splitlines() if line.split()[:1] == ["correct"])
    assert "2025-01-04 10:00" in row
    assert "2025-01-04 10:00" in list_of(tmp_path)


@pytest.mark.parametrize(
    ("width", "columns"),
    [
        (63, ["Step", "State", "Made", "(UTC)", "Time", "Size"]),
        (62, ["Step", "State", "Time", "Size"]),
        (44, ["Step", "State", "Time", "Size"]),
        (43, ["Step", "State", "Time"]),
        (35, ["Step", "State", "Time"]),
        (34, ["Step", "State"]),
    ],
)
def test_the_width_of_the_terminal_decides_which_columns_are_shown(
    width: int, columns: list[str], tmp_path: Path
) -> None:
    run = a_run(tmp_path)
    finish(run, *ALL)
    assert columns in [line.split() for line in status_of(run, width).splitlines()]


def test_status_names_the_run_with_its_seed_and_ends_with_the_time_of_all_steps(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    run.spec = run.spec.model_copy(update={"seed": 7})
    finish(run, *ALL, *BESIDE)
    lines = status_of(run, 300).splitlines()
    assert lines[0] == "sample · digits · seed 7"
    assert lines[-1] == f"14 min 00 s so far · {run.store.address}"


def test_status_has_no_time_before_any_step_is_done(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    assert status_of(run, 300).splitlines()[-1] == run.store.address


def test_status_of_an_unfinished_run_says_what_continues_it_unless_that_works_on_it(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    finish(run, "models")
    told = "The run is not finished; the `defuse run` command that began it"
    assert told in status_of(run)
    run.store.write("psi/000000.safetensors", b"")
    with run.store.lock():
        assert told not in status_of(run)
    finish(run, *ALL)
    reported(run)
    assert told not in status_of(run)


def test_the_first_step_that_is_not_done_is_under_way_before_anything_of_it_is_stored(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    finish(run, "models", "psi")
    assert {state.step: state.state for state in step_states(run)}["distill"] == "to do"
    states = {state.step: state.state for state in states_under_way(run)}
    assert (states["distill"], states["draw"]) == ("under way", "to do")
    with run.store.lock():
        assert "The run is not finished" not in status_of(run)


def test_a_report_whose_controls_have_begun_is_under_way_or_stopped(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    finish(run, *(name for name in ALL if name not in {"sweep", "evaluation"}))
    for name in ("plain/9-epochs", "plain_1/9-epochs", "left_out_0/9-epochs"):
        run.store.write(f"trials/{name}/lam-0.0.safetensors", b"")
    assert step_states(run)[-1].state == "to do"  # as while an added λ is tuned
    finish(run, "sweep")
    report = step_states(run)[-1]
    assert (report.state, report.detail) == ("stopped", "3 controls begun")
    assert states_under_way(run)[-1].state == "under way"


def test_status_of_a_finished_run_shows_the_accuracies_of_its_report(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    finish(run, *ALL)
    reported(run)
    shown = status_of(run)
    assert all(name in shown for name in ("Accuracy (Figure 4)", "Before", "Failures alone", "Defuse"))


def test_runs_without_scenarios_or_test_images_show_a_dash_and_no_arrow(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    finish(run, *ALL)
    report = reported(run, 3, 0)
    before = report.accuracy.before.model_copy(update={"test": None})
    accuracy = report.accuracy.model_copy(update={"before": before})
    untested = report.model_copy(update={"accuracy": accuracy})
    run.store.write("report.json", untested.model_dump_json(by_alias=True).encode())
    row = next(line for line in list_of(tmp_path, 80).splitlines() if line.split()[:1] == ["sample"])
    assert row.split()[:5] == ["sample", "digits", "done", "0", "–"] and "→" not in row


@pytest.mark.parametrize(
    ("width", "headings"),
    [
        (120, ["Run", "Data", "At", "Scenarios", "Test", "Last made (UTC)", "Time"]),
        (88, ["Run", "Data", "At", "Scenarios", "Test", "Time"]),
        (80, ["Run", "Data", "At", "Scenarios", "Test"]),
        (62, ["Run", "At", "Scenarios", "Test"]),
        (50, ["Run", "At", "Scenarios"]),
    ],
)
def test_a_narrow_list_of_runs_drops_columns_before_rows_become_records(
    width: int, headings: list[str], tmp_path: Path
) -> None:
    for name in ("mnist-laptop", "signs-laptop"):
        finish(run := a_run(tmp_path, name), *ALL)
        reported(run)
    lines = [re.split(r" {2,}", line.strip()) for line in list_of(tmp_path, width).splitlines()]
    assert headings in lines
    rows = [line for line in lines if line[0] in {"mnist-laptop", "signs-laptop"}]
    assert [len(row) for row in rows] == [len(headings)] * 2


def test_runs_as_records_have_all_values_and_a_blank_line_between_them(tmp_path: Path) -> None:
    finish(a_run(tmp_path, "first"), "models")
    finish(a_run(tmp_path, "second"), "models")
    first, second = list_of(tmp_path, 36).strip().split("\n\n")
    assert [part.split(": ")[0].strip() for part in first.splitlines()] == [
        "Run", "Data", "At", "Scenarios", "Test", "Last made (UTC)", "Time"
    ]  # fmt: skip
    assert second.startswith("Run: second\n")


def test_a_finished_run_has_a_time_in_all(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    finish(run, *ALL)
    reported(run)
    assert status_of(run, 300).splitlines()[-1] == f"10 min 00 s in all · {run.store.address}"


def test_a_long_name_of_a_run_is_folded_in_its_column_and_texts_begin_below_their_headings(
    tmp_path: Path,
) -> None:
    name = "a" * 60
    finish(a_run(tmp_path, name), "models")
    lines = list_of(tmp_path, 80).splitlines()
    heading = next(line for line in lines if line.split() == ["Run", "Data", "At", "Scenarios", "Test"])
    row = next(line for line in lines if "identify" in line)
    assert (row.index("digits"), row.index("identify")) == (heading.index("Data"), heading.index("At"))
    cells = [line[: heading.index("Data")].strip() for line in lines]
    assert name in "".join(cells)


@pytest.mark.parametrize(("verdict", "colour"), [("fit", ""), ("blind", "\x1b[33m")])
def test_only_a_vae_that_is_not_fit_is_shown_in_yellow(verdict: str, colour: str, tmp_path: Path) -> None:
    run = a_run(tmp_path)
    found, _ = sample_findings()
    health = Health(5000, 0.981, 0.902, 0.41, 2, 0.83, 7, 16, verdict)
    run.store.write("models.safetensors", encode(dataclasses.replace(found.models, health=health)))
    console = Console(width=200, file=io.StringIO(), force_terminal=True, color_system="standard")
    print_status(run, console)
    (line,) = [line for line in text_of(console).splitlines() if "β-VAE" in line]
    assert line.startswith(f"{colour}β-VAE: {verdict}.")


def test_a_summary_says_where_a_run_is_and_its_result(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    begun = summarize_run(run, step_states(run))
    assert begun == RunSummary("sample", "digits", "train", "to do", seconds=0)
    finish(run, *ALL)
    report = reported(run)
    (done,) = summarize_runs(FolderStore(tmp_path))
    assert (done.step, done.state, done.accepted, done.problem) == (None, "done", 2, None)
    assert done.accuracy == json.loads(report.model_dump_json())["accuracy"]
    assert done.seconds is not None and done.seconds > 0 and done.made is not None


def test_a_run_or_report_that_cannot_be_read_is_a_summary_with_the_problem(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    finish(run, *ALL)
    run.store.write("report.json", b"{}")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.yaml").write_text("seed: [")
    (tmp_path / "other").mkdir()
    broken, unread = summarize_runs(FolderStore(tmp_path))
    assert broken == RunSummary("broken", state="unreadable run.yaml", problem=broken.problem)
    assert "run.yaml" in str(broken.problem)
    assert unread.accuracy is None and "report.json is another version's" in str(unread.problem)


def test_a_store_whose_folder_does_not_exist_is_refused(tmp_path: Path) -> None:
    for words in ([], ["--json"]):
        with pytest.raises(InputError, match=f"no folder {tmp_path}/other; give --store, or start a run"):
            status.main([*words, "--store", f"{tmp_path}/other"], standalone_mode=False)
