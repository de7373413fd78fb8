"""Evidence: shares with intervals, folds, and what judges find on constructed and on real runs."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import tracemalloc

import krippendorff
import numpy as np
import pytest
from rich.console import Console
from scipy.stats import binomtest

from defuse_core.artifacts import Anchors, Corrections, Sweep, Votes
from defuse_core.distill.draws import units_of
from defuse_core.evaluation.controls import Controls, control_spec, folds
from defuse_core.evaluation.evidence import Evidence, _at_fault, _known_share, gather_evidence
from defuse_core.intervals import is_better, is_testable, pairs_of
from defuse_core.local import LocalCompute
from defuse_core.pipeline import load_finished, run_defuse
from defuse_core.protocols import silent
from defuse_core.report import parse_report, write_report
from defuse_core.report.build_evidence import evidence_figures
from defuse_core.report.html import ScenarioCard, render_page, render_scenarios, scenario_card
from defuse_core.review.verdicts import krippendorff_alpha
from defuse_core.runs import PLAIN_NAMES, Run
from defuse_core.store import FolderStore
from defuse_core.training.reference_models import ReferenceAnnotators
from services.cli.tables import print_report
from tests.sample_findings import finished_run


def corrections(count: int) -> Corrections:
    codes = np.arange(count, dtype=np.float32)[:, None, None] * np.ones((1, 3, 2), np.float32)
    return Corrections(np.arange(count) + 10, np.arange(count) % 4, codes, codes)


def votes(answers: list[list[int | None]]) -> Votes:
    """Return votes from a table of annotators x images; None is no answer."""
    rows = [(image, person, answer) for person, row in enumerate(answers) for image, answer in enumerate(row)]
    kept = np.array([row for row in rows if row[2] is not None], np.int64).reshape(-1, 3)
    scenario = np.zeros(len(kept), np.int64)
    names = tuple(f"annotator {person}" for person in range(len(answers)))
    return Votes(scenario, kept[:, 0], kept[:, 1], kept[:, 2], np.zeros(len(kept)), names, "people", {})


def test_nothing_is_left_out_of_one_scenario_or_where_nothing_was_corrected(finished) -> None:
    corrected = finished[0].load(Sweep)
    assert folds(corrections(1), corrected) == ()
    assert folds(corrections(2), corrected) == (0, 1)
    assert folds(corrections(2), dataclasses.replace(corrected, chosen=None, weights={})) == ()


def test_controls_are_the_chosen_fine_tuning_with_its_lambda_or_zero(finished) -> None:
    run, _ = finished
    sweep = run.load(Sweep)
    chosen = sweep.chosen
    plain = control_spec(run.spec, 0.0, sweep).correct
    assert (plain.lambdas, plain.epochs, plain.choose_by) == ((0.0,), chosen.epoch, "last")
    for name in PLAIN_NAMES:
        assert {row.lam for row in run.require(Sweep, name).rows} == {0.0}
    for name in ("left_out_0", "left_out_1"):
        assert {row.lam for row in run.require(Sweep, name).rows} == {chosen.lam} != {0.0}


def test_krippendorffs_alpha_equals_the_published_example() -> None:
    # Krippendorff (2011), "Computing Krippendorff's alpha-reliability", nominal data with missing values: 0.691
    table = [
        [None, None, None, None, None, 3, 4, 1, 2, 1, 1, 3, 3, None, 3],
        [1, None, 2, 1, 3, 3, 4, 3, None, None, None, None, None, None, None],
        [None, None, 2, 1, 3, 4, 4, None, 2, 1, 1, 3, 3, None, 4],
    ]
    given = votes(table)
    assert krippendorff_alpha(given, 15) == pytest.approx(0.691, abs=5e-4)
    of_three = dataclasses.replace(given, scenario=given.image // 5, image=given.image % 5)
    assert krippendorff_alpha(of_three, 5) == krippendorff_alpha(given, 15)


def test_alpha_is_undefined_for_one_annotator_or_one_answer() -> None:
    assert np.isnan(krippendorff_alpha(votes([[1, 2, 3]]), 3))
    assert np.isnan(krippendorff_alpha(votes([[1, 1], [1, 1]]), 2))


def test_alpha_is_the_packages_to_the_last_bit() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth = rng.integers(9, size=40)
        table = np.where(rng.random((4, 40)) < 0.6, truth, rng.integers(-1, 9, (4, 40))).astype(object)
        table[rng.random((4, 40)) < 0.3] = None
        given = np.array(table, np.float64)
        expected = krippendorff.alpha(given, level_of_measurement="nominal")
        assert krippendorff_alpha(votes(table.tolist()), 40) == expected


def test_alpha_takes_little_memory_for_many_images_and_answers() -> None:
    given = votes(np.random.default_rng(0).integers(800, size=(3, 1000)).tolist())
    tracemalloc.start()
    found = krippendorff_alpha(given, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert abs(found) < 0.05 and peak < 200e6


def confirmed(defuse: np.ndarray, plain: np.ndarray, units: np.ndarray) -> bool:
    pairs = pairs_of(defuse, plain, units)
    return bool(is_better(pairs[None, None])[0])


def test_a_scenario_is_confirmed_only_where_more_images_are_right_than_after_plain_training() -> None:
    plain, units = np.zeros(40), np.arange(40)
    assert confirmed(np.ones(40), plain, units)
    assert not confirmed(np.ones(40), np.ones(40), units)  # wrong before, and right after either
    assert not confirmed(np.r_[np.ones(2), np.zeros(38)], plain, units)
    assert not confirmed(np.full(40, np.nan), plain, units)
    half = np.r_[np.ones(20), np.zeros(20)]
    assert not confirmed(half, 1 - half, units)


def test_pictures_of_one_photograph_or_track_confirm_a_scenario_no_more_than_one_picture() -> None:
    plain, defuse = np.zeros(40), np.ones(40)
    assert not confirmed(defuse, plain, np.arange(40) % 2)
    assert confirmed(defuse, plain, np.arange(40) % 8)
    equal_on_the_whole = pairs_of(np.r_[1.0, 0, 0], np.r_[0.0, 1, 0], np.zeros(3))
    assert equal_on_the_whole.tolist() == [1, 0, 0]
    assert is_testable(np.array([1, 4, 5])).tolist() == [False, False, True]


def test_pictures_of_images_of_one_track_have_one_unit() -> None:
    alone = Anchors(np.zeros((4, 1, 2, 2), np.float32), np.array([1, 2, 3, 4]), np.zeros(4, np.bool_))
    anchor = np.array([[0, 1, 3], [2, 2, 0]])
    in_tracks = dataclasses.replace(alone, track=np.array([7, 7, 8, 8]))
    assert units_of(in_tracks, anchor, 6).tolist() == [7, 7, 8, 8, 8, 7]
    assert units_of(alone, anchor, 6).tolist() == [1, 2, 4, 3, 3, 1]
    assert units_of(None, None, 3).tolist() == [0, 1, 2]  # plain decoding


def test_the_pairs_of_two_classifiers_count_test_images_of_one_track_once() -> None:
    before, tracks = np.ones(300), np.repeat(np.arange(10), 30)
    after = np.where(tracks == 3, 0.0, before)
    assert pairs_of(after, before, tracks).tolist() == [10, 0, 1]
    assert pairs_of(after, before, np.arange(300)).tolist() == [300, 0, 30]
    assert pairs_of(np.full(300, np.nan), before, tracks).tolist() == [0, 0, 0]


def test_an_interval_counts_pictures_of_one_image_once() -> None:
    hits = np.r_[np.ones(96), np.zeros(32)]
    independent, one = _known_share(hits, np.arange(128)), _known_share(hits, np.zeros(128))
    assert independent[0] == one[0] == 0.75
    assert one[1] < 0.3 < independent[1] and independent[2] < 0.9 < one[2]


def test_an_interval_leaves_out_images_without_a_label() -> None:
    share, low, high = _known_share(np.array([1.0, 1.0, np.nan, 0.0]), np.arange(4))
    assert share == pytest.approx(2 / 3)
    assert 0 < low < share < high < 1
    assert np.isnan(_known_share(np.full(4, np.nan), np.arange(4))).all()


@pytest.mark.parametrize(
    ("purity", "before", "culprit"),
    [
        (0.9, 0.1, "classifier"),
        (0.5, 0.1, "unclear"),
        (0.49, 0.1, "β-VAE"),
        (1.0, 0.5, "unclear"),
        (0.0, np.nan, "unclear"),  # the judges label none
    ],
)
def test_the_classifier_is_at_fault_only_where_it_fails_on_pictures_that_show_the_label(
    purity: float, before: float, culprit: str
) -> None:
    assert _at_fault(0.5, purity, before) == culprit


@pytest.fixture(scope="module")
def finished(tmp_path_factory, judged_run, no_figures_in_module):
    """A finished run of the recommended way, and its report."""
    folder = tmp_path_factory.mktemp("evidence")
    shutil.copytree(judged_run.store.folder, folder / "a")
    run = Run.open(FolderStore(folder), "a")
    return run, parse_report(run.store.read("report.json"), "report.json")


def chance_of_as_many(pairs: tuple[int, int]) -> float:
    """Return P(X >= the first) of X ~ Binomial(sum, 1/2)."""
    return float(binomtest(pairs[0], sum(pairs), alternative="greater").pvalue) if sum(pairs) else 1.0


def test_a_run_reports_what_its_judges_find(finished) -> None:
    run, report = finished
    stored = json.loads(run.store.read("report.json"))["evidence"]
    assert stored["judges"]["count"] == run.spec.judges.count
    for figure in ("before", "baseline", "plain", "defuse"):
        share = stored["own_label"][figure]
        assert share["low"] <= share["value"] <= share["high"]
    # failures of the classifier before, by definition
    assert stored["real_failures"]["before"] == {"value": 0.0, "low": None, "high": None}
    same = [
        row.evidence for row in report.scenarios.list if row.accepted and row.evidence.left_out is not None
    ]
    assert stored["left_out"]["plain"]["value"] == pytest.approx(np.mean([row.plain for row in same]))
    against = stored["against_plain"]
    for name, pairs in (("defuse", against["scenarios"]), ("left_out", against["left_out"])):
        counts = [
            tuple(
                sum(sign * (getattr(row, name) - row.plain_each[k]) > 0 for row in same) for sign in (1, -1)
            )
            for k in range(len(PLAIN_NAMES))
        ]
        assert (pairs["better"], pairs["worse"]) == max(counts, key=chance_of_as_many)
    lost, gained = against["real_failures"]["worse"], against["real_failures"]["better"]
    failures = report.evidence.real_failures
    changes = [
        (failures.defuse.value - each) * report.evidence.real_failure_images for each in failures.plain_each
    ]
    assert gained - lost in [pytest.approx(change) for change in changes]
    assert {row.evidence is None for row in report.scenarios.list if row.accepted} == {False}


def test_scenarios_left_out_are_told_apart_by_whether_their_confusion_was_tuned_on(finished) -> None:
    run, report = finished
    known, new = report.evidence.left_out_known_confusion, report.evidence.left_out_new_confusion
    found = [row.evidence for row in report.scenarios.list if row.accepted]
    left_out = [row for row in found if row.left_out is not None]  # the judges agree on some image
    assert known.count + new.count == len(left_out)
    for figure in ("before", "plain", "defuse"):
        total = sum(each.count * (getattr(each, figure) or 0) for each in (known, new))
        expected = [row.left_out if figure == "defuse" else getattr(row, figure) for row in left_out]
        assert total == pytest.approx(sum(expected))
    page = " ".join(run.store.read("report.html").decode().split())
    for name, each in (("a known", known), ("a new", new)):
        assert (f"<td>{each.count} of these, with {name} confusion</td>" in page) == (each.count > 0)
        if each.count:
            assert each.against_plain.better + each.against_plain.worse <= each.count
        else:
            assert (each.defuse, each.against_plain) == (None, None)


def test_the_screen_is_measured_on_failing_draws_from_test_images(finished) -> None:
    run, report = finished
    found = report.evidence
    recall = found.screen_recall
    assert 0 < recall.low < recall.value <= recall.high <= 1
    assert (recall.value < recall.high < 1) == (recall.value < 1)  # on some processors all are seen
    kept = found.screen_recall.value * found.real_failure_images
    assert kept == pytest.approx(round(kept))
    page = " ".join(run.store.read("report.html").decode().split())
    assert page.count("(identify.screen)") == 1  # said once
    begin = "It is strict: of" if recall.high < 0.5 else "Of"
    assert f"{begin} the failing draws from test images, in all of which the judges see the class" in page
    assert (
        f"<td>failing draws from {found.real_failure_images} test image" in page
        and "real failure" not in page
    )
    console = Console(width=100, file=io.StringIO())
    print_report(report, console)
    assert f"{found.real_failure_images} failing test draws" in console.file.getvalue()


def test_pairs_are_of_each_plain_training(finished) -> None:
    made = finished[0].load(Evidence)
    assert made.pairs.shape == (len(PLAIN_NAMES), len(made.names), 3)
    assert made.real_failure_pairs.shape == (len(PLAIN_NAMES), 3)


def test_pictures_that_the_judges_disagree_on_do_not_show_the_scenarios_label(finished) -> None:
    run, _ = finished
    found = load_finished(run).found
    first = found.judges.models[0]
    contrary = {  # the same judge, which answers the next class: both never agree
        name: np.roll(array, 1, axis=0) if name.startswith("head.1") else array
        for name, array in first.items()
    }
    found = dataclasses.replace(found, judges=dataclasses.replace(found.judges, models=(first, contrary)))
    made = gather_evidence(run.spec, found, Controls((run.load(Sweep, "plain"),), ()), progress=silent)
    assert made.labelled == 0
    assert not made.scenario_purity.any() and made.purity[0] == 0
    assert set(made.at_fault) == {"unclear"}


def test_the_page_says_where_too_few_real_errors_tell_whether_a_scenario_is_real(finished, tmp_path) -> None:
    run, _ = finished
    found, evaluation, evidence, watch = load_finished(run)
    unknown = np.zeros(len(evidence.names), np.bool_)
    evidence = dataclasses.replace(
        evidence, real=dataclasses.replace(evidence.real, seen=unknown, testable=unknown)
    )
    other = Run.start(FolderStore(tmp_path), "a", run.spec)
    report = write_report(other, finished_run(found, evaluation, evidence, watch))
    accepted = [row for row in report.scenarios.list if row.accepted]
    assert {row.evidence.seen_in_real_data for row in accepted} == {None}
    page = " ".join(other.store.read("report.html").decode().split())
    generated = sum(not row.seen_in_training_images for row in accepted)
    seen = len(accepted) - generated
    told = f"({f'{seen} also' if seen else 'none'} seen in real images"
    told += f", {generated} where these cannot tell)." if generated else ")."
    assert f" failure scenarios {told} Accuracy" in report.headline
    assert page.count("real images cannot tell") == generated and "not seen in real images" not in page


def test_the_page_holds_the_error_of_the_nearest_real_images_against_that_of_their_class(finished, tmp_path):
    run, _ = finished
    found, evaluation, evidence, watch = load_finished(run)
    scenarios = len(evidence.names)
    real = dataclasses.replace(
        evidence.real,
        error=np.full(scenarios, 0.57),
        error_of_label=np.full(scenarios, 0.33),
        seen=np.arange(scenarios) > 0,
        testable=np.ones(scenarios, np.bool_),
    )
    right = np.zeros(len(found.scenarios))
    unseen = dataclasses.replace(found, scenarios=dataclasses.replace(found.scenarios, source_error=right))
    other = Run.start(FolderStore(tmp_path), "a", run.spec)
    write_report(other, finished_run(unseen, evaluation, dataclasses.replace(evidence, real=real), watch))
    page = " ".join(other.store.read("report.html").decode().replace("\xa0", " ").split())
    nearest = "error 57 % on the nearest real images,"
    unshown = f"not seen in real images: {nearest} not significantly more than on its class (33 %)"
    assert page.count(unshown) == 1
    assert page.count(f"seen in real images: {nearest} 33 % on its class") == scenarios - 1


def test_a_notebook_does_not_call_a_correction_that_is_not_confirmed_equal_to_plain_training(
    finished, tmp_path
):
    found, evaluation, evidence, watch = load_finished(finished[0])
    report = write_report(
        Run.start(FolderStore(tmp_path), "a", finished[0].spec),
        finished_run(found, evaluation, evidence, watch),
    )
    row = next(row for row in report.scenarios.list if row.accepted)
    unconfirmed = row.model_copy(
        update={"evidence": row.evidence.model_copy(update={"confirmed": False, "worse": False})}
    )
    shown = render_scenarios([ScenarioCard(unconfirmed, (), ())], found.models.classes)
    told = "not confirmed by the judges: it may be no better than plain further training, or"
    assert told in " ".join(shown.replace("\xa0", " ").split())


NOTHING_CHOSEN = Sweep((), None, {}, ())


def test_without_test_images_reference_models_are_measured_on_validation_images_as_the_judges(finished):
    found, evidence = load_finished(finished[0]).found, finished[0].load(Evidence)
    right = {name: share for name, share in found.models.accuracy.items() if name != "test"}
    untested = dataclasses.replace(found, models=dataclasses.replace(found.models, accuracy=right))
    measured = evidence_figures(untested, evidence).judges.reference_models
    assert measured == tuple(found.references.validation.tolist())


def test_a_classifier_that_was_not_made_has_no_figures(finished) -> None:
    run, _ = finished
    found = dataclasses.replace(load_finished(run).found, baseline=NOTHING_CHOSEN)
    made = gather_evidence(run.spec, found, Controls((NOTHING_CHOSEN,), ()), progress=silent)
    tables = (made.own_label, made.one_label, made.real_failures, made.scenario_own_label.T)
    for before, baseline, plain, defuse in tables:
        assert np.isfinite(before).any() and np.isfinite(defuse).any()
        assert np.isnan(baseline).all() and np.isnan(plain).all()
    figures = json.loads(evidence_figures(found, made).model_dump_json())
    assert figures["one_label"]["plain"] == {"value": None, "low": None, "high": None}
    assert figures["plain_against_before"] is None and figures["defuse_against_before"] is not None


def test_where_nothing_was_corrected_the_classifier_stays_and_is_not_tested_against_itself(finished) -> None:
    run, _ = finished
    found = dataclasses.replace(load_finished(run).found, sweep=NOTHING_CHOSEN)
    made = gather_evidence(run.spec, found, Controls((run.load(Sweep, "plain"),), ()), progress=silent)
    assert np.isfinite(made.own_label[0]).all()
    assert made.own_label[3].tolist() == made.own_label[0].tolist()
    assert made.test_pairs_with_before[0, 0] > 0 and made.test_pairs_with_before[1].tolist() == [0, 0, 0]
    assert made.test_pairs.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (1, "1 judge, an independent model that took no part in this run, labels the held-out images,"),
        (3, "3 judges, independent models that took no part in this run, label the held-out images,"),
    ],
)
def test_the_page_counts_the_judges(finished, count: int, words: str) -> None:
    run, report = finished
    judges = report.evidence.judges.model_copy(update={"count": count})
    counted = report.model_copy(update={"evidence": report.evidence.model_copy(update={"judges": judges})})
    found, evaluation, evidence, _ = load_finished(run)
    page = render_page(counted, run.spec, finished_run(found, evaluation, evidence), {})
    asked = f"{words} the wider draws and the failing draws from test images, not those that were reviewed or tuned on."
    assert asked in " ".join(page.split())


def test_a_correction_that_was_not_made_is_not_called_unconfirmed(finished, tmp_path) -> None:
    run, _ = finished
    found, evaluation, evidence, watch = load_finished(run)
    other = Run.start(FolderStore(tmp_path), "a", run.spec)
    found = dataclasses.replace(found, sweep=NOTHING_CHOSEN)
    report = write_report(other, finished_run(found, evaluation, evidence, watch))
    accepted = [row for row in report.scenarios.list if row.accepted]
    assert {row.evidence.confirmed for row in accepted} == {None}
    assert not any("not confirmed" in text for text in report.caveats)
    assert "not confirmed" not in other.store.read("report.html").decode()
    figures = report.evidence  # defuse is the classifier before, whose 0 % on failing draws is by definition
    shares = (figures.own_label, figures.one_label, figures.real_failures, *figures.wider)
    assert {each.defuse.value for each in shares} == {None} and figures.own_label.before.value is not None
    assert {row.evidence.defuse for row in accepted} == {None}
    cards = [scenario_card(row, finished_run(found, evaluation, evidence)) for row in accepted]
    assert "confirmed" not in render_scenarios(cards, found.models.classes)


def test_the_page_names_scenarios_whose_correction_is_not_confirmed(finished) -> None:
    run, report = finished
    page = run.store.read("report.html").decode()
    unconfirmed = [row for row in report.scenarios.list if row.evidence and row.evidence.confirmed is False]
    assert unconfirmed, "the tiny run is too weak for all its corrections to be confirmed"
    assert "The correction is confirmed on" in page
    assert "not confirmed" in page.split('id="scenarios"')[1]


def test_evidence_is_made_once(finished) -> None:
    run, report = finished
    compute = LocalCompute()
    compute.sweep = None  # type: ignore[method-assign]  # would fail if anything were tuned again
    assert run_defuse(run, compute, ReferenceAnnotators(run, compute)).evidence == report.evidence
