from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from torch import Tensor

from defuse_core.artifacts import NONE_OF_THE_ABOVE, Anchors, ComponentFailures, Scenarios
from defuse_core.data import open_splits
from defuse_core.distill.draws import Draws, draw_codes, truncated_codes
from defuse_core.local import LocalCompute
from defuse_core.models import Vae, load_vae
from defuse_core.protocols import ROWS_PER_TASK, Call, silent
from defuse_core.review.sample import Examiner
from defuse_core.review.tighten import TAUS, find_taus, tighten, with_taus
from defuse_core.seeds import generator
from tests.conftest import recommended, tiny
from tests.sample_components import sample_scenarios

SPEC = tiny(review={"tau": "auto", "purity": 0.9, "failing": 0.5})


def one_component(width=2) -> Scenarios:
    one = np.ones(1)
    return sample_scenarios(
        one,
        np.zeros((1, width)),
        np.eye(width)[None],
        one,
        100,
        True,
        1,
        0.0,
        cells=np.array([[8, 3]]),
        support=np.array([40]),
    )


def tightened(examine) -> Scenarios:
    return with_taus(SPEC, one_component(), find_taus(SPEC, one_component(), range(1), examine, silent))


def ball(radius: float):
    """Within `radius` of the origin images show class 8, outside class 1; the classifier answers 3 everywhere."""

    def examine(draws):
        inside = np.linalg.norm(draws.codes, axis=1) < radius
        return np.full(len(inside), 3), np.where(inside, 8, 1)

    return examine


def test_a_component_is_drawn_as_widely_as_it_stays_pure():
    taus = [tightened(ball(radius)).taus[0] for radius in (0.5, 1.0, 100.0)]
    assert taus[0] < taus[1] < taus[2] == 1
    codes = truncated_codes(np.zeros(2), taus[1] * np.eye(2), generator(0, "test").standard_normal((4000, 2)))
    assert (ball(1.0)(Draws(codes))[1] == 8).mean() >= 0.9


def test_a_component_that_is_impure_at_its_mean_is_dropped_with_its_cell_and_support():
    def halves(draws):
        return np.full(len(draws.codes), 3), np.where(draws.codes[:, 0] > 0, 8, 1)

    found = tightened(halves)
    assert len(found) == 0
    (dropped,) = found.dropped
    assert (dropped.source, dropped.answer, dropped.support) == (8, 3, 40)
    assert "90 % are required" in dropped.reason
    assert dropped.cause == "unclear"


def test_a_component_that_the_classifier_gets_right_is_dropped():
    found = tightened(lambda draws: (np.full(len(draws.codes), 8),) * 2)
    assert len(found) == 0
    assert "at τ = 0.015625 f is wrong on 0 of 64 labelled draws" in found.dropped[0].reason
    assert found.dropped[0].cause == "right"


def test_a_dropped_component_is_right_only_where_it_is_pure_and_wrong_on_few_at_every_tau():
    def wrong_on(share, of_wide):
        """The classifier is wrong on such a share of the draws, and of those at τ over 0.5."""

        def examine(draws):
            wide = np.linalg.norm(draws.codes, axis=1).max() > 1.3
            count = round((of_wide if wide else share) * len(draws.codes))
            return np.where(np.arange(len(draws.codes)) < count, 3, 8), np.full(len(draws.codes), 8)

        return examine

    for shares, right in (((0.05, 0.05), True), ((0.3, 0.3), False), ((0.05, 0.3), False)):
        (dropped,) = tightened(wrong_on(*shares)).dropped
        assert (dropped.cause == "right") is right


def test_a_dropped_component_is_right_where_just_rho_of_its_draws_are_wrong():
    spec = tiny(review={"tau": "auto", "purity": 0.9, "failing": 0.5, "rho": 0.5})
    for wrong, right in ((32, True), (33, False)):
        answers = np.where(np.arange(64) < wrong, 3, 8), np.full(64, 8)
        (found,) = find_taus(spec, one_component(), range(1), lambda draws: answers, silent)  # noqa: B023
        assert found.tau is None and found.right is right


