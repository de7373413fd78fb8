"""The page: complete, loaded from nowhere, and safe with any class name."""

from __future__ import annotations

import dataclasses
import itertools
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from sample_evidence import sample_evidence
from sample_findings import (
    finished_run,
    report_of,
    sample_findings,
    sample_run,
    sample_watch,
    with_verdicts,
)

from defuse_core.artifacts import FailedTrial, Override, Votes
from defuse_core.data.images import data_address
from defuse_core.evaluation.describe import NearestReal
from defuse_core.report import write_report
from defuse_core.report.html import _real_tiles, render_real
from defuse_core.review.verdicts import decide_verdicts
from defuse_core.runs import Run
from tests.sample_components import review_section

HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "$\\frac{", "a & b [bold]")


class Page(HTMLParser):
    """Elements and their attributes, as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A written report in which everything that comes from outside tries to be HTML."""
    found, evaluation = sample_findings(3, 2, classes=HOSTILE, images=3)
    override = Override(0, 0, author=HOSTILE[0], reason=HOSTILE[1], when=HOSTILE[0])
    found, _ = with_verdicts((found, evaluation), overrides=(override,), reasons=(HOSTILE[0],) * 3)
    discarded = {"scenario": 0, "image": 1, "annotator": HOSTILE[0], "why": HOSTILE[1]}
    notes = {HOSTILE[0]: HOSTILE[1], "prelabel": HOSTILE[0], "discarded_answers": [discarded]}
    found = dataclasses.replace(
        found,
        votes=dataclasses.replace(found.votes, notes=notes),
        sweep=dataclasses.replace(found.sweep, failed=(FailedTrial(1.0, HOSTILE[0]),)),
    )
    run = sample_run(tmp_path_factory.mktemp("hostile"))
    write_report(run, finished_run(found, evaluation))
    return run


def test_text_from_the_run_is_escaped(hostile: Run):
    page = Page(hostile.store.read("report.html").decode())
    assert not [tag for tag, _ in page.elements if tag == "script"]
    assert not [attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)]
    assert HOSTILE[0] in page.words


def test_the_page_loads_nothing_from_elsewhere(hostile: Run):
    page = Page(hostile.store.read("report.html").decode())
    linked = [
        attrs[key] for _, attrs in page.elements for key in ("src", "href", "xlink:href") if attrs.get(key)
    ]
    assert linked
    assert all(str(address).startswith(("data:image/", "#")) for address in linked)


def test_ids_in_the_page_are_unique(hostile: Run):
    ids = [
        attrs["id"] for _, attrs in Page(hostile.store.read("report.html").decode()).elements if "id" in attrs
    ]
    assert len(ids) == len(set(ids))


def test_every_review_image_is_described_for_those_who_cannot_see_it(hostile: Run):
    page = Page(hostile.store.read("report.html").decode())
    texts = [attrs.get("alt") or "" for tag, attrs in page.elements if tag == "img"]
    assert len(texts) == 9
    assert all("annotators: " in text and "before: " in text for text in texts)


def test_every_chart_has_a_name_for_those_who_cannot_see_it(hostile: Run):
    page = Page(hostile.store.read("report.html").decode())
    before = [attrs for (_, attrs), (tag, _) in itertools.pairwise(page.elements) if tag == "svg"]
    assert len(before) == 4
    assert all(attrs.get("role") == "img" and attrs.get("aria-label") for attrs in before)


def test_every_colour_of_a_chart_has_its_meaning_beside_it(hostile: Run):
    text = " ".join(" ".join(Page(hostile.store.read("report.html").decode()).words).split())
    assert "KL divergence to the prior. Shaded: collapsed, the dimension carries almost no" in text
    meaning = "one colour per class of the training images, numbers are those of the candidate scenarios."
    assert f"t-SNE of latent codes; {meaning} Only short distances have a meaning." in text


def test_right_and_wrong_answers_differ_in_more_than_their_colour(hostile: Run):
    page = hostile.store.read("report.html").decode()
    badges = {
        attrs["class"] for tag, attrs in Page(page).elements if "badge before" in str(attrs.get("class"))
    }
    assert {"badge before right", "badge before wrong"} <= badges
    for kind, mark in (("right", "✓"), ("wrong", "✗")):
        assert f'.shot .{kind}::before {{ content: "{mark}";' in page
    labels, answers = ("circle", "square"), ("circle", "circle")
    shown = render_real(np.zeros((2, 1, 8, 8), np.float32), labels, answers, "Nearest")
    assert ">✓ circle</span>" in shown and ">✗ circle</span>" in shown and ">square</span>" in shown


