"""What the changes of the registry store, and their order."""

from __future__ import annotations

import dataclasses

import pytest
from synthetic_runs import assign, unverified

from defuse_core.errors import CheckFailed, InputError, StoreError
from defuse_core.store import FolderStore
from services.serving import registry as registry_module
from services.serving.candidate import Candidate
from services.serving.checks import Check
from services.serving.registry import Registry, promote
from services.serving.registry_state import EMPTY, PromotionRequest

ANA = PromotionRequest(by="ana", why="for a test")
CANARY = dataclasses.replace(ANA, canary=0.05)
SHADOW = dataclasses.replace(ANA, shadow=True)


def failing(candidate: Candidate, *lines: str) -> Candidate:
    checks = tuple(Check("clean accuracy", False, line) for line in lines)
    return dataclasses.replace(candidate, checks=checks)


def test_a_version_keeps_its_run_digest_author_time_reason_and_annotators(registry, candidates):
    promote(registry, candidates[0], PromotionRequest("ana", "of the night"))
    promote(registry, failing(candidates[1], "worse"), PromotionRequest("bo", "", force="in a hurry"))
    promote(registry, candidates[2], PromotionRequest("cy", "better", force="to be sure"))
    stored = registry.state().versions
    assert [(v.run, v.digest, v.by, v.why, v.forced) for v in stored.values()] == [
        ("run-1", "digest 1", "ana", "of the night", False),
        ("run-2", "digest 2", "bo", "forced: in a hurry", True),
        ("run-3", "digest 3", "cy", "better; forced: to be sure", False),  # no check failed
    ]
    for info in stored.values():
        assert info.annotators == candidates[0].summary.annotators == "reference models"
        assert info.when.endswith("Z")
        assert info.watch == candidates[0].watch_figures(candidates[0].run_file().serve) is not None


def test_a_change_keeps_its_author_time_reason_and_number(registry, candidates):
    promote(registry, candidates[0], ANA)
    promote(registry, candidates[1], PromotionRequest("bo", "a try", canary=0.05))
    registry.roll_back("cy", "enough", unverified)
    assert [(s.sequence, s.by, s.why, s.action) for s in registry.changes_after(EMPTY)] == [
        (1, "ana", "for a test", "added version 1"),
        (2, "ana", "for a test", "version 1 to production"),
        (3, "bo", "a try", "added version 2"),
        (4, "bo", "a try", "version 2 as canary for 5 %"),
        (5, "cy", "enough", "ended the canary of version 2"),
    ]
    assert all(state.when.endswith("Z") for state in registry.changes_after(EMPTY))
    promote(registry, candidates[1], SHADOW)
    assert registry.roll_back("cy", "enough", unverified).action == "ended the shadow of version 2"
    since = registry.state().since
    assert since is not None and (since.change, since.when) == (2, registry.changes_after(EMPTY)[1].when)


def test_the_first_failed_check_is_named_and_the_others_are_counted(registry, candidates):
    with pytest.raises(CheckFailed, match=r"run-1 is not promoted: one; --force REASON overrides"):
        promote(registry, failing(candidates[0], "one"), ANA)
    with pytest.raises(CheckFailed, match=r"run-1 is not promoted: one \(and 2 more\); --force"):
        promote(registry, failing(candidates[0], "one", "two", "three"), ANA)


def with_accuracy(candidate: Candidate, **fields: object) -> Candidate:
    return dataclasses.replace(candidate, summary=dataclasses.replace(candidate.summary, **fields))


def test_a_run_that_is_less_accurate_than_production_is_promoted_only_with_a_reason(
    registry, candidates, caplog
):
    best, worse, equal = (
        with_accuracy(candidates[n], clean_after=accuracy)
        for n, accuracy in enumerate((0.974, 0.909, 0.974 - candidates[0].run_file().check.max_loss))
    )
    promote(registry, best, ANA)
    line = (
        r"accuracy in production: 97\.40 % \(version 1\) to 90\.90 % on the same test images, expected a loss"
    )
    with pytest.raises(CheckFailed, match=f"run-2 is not promoted: {line}"):
        promote(registry, worse, ANA)
    assert registry.state().sequence == 2 and not caplog.text
    promote(registry, equal, ANA)
    promote(registry, best, ANA)
    for role in (CANARY, SHADOW):
        assert promote(registry, worse, role).failed_checks == ()
        assert "97.40 % (version 1) to 90.90 %" in caplog.text and "needs --force" in caplog.text
        caplog.clear()
    assert promote(registry, equal, CANARY).failed_checks == () and not caplog.text
    (forced,) = promote(registry, worse, dataclasses.replace(ANA, force="a drill")).failed_checks
    assert forced.startswith("accuracy in production: 97.40 % (version 1) to 90.90 %")


