"""Versions, who answers, and who put them there."""

from __future__ import annotations

import dataclasses
import threading

import pytest

from defuse_core.errors import CheckFailed, InputError
from defuse_core.runs import Run
from services.serving.candidate import prepare
from services.serving.promotion import How, promote, share_of
from services.serving.registry import Registry
from services.serving.rollout import end_trial, roll_back

ANA = How(by="ana", why="for a test")


@pytest.fixture
def registry(own_store):
    return Registry(own_store)


@pytest.fixture
def candidates(own_store):
    return {name: prepare(Run.open(own_store, name))[1] for name in ("first", "second", "swapped")}


def test_a_promoted_candidate_becomes_version_1_with_who_when_and_why(registry, candidates):
    standing = promote(registry, candidates["first"], ANA)
    assert (standing.production, standing.by, standing.why, standing.canary) == (1, "ana", "for a test", None)
    assert registry.standing() == standing and standing.when.endswith("Z")
    assert registry.load(1).digest == candidates["first"].digest
    assert registry.standing().versions[1].run == "first"


def test_equal_weights_are_one_version(registry, candidates):
    promote(registry, candidates["first"], ANA)
    promote(registry, candidates["second"], How("ana", "", canary=0.05))
    assert promote(registry, candidates["second"], ANA).production == 2
    assert list(registry.standing().versions) == [1, 2]


def test_a_candidate_that_fails_its_checks_comes_in_only_with_a_reason(registry, candidates):
    with pytest.raises(CheckFailed, match=r"swapped is not promoted: clean accuracy.*more"):
        promote(registry, candidates["swapped"], ANA)
    assert registry.standing().sequence == 0
    standing = promote(registry, candidates["swapped"], How("ana", "", force="to see it fail"))
    note = standing.versions[1]
    assert note.forced and "to see it fail" in note.why


def test_two_classes_that_changed_places_are_another_interface(registry, candidates):
    promote(registry, candidates["first"], ANA)
    names = list(candidates["second"].classes)
    names[6], names[7] = names[7], names[6]
    swapped = dataclasses.replace(candidates["second"], classes=tuple(names), digest="other")
    with pytest.raises(CheckFailed, match=r"interface: expected .*5, 6, 7, .* found .*5, 7, 6, "):
        promote(registry, swapped, ANA)


def test_roll_back_returns_to_the_version_before_step_by_step(registry, candidates):
    for name in ("first", "second"):
        promote(registry, candidates[name], ANA)
    assert roll_back(registry, "bo", "slow").production == 1
    with pytest.raises(InputError, match="no version before"):
        roll_back(registry, "bo", "")
    assert promote(registry, candidates["second"], ANA).production == 2
    assert [s.production for s in registry.history()] == [None, 1, 1, 2, 1, 2]


@pytest.mark.parametrize("how", [How("ana", "", canary=0.05), How("ana", "", shadow=True)])
def test_roll_back_ends_a_canary_or_shadow_first_and_leaves_production(registry, candidates, how):
    promote(registry, candidates["first"], ANA)
    during = promote(registry, candidates["second"], how)
    assert 2 in (during.canary, during.shadow) and during.production == 1
    after = roll_back(registry, "bo", "")
    assert (after.canary, after.shadow, after.production) == (None, None, 1)
    assert end_trial(registry, 2, "server", "again") is None
    assert registry.standing() == after


def test_how_production_came_to_answer_stays_known_whatever_comes_beside_it(registry, candidates):
    promote(registry, candidates["first"], ANA)
    since = registry.standing().since
    assert since is not None and (since.by, since.why) == ("ana", "for a test")
    promote(registry, candidates["second"], How("bo", "a try", canary=0.05))
    assert (registry.standing().by, registry.standing().since) == ("bo", since)
    roll_back(registry, "cy", "enough")
    assert registry.standing().since == since
    assert promote(registry, candidates["second"], How("bo", "at last")).since.by == "bo"


def test_a_rollback_of_a_trial_that_ended_by_itself_leaves_production(registry, candidates, monkeypatch):
    """It fails, rather than take production away from a person who meant the canary."""
    promote(registry, candidates["first"], ANA)
    promote(registry, candidates["second"], ANA)
    promote(registry, candidates["swapped"], How("ana", "", force="a drill", canary=0.05))
    during = registry.standing()
    end_trial(registry, 3, "defuse serve", "it failed")
    monkeypatch.setattr(registry, "standing", iter([during, registry.standing()]).__next__)
    with pytest.raises(InputError, match="the trial of version 3 ended just now"):
        roll_back(registry, "bo", "")
    monkeypatch.undo()
    assert registry.standing().production == 2


def test_a_canary_needs_another_version_in_production(registry, candidates):
    with pytest.raises(InputError, match="none; promote without it first"):
        promote(registry, candidates["first"], How("ana", "", canary=0.05))
    promote(registry, candidates["first"], ANA)
    with pytest.raises(InputError, match="in production already"):
        promote(registry, candidates["first"], How("ana", "", shadow=True))


def test_changes_made_at_once_are_all_kept_one_after_the_other(registry):
    def change(who):
        registry.change(f"by {who}", str(who), "", lambda standing: {"previous": (*standing.previous, who)})

    threads = [threading.Thread(target=change, args=(who,)) for who in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(registry.standing().previous) == list(range(12))
    assert [s.sequence for s in registry.history()] == list(range(1, 13))


def test_a_version_is_never_written_over(registry, candidates):
    promote(registry, candidates["first"], ANA)
    before = registry.store.read("versions/000001.safetensors")
    registry.store.create("versions/000002.safetensors", b"left by a promotion that died")
    assert promote(registry, candidates["second"], ANA).production == 3
    assert registry.store.read("versions/000001.safetensors") == before


def test_an_unknown_version_is_an_error_that_names_those_there_are(registry, candidates):
    promote(registry, candidates["first"], ANA)
    with pytest.raises(InputError, match=r"no version 7 .* there are: 1"):
        registry.load(7)


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), ("0.2", 0.2), ("12.5%", 0.125)])
def test_a_share_is_a_percentage_or_a_fraction(text, share):
    assert share_of(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["0", "100%", "-5%", "five", "%", "nan"])
def test_anything_else_is_no_share(text):
    with pytest.raises(InputError, match="such as 5%"):
        share_of(text)
