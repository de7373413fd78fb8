"""The pictures of a report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgba
from sample_findings import sample_findings, sample_run

from defuse_core.artifacts import NONE_OF_THE_ABOVE
from defuse_core.report import write_report
from defuse_core.report.build import build_report
from defuse_core.report.charts import MUTED, RIGHT, WRONG
from defuse_core.report.figures import draw_gallery_rows, move_apart


def test_pictures_are_written_beside_the_page(tmp_path: Path):
    run = sample_run(tmp_path)
    write_report(
        run, *sample_findings(3, 2, classes=("a $\\frac{", "b & c", "[bold]", "long name"), images=3)
    )
    names = {"tradeoff", "lambdas", "latent", "scenarios", "rejected", "kl"}
    assert set(run.store.list("figures/")) == {f"figures/{name}.png" for name in names}
    assert all(run.store.read(key).startswith(b"\x89PNG") for key in run.store.list("figures/"))


def test_right_and_wrong_answers_bear_a_sign_beside_their_colour(tmp_path: Path):
    found, evaluation = sample_findings(1, 1, images=4)
    labels = found.verdicts.image_labels.copy()
    labels[0, 0] = NONE_OF_THE_ABOVE
    found = replace(found, verdicts=replace(found.verdicts, image_labels=labels))
    report = build_report(sample_run(tmp_path), found, evaluation)
    figure = draw_gallery_rows(report, found, evaluation, accepted=True)
    assert figure is not None
    boxed = [text for text in figure.axes[0].texts if text.get_bbox_patch() is not None]
    signs = {"✓": RIGHT, "✗": WRONG}
    for text, label in zip(boxed, labels[0].repeat(2), strict=True):
        sign = text.get_text().strip("0123456789")
        assert text.get_bbox_patch().get_facecolor() == to_rgba(signs.get(sign, MUTED))
        assert (sign == "") == (label == NONE_OF_THE_ABOVE)
        assert (sign == "✓") == (text.get_text() == f"✓{label}")


def test_where_nothing_was_corrected_an_image_has_one_answer(tmp_path: Path):
    found, evaluation = sample_findings(1, 1, images=4)
    found = replace(found, sweep=replace(found.sweep, chosen=None, weights={}))
    figure = draw_gallery_rows(
        build_report(sample_run(tmp_path), found, evaluation), found, evaluation, accepted=True
    )
    assert figure is not None
    texts = figure.axes[0].texts
    assert len([text for text in texts if text.get_bbox_patch() is not None]) == 4
    assert any("answer before; " in text.get_text() for text in texts)


def test_marks_that_coincide_are_moved_apart():
    points = np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [50.0, 0.0]])
    moved = move_apart(points, 10)
    gaps = np.linalg.norm(moved[:, None] - moved[None], axis=2)[np.triu_indices(4, 1)]
    assert gaps.min() > 9.5
    assert np.abs(moved[3] - points[3]).max() < 0.01
