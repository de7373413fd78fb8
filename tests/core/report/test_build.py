"""The figures of a report, against numbers computed by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from sample_components import review_section
from sample_evidence import sample_evidence
from sample_findings import finished_run, report_of, sample_findings, sample_run, sample_watch, with_verdicts

from defuse_core.artifacts import NONE_OF_THE_ABOVE, FailedTrial, MoreImages, Override, Sweep, SweepRow
from defuse_core.config import parse_run_file
from defuse_core.errors import InputError
from defuse_core.report import parse_report, write_report
from defuse_core.report.build import build_report
from defuse_core.report.caveats import worse_judges
from defuse_core.report.schema import FINE_TUNINGS, SweepFailure
from defuse_core.review.verdicts import decide_verdicts
from defuse_core.runs import CONTROL_NAMES, Run
from defuse_core.store import FolderStore
from defuse_core.watch import METHODS


def test_agreement_is_the_mean_over_labelled_images_with_its_standard_error(tmp_path: Path):
    sample = with_verdicts(
        sample_findings(2, 1, images=2),
        labels=np.array([3, NONE_OF_THE_ABOVE]),
        agreement=np.array([[1.0, 0.8], [0.6, np.nan]]),
    )
    agreement = report_of(sample, tmp_path).agreement
    assert agreement.scenario.mean == pytest.approx(0.9)
    assert agreement.scenario.standard_error == pytest.approx(0.1)  # sd 0.1414 over the root of 2
    assert (agreement.other.mean, agreement.other.standard_error, agreement.other.images) == (0.6, None, 1)
    assert agreement.all.mean == pytest.approx(0.8)
    assert agreement.all.standard_error == pytest.approx(0.2 / np.sqrt(3))


def test_one_answer_for_a_whole_scenario_counts_once_in_the_agreement(tmp_path: Path):
    shares = np.array([[1.0, 1.0], [0.6, np.nan], [np.nan, np.nan]])
    sample = with_verdicts(sample_findings(3, 1, images=2), agreement=shares)
    run = sample_run(tmp_path)
    run.spec = run.spec.with_fields("review", annotators="label-studio", form="scenario")
    found = build_report(run, finished_run(*sample)).agreement.all
    assert (found.mean, found.standard_error) == pytest.approx((0.8, 0.2))  # sd 0.28 over the root of 2
    assert found.images == 3


def test_annotators_without_a_counted_answer_are_not_counted(tmp_path: Path):
    found, evaluation = sample_findings(2, 1)
    names = (*found.votes.annotators, "gave discarded answers alone")
    votes = dataclasses.replace(found.votes, annotators=names)
    report = report_of((dataclasses.replace(found, votes=votes), evaluation), tmp_path)
    assert report.votes.annotators == len(names) - 1


def test_purity_is_the_mean_over_accepted_scenarios_alone(tmp_path: Path):
    sample = with_verdicts(
        sample_findings(3, 2),
        labels=np.array([1, 2, NONE_OF_THE_ABOVE]),
        purity=np.array([0.5, 0.8, 0.1]),
    )
    assert report_of(sample, tmp_path).scenarios.purity == pytest.approx(0.65)


def test_decisions_of_people_name_the_class(tmp_path: Path):
    decisions = (
        Override(0, 3, "Ada", "clear", "2026-01-01"),
        Override(1, None, "Ada", "blurred", "2026-01-02"),
    )
    report = report_of(with_verdicts(sample_findings(2, 1), overrides=decisions), tmp_path)
    assert [(row.scenario, row.label, row.author) for row in report.overrides] == [
        (0, "3", "Ada"),
        (1, None, "Ada"),
    ]
    assert parse_report(report.model_dump_json(), "report.json") == report


def with_source_errors(support: list[int], error: list[float]):
    """Findings whose first scenarios come from so many source images, of which so large a share is misclassified."""
    found, evaluation = sample_findings(len(support), 1)
    scenarios = dataclasses.replace(
        found.scenarios, support=np.array(support), source_error=np.array(error, np.float64)
    )
    return dataclasses.replace(found, scenarios=scenarios), evaluation


def test_a_scenario_is_seen_in_training_images_if_its_sources_are_misclassified_with_certainty(
    tmp_path: Path,
):
    sample = with_source_errors([30, 30, 5, 9], [0.5, 0.3, 0.4, 0.0])
    rows = report_of(sample, tmp_path).scenarios.list
    assert [row.seen_in_training_images for row in rows] == [True, False, False, False]
    assert [row.source_error for row in rows] == [0.5, 0.3, 0.4, 0.0]
    assert [row.source_images for row in rows] == [30, 30, 5, 9]


@pytest.mark.usefixtures("no_figures")
def test_the_page_says_how_many_source_images_of_a_scenario_are_misclassified(tmp_path: Path):
    run = sample_run(tmp_path)
    write_report(run, finished_run(*with_source_errors([30, 12], [0.5, 0.25])))
    page = run.store.read("report.html").decode().replace("\xa0", " ")
    assert "from 30 training images, of which the classifier gets <b>50 %</b> wrong" in page


@pytest.mark.usefixtures("no_figures")
def test_frames_of_a_single_sign_do_not_make_a_scenario_seen_in_training_images(tmp_path: Path):
    found, evaluation = with_source_errors([30, 30], [1.0, 1.0])
    scenarios = dataclasses.replace(
        found.scenarios, source_tracks=np.array([1, 10]), wrong_tracks=np.array([1.0, 10.0])
    )
    run, found = sample_run(tmp_path), dataclasses.replace(found, scenarios=scenarios)
    rows = write_report(run, finished_run(found, evaluation)).scenarios.list
    assert [row.source_tracks for row in rows] == [1, 10]
    assert [row.seen_in_training_images for row in rows] == [False, True]
    page = run.store.read("report.html").decode().replace("\xa0", " ")
    assert "from 30 training images of 1 track, of which the classifier gets <b>100 %</b> wrong" in page


def test_the_trade_off_has_each_lambda_at_its_chosen_epoch(tmp_path: Path):
    found, evaluation = sample_findings(2, 1)
    rows = tuple(
        SweepRow(lam, epoch, 0.0, train=train, validation=None, test=test, tune=1.0, scenario=s)
        for lam, epoch, train, test, s in (
            (0.1, 1, 0.90, 0.81, 0.51),
            (0.1, 2, 0.95, 0.82, 0.52),
            (10.0, 1, 0.97, 0.83, 0.53),
            (10.0, 2, 0.96, 0.84, 0.54),
        )
    )
    found = dataclasses.replace(found, sweep=Sweep(rows, rows[2], {}, ()))
    spec = parse_run_file(
        {"data": {"name": "digits", "channels": 1}, "correct": {"schedule": "constant"}}, "sample"
    )
    tradeoff = build_report(
        Run(FolderStore(tmp_path), "sample", spec), finished_run(found, evaluation)
    ).tradeoff
    assert [(r.lam, r.epoch, r.test, r.scenario, r.chosen) for r in tradeoff] == [
        (0.1, 2, 0.82, 0.52, False),
        (10.0, 1, 0.83, 0.53, True),
    ]
    assert tradeoff[0].validation is None


def test_a_scenario_is_mistaken_for_the_most_frequent_answer_but_its_label(tmp_path: Path):
    sample = sample_findings(1, 1, images=6)
    sample[0].gallery.predicted[:] = [[4, 4, 4, 7, 9, 9]]
    none = NONE_OF_THE_ABOVE  # three images have another label than the scenario's and are answered with it
    sample = with_verdicts(sample, labels=np.array([4]), image_labels=np.array([[3, 3, 3, none, 4, 4]]))
    report = report_of(sample, tmp_path)
    assert report.scenarios.list[0].mistaken_for == "9"
    assert report.votes.misclassified == 1


def test_a_rejected_component_is_mistaken_for_nothing(tmp_path: Path):
    assert report_of(sample_findings(1, 0), tmp_path).scenarios.list[0].mistaken_for is None


def test_counts_of_identification_become_shares(tmp_path: Path):
    found, evaluation = sample_findings()
    counted = dataclasses.replace(found.psi, wrong=9, wrong_decoded=7, wrong_kept=4)
    psi = report_of((dataclasses.replace(found, psi=counted), evaluation), tmp_path).psi
    assert (psi.codes, psi.images_with_any, psi.zero_noise_flip_rate) == (516, 0.12, 0.07)
    assert (psi.wrong, psi.wrong_decoded, psi.wrong_kept) == (9, 7, 4)


def test_images_drawn_in_doubt_are_counted_apart_from_the_reviewed_ones(tmp_path: Path):
    (found, evaluation), section = sample_findings(2, 2), review_section(max_false=0.05)
    more = MoreImages(np.array([40, 0]), np.array([38, 0]), np.array([37, 0]))
    verdicts = decide_verdicts(section, found.gallery, found.votes, more=more)
    report = report_of((dataclasses.replace(found, verdicts=verdicts), evaluation), tmp_path)
    plain = report_of((found, evaluation), tmp_path)
    assert report.votes.more_images == 38
    assert report.votes.model_copy(update={"more_images": 0}) == plain.votes
    assert "(38 of them drawn in doubt)" in report.scenarios.list[0].reason
    assert "drawn in doubt" not in report.scenarios.list[1].reason


def with_failing_draws(failing: int, **identify: object):
    """A report of the sample's 516 codes as those kept of so many failing draws, and its page."""

    def write(folder: Path):
        found, evaluation = sample_findings(3, 2)
        fixes = dataclasses.replace(found.fixes, kept=np.array([0.5, 1.0]))
        psi = dataclasses.replace(found.psi, failing=failing)
        run = sample_run(folder)
        run.spec = run.spec.with_fields("identify", **identify)
        report = write_report(run, finished_run(dataclasses.replace(found, psi=psi, fixes=fixes), evaluation))
        return report, " ".join(run.store.read("report.html").decode().replace("\xa0", " ").split())

    return write


