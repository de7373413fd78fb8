"""Versions, roles, promotions and rollbacks."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import threading

import numpy as np
import pytest
from synthetic_runs import assign, unverified

from defuse_core.artifacts import Models
from defuse_core.codec import encode
from defuse_core.config import ServeSection
from defuse_core.errors import CheckFailed, DamagedError, InputError
from defuse_core.files import UNFINISHED
from defuse_core.runs import Run
from services.serving import candidate as candidate_module
from services.serving.api import ModelInfo
from services.serving.candidate import prepare_candidate
from services.serving.checks import Check
from services.serving.model import LoadedModel, verify_candidate
from services.serving.registry import DamagedVersionError, Registry, promote
from services.serving.registry_state import EMPTY, PromotionRequest

ANA = PromotionRequest(by="ana", why="for a test")


@pytest.fixture
def registry(own_store):
    return Registry(own_store)


@pytest.fixture(scope="module")
def candidates(planted):
    return {name: prepare_candidate(Run.open(planted, name))[1] for name in ("first", "second", "swapped")}


def test_a_promoted_candidate_becomes_version_1_with_who_when_and_why(registry, candidates):
    state = promote(registry, candidates["first"], ANA)
    assert (state.production, state.by, state.why, state.canary) == (1, "ana", "for a test", None)
    assert registry.state() == state and state.when.endswith("Z")
    assert registry.load(1).digest == candidates["first"].digest
    assert registry.state().versions[1].run == "first"


def test_what_a_killed_promotion_left_is_removed_by_the_next_one_in_time(registry, candidates):
    versions = registry.store.within("versions").folder
    versions.mkdir(parents=True)
    old, new = (versions / f".000001.safetensors.{name}{UNFINISHED}" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    promote(registry, candidates["first"], ANA)
    assert sorted(versions.iterdir()) == [new, versions / "000001.safetensors"]


def test_a_promotion_that_was_killed_before_its_version_was_added_leaves_its_file_to_the_next_one(
    registry, candidates, monkeypatch
):
    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(registry, "change", kill)
        promote(registry, candidates["first"], ANA)
    assert promote(registry, candidates["first"], ANA).production == 1
    assert registry.store.within("versions").list() == ["000001.safetensors"]


def test_equal_weights_are_one_version(registry, candidates):
    promote(registry, candidates["first"], ANA)
    promote(registry, candidates["second"], PromotionRequest("ana", "", canary=0.05))
    assert promote(registry, candidates["second"], ANA).production == 2
    assert list(registry.state().versions) == [1, 2]


def test_a_candidate_that_fails_its_checks_is_promoted_only_with_a_reason(registry, candidates):
    with pytest.raises(CheckFailed, match=r"swapped is not promoted: clean accuracy.*more"):
        promote(registry, candidates["swapped"], ANA)
    assert registry.state().sequence == 0
    state = promote(registry, candidates["swapped"], PromotionRequest("ana", "", force="to see it fail"))
    note = state.versions[1]
    assert note.forced and "to see it fail" in note.why


def test_a_promotion_forced_for_an_equal_version_keeps_what_it_was_forced_over(registry, candidates):
    """As of a run with the same weights whose clean images are others."""
    for name in ("first", "second"):
        promote(registry, candidates[name], ANA)
    failed = Check("clean accuracy", False, "clean accuracy: 99% -> 60%")
    nightly = dataclasses.replace(candidates["first"], run="nightly", checks=(failed,))
    state = promote(registry, nightly, PromotionRequest("bo", "", force="in a hurry"))
    assert (state.production, state.failed_checks) == (1, (failed.line,))
    assert state.since is not None and state.since.failed_checks == (failed.line,)
    ended = promote(registry, candidates["second"], PromotionRequest("ana", "", canary=0.1))
    assert ended.failed_checks == () and ended.since == state.since
    model = LoadedModel(registry.load(1), ServeSection(), 1)
    assert ModelInfo.of(model, ended, None, None).failed_checks == [failed.line]
    assert registry.roll_back("bo", "", unverified).failed_checks is None


def test_a_promotion_of_the_version_in_production_keeps_who_put_it_there_and_over_what(registry, candidates):
    forced = promote(registry, candidates["swapped"], PromotionRequest("ana", "", force="a drill")).since
    again = promote(
        registry, dataclasses.replace(candidates["swapped"], checks=()), PromotionRequest("bo", "")
    )
    assert forced is not None and forced.failed_checks
    assert again.since == forced.model_copy(update={"change": again.sequence}) and again.by == "bo"


def test_a_version_that_was_not_promoted_has_the_checks_of_its_run_that_failed(registry, candidates):
    told = ModelInfo.model_fields["failed_checks"].description or ""
    assert "if it was not promoted, or came back by a rollback, those of `defuse check`" in told
    served = LoadedModel(candidates["swapped"], ServeSection())
    failed = ModelInfo.of(served, registry.state(), None, None).failed_checks
    assert failed == candidates["swapped"].failed_checks() != []


def test_a_version_that_came_back_by_a_rollback_has_the_checks_of_its_run_that_failed(registry, candidates):
    promote(registry, candidates["swapped"], PromotionRequest("ana", "", force="a drill"))
    promote(registry, candidates["first"], ANA)
    back = registry.roll_back("bo", "", unverified)
    served = LoadedModel(registry.load(1), ServeSection(), 1)
    failed = ModelInfo.of(served, back, None, None).failed_checks
    assert failed == candidates["swapped"].failed_checks() != []


def test_roll_back_returns_to_the_version_before_step_by_step(registry, candidates):
    for name in ("first", "second"):
        promote(registry, candidates[name], ANA)
    assert registry.roll_back("bo", "slow", unverified).production == 1
    with pytest.raises(InputError, match="no previous version"):
        registry.roll_back("bo", "", unverified)
    assert promote(registry, candidates["second"], ANA).production == 2
    assert [s.production for s in registry.changes_after(EMPTY)] == [None, 1, 1, 2, 1, 2]


def test_a_version_that_comes_back_can_be_rolled_back_to_each_one_before_it(registry, candidates):
    for name in ("first", "second", "first"):
        state = promote(registry, candidates[name], ANA)
    assert state.previous == (1, 2)
    assert [registry.roll_back("bo", "", unverified).production for _ in range(2)] == [2, 1]


@pytest.mark.parametrize(
    "how", [PromotionRequest("ana", "", canary=0.05), PromotionRequest("ana", "", shadow=True)]
)
def test_roll_back_ends_a_canary_or_shadow_first_and_leaves_production(registry, candidates, how):
    promote(registry, candidates["first"], ANA)
    during = promote(registry, candidates["second"], how)
    assert 2 in (during.canary, during.shadow) and during.production == 1
    after = registry.roll_back("bo", "", unverified)
    assert (after.canary, after.shadow, after.production) == (None, None, 1)
    assert registry.end_canary(2, "server", "again") is None
    assert registry.state() == after


def test_the_change_that_set_production_is_kept_during_canaries(registry, candidates):
    promote(registry, candidates["first"], ANA)
    since = registry.state().since
    assert since is not None and (since.by, since.why) == ("ana", "for a test")
    promote(registry, candidates["second"], PromotionRequest("bo", "a try", canary=0.05))
    assert (registry.state().by, registry.state().since) == ("bo", since)
    registry.roll_back("cy", "enough", unverified)
    assert registry.state().since == since
    assert promote(registry, candidates["second"], PromotionRequest("bo", "at last")).since.by == "bo"


def test_a_rollback_of_a_canary_that_has_just_ended_leaves_production(registry, candidates, monkeypatch):
    """It fails: the user wanted to end the canary, not to change production."""
    promote(registry, candidates["first"], ANA)
    promote(registry, candidates["second"], ANA)
    promote(registry, candidates["swapped"], PromotionRequest("ana", "", force="a drill", canary=0.05))
    during = registry.state()
    registry.end_canary(3, "defuse serve", "it failed")
    monkeypatch.setattr(registry, "state", iter([during, registry.state()]).__next__)
    with pytest.raises(InputError, match="the canary or shadow of version 3 ended just now"):
        registry.roll_back("bo", "", unverified)
    monkeypatch.undo()
    assert registry.state().production == 2


def test_a_canary_needs_another_version_in_production(registry, candidates):
    with pytest.raises(InputError, match="none; promote without it first"):
        promote(registry, candidates["first"], PromotionRequest("ana", "", canary=0.05))
    promote(registry, candidates["first"], ANA)
    with pytest.raises(InputError, match="already in production"):
        promote(registry, candidates["first"], PromotionRequest("ana", "", shadow=True))


def test_a_canary_of_another_run_with_the_model_in_production_is_told_which_version_it_equals(
    registry, candidates
):
    promote(registry, candidates["first"], ANA)
    equal = dataclasses.replace(candidates["first"], run="nightly")
    with pytest.raises(
        InputError, match="--canary: this model is .* in production, as version 1 of run first"
    ):
        promote(registry, equal, PromotionRequest("ana", "", canary=0.5))


@pytest.mark.parametrize(
    "how", [PromotionRequest("ana", "", canary=0.05), PromotionRequest("ana", "", shadow=True)]
)
def test_a_canary_without_another_version_in_production_leaves_no_version(registry, candidates, how):
    """A run with a version can no longer be deleted."""
    option = "--shadow" if how.shadow else "--canary"
    with pytest.raises(InputError, match=f"^{option} needs another version .*; promote without it first"):
        promote(registry, candidates["first"], how)
    assert registry.state().sequence == 0 and registry.store.list() == []
    promote(registry, candidates["first"], ANA)
    before = registry.state()
    with pytest.raises(InputError, match=f"^{option}: this model is already in production, as version 1"):
        promote(registry, candidates["first"], how)
    assert registry.state() == before


def test_concurrent_changes_are_all_kept_in_sequence(registry):
    def change(who):
        registry.change(f"by {who}", str(who), "", lambda state: {"previous": (*state.previous, who)})

    threads = [threading.Thread(target=change, args=(who,)) for who in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(registry.state().previous) == list(range(12))
    assert [s.sequence for s in registry.changes_after(EMPTY)] == list(range(1, 13))


def made_again(store, name="first"):
    """The candidate of a run, made by this version of Defuse as it is now."""
    run = Run.open(store, name)
    for key in run.store.list("candidates"):
        run.store.delete(key)
    return prepare_candidate(run)[1]


def test_a_candidate_that_is_made_again_is_the_same_version(registry, own_store):
    assert [promote(registry, made_again(own_store), ANA).production for _ in range(2)] == [1, 1]


def test_a_candidate_of_another_format_is_another_version(registry, own_store, monkeypatch):
    promote(registry, made_again(own_store), ANA)
    monkeypatch.setattr(candidate_module, "FORMAT", candidate_module.FORMAT + 1)
    assert promote(registry, made_again(own_store), ANA).production == 2


@pytest.mark.parametrize("part", ["vae", "regions", "failures"])
def test_equal_weights_with_another_watch_are_another_version(registry, own_store, monkeypatch, part):
    promote(registry, made_again(own_store), ANA)
    run = Run.open(own_store, "first")
    if part == "vae":
        models = run.load(Models)
        vae = {name: array * np.float32(1.0001) for name, array in models.vae.items()}
        run.store.write("models.safetensors", encode(dataclasses.replace(models, vae=vae)))
    else:
        name = {"regions": "fit_regions", "failures": "watch_classifier"}[part]
        made = getattr(candidate_module, name)

        def by_another_defuse(*arguments):
            found = made(*arguments)
            return dataclasses.replace(found, means=found.means + 1)

        monkeypatch.setattr(candidate_module, name, by_another_defuse)
    assert promote(registry, made_again(own_store), ANA).production == 2


def test_concurrent_promotions_of_one_run_make_one_version(registry, candidates):
    promote(registry, candidates["second"], ANA)
    started = threading.Barrier(6)

    def promote_at_once():
        started.wait()
        promote(registry, candidates["first"], ANA)

    threads = [threading.Thread(target=promote_at_once) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    state = registry.state()
    _, made = state.versions  # a number that was claimed and given up is not used again
    assert (min(state.versions), state.production, state.previous) == (1, made, (1,))
    assert len(registry.store.within("versions").list()) == 2
    assert registry.roll_back("bo", "", unverified).production == 1


def test_a_run_that_was_added_between_look_up_and_change_is_one_version(registry, candidates, monkeypatch):
    """As of two promotions that both found no equal version."""
    before = registry.state()
    promote(registry, candidates["first"], ANA)
    current = registry.state
    states = itertools.chain([before], (current() for _ in itertools.count()))
    monkeypatch.setattr(registry, "state", states.__next__)
    assert registry.add(candidates["first"], "bo", "", forced=False) == 1
    assert registry.store.within("versions").list() == ["000001.safetensors"]


def test_a_rollback_never_ends_at_an_equal_version(registry, candidates):
    """As after a run was added twice."""
    for name in ("first", "second"):
        promote(registry, candidates[name], ANA)
    twice = registry.state().versions
    registry.change("added twice", "ana", "", lambda s: {"versions": {**s.versions, 3: twice[2]}})
    assert assign(registry, 3, PromotionRequest("ana", "")).previous == (1,)
    assert registry.roll_back("bo", "", unverified).production == 1


def test_files_beside_the_changes_do_not_count(registry, candidates):
    """As an editor's copy, or what a person noted there."""
    promote(registry, candidates["first"], ANA)
    for name in ("000003.json~", "3.json", "zz.txt"):
        registry.store.write(f"changes/{name}", b"not a state")
    assert promote(registry, candidates["second"], ANA).production == 2
    assert registry.roll_back("bo", "", unverified).production == 1
    assert [state.sequence for state in registry.changes_after(EMPTY)] == [1, 2, 3, 4, 5]


