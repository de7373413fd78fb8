"""The canary or shadow of a replica over changes of the registry, and versions that cannot be loaded."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import NoReturn, cast

import pytest
import torch

from defuse_core.config import ServeSection
from defuse_core.errors import ModelError, StoreError
from defuse_core.store import FolderStore
from services.serving.active_versions import (
    ActiveVersions,
    CanaryStatistics,
    InitialModel,
    RegistryWatcher,
)
from services.serving.candidate import Candidate
from services.serving.deployment import canary_for, is_in_canary
from services.serving.limits import Unavailable
from services.serving.model import LoadedModel
from services.serving.registry import Registry, promote
from services.serving.registry_state import EMPTY, PromotionRequest, RegistryState
from tests.services.serving.replicas import new_replica

ANA = PromotionRequest(by="ana", why="")


@pytest.fixture
def store(tmp_path):
    return FolderStore(tmp_path)


@pytest.fixture
def put(store, candidate):
    """put(2): give a version that equals the candidate, except for its digest, a role."""

    def put(number: int, **role: object) -> None:
        version = dataclasses.replace(candidate, run=f"run-{number}", digest=f"digest {number}")
        promote(Registry(store), version, dataclasses.replace(ANA, **role))

    return put


def watcher_of(store: FolderStore, **settings: object) -> RegistryWatcher:
    return RegistryWatcher(store, InitialModel(), ServeSection(**settings), {})


def follow(watcher: RegistryWatcher, current: ActiveVersions) -> ActiveVersions:
    after = watcher.load_changes(current)
    assert after is not None
    return after


def test_a_canary_answers_the_keys_of_its_number_and_share():
    canary = cast(LoadedModel, object())
    active = ActiveVersions(canary=canary, state=EMPTY.model_copy(update={"canary": 7, "share": 0.3}))
    keys = [f"user-{n}".encode() for n in range(300)]
    assert [canary_for(active, key) is canary for key in keys] == [is_in_canary(key, 7, 0.3) for key in keys]
    everything = active.state.model_copy(update={"share": 1.0})
    assert canary_for(ActiveVersions(state=everything), keys[0]) is None


@pytest.mark.parametrize("role", [{"canary": 0.2}, {"shadow": True}])
def test_counts_of_a_canary_or_shadow_go_on_until_another_one_follows_it(store, put, role):
    put(1)
    put(2, **role)
    watcher = watcher_of(store)
    begun = watcher.load_initial()
    assert begun.state.share == role.get("canary", 0.0)
    begun.statistics.add_error()
    Registry(store).change("another change", "ana", "", lambda state: {})
    after = follow(watcher, begun)
    assert after.statistics is begun.statistics
    assert after.by_role() == begun.by_role()  # not loaded again
    put(3, **role)
    other = follow(watcher, after)
    assert other.names() == {"production": "1", next(iter(role)): "3"}
    assert other.statistics == CanaryStatistics()
    other.statistics.add_error()
    put(3)
    promoted = follow(watcher, other)
    assert promoted.names() == {"production": "3"} and promoted.statistics == CanaryStatistics()
    assert promoted.state.share == 0.0


def test_a_canary_whose_share_changes_keeps_its_counts_and_has_the_new_share(store, put):
    put(1)
    put(2, canary=0.2)
    watcher = watcher_of(store)
    begun = watcher.load_initial()
    put(2, canary=0.4)
    after = follow(watcher, begun)
    assert (after.state.share, after.statistics, after.canary) == (0.4, begun.statistics, begun.canary)


def test_a_canary_that_ends_while_the_registry_is_read_is_not_loaded(store, put, monkeypatch):
    monkeypatch.setattr("services.serving.deployment.POLL_S", 0.01)
    put(1)
    put(2, canary=0.2)
    replica = new_replica(store)
    before, state_after = replica.active, replica.watcher.registry.state_after
    assert before.names() == {"production": "1", "canary": "2"}
    replica.ended = 2
    Registry(store).change("another change", "ana", "", lambda state: {})

    def read_and_end(known: RegistryState) -> object:
        state = state_after(known)
        replica.ended = None  # its end is stored now
        return state

    monkeypatch.setattr(replica.watcher.registry, "state_after", read_and_end)

    async def poll() -> None:
        async with replica.following_registry():
            while replica.active is before:
                await asyncio.sleep(0.01)

    asyncio.run(poll())
    assert replica.active.names() == {"production": "1"}


@pytest.mark.parametrize("role", [{"canary": 0.2}, {"shadow": True}])
def test_a_canary_for_which_there_is_no_memory_is_ended_with_the_reason(store, put, monkeypatch, role):
    put(1)
    put(2, **role)
    warm_up = LoadedModel.warm_up

    def out_of_memory(model: LoadedModel, batch: int) -> None:
        if model.number == 2:
            raise RuntimeError("CUDA out of memory")
        warm_up(model, batch)

    monkeypatch.setattr(LoadedModel, "warm_up", out_of_memory)
    watcher = watcher_of(store)
    begun = watcher.load_initial()
    assert begun.names() == {"production": "1"} and begun.error is None
    ended = Registry(store).state()
    assert (ended.canary, ended.shadow, ended.by, ended.why) == (
        None,
        None,
        "defuse serve",
        "CUDA out of memory",
    )
    after = follow(watcher, begun)
    assert after.names() == {"production": "1"}
    assert watcher.load_changes(after) is None


def test_the_reason_that_clients_read_tells_a_damaged_version_from_a_store_that_fails(
    store, put, monkeypatch
):
    put(1)
    watcher = watcher_of(store)

    def fail(number: int) -> NoReturn:
        raise StoreError(f"{store.address}: no answer")

    with monkeypatch.context() as broken:
        broken.setattr(watcher.registry, "load", fail)
        active = watcher.load_initial()
    assert active.error == "the version in production cannot be loaded; the log of the server says why"
    store.write("registry/versions/000001.safetensors", b"cut")
    damaged = watcher_of(store).load_initial().error
    assert damaged is not None and damaged.startswith("the version in production is damaged or missing: ")
    assert store.address not in damaged


def test_a_version_is_warm_before_it_answers(store, put, monkeypatch):
    batches: list[tuple[str, int]] = []
    monkeypatch.setattr(LoadedModel, "warm_up", lambda model, batch: batches.append((model.name, batch)))
    put(1)
    put(2, canary=0.2)
    watcher_of(store, batch_size=5).load_initial()
    assert batches == [("1", 5), ("2", 5)]


def test_a_device_that_is_not_there_is_an_error_also_before_the_first_version_and_not_left_to_clients(
    store, put, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for _ in range(2):
        with pytest.raises(ModelError, match="torch finds no GPU"):
            watcher_of(store, device="cuda").load_initial()
        put(1)


def forget_since(store: FolderStore, known: RegistryState) -> None:
    """Delete what the registry got after `known`, as a backup of that time that is restored."""
    registry = Registry(store)
    now = registry.state()
    for sequence in range(known.sequence + 1, now.sequence + 1):
        registry.store.delete(f"changes/{sequence:06d}.json")
    for number in now.versions.keys() - known.versions.keys():
        registry.store.delete(f"versions/{number:06d}.safetensors")


def test_a_registry_that_is_restored_from_a_backup_is_followed_back_and_the_log_says_so(store, put, caplog):
    put(1)
    backup = Registry(store).state()
    watcher = watcher_of(store)
    put(2)
    begun = watcher.load_initial()
    assert begun.names() == {"production": "2"}
    forget_since(store, backup)
    after = follow(watcher, begun)
    assert after.names() == {"production": "1"} and after.state == backup
    assert watcher.load_changes(after) is None
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.endswith("made again: the last change was number 4, and is number 2 now")


def test_a_restored_registry_is_followed_also_where_a_canary_is_still_to_be_loaded(store, put, monkeypatch):
    put(1)
    backup = Registry(store).state()
    watcher = watcher_of(store)
    begun, load = watcher.load_initial(), watcher.registry.load
    put(2)
    put(3, canary=0.2)

    def without_3(number: int) -> Candidate:
        if number == 3:
            raise StoreError(f"{store.address}: no answer")
        return load(number)

    monkeypatch.setattr(watcher.registry, "load", without_3)
    after = follow(watcher, begun)
    assert after.names() == {"production": "2"}
    forget_since(store, backup)
    restored = follow(watcher, after)
    assert restored.names() == {"production": "1"} and restored.state == backup


def test_another_model_under_the_number_of_a_loaded_version_is_loaded_anew(store, put, caplog):
    """As after a backup was restored and another run was promoted before the next poll."""
    put(1)
    backup = Registry(store).state()
    put(2, canary=0.2)
    watcher = watcher_of(store)
    begun = watcher.load_initial()
    forget_since(store, backup)
    put(3, canary=0.2)
    after = follow(watcher, begun)
    assert after.names() == begun.names() == {"production": "1", "canary": "2"}
    assert after.production is begun.production
    assert after.canary is not None and after.canary.candidate.run == "run-3"
    assert after.statistics is not begun.statistics
    assert "the last change was number 4, and is number 4 now" in caplog.text


def test_a_lost_registry_leaves_the_loaded_versions_and_one_that_is_made_again_is_followed(store, put):
    put(1)
    watcher = watcher_of(store)
    begun = watcher.load_initial()
    for key in store.list("registry/"):
        store.delete(key)
    for _ in range(2):
        with pytest.raises(StoreError, match="the registry is gone"):
            watcher.load_changes(begun)
    put(3)
    after = follow(watcher, begun)
    assert after.production is not None and after.production.name == "1"
    assert after.production.candidate.run == "run-3"


def short_of_memory(model: LoadedModel, batch: int) -> NoReturn:
    raise RuntimeError("CUDA out of memory")


def test_a_load_that_failed_is_repeated_after_pauses_that_grow_or_where_file_or_registry_change(
    store, put, monkeypatch
):
    put(1)
    watcher = watcher_of(store)
    begun = watcher.load_initial()
    now, loads, load = [0.0], [], watcher.registry.load
    monkeypatch.setattr("services.serving.active_versions.time.monotonic", lambda: now[0])
    monkeypatch.setattr(watcher.registry, "load", lambda number: loads.append(now[0]) or load(number))
    key = "registry/versions/000002.safetensors"

    def poll_until(end: float) -> None:
        while now[0] < end:
            now[0] += 2
            with pytest.raises((RuntimeError, StoreError), match="out of memory"):
                watcher.load_changes(begun)

    with monkeypatch.context() as broken:
        broken.setattr(LoadedModel, "warm_up", short_of_memory)
        put(2)
        poll_until(200)
        assert loads == [2, 4, 8, 16, 32, 64, 124, 184]
        store.write(key, store.read(key))
        poll_until(202)
        Registry(store).change("another change", "ana", "", lambda state: {})
        poll_until(204)
        assert loads[-2:] == [202, 204]
    now[0] += 2
    assert follow(watcher, begun).names() == {"production": "2"}


def test_a_first_version_that_cannot_be_loaded_is_told_to_clients(store, put, monkeypatch, caplog):
    monkeypatch.setattr("services.serving.deployment.POLL_S", 0.01)
    replica = new_replica(store)
    with pytest.raises(Unavailable, match="no version is in production"):
        replica.current()
    monkeypatch.setattr(LoadedModel, "warm_up", short_of_memory)
    put(1)

    async def poll() -> None:
        async with replica.following_registry():
            while not caplog.records:
                await asyncio.sleep(0.01)

    asyncio.run(poll())
    with pytest.raises(Unavailable, match="the version in production cannot be loaded; the log"):
        replica.current()
    assert caplog.messages == ["the registry's version cannot be loaded: CUDA out of memory"]


def test_a_canary_that_was_replaced_answers_no_more_though_its_successor_cannot_be_loaded(
    store, put, monkeypatch
):
    put(1)
    put(2, canary=0.2)
    watcher = watcher_of(store)
    begun = watcher.load_initial()
    monkeypatch.setattr(LoadedModel, "warm_up", short_of_memory)
    put(3)
    after = follow(watcher, begun)
    assert after.names() == {"production": "1"}
    with pytest.raises(StoreError, match="out of memory"):
        watcher.load_changes(after)
