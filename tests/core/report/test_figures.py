"""The pictures of a report."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from sample_findings import report_of, sample_findings

from defuse_core.report.figures import draw_figures, draw_kl, move_apart


def test_equal_findings_give_equal_pictures(tmp_path: Path):
    sample = sample_findings(3, 2, classes=("a $\\frac{", "b & c", "[bold]", "long name"), images=3)
    pictures = draw_figures(report_of(sample, tmp_path), *sample)
    assert set(pictures) == {"tradeoff", "lambdas", "latent", "kl"}
    assert all(picture.startswith("<svg") for picture in pictures.values())
    assert draw_figures(report_of(sample, tmp_path), *sample) == pictures


def test_the_users_settings_of_matplotlib_change_no_picture(tmp_path: Path):
    sample = sample_findings(3, 2)
    pictures = draw_figures(report_of(sample, tmp_path), *sample)
    with mpl.rc_context({"text.usetex": True, "axes.grid": True, "lines.linewidth": 5}):
        settings = dict(mpl.rcParams)
        assert draw_figures(report_of(sample, tmp_path), *sample) == pictures
        assert dict(mpl.rcParams) == settings


def test_figure_5_names_the_classifier_before_and_the_chosen_lambda(tmp_path: Path):
    sample = sample_findings(2, 1)
    picture = draw_figures(report_of(sample, tmp_path), *sample)["tradeoff"]
    assert picture.count(">before</text>") == 1 and picture.count(">λ = ") == 1


def test_figure_5_says_by_whose_label_the_accuracy_on_scenarios_is(tmp_path: Path):
    sample = sample_findings(2, 1)
    pictures = draw_figures(report_of(sample, tmp_path), *sample)
    assert ">accuracy on held-out scenario images, by the scenario's label</text>" in pictures["tradeoff"]
    assert ">by the scenario's label</text>" in pictures["lambdas"]


@pytest.mark.parametrize("collapsed", [0, 44])
def test_collapsed_dimensions_are_shaded_also_where_there_are_too_many_for_figures(
    tmp_path: Path, collapsed: int
):
    found, evaluation = sample_findings(2, 1)
    kl = np.concatenate([np.full(collapsed, 0.001), np.linspace(2, 0.2, 64 - collapsed)])
    models = dataclasses.replace(found.models, kl_per_dimension=kl)
    report = report_of((dataclasses.replace(found, models=models), evaluation), tmp_path)
    *bars, shade = [patch.get_extents() for patch in draw_kl(report).axes[0].patches]
    assert len(bars) == (64 if collapsed else 63)
    if collapsed:
        assert bars[19].x1 < shade.x0 < bars[20].x0 and bars[63].x1 < shade.x1


def test_marks_that_coincide_are_moved_apart():
    points = np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [50.0, 0.0]])
    moved = move_apart(points, 10)
    gaps = np.linalg.norm(moved[:, None] - moved[None], axis=2)[np.triu_indices(4, 1)]
    assert gaps.min() > 9.5
    assert np.abs(moved[3] - points[3]).max() < 0.01