@pytest.mark.usefixtures("no_figures")
def test_the_report_says_how_many_failing_draws_the_screen_keeps(tmp_path: Path):
    report, page = with_failing_draws(2064, max_per_image=7)(tmp_path)
    assert (report.psi.failing_draws, report.psi.kept_share, report.psi.screened) == (2064, 0.25, True)
    assert "Of 2,064 failing draws 516 are kept" in page
    assert ", at most 7 an image. The screen (identify.screen) keeps a draw only if" in page


@pytest.mark.usefixtures("no_figures")
def test_the_kept_share_is_left_out_where_nothing_fails(tmp_path: Path):
    report, page = with_failing_draws(0)(tmp_path)
    assert (report.psi.failing_draws, report.psi.kept_share) == (0, None)
    assert "are kept" not in page and "kept in Ψ" not in page


@pytest.mark.usefixtures("no_figures")
def test_the_report_says_on_how_many_draws_the_reference_models_agree_with_the_label(tmp_path: Path):
    report, page = with_failing_draws(0)(tmp_path)
    assert report.scenarios.tuning_agreement == 0.75
    assert [row.tuning_agreement for row in report.scenarios.list] == [0.5, 1.0, None]
    assert "reference models agree on 50 % of the draws to tune on" in page
    assert report_of(sample_findings(3, 2), tmp_path).scenarios.tuning_agreement is None