@pytest.mark.parametrize(
    ("ours", "theirs", "reason"),
    [
        ("a", "b", "it was measured on other images"),
        ("", "", "it was measured on images on which a classifier was probably trained"),
    ],
)
def test_accuracies_on_other_images_are_not_compared_and_a_line_says_why(
    registry, candidates, caplog, ours, theirs, reason
):
    promote(registry, with_accuracy(candidates[0], clean_after=0.97, clean_images=theirs), ANA)
    worse = with_accuracy(candidates[1], clean_after=0.91, clean_images=ours)
    with pytest.raises(CheckFailed):
        promote(registry, failing(worse, "worse"), ANA)
    assert not caplog.text
    assert promote(registry, worse, ANA).failed_checks == ()
    line = "clean accuracy of run run-2 is not compared with that of version 1 in production"
    assert caplog.messages == [f"{line}: {reason}"]


@pytest.mark.parametrize("role", [ANA, CANARY])
def test_a_version_that_went_into_production_during_the_checks_is_not_replaced(registry, candidates, role):
    before = promote(registry, candidates[0], ANA)
    now = promote(registry, candidates[2], ANA)
    with pytest.raises(InputError, match="production changed meanwhile"):
        promote(registry, candidates[1], role, before)
    assert registry.state() == now  # nor was a version added
    assert promote(registry, candidates[2], ANA, before).production == now.production


@pytest.mark.parametrize("role", [ANA, CANARY])
def test_a_promotion_whose_checks_were_made_beside_another_production_changes_no_role(
    registry, candidates, monkeypatch, role
):
    promote(registry, candidates[0], ANA)
    add = Registry.add

    def add_after_another(self, candidate, *others, **named):
        if candidate is candidates[1]:
            promote(Registry(FolderStore(registry.store.folder.parent)), candidates[2], ANA)
        return add(self, candidate, *others, **named)

    monkeypatch.setattr(Registry, "add", add_after_another)
    with pytest.raises(InputError, match="production changed meanwhile"):
        promote(registry, candidates[1], role)
    state = registry.state()
    assert (state.versions[state.production].run, state.canary) == ("run-3", None)


@pytest.mark.parametrize("role", [CANARY, SHADOW])
def test_a_canary_or_shadow_keeps_what_it_was_forced_over(registry, candidates, role):
    promote(registry, candidates[0], ANA)
    forced = dataclasses.replace(role, force="a drill")
    assert promote(registry, failing(candidates[1], "worse"), forced).failed_checks == ("worse",)
    assert registry.roll_back("bo", "", unverified).failed_checks is None


def test_one_version_at_a_time_is_beside_production(registry, candidates):
    for candidate, role in zip(candidates, (ANA, CANARY, SHADOW, CANARY), strict=True):
        state = promote(registry, candidate, role)
    assert (state.production, state.canary, state.share, state.shadow) == (1, 4, 0.05, None)
    before = registry.changes_after(EMPTY)[-3]  # version 4 is added before it becomes the canary
    assert (before.canary, before.share, before.shadow) == (None, 0.0, 3)
    after = promote(registry, candidates[1], ANA)
    assert (after.production, after.canary, after.share, after.shadow) == (2, None, 0.0, None)


def test_the_end_of_a_canary_that_another_one_has_replaced_does_not_end_that_one(registry, candidates):
    for candidate, role in zip(candidates[:3], (ANA, CANARY, CANARY), strict=True):
        promote(registry, candidate, role)
    assert registry.end_canary(2, "defuse serve", "it failed") is None
    assert registry.state().canary == 3
    ended = registry.end_canary(3, "defuse serve", "it failed")
    assert ended is not None and (ended.canary, ended.share, ended.production) == (None, 0.0, 1)


@pytest.mark.parametrize(
    "to_role",
    [
        lambda r: assign(r, 1, PromotionRequest("bo", "", canary=0.1)),
        lambda r: assign(r, 1, PromotionRequest("bo", "", shadow=True)),
    ],
)
def test_the_version_in_production_cannot_become_its_own_canary_or_shadow(registry, candidates, to_role):
    """As where it was promoted between the look-up and the change."""
    promote(registry, candidates[0], ANA)
    with pytest.raises(InputError, match="already in production, as version 1 of run run-1"):
        to_role(registry)


def test_rollbacks_go_back_one_version_each_and_verify_that_one(registry, candidates):
    for candidate in candidates:
        promote(registry, candidate, ANA)
    assert registry.state().previous == (1, 2, 3)
    verified: list[str] = []
    states = [registry.roll_back("bo", "", lambda c: verified.append(c.run)) for _ in range(3)]
    assert [(state.production, state.previous) for state in states] == [(3, (1, 2)), (2, (1,)), (1, ())]
    assert verified == ["run-3", "run-2", "run-1"]


