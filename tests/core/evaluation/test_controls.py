"""Corrections against several plain trainings, what is confirmed or worse there, and what is tuned without a fold."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats

from defuse_core.artifacts import Corrections, Failures, Sweep
from defuse_core.evaluation import Findings
from defuse_core.evaluation.controls import Controls, control_spec, fold_of, has_known_confusion, without_fold
from defuse_core.evaluation.evidence import Evidence, gather_evidence
from defuse_core.formatting import numbers_text, spread_of
from defuse_core.intervals import (
    is_better,
    is_beyond,
    is_confirmed,
    is_worse,
    least_favourable,
    pairs_of,
    swapped,
)
from defuse_core.local import LocalCompute
from defuse_core.pipeline import load_finished, run_defuse
from defuse_core.protocols import silent
from defuse_core.report.build_evidence import _pairs, evidence_figures
from defuse_core.report.correction_caveats import no_better_than_plain_training, unconfirmed
from defuse_core.review.verdicts import most_common_errors
from defuse_core.runs import FROM_SWEEP, FROM_VERDICTS, PLAIN_NAMES, RECORDED_FIELDS, Run
from defuse_core.store import FolderStore
from defuse_core.training.reference_models import ReferenceAnnotators
from defuse_core.trials import trial_key
from tests.conftest import tiny
from tests.sample_components import sample_failures
from tests.sample_findings import sample_findings


def found_with(count: int, unreviewed: Failures | None = None) -> Findings:
    """Findings with so many accepted scenarios; their components are far from each other, at 0, 100, 200, ..."""
    found, _ = sample_findings(scenarios=count, accepted=count)
    far = 100.0 * np.arange(count)[:, None] * np.ones((1, 3))
    scenarios = dataclasses.replace(found.scenarios, means=far, covariances=np.stack([np.eye(3)] * count))
    codes = far.astype(np.float32)[:, None] * np.ones((1, 3, 1), np.float32)
    fixes = Corrections(np.arange(count), found.verdicts.labels, codes, codes, unreviewed=unreviewed)
    return dataclasses.replace(found, scenarios=scenarios, fixes=fixes)


def test_the_two_folds_hold_every_scenario_once() -> None:
    found = found_with(5)
    left = [without_fold(found, fold) for fold in (0, 1)]
    tuned = np.concatenate([part.scenario for part in left])
    assert sorted(tuned.tolist()) == found.fixes.scenario.tolist()
    assert [part.tune[:, 0, 0].tolist() for part in left] == [[100, 300], [0, 200, 400]]
    assert fold_of(found.fixes).tolist() == [0, 1, 0, 1, 0]
    assert [part.unreviewed for part in left] == [None, None]


def test_unreviewed_failures_near_a_left_out_scenario_are_left_out_with_all_of_their_images() -> None:
    found = found_with(2)
    labels = found.verdicts.labels.tolist()
    wrong = most_common_errors(found.gallery, found.verdicts, found.fixes.scenario).tolist()
    other = next(each for each in range(10) if each not in (*labels, *wrong))
    far = np.full(3, 50.0)
    rows = [  # code, source image, its class, the answer
        (np.zeros(3), 1, other, wrong[1]),  # in the region of scenario 0
        (far, 2, labels[0], wrong[0]),  # with its confusion
        (far, 2, labels[0], other),  # of the same image as that
        (far, 3, labels[0], other),
        (np.full(3, 100.0), 4, other, wrong[0]),  # in the region of scenario 1
        (far, 5, labels[1], wrong[1]),
    ]
    codes, source, truth, predicted = map(np.array, zip(*rows, strict=True))
    failures = sample_failures(codes.astype(np.float32), source, truth, predicted)
    kept = [without_fold(found_with(2, failures), fold).unreviewed.source.tolist() for fold in (0, 1)]
    assert kept == [[3, 4, 5], [1, 2, 2, 3]]
    of_tracks = dataclasses.replace(failures, source_track=np.array([9, 9, 9, 9, 8, 8]))
    kept = [without_fold(found_with(2, of_tracks), fold).unreviewed.source.tolist() for fold in (0, 1)]
    assert kept == [[4, 5], [1, 2, 2, 3]]


def test_draws_to_tune_on_in_the_region_of_a_left_out_scenario_are_left_out() -> None:
    found = found_with(4)
    tune = found.fixes.tune.copy()
    tune[1, 0] = 1.0  # of scenario 1, in the region of scenario 0, which is in the other fold
    tune[3] = 201.0  # all of scenario 3, in that of scenario 2
    anchors = np.arange(12).reshape(4, 3)
    changed = dataclasses.replace(
        found, fixes=dataclasses.replace(found.fixes, tune=tune, tune_anchor=anchors)
    )
    without_even, without_odd = (without_fold(changed, fold) for fold in (0, 1))
    assert without_even.scenario.tolist() == [1]
    assert without_even.tune_anchor.tolist() == [[4, 5, 4]]
    np.testing.assert_array_equal(without_even.tune, np.full((1, 3, 3), 100.0))
    np.testing.assert_array_equal(without_odd.tune, tune[[0, 2]])
    assert without_odd.tune_anchor.tolist() == anchors[[0, 2]].tolist()
    tune[1] = 1.0
    assert without_fold(changed, 0).tune.shape == (0, 3, 3)


def test_a_confusion_is_known_where_one_with_its_label_and_wrong_answer_is_tuned_on() -> None:
    found = found_with(6)
    labels = np.array([8, 8, 8, 8, 7, 7])

    def known(answers: list[int], tune: np.ndarray) -> list[bool]:
        fixes = dataclasses.replace(found.fixes, labels=labels, tune=tune)
        return has_known_confusion(dataclasses.replace(found, fixes=fixes), np.array(answers)).tolist()

    far = found.fixes.tune
    both = [3, 3, 2, 1, 2, 1]  # 8 read as 3 in both folds; 8 as 2 and 7 as 2 are two confusions
    assert known(both, far) == [True, True, False, False, False, False]
    assert not any(known([3, 2, 3, 2, 9, 5], far))  # 8 read as 3 twice, in one fold
    near = far.copy()
    near[1] = far[0]  # all of scenario 1 is in the region of scenario 0, so that it is left out with it
    assert known(both, near) == [False, True, False, False, False, False]


def test_scenarios_are_left_out_whose_numbers_are_not_their_places() -> None:
    found = found_with(3)
    wrong = most_common_errors(found.gallery, found.verdicts, found.fixes.scenario).tolist()
    labels = found.verdicts.labels.tolist()
    other = next(each for each in range(10) if each not in (*labels, *wrong))
    at = np.array([0.0, 100, 200])[:, None] * np.ones((1, 3))
    failures = sample_failures(at.astype(np.float32), np.arange(3), np.full(3, other), np.full(3, wrong[0]))
    fixes = dataclasses.replace(found.fixes.take(np.array([2, 1])), unreviewed=failures)
    changed = dataclasses.replace(found, fixes=fixes)
    kept = [without_fold(changed, fold) for fold in (0, 1)]
    assert [part.scenario.tolist() for part in kept] == [[1], [2]]
    assert [part.unreviewed.source.tolist() for part in kept] == [[0, 1], [0, 2]]


def test_controls_are_tuned_for_as_many_epochs_as_the_chosen_correction_whatever_their_loss() -> None:
    found, _ = sample_findings()
    row = dataclasses.replace(found.sweep.rows[0], lam=2.0, epoch=3)
    chosen = dataclasses.replace(found.sweep, chosen=row)
    spec = tiny(correct={"lambdas": (1.0, 5.0), "epochs": 7, "stop_at_loss": 0.3})
    plain, fold = (control_spec(spec, lam, chosen).correct for lam in (0.0, 2.0))
    assert (plain.lambdas, fold.lambdas) == ((0.0,), (2.0,))
    for section in (plain, fold):
        assert (section.epochs, section.choose_by, section.stop_at_loss) == (3, "last", None)
    assert control_spec(spec, 0.0, dataclasses.replace(chosen, chosen=None)).correct.epochs == 7


def pairs(*rows: tuple[int, int, int]) -> np.ndarray:
    """Return the pairs of scenarios, (1, A, 3), for one plain training."""
    return np.array([rows], np.int64)


def test_a_scenario_is_confirmed_only_where_the_correction_is_better_than_each_plain_training() -> None:
    clear, tie, lost = (40, 20, 0), (40, 10, 10), (40, 0, 20)
    first, second = pairs(clear, clear, lost, lost), pairs(clear, tie, lost, tie)
    assert is_better(first).tolist() == [True, True, False, False]
    both = np.concatenate([first, second])
    assert is_better(both).tolist() == [True, False, False, False]
    assert is_better(swapped(both)).tolist() == [False, False, True, False]


def test_a_single_scenario_is_confirmed_from_a_chance_of_five_percent_on() -> None:
    assert is_better(pairs((40, 5, 0))).tolist() == [True]  # 1 in 32
    assert is_better(pairs((40, 4, 0))).tolist() == [False]  # 1 in 16


def test_no_correction_is_confirmed_that_leaves_the_classifier_wrong_on_half_of_the_images() -> None:
    better = pairs((256, 12, 0), (256, 128, 0), (256, 129, 0), (256, 12, 0))
    right = np.array([12, 128, 129, np.nan]) / 256
    assert is_confirmed(better, right, np.zeros((2, 4))).tolist() == [False, False, True, False]


def test_what_further_plain_trainings_may_reach_is_neither_confirmed_nor_worse() -> None:
    better, right = pairs((256, 200, 0), (256, 200, 0)), np.array([0.95, 0.95])
    close, spread = [0.10, 0.12, 0.08], [0.95 - 0.94, 0.90, 0.30]  # the second: another order may do as much
    plain = np.array([close, spread]).T
    assert is_confirmed(better, right, plain).tolist() == [True, False]
    assert is_worse(swapped(better), 1 - right, 1 - plain).tolist() == [True, False]
    alone = plain[:1]
    assert not is_confirmed(better, right, alone).any() and not is_worse(better, right, alone).any()
    three, equal = np.array([[0.1], [0.2], [0.3]]), np.full((3, 2), 0.75)
    bound = 0.2 + stats.t.ppf(0.95, 2) * 0.1 * np.sqrt(4 / 3)  # of one more observation
    assert [is_beyond(np.array([bound + by]), three).item() for by in (-1e-6, 1e-6)] == [False, True]
    assert not is_confirmed(better, equal[0], equal).any()
    assert not is_worse(swapped(better), equal[0], equal).any()


@pytest.mark.parametrize("lottery", [0.3, 1.0, 5.0])
def test_a_training_that_has_seen_no_scenario_is_confirmed_on_about_five_of_a_hundred(lottery: float) -> None:
    rng = np.random.default_rng(0)
    right = rng.beta(
        lottery, lottery, (4, 4000)
    )  # of a training in the place of the correction, and of three plain
    change = (256 * (right[0] - right[1:])).astype(np.int64)
    table = np.stack([np.full_like(change, 256), change.clip(0), (-change).clip(0)], axis=-1)
    by_pictures = is_better(table) & (right[0] > 0.5)
    assert by_pictures.mean() > 0.15
    assert is_confirmed(table, right[0], right[1:]).mean() < 0.065


def test_pictures_that_are_not_labelled_count_in_no_pair() -> None:
    defuse, plain = np.array([1, np.nan, 1, 0, np.nan]), np.array([0, 0, np.nan, 1, 1])
    assert pairs_of(defuse, plain, np.array([1, 2, 3, 4, 1])).tolist() == [2, 1, 1]


def test_five_of_a_hundred_scenarios_are_not_confirmed_by_chance() -> None:
    rng = np.random.default_rng(0)
    better = rng.binomial(40, 0.5, (1, 400))
    table = np.stack([np.full_like(better, 40), better, 40 - better], axis=-1)
    alone = sum(is_better(table[:, [number]]).item() for number in range(400))
    assert alone > 5  # each scenario tested as if it were the only one
    assert not is_better(table).any()


def test_scenarios_with_too_few_units_are_not_tested_and_cost_the_others_nothing() -> None:
    clear, few = (6, 6, 0), (4, 4, 0)
    assert is_better(pairs(clear, *[few] * 50)).tolist() == [True, *[False] * 50]
    assert is_better(np.zeros((3, 0, 3), np.int64)).shape == (0,)


def test_the_least_favourable_plain_training_is_the_one_that_the_correction_is_least_certainly_better_than():
    found = least_favourable(np.array([[9, 8, 1], [9, 6, 3], [9, 9, 0]]))
    assert found.tolist() == [9, 6, 3]
    one_in_51, one_in_14, certain = [9, 8, 1], [67, 40, 27], [67, 60, 7]  # by chance
    assert least_favourable(np.array([one_in_51, one_in_14])).tolist() == one_in_14
    assert least_favourable(np.array([one_in_51, certain])).tolist() == one_in_51
    for order in ([0, 1], [1, 0]):
        assert least_favourable(np.array([[9, 0, 0], [9, 0, 9]])[order]).tolist() == [9, 0, 9]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, judged_run, no_figures_in_module):
    """A finished run without failures that nobody reviewed, and its report. It has the verdicts of `judged_run`."""
    spec = judged_run.spec.with_fields("correct", unreviewed=False)
    run = Run.start(FolderStore(tmp_path_factory.mktemp("plain")), "a", spec)
    own = (
        "run.yaml",
        RECORDED_FIELDS,
        "trials/",
        "report.",
        *FROM_VERDICTS[FROM_VERDICTS.index("corrections") :],
    )
    for key in judged_run.store.list():
        if not key.startswith(own):
            run.store.write(key, judged_run.store.read(key))
    compute = LocalCompute()
    return run, run_defuse(run, compute, ReferenceAnnotators(run, compute))


def test_plain_training_does_more_only_where_each_of_them_does() -> None:
    twice_better = _pairs(np.array([[10, 9, 1], [10, 9, 1], [9, 0, 9]]), "scenario")
    assert (twice_better.better, twice_better.worse, twice_better.worse_than_each) == (0, 9, False)
    assert _pairs(np.array([[10, 1, 9], [9, 0, 9]]), "scenario").worse_than_each
    assert not _pairs(np.array([[10, 3, 7], [9, 0, 9]]), "scenario").worse_than_each


def test_plain_trainings_are_stored_apart_and_differ_from_each_other(finished) -> None:
    run, _ = finished
    assert len(PLAIN_NAMES) == 3
    made = [run.require(Sweep, name).weights for name in PLAIN_NAMES]
    for number, first in enumerate(made):
        for other in made[number + 1 :]:
            assert any(not np.array_equal(first[key], other[key]) for key in first)
    for name in PLAIN_NAMES:
        assert run.store.exists(f"trials/{name}/{run.require(Sweep).chosen.epoch}-epochs/{trial_key(0.0)}")
        assert name in FROM_SWEEP  # an added λ and a changed verdict make them again


def test_figures_of_plain_training_are_means_and_each_is_listed(finished) -> None:
    _, report = finished
    evidence = report.evidence
    for shares in (evidence.own_label, evidence.one_label, evidence.left_out, evidence.real_failures):
        assert len(shares.plain_each) == len(PLAIN_NAMES)
        assert shares.plain.value == pytest.approx(np.mean(shares.plain_each))
    rows = [row.evidence for row in report.scenarios.list if row.accepted]
    for row in rows:
        assert row.plain == pytest.approx(np.mean(row.plain_each))
    assert {wide.plain.value is None for wide in evidence.wider} == {False}


def strong_and_weak(found: Findings) -> tuple[Sweep, Sweep]:
    """Sweeps of the classifier before, and of the same with its answers exchanged: wrong wherever that one is right.

    What the run itself tuned is better on some scenario on one kind of processor, and on none on another.
    """
    weights = found.models.classifier
    last = [name for name, array in weights.items() if len(array) == len(found.models.classes)][-2:]
    exchanged = weights | {name: np.roll(weights[name], 1, axis=0) for name in last}
    return dataclasses.replace(found.sweep, weights=weights), dataclasses.replace(
        found.sweep, weights=exchanged
    )


def test_one_lucky_plain_training_leaves_nothing_confirmed(finished) -> None:
    """The correction takes the place of one of the three: nothing is better than itself."""
    run, _ = finished
    found = load_finished(run).found
    strong, weak = strong_and_weak(found)
    found = dataclasses.replace(found, sweep=strong)
    alone = gather_evidence(run.spec, found, Controls((weak, weak), ()), progress=silent)
    made = gather_evidence(run.spec, found, Controls((weak, weak, strong), ()), progress=silent)
    assert alone.confirmed.any() and not made.confirmed.any() and not made.worse.any()
    figures = evidence_figures(found, made)
    assert figures.against_plain.scenarios.better == figures.against_plain.real_failures.better == 0
    assert not figures.against_plain.scenarios.worse_than_each
    assert not figures.against_plain.real_failures.worse_than_each


def test_a_correction_that_is_worse_than_each_plain_training_is_told_apart(finished) -> None:
    run, report = finished
    found = load_finished(run).found
    strong, weak = strong_and_weak(found)
    bad = dataclasses.replace(found, sweep=weak)
    made = gather_evidence(run.spec, bad, Controls((strong,) * 2, ()), progress=silent)
    assert made.worse.any() and not (made.worse & made.confirmed).any()
    rows = []
    place = {int(number): column for column, number in enumerate(found.fixes.scenario)}
    for row in report.scenarios.list:
        worse = row.number in place and bool(made.worse[place[row.number]])
        told = row.evidence and row.evidence.model_copy(
            update={"confirmed": not worse and row.number % 2 == 0, "worse": worse}
        )
        rows.append(row.model_copy(update={"evidence": told}))
    changed = report.scenarios.model_copy(update={"list": rows})
    text = unconfirmed(report.model_copy(update={"scenarios": changed}))
    worse = [number for number, column in place.items() if made.worse[column]]
    assert f", and worse than plain further training on {len(worse)}. " in text
    assert f"is worse than plain further training (λ = 0) on: {numbers_text(worse)}" in text


def test_the_caveat_on_left_out_scenarios_is_of_those_with_a_new_confusion(finished) -> None:
    _, report = finished
    evidence = report.evidence
    one = evidence.against_plain.scenarios.model_copy(update={"better": 9, "worse": 8, "p_value": 1.0})
    known = evidence.left_out_known_confusion.model_copy(
        update={"count": 12, "defuse": 0.997, "plain": 0.847}
    )
    new = known.model_copy(update={"count": 17, "defuse": 0.796, "plain": 0.752, "against_plain": one})
    sure = one.model_copy(update={"better": 29, "worse": 0, "p_value": 1e-8})
    against = evidence.against_plain.model_copy(update={"left_out": sure})

    def told(**groups) -> str:
        changed = evidence.model_copy(update={"against_plain": against, **groups})
        return no_better_than_plain_training(report.model_copy(update={"evidence": changed})) or ""

    text = told(left_out_known_confusion=known, left_out_new_confusion=new)
    assert "Left-out scenarios with a new confusion: 79.6 % after the correction, 75.2 % after plain" in text
    assert "better on 9 scenarios, worse on 8" in text
    nothing_new = told(left_out_new_confusion=new.model_copy(update={"count": 0}))
    assert "new confusion" not in nothing_new and "scenarios left out" not in nothing_new


def test_the_page_has_plain_training_on_wider_draws_and_where_these_are(finished) -> None:
    run, report = finished
    page = " ".join(run.store.read("report.html").decode().split())
    assert run.spec.correct.tuning_factor == 16
    for row in report.evidence.wider:
        drawn = f"<td>draws at {row.factor:g} times the reviewed τ, by the judges' labels"
        assert f"{drawn}; inside of what is tuned on</td>" in page
    assert "Images to tune on are drawn at 16 times the reviewed τ (correct.widen)" in page
    assert f"each {spread_of(report.evidence.own_label.plain_each)}</small>" in page


def test_a_run_whose_evidence_is_made_tunes_no_controls_again(finished) -> None:
    run, report = finished
    stored = run.store.read("evidence.safetensors")
    for name in PLAIN_NAMES[1:]:
        run.store.delete(f"{name}.safetensors")
    compute = LocalCompute()
    assert run_defuse(run, compute, ReferenceAnnotators(run, compute)).evidence == report.evidence
    assert not run.store.exists("plain_1.safetensors")
    assert run.store.read("evidence.safetensors") == stored
    run.store.delete("evidence.safetensors")
    run_defuse(run, compute, ReferenceAnnotators(run, compute))
    again = run.require(Evidence)
    assert run.store.exists("plain_1.safetensors")
    np.testing.assert_array_equal(again.plain_each, report_each(report))


def report_each(report) -> list[tuple[float, ...]]:
    evidence = report.evidence
    return [
        shares.plain_each
        for shares in (evidence.own_label, evidence.one_label, evidence.left_out, evidence.real_failures)
    ]