@pytest.mark.usefixtures("no_figures")
def test_the_report_says_how_many_accepted_scenarios_are_expected_to_be_false(tmp_path: Path):
    run, sample = sample_run(tmp_path), sample_findings(3, 2)
    report = write_report(run, finished_run(*with_verdicts(sample, false_share=0.031)))
    assert report.scenarios.expected_false_share == 0.031
    page = " ".join(run.store.read("report.html").decode().replace("\xa0", " ").split())
    told = 'Of the scenarios that the vote accepts, <b class="unbroken">3.1 %</b> are expected to be false, if the'
    assert f"{told} labels are right: on" in page
    assert report_of(with_verdicts(sample, false_share=0.0), tmp_path).scenarios.expected_false_share is None


@pytest.mark.usefixtures("no_figures")
def test_the_report_says_how_many_accepted_scenarios_the_judges_see_as_false(tmp_path: Path):
    run, sample = sample_run(tmp_path), with_verdicts(sample_findings(3, 2), false_share=0.031)
    judged = sample_evidence(np.array([[0.1, 0.9, 0.9, 1.0], [0.5, 0.9, 0.9, 1.0]]))
    assert write_report(run, finished_run(*sample, judged)).scenarios.false_by_judges == 1
    page = run.store.read("report.html").decode().replace("\xa0", " ")
    assert '<b class="unbroken">1 of 2</b>.' in page
    assert report_of(sample, tmp_path).scenarios.false_by_judges is None
    some = sample_evidence(np.array([[0.1, 0.9, 0.9, 1.0], [np.nan] * 4]))
    assert write_report(run, finished_run(*sample, some)).scenarios.false_by_judges == 0
    page = run.store.read("report.html").decode().replace("\xa0", " ")
    assert '<b class="unbroken">0 of 1</b>.' in page
    none = sample_evidence(np.full((2, 4), np.nan))
    assert build_report(run, finished_run(*sample, none)).scenarios.false_by_judges is None
    decided = with_verdicts(sample, overrides=(Override(1, 3, "ana", "seen", "2026-01-31T12:00:00Z"),))
    write_report(run, finished_run(*decided, judged))
    page = run.store.read("report.html").decode().replace("\xa0", " ")
    assert "1 of 2</b> accepted ones, those that a person decided on included." in page
    write_report(run, finished_run(*sample, sample_evidence(judged.scenario_own_label, judges=0.4)))
    assert (
        "By the judges' labels of the held-out images this holds"
        not in run.store.read("report.html").decode()
    )