def test_a_version_is_never_overwritten(registry, candidates):
    promote(registry, candidates["first"], ANA)
    before = registry.store.read("versions/000001.safetensors")
    registry.store.create("versions/000002.safetensors", b"left by a promotion that died")
    assert promote(registry, candidates["second"], ANA).production == 3
    assert registry.store.read("versions/000001.safetensors") == before


@pytest.mark.parametrize("how", ["damaged", "missing", "another version"])
def test_promoting_the_run_of_a_damaged_or_missing_version_writes_it_again(registry, candidates, how):
    promote(registry, candidates["first"], ANA)
    key = "versions/000001.safetensors"
    whole = registry.store.read(key)
    other = {"damaged": whole[:-1], "another version": encode(candidates["second"])}
    registry.store.write(key, other[how]) if how in other else registry.store.delete(key)
    with pytest.raises(DamagedVersionError, match=r"000001.*; promote its run again, or restore the file"):
        registry.load(1)
    assert promote(registry, candidates["first"], ANA).production == 1
    assert registry.store.read(key) == whole


def test_the_error_for_an_unknown_version_names_the_known_ones(registry, candidates):
    promote(registry, candidates["first"], ANA)
    with pytest.raises(InputError, match=r"unknown version 7 .* known versions: 1"):
        registry.load(7)


