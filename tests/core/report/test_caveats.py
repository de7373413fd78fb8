"""The headline of a report, and what a reader must know before its figures."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import numpy as np
import pytest
from sample_evidence import sample_evidence
from sample_findings import (
    SAMPLE_CORRECT,
    finished_run,
    report_of,
    sample_findings,
    sample_run,
    sample_watch,
    with_verdicts,
)

from defuse_core.artifacts import DroppedComponent, FailedTrial, Health, ReferenceSet, Sweep
from defuse_core.config import DistillSection, RunFile
from defuse_core.evaluation.undecided import doubts_about_models
from defuse_core.report import caveats, write_report
from defuse_core.report.build import build_report
from defuse_core.report.caveats import (
    answered_by_models,
    caveats_of,
    errors_without_codes,
    headline,
    known_validation_images,
    low_purity,
    made_worse,
    nobody_judged,
    uncompared_models,
    unreviewed_classes,
    worse_judges,
)
from defuse_core.report.correction_caveats import (
    no_better_than_baseline,
    no_better_than_plain_training,
    unconfirmed,
)
from defuse_core.runs import Run
from tests.conftest import ROOT


def with_psi(tmp_path: Path, screened: bool, wrong: int, decoded: int, kept: int):
    report = report_of(sample_findings(3, 2), tmp_path)
    counts = {"screened": screened, "wrong": wrong, "wrong_decoded": decoded, "wrong_kept": kept}
    return report.model_copy(update={"psi": report.psi.model_copy(update=counts)})


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((True, 0, 0, 0), None),
        ((True, 100, 80, 41), None),  # up to 51 %
        ((True, 100, 41, 60), None),
        ((True, 100, 100, 40), "Of 100 training images that it gets wrong, 40 have a failing draw in Ψ, and a scenario "
         "can come from no other. On the others the classifier is right in every draw, or the reference models are "
         "not sure of the class (identify.min_probability), as where the image's label is wrong."),
        ((False, 100, 41, 1), "1 has a failing draw in Ψ, and a scenario can come from no other. On the others the "
         "classifier is right in every draw."),
        ((True, 100, 40, 40), "no other. It gets 60 of them right once they are encoded and decoded, so the β-VAE "
         "does not draw what it fails on"),
    ],
)  # fmt: skip
def test_errors_that_no_scenario_can_come_from_are_told_if_they_are_most(
    counts: tuple[bool, int, int, int], words: str | None, tmp_path: Path
):
    report = with_psi(tmp_path, *counts)
    told = errors_without_codes(report)
    assert told is None if words is None else told is not None and words in told
    assert (told in caveats_of(report, SAMPLE_CORRECT, [])) == (told is not None)


def test_the_headline_states_the_result_and_its_cost(tmp_path: Path):
    found, evaluation = sample_findings(40, 12)
    table = np.array([[np.nan, 0.9897, 0.148], [np.nan, 0.98, 0.5], [np.nan, 0.9905, 0.996]])
    report = report_of((found, dataclasses.replace(evaluation, accuracy=table)), tmp_path)
    assert report.headline == (
        "12 of 40 candidate scenarios are failure scenarios. Accuracy on their held-out images, by the scenario's "
        "label: 14.8 % before, 99.6 % after. Test set: 98.97 % before, 99.05 % after."
    )


@pytest.mark.parametrize(
    ("components", "accepted", "text"),
    [
        (1, 1, "1 of 1 candidate scenario is a failure scenario."),
        (3, 1, "1 of 3 candidate scenarios is a failure scenario."),
        (3, 2, "2 of 3 candidate scenarios are failure scenarios."),
    ],
)
def test_the_headline_counts_scenarios_alike_whether_or_not_they_were_corrected(
    tmp_path: Path, components: int, accepted: int, text: str
):
    report = report_of(sample_findings(components, accepted), tmp_path)
    them = "its" if accepted == 1 else "their"
    assert report.headline.startswith(f"{text} Accuracy on {them} held-out images, ")
    assert headline(report.model_copy(update={"chosen": None}), SAMPLE_CORRECT).startswith(
        f"{text} Nothing was corrected:"
    )


def test_a_headline_without_a_correction_says_how_many_lambdas_failed_and_how_many_cost_too_much(
    tmp_path: Path,
):
    found, evaluation = sample_findings(3, 2)
    some = tuple(row for row in found.sweep.rows if row.lam in (0.1, 10))
    failed = Sweep(some, None, {}, (FailedTrial(1000.0, "diverged"),))
    report = report_of((dataclasses.replace(found, sweep=failed), evaluation), tmp_path)
    assert "corrected: 1 of 3 λ failed, and 2 cost more clean accuracy than" in report.headline


def with_health(sample, verdict: str):
    found, evaluation = sample
    health = Health(1000, 0.97, 0.4, 0.41, 3, 0.6, 1, 10, verdict)
    return dataclasses.replace(found, models=dataclasses.replace(found.models, health=health)), evaluation


@pytest.mark.parametrize("verdict", ["poor", "blind"])
def test_a_beta_vae_that_is_not_fit_gives_a_warning_and_never_the_answer_that_nothing_fails(
    tmp_path: Path, verdict: str
):
    undecided, decided = (
        report_of(with_health(sample_findings(4, accepted), verdict), tmp_path) for accepted in (0, 2)
    )
    assert undecided.headline.startswith(f"Could not tell: the β-VAE is {verdict} (")
    assert "β-VAE" not in " ".join(undecided.caveats)
    assert decided.caveats[0].startswith(
        f"The β-VAE is {verdict} (41 % of the right answers are kept on reconstructions), so its pictures may show "
        "failures of its own. Compare reconstructions.png, and train it longer, or with a smaller vae.beta or "
        "vae.architecture: convolutional"
    )


def test_no_architecture_is_advised_that_the_beta_vae_has_already(tiny_spec: RunFile):
    models = with_health(sample_findings(4, 0), "poor")[0].models
    convolutional = tiny_spec.vae.model_copy(update={"architecture": "convolutional"})
    advised = [
        doubts_about_models(tiny_spec.model_copy(update={"vae": vae}), models, None)[0].split(" or ")[-1]
        for vae in (tiny_spec.vae, convolutional)
    ]
    assert advised == ["vae.architecture: convolutional", "a larger vae.latent_dim"]


def test_a_screen_that_keeps_no_failing_draw_could_not_tell(tmp_path: Path):
    found, evaluation = sample_findings(4, 0)
    psi = dataclasses.replace(found.psi, codes=found.psi.codes * 0, failing=800)
    told = report_of((dataclasses.replace(found, psi=psi), evaluation), tmp_path).headline
    assert told.startswith("Could not tell: the reference models see")
    assert "in none of 800 failing draws" in told


def test_a_fit_beta_vae_gives_no_warning_and_a_plain_answer(tmp_path: Path):
    report = report_of(with_health(sample_findings(4, 0), "fit"), tmp_path)
    assert report.headline.startswith("None of the 4 candidate scenarios")
    assert "β-VAE" not in " ".join(report.caveats)


def test_only_a_low_purity_gives_a_warning(tmp_path: Path):
    sample = sample_findings(2, 2)
    low = report_of(with_verdicts(sample, purity=np.array([0.7, 0.6])), tmp_path)
    high = report_of(with_verdicts(sample, purity=np.array([1.0, 0.9])), tmp_path)
    assert "Purity is 65 %" in (low_purity(low) or "")
    assert low_purity(high) is None


def test_the_warning_of_mixed_images_rests_on_what_was_not_tuned_on(tmp_path: Path):
    sample = with_verdicts(sample_findings(2, 2), purity=np.array([0.7, 0.6]))
    run, evidence = sample_run(tmp_path), sample_evidence(np.array([[0.1, 0.5, 0.5, 0.8]] * 2))
    anchored_vae = run.spec.vae.model_copy(update={"decode": "anchored"})
    anchored = Run(run.store, run.name, run.spec.model_copy(update={"vae": anchored_vae}))

    def warning(of: Run, *judged) -> str:
        return low_purity(build_report(of, finished_run(*sample, *judged))) or ""

    assert "By the annotators' labels, " in warning(run)
    assert (
        "No accuracy by the annotators' labels is independent: the reviewed images are at photographs that"
        in warning(anchored)
    )
    for of in (run, anchored):
        text = warning(of, evidence)
        assert (
            "was right on 10.0 % of them before, and is on 80.0 % now." in text
            and "reviewed images" not in text
        )
    blind = sample_evidence(evidence.scenario_own_label, judges=0.4)
    assert "No accuracy by the annotators' labels is independent" in warning(anchored, blind)


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("decode", ["plain", "anchored"])
def test_the_page_says_where_reviewed_images_are_at_photographs_that_are_tuned_on(tmp_path: Path, decode):
    run = sample_run(tmp_path)
    vae = run.spec.vae.model_copy(update={"decode": decode})
    anchored = Run(run.store, run.name, run.spec.model_copy(update={"vae": vae}))
    write_report(anchored, finished_run(*sample_findings()))
    words = " ".join(anchored.store.read("report.html").decode().split())
    found = "of the failure scenarios, at photographs that are tuned on, by the annotators' labels" in words
    assert found is (decode == "anchored")
    assert found or "of the failure scenarios, by the annotators' labels" in words


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(("judges", "worse"), [(0.46, True), (0.71, False), (0.75, False)])
def test_judges_that_are_worse_than_the_classifier_are_told_and_do_not_open_the_headline(
    tmp_path: Path, judges: float, worse: bool
):
    run, own = sample_run(tmp_path), np.array([[0.1, 0.6, 0.7, 0.9]] * 2)
    report = write_report(
        run, finished_run(*sample_findings(), sample_evidence(own, judges=judges, before=0.72))
    )
    judged = (
        "by the judges' labels: 10.0 % before, 90.0 % after (70.0 % after plain further training, 60.0 % after "
        "tuning on the reviewed failures alone)."
    )
    assert (judged in report.headline) is not worse
    text = worse_judges(report)
    assert report.evidence is not None and report.evidence.judges.worse is worse
    assert (text is not None) is worse and (text in report.caveats) is worse
    page = run.store.read("report.html").decode()
    assert ("On the scenarios, by the judges&#39; labels" in page) is not worse
    assert text is None or "the best of 3 judges gets 46.0 % right, and the classifier before 72.0 %" in text


@pytest.mark.parametrize(("images", "worse"), [(310, False), (2000, True)])
def test_judges_are_not_called_worse_by_chance_on_few_test_images(tmp_path: Path, images: int, worse: bool):
    evidence, (found, evaluation) = sample_evidence(OWN, judges=0.948, before=0.971), sample_findings()
    found = dataclasses.replace(
        found, models=dataclasses.replace(found.models, images=found.models.images | {"test": images})
    )
    report = build_report(sample_run(tmp_path), finished_run(found, evaluation, evidence))
    assert (worse_judges(report) is not None) is worse


@pytest.mark.parametrize("judges", [0.99, 0.9])
def test_scenarios_that_the_correction_makes_worse_are_named_unless_the_judges_are_worse(
    tmp_path: Path, judges: float
):
    own = np.array([[0.1, 0.6, 0.7, 0.9], [0.855, 0.6, 0.7, 0.273]])
    report = build_report(
        sample_run(tmp_path), finished_run(*sample_findings(), sample_evidence(own, judges=judges))
    )
    text = made_worse(report)
    assert [row.evidence.worse_than_before for row in report.scenarios.list if row.evidence] == [False, True]
    assert (text is None) is (judges < 0.95) and (text is None or text in report.caveats)
    told = "The correction makes the classifier worse on 1 scenario."
    assert text is None or (text.startswith(told) and text.endswith(" (85.5 % to 27.3 %)."))


@pytest.mark.parametrize(("references", "told"), [((0.9, 0.8), True), ((0.9, 0.97), False), ((), False)])
def test_reference_models_that_are_worse_than_the_classifier_are_told(
    tmp_path: Path, references: tuple[float, ...], told: bool
):
    found, evaluation = sample_findings()
    known = ReferenceSet(tuple({} for _ in references), 100, np.array(references), np.array(references))
    found = dataclasses.replace(found, references=known)
    evidence = sample_evidence(np.array([[0.1, 0.6, 0.7, 0.9]] * 2))
    told_of = build_report(sample_run(tmp_path), finished_run(found, evaluation, evidence)).caveats
    text = "right on fewer test images (at best 90.0 %) than the classifier (98.3 %), so they may take one for the"
    assert any(text in caveat for caveat in told_of) is told


def test_a_classifier_that_guesses_is_told_before_all_else(tmp_path: Path):
    def guessing(accepted: int):
        found, evaluation = sample_findings(3, accepted)
        one_answer = dataclasses.replace(found.models, class_accuracy={"test": np.eye(10)[0]})
        return report_of((dataclasses.replace(found, models=one_answer), evaluation), tmp_path)

    first = guessing(2).caveats[0]
    assert first.startswith(
        "The classifier is hardly better than guessing (right on 98.3 % of 500 test images, and on"
    )
    assert "10.0 % on average over their 10 classes). Check its weights" in first
    assert not any("guessing" in text for text in report_of(sample_findings(), tmp_path).caveats)
    assert "guessing" in guessing(0).headline
    assert not any("guessing" in text for text in guessing(0).caveats)


def test_a_caveat_appears_where_models_answered_in_place_of_people(tmp_path: Path):
    assert answered_by_models(report_of(sample_findings(answered_by="people"), tmp_path)) is None
    assert "not people" in (answered_by_models(report_of(sample_findings(), tmp_path)) or "")


@pytest.mark.parametrize(
    ("test", "from_training", "told"), [(0.88, True, True), (0.985, True, False), (0.88, False, False)]
)
def test_validation_images_that_the_classifier_knows_are_told(
    test: float, from_training: bool, told: bool, tmp_path: Path
):
    found, evaluation = sample_findings()
    table = np.array([[1.0, test, 0.1], [1.0, test, 0.5], [0.99, test, 0.9]])
    models = dataclasses.replace(found.models, validation_from_training=from_training)
    found = dataclasses.replace(found, models=models)
    report = report_of((found, dataclasses.replace(evaluation, accuracy=table)), tmp_path)
    text = known_validation_images(report)
    assert (text is not None) is told and (text in report.caveats) is told
    assert text is None or "gets 100.0 % of them right and 88.0 % of the test images" in text
    assert text is None or "failing inputs" not in text  # what the watch says of them


def test_a_class_that_fails_in_cells_of_too_few_codes_alone_is_told(tmp_path: Path):
    found, evaluation = sample_findings(2, 0)
    light = DroppedComponent(0.0093, 9, 0, 10, "few codes", "the cell's 30 codes are too few")
    few = dataclasses.replace(light, source=7, cause="few images")
    cells = (light, few, dataclasses.replace(light, source=-1))
    scenarios = dataclasses.replace(found.scenarios, cells=np.array([[8, 9], [8, 3]]), dropped=cells)
    report = report_of((dataclasses.replace(found, scenarios=scenarios), evaluation), tmp_path)
    assert any(
        text
        == "No failure of 9 was reviewed: no cell (class, answer) of such images has over 0.01 of the codes of Ψ. "
        "Lower distill.min_weight."
        for text in report.caveats
    )
    for other in (
        dataclasses.replace(light, answer=5, weight=0.02, cause="unclear"),  # was drawn from
        dataclasses.replace(light, answer=5, weight=0.02, cause="few images"),
        dataclasses.replace(light, cause="few images"),
    ):
        kept = (light, other) if other.answer == 5 else (other,)
        told = dataclasses.replace(scenarios, dropped=kept)
        assert unreviewed_classes(told, found.models.classes, DistillSection()) is None
    names = tuple("b; c" if name == "9" else name for name in found.models.classes)
    doubt = unreviewed_classes(scenarios, names, DistillSection()) or ""
    text = caveats_of(report, SAMPLE_CORRECT, [doubt])[0]
    assert text.startswith("No failure of b; c was reviewed: no cell")
    assert text.endswith(". Lower distill.min_weight.")
    reviewed = dataclasses.replace(scenarios, cells=np.array([[8, 9], [9, 3]]))
    assert unreviewed_classes(reviewed, found.models.classes, DistillSection()) is None


@pytest.mark.parametrize(
    ("of_scenarios", "of_validation", "of_test", "told"),
    [
        (True, False, False, "Validation and test images may show"),
        (True, True, False, "Test images may show"),
        (False, True, False, "Test images may show"),
        (True, True, True, None),
        (False, False, False, None),
        (True, True, None, None),
    ],
)
def test_images_without_tracks_beside_others_with_tracks_are_told(
    of_scenarios: bool, of_validation: bool, of_test: bool | None, told: str | None, tmp_path: Path
):
    """With `of_test` None there are no test images."""
    found, evaluation = sample_findings()
    watch, count = sample_watch(), len(found.scenarios)
    if of_test is None:
        watch = dataclasses.replace(watch, test_wrong=watch.test_wrong[:0])
    watch = dataclasses.replace(
        watch,
        validation_tracks=np.arange(len(watch.validation_wrong)) // 4 if of_validation else None,
        test_tracks=np.arange(len(watch.test_wrong)) // 4 if of_test else None,
    )
    scenarios = dataclasses.replace(
        found.scenarios, source_tracks=np.ones(count, int) if of_scenarios else None
    )
    found = dataclasses.replace(found, scenarios=scenarios)
    written = build_report(sample_run(tmp_path), finished_run(found, evaluation, watch=watch)).caveats
    texts = [text for text in written if "count as independent here" in text]
    assert [text.startswith(told or "") for text in texts] == ([True] if told else [])


OWN = np.array([[0.1, 0.6, 0.7, 0.9]] * 2)  # before, baseline, plain, defuse


def test_without_judges_it_is_told_that_nothing_independent_was_measured(tmp_path: Path):
    alone = report_of(sample_findings(), tmp_path)
    text = nobody_judged(alone) or ""
    assert text.startswith("Nobody judged the correction.") and text in alone.caveats
    assert unconfirmed(alone) is None
    assert nobody_judged(alone.model_copy(update={"chosen": None})) is None
    assert (
        nobody_judged(
            build_report(sample_run(tmp_path), finished_run(*sample_findings(), sample_evidence(OWN)))
        )
        is None
    )


@pytest.mark.parametrize(("judged", "told"), [(0.5, True), (0.85, False)])
def test_a_low_purity_by_the_judges_is_told_where_the_reviewers_see_none(
    tmp_path: Path, judged: float, told: bool
):
    sample = with_verdicts(sample_findings(2, 2), purity=np.array([0.95, 0.95]))
    evidence = dataclasses.replace(sample_evidence(OWN), purity=np.array([judged, 0.4, 0.9]))
    text = low_purity(build_report(sample_run(tmp_path), finished_run(*sample, evidence)))
    assert (text is not None) is told
    assert text is None or text.startswith(
        "Purity by the judges is 50 %. Of the held-out images of the failure"
    )
    worse = dataclasses.replace(evidence, judges=np.full(3, 0.4))
    assert low_purity(build_report(sample_run(tmp_path), finished_run(*sample, worse))) is None


def known_validation(report):
    """The report of a run without test images, whose classifier may know the validation images."""
    images = {"train": 1000, "validation": 200}
    run = report.run.model_copy(update={"validation_from_training": True, "images": images})
    return report.model_copy(update={"run": run})


def test_models_that_cannot_be_compared_with_the_classifier_are_not_called_worse(tmp_path: Path):
    compared = build_report(
        sample_run(tmp_path), finished_run(*sample_findings(), sample_evidence(OWN, judges=0.9))
    )
    assert worse_judges(compared) is not None and uncompared_models(compared) is None
    unknown = sample_evidence(OWN, judges=0.9, before=float("nan"))
    report = known_validation(build_report(sample_run(tmp_path), finished_run(*sample_findings(), unknown)))
    assert worse_judges(report) is None
    text = uncompared_models(report) or ""
    assert text.startswith(
        "It is unknown whether judges and reference models are as accurate as the classifier."
    )
    assert text in caveats_of(report, SAMPLE_CORRECT, ()) and text.endswith("(a folder named test).")


@pytest.mark.parametrize(
    ("parts", "told"),
    [(("train",), True), (("train", "validation"), False), (("train", "test"), False)],
)
def test_without_an_image_that_no_model_was_trained_on_the_judges_accuracy_is_unknown(
    tmp_path: Path, parts: tuple[str, ...], told: bool
):
    report = build_report(sample_run(tmp_path), finished_run(*sample_findings(), sample_evidence(OWN)))
    images = {part: report.run.images[part] for part in parts}
    text = uncompared_models(
        report.model_copy(update={"run": report.run.model_copy(update={"images": images})})
    )
    assert (text is not None) is told
    assert (
        text is None or "classifier. There are neither test nor validation images. Give test images" in text
    )


def test_the_headline_has_what_plain_training_reaches_on_the_test_set(tmp_path: Path):
    report = build_report(sample_run(tmp_path), finished_run(*sample_findings(), sample_evidence(OWN)))
    assert report.headline.endswith(
        "Test set: 98.30 % before, 98.60 % after (98.40 % after plain further training)."
    )


@pytest.mark.parametrize(("choose_by", "told"), [("tune", True), ("validation", True), ("train", False)])
def test_the_headline_says_of_validation_images_whether_they_chose_lambda(
    tmp_path: Path, choose_by: str, told: bool
):
    found, evaluation = sample_findings()
    evaluation.accuracy[:, 1] = np.nan
    text = headline(
        report_of((found, evaluation), tmp_path), SAMPLE_CORRECT.model_copy(update={"choose_by": choose_by})
    )
    assert "Validation set: 98.50 % before, 98.80 % after" in text
    assert text.endswith(" (not independent: λ was chosen on these images).") is told


def test_a_baseline_that_does_as_much_as_the_correction_is_told(tmp_path: Path):
    def told(baseline: float, defuse: float, scenarios: int = 6) -> str | None:
        evidence = sample_evidence(np.array([[0.1, baseline, 0.5, defuse]] * scenarios))
        evidence.real_failure_pairs_with_baseline[:] = [200, 60, 2]
        report = build_report(
            sample_run(tmp_path), finished_run(*sample_findings(scenarios, scenarios), evidence)
        )
        text = no_better_than_baseline(report)
        assert text is None or text in report.caveats
        assert no_better_than_baseline(report.model_copy(update={"chosen": None})) is None
        return text

    assert told(0.7, 0.9) is None  # better on all six
    equal = told(0.9, 0.9) or ""
    assert equal.startswith("Tuning on the 60 reviewed failures alone may do as much for the scenarios.")
    assert "90.0 % after the correction, 90.0 % after tuning on the reviewed failures alone." in equal
    assert "alone does more for the scenarios." in (told(0.9, 0.6) or "")
    assert (told(0.9, 0.9, 2) or "").startswith("There are too few scenarios to tell whether tuning on")


def test_what_unreliable_judges_say_is_in_no_other_caveat(tmp_path: Path):
    def caveats_with(judges: float) -> list[str]:
        evidence = sample_evidence(np.array([[0.1, 0.9, 0.9, 0.9]] * 6), judges=judges)
        report = build_report(sample_run(tmp_path), finished_run(*sample_findings(6, 6), evidence))
        assert (
            unconfirmed(report) and no_better_than_plain_training(report) and no_better_than_baseline(report)
        )
        return report.caveats

    def of_judges(texts: list[str]) -> list[str]:
        return [text for text in texts if "confirmed on" in text or "may do as much" in text]

    assert len(of_judges(caveats_with(0.99))) == 3
    assert of_judges(caveats_with(0.4)) == [] and any(
        "The judges are worse" in text for text in caveats_with(0.4)
    )


@pytest.mark.parametrize(
    "words", ["Could not tell", "None of the", "No failure scenario was found", "Nothing was corrected"]
)
def test_the_readme_says_what_to_do_after_each_headline_that_disappoints(words: str):
    assert words in inspect.getsource(caveats)
    assert f"*{words}" in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