def test_collapsed_dimensions_are_counted(tmp_path: Path):
    vae = report_of(sample_findings(), tmp_path).vae
    assert vae.collapsed == 2
    assert len(vae.kl_per_dimension) == 10


def test_a_figure_that_does_not_exist_is_null(tmp_path: Path):
    found, evaluation = sample_findings(2, 0)
    evaluation = dataclasses.replace(evaluation, per_class_images=np.zeros(10, np.int64))
    tree = json.loads(report_of((found, evaluation), tmp_path).model_dump_json(by_alias=True))
    assert tree["accuracy"]["baseline"] == {"validation": None, "test": None, "scenario": None}
    assert tree["scenarios"]["purity"] is None
    assert tree["agreement"]["scenario"] == {"mean": None, "standard_error": None, "images": 0}
    assert (tree["tradeoff"], tree["chosen"], tree["per_class"]) == ([], None, [])


@pytest.mark.usefixtures("no_figures")
def test_report_json_has_its_documented_fields(tmp_path: Path):
    run = sample_run(tmp_path)
    write_report(run, finished_run(*sample_findings(3, 2, images=3), watch=sample_watch()))
    tree = json.loads(run.store.read("report.json"))
    assert tree["version"] == 13
    assert tree["annotators"] == "reference models"
    assert set(tree["accuracy"]["defuse"]) == {"validation", "test", "scenario"}
    figures = {"components", "accepted", "purity", "own_labels", "expected_false_share", "tuning_agreement"}
    figures |= {"false_by_judges", "undecided", "unreviewed_images"}
    assert figures | {"list"} == set(tree["scenarios"])
    assert {"lam", "epoch", "test", "scenario"} <= set(tree["tradeoff"][0])
    assert {"codes", "images_with_any", "zero_noise_flip_rate"} <= set(tree["psi"])
    assert {"reconstruction", "kl_per_dimension", "reconstruction_flips"} <= set(tree["vae"])
    assert {"class", "before", "baseline", "defuse"} <= set(tree["per_class"][0])
    assert {"labelled", "ties", "no_class_chosen"} <= set(tree["votes"])
    assert {"device", "artefacts", "versions"} <= set(tree["provenance"])
    assert {"method", "verdict", "threshold", "validation", "test", "methods"} == set(tree["watch"])
    assert {"auroc", "average_precision", "precision", "recall"} <= set(tree["watch"]["test"])
    assert [row["method"] for row in tree["watch"]["methods"]] == ["max-softmax"]


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"version": 6}, "use the version of Defuse that wrote it"),
        ({"version": None}, "use the version of Defuse that wrote it"),
        ({"making": {}}, "`defuse report RUN`"),
    ],
)
def test_a_report_of_another_version_is_refused_with_what_to_do(
    tmp_path: Path, change: dict[str, object], remedy: str
):
    text = report_of(sample_findings(2, 1), tmp_path).model_dump_json(by_alias=True)
    assert parse_report(text, "report.json").scenarios.accepted == 1
    words = rf"^a/report\.json: expected a report of version 13, .*{remedy}"
    with pytest.raises(InputError, match=words):
        parse_report(json.dumps(json.loads(text) | change), "a/report.json")


