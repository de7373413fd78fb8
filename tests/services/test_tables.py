"""The tables of a report and of a run's progress, read as a person at a terminal would."""

from __future__ import annotations

import dataclasses
import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from sample_evidence import sample_evidence
from sample_findings import finished_run, report_of, sample_findings, sample_spec

from defuse_core.artifacts import Checkpoint, Health, VaeEpoch
from defuse_core.codec import encode
from defuse_core.formatting import percent
from defuse_core.report.build import build_report
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from services.cli.console import Terminal
from services.cli.status_tables import ARTEFACTS, StepState, print_runs, print_status, step_states
from services.cli.tables import print_report
from services.labeling.records import STATE_KEY
from tests.no_access import refuse_access

LONG = ("No passing for vehicles over 3.5 metric tons", "Speed limit (30km/h)", "[bold]Stop[/bold]", "Yield")
BESIDE = {"measuredprecision": "train", "moreimages": "review", "plain": "report", "evidence": "report"}
ALL = tuple(name for names in ARTEFACTS.values() for name in names)


def terminal(width: int = 80) -> Console:
    console = Terminal()
    console.width, console.file = width, io.StringIO()
    return console


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_mixture_that_did_not_converge_is_reported(tmp_path: Path) -> None:
    found, evaluation = sample_findings()
    for converged in (True, False):
        scenarios = dataclasses.replace(found.scenarios, converged=converged)
        report = build_report(
            a_run(tmp_path), finished_run(dataclasses.replace(found, scenarios=scenarios), evaluation)
        )
        console = terminal()
        print_report(report, console)
        assert ("did NOT converge" in text_of(console)) is not converged


def a_run(folder: Path, name: str = "sample", **review: object) -> Run:
    spec = sample_spec()
    spec = spec.model_copy(update={"review": spec.review.model_copy(update=review)})
    return Run.start(FolderStore(folder), name, spec)


def finish(run: Run, *keys: str) -> None:
    """Leave artefacts in the run, as if their steps had taken a minute each."""
    found, _ = sample_findings()
    steps = {name: step for step, names in ARTEFACTS.items() for name in names} | BESIDE
    entries = {}
    for key in keys:
        run.store.write(f"{key}.safetensors", encode(found.models))
        entries[key] = {
            "step": steps[key],
            "made": "2025-01-01T10:00:00Z",
            "seconds": 60.0,
            "bytes": 2_000_000,
        }
    run.store.write("manifest.json", json.dumps({"artefacts": entries}).encode())


def states_under_way(run: Run) -> list[StepState]:
    """Return the states while a driver holds the run."""
    with run.store.lock():
        return step_states(run)


@pytest.mark.parametrize("width", [80, 120])
def test_a_report_fits_the_terminal_and_cuts_no_figure(tmp_path: Path, width: int):
    console = terminal(width)
    report = build_report(a_run(tmp_path), finished_run(*sample_findings(12, 9, classes=LONG)))
    print_report(report, console)
    lines = text_of(console).splitlines()
    assert max(map(len, lines)) <= width
    first = next(row for row in report.scenarios.list if row.accepted)
    row = next(line for line in lines if line.strip().startswith("0 "))
    assert f"{100 * first.defuse:.1f} %" in row


@pytest.mark.parametrize("width", [40, 52, 60, 70])
def test_a_narrow_terminal_shows_fewer_figures_of_a_scenario_and_its_number(tmp_path: Path, width: int):
    console = terminal(width)
    report = build_report(a_run(tmp_path), finished_run(*sample_findings(12, 9, classes=LONG)))
    print_report(report, console)
    table = (
        text_of(console).split("Failure scenarios")[1].split("Agreement of the annotators")[0].splitlines()
    )
    for row in (row for row in report.scenarios.list if row.accepted):
        line = next(line for line in table if line.strip().startswith(f"{row.number} "))
        assert f"{100 * row.before:.1f} %" in line
        assert f"{100 * row.defuse:.1f} %" in line


