"""What single sections of the page say: scenario cards, the choice of λ, provenance."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sample_evidence import sample_evidence
from sample_findings import finished_run, report_of, sample_findings, sample_run, sample_spec, sample_watch

from defuse_core.artifacts import Failures
from defuse_core.evaluation.evidence import Evidence
from defuse_core.formatting import decimal
from defuse_core.report import write_report
from defuse_core.runs import Run
from defuse_core.store import FolderStore

pytestmark = pytest.mark.usefixtures("no_figures")


def words_of(page: bytes) -> str:
    return " ".join(page.decode().replace("\u00a0", " ").split())


@pytest.mark.parametrize(
    ("own", "told", "coloured"),
    [
        ([0.1, 0.6, 0.9, 0.9], " · not confirmed", False),
        ([0.1, 0.6, 0.9, 0.3], " · <b>worse than plain further training</b>", True),
        ([0.9, 0.6, 0.4, 0.4], " · not confirmed", True),  # worse than before
    ],
)
def test_only_a_scenario_that_is_worse_is_red(tmp_path: Path, own: list[float], told: str, coloured: bool):
    run = sample_run(tmp_path)
    evidence = sample_evidence(np.array([own]))
    evidence.worse[:] = own[3] < own[2]
    write_report(run, finished_run(*sample_findings(2, 1), evidence))
    card = words_of(run.store.read("report.html")).split('id="scenario-0"')[1].split("</article>")[0]
    assert told in card
    assert ('<span class="bad">' in card) is coloured
    assert '<div class="reason">accepted as ' in card  # as text, which a tooltip is not everywhere


@pytest.mark.parametrize(("moved", "times"), [(0.0, 1), (0.02, 2)])
def test_equal_accuracies_of_a_scenario_are_shown_once(moved: float, times: int, tmp_path: Path):
    run, sample = sample_run(tmp_path), sample_findings(2, 1)
    row = report_of(sample, tmp_path / "same").scenarios.list[0]
    own = np.array([[row.before + moved, 0.5, 0.5, row.defuse]])
    write_report(run, finished_run(*sample, sample_evidence(own)))
    card = words_of(run.store.read("report.html")).split('id="scenario-0"')[1].split("</article>")[0]
    assert card.count(" → ") == times


@pytest.mark.parametrize(("recall", "strict"), [((0.3, 0.25, 0.35), True), ((0.97, 0.96, 0.98), False)])
def test_the_screen_is_called_strict_only_where_it_keeps_few(
    tmp_path: Path, recall: tuple[float, ...], strict: bool
):
    run = sample_run(tmp_path)
    evidence = replace(sample_evidence(np.array([[0.1, 0.6, 0.9, 0.9]])), screen_recall=np.array(recall))
    write_report(run, finished_run(*sample_findings(2, 1), evidence))
    text = words_of(run.store.read("report.html"))
    sentence = (
        "of the failing draws from test images, in all of which the judges see the class, it would keep"
    )
    assert (f"of its image. It is strict: {sentence}" in text) is strict
    assert (f"of its image. O{sentence[1:]}" in text) is not strict


def test_the_page_says_by_which_images_a_lambda_is_chosen(tmp_path: Path):
    run = sample_run(tmp_path)
    write_report(run, finished_run(*sample_findings()))
    text = words_of(run.store.read("report.html"))
    assert "λ is chosen on validation images and on the scenario images tuned on; test images" in text


def test_an_artefact_that_took_no_time_since_it_was_made_with_another_has_an_empty_cell(tmp_path: Path):
    run = sample_run(tmp_path)
    made = (("correct", "baseline", 61.0), ("correct", "sweep", 0.004), ("report", "plain", 0.0))
    for step, name, seconds in made:
        run._note(step, name, seconds, b"", {})
    write_report(run, finished_run(*sample_findings()))
    text = words_of(run.store.read("report.html"))
    assert '<td class="n">1 min 01 s</td>' in text and text.count('<td class="n"></td>') >= 2
    assert "0.0 s" not in text


def test_the_title_of_the_page_is_the_first_sentence_of_the_headline(tmp_path: Path):
    run = sample_run(tmp_path)
    write_report(run, finished_run(*sample_findings(4, 2)))
    page = words_of(run.store.read("report.html"))
    assert (
        "<h1>2 of 4 candidate scenarios are failure scenarios.</h1> <p>Accuracy on their held-out images"
        in page
    )


def test_the_parts_of_the_data_are_in_the_order_of_their_use(tmp_path: Path):
    run = sample_run(tmp_path)
    write_report(run, finished_run(*sample_findings()))
    assert "1,000 train, 200 validation, 500 test" in words_of(run.store.read("report.html"))


def test_where_nothing_was_corrected_no_figure_is_after_the_correction(tmp_path: Path):
    run, (found, evaluation) = sample_run(tmp_path), sample_findings(6, 4)
    found = replace(found, sweep=replace(found.sweep, chosen=None, weights={}))
    evidence = sample_evidence(np.tile([0.07, 0.5, 0.7, 0.07], (4, 1)))
    report = write_report(
        run,
        finished_run(found, evaluation, replace(evidence, purity=np.array([0.6, 0.5, 0.7])), sample_watch()),
    )
    assert set(report.accuracy.defuse.model_dump().values()) == {report.scenarios.own_labels.defuse} == {None}
    after = {row.defuse for row in (*report.scenarios.list, *report.per_class)}
    assert after == {None} and not any(row.loses_too_much for row in report.per_class)
    text = words_of(run.store.read("report.html"))
    assert text.count("nothing was corrected</div>") == 2
    assert '<div class="figure">98.30 %</div><div class="was">nothing was corrected</div>' in text
    assert "of the held-out images the classifier was right on 7.0 % of them before.</p>" in text
    assert "Nothing was corrected. If the classifier were served, each answer would get" in text
    assert (
        "– now" not in text
        and "→" not in text
        and "after (right)" not in text
        and 'class="badge after' not in text
    )


@pytest.mark.parametrize(("candidates", "left"), [(0, []), (2, ["agreement"])])
def test_a_section_without_a_figure_is_left_out(candidates: int, left: list[str], tmp_path: Path):
    run = sample_run(tmp_path)
    write_report(run, finished_run(*sample_findings(candidates, 0), sample_evidence(np.zeros((0, 4)))))
    page = words_of(run.store.read("report.html"))
    for form in ('id="{}"', 'href="#{}"'):
        assert [name for name in ("evidence", "tradeoff", "agreement") if form.format(name) in page] == left


@pytest.mark.parametrize("size", [32, 64])
def test_images_of_64_pixels_and_more_are_shown_larger(tmp_path: Path, size: int):
    run = Run(FolderStore(tmp_path), "sample", sample_spec(image_size=size))
    write_report(run, finished_run(*sample_findings(2, 1, side=size)))
    assert ('class="shots large"' in words_of(run.store.read("report.html"))) is (size == 64)


@pytest.mark.parametrize(
    ("kept", "judged", "unfiltered", "left_out"),
    [([0.0, 0.5], True, True, True), ([0.2, 0.5], True, False, True), ([0.0, 0.0], False, True, False)],
)
def test_the_page_says_which_draws_to_tune_on_are_left_out(
    tmp_path: Path, kept: list[float], judged: bool, unfiltered: bool, left_out: bool
):
    run, (found, evaluation) = sample_run(tmp_path), sample_findings(3, 2)
    fixes = replace(found.fixes, kept=np.array(kept))
    evidence = sample_evidence(np.tile([0.07, 0.5, 0.7, 0.9], (2, 1))) if judged else None
    write_report(run, finished_run(replace(found, fixes=fixes), evaluation, evidence))
    text = words_of(run.store.read("report.html"))
    assert ("whose label they see in no draw is tuned on unfiltered draws." in text) is unfiltered
    assert ("In the measurement with left-out scenarios, draws in their regions are not" in text) is left_out


def shown_images(page: bytes) -> list[tuple[str | None, tuple[int, int]]]:
    """Format and size of each image of a page."""
    found = re.findall(r'src="data:image/\w+;base64,([^"]+)"', page.decode())
    pictures = [Image.open(io.BytesIO(base64.b64decode(each))) for each in found]
    return [(picture.format, picture.size) for picture in pictures]


def test_a_page_of_too_many_bytes_of_images_shows_smaller_ones_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    found, evaluation = sample_findings(3, 2, images=4, side=144)
    noise = np.random.default_rng(0).random(found.gallery.images.shape, np.float32)
    found = replace(found, gallery=replace(found.gallery, images=noise))
    evidence = sample_evidence(np.array([[0.1, 0.6, 0.9, 0.9]] * 2))
    pages = []
    for name, limit in (("whole", 10**8), ("reduced", 10**5)):
        monkeypatch.setattr("defuse_core.report.html.IMAGE_BYTES", limit)
        monkeypatch.setattr("defuse_core.report.html.SHOWN_REAL", 1)
        run = sample_run(tmp_path / name)
        write_report(run, finished_run(found, evaluation, evidence))
        pages.append(run.store.read("report.html"))
    whole, reduced = pages
    assert sorted(size for _, size in shown_images(whole)) == [(32, 32)] * 2 + [(144, 144)] * 12
    assert sorted(shown_images(reduced)) == [("JPEG", (32, 32))] + [("JPEG", (112, 112))] * 12
    assert len(reduced) < len(whole)
    told = (
        "They are shown as JPEGs of at most 112 pixels a side, and the nearest real images of the first 1 "
        "scenarios alone; gallery.safetensors of this run has the reviewed images as they were."
    )
    assert told in words_of(reduced) and "as they were" not in words_of(whole)


def page_with(evidence: Evidence, folder: Path) -> str:
    run = sample_run(folder)
    write_report(run, finished_run(*sample_findings(2, 1), evidence, sample_watch()))
    return words_of(run.store.read("report.html"))


def test_a_long_class_name_without_spaces_stays_in_its_place_and_badges_keep_their_colour_on_paper(
    tmp_path: Path,
):
    style = page_with(sample_evidence(np.array([[0.1, 0.6, 0.9, 0.9]])), tmp_path).partition("</style>")[0]
    for selector in (".scenario > *", "td:first-child"):
        (rule,) = re.findall(rf"[}}/] {re.escape(selector)} {{([^}}]*)}}", style)
        assert "overflow-wrap: anywhere;" in rule
    assert (
        ".badge, .meter, .meter i { -webkit-print-color-adjust: exact; print-color-adjust: exact; }" in style
    )
    narrow = style.partition("@media (max-width: 760px)")[2].partition("@media")[0]
    assert "figure svg { min-width: 560px; }" in narrow and "figure > div { overflow-x: auto; }" in narrow


def test_tables_and_charts_that_are_wider_than_the_screen_have_a_shadow_there_and_none_on_paper(
    tmp_path: Path,
):
    style = page_with(sample_evidence(np.array([[0.1, 0.6, 0.9, 0.9]])), tmp_path).partition("</style>")[0]
    screen, _, paper = style.partition("@media print")
    *_, shown = re.findall(r"\.scroll, figure > div {([^}]*)}", screen)
    # the cover scrolls with the content, and hides the shadow at its end
    assert re.search(r"var\(--card\) 70%\) right / [^,]* local, [^;]*var\(--shadow\)[^;]* scroll,", shown)
    assert style.count("--shadow: #") == 2  # light and dark
    assert ".scroll, figure > div { background: var(--card); }" in paper


def test_what_a_card_says_is_explained_before_the_first_card(tmp_path: Path):
    text = page_with(sample_evidence(np.array([[0.1, 0.6, 0.9, 0.9]])), tmp_path)
    lead = text.split('id="scenarios"')[1].partition("<article")[0]
    fault = (
        "<i>At fault</i> is the classifier where at least 90 % of the held-out images show the scenario's label, by "
        "the judges, and it is wrong on over 50 % of them; the β-VAE where less than 50 % show it.</p>"
    )
    assert f"<i>Weight</i> is the component's share of the failing codes. {fault}" in lead


def test_the_page_says_from_which_probability_an_answer_is_flagged(tmp_path: Path):
    run = sample_run(tmp_path)
    report = write_report(run, finished_run(*sample_findings(2, 1), watch=sample_watch()))
    text = words_of(run.store.read("report.html"))
    assert report.watch is not None and report.watch.threshold is not None
    flagged = f"An answer is flagged from a failure probability of {decimal(report.watch.threshold, 2)} on."
    assert f"{flagged} An AUROC of 0.5 is chance, 1 is perfect.</p> <details>" in text


def test_a_run_without_failing_draws_from_test_images_does_not_speak_of_them(tmp_path: Path):
    evidence = sample_evidence(np.array([[0.1, 0.6, 0.9, 0.9]]))
    assert (
        "failing draws" in page_with(evidence, tmp_path / "some").split('id="evidence"')[1].split("<dl>")[0]
    )
    none = np.zeros((2, 3), np.int64)
    evidence = replace(
        evidence, real_failure_images=0, real_failure_pairs=none, real_failure_pairs_with_baseline=none[0]
    )
    without = page_with(evidence, tmp_path / "none")
    section = without.split('id="evidence"')[1].split("<dl>")[0]
    assert "failing draws" not in section and "0 test images" not in section
    assert "label the held-out images and the wider draws, not those that were reviewed" in section


def test_the_range_of_the_plain_trainings_of_a_scenario_has_the_digits_of_their_mean(tmp_path: Path):
    evidence = sample_evidence(np.array([[0.1, 0.6, 0.957, 0.99]]))
    assert "plain further training 95.7 % (95.7–95.7 %)" in page_with(evidence, tmp_path)


@pytest.mark.parametrize(
    ("drawn", "words"), [(1, "draw</b> that nobody reviewed is"), (2, "draws</b> that nobody reviewed are")]
)
def test_unreviewed_failing_draws_are_counted(tmp_path: Path, drawn: int, words: str):
    run, (found, evaluation) = sample_run(tmp_path), sample_findings(2, 1)
    zeros = np.zeros(drawn, np.int64)
    unreviewed = Failures(np.zeros((drawn, 3), np.float32), zeros, zeros, zeros + 1, zeros > 0)
    fixes = replace(found.fixes, unreviewed=unreviewed)
    write_report(run, finished_run(replace(found, fixes=fixes), evaluation))
    assert f"{drawn} failing {words} tuned on" in words_of(run.store.read("report.html"))


@pytest.mark.parametrize(
    ("kept_on_average", "page"),
    [
        (None, "get 95.0 % of what was right without noise still"),
        (0.667, "get 66.7 % of what was right without noise, on average over the classes, still"),
    ],
)
def test_the_share_that_an_anchored_vae_keeps_is_the_one_that_its_verdict_rests_on(
    kept_on_average: float | None, page: str, tmp_path: Path
):
    (found, evaluation), run = sample_findings(), sample_run(tmp_path)
    measured = {"kept_right": 0.95, "kept_on_average": kept_on_average}
    health = replace(found.models.health, anchored=True, judged_by="reference models", **measured)
    found = replace(found, models=replace(found.models, health=health))
    write_report(run, finished_run(found, evaluation))
    assert page in words_of(run.store.read("report.html"))
