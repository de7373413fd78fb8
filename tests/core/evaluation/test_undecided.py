"""Runs without a failure scenario: those that decided so, and those that could not tell."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from sample_findings import finished_run, report_of, sample_findings, sample_run, sample_spec, with_verdicts

from defuse_core.artifacts import (
    NONE_OF_THE_ABOVE,
    Cause,
    DroppedComponent,
    Health,
    Models,
    Override,
    ReferenceSet,
)
from defuse_core.evaluation.undecided import why_undecided
from defuse_core.report.build import build_report
from tests.sample_components import FIT

COUNT = 4


def undecided(sample, **review) -> str | None:
    found, _ = sample
    spec = sample_spec().with_fields("review", **review)
    return why_undecided(spec, dataclasses.replace(found, models=fit(found.models)))


def fit(models: Models, health: Health = FIT) -> Models:
    return dataclasses.replace(models, health=health)


def without_labels(*, rejected_by_people: int = 0):
    """Findings in which no reviewed image has a label; so many components were rejected by a person."""
    sample = sample_findings(COUNT, 0)
    nobody = np.full_like(sample[0].verdicts.image_labels, NONE_OF_THE_ABOVE)
    overrides = tuple(Override(row, None, "eve", "no digit", "") for row in range(rejected_by_people))
    return with_verdicts(sample, image_labels=nobody, overrides=overrides)


def test_a_review_that_gave_no_image_a_label_could_not_tell(tmp_path: Path):
    assert undecided(sample_findings(COUNT, 0)) is None
    assert undecided(sample_findings(COUNT, 1)) is None
    text = report_of(without_labels(), tmp_path).headline
    assert text.startswith("Could not tell: no reviewed image has a label,")
    assert undecided(without_labels(rejected_by_people=COUNT)) is None
    assert undecided(without_labels(rejected_by_people=COUNT // 2)) is None
    told = "in 3 of 4 candidate scenarios no reviewed image has a label, since"
    assert undecided(without_labels(rejected_by_people=1)).startswith(told)
    some = sample_findings(COUNT, 0)
    labels = np.full_like(some[0].verdicts.image_labels, NONE_OF_THE_ABOVE)
    labels[0, 0] = 3
    assert undecided(with_verdicts(some, image_labels=labels)).startswith(told)
    labels[1, 0] = 3
    assert undecided(with_verdicts(some, image_labels=labels)) is None


def with_units(failing: list[int], total: list[int], **changes):
    """Findings with so many failing photographs of so many in each component."""
    sample = sample_findings(len(total), 0)
    return with_verdicts(sample, units=np.array(total), failing_units=np.array(failing), **changes)


@pytest.mark.parametrize(
    ("failing", "total", "found"),
    [
        ([0, 3, 1], [9, 3, 9], "1 of 3 candidate scenarios fails in over 50 %"),
        ([4, 3, 1], [4, 3, 9], "2 of 3 candidate scenarios fail in over 50 %"),
        ([0, 1, 1], [9, 3, 9], None),  # few, but most are right
        ([5, 6, 0], [9, 11, 9], None),  # over rho, not certainly: enough to decide
        ([5, 0, 0], [6, 9, 9], None),  # just enough photographs
        ([1, 0, 0], [2, 9, 9], None),  # not over rho
    ],
)
def test_components_that_fail_in_too_few_photographs_to_be_certain_are_undecided(failing, total, found):
    text = undecided(with_units(failing, total))
    assert (text or "").partition(" (")[0] == (found or "")
    if text is not None:
        assert "fewer than the 6 photographs that significance takes" in text
    assert undecided(with_units(failing, total), accept="share") is None


@pytest.mark.parametrize(
    ("wrong", "images", "found"),
    [
        ([8] * 20, 10, "20 of 20 candidate scenarios fail in over 50 %"),
        ([9, 2, 2, 2, 2], 10, "1 of 5 candidate scenarios fails in over 50 %"),
        ([7, 7, 2], 10, None),  # by chance, a right component has as many
        ([10, 2], 10, None),  # certain, and rejected since its labels are tied
    ],
)
def test_components_that_fail_but_for_the_number_of_tests_are_undecided(wrong, images, found):
    shares = {"labelled": np.full(len(wrong), images), "misclassified": np.array(wrong) / images}
    sample = with_verdicts(sample_findings(len(wrong), 0), **shares)
    text = undecided(sample, more_images=0)
    assert (text or "").partition(" (")[0] == (found or "")
    if text is not None:
        assert text.endswith(
            "but that is not significant (review.max_false); review more images of each (review.images)"
        )
    assert undecided(sample, accept="share") is None


def test_photographs_that_all_fail_but_for_the_number_of_tests_leave_it_open_and_more_of_them_are_advised():
    text = undecided(with_units([6, 0, 0, 0, 0], [6, 9, 9, 9, 9]))
    assert text is not None and "1 of 5 candidate scenarios fails in over 50 %" in text
    assert text.endswith(
        "not significant (review.max_false); review more images of each (review.images), or give "
        "identification more photographs"
    )


def test_of_components_with_few_and_with_enough_photographs_it_is_told_that_they_are_not_significant():
    text = undecided(with_units([6, 3, 0, 0, 0], [6, 3, 9, 9, 9]))
    assert text is not None and text.startswith("2 of 5 candidate scenarios fail in over 50 %")
    assert "that is not significant" in text


def test_images_of_tracks_and_images_that_are_decoded_plainly_are_counted_as_such():
    found, evaluation = with_units([3], [3])
    gallery = dataclasses.replace(
        found.gallery, track=np.zeros((1, found.gallery.predicted.shape[1]), np.int64)
    )
    text = undecided((dataclasses.replace(found, gallery=gallery), evaluation))
    assert text is not None and "fewer than the 6 tracks that significance takes" in text
    plain = {"labelled": np.array([3, 4, 9]), "misclassified": np.array([1.0, 0.5, 1.0])}
    text = undecided(with_verdicts(sample_findings(3, 0), **plain))
    assert (
        text is not None
        and text.startswith("1 of 3 candidate scenarios fails")
        and "the 6 images that" in text
        and "photographs" not in text
    )


def test_components_that_were_not_reviewed_since_too_few_photographs_show_them_leave_it_open(
    tmp_path: Path,
):
    found, evaluation = sample_findings(COUNT, 0)
    few = dropped("uncertain", reason="too few photographs or tracks for certainty: 4 photographs")
    for component, told in ((few, True), (dataclasses.replace(few, cause="undivided"), False)):
        scenarios = dataclasses.replace(found.scenarios, dropped=(component,))
        one = dataclasses.replace(found, scenarios=scenarios)
        words = "1 component is not reviewed (too few photographs"
        assert (undecided((one, evaluation)) or "").startswith(words) is told
        health = Health(1000, 1.0, 1.0, 0.6, 3, 0.6, 0, 16, "poor")
        one = dataclasses.replace(one, models=fit(found.models, health))
        report = report_of((one, evaluation), tmp_path)
        assert report.headline.startswith("Could not tell: the β-VAE is poor")  # which hides nothing else
        assert (words in " ".join(report.caveats)) is told


def test_what_people_rejected_is_decided():
    rejected = (Override(1, None, "eve", "no digit", ""),)
    assert undecided(with_units([0, 3, 1], [9, 3, 9], overrides=rejected)) is None


def dropped(cause: Cause = "unclear", weight: float = 0.1, reason: str = "its draws") -> DroppedComponent:
    return DroppedComponent(weight, 8, 3, 2, cause, reason)


def test_components_that_are_not_reviewed_are_told_once(tmp_path: Path):
    found, evaluation = sample_findings(0, 0)
    few = dropped("uncertain", reason="too few photographs or tracks for certainty: 4 photographs")
    scenarios = dataclasses.replace(found.scenarios, dropped=(few,))
    report = report_of((dataclasses.replace(found, scenarios=scenarios), evaluation), tmp_path)
    assert report.headline.startswith("Could not tell: 1 component is not reviewed (too few photographs")
    assert not any("photographs" in text for text in report.caveats)


@pytest.mark.parametrize(
    ("components", "words"),
    [
        ((dropped(),), "Could not tell: Ψ has 516 codes, but no component was left to review"),
        (
            (dropped(), dropped(weight=0.2, reason="images")),
            "(2 could not be judged, the heaviest since images)",
        ),
        ((), "No failure scenario was found"),
        ((dropped("few codes", weight=0.4),), "No failure scenario was found"),
        ((dropped("undivided", reason="one track"),), "one track); try more photographs or tracks of these"),
        ((dropped("few codes", weight=0.4), dropped()), "Could not tell: "),
        ((dropped("right"), dropped(weight=0.2)), "Could not tell: "),
        ((dropped("right"),), "No failure scenario was found"),
        ((dropped("right", weight=0.2), dropped()), "No failure scenario was found"),
        ((dropped("right"), dropped()), "Could not tell: "),  # right on half of them is not on most
    ],
)
def test_failures_of_which_no_component_was_left_are_undecided_unless_the_classifier_is_right(
    tmp_path: Path, components, words: str
):
    found, evaluation = sample_findings(0, 0)
    scenarios = dataclasses.replace(found.scenarios, dropped=components)
    found = dataclasses.replace(found, scenarios=scenarios)
    assert words in report_of((found, evaluation), tmp_path).headline
    nothing = dataclasses.replace(found, psi=dataclasses.replace(found.psi, codes=np.zeros(1, np.int64)))
    report = build_report(sample_run(tmp_path), finished_run(nothing, evaluation))
    assert report.headline.startswith("No failure scenario was found")


def test_failures_that_are_spread_over_cells_of_little_weight_are_undecided(tmp_path: Path):
    found, evaluation = sample_findings(0, 0)
    found = dataclasses.replace(found, psi=dataclasses.replace(found.psi, images=100_000))
    cells = (DroppedComponent(0.006, 8, 3, 8, "few codes", "its codes"),) * 100  # of 8 images each
    found = dataclasses.replace(
        found, scenarios=dataclasses.replace(found.scenarios, all_weights=np.array([0.4]))
    )
    scenarios = dataclasses.replace(found.scenarios, dropped=cells)
    text = report_of((dataclasses.replace(found, scenarios=scenarios), evaluation), tmp_path).headline
    assert text.startswith(
        "Could not tell: 60 % of the codes of Ψ are in 100 cells (class, answer) of at most 0.01"
    )
    assert "lower distill.min_weight" in text
    few = tuple(dataclasses.replace(cell, cause="few images") for cell in cells)
    scenarios = dataclasses.replace(found.scenarios, dropped=few)
    text = report_of((dataclasses.replace(found, scenarios=scenarios), evaluation), tmp_path).headline
    assert text.startswith("No failure scenario was found")
    half = (dataclasses.replace(cells[0], weight=0.5),)
    scenarios = dataclasses.replace(found.scenarios, dropped=half)
    text = report_of((dataclasses.replace(found, scenarios=scenarios), evaluation), tmp_path).headline
    assert text.startswith("No failure scenario was found")


def test_cells_of_few_images_that_count_as_one_are_not_taken_for_one_of_many_images(tmp_path: Path):
    found, evaluation = sample_findings(0, 0)
    few = DroppedComponent(0.3, -1, -1, 40_000, "few images", "cells of too few images each")
    cells = (DroppedComponent(0.4 / 10_000, 8, 3, 8, "few codes", "its codes"),) * 10_000
    images = dataclasses.replace(found.psi, images=1_000_000)
    for other, words in (
        (few, "70 % of the codes of Ψ, of up to 12 % of the training images, are in over 10,000 comp"),
        (dataclasses.replace(few, cause="few codes"), "70 % of the codes of Ψ are in over 10,000 cells"),
    ):
        scenarios = dataclasses.replace(found.scenarios, all_weights=np.zeros(0), dropped=(*cells, other))
        text = report_of(
            (dataclasses.replace(found, scenarios=scenarios, psi=images), evaluation), tmp_path
        ).headline
        assert text.startswith(f"Could not tell: {words}")


def test_failures_in_components_of_little_weight_are_undecided_as_those_in_cells(tmp_path: Path):
    found, evaluation = sample_findings(0, 0)
    cells = (DroppedComponent(0.006, 8, 3, 8, "few codes", "its codes"),) * 50
    for weights, dropped_cells, words in (
        (np.full(60, 0.01), (), "60 % of the codes of Ψ are in components of at most 0.01"),
        (
            np.full(60, 0.005),
            cells,
            "60 % of the codes of Ψ are in 50 cells (class, answer), or in components, of at most",
        ),
        (np.full(90, 0.005), (), None),  # 45 %
        (np.full(2, 0.3), (), None),  # over distill.min_weight
    ):
        scenarios = dataclasses.replace(found.scenarios, all_weights=weights, dropped=dropped_cells)
        text = report_of((dataclasses.replace(found, scenarios=scenarios), evaluation), tmp_path).headline
        assert text.startswith(f"Could not tell: {words}" if words else "No failure scenario was found")


@pytest.mark.parametrize(("weight", "told"), [(0.51, True), (0.5, False)])
def test_what_could_not_be_judged_is_told_beside_what_was_reviewed_where_it_is_most(
    weight: float, told: bool
):
    found, evaluation = sample_findings(COUNT, 0)
    scenarios = dataclasses.replace(found.scenarios, dropped=(dropped(weight=weight),))
    text = undecided((dataclasses.replace(found, scenarios=scenarios), evaluation)) or ""
    assert ("only 4 components were left to review (1 could not be judged, the heaviest" in text) is told


@pytest.mark.parametrize(
    ("images", "weight", "told"), [(3999, 0.006, True), (4000, 0.006, False), (3999, 0.0049, False)]
)
def test_failures_of_many_images_each_in_a_component_too_small_for_a_scenario_are_undecided(
    images: int, weight: float, told: bool, tmp_path: Path
):
    found, evaluation = sample_findings(0, 0)
    lonely = (DroppedComponent(weight, 8, 3, 2, "few images", "its codes"),) * 100  # of 2 images each
    found = dataclasses.replace(
        found,
        psi=dataclasses.replace(found.psi, images=images),
        scenarios=dataclasses.replace(found.scenarios, dropped=lonely),
    )
    text = report_of((found, evaluation), tmp_path).headline
    assert (
        text.startswith(
            "Could not tell: 60 % of the codes of Ψ, of up to 5 % of the training images, are in 100 components"
        )
        is told
    )
    assert text.startswith("No failure scenario was found") is not told


def test_a_poor_beta_vae_is_not_the_only_cause_named_where_components_are_too_small_for_a_scenario(
    tmp_path: Path,
):
    found, evaluation = sample_findings(0, 0)
    lonely = (DroppedComponent(0.006, 8, 3, 2, "few images", "its codes"),) * 100  # of 2 images each
    found = dataclasses.replace(
        found,
        models=fit(found.models, Health(1000, 1.0, 1.0, 0.6, 3, 0.6, 0, 16, "poor")),
        scenarios=dataclasses.replace(found.scenarios, dropped=lonely),
    )
    for images, told in ((3999, True), (4000, False)):
        report = report_of(
            (dataclasses.replace(found, psi=dataclasses.replace(found.psi, images=images)), evaluation),
            tmp_path,
        )
        assert report.headline.startswith("Could not tell: the β-VAE is poor")
        small = "also, 60 % of the codes of Ψ, of up to 5 % of the training images, are in 100 components or cells"
        assert (small in report.headline) is told
        assert not any("β-VAE is poor" in text for text in report.caveats)  # told once


def test_a_heavy_component_that_the_classifier_gets_right_is_no_cell_of_little_weight(tmp_path: Path):
    found, evaluation = sample_findings(0, 0)
    heavy = (DroppedComponent(0.6, 8, 3, 40, "right", "its draws"),)
    scenarios = dataclasses.replace(found.scenarios, dropped=heavy)
    text = report_of((dataclasses.replace(found, scenarios=scenarios), evaluation), tmp_path).headline
    assert text.startswith("No failure scenario was found")


@pytest.mark.parametrize(("anchored", "collapsed"), [(False, 9), (True, 9), (False, 8)])
def test_a_beta_vae_of_collapsed_dimensions_is_told_as_one(tmp_path: Path, anchored: bool, collapsed: int):
    health = Health(1000, 1.0, 1.0, 1.0, 3, 0.6, collapsed, 16, "poor", anchored)
    for accepted in (0, 1):
        found, evaluation = sample_findings(COUNT, accepted)
        found = dataclasses.replace(found, models=fit(found.models, health))
        report = report_of((found, evaluation), tmp_path)
        text = report.caveats[0] if accepted else report.headline
        assert f"{collapsed} of 16 latent dimensions are collapsed" in text and "100" not in text


@pytest.mark.parametrize(
    ("verdict", "anchored", "words"),
    [
        ("poor", False, "the β-VAE is poor (60 % of the right answers are kept on reconstructions)"),
        (
            "blind",
            True,
            "the β-VAE is blind (60 % of the right answers are kept on images moved by the noise)",
        ),
        ("fit", False, None),
    ],
)
def test_a_beta_vae_that_keeps_few_answers_is_told_by_what_it_draws(verdict: str, anchored: bool, words):
    found, _ = sample_findings(COUNT, 0)
    health = Health(1000, 1.0, 1.0, 0.6, 3, 0.6, 7, 16, verdict, anchored)
    text = why_undecided(sample_spec(), dataclasses.replace(found, models=fit(found.models, health)))
    assert (text or "").startswith(words or "") and (text is None) is (words is None)
    on_average = dataclasses.replace(health, kept_on_average=0.4, least_kept=1)
    text = why_undecided(sample_spec(), dataclasses.replace(found, models=fit(found.models, on_average)))
    if words is not None:
        words = words.replace(
            "60 % of the right answers", "40 % of the right answers, on average over the classes,"
        )
    assert (text or "").startswith(words or "")


@pytest.mark.parametrize(("failing", "words"), [(1, "1 failing draw;"), (1200, "1,200 failing draws;")])
def test_failures_of_which_the_screen_kept_none_are_undecided(failing: int, words: str):
    found, _ = sample_findings(COUNT, 0)
    psi = dataclasses.replace(found.psi, codes=np.zeros(2, np.int64), failing=failing)
    found = dataclasses.replace(found, models=fit(found.models), psi=psi)
    assert words in (why_undecided(sample_spec(), found) or "")
    kept = dataclasses.replace(psi, codes=np.array([0, 1]))
    assert why_undecided(sample_spec(), dataclasses.replace(found, psi=kept)) is None


def test_a_smaller_purity_is_proposed_only_where_tau_is_chosen_by_it():
    found, _ = sample_findings(0, 0)
    scenarios = dataclasses.replace(found.scenarios, dropped=(dropped(),))
    found = dataclasses.replace(found, models=fit(found.models), scenarios=scenarios)
    for tau, proposed in (("auto", True), (0.1, False)):
        spec = sample_spec().with_fields("review", tau=tau)
        text = why_undecided(spec, found)
        assert text is not None and ("smaller review.purity" in text) is proposed


def references(*test: float) -> ReferenceSet:
    """Reference models that are right on such shares of the test images; the classifier of the samples on 98.3 %."""
    return ReferenceSet(tuple({} for _ in test), 100, np.full(len(test), np.nan), np.array(test))


@pytest.mark.parametrize(
    ("test", "worse"), [((0.8, 0.9), True), ((0.8, 0.97), False), ((np.nan, 0.9), True), ((np.nan,), False)]
)
def test_reference_models_that_are_worse_than_the_classifier_cannot_tell_where_it_fails(test, worse):
    found, _ = sample_findings(COUNT, 0)
    found = dataclasses.replace(found, models=fit(found.models), references=references(*test))
    text = why_undecided(sample_spec(), found)
    told = "right on fewer test images (at best 90.0 %) than the classifier (98.3 %), so they may take one for the"
    assert told in (text or "") if worse else text is None
    unused = sample_spec().with_fields("identify", screen="none")
    unused = unused.with_fields("review", annotators="label-studio", tau=0.25)
    assert why_undecided(unused, found) is None
    by_tau = unused.with_fields("review", tau="auto")
    assert why_undecided(by_tau, found) == text


@pytest.mark.parametrize(
    ("judge", "collapsed", "blamed"),
    [
        ("reference models", 0, "the reference models"),
        ("reference models", 9, "the β-VAE is poor"),
        ("classifier", 0, "the β-VAE is poor"),
    ],
)
def test_a_beta_vae_is_not_blamed_by_reference_models_that_are_worse_than_the_classifier(
    judge, collapsed, blamed
):
    found, _ = sample_findings(COUNT, 0)
    health = Health(1000, 0.5, 0.4, 0.6, 3, 0.6, collapsed, 16, "poor", True, judge)
    found = dataclasses.replace(found, models=fit(found.models, health), references=references(0.4))
    text = why_undecided(sample_spec(), found)
    assert text is not None and text.startswith(blamed)


def test_people_who_reject_all_decide_nothing_of_what_worse_reference_models_left_out() -> None:
    found, _ = without_labels(rejected_by_people=COUNT)
    for models, told in ((None, False), (references(0.99), False), (references(0.8), True)):
        known = dataclasses.replace(found, models=fit(found.models), references=models)
        text = why_undecided(sample_spec(), known)
        assert (text is not None) is told