def test_a_rollback_from_the_version_that_is_expected_goes_back_once(registry, candidates):
    for candidate in candidates[:3]:
        promote(registry, candidate, ANA)
    assert registry.roll_back("bo", "slow", unverified, expected=3).production == 2
    again = (
        r"version 3 in production \(--from\), found another: .* bo: rolled .* \(slow\); version 2 is in prod"
    )
    for production in (False, True):
        with pytest.raises(InputError, match=again):
            registry.roll_back("bo", "slow", unverified, production=production, expected=3)
    assert registry.state().production == 2
    promote(registry, candidates[3], CANARY)
    assert registry.roll_back("bo", "", unverified, expected=2).action == "ended the canary of version 4"


@pytest.mark.parametrize("role", [CANARY, SHADOW])
@pytest.mark.parametrize("by", ["defuse serve", "cy"])
def test_a_rollback_right_after_its_canary_was_ended_leaves_production_unless_that_is_meant(
    registry, candidates, role, by
):
    for candidate in candidates[:2]:
        promote(registry, candidate, ANA)
    promote(registry, candidates[2], role)
    registry.end_canary(3, by, "it failed")
    with pytest.raises(
        InputError, match=r"ended the (canary|shadow) of version 3 .*\(it failed\); .* --production"
    ):
        registry.roll_back("bo", "", unverified)
    assert registry.state().production == 2
    before = f"changes/{registry.state().sequence - 1:06d}.json"
    registry.store.write(before, b"damaged")  # `--production` does not need it
    assert registry.roll_back("bo", "", unverified, production=True).production == 1


@pytest.mark.parametrize("production", [False, True])
def test_a_rollback_after_another_persons_change_ended_the_canary_leaves_production_unless_that_is_meant(
    registry, candidates, production
):
    """The change says that it ended the canary, and the rollback was perhaps to end just that."""
    for candidate, role in zip(candidates[:3], (ANA, ANA, CANARY), strict=True):
        promote(registry, candidate, role)
    if production:
        state = registry.roll_back("bo", "", unverified, production=True)
        action = "rolled back from version 2"
    else:
        state = promote(registry, candidates[3], PromotionRequest("bo", "a hotfix"))
        action = "version 4 to production"
    assert state.action == f"{action}; ended the canary of version 3"
    with pytest.raises(InputError, match=f"bo: {action}; ended the canary of version 3.* --production"):
        registry.roll_back("ana", "", unverified)
    assert registry.state() == state


def test_a_change_names_the_canary_that_it_ends_unless_that_one_gets_the_new_role(registry, candidates):
    roles = [(0, ANA), (1, CANARY), (1, SHADOW), (2, CANARY), (2, ANA)]
    assert [promote(registry, candidates[n], role).action for n, role in roles] == [
        "version 1 to production",
        "version 2 as canary for 5 %",
        "version 2 as shadow",
        "version 3 as canary for 5 %; ended the shadow of version 2",
        "version 3 to production",
    ]
    assert registry.roll_back("ana", "", unverified).production == 1


def test_a_rollback_of_production_ends_a_canary(registry, candidates):
    for candidate in candidates[:2]:
        promote(registry, candidate, ANA)
    promote(registry, candidates[2], PromotionRequest("ana", "", canary=0.1))
    after = registry.roll_back("bo", "", unverified, production=True)
    assert (after.production, after.canary) == (1, None)


def test_a_rollback_that_another_one_overtakes_leaves_production(registry, candidates):
    for candidate in candidates[:3]:
        promote(registry, candidate, ANA)

    def overtake(_: Candidate) -> None:
        registry.roll_back("cy", "first", unverified)

    with pytest.raises(InputError, match="production changed meanwhile"):
        registry.roll_back("bo", "", overtake)
    assert (registry.state().production, registry.state().by) == (2, "cy")


def test_a_rollback_ends_a_canary_that_began_meanwhile(registry, candidates):
    """Else the version that comes back could be compared with itself."""
    for candidate in candidates[:2]:
        promote(registry, candidate, ANA)
    after = registry.roll_back(
        "bo", "", lambda c: assign(registry, 1, PromotionRequest("ana", "", canary=0.1)) and None
    )
    assert (after.production, after.canary, after.share) == (1, None, 0.0)


def test_a_change_that_others_always_overtake_is_given_up_and_says_so(registry, monkeypatch):
    monkeypatch.setattr(registry_module, "MAX_CONFLICTS", 3)
    tries: list[str] = []
    monkeypatch.setattr(registry.store, "create", lambda key, data: tries.append(key))
    with pytest.raises(StoreError, match="3 concurrent changes came first; run the command again"):
        assign(registry, 1, PromotionRequest("ana", ""))
    assert tries == ["changes/000001.json"] * 3