@pytest.mark.parametrize("width", [60, 80, 100])
def test_long_names_of_classes_are_shown_whole_and_go_on_in_the_next_line(tmp_path: Path, width: int):
    console = terminal(width)
    report = build_report(a_run(tmp_path), finished_run(*sample_findings(12, 9, classes=LONG)))
    print_report(report, console)
    table = text_of(console).split("Failure scenarios")[1].split("Before, Defuse:")[0]
    accepted = [row for row in report.scenarios.list if row.accepted]
    assert any(row.label == LONG[0] for row in accepted)
    words = {word for row in accepted for word in row.label.split() if len(word) <= len("Mistaken for")}
    assert words <= set(table.split())
    assert "…" not in table and max(map(len, table.splitlines())) <= width


@pytest.mark.parametrize("width", [22, 30, 40])
def test_a_terminal_too_narrow_for_a_table_shows_all_its_figures_below_each_other(tmp_path: Path, width: int):
    console, run = terminal(width), a_run(tmp_path)
    evidence = sample_evidence(np.array([[0.1, 0.9, 0.9, 1.0], [0.6, 0.9, 0.9, 1.0]]))
    report = build_report(run, finished_run(*sample_findings(3, 2), evidence))
    run.store.write("report.json", report.model_dump_json(by_alias=True).encode())
    print_report(report, console)
    print_runs(FolderStore(tmp_path), console)
    assert max(map(len, text_of(console).splitlines())) <= width
    shown = " ".join(text_of(console).split())
    for row in (report.accuracy.before, report.accuracy.baseline, report.accuracy.defuse):
        figures = f"Validation: {percent(row.validation, 2)} Test: {percent(row.test, 2)} Scenario images: "
        assert figures + percent(row.scenario) in shown
    assert "left-out scenarios Before: 35 % (30–40) Plain: 90 % (85–95) Defuse: 100 % (95–100)" in shown
    assert "Rejected candidates Images: 10 Agreement: 100.0 ± 0.0 %" in shown
    for scenario in (row for row in report.scenarios.list if row.accepted):
        assert percent(scenario.before) in shown and percent(scenario.defuse) in shown
    before, after = report.accuracy.before.test, report.accuracy.defuse.test
    assert f"Run: {run.name} Data: digits At: train, to do Scenarios: 2: " in shown
    assert f"Test: {percent(before)} → {percent(after)}" in shown
    assert "…" not in shown


@pytest.mark.parametrize("width", [22, 30, 40, 50, 60])
def test_a_narrow_terminal_shows_every_step_with_its_state(tmp_path: Path, width: int):
    console = terminal(width)
    run = a_run(tmp_path)
    finish(run, "models", "psi")
    print_status(run, console)
    lines = text_of(console).splitlines()
    for step in ("train", "identify"):
        assert any(line.split()[:2] == [step, "done"] for line in lines), text_of(console)
    assert any(line.split()[:3] == ["distill", "to", "do"] for line in lines)
    assert "…" not in text_of(console)