@pytest.mark.parametrize(
    ("scenarios", "text"), [(2, "None of the 2 candidate scenarios"), (0, "No failure scenario")]
)
def test_a_run_without_failure_scenarios_still_has_a_report(tmp_path: Path, scenarios: int, text: str):
    run = sample_run(tmp_path)
    report = write_report(run, finished_run(*sample_findings(scenarios, 0)))
    assert report.headline.startswith(text)
    assert text in run.store.read("report.html").decode()


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("gained", "lost", "colour", "told"),
    [
        (19, 15, "quiet", "+19\u00a0−15 images, p\u00a0=\u00a00.61"),
        (30, 5, "good", "+30\u00a0−5 images, p\u00a0=\u00a02.2e-05"),
    ],
)
def test_a_gain_on_the_test_set_stands_beside_plain_training_and_has_a_colour_only_where_it_is_more(
    tmp_path: Path, gained: int, lost: int, colour: str, told: str
):
    evidence = sample_evidence(np.array([[0.1, 0.6, 0.7, 0.9]] * 2))
    evidence.test_pairs_with_before[:] = [500, 90, 39]  # against the classifier before: plain gains as much
    evidence.test_pairs[:] = [500, gained, lost]
    run = sample_run(tmp_path)
    write_report(run, finished_run(*sample_findings(), evidence))
    page = run.store.read("report.html").decode()
    tiles = page.split("Accuracy on the test set")[1].partition("<nav>")[0]
    plain = "98.40\u00a0% after plain further training<br>against the strongest of 2: "
    assert f'<span class="{colour}">+0.30 points</span><br>{plain}{told}' in tiles
    assert "Plain further training (λ = 0)" in page.split('id="result"')[1].partition("</section>")[0]


@pytest.mark.usefixtures("no_figures")
def test_test_images_of_one_track_are_counted_as_that_track(tmp_path: Path):
    evidence = sample_evidence(np.array([[0.1, 0.6, 0.7, 0.9]] * 2))
    evidence.test_pairs[:] = evidence.test_pairs_with_before[1] = [10, 0, 1]
    evidence = dataclasses.replace(evidence, plain_each=evidence.plain_each[:, :1])
    run = sample_run(tmp_path)
    write_report(run, finished_run(*sample_findings(), evidence))
    page = run.store.read("report.html").decode()
    assert "after plain further training<br>against it +0\u00a0−1 tracks, p\u00a0=\u00a01</div>" in page
    assert "<dt>test tracks, Defuse</dt><dd>+0 −1, p\u00a0=\u00a01</dd>" in page
    assert "<dt>test tracks, Defuse against plain further training</dt>" in page
    alone = dataclasses.replace(
        evidence, own_label=np.where(np.arange(4)[:, None] == 2, np.nan, evidence.own_label)
    )
    write_report(run, finished_run(*sample_findings(), alone))  # without a plain training
    page = run.store.read("report.html").decode()
    assert (
        "<dt>test tracks, Defuse</dt><dd>+0 −1, p\u00a0=\u00a01</dd>" in page
        and "Defuse against plain" not in page
    )


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(("lost", "colour"), [(6, "bad"), (5, "quiet")])
def test_a_loss_on_the_test_set_has_a_colour_where_it_is_no_chance(tmp_path: Path, lost: int, colour: str):
    found, evaluation = sample_findings()
    evidence = sample_evidence(np.array([[0.1, 0.6, 0.7, 0.9]] * 2))
    evidence.test_pairs_with_before[1] = [500, 0, lost]
    evaluation.accuracy[2, 1] = evaluation.accuracy[0, 1] - 0.003
    run = sample_run(tmp_path)
    write_report(run, finished_run(found, evaluation, evidence))
    tiles = run.store.read("report.html").decode().split("Accuracy on the test set")[1].partition("<nav>")[0]
    assert f'<span class="{colour}">−0.30 points</span>' in tiles


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("seen", "testable", "errors", "words"),
    [
        (True, True, 0.02, "seen in real images"),
        (False, True, 0.02, "not seen in real images"),
        (False, False, 0.02, "real images cannot tell"),
        (False, False, 0.0, "no real image of its class is wrong"),
    ],
)
def test_a_card_does_not_say_that_failures_are_not_in_real_data_where_nothing_shows_it(
    tmp_path: Path, seen: bool, testable: bool, errors: float, words: str
):
    evidence = sample_evidence(np.array([[0.1, 0.6, 0.7, 0.9]] * 2))
    evidence.real.seen[:], evidence.real.testable[:], evidence.real.error_of_label[:] = seen, testable, errors
    run = sample_run(tmp_path)
    write_report(run, finished_run(*sample_findings(), evidence))
    page = run.store.read("report.html").decode()
    assert page.count(f"<span>{words}: error 10\u00a0% on the nearest real images") == 2
    untold = "" if testable else ", 2 where these cannot tell"
    shown = "2 also" if seen else "none"
    assert f" failure scenarios ({shown} seen in real images{untold}).</h1>" in page