@pytest.mark.parametrize(
    ("state", "found"),
    [
        ({"format": 2}, "/changes/000001.json: .* of format 6, found format 2; "),
        ({"sequence": 1}, "/changes/000001.json: .* of format 6, found none; "),
    ],
)
def test_a_registry_of_an_older_format_is_refused_in_one_line_that_says_what_to_do(registry, state, found):
    registry.store.write("changes/000001.json", json.dumps(state).encode())
    remedy = "use the version of Defuse that wrote it, or rename its folder and promote a run of this version"
    with pytest.raises(DamagedError, match=f"^{registry.store.address}{found}{remedy}"):
        registry.state()


def test_a_damaged_state_is_an_error_that_names_the_file(registry):
    registry.store.write("changes/000001.json", b'{"format": 6, "sequence": "one"}')
    with pytest.raises(DamagedError, match=r"changes/000001\.json: .*valid integer.*; restore the file"):
        registry.state()


@pytest.mark.parametrize("how", ["damaged", "another version"])
def test_a_rollback_to_a_damaged_version_is_an_error_and_production_stays(registry, candidates, how):
    for name in ("first", "second"):
        promote(registry, candidates[name], ANA)
    whole = registry.store.read("versions/000001.safetensors")
    other = {"damaged": whole[:-1], "another version": registry.store.read("versions/000002.safetensors")}
    registry.store.write("versions/000001.safetensors", other[how])
    reason = {"damaged": "", "another version": r"expected version 1 of run first, .* \(run second\)"}
    with pytest.raises(
        InputError, match=rf"version 1 cannot go back into production: .*000001\.safetensors: {reason[how]}"
    ):
        registry.roll_back("bo", "", unverified)
    assert registry.state().production == 2


def test_a_rollback_to_a_version_that_does_not_predict_is_an_error(registry, candidates):
    unfit = dataclasses.replace(candidates["first"], classifier={}, digest="unfit")
    promote(registry, unfit, PromotionRequest("ana", "", force="a drill"))
    promote(registry, candidates["second"], PromotionRequest("ana", "", force="a drill"))
    with pytest.raises(InputError, match=r"version 1 cannot go back into production: .*the weights lack"):
        registry.roll_back("bo", "", verify_candidate)
    assert registry.state().production == 2


def test_changes_after_a_state_are_returned_one_by_one(registry, candidates):
    promote(registry, candidates["first"], ANA)
    since = registry.state()
    assert registry.changes_after(since) == []
    promote(registry, candidates["second"], ANA)
    assert [s.action for s in registry.changes_after(since)] == ["added version 2", "version 2 to production"]
