"""The report: figures against numbers worked out by hand, and a page that no class name can break."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sample_findings import sample_findings, sample_spec

from defuse_core.artifacts import NONE_OF_THE_ABOVE, Evaluation, FailedTrial, Override, Sweep, SweepRow
from defuse_core.evaluate import Findings
from defuse_core.report import Report, build_report, write_report
from defuse_core.report.figures.style import spread_apart
from defuse_core.report.figures.tradeoff import clusters
from defuse_core.report.formatting import (
    answered_by_models,
    caveats,
    change,
    duration,
    headline,
    lam_text,
    purity_warning,
    runs_text,
    size,
)
from defuse_core.report.html.markup import picture
from defuse_core.runs import Run
from defuse_core.store import FolderStore

HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "$\\frac{", "a & b [bold]")
Sample = tuple[Findings, Evaluation]


def a_run(folder: Path) -> Run:
    return Run(FolderStore(folder), "sample", sample_spec())


def report_of(sample: Sample, folder: Path) -> Report:
    return build_report(a_run(folder), *sample)


def with_verdicts(sample: Sample, **changes: object) -> Sample:
    found, evaluation = sample
    return dataclasses.replace(found, verdicts=dataclasses.replace(found.verdicts, **changes)), evaluation


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
    found = dataclasses.replace(
        found,
        votes=dataclasses.replace(found.votes, notes={HOSTILE[0]: HOSTILE[1]}),
        sweep=dataclasses.replace(found.sweep, failed=(FailedTrial(1.0, HOSTILE[0]),)),
    )
    run = a_run(tmp_path_factory.mktemp("hostile"))
    write_report(run, found, evaluation)
    return run


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


def test_purity_is_the_mean_over_accepted_scenarios_alone(tmp_path: Path):
    sample = with_verdicts(
        sample_findings(3, 2),
        labels=np.array([1, 2, NONE_OF_THE_ABOVE]),
        purity=np.array([0.5, 0.8, 0.1]),
    )
    assert report_of(sample, tmp_path).scenarios.purity == pytest.approx(0.65)


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
    tradeoff = report_of((found, evaluation), tmp_path).tradeoff
    assert [(r.lam, r.epoch, r.test, r.scenario, r.chosen) for r in tradeoff] == [
        (0.1, 2, 0.82, 0.52, False),
        (10.0, 1, 0.83, 0.53, True),
    ]
    assert tradeoff[0].validation is None


def test_a_scenario_is_mistaken_for_the_most_frequent_answer_but_its_label(tmp_path: Path):
    sample = sample_findings(1, 1, images=6)
    sample[0].gallery.predicted[:] = [[4, 4, 4, 9, 9, 7]]
    none = NONE_OF_THE_ABOVE  # three images bear another label than the scenario's and are answered with it
    sample = with_verdicts(sample, labels=np.array([4]), image_labels=np.array([[3, 3, 3, none, 4, 4]]))
    report = report_of(sample, tmp_path)
    assert report.scenarios.list[0].mistaken_for == "9"
    assert report.votes.misclassified == 1


def test_a_rejected_component_is_mistaken_for_nothing(tmp_path: Path):
    assert report_of(sample_findings(1, 0), tmp_path).scenarios.list[0].mistaken_for is None


def test_counts_of_identification_become_shares(tmp_path: Path):
    psi = report_of(sample_findings(), tmp_path).psi
    assert (psi.codes, psi.images_with_any, psi.zero_noise_flip_rate) == (516, 0.12, 0.07)


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


def test_report_json_has_the_names_that_others_build_on(hostile: Run):
    tree = json.loads(hostile.store.read("report.json"))
    assert tree["annotators"] == "reference models"
    assert set(tree["accuracy"]["defuse"]) == {"validation", "test", "scenario"}
    assert {"components", "accepted", "purity", "own_labels", "list"} == set(tree["scenarios"])
    assert {"lam", "epoch", "test", "scenario"} <= set(tree["tradeoff"][0])
    assert {"codes", "images_with_any", "zero_noise_flip_rate"} <= set(tree["psi"])
    assert {"reconstruction", "kl_per_dimension", "reconstruction_flips"} <= set(tree["vae"])
    assert {"class", "before", "baseline", "defuse"} <= set(tree["per_class"][0])
    assert Report.model_validate(tree).scenarios.components == 3


def test_text_from_outside_stays_text(hostile: Run):
    page = Page(hostile.store.read("report.html").decode())
    assert not [tag for tag, _ in page.elements if tag == "script"]
    assert not [attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)]
    assert HOSTILE[0] in page.words


def test_the_page_fetches_nothing(hostile: Run):
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


def test_pictures_are_written_beside_the_page(hostile: Run):
    names = {"tradeoff", "lambdas", "latent", "scenarios", "rejected", "kl", "weights", "curves"}
    assert set(hostile.store.list("figures/")) == {f"figures/{name}.png" for name in names}
    assert all(hostile.store.read(key).startswith(b"\x89PNG") for key in hostile.store.list("figures/"))


@pytest.mark.parametrize(("scenarios", "said"), [(2, "None of the 2 components"), (0, "No failure scenario")])
def test_a_run_without_failure_scenarios_still_has_a_report(tmp_path: Path, scenarios: int, said: str):
    run = a_run(tmp_path)
    report = write_report(run, *sample_findings(scenarios, 0))
    assert headline(report).startswith(said)
    assert said in run.store.read("report.html").decode()
    assert "figures/scenarios.png" not in run.store.list()


def test_equal_findings_give_equal_files_except_for_how_they_were_made(tmp_path: Path):
    first, second = a_run(tmp_path / "first"), a_run(tmp_path / "second")
    entry = {"step": "train", "made": "2025-01-01T00:00:00Z", "seconds": 1.5, "bytes": 10}
    second.store.write("manifest.json", json.dumps({"artefacts": {"models": entry}}).encode())
    for run in (first, second):
        write_report(run, *sample_findings(2, 1, images=2))
    trees = [json.loads(run.store.read("report.json")) for run in (first, second)]
    assert trees[0].pop("making") != trees[1].pop("making")
    assert trees[0] == trees[1]
    for key in first.store.list("figures/"):
        assert first.store.read(key) == second.store.read(key)


def test_the_headline_tells_what_was_found_and_what_it_cost(tmp_path: Path):
    found, evaluation = sample_findings(40, 12)
    table = np.array([[np.nan, 0.9897, 0.148], [np.nan, 0.98, 0.5], [np.nan, 0.9905, 0.996]])
    report = report_of((found, dataclasses.replace(evaluation, accuracy=table)), tmp_path)
    assert headline(report) == (
        "12 of 40 components are failure scenarios. On them the classifier goes from 14.8 % to 99.6 %; "
        "on the test set from 98.97 % to 99.05 %."
    )


def test_low_purity_is_warned_of_and_high_purity_is_not(tmp_path: Path):
    sample = sample_findings(2, 2)
    low = report_of(with_verdicts(sample, purity=np.array([0.7, 0.6])), tmp_path)
    high = report_of(with_verdicts(sample, purity=np.array([1.0, 0.9])), tmp_path)
    assert "Purity is 65 %" in (purity_warning(low) or "")
    assert purity_warning(high) is None


def test_only_models_are_announced_as_not_being_people(tmp_path: Path):
    assert answered_by_models(report_of(sample_findings(answered_by="people"), tmp_path)) is None
    assert "not people" in (answered_by_models(report_of(sample_findings(), tmp_path)) or "")


def test_what_annotators_want_told_is_told(tmp_path: Path):
    found, evaluation = sample_findings(2, 1, answered_by="people")
    refused = {
        "scenario": 1,
        "image": None,
        "annotator": "annotator-7",
        "annotation": 9,
        "why": "no label was chosen",
    }
    notes = {"answers_saved": 58, "decided_early": [0, 1], "refused_answers": [refused]}
    notes["prelabel"] = "annotators saw the models' answer"
    found = dataclasses.replace(found, votes=dataclasses.replace(found.votes, notes=notes))
    run = a_run(tmp_path)
    report = write_report(run, found, evaluation)
    said = " ".join(" ".join(Page(run.store.read("report.html").decode()).words).split())
    assert "answers saved 58 decided early 0, 1" in said
    assert "1 answer not counted:" in said
    assert "annotator-7 no label was chosen" in said
    assert "annotators saw the models' answer" in said
    assert caveats(report)[0].startswith("Answers were preselected.")


@pytest.mark.parametrize(
    ("lam", "said"),
    [(0.0, "0"), (1e-10, "10⁻¹⁰"), (2.5e-7, "2.5·10⁻⁷"), (0.001, "0.001"), (20.0, "20"), (1000.0, "1000")],
)
def test_lambda_is_written_as_people_write_it(lam: float, said: str):
    assert lam_text(lam) == said


def test_neighbouring_lambdas_share_one_range():
    assert runs_text([0.1, 1, 2, 5, 10], [0, 1, 2, 4]) == "0.1 – 2, 10"
    assert runs_text([0.1, 1, 2, 5, 10], [0, 1, 3]) == "0.1, 1, 5"


def test_quantities_are_written_as_people_write_them():
    assert [duration(s) for s in (0.42, 59.6, 185, 7800)] == [
        "0.4 s",
        "1 min 00 s",
        "3 min 05 s",
        "2 h 10 min",
    ]
    assert [size(n) for n in (12, 1500, 12_300_000, 4.5e9)] == ["12 B", "1.5 kB", "12 MB", "4.5 GB"]
    assert [change(0.9, x) for x in (0.91, 0.89, 0.9, None)] == ["+1.00", "−1.00", "±0.00", ""]


def test_marks_that_coincide_are_moved_apart():
    points = np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [50.0, 0.0]])
    moved = spread_apart(points, 10)
    gaps = np.linalg.norm(moved[:, None] - moved[None], axis=2)[np.triu_indices(4, 1)]
    assert gaps.min() > 9.5
    assert np.abs(moved[3] - points[3]).max() < 0.01


def test_points_linked_by_small_gaps_are_one_cluster():
    points = np.array([[0.0, 0], [5, 0], [0.9, 0], [1.8, 0]])
    assert clusters(points, 1.0) == [[0, 2, 3], [1]]


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


@pytest.mark.parametrize(("side", "kind", "error"), [(32, "png", 0.002), (128, "jpeg", 0.1)])
def test_small_pictures_are_kept_exactly_and_large_ones_compressed(side: int, kind: str, error: float):
    ramp = np.linspace(0, 1, side, dtype=np.float32)
    pixels = np.stack(np.broadcast_arrays(ramp, ramp[:, None], np.float32(0.5)))
    head, _, data = picture(pixels).partition(";base64,")
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) / 255
    assert head == f"data:image/{kind}"
    assert np.abs(shown.transpose(2, 0, 1) - pixels).max() <= error