def test_each_component_that_is_kept_has_its_own_tau():
    (one,) = find_taus(SPEC, one_component(), range(1), ball(100.0), silent)
    three = one_component().take(np.array([0, 0, 0]))
    found = with_taus(SPEC, three, [one._replace(tau=tau) for tau in (1.0, None, 0.25)])
    assert found.taus.tolist() == [1.0, 0.25] and len(found.dropped) == 1


def found_at_any_tau(pure: int, wrong: int, labelled: int = 64, **review) -> float | None:
    """Return the τ where so many of 64 draws show class 8, the other labelled ones class 1, and `wrong` fail."""
    labels = np.where(np.arange(64) < pure, 8, np.where(np.arange(64) < labelled, 1, NONE_OF_THE_ABOVE))
    answers = np.where(np.arange(64) < wrong, 3, np.where(labels == NONE_OF_THE_ABOVE, 8, labels))
    spec = tiny(review={"tau": "auto", "purity": 0.9, "failing": 0.5} | review)
    (found,) = find_taus(spec, one_component(), range(1), lambda draws: (answers, labels), silent)
    return found.tau


def test_requirements_are_on_the_lower_bounds_of_the_shares():
    # Wilson's bounds of 60/64 and 63/64: 0.87 and 0.93; of 36/64 and 40/64: 0.46 and 0.52; of 20/20: 0.88
    assert found_at_any_tau(pure=60, wrong=64) is None
    assert found_at_any_tau(pure=63, wrong=64) == 1
    assert found_at_any_tau(pure=64, wrong=36) is None
    assert found_at_any_tau(pure=64, wrong=40) == 1
    assert found_at_any_tau(pure=20, wrong=20, labelled=20, purity=0.2) == 1
    # what has no label is not wrong, nor is what has another one that the classifier gives, too
    assert found_at_any_tau(pure=40, wrong=10, labelled=40, purity=0.4) is None
    assert found_at_any_tau(pure=40, wrong=20, purity=0.4) is None


def test_what_rho_rejects_is_not_found_whatever_share_is_asked_for():
    assert found_at_any_tau(pure=64, wrong=36, failing=0.1, rho=0.5) is None
    assert found_at_any_tau(pure=64, wrong=36, failing=0.1, rho=0.4) == 1
    spec = tiny(review={"tau": "auto", "purity": 0.9, "failing": 0.1, "rho": 0.5})
    answers = np.where(np.arange(64) < 36, 3, 8), np.full(64, 8)
    (found,) = find_taus(spec, one_component(), range(1), lambda draws: answers, silent)
    assert found.last.reason(spec).endswith("at least 46 % (95 % confidence), and 50 % are required")


def test_draws_near_failures_are_examined_within_the_ellipsoid_that_they_are_drawn_from():
    anchors = Anchors(np.zeros((2, 1, 4, 4), np.uint8), np.arange(2), np.array([False, True]))
    failures = ComponentFailures(np.zeros((1, 40, 2), np.float32), np.arange(40)[None] % 2, anchors)
    seen = []

    def examine(draws):
        seen.append(draws)
        return np.full(len(draws.codes), 8), np.full(len(draws.codes), 8)

    scenarios = replace(one_component(), failures=failures)
    find_taus(SPEC, scenarios, range(1), examine, silent)
    widest = (seen[0].codes ** 2).sum(axis=1).max()
    assert 2 < widest < stats.chi2.ppf(0.9, 2)
    assert set(seen[0].anchors.tolist()) == {0}  # the image that is not held out


def test_a_component_that_fails_around_its_mean_and_not_at_it_is_kept():
    def ring(draws):
        outside = np.linalg.norm(draws.codes, axis=1) > 0.3
        return np.where(outside, 3, 8), np.full(len(outside), 8)

    assert tightened(ring).taus[0] == 1


