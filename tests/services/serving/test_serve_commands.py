"""The commands check, promote and rollback, and the options of serve."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from click import UsageError
from click.testing import CliRunner

from defuse_core.artifacts import NONE_OF_THE_ABOVE, Health, Models, Sweep, Verdicts
from defuse_core.codec import encode
from defuse_core.config import dump_run_file
from defuse_core.errors import CheckFailed, InputError, NoAnswerError, RunFileError
from defuse_core.report.evidence_schema import Share
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from services.cli.serve import check, parse_share, promote, rollback, serve
from services.serving.candidate import prepare_candidate
from services.serving.checks import Check
from services.serving.registry import Registry
from services.serving.registry import promote as promote_candidate
from services.serving.registry_state import PromotionRequest
from tests.sample_findings import sample_findings


def run(command, *args):
    """Return what the command printed. Raises its errors, as `main` receives them."""
    result = CliRunner().invoke(command, args, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.output


def test_check_prints_every_check_and_fails_with_exit_code_1_where_one_failed(planted):
    lines = run(check, "first", "--store", planted.address).splitlines()
    assert len(lines) == 10 and all(line.startswith("ok ") for line in lines[:8])
    assert lines[8] == "note   reference models, not people, labelled the failure scenarios"
    assert lines[9] == "8 of 8 checks passed"
    result = CliRunner().invoke(check, ["swapped", "--store", planted.address], standalone_mode=False)
    failed = [line for line in result.output.splitlines() if line.startswith("FAILED")]
    assert [line.split()[1] for line in failed] == ["clean", "every", "regressions:"]
    assert isinstance(result.exception, CheckFailed) and result.exception.exit_code == 1
    assert "3 of 8 checks failed" in str(result.exception)


def test_check_as_json_is_one_object(planted):
    found = json.loads(run(check, "first", "--store", planted.address, "--json"))
    assert found["passed"] and len(found["checks"]) == 8
    figures = {each["name"]: (each["found"], each["limit"]) for each in found["checks"]}
    limits = Run.open(planted, "first").spec.check
    at = {each["name"]: each["at"] for each in found["checks"] if each["at"] is not None}
    assert figures["finite"] == (None, None) and figures["improvement"][1] == 0
    least = {"scenario accuracy": limits.min_scenario_accuracy, "worst scenario": limits.min_each_scenario}
    most = {"clean accuracy": limits.max_loss, "every class": limits.max_class_loss}
    most |= {"regressions": limits.max_regressions}
    assert all(figures[name][0] >= limit == figures[name][1] for name, limit in least.items())
    assert all(figures[name][0] <= limit == figures[name][1] for name, limit in most.items())
    assert at == {**dict.fromkeys((*least, "improvement"), "least"), **dict.fromkeys(most, "most")}


def test_check_works_on_a_store_that_cannot_be_written(own_store, tmp_path, caplog):
    made = tmp_path / "first" / "candidates"
    shutil.rmtree(made, ignore_errors=True)
    made.symlink_to("nowhere")  # a folder cannot be made here: as on a read-only disk, for root as well
    assert run(check, "first", "--store", own_store.address).count("ok ") == 8
    assert "made again next time, since the store cannot be written" in caplog.text


def failed_json(store: FolderStore) -> dict:
    """Return what `check first --json` printed of a run without a corrected classifier."""
    result = CliRunner().invoke(check, ["first", "--store", store.address, "--json"], standalone_mode=False)
    assert isinstance(result.exception, CheckFailed)
    page = json.loads(result.output)
    assert (page["run"], page["passed"], page["checks"]) == ("first", False, [])
    return page


def without_correction(run_dir: Run, accepted: bool, verdict: str = "fit") -> None:
    """Rewrite a run as one that chose no λ, or that accepted no scenario either; `verdict` on its β-VAE."""
    models = run_dir.load(Models)
    judged = replace(models, health=replace(models.health, verdict=verdict))
    run_dir.store.write("models.safetensors", encode(judged))
    run_dir.store.write("sweep.safetensors", encode(Sweep((), None, {}, ())))
    if not accepted:
        verdicts = run_dir.load(Verdicts)
        labels = np.full_like(verdicts.labels, NONE_OF_THE_ABOVE)
        run_dir.store.write("verdicts.safetensors", encode(replace(verdicts, labels=labels)))


@pytest.mark.parametrize("verdict", ["fit", "poor"])
def test_a_run_in_which_every_lambda_costs_too_much_never_passes_a_check(own_store, verdict):
    without_correction(Run.open(own_store, "first"), accepted=True, verdict=verdict)
    for command in (check, promote):
        with pytest.raises(CheckFailed, match="every λ costs more clean accuracy"):
            run(command, "first", "--store", own_store.address)
    assert "every λ costs more clean accuracy" in failed_json(own_store)["reason"]


def test_a_classifier_without_failure_scenarios_passes_and_there_is_nothing_to_promote(own_store):
    without_correction(Run.open(own_store, "first"), accepted=False)
    assert run(check, "first", "--store", own_store.address).startswith("ok     run first corrected nothing")
    page = json.loads(run(check, "first", "--store", own_store.address, "--json"))
    assert page["passed"] and "no failure scenario was accepted" in page["reason"]
    with pytest.raises(InputError, match="no failure scenario was accepted"):
        run(promote, "first", "--store", own_store.address)


@pytest.mark.parametrize("verdict", ["poor", "blind"])
def test_a_run_that_could_not_tell_never_passes_a_check(own_store, verdict):
    run_dir = Run.open(own_store, "first")
    without_correction(run_dir, accepted=False)
    health = Health(1000, 0.97, 0.4, 0.41, 3, 0.6, 1, 10, verdict)
    run_dir.store.write("models.safetensors", encode(replace(run_dir.load(Models), health=health)))
    for command in (check, promote):
        with pytest.raises(CheckFailed, match=f"could not tell .* the β-VAE is {verdict}"):
            run(command, "first", "--store", own_store.address)
    assert "could not tell" in failed_json(own_store)["reason"]


def test_a_run_whose_screen_kept_nothing_never_passes_a_check(own_store):
    run_dir = Run.open(own_store, "first")
    without_correction(run_dir, accepted=False)
    psi = sample_findings(4, 0)[0].psi
    run_dir.store.write("psi.safetensors", encode(replace(psi, codes=psi.codes * 0, failing=800)))
    for command in (check, promote):
        with pytest.raises(CheckFailed, match="could not tell .* in none of 800 failing draws"):
            run(command, "first", "--store", own_store.address)


def test_a_run_in_which_nothing_could_be_decided_never_passes_a_check(own_store):
    run_dir = Run.open(own_store, "first")
    without_correction(run_dir, accepted=False)
    verdicts = run_dir.load(Verdicts)
    nobody = np.full_like(verdicts.image_labels, NONE_OF_THE_ABOVE)
    run_dir.store.write("verdicts.safetensors", encode(replace(verdicts, image_labels=nobody)))
    for command in (check, promote):
        with pytest.raises(CheckFailed, match="could not tell .* no reviewed image has a label"):
            run(command, "first", "--store", own_store.address)
    assert "could not tell" in failed_json(own_store)["reason"]


def test_check_of_an_unfinished_run_names_the_command_that_shows_what_is_missing(
    planted, good_spec, tmp_path
):
    Run.start(FolderStore(tmp_path), "begun", good_spec)
    with pytest.raises(
        InputError,
        match="run begun is not finished; the `defuse run` command that began it, without --until, or in Python",
    ):
        run(check, "begun", "--store", str(tmp_path))


def test_a_run_whose_judges_were_not_asked_yet_is_not_finished(own_store):
    """The check of their own labels would be left out, and count as passed."""
    spec = Run.open(own_store, "first").spec.with_fields("judges", count=3)
    own_store.write("first/run.yaml", dump_run_file(spec).encode())
    own_store.delete("first/settings.json")
    for command in (check, promote, serve):
        with pytest.raises(InputError, match="run first is not finished; the `defuse run` command"):
            run(command, "first", "--store", own_store.address)


@pytest.mark.parametrize("option", ["--by", "--why", "--force"])
def test_text_that_acts_on_other_peoples_terminals_is_refused_and_escaped(option, own_store):
    store = ("--store", own_store.address)
    with pytest.raises(UsageError, match=r"found 'a\\nb\\x1b\[2J'"):
        run(promote, "first", *store, option, "a\nb\x1b[2J")
    registry = Registry(own_store)
    promote_candidate(
        registry, prepare_candidate(Run.open(own_store, "first"))[1], PromotionRequest("eve\x1b[2J", "a\nb")
    )
    shown = run(promote, *store)
    assert r"by eve\x1b[2J on" in shown and r"a\nb" in shown
    assert "\x1b" not in shown and shown.count("\n") == 2


def test_promote_canary_promote_and_rollback_are_one_command_each(own_store):
    store = ("--store", own_store.address, "--by", "ana")
    lines = run(promote, "first", *store, "--why", "first of all").splitlines()
    assert lines[0] == "version 1 to production"
    assert run(promote, "second", *store, "--shadow").startswith("version 2 as shadow\n")
    assert run(promote, "second", *store, "--canary", "5%").startswith("version 2 as canary for 5 %\n")
    assert run(promote, "second", *store).startswith("version 2 to production\n")
    assert run(rollback, *store) == "rolled back from version 2; version 1 is in production\n"
    shown = run(promote, "--store", own_store.address).splitlines()
    assert (
        shown[0].startswith(
            "   1  production   run first, labelled by reference models, finds failing inputs"
        )
        and re.search(r"; by ana on \d{4}-\d\d-\d\d \d\d:\d\d UTC", shown[0])
        and "first of all" in shown[0]
    )
    assert shown[1].startswith("   2               run second") and "rolled back from version 2" in shown[2]


def test_the_command_that_a_refused_rollback_prints_acts_on_the_same_store(own_store, monkeypatch):
    there = ("--store", own_store.address)
    run(promote, "first", *there)
    run(promote, "second", *there, "--canary", "5%")
    run(rollback, *there)
    with pytest.raises(InputError, match=f": `defuse rollback --production --store {own_store.address}`$"):
        run(rollback, *there)
    monkeypatch.chdir(own_store.folder.rename(own_store.folder.with_name("runs")).parent)
    with pytest.raises(InputError, match=": `defuse rollback --production`$"):
        run(rollback)


def test_production_is_rolled_back_beside_a_canary_by_the_author_and_for_the_reason_that_are_given(own_store):
    store = ("--store", own_store.address, "--by", "ana")
    for name in ("first", "second"):
        run(promote, name, *store)
    run(promote, "swapped", *store, "--canary", "5%", "--force", "a drill")
    run(rollback, *store[:2], "--production", "--by", "bo", "--why", "too slow")
    state = Registry(own_store).state()
    assert (state.production, state.canary, state.by, state.why) == (1, None, "bo", "too slow")


def test_a_version_that_does_not_predict_is_not_put_back(own_store):
    unfit = replace(prepare_candidate(Run.open(own_store, "first"))[1], classifier={}, digest="unfit")
    promote_candidate(Registry(own_store), unfit, PromotionRequest("ana", "", force="a drill"))
    run(promote, "second", "--store", own_store.address, "--force", "a drill")
    with pytest.raises(InputError, match=r"version 1 cannot go back into production: .*the weights lack"):
        run(rollback, "--store", own_store.address)


def test_a_rollback_whose_answer_is_lost_says_how_to_see_whether_it_is_done(own_store, monkeypatch):
    """Given again without a look, it would go back one version more."""
    store, create = ("--store", own_store.address, "--by", "ana"), FolderStore.create
    for name in ("first", "second"):
        run(promote, name, *store)

    def create_and_lose_the_answer(store: FolderStore, key: str, data: bytes) -> bool:
        create(store, key, data)
        raise NoAnswerError(f"{store.address}/{key}: no answer; run again to continue")

    with monkeypatch.context() as outage, pytest.raises(NoAnswerError) as failure:
        outage.setattr(FolderStore, "create", create_and_lose_the_answer)
        run(rollback, *store)
    see = f"`defuse promote --store {own_store.address}`"
    start = f"this change may be stored: see {see} before you run the command again"
    assert str(failure.value).startswith(start) and Registry(own_store).state().production == 1
    with pytest.raises(InputError, match=r"expected version 2 in production \(--from\), found another"):
        run(rollback, *store, "--from", "2")


def test_promote_prints_and_records_how_well_failing_inputs_are_found(own_store):
    lines = run(promote, "first", "--store", own_store.address).splitlines()
    auroc = r"AUROC (0\.9\d+|1\.0+)"
    assert re.match(f"Finds failing inputs by softmax-and-distance; on validation images {auroc}", lines[1])
    for line, part in zip(lines[2:], ("validation", "test"), strict=True):
        assert line.startswith(f"  {part}: ")
        assert re.search(rf"{auroc} .*average precision (0\.\d\d|1\.00)", line)
        assert "precision" in line and "recall" in line
        # too few wrong answers fill no two bins
        errors = int(re.search(r"(\d+) of \d+ answers are wrong", line)[1])
        assert ("; calibration error 0.0" in line) == (errors >= 20), line
    assert "no precision and recall, since that threshold was chosen on these images" in lines[2]
    assert re.search(r"precision \d+\.\d % .*, recall \d+\.\d %", lines[3])
    recorded = Registry(own_store).state().versions[1].watch
    assert recorded is not None and recorded.verdict == lines[1] and recorded.test is not None
    assert re.search(rf"finds failing inputs \({auroc}", run(promote, "--store", own_store.address))


@pytest.mark.parametrize("validation", [True, False])
def test_a_version_finds_failing_inputs_also_where_no_test_image_is_wrong(own_store, validation: bool):
    run(promote, "first", "--store", own_store.address)
    registry = Registry(own_store)
    known = registry.state().versions[1]
    unknown = {"auroc": Share(value=None, low=None, high=None), "errors": 0}
    watch = known.watch.model_copy(update={"test": known.watch.test.model_copy(update=unknown)})
    if not validation:
        watch = watch.model_copy(update={"validation": None})
    changed = {1: known.model_copy(update={"watch": watch})}
    registry.change("measured", "ana", "", lambda state: {"versions": changed})
    shown = run(promote, "--store", own_store.address)
    assert "finds failing inputs" in shown and ("(AUROC" in shown) is validation


def test_promote_of_a_known_version_prints_the_figures_that_the_registry_has_of_it(own_store):
    run(promote, "first", "--store", own_store.address)
    registry = Registry(own_store)
    known = registry.state().versions[1]
    measured = known.model_copy(
        update={"watch": known.watch.model_copy(update={"verdict": "As measured then."})}
    )
    registry.change("measured", "ana", "", lambda state: {"versions": {1: measured}})
    assert run(promote, "first", "--store", own_store.address).splitlines()[1] == "As measured then."


def test_promote_says_where_failing_inputs_are_not_found(own_store):
    lines = run(promote, "broken", "--store", own_store.address, "--force", "a drill").splitlines()
    assert lines[-1] == "Failing inputs cannot be found: some of the classifier's outputs are not finite."
    assert "does not find failing inputs" in run(promote, "--store", own_store.address)


def test_promote_of_a_failing_candidate_needs_a_reason(own_store):
    with pytest.raises(CheckFailed, match="swapped is not promoted"):
        run(promote, "swapped", "--store", own_store.address)
    run(promote, "swapped", "--store", own_store.address, "--force", "a drill")
    assert Registry(own_store).state().versions[1].forced


def test_promote_does_not_replace_what_went_into_production_while_it_checked(own_store, monkeypatch):
    def prepare_beside_another(opened, *others, **named):
        second = prepare_candidate(Run.open(own_store, "second"))[1]
        promote_candidate(Registry(own_store), second, PromotionRequest("bo", ""))
        return prepare_candidate(opened, *others, **named)

    monkeypatch.setattr("services.serving.candidate.prepare_candidate", prepare_beside_another)
    with pytest.raises(InputError, match="production changed meanwhile"):
        run(promote, "first", "--store", own_store.address)
    assert [info.run for info in Registry(own_store).state().versions.values()] == ["second"]


def test_promote_says_which_version_it_equals_and_what_it_was_forced_over(own_store):
    store = ("--store", own_store.address)
    run(promote, "first", *store)
    for key in own_store.list("first/"):
        own_store.write(key.replace("first", "nightly", 1), own_store.read(key))
    key, candidate = prepare_candidate(Run.open(own_store, "nightly"))
    failing = replace(candidate, run="nightly", checks=(Check("clean", False, "clean: 60%"),))
    own_store.write(f"nightly/{key}", encode(failing))
    lines = run(promote, "nightly", *store, "--force", "in a hurry").splitlines()
    assert lines[1] == "  forced over: clean: 60%"
    assert lines[2] == "the model of run nightly equals version 1, which is of run first"
    shown = run(promote, *store).splitlines()
    assert "run first (forced)" in shown[0] and shown[-1] == "  forced over: clean: 60%"


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), ("0.2", 0.2), ("12.5%", 0.125)])
def test_a_share_is_a_percentage_or_a_fraction(text, share):
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["0", "100%", "-5%", "five", "%", "nan"])
def test_anything_else_is_no_share(text):
    with pytest.raises(InputError, match="such as 5%"):
        parse_share(text)


@pytest.mark.parametrize(
    "options",
    [("--canary", "5%"), ("--shadow",), ("--force", "a drill"), ("--by", "ana"), ("--why", "a reason")],
)
def test_promote_without_a_run_refuses_what_says_how_to_promote_one(options, tmp_path):
    with pytest.raises(UsageError, match="--canary, --shadow, --force, --by and --why need RUN"):
        run(promote, "--store", str(tmp_path), *options)


def test_a_version_does_not_become_canary_and_shadow_at_once(tmp_path):
    with pytest.raises(UsageError, match="--canary and --shadow exclude each other"):
        run(promote, "first", "--store", str(tmp_path), "--canary", "5%", "--shadow")


@pytest.mark.parametrize("option", ["--canary", "--force", "--by", "--why"])
def test_promote_with_the_value_of_an_unset_variable_is_refused(option, tmp_path):
    with pytest.raises(UsageError, match="expected a value, found an empty one; is the variable set"):
        run(promote, "first", "--store", str(tmp_path), option, "")


def test_serve_with_the_value_of_an_unset_variable_is_refused(tmp_path):
    with pytest.raises(UsageError, match="expected a value, found an empty one; is the variable set"):
        run(serve, "first", "--store", str(tmp_path), "--host", "")


@pytest.mark.parametrize(
    "options", [("--set", "serve.watch"), ("--set", "vae.beta=1"), ("--set", "serve.x={")]
)
def test_serve_rejects_fields_of_other_sections(planted, options):
    with pytest.raises(RunFileError, match="--set"):
        run(serve, "first", "--store", planted.address, *options)


@pytest.mark.parametrize("words", [(promote, "first"), (rollback,)])
def test_a_machine_without_a_name_for_its_user_asks_for_the_author(planted, monkeypatch, words):
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(InputError, match="--by: this machine has no name for its user"):
        run(*words, "--store", planted.address)


def test_a_store_without_a_registry_is_named_by_promote_and_rollback(tmp_path):
    store = ("--store", str(tmp_path / "mistyped"))
    line = f"no registry in {tmp_path}/mistyped/registry: nothing was promoted yet, or --store names another store"
    assert run(promote, *store) == f"{line}\n"
    with pytest.raises(InputError) as failure:
        run(rollback, *store)
    assert str(failure.value) == line and not (tmp_path / "mistyped").exists()
