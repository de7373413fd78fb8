import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from torch import nn

from defuse_core.artifacts import (
    NONE_OF_THE_ABOVE,
    Corrections,
    Psi,
    ReferenceSet,
    Scenarios,
    Sweep,
    Verdicts,
    Votes,
)
from defuse_core.errors import DamagedError, DataError, InputError, RunMismatchError, StoreError
from defuse_core.local import LocalCompute
from defuse_core.pipeline import rewrite_report, run_defuse
from defuse_core.report import parse_report
from defuse_core.review.overrides import override_verdict, reopen_vote
from defuse_core.review.verdicts import decide_verdicts
from defuse_core.runs import ReachedStep, Run
from defuse_core.steps import STEPS
from defuse_core.store import FolderStore
from defuse_core.train import train_side_by_side
from defuse_core.training.reference_models import ReferenceAnnotators
from defuse_core.trials import run_trial, trial_key
from defuse_core.watch import FailureWatch
from tests.conftest import FIGURES, recommended, tiny, trained_run


class NobodyKnows(ReferenceAnnotators):
    """Annotators who choose none of the classes for any image."""

    def review(self, gallery):
        votes = super().review(gallery)
        return replace(votes, answer=np.full_like(votes.answer, NONE_OF_THE_ABOVE))


def whole_run(folder, spec, name="tiny", until=STEPS[-1], annotators=ReferenceAnnotators):
    run = Run.start(folder if isinstance(folder, FolderStore) else FolderStore(folder), name, spec, until)
    compute = LocalCompute()
    return run, run_defuse(run, compute, annotators(run, compute))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, finished_run):
    """A copy of the run of one command, and its report."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(finished_run / "runs" / "tiny", folder / "tiny")
    run = Run.open(FolderStore(folder), "tiny")
    return run, parse_report(run.store.read("report.json"), "report.json")


def test_the_whole_method_corrects_the_classifier_on_its_failure_scenarios(finished):
    _, report = finished
    assert report.scenarios.accepted > 0
    assert report.accuracy.defuse.scenario > report.accuracy.before.scenario
    assert report.annotators == "reference models"


@pytest.mark.usefixtures("no_figures")
def test_a_lambda_added_to_a_finished_run_is_tuned_alone_and_chosen_from_with_the_others(
    finished, tmp_path, tiny_spec, monkeypatch
):
    lambdas = (*tiny_spec.correct.lambdas, 3.0)
    shutil.copytree(finished[0].store.folder, tmp_path / "tiny")
    before = FolderStore(tmp_path / "tiny").read("psi.safetensors")
    remade = ("baseline", "sweep", "plain", "plain_1", "plain_2", "evaluation", "failurewatch", "evidence")
    entries = finished[0].manifest()["artefacts"]
    tuned = []

    def counting(tuning, lam, store):
        tuned.extend([lam] if not store.exists(trial_key(lam)) else [])
        yield from run_trial(tuning, lam, store)

    monkeypatch.setattr("defuse_core.trials.run_trial", counting)
    run, _ = whole_run(tmp_path, tiny(correct={"lambdas": lambdas}))
    assert tuned == [3.0, 3.0]  # for the baseline, too
    for sweep in (None, "baseline"):
        assert {row.lam for row in run.load(Sweep, sweep).rows} == set(lambdas)
    assert run.store.read("psi.safetensors") == before
    for name in set(remade) & entries.keys():
        assert run.manifest()["artefacts"][name] != entries[name], name
    assert "3.0" in run.store.read("report.json").decode()
    with pytest.raises(RunMismatchError, match=r"correct\.lambdas"):
        whole_run(tmp_path, tiny(correct={"lambdas": lambdas[1:]}))


def test_an_added_lambda_leaves_a_finished_run_as_it_is_until_it_can_be_tuned(
    finished, tmp_path, tiny_spec, monkeypatch
):
    shutil.copytree(finished[0].store.folder, tmp_path / "tiny")
    run = Run.open(FolderStore(tmp_path), "tiny")
    before = {key: run.store.read(key) for key in run.store.list()}
    more = tiny(correct={"lambdas": (*tiny_spec.correct.lambdas, 3.0)})
    with pytest.raises(ReachedStep):
        whole_run(tmp_path, more, until="draw")

    def no_images(*_):
        raise DataError("data.root: it does not exist")

    monkeypatch.setattr("defuse_core.data.open_splits", no_images)
    with pytest.raises(DataError):
        whole_run(tmp_path, more)
    assert {key: run.store.read(key) for key in run.store.list()} == before


@pytest.mark.parametrize("review", [{"consensus": "crowdlab"}, {"accept": "lower-bound", "more_images": 20}])
def test_a_decision_of_a_person_counts_while_models_are_asked_about_other_images(finished, tmp_path, review):
    shutil.copytree(finished[0].store.folder, tmp_path / "tiny")
    judged, store = finished[0].load(Verdicts), FolderStore(tmp_path)
    store.delete("tiny/verdicts.safetensors")
    doubted = int(np.argmax(judged.misclassified))

    class Meanwhile(LocalCompute):
        def task(self, step, function, *args):
            result = super().task(step, function, *args)
            override_verdict(Run.open(store, "tiny"), doubted, None, author="Ada", reason="no digit")
            return result

    run = Run(store, "tiny", finished[0].spec.with_fields("review", **review), until="review")
    compute = Meanwhile()
    with pytest.raises(ReachedStep):
        run_defuse(run, compute, ReferenceAnnotators(run, compute))
    verdicts = run.load(Verdicts)
    assert [override.author for override in verdicts.overrides] == ["Ada"]
    assert verdicts.labels[doubted] == NONE_OF_THE_ABOVE != judged.labels[doubted]


def test_a_decision_of_a_person_counts_that_was_stored_just_before_the_verdicts(
    finished, tmp_path, monkeypatch
):
    shutil.copytree(finished[0].store.folder, tmp_path / "tiny")
    judged, store = finished[0].load(Verdicts), FolderStore(tmp_path)
    for name in ("verdicts", "corrections"):
        store.delete(f"tiny/{name}.safetensors")
    rows = iter(np.flatnonzero(judged.labels != NONE_OF_THE_ABOVE)[:2])

    def decide(*args, **kwargs):  # whose overrides have been read
        for row in itertools.islice(rows, 1):
            override_verdict(Run.open(store, "tiny"), int(row), None, author="Ada", reason="no digit")
        return decide_verdicts(*args, **kwargs)

    monkeypatch.setattr("defuse_core.pipeline.decide_verdicts", decide)
    run = Run(store, "tiny", finished[0].spec, until="review")
    with pytest.raises(ReachedStep):
        run_defuse(run, LocalCompute(), None)
    assert [override.author for override in run.load(Verdicts).overrides] == ["Ada", "Ada"]
    assert len(run.load(Verdicts).accepted) == len(judged.accepted) - 2
    override = store.within("tiny").read("overrides/0001.json")
    store.write("tiny/overrides/0003.json", override)  # beside corrections that were made without it
    store.write("tiny/corrections.safetensors", finished[0].store.read("corrections.safetensors"))
    run.until = "correct"
    with pytest.raises(ReachedStep):
        run_defuse(run, LocalCompute(), None)
    assert len(run.load(Verdicts).overrides) == 2


def test_a_run_is_not_continued_with_a_classifier_whose_code_has_changed(finished, tmp_path, monkeypatch):
    shutil.copytree(finished[0].store.folder, tmp_path / "tiny")
    run = Run.open(FolderStore(tmp_path), "tiny")
    run.store.delete("evaluation.safetensors")
    monkeypatch.setattr("torch.nn.ReLU", nn.Sigmoid)  # the weights fit as before
    with pytest.raises(
        RunMismatchError,
        match=r"% of the .* images right, and got .* its code, or that of a package, has changed",
    ):
        run_defuse(run, LocalCompute(), None)
    for name in ("corrections", "baseline", "sweep"):
        run.store.delete(f"{name}.safetensors")
    architectures = (run.spec.classifier.architecture,)  # as if its code were the user's
    monkeypatch.setattr("defuse_core.pipeline.CODE_ELSEWHERE", architectures)
    with pytest.raises(
        RunMismatchError, match=r"answers \d+ of \d+ stored images otherwise .* restore that, or run again"
    ):
        run_defuse(run, LocalCompute(), None)
    assert run.load(Corrections) is None


def test_a_run_that_lacks_one_of_its_last_results_is_not_continued_with_other_code(
    finished, tmp_path, monkeypatch
):
    """As of a driver that was killed between them."""
    shutil.copytree(finished[0].store.folder, tmp_path / "tiny")
    run = Run.open(FolderStore(tmp_path), "tiny")
    run.store.delete("failurewatch.safetensors")
    monkeypatch.setattr("torch.nn.ReLU", nn.Sigmoid)  # the weights fit as before
    monkeypatch.setattr("defuse_core.pipeline.CODE_ELSEWHERE", (run.spec.classifier.architecture,))
    with pytest.raises(RunMismatchError, match="stored images otherwise"):
        run_defuse(run, LocalCompute(), None)
    assert run.load(FailureWatch) is None


def test_votes_of_people_that_are_gone_are_not_replaced_beside_the_verdicts_made_from_them(
    finished, tmp_path
):
    shutil.copytree(finished[0].store.folder, tmp_path / "tiny")
    spec = finished[0].spec.with_fields("review", annotators="label-studio")
    run = Run(FolderStore(tmp_path), "tiny", spec, until="review")
    run.store.delete("votes.safetensors")
    compute = LocalCompute()
    people = NobodyKnows(run, compute)  # who answer otherwise now
    with pytest.raises(DamagedError, match=r"expected the votes .*`defuse review reopen tiny --discard .*`"):
        run_defuse(run, compute, people)
    assert run.load(Votes) is None and run.load(Verdicts) is not None
    reopen_vote(run)
    with pytest.raises(ReachedStep):
        run_defuse(run, compute, people)
    assert (run.load(Verdicts).labels == NONE_OF_THE_ABOVE).all()


def test_report_json_has_the_promised_fields(finished):
    run, _ = finished
    found = json.loads(run.store.read("report.json"))
    assert {"before", "baseline", "defuse"} <= found["accuracy"].keys()
    for row in ("before", "baseline", "defuse"):
        assert {"validation", "test", "scenario"} <= found["accuracy"][row].keys()
    assert {"components", "accepted", "purity"} <= found["scenarios"].keys()
    assert {"scenario", "other", "all"} <= found["agreement"].keys()
    assert {"mean", "standard_error"} <= found["agreement"]["all"].keys()
    assert {"lam", "epoch", "test", "scenario"} <= found["tradeoff"][0].keys()
    assert {"codes", "images_with_any", "zero_noise_flip_rate"} <= found["psi"].keys()
    assert {"reconstruction", "kl_per_dimension"} <= found["vae"].keys()
    assert found["annotators"] == "reference models"


def test_the_page_stands_alone(finished):
    run, _ = finished
    page = run.store.read("report.html").decode()
    assert "Reference models" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert 'src="data:' in page


def without_provenance(report_json: bytes) -> dict:
    found = json.loads(report_json)
    found.pop("provenance")
    return found


@pytest.fixture
def trainings(monkeypatch, tiny_models):
    """Train for one epoch, through the store of the run, and go on with `tiny_models`; one entry for each end of it."""
    ended = []

    def train_briefly(spec, *arguments):
        brief = spec.with_fields("classifier", epochs=1).with_fields("vae", epochs=1)
        ended.append(train_side_by_side(brief, *arguments))
        return tiny_models

    monkeypatch.setattr("defuse_core.pipeline.train_side_by_side", train_briefly)
    return ended


@pytest.mark.usefixtures("no_figures")
def test_a_run_stopped_after_each_step_goes_on_to_the_same_report(finished, tmp_path, tiny_spec, trainings):
    for until in STEPS[:-1]:
        with pytest.raises(ReachedStep):
            whole_run(tmp_path, tiny_spec, until=until)
        assert len(trainings) == 1
    run, _ = whole_run(tmp_path, tiny_spec)
    assert len(trainings) == 1
    assert without_provenance(run.store.read("report.json")) == without_provenance(
        finished[0].store.read("report.json")
    )


class StumblingStore(FolderStore):
    """Fails every n-th call, whatever it is."""

    calls = 0
    every = 37  # more calls than any attempt makes before it has stored something new

    def within(self, prefix):
        return StumblingStore(self.folder / prefix)

    def _stumble(self, key):
        StumblingStore.calls += 1
        if StumblingStore.calls % self.every == 0:
            raise StoreError(f"{key}: the bucket is having a bad day")

    def exists(self, key):
        self._stumble(key)
        return super().exists(key)

    def read(self, key):
        self._stumble(key)
        return super().read(key)

    def write(self, key, data, unless=None):
        self._stumble(key)
        super().write(key, data, unless)

    def list(self, prefix=""):
        self._stumble(prefix)
        return super().list(prefix)


@pytest.mark.usefixtures("no_figures", "trainings")
def test_a_store_that_fails_every_so_often_costs_attempts_and_changes_nothing(finished, tmp_path, tiny_spec):
    failures = 0
    while failures < 40:
        try:
            whole_run(StumblingStore(tmp_path), tiny_spec)
            break
        except StoreError:
            failures += 1
    assert 2 < failures < 40
    made = FolderStore(tmp_path / "tiny").read("report.json")
    assert without_provenance(made) == without_provenance(finished[0].store.read("report.json"))


def test_reference_models_are_not_trained_on_other_images_than_the_classifier(tmp_path, tiny_spec):
    images = np.zeros((80, 16, 16), np.uint8)
    for step, pixels in (("draw", images), ("review", images + 1)):
        np.savez(tmp_path / "images.npz", train_images=pixels, train_labels=np.arange(80) % 4)
        data = {"name": "npz", "root": str(tmp_path / "images.npz"), "train_images": None}
        spec = tiny(data=data, classifier={"epochs": 1}, vae={"epochs": 1, "accept": "blind"})
        if step == "draw":
            with pytest.raises(ReachedStep):
                whole_run(tmp_path, spec, until=step)
    with pytest.raises(RunMismatchError, match="the images differ"):
        whole_run(tmp_path, spec)
    assert not (tmp_path / "tiny" / "votes.safetensors").exists()


@pytest.mark.usefixtures("no_figures")
def test_the_recommended_way_corrects_only_what_reference_models_confirm(tmp_path, tiny_models, references):
    trained_run(FolderStore(tmp_path), "tiny", recommended(), tiny_models, references)
    run, report = whole_run(tmp_path, recommended())
    psi, scenarios, fixes = run.load(Psi), run.load(Scenarios), run.load(Corrections)
    assert 0 < psi.total < psi.failing
    assert len(scenarios) == len(scenarios.taus) == len(scenarios.cells) > 0
    assert scenarios.support.min() >= 3
    assert len(scenarios.dropped) > 0
    assert report.scenarios.accepted == len(fixes.kept) > 0
    assert report.accuracy.defuse.scenario > report.accuracy.before.scenario
    references, jury = (run.load(ReferenceSet, name).train_images for name in ("references", "judges"))
    assert references + jury == 300 and jury == pytest.approx(90, abs=5)  # 0.3 of each class, rounded
    assert rewrite_report(run) == report


def test_a_run_that_accepts_nothing_still_ends_in_a_report(tmp_path, tiny_models, monkeypatch):
    judges = {"count": 2, "channels": 8, "epochs": 2, "batch_size": 32, "share": 0.3}
    spec = tiny(judges=judges)
    trained_run(FolderStore(tmp_path), "tiny", spec, tiny_models)
    run, report = whole_run(tmp_path, spec, annotators=NobodyKnows)
    assert report.scenarios.accepted == 0
    assert report.evidence is not None
    monkeypatch.setattr(FIGURES, lambda *_: {})  # they have been drawn
    assert rewrite_report(run) == report
    assert report.accuracy.defuse.test is None and report.accuracy.before.test is not None
    assert report.accuracy.before.scenario is None
    sweep = run.load(Sweep)
    assert sweep is not None
    assert sweep.rows == ()


@pytest.mark.usefixtures("no_figures")
def test_a_finished_run_can_write_its_report_again(finished):
    run, report = finished
    assert rewrite_report(run) == report


def test_a_run_that_is_not_finished_has_no_report_yet(tmp_path, tiny_spec):
    run = Run.start(FolderStore(tmp_path), "new", tiny_spec)
    with pytest.raises(InputError, match="run new is not finished"):
        rewrite_report(run)