def test_each_component_is_examined_on_draws_of_its_own_that_follow_from_the_seed():
    seen = []

    def examine(draws):
        seen.append(draws.codes.tobytes())
        return np.full(len(draws.codes), 3), np.full(len(draws.codes), 8)

    for seed in (0, 1):
        spec = SPEC.model_copy(update={"seed": seed})
        find_taus(spec, one_component().take(np.array([0, 0])), range(2), examine, silent)
    assert len(set(seen)) == len(seen) == 4


def test_draws_without_a_label_count_against_purity():
    found = tightened(
        lambda draws: (np.full(len(draws.codes), 3), np.full(len(draws.codes), NONE_OF_THE_ABOVE))
    )
    assert len(found) == 0


@pytest.mark.parametrize("width", [1, 2, 10])
def test_truncated_draws_stay_within_the_ellipsoid_of_ninety_percent(width):
    normal = generator(0, "test").standard_normal((2000, width))
    codes = truncated_codes(np.zeros(width), 4 * np.eye(width), normal)
    far = np.sort((normal**2).sum(axis=1))[int(0.93 * len(normal))]
    assert ((codes / 2) ** 2).sum(axis=1).max() < far
    np.testing.assert_allclose(codes.mean(axis=0), 0, atol=0.15)


def test_components_without_a_tau_of_their_own_are_not_drawn_at_auto():
    with pytest.raises(ValueError, match="needs components with a tau each"):
        draw_codes(SPEC, one_component(), 0, 5, generator(0, "test"))
    own = one_component().take(np.array([0]), taus=np.array(TAUS[-1:]))
    assert np.linalg.norm(draw_codes(SPEC, own, 0, 50, generator(0, "test")).codes, axis=1).max() < 0.5


def test_tasks_that_share_the_components_show_one_figure():
    eight = one_component().take(np.zeros(8, np.int64))
    shown = []
    compute = LocalCompute(lambda what, done, total, unit: shown.append((done, total)))
    calls = [Call(tighten_some, eight, rows) for rows in (range(3), range(3, 8))]
    assert sum(map(len, compute.tasks("distill", calls))) == 8
    assert shown == [(done, 8) for done in (0, 1, 2, 3, 3, 4, 5, 6, 7, 8)]


def tighten_some(scenarios, rows, *, progress):
    return find_taus(SPEC, scenarios, rows, ball(1.0), progress)


def test_a_dropped_component_that_is_impure_around_its_mean_is_not_right_though_it_is_pure_farther_out():
    def examine(draws):
        wide = np.linalg.norm(draws.codes, axis=1).max() > 1.3
        labels = np.where(np.arange(len(draws.codes)) % 2, 8, 8 if wide else 1)
        return labels, labels

    (dropped,) = tightened(examine).dropped
    assert dropped.cause == "unclear"


class CountedEncodings:
    """A β-VAE that counts the images that it encodes."""

    def __init__(self, vae: Vae) -> None:
        self.vae, self.decode, self.images = vae, vae.decode, 0

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.images += len(images)
        return self.vae.encode(images)


def test_each_photograph_is_encoded_once_for_its_component_and_not_for_the_others(
    tiny_models, references, monkeypatch
):
    spec = recommended(vae={"decode": "anchored"})
    vae = CountedEncodings(load_vae(spec, tiny_models.vae))
    monkeypatch.setattr("defuse_core.review.sample.load_vae", lambda *asked: vae)
    components, own = 2 * ROWS_PER_TASK, 4
    pixels = open_splits(spec.data, spec.seed).train.batch(slice(0, components * own))
    source = np.arange(len(pixels))
    failures = ComponentFailures(
        np.random.default_rng(0).standard_normal((components, 64, 4)).astype(np.float32),
        np.arange(components)[:, None] * own + np.arange(64) % own,
        Anchors(pixels, source, source % 2 == 1),
    )
    one, means = np.ones(components) / components, np.zeros((components, 4))
    covariances = np.broadcast_to(np.eye(4), (components, 4, 4)).copy()
    scenarios = sample_scenarios(one, means, covariances, one, 100, True, 1, 0.0, failures=failures)
    tighten(Examiner(spec, tiny_models, references, scenarios), LocalCompute())
    assert vae.images == components * own // 2  # the other half is held out