def test_the_number_of_a_version_whose_file_is_lost_is_not_given_again(registry, candidates):
    registry.store.create("versions/000001.safetensors", b"left by a promotion that died")
    promote(registry, candidates[0], ANA)
    assert list(registry.state().versions) == [2]
    assert registry.load(2).run == "run-1"  # stored under the number that was free
    registry.store.delete("versions/000002.safetensors")
    promote(registry, candidates[1], PromotionRequest("ana", "", force="production cannot be compared"))
    assert {n: info.run for n, info in registry.state().versions.items()} == {2: "run-1", 3: "run-2"}


def test_a_version_whose_addition_was_stored_although_its_answer_was_lost_keeps_its_file(
    registry, candidates, monkeypatch
):
    create, lost = registry.store.create, ["changes/000001.json"]

    def create_and_lose_the_answer(key: str, data: bytes) -> bool:
        created = create(key, data)
        return created and key not in lost

    monkeypatch.setattr(registry.store, "create", create_and_lose_the_answer)
    assert promote(registry, candidates[0], ANA).production == 1
    assert [state.action for state in registry.changes_after(EMPTY)] == [
        "added version 1",
        "version 1 to production",
    ]
    assert registry.load(1).run == "run-1"


def test_of_equal_versions_the_newest_is_promoted_and_mended(registry, candidates):
    """As after a run was added twice."""
    for candidate in candidates[:2]:
        promote(registry, candidate, ANA)
    first = registry.state().versions[1]
    registry.change("added twice", "ana", "", lambda s: {"versions": {**s.versions, 3: first}})
    assert promote(registry, candidates[0], ANA).production == 3
    assert registry.load(3).run == "run-1"


def test_only_changes_after_a_state_are_a_new_state(registry, candidates):
    assert registry.state_after(EMPTY) is None
    state = promote(registry, candidates[0], ANA)
    assert state.sequence == 2
    added = registry.changes_after(EMPTY)[0]
    assert registry.state_after(EMPTY) == registry.state_after(added) == state
    assert registry.state_after(state) is None


def test_a_state_that_is_no_change_any_more_is_followed_by_the_current_one_alone(registry, candidates):
    first = promote(registry, candidates[0], ANA)
    second = promote(registry, candidates[1], ANA)
    for left in ("changes/000003.json", "changes/000004.json", "versions/000002.safetensors"):
        registry.store.delete(left)  # as after a restored backup
    assert registry.state_after(second) == first and registry.changes_after(second) == [first]
    other = promote(registry, candidates[2], ANA)
    assert other.sequence == second.sequence and other.versions[2].run == "run-3"
    assert registry.state_after(second) == other and registry.changes_after(second) == [other]


def test_a_lost_registry_is_an_error_for_whoever_knows_its_state(registry, candidates):
    state = promote(registry, candidates[0], ANA)
    for key in registry.store.list():
        registry.store.delete(key)
    for ask in (registry.state_after, registry.changes_after):
        with pytest.raises(StoreError, match="the registry is gone; restore it, or promote a run"):
            ask(state)
    assert registry.state_after(EMPTY) is None and registry.changes_after(EMPTY) == []


def test_a_registry_that_goes_between_listing_and_reading_is_gone(registry, candidates, monkeypatch):
    state = promote(registry, candidates[0], ANA)

    def gone(_key: str) -> bytes:
        raise FileNotFoundError

    monkeypatch.setattr(registry.store, "read", gone)
    with pytest.raises(StoreError, match="the registry is gone; restore it"):
        registry.state()
    monkeypatch.setattr(registry.store, "version", lambda _key: "changed")
    with pytest.raises(StoreError, match="the registry is gone; restore it"):
        registry.changes_after(state)


def test_a_poll_without_a_change_reads_nothing_after_the_first(registry, candidates, monkeypatch):
    """A state holds all versions, so it grows, and each replica polls every two seconds."""
    state, asked = promote(registry, candidates[0], ANA), []
    for name in ("exists", "version", "read", "list"):
        real = getattr(registry.store, name)
        monkeypatch.setattr(registry.store, name, lambda *key, r=real, n=name: asked.append(n) or r(*key))
    for expected in (["version", "read", "exists"], ["version", "exists"]):
        asked.clear()
        assert registry.state_after(state) is None and asked == expected
    key = "changes/000002.json"
    registry.store.write(key, registry.store.read(key).replace(b"for a test", b"edited"))
    assert registry.state_after(state).why == "edited"


def test_changes_are_ordered_by_number_beyond_six_digits(registry, candidates):
    state = promote(registry, candidates[0], ANA)
    for number, by in ((999_999, "bo"), (1_000_000, "cy")):
        later = state.model_copy(update={"sequence": number, "by": by})
        registry.store.write(f"changes/{number}.json", later.model_dump_json().encode())
    assert registry.state().by == "cy"
    assert assign(registry, 1, PromotionRequest("di", "")).sequence == 1_000_001