def test_the_page_names_no_chosen_correction_where_every_lambda_costs_too_much(tmp_path: Path):
    found, evaluation = sample_findings(3, 2)
    rows = {}
    for name, sweep in (("chosen", found.sweep), ("none", dataclasses.replace(found.sweep, chosen=None))):
        run = sample_run(tmp_path / name)
        write_report(run, finished_run(dataclasses.replace(found, sweep=sweep), evaluation))
        text = " ".join(" ".join(Page(run.store.read("report.html").decode()).words).split())
        assert "One point per λ, at the epoch that the rule of choice picks;" in text
        rows[name] = (
            "Defuse 2" in text,
            "ringed point" in text,
            "Shaded: the chosen λ" in text,
            "none was chosen" in text,
        )
    assert rows == {"chosen": (True, True, True, False), "none": (False, False, False, True)}


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"choose_by": "tune", "max_loss": 0.01},
            "of all λ that lose at most 1 point of the validation accuracy, that cost no class significantly more than "
            "10 points on training or on validation images, and that are within one point of the highest "
            "accuracy on the scenario images tuned on, the one of highest validation accuracy. A loss that is "
            "not significant (95 %) is allowed",
        ),
        ({"choose_by": "train"}, "The rule of choice: the highest training accuracy."),
    ],
)
def test_the_page_says_by_which_rule_lambda_is_chosen(tmp_path: Path, changes: dict[str, object], words: str):
    run = sample_run(tmp_path)
    run.spec = run.spec.with_fields("correct", **changes)
    write_report(run, finished_run(*sample_findings(3, 2)))
    text = " ".join(" ".join(Page(run.store.read("report.html").decode()).words).split())
    assert words in text
    assert "during fine-tuning; accuracies on these are by the scenario's label." in text


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("anchored", "parts", "words"),
    [
        (
            False,
            ("train", "test"),
            "accuracy, that cost no class significantly more than 5 points on training images, and",
        ),
        (
            True,
            ("train", "validation"),
            "significantly more than 5 points on validation images alone, and that are",
        ),
        (
            True,
            ("train", "test"),
            "0.5 points of the training accuracy and that are within one point of the highest",
        ),
    ],
)
def test_the_page_states_a_limit_per_class_on_the_images_that_count_for_it(
    tmp_path: Path, anchored: bool, parts: tuple[str, ...], words: str
):
    (found, evaluation), run = sample_findings(3, 2), sample_run(tmp_path)
    models = dataclasses.replace(
        found.models,
        images={part: found.models.images[part] for part in parts},
        class_accuracy={},
        health=dataclasses.replace(found.models.health, anchored=anchored),
    )
    write_report(run, finished_run(dataclasses.replace(found, models=models), evaluation))
    text = " ".join(" ".join(Page(run.store.read("report.html").decode()).words).split())
    assert words in text
    assert ("A loss that is not significant (95 %) is allowed" in text) is ("significantly more" in words)


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("separation", "words"),
    [(3.0, "Finds failing inputs by max-softmax"), (0.0, "No method finds failing inputs: the AUROC")],
)
def test_the_page_says_whether_failing_inputs_are_found(tmp_path: Path, separation: float, words: str):
    run = sample_run(tmp_path)
    report = write_report(run, finished_run(*sample_findings(2, 1, images=2), watch=sample_watch(separation)))
    page = Page(run.store.read("report.html").decode())
    assert report.watch is not None and (report.watch.method is None) == words.startswith("No method")
    text = " ".join(" ".join(page.words).split())
    assert "Finding failing inputs" in text and words in text and "All methods" in text
    served = "When the corrected classifier is served, "
    assert (f"{served}each answer gets a failure probability" in text) is (report.watch.method is not None)
    without = "its answers have no failure probability (failure_probability is null), for this reason:"
    assert (f"{served}{without} No method" in text) is (report.watch.method is None)


