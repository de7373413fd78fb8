"""How many draws of each component are taken to tune on, how wide they are, and that no two of a run are the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from defuse_core.artifacts import (
    I64,
    NONE_OF_THE_ABOVE,
    Anchors,
    ComponentFailures,
    Corrections,
    Scenarios,
    Verdicts,
)
from defuse_core.config import RunFile
from defuse_core.distill.draws import Draws
from defuse_core.local import LocalCompute
from defuse_core.protocols import silent
from defuse_core.review.sample import (
    filter_corrections,
    sample_corrections,
    sample_gallery,
    sample_more_images,
    with_used_anchors,
)
from tests.conftest import recommended
from tests.sample_components import sample_scenarios

LABEL, TAU = 3, 0.1


class HalfSpace:
    """Reference models that see LABEL where the first number of a code is over `limit`, and no class elsewhere."""

    def __init__(self, spec: RunFile, scenarios: Scenarios, limit: float) -> None:
        self.spec, self.scenarios, self.limit, self.examined = spec, scenarios, limit, list[Draws]()

    def unanimous(self, draws: Draws) -> tuple[I64, I64]:
        self.examined.append(draws)
        seen = np.where(draws.codes[:, 0] > self.limit, LABEL, NONE_OF_THE_ABOVE)
        return np.zeros(len(draws), np.int64), seen

    by_majority = unanimous


def twins(anchored: bool = False, mean: float = 0.0) -> Scenarios:
    """Two components with the same mean, covariance and failures."""
    two, images = np.full(2, 0.5), np.arange(8)
    failures = None
    if anchored:
        pixels = np.random.default_rng(0).integers(256, size=(8, 1, 16, 16)).astype(np.uint8)
        codes = np.stack([np.random.default_rng(0).normal(scale=9, size=(8, 4)).astype(np.float32)] * 2)
        failures = ComponentFailures(
            codes, np.stack([images] * 2), Anchors(pixels, 100 + images, images % 2 == 1)
        )
    means, covariances = np.full((2, 4), mean), np.stack([np.eye(4)] * 2)
    return sample_scenarios(two, means, covariances, two, 100, True, 5, -1.0, failures=failures)


def accepted(count: int = 2) -> Verdicts:
    labels, ones = np.full(count, LABEL), np.ones(count)
    own = np.full((count, 5), LABEL)
    return Verdicts(
        labels, ones, ones, own, np.ones((count, 5)), 0, 0, ("yes",) * count, (), np.full(count, 5)
    )


def spec_of(images: int = 12, widen: float = 1.0, **changes) -> RunFile:
    correct = {"widen": widen, "tune_images": images, "test_images": 9}
    return recommended(review={"tau": TAU, "more_images": 7}, correct=correct, **changes)


def filtered(models: HalfSpace, fixes: Corrections) -> Corrections:
    return filter_corrections(models, fixes, LocalCompute())  # type: ignore[arg-type]


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("widen", [1.0, 4.0])
def test_no_draw_of_a_run_is_that_of_another_component_purpose_or_seed(tiny_models, anchored, widen):
    scenarios, unit = twins(anchored), list[np.ndarray]()
    for seed in (0, 1):
        spec = spec_of(widen=widen).model_copy(update={"seed": seed})
        gallery = sample_gallery(spec, tiny_models, scenarios, progress=silent)
        nobody = HalfSpace(spec, scenarios, np.inf)
        sample_more_images(nobody, np.array([True] * 2), progress=silent)  # type: ignore[arg-type]
        fixes = sample_corrections(spec, scenarios, accepted())
        more = [draws.codes for draws in nobody.examined]
        nobody.examined.clear()
        assert (fixes.tune.shape, fixes.test.shape) == ((2, 12, 4), (2, 9, 4))
        filtered(nobody, fixes)
        wide = [
            draws.codes for draws in nobody.examined
        ]  # first, three times as many, and as reviewed; of both
        assert [len(codes) for codes in wide] == [12, 36, 12] * 2
        plain = [*gallery.codes, *more, *fixes.test, wide[2], wide[5]]
        unit += plain + [codes / np.sqrt(widen) for codes in (wide[0], wide[1], wide[3], wide[4])]
    every = np.concatenate(unit).round(4)
    assert len(np.unique(every, axis=0)) == len(every)


@pytest.mark.parametrize(
    ("limit", "asked"),
    [
        (-np.inf, [12]),  # all show the label
        (0.0, [12, 36]),  # half of them do
        (3.5 * TAU**0.5, [12, 36, 12]),  # hardly any does
    ],
)
def test_further_draws_are_taken_only_while_too_few_show_the_label_and_those_that_do_are_repeated_in_turn(
    limit, asked
):
    spec, scenarios = spec_of(widen=4.0), twins()
    models = HalfSpace(spec, scenarios, limit)
    fixes = sample_corrections(spec, scenarios, accepted(1))
    kept = filtered(models, fixes)
    assert [len(draws) for draws in models.examined] == asked
    np.testing.assert_array_equal(models.examined[0].codes, fixes.tune[0])
    codes = np.concatenate([draws.codes for draws in models.examined])
    usable = codes[codes[:, 0] > limit]
    np.testing.assert_array_equal(kept.tune[0], np.stack([usable[n % len(usable)] for n in range(12)]))
    assert kept.kept[0] == (fixes.tune[0, :, 0] > limit).mean()


def test_further_draws_are_as_wide_as_the_first_and_then_as_the_reviewed_ones():
    spec, scenarios = spec_of(images=2000, widen=16.0), twins()
    models = HalfSpace(spec, scenarios, np.inf)
    filtered(models, sample_corrections(spec, scenarios, accepted(1)))
    variances = [draws.codes.var() for draws in models.examined]
    assert variances == pytest.approx([16 * TAU, 16 * TAU, TAU], rel=0.05)


def test_further_draws_are_of_the_scenarios_own_component_and_label():
    scenarios = twins(mean=0.0)
    scenarios.means[1] = 9.0
    spec = spec_of()
    models = HalfSpace(spec, scenarios, 9.0)  # half of the draws of the second component, none of the first
    fixes = sample_corrections(spec, scenarios, accepted())
    second = Corrections(fixes.scenario[1:], fixes.labels[1:], fixes.tune[1:], fixes.test[1:])
    kept = filtered(models, second)
    assert kept.tune[0, :, 0].min() > 9.0 and len(models.examined) == 2
    other = Corrections(fixes.scenario[1:], fixes.labels[1:] + 1, fixes.tune[1:], fixes.test[1:])
    assert filtered(models, other).kept.tolist() == [0.0]


@pytest.mark.parametrize(("agreeing", "told"), [(0, True), (1, True), (2, False), (20, False)])
def test_a_label_that_less_than_a_tenth_of_the_images_show_is_in_doubt(caplog, agreeing, told):
    models = HalfSpace(spec_of(images=20), twins(), 50.0)
    codes = np.zeros((1, 20, 4), np.float32)
    codes[0, :agreeing, 0] = 99.0
    fixes = Corrections(np.array([1]), np.array([LABEL]), codes, codes)
    assert filtered(models, fixes).kept.tolist() == [agreeing / 20]
    assert ("the label of scenario 1" in caplog.text) is told


def test_images_to_tune_on_stay_at_the_images_that_they_were_drawn_at():
    spec, scenarios = spec_of(), twins(anchored=True)
    fixes = sample_corrections(spec, scenarios, accepted())
    kept = filtered(HalfSpace(spec, scenarios, 0.0), fixes)
    assert (kept.tune.shape[1], kept.test.shape[1]) == (12, 9)
    assert scenarios.failures is not None and kept.tune_anchor is not None
    for codes, anchors in zip(kept.tune, kept.tune_anchor, strict=True):
        near = np.sqrt(1 - TAU) * scenarios.failures.codes[0][anchors]
        assert np.abs(codes - near).max() < 6 * np.sqrt(TAU) and (codes[:, 0] > 0).all()
    assert not (kept.tune_anchor % 2).any()


def test_filtering_no_scenario_keeps_none_and_no_image():
    scenarios = twins(anchored=True)
    kept = filtered(HalfSpace(spec_of(), scenarios, 0.0), with_no_draws(scenarios))
    assert kept.kept.tolist() == []
    found = with_used_anchors(kept)
    assert found.anchors is not None and len(found.anchors.source) == 0


def with_no_draws(scenarios: Scenarios) -> Corrections:
    assert scenarios.failures is not None
    nothing, codes, anchor = (
        np.zeros(0, np.int64),
        np.zeros((0, 12, 4), np.float32),
        np.zeros((0, 12), np.int64),
    )
    anchors = scenarios.failures.anchors
    return Corrections(
        nothing, nothing, codes, codes, anchors=anchors, tune_anchor=anchor, test_anchor=anchor
    )


def test_each_scenario_is_filtered_by_its_own_label():
    fixes = sample_corrections(spec_of(), twins(), accepted())
    fixes = replace(fixes, labels=np.array([LABEL + 1, LABEL]))
    kept = filtered(HalfSpace(spec_of(), twins(), 0.0), fixes).kept
    assert kept.tolist() == [0.0, (fixes.tune[1, :, 0] > 0).mean()] and kept[1] > 0
