"""Caveats on the correction: what the choice of λ costs, and what plain further training does as well."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from sample_evidence import sample_evidence
from sample_findings import SAMPLE_CORRECT, finished_run, report_of, sample_findings, sample_run

from defuse_core.intervals import mcnemar
from defuse_core.report import write_report
from defuse_core.report.build import build_report
from defuse_core.report.caveats import caveats_of
from defuse_core.report.correction_caveats import (
    costs_a_class,
    fine_tuning_costs_too_much,
    no_better_than_plain_training,
    unconfirmed,
)
from defuse_core.report.evidence_schema import (
    AgainstBaseline,
    AgainstPlain,
    EvidenceFigures,
    FourShares,
    LeftOutScenarios,
    LeftOutShares,
    Pairs,
    ScenarioEvidence,
    Share,
)


def test_classes_that_lose_more_than_check_allows_are_named(tmp_path: Path):
    found, evaluation = sample_findings()
    report = report_of((found, losing_class(evaluation)), tmp_path)
    text = costs_a_class(report, SAMPLE_CORRECT) or ""
    named = f"images: {report.per_class[0].name} (90.0 % to 80.0 %). A smaller correct.max_class_loss"
    assert text in report.caveats and named in text
    row = report.per_class[0].model_copy(update={"name": "עז"})
    hebrew = costs_a_class(report.model_copy(update={"per_class": (row,)}), SAMPLE_CORRECT) or ""
    assert "images: עז\N{LEFT-TO-RIGHT MARK} (90.0 %" in hebrew
    assert costs_a_class(report.model_copy(update={"chosen": None}), SAMPLE_CORRECT) is None
    assert costs_a_class(report_of((found, evaluation), tmp_path), SAMPLE_CORRECT) is None


@pytest.mark.parametrize(
    ("before", "is_chosen", "told"),
    [
        (0.993, False, True),
        (0.993, True, False),
        (0.992, False, False),  # exactly what is allowed
        (None, False, False),
    ],
)
def test_where_no_lambda_is_chosen_a_report_says_if_fine_tuning_itself_costs_too_much(
    tmp_path: Path, before: float | None, is_chosen: bool, told: bool
):
    judged = sample_evidence(np.array([[0.1, 0.9, 0.9, 1.0], [0.5, 0.9, 0.9, 1.0]]))
    report = build_report(sample_run(tmp_path), finished_run(*sample_findings(), judged))
    accuracy = report.accuracy
    assert accuracy.plain.validation == pytest.approx(0.982)  # mean of two
    accuracy = accuracy.model_copy(
        update={
            "before": accuracy.before.model_copy(update={"validation": before}),
            "plain": accuracy.plain.model_copy(update={"validation": 0.982}),
        }
    )
    report = report.model_copy(update={"accuracy": accuracy, **({} if is_chosen else {"chosen": None})})
    correct = SAMPLE_CORRECT.model_copy(update={"max_loss": 0.01, "learning_rate": 0.0003})
    text = fine_tuning_costs_too_much(report, correct)
    assert (text is not None) is told
    if text is not None:
        assert text in caveats_of(report, correct, ())
        assert "from 99.3 % to 98.2 % on average" in text and "a loss of 1 %. Lower" in text
        assert "(now 0.0003)" in text
    without = report.model_copy(update={"accuracy": accuracy.model_copy(update={"plain": None})})
    assert fine_tuning_costs_too_much(without, correct) is None


def test_where_losses_are_known_to_be_certain_those_are_compared(tmp_path: Path):
    found, evaluation = sample_findings()
    evaluation = dataclasses.replace(losing_class(evaluation), class_loss=np.array([*[0.0] * 9, 0.06]))
    report = report_of((found, evaluation), tmp_path)
    assert [row.loses_too_much for row in report.per_class] == [False] * 9 + [True]


def losing_class(evaluation):
    """The evaluation with a first class that loses 10 points, a second that loses the 5 allowed; others lose 4."""
    per_class = np.array([[0.9] * 10, [0.9] * 10, [0.8, 0.85, *[0.86] * 8]])
    return dataclasses.replace(evaluation, per_class=per_class, per_class_images=np.full(10, 50))


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"max_class_loss": 0.0}, "more validation images, or smaller correct.lambdas."),
        ({"max_loss": 0.0}, "more validation images, or smaller correct.lambdas."),
        ({"max_loss": 0.0, "max_class_loss": 0.01}, "smaller correct.max_class_loss may choose another λ."),
        ({"choose_by": "train"}, "Only correct.choose_by: tune considers what a λ costs a class."),
    ],
)
def test_the_remedy_for_a_class_that_loses_is_none_that_the_run_file_has_already(
    tmp_path: Path, settings: dict[str, object], remedy: str
):
    found, evaluation = sample_findings()
    report = report_of((found, losing_class(evaluation)), tmp_path)
    text = costs_a_class(report, SAMPLE_CORRECT.model_copy(update=settings)) or ""
    assert text.endswith(remedy)


@pytest.mark.parametrize(
    ("anchored", "parts", "remedy"),
    [
        (
            False,
            ("train", "validation"),
            "On training and validation images no class lost significantly; give more validation",
        ),
        (
            False,
            ("train",),
            "On training images no class lost significantly; give validation images, or smaller",
        ),
        (
            True,
            ("train", "validation"),
            "On validation images no class lost significantly; give more validation",
        ),
        (
            True,
            ("train",),
            "Without validation images no λ is left out for what it costs a class; give validation",
        ),
    ],
)
def test_the_remedy_for_a_class_that_loses_names_the_images_that_count(
    tmp_path: Path, anchored: bool, parts: tuple[str, ...], remedy: str
):
    found, evaluation = sample_findings()
    models = dataclasses.replace(
        found.models,
        images={part: found.models.images[part] for part in parts},
        class_accuracy={},
        health=dataclasses.replace(found.models.health, anchored=anchored),
    )
    report = report_of((dataclasses.replace(found, models=models), losing_class(evaluation)), tmp_path)
    strict = SAMPLE_CORRECT.model_copy(update={"max_class_loss": 0.0})
    assert f"%). {remedy}" in (costs_a_class(report, strict) or "")


def judged(report, own=None, left_out=None, real=None):
    """The report with so many pairs, better and worse, against plain further training."""
    pairs = {
        name: None
        if counts is None
        else Pairs(
            pair="draw" if name == "real_failures" else "scenario",
            better=counts[0],
            worse=counts[1],
            p_value=mcnemar(*counts),
            worse_than_each=counts[0] < counts[1] and mcnemar(*counts) < 0.05,
        )
        for name, counts in (("scenarios", own), ("left_out", left_out), ("real_failures", real))
    }
    share = Share(value=0.84, low=0.7, high=0.9)
    shares = FourShares(before=share, baseline=share, plain=share, defuse=share, plain_each=(0.84,))
    evidence = EvidenceFigures.model_construct(
        own_label=shares,
        real_failures=shares,
        left_out=LeftOutShares(before=share, plain=share, defuse=share, plain_each=()),
        left_out_known_confusion=LeftOutScenarios(count=0),
        left_out_new_confusion=LeftOutScenarios(count=0),
        against_plain=AgainstPlain(**pairs, test=None),
        against_baseline=AgainstBaseline(scenarios=None, real_failures=None),
    )
    return report.model_copy(update={"evidence": evidence})


@pytest.mark.parametrize(
    ("pairs", "title"),
    [
        (((11, 0), (9, 1), (80, 50)), None),  # significantly better on all
        (((4, 0), (9, 1), (80, 50)), "may do as much for the scenarios"),  # 4 of 4 may be chance
        (
            ((11, 0), (7, 5), (27, 15)),
            "may do as much for scenarios left out of the tuning and failing draws from test images",
        ),
        (((11, 0), None, (54, 82)), "does more for failing draws from test images"),
        (
            ((4, 0), (9, 1), (54, 82)),
            "does more for failing draws from test images, and may do as much for the scenarios",
        ),
        ((None, None, None), None),  # not measured
    ],
)
def test_a_correction_that_does_no_more_than_plain_training_is_told(tmp_path: Path, pairs, title):
    report = report_of(sample_findings(12, 12), tmp_path)
    assert no_better_than_plain_training(report) is None  # without judges
    compared = judged(report, *pairs)
    assert no_better_than_plain_training(compared.model_copy(update={"chosen": None})) is None
    text = no_better_than_plain_training(compared)
    assert (None if text is None else text.partition(". ")[0]) == (
        None if title is None else f"Plain further training {title}"
    )


@pytest.mark.parametrize(
    ("scenarios", "pairs", "start"),
    [
        (
            5,
            ((5, 0), (4, 1), (80, 50)),
            "There are too few scenarios and scenarios left out of the tuning to tell whether",
        ),
        (1, ((1, 0), None, None), "There are too few scenarios to tell whether"),
        (6, ((5, 0), None, None), "Plain further training may do as much for the scenarios."),
        (
            5,
            ((5, 0), None, (20, 18)),
            "Plain further training may do as much for failing draws from test images. There are too few "
            "scenarios to tell",
        ),
    ],
)
def test_scenarios_too_few_for_a_significant_difference_are_not_put_down_to_plain_training(
    tmp_path: Path, scenarios: int, pairs, start: str
):
    report = report_of(sample_findings(scenarios, scenarios), tmp_path)
    assert (no_better_than_plain_training(judged(report, *pairs)) or "").startswith(start)


def test_the_caveat_has_the_pairs_on_failing_draws_from_test_images(tmp_path: Path):
    report = judged(report_of(sample_findings(), tmp_path), real=(54, 82))
    assert (no_better_than_plain_training(report) or "").endswith(
        "Failing draws from test images: 84.0 % after the correction, 84.0 % after plain further training. "
        "Compared with it: better on 54 draws, worse on 82, p = 0.02."
    )


def test_the_caveats_count_draws_of_one_track_as_that_track(tmp_path: Path):
    evidence = sample_evidence(np.array([[0.1, 0.6, 0.7, 0.9]] * 2))
    evidence.real_failure_pairs[:], evidence.real_failure_pairs_with_baseline[:] = [7, 3, 2], [7, 4, 1]
    report = build_report(sample_run(tmp_path), finished_run(*sample_findings(), evidence))
    text = " ".join(report.caveats)
    assert "better on 3 tracks, worse on 2," in text and "better on 4 tracks, worse on 1," in text
    assert "draws, worse" not in text


def test_the_caveat_compares_with_the_strongest_of_several_plain_trainings(tmp_path: Path):
    report = judged(report_of(sample_findings(12, 12), tmp_path), own=(5, 0))
    own = report.evidence.own_label.model_copy(update={"plain_each": (0.8, 0.88)})
    evidence = report.evidence.model_copy(update={"own_label": own})
    assert (no_better_than_plain_training(report.model_copy(update={"evidence": evidence})) or "").endswith(
        "Scenarios: 84.0 % after the correction, 84.0 % after plain further training, the mean of 2. "
        "Compared with the strongest of the 2 plain trainings: better on 5 scenarios, worse on 0, p = 0.062."
    )


def test_only_scenarios_that_fail_a_test_that_they_could_pass_are_called_unconfirmed(tmp_path: Path):
    report = report_of(sample_findings(4, 4), tmp_path)
    rows = [
        row.model_copy(
            update={
                "evidence": ScenarioEvidence.model_construct(
                    confirmed=confirmed, worse=False, independent_images=None, defuse=defuse
                )
            }
        )
        for row, confirmed, defuse in zip(
            report.scenarios.list, (True, False, None, False), (0.9, 0.9, 0.1, 0.5), strict=True
        )
    ]
    text = unconfirmed(
        report.model_copy(update={"scenarios": report.scenarios.model_copy(update={"list": rows})})
    )
    assert (text or "").startswith("The correction is confirmed on 1 of 3 scenarios. ")
    assert (text or "").endswith(
        "By the judges' labels of the held-out images it may be no better than plain further training (λ = 0) on: 1; "
        "is right on at most half of the images of: 3."
    )
    harmed = rows[1].model_copy(update={"evidence": rows[1].evidence.model_copy(update={"worse": True})})
    some_worse = report.scenarios.model_copy(update={"list": [rows[0], harmed, *rows[2:]]})
    assert unconfirmed(report.model_copy(update={"scenarios": some_worse})) == (
        "The correction is confirmed on 1 of 3 scenarios, and worse than plain further training on 1. By the judges' "
        "labels of the held-out images it is worse than plain further training (λ = 0) on: 1; is right on at most half "
        "of the images of: 3."
    )
    few = [row.model_copy(update={"evidence": None}) for row in rows[1:2]] + rows[:1] + rows[2:3]
    assert (
        unconfirmed(
            report.model_copy(update={"scenarios": report.scenarios.model_copy(update={"list": few})})
        )
        is None
    )


def test_scenarios_of_which_too_few_photographs_were_judged_are_counted(tmp_path: Path):
    report = report_of(sample_findings(3, 3), tmp_path)

    def told(*confirmed: bool | None) -> str | None:
        rows = [
            row.model_copy(
                update={
                    "evidence": ScenarioEvidence.model_construct(
                        confirmed=answer, worse=False, independent_images=4, before=0.1, plain=0.5, defuse=0.9
                    ),
                }
            )
            for row, answer in zip(report.scenarios.list, confirmed, strict=True)
        ]
        scenarios = report.scenarios.model_copy(update={"list": rows})
        return unconfirmed(report.model_copy(update={"scenarios": scenarios}))

    assert (told(None, None, None) or "").startswith(
        "On 3 scenarios the judges agree on too few independent images to tell whether the correction does"
    )
    assert (told(None, False, True) or "").endswith(
        "on: 1. On 1 scenario the judges agree on too few independent images to tell."
    )
    assert told(True, None, None) == (
        "The correction is confirmed on 1 of 1 scenario that can be tested. On 2 scenarios the judges agree on too few "
        "independent images to tell."
    )
    assert told(True, True, True) is None


@pytest.mark.usefixtures("no_figures")
def test_the_silence_of_the_judges_and_of_plain_training_are_told_apart(tmp_path: Path):
    def told(own: list[float], name: str, other: list[float] | None = None) -> tuple[str, str]:
        evidence = sample_evidence(np.array([own, other or own]))
        run = sample_run(tmp_path / name)
        text = unconfirmed(write_report(run, finished_run(*sample_findings(2, 2), evidence))) or ""
        return text, " ".join(run.store.read("report.html").decode().split())

    text, page = told([0.05, 0.6, np.nan, 0.98], "plain")
    assert text.startswith("No plain training finished. ") and text.endswith("(λ = 0); see Exceptions.")
    assert " · no plain training finished</span>" in page and "too few to confirm" not in page
    one_silent = told([0.05, 0.6, np.nan, 0.98], "plain, and judges of one", [np.nan] * 4)[0]
    assert one_silent.startswith("No plain training finished. ")
    text, page = told([np.nan] * 4, "judges")
    assert text.startswith("On 2 scenarios the judges agree on too few independent images to tell whether")
    assert " · judges agree on 0 independent images, too few to confirm</span>" in page