@pytest.mark.usefixtures("no_figures")
def test_the_notes_of_the_annotators_are_shown(tmp_path: Path):
    found, evaluation = sample_findings(2, 1, answered_by="people")
    refused = {
        "scenario": 1,
        "image": None,
        "annotator": "annotator-7",
        "annotation": 9,
        "why": "no label was chosen",
    }
    notes = {"answers_saved": 58, "decided_early": [0, 1], "discarded_answers": [refused]}
    notes |= {"prelabel": "annotators saw the models' answer", "pseudonyms": ["annotator-8"]}
    found = dataclasses.replace(found, votes=dataclasses.replace(found.votes, notes=notes))
    run = sample_run(tmp_path)
    report = write_report(run, finished_run(found, evaluation))
    text = " ".join(" ".join(Page(run.store.read("report.html").decode()).words).split())
    assert "answers saved 58 decided early scenarios 0, 1" in text
    assert "1 answer not counted:" in text
    assert "annotator-7 no label was chosen" in text and "annotator-8" not in text
    assert "annotators saw the models' answer" in text
    assert any(caveat.startswith("Answers were preselected.") for caveat in report.caveats)


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(("early", "words"), [([0], "scenario 0"), ([], "none")])
def test_images_without_an_answer_are_counted_apart(tmp_path: Path, early: list[int], words: str):
    found, evaluation = sample_findings(1, 1, answered_by="people")
    scenario, image, annotator = np.indices((1, 6, 5)).reshape(3, -1)
    answers, when = np.full(30, 4), np.zeros(30)
    found.gallery.predicted[:] = 9
    votes = Votes(
        scenario, image, annotator, answers, when, tuple("abcde"), "people", {"decided_early": early}
    )
    verdicts = decide_verdicts(review_section(), found.gallery, votes)
    run = sample_run(tmp_path)
    report = write_report(
        run, finished_run(dataclasses.replace(found, votes=votes, verdicts=verdicts), evaluation)
    )
    assert report.scenarios.purity == 1
    text = " ".join(" ".join(Page(run.store.read("report.html").decode()).words).split())
    assert f"no class chosen 0 no label, no answer 4 decided early {words}" in text
    assert "the classifier is taught. Images without an answer are left out." in text


@pytest.mark.usefixtures("no_figures")
def test_images_whose_label_is_not_the_majoritys_are_counted_on_the_page_and_in_a_caveat(tmp_path: Path):
    found, evaluation = sample_findings(3, 2)
    assert not [text for text in report_of((found, evaluation), tmp_path).caveats if "majority's" in text]
    labels = found.verdicts.image_labels.copy()
    labels[0, 0] = (labels[0, 0] + 1) % len(found.models.classes)
    verdicts = dataclasses.replace(found.verdicts, image_labels=labels)
    run = sample_run(tmp_path / "overruled")
    report = write_report(run, finished_run(dataclasses.replace(found, verdicts=verdicts), evaluation))
    assert report.votes.not_majority == 1
    (caveat,) = [text for text in report.caveats if text.startswith("Not every label is the majority's.")]
    assert " 1 of " in caveat and " has a label that" in caveat
    text = " ".join(" ".join(Page(run.store.read("report.html").decode()).words).split())
    assert "label is not the majority's 1" in text


@pytest.mark.usefixtures("no_figures")
def test_a_page_with_rejected_candidates_alone_explains_what_their_images_show(tmp_path: Path):
    run = sample_run(tmp_path)
    write_report(run, finished_run(*sample_findings(2, 0, classes=tuple(f"class {n}" for n in range(10)))))
    text = " ".join(" ".join(Page(run.store.read("report.html").decode()).words).split())
    assert "Classifier's answer, before: ✓ the annotators' label ✗ another class" in text
    assert "Numbers on the images are class numbers 0 class 0 1 class 1" in text
    assert "if it differs from the scenario's" not in text


def test_no_real_images_are_shown_where_none_has_the_scenarios_label():
    nothing = np.zeros((2, 12), np.int64)
    pixels = np.repeat(np.arange(24, dtype=np.uint8), 16).reshape(2, 12, 1, 4, 4)
    real = NearestReal(
        pixels, nothing, nothing, np.array([0.5, np.nan]), 0.1, *np.zeros((2, 2), np.bool_), np.zeros(2)
    )
    assert [len(_real_tiles(("circle", "square"), real, column)) for column in (0, 1)] == [12, 0]


def test_each_real_image_is_shown_once_where_a_class_has_few():
    pixels = np.resize(np.arange(5 * 16, dtype=np.uint8).reshape(5, 1, 4, 4), (1, 12, 1, 4, 4))
    nothing, answers = np.zeros((1, 12), np.int64), np.resize([1, 0, 0, 0, 0], (1, 12))
    real = NearestReal(
        pixels, nothing, answers, np.array([0.2]), 0.1, *np.zeros((2, 1), np.bool_), np.zeros(1)
    )
    tiles = _real_tiles(("circle", "square"), real, 0)
    assert [tile.before.kind for tile in tiles] == ["wrong", "right", "right", "right", "right"]
    assert [tile.address for tile in tiles] == [
        data_address(image / np.float32(255)) for image in pixels[0, :5]
    ]