@pytest.mark.parametrize("columns", ["0", "1"])
def test_a_terminal_without_columns_shows_a_report(columns: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    print_report(build_report(a_run(tmp_path), finished_run(*sample_findings(5, 2))))
    longest = max(capsys.readouterr().out.splitlines(), key=len)
    assert 60 < len(longest) <= 80 if columns == "0" else " " not in longest


def test_a_report_starts_with_its_caveats(tmp_path: Path):
    console = terminal(200)
    found, evaluation = sample_findings(5, 2)
    mixed = dataclasses.replace(found.verdicts, purity=found.verdicts.purity * 0.5)
    report = report_of((dataclasses.replace(found, verdicts=mixed), evaluation), tmp_path)
    print_report(report, console)
    text = text_of(console)
    assert "2 of 5 candidate scenarios are failure scenarios." in text
    assert "Reference models answered, not people." in text
    assert "Purity is 40 %." in text
    assert "516 codes; 12.0 % of 1,000 images have a failing draw" in text
    assert "2 of 10 dimensions collapsed" in text


def test_the_caption_of_seen_says_what_the_rule_is(tmp_path: Path):
    console = terminal(200)
    print_report(build_report(a_run(tmp_path), finished_run(*sample_findings(5, 2))), console)
    caption = "the classifier is wrong on significantly more than a fifth of the training images behind it."
    assert caption in " ".join(text_of(console).split())


def test_a_report_with_judges_says_how_many_there_are_and_the_purity_by_them(tmp_path: Path):
    console, sample = terminal(200), sample_findings(4, 3)
    judged = sample_evidence(np.array([[0.1, 0.9, 0.9, 1.0], [0.6, 0.9, 0.9, 1.0], [np.nan] * 4]))
    print_report(build_report(a_run(tmp_path), finished_run(*sample, judged)), console)
    assert "\nPurity by 3 judges: 90.0 %.\n" in text_of(console)
    alone = terminal(200)
    print_report(build_report(a_run(tmp_path), finished_run(*sample)), alone)
    assert "Purity by" not in text_of(alone)


def test_brackets_in_a_class_name_are_printed_as_they_are(tmp_path: Path):
    console = terminal(160)
    print_report(report_of(sample_findings(12, 9, classes=LONG), tmp_path), console)
    assert "[bold]Stop[/bold]" in text_of(console)


def test_a_report_without_scenarios_prints_dashes(tmp_path: Path):
    console = terminal()
    print_report(build_report(a_run(tmp_path), finished_run(*sample_findings(0, 0))), console)
    assert "No failure scenario was found" in text_of(console)
    assert "nan" not in text_of(console)


def test_a_report_without_a_correction_counts_no_scenario_as_corrected(tmp_path: Path):
    console = terminal(200)
    report = build_report(a_run(tmp_path), finished_run(*sample_findings(5, 2)))
    print_report(report.model_copy(update={"chosen": None}), console)
    row = next(line.split() for line in text_of(console).splitlines() if line.split()[:1] == ["Defuse"])
    assert row[1] == "0"


def test_a_new_run_has_everything_to_do(tmp_path: Path):
    assert {state.state for state in step_states(a_run(tmp_path))} == {"to do"}


def test_steps_under_way_show_their_progress(tmp_path: Path):
    run = a_run(tmp_path)
    finish(run, "models")
    run.store.write("psi/000000.safetensors", b"")
    run.store.write("trials/baseline/lam-1.0.safetensors", b"")
    states = {state.step: state for state in states_under_way(run)}
    assert states["train"].state == "done"
    assert (states["train"].seconds, states["train"].bytes) == (60.0, 2_000_000)
    assert (states["identify"].state, states["identify"].detail) == ("under way", "1 of 4 shards")
    assert (states["correct"].state, states["correct"].detail) == ("under way", "baseline 1 of 4 λ begun")
    assert states["distill"].state == "to do"


def test_a_training_under_way_shows_the_epochs_kept(tmp_path: Path):
    run = a_run(tmp_path)
    kept = Checkpoint(
        {"w": np.zeros(1)}, {}, (VaeEpoch(1, 90.0, 8.0, 0.4), VaeEpoch(2, 80.0, 8.0, 0.4)), {}, ""
    )
    run.store.write("training/vae.safetensors", encode(kept))
    train = states_under_way(run)[0]
    assert (train.step, train.state, train.detail) == ("train", "under way", "β-VAE 2 of 800 epochs")


def test_a_damaged_checkpoint_is_shown_as_the_training_that_begins_again(tmp_path: Path):
    run = a_run(tmp_path)
    run.store.write("training/vae.safetensors", b"half")
    train = states_under_way(run)[0]
    assert (train.state, train.detail) == ("under way", "β-VAE begins again, its checkpoint is damaged")
    console = terminal()
    print_status(run, console)
    assert "begins again" in text_of(console)


def test_a_review_by_people_waits_for_them_once_they_are_asked(tmp_path: Path):
    run = a_run(tmp_path, annotators="label-studio")
    finish(run, "models", "psi", "scenarios", "gallery")
    assert {s.step: s.state for s in step_states(run)}["review"] == "to do"  # as with --until draw
    run.store.write(STATE_KEY, b"{}")
    assert {s.step: s.state for s in step_states(run)}["review"] == "waits for people"
    finish(run, "votes")  # as after `defuse review set --redo`
    assert {s.step: s.state for s in states_under_way(run)}["review"] == "under way"


def test_status_shows_each_step_with_its_time_and_size(tmp_path: Path):
    run = a_run(tmp_path)
    finish(run, *ALL)
    run.store.write("report.json", b"{}")
    console = terminal()
    print_status(run, console)
    lines = {line.split()[0]: line for line in text_of(console).splitlines() if line.strip()}
    assert "done" in lines["correct"]
    assert "3 min 00 s" in lines["correct"]
    assert "6.0 MB" in lines["correct"]
    assert all("done" in lines[step] for step in ("train", "identify", "distill", "draw", "review", "report"))


def test_the_time_and_size_of_a_step_are_those_of_all_that_it_made(tmp_path: Path):
    run = a_run(tmp_path)
    finish(run, *ALL, *BESIDE)
    run.store.delete("evidence.safetensors")  # its entry stays, as after a λ is added
    run.store.write("report.json", b"{}")
    states = {state.step: state for state in step_states(run)}
    assert (states["train"].seconds, states["train"].bytes) == (120.0, 4_000_000)
    assert (states["review"].seconds, states["report"].seconds) == (180.0, 120.0)
    console = terminal(120)
    print_runs(FolderStore(tmp_path), console)
    assert "13 min 00 s" in text_of(console)


def test_a_step_that_has_begun_is_under_way_while_a_driver_holds_the_run_and_else_stopped(tmp_path: Path):
    run = a_run(tmp_path)
    finish(run, "measuredprecision")
    assert states_under_way(run)[0].state == "under way"
    assert step_states(run)[0].state == "stopped"
    console = terminal()
    print_runs(FolderStore(tmp_path), console)
    assert "train, stopped" in text_of(console)


def test_runs_are_listed_with_where_they_are(tmp_path: Path):
    done, begun = a_run(tmp_path, "finished"), a_run(tmp_path, "begun")
    finish(done, *ALL)
    done.store.write("report.json", b"{}")
    finish(begun, "models")
    FolderStore(tmp_path).write("broken/run.yaml", b"data: {name: nothing}")
    console = terminal()
    print_runs(FolderStore(tmp_path), console)
    lines = {line.split()[0]: line for line in text_of(console).splitlines() if line.strip()}
    assert "done" in lines["finished"]
    assert "identify, to do" in lines["begun"]
    assert "unreadable run.yaml" in lines["broken"]


def test_a_run_that_cannot_be_listed_is_named_with_what_is_damaged_in_it(tmp_path: Path):
    a_run(tmp_path, "readable")
    a_run(tmp_path, "damaged").store.write("manifest.json", b'{"artefacts": {"models": {}}}')
    FolderStore(tmp_path).write("broken/run.yaml", b"seed: 2023-02-30")
    console = terminal(300)
    print_runs(FolderStore(tmp_path), console)
    lines = {line.split()[0]: line for line in text_of(console).splitlines() if line.strip()}
    assert "train, to do" in lines["readable"]
    assert "unreadable " in lines["damaged"] and "run.yaml" not in lines["damaged"]
    assert "damaged JSON; delete it and run again" in lines[f"{tmp_path}/damaged/manifest.json:"]
    assert "unreadable run.yaml" in lines["broken"]
    assert "found no YAML; delete it and run again with" in lines[f"{tmp_path}/broken/run.yaml:"]


def test_a_folder_that_cannot_be_entered_is_a_row_beside_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    a_run(tmp_path, "mine")
    for name in ("lost+found", "notes"):
        (tmp_path / name).mkdir()
    console = terminal(300)
    with monkeypatch.context() as patch:
        refuse_access(patch, tmp_path / "lost+found")
        print_runs(FolderStore(tmp_path), console)
    lines = {line.split()[0]: line for line in text_of(console).splitlines() if line.strip()}
    assert "train, to do" in lines["mine"]
    assert "unreadable " in lines["lost+found"]
    assert "Permission denied" in lines[f"{tmp_path}/lost+found/run.yaml:"]
    assert "notes" not in lines


def test_an_empty_store_is_reported(tmp_path: Path):
    console = terminal(300)
    print_runs(FolderStore(tmp_path), console)
    assert f"no runs in {tmp_path}" in text_of(console)


def test_a_finished_run_shows_its_scenarios_and_accuracies_before_and_after(tmp_path: Path):
    run = a_run(tmp_path, "finished")
    finish(run, *ALL)
    report = build_report(run, finished_run(*sample_findings()))
    run.store.write("report.json", report.model_dump_json(by_alias=True).encode())
    console = terminal()
    print_status(run, console)
    assert "2 of 4 candidate scenarios are failure scenarios." in text_of(console)
    before, after = report.accuracy.before, report.accuracy.defuse
    listed = terminal(120)
    print_runs(FolderStore(tmp_path), listed)
    assert f"2: {percent(before.scenario, 0)} → {percent(after.scenario, 0)}" in text_of(listed)
    assert f"{percent(before.test)} → {percent(after.test)}" in text_of(listed)


def test_a_report_of_another_version_is_named_with_the_command_that_writes_it_again(tmp_path: Path):
    run = a_run(tmp_path, "older")
    finish(run, *ALL)
    run.store.write("report.json", b'{"version": 3}')
    for show in (lambda console: print_status(run, console), partial(print_runs, FolderStore(tmp_path))):
        console = terminal(300)
        show(console)
        assert "older: report.json is another version's" in text_of(console)
        assert f"`defuse report older --store {tmp_path}` writes it again" in text_of(console)


def test_status_shows_the_health_of_the_vae_as_soon_as_it_is_trained(tmp_path: Path):
    run = a_run(tmp_path, "trained")
    found, _ = sample_findings()
    health = Health(5000, 0.981, 0.402, 0.41, 2, 0.83, 7, 16, "blind")
    run.store.write("models.safetensors", encode(dataclasses.replace(found.models, health=health)))
    console = terminal()
    print_status(run, console)
    shown = " ".join(text_of(console).split())
    assert "β-VAE: blind. The classifier gets 98.1 % of 5,000 training images right" in shown
    assert (
        "keeps 41.0 % of its right answers on reconstructions (fit: at least 90 %); 7 of 16 latent" in shown
    )


def test_status_shows_what_reference_models_measured_of_an_anchored_vae(tmp_path: Path):
    run = a_run(tmp_path, "anchored")
    found, _ = sample_findings()
    trained = Health(5000, 0.981, 0.402, 0.41, 2, 0.83, 7, 16, "poor", anchored=True)
    measured = dataclasses.replace(trained, kept_right=0.953, verdict="fit", judged_by="reference models")
    run.store.write("models.safetensors", encode(dataclasses.replace(found.models, health=trained)))
    run.store.write("health.safetensors", encode(measured))
    console = terminal()
    print_status(run, console)
    shown = " ".join(text_of(console).split())
    assert "β-VAE: fit. The reference models get 98.1 % of 5,000 training images right" in shown
    assert "keep 95.3 % of their right answers on images moved by the noise (fit: at least 90 %)" in shown