@pytest.mark.parametrize(("watch", "method"), [(True, METHODS[-1]), (False, METHODS[0])])
def test_the_report_describes_the_failure_detector_that_is_served(tmp_path: Path, watch: bool, method: str):
    found = sample_watch(separation=1.5)
    better = sample_watch(separation=6.0).methods[0]
    encoder = dataclasses.replace(better, detector=dataclasses.replace(better.detector, method=METHODS[-1]))
    run = sample_run(tmp_path)
    run.spec = run.spec.with_fields("serve", watch=watch)
    both = dataclasses.replace(found, methods=(*found.methods, encoder))
    report = build_report(run, finished_run(*sample_findings(2, 1), watch=both))
    assert report.watch is not None and report.watch.method == method


def test_equal_findings_give_equal_files_except_for_how_they_were_made(tmp_path: Path):
    first, second = sample_run(tmp_path / "first"), sample_run(tmp_path / "second")
    entry = {"step": "train", "made": "2025-01-01T00:00:00Z", "seconds": 1.5, "bytes": 10}
    second.store.write("manifest.json", json.dumps({"artefacts": {"models": entry}}).encode())
    for run in (first, second):
        write_report(run, finished_run(*sample_findings(2, 1, images=2)))
    trees = [json.loads(run.store.read("report.json")) for run in (first, second)]
    assert trees[0].pop("provenance") != trees[1].pop("provenance")
    assert trees[0] == trees[1]


def test_reviewed_images_are_also_judged_each_by_its_own_label(tmp_path: Path):
    found, evaluation = sample_findings(2, 1, images=4)
    none = NONE_OF_THE_ABOVE
    found.gallery.predicted[:] = [[1, 1, 2, 1], [9, 9, 9, 9]]
    after = np.array([[4, 4, 4, 4], [9, 9, 9, 9]])
    own = np.array([[4, 4, 2, none], [9, 9, 9, 9]])
    sample = with_verdicts(
        (found, dataclasses.replace(evaluation, gallery_after=after)),
        labels=np.array([4, none]),
        image_labels=own,
    )
    judged = report_of(sample, tmp_path).scenarios.own_labels
    assert (judged.images, judged.before, judged.defuse) == (3, pytest.approx(1 / 3), pytest.approx(2 / 3))


def test_a_failed_control_of_the_evidence_is_told_with_its_cause(tmp_path: Path):
    run = sample_run(tmp_path)
    failed = Sweep((), None, {}, (FailedTrial(0.0, "diverged"),))
    run.once("report", Sweep, lambda: failed, "plain_1")
    (told,) = build_report(run, finished_run(*sample_findings(3, 2))).failed_trials
    assert (told.sweep, told.lam, told.cause) == ("plain_1", 0.0, "diverged")


def test_each_fine_tuning_that_only_evidence_needs_has_a_text():
    assert {*FINE_TUNINGS} == {*CONTROL_NAMES}
    assert SweepFailure(sweep="plain_1", lam=0.0, cause="").fine_tuning == "plain further training 2"
    assert SweepFailure(sweep="baseline", lam=1.0, cause="").fine_tuning == "baseline"


def test_judges_that_never_recognise_a_rare_class_are_worse_although_they_are_right_as_often(tmp_path: Path):
    right, judges = np.full(10, 0.98), np.full((3, 10), 0.99)
    judges[:, 7] = 0.0
    found, evaluation = sample_findings()
    counts = {"test": np.array([10_000] * 7 + [40] + [10_000] * 2)}
    models = dataclasses.replace(found.models, class_accuracy={"test": right}, class_images=counts)
    evidence = sample_evidence(np.array([[0.1, 0.6, 0.7, 0.9]] * 2), judges=0.989)
    evidence = dataclasses.replace(evidence, judges_by_class=judges)
    found = dataclasses.replace(found, models=models)
    report = build_report(sample_run(tmp_path), finished_run(found, evaluation, evidence))
    assert report.evidence is not None and report.evidence.judges.worse
    assert (
        "the best of 3 judges is right on 89.1 % of the test images on average over the classes, and the classifier on "
        "98.0 % (of 7 on 0.0 %, and the classifier on 98.0 %). Where they differ"
    ) in (worse_judges(report) or "")
