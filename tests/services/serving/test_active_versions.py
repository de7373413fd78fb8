"""The versions that a replica loads, at its start and after changes of the registry."""

from __future__ import annotations

import dataclasses
from typing import Any, NoReturn

import pytest
from synthetic_runs import make_run, perturb_weights

from defuse_core.config import ServeSection
from defuse_core.errors import DamagedError, InputError, NoAnswerError, StoreError
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from services.serving.active_versions import ActiveVersions, InitialModel, RegistryWatcher
from services.serving.api import ModelInfo
from services.serving.candidate import prepare_candidate
from services.serving.registry import DamagedVersionError, Registry, promote
from services.serving.registry_state import PromotionRequest
from services.storage import is_store_failure

ANA = PromotionRequest(by="ana", why="")


def put(store: FolderStore, name: str, how: PromotionRequest = ANA) -> None:
    promote(Registry(store), prepare_candidate(Run.open(store, name))[1], how)


def own_run(store: FolderStore, name: str = "first") -> InitialModel:
    """The initial model of `defuse serve NAME` now."""
    key, _ = prepare_candidate(Run.open(store, name))
    return InitialModel(f"{name}/{key}", Registry(store).state())


def replica(store: FolderStore, initial: InitialModel, **changes: Any) -> ActiveVersions:
    """The versions of a replica that starts now."""
    return RegistryWatcher(store, initial, ServeSection(), changes).load_initial()


def answering(active: ActiveVersions) -> dict[str, str]:
    return {role: served.name for role, served in active.by_role().items()}


def test_a_replica_that_starts_later_loads_what_the_others_switched_to(own_store):
    initial = own_run(own_store)
    assert answering(replica(own_store, initial)) == {"production": "first"}
    put(own_store, "second")
    put(own_store, "swapped", PromotionRequest("ana", "", force="a drill", canary=0.1))
    assert answering(replica(own_store, initial)) == {"production": "1", "canary": "2"}


def test_a_canary_or_shadow_does_not_replace_the_run_of_a_server(own_store):
    put(own_store, "second")
    initial = own_run(own_store)
    watcher = RegistryWatcher(own_store, initial, ServeSection(), {})
    begun = watcher.load_initial()
    assert answering(begun) == {"production": "first"}
    put(own_store, "swapped", PromotionRequest("ana", "", force="a drill", shadow=True))
    after = watcher.load_changes(begun)
    assert after is not None and answering(after) == {"production": "first"}
    assert answering(replica(own_store, initial)) == answering(after)


def test_a_server_of_a_run_that_starts_during_a_canary_has_it_at_once(own_store):
    put(own_store, "first")
    put(own_store, "second", PromotionRequest("ana", "", canary=0.1))
    watcher = RegistryWatcher(own_store, own_run(own_store), ServeSection(), {})
    begun = watcher.load_initial()
    assert answering(begun) == {"production": "1", "canary": "2"}
    assert watcher.load_changes(begun) is None


def test_a_server_of_a_run_that_the_store_returns_late_has_the_canary_at_once_then(own_store, monkeypatch):
    put(own_store, "first")
    put(own_store, "second", PromotionRequest("ana", "", canary=0.1))
    watcher = RegistryWatcher(own_store, own_run(own_store), ServeSection(), {})

    def no_answer(key: str) -> NoReturn:
        raise NoAnswerError(f"{key}: no answer")

    with monkeypatch.context() as broken:
        broken.setattr(watcher, "_load_candidate", no_answer)
        with pytest.raises(NoAnswerError):
            watcher.load_initial()
    begun = watcher.load_initial()
    assert answering(begun) == {"production": "1", "canary": "2"}
    assert begun.state == Registry(own_store).state()


def test_a_server_of_a_run_that_equals_the_version_in_production_tells_who_promoted_it(own_store):
    put(own_store, "first")
    own_store.write("registry/versions/000001.safetensors", b"cut")  # the file of the version is not needed
    begun = replica(own_store, own_run(own_store))
    assert answering(begun) == {"production": "1"}
    page = ModelInfo.of(begun.in_production, begun.state, None, None)
    assert (page.version, page.by, page.failed_checks) == ("1", "ana", [])
    pinned = replica(own_store, dataclasses.replace(own_run(own_store), pin=True))
    assert answering(pinned) == {"production": "first"}


ROLES = pytest.mark.parametrize(
    "role", [PromotionRequest("ana", "", canary=0.1), PromotionRequest("ana", "", shadow=True)]
)


@ROLES
@pytest.mark.parametrize("damaged", [False, True])
def test_a_server_of_another_run_than_production_neither_loads_nor_ends_a_canary(own_store, role, damaged):
    """It would compare the canary with its run, and end it for the servers of production."""
    put(own_store, "first")
    put(own_store, "second", role)
    if damaged:
        own_store.write("registry/versions/000002.safetensors", b"cut")
    before = Registry(own_store).state()
    watcher = RegistryWatcher(own_store, own_run(own_store, "swapped"), ServeSection(), {})
    begun = watcher.load_initial()
    assert answering(begun) == {"production": "swapped"}
    assert Registry(own_store).state() == before and watcher.load_changes(begun) is None


def test_a_server_of_a_run_follows_canaries_once_a_version_has_replaced_the_run(own_store):
    watcher = RegistryWatcher(own_store, own_run(own_store, "swapped"), ServeSection(), {})
    begun = watcher.load_initial()
    put(own_store, "first")
    put(own_store, "second", PromotionRequest("ana", "", canary=0.1))
    after = watcher.load_changes(begun)
    assert after is not None and answering(after) == {"production": "1", "canary": "2"}


def test_a_version_that_replaced_the_run_of_a_server_stays_replaced_after_a_backup_was_restored(own_store):
    put(own_store, "first")
    backup = Registry(own_store).state()
    watcher = RegistryWatcher(own_store, own_run(own_store, "swapped"), ServeSection(), {})
    put(own_store, "second")
    begun = watcher.load_initial()
    assert answering(begun) == {"production": "2"}
    for sequence in (3, 4):
        own_store.delete(f"registry/changes/{sequence:06d}.json")
    after = watcher.load_changes(begun)
    assert after is not None and answering(after) == {"production": "1"} and after.state == backup


def delete_run(store: FolderStore, name: str) -> None:
    for key in store.list(f"{name}/"):
        store.delete(key)


def test_a_replica_starts_with_the_version_in_production_after_the_run_of_its_server_was_deleted(own_store):
    initial = own_run(own_store, "swapped")
    put(own_store, "first")
    delete_run(own_store, "swapped")
    assert answering(replica(own_store, initial)) == {"production": "1"}


def test_a_deleted_run_that_no_version_has_replaced_is_an_error_that_says_what_to_do(own_store):
    initial = own_run(own_store, "swapped")
    put(own_store, "first")
    served_since = own_run(own_store, "swapped")
    delete_run(own_store, "swapped")
    for start in (served_since, InitialModel(initial.key, pin=True)):
        with pytest.raises(
            StoreError, match=r"swapped/candidates/.* is missing, .* `defuse promote RUN --store "
        ):
            replica(own_store, start)


@pytest.mark.parametrize("role", ["canary", "shadow"])
def test_a_canary_whose_end_is_not_stored_yet_stays_ended_after_another_change(own_store, role):
    put(own_store, "first")
    put(
        own_store,
        "second",
        PromotionRequest("ana", "", **({"canary": 0.1} if role == "canary" else {"shadow": True})),
    )
    watcher = RegistryWatcher(own_store, InitialModel(), ServeSection(), {})
    begun = watcher.load_initial()
    assert answering(begun) == {"production": "1", role: "2"}
    after_end = ActiveVersions(begun.production, state=begun.state)
    Registry(own_store).change("another change", "ana", "", lambda state: {})
    after = watcher.load_changes(after_end, ended=2)
    assert after is not None and answering(after) == {"production": "1"}
    put(own_store, "swapped", PromotionRequest("ana", "", force="a drill", canary=0.1))
    after = watcher.load_changes(after, ended=2)
    assert after is not None and answering(after) == {"production": "1", "canary": "3"}
    put(own_store, "second", PromotionRequest("ana", "", canary=0.1))
    after = watcher.load_changes(after)  # its end is stored now
    assert after is not None and answering(after) == {"production": "1", "canary": "2"}


def test_promoting_the_version_in_production_again_replaces_the_run_of_a_server(own_store):
    put(own_store, "second")
    watcher = RegistryWatcher(own_store, own_run(own_store), ServeSection(), {})
    begun = watcher.load_initial()
    put(own_store, "second")
    after = watcher.load_changes(begun)
    assert after is not None and answering(after) == {"production": "1"}


def test_a_run_whose_name_is_a_number_is_not_confused_with_a_version(
    own_store, good_spec, good_models, splits
):
    make_run(own_store, "1", good_spec, good_models, splits, perturb_weights(good_models.classifier, 9))
    watcher = RegistryWatcher(own_store, own_run(own_store, "1"), ServeSection(), {})
    begun = watcher.load_initial()
    put(own_store, "second")
    after = watcher.load_changes(begun)
    assert after is not None and after.production is not None
    assert after.production.candidate.run == "second"


@ROLES
def test_a_canary_that_the_store_does_not_return_is_loaded_later_and_production_at_once(
    own_store, monkeypatch, role
):
    put(own_store, "first")
    put(own_store, "second", role)
    watcher = RegistryWatcher(own_store, InitialModel(), ServeSection(), {})
    load = watcher.registry.load
    with monkeypatch.context() as broken:
        broken.setattr(watcher.registry, "load", lambda number: failing(2) if number == 2 else load(number))
        begun = watcher.load_initial()
        assert answering(begun) == {"production": "1"} and begun.error is None
        still = watcher.load_changes(begun)
        assert still is not None and answering(still) == {"production": "1"}
    after = watcher.load_changes(still)
    assert after is not None and answering(after) == {"production": "1", role_name(role): "2"}
    assert after.production is begun.production and watcher.load_changes(after) is None


@ROLES
def test_a_damaged_canary_or_shadow_is_ended_and_production_is_served_without_it(own_store, role):
    put(own_store, "first")
    watcher = RegistryWatcher(own_store, InitialModel(), ServeSection(), {})
    begun = watcher.load_initial()
    put(own_store, "second", role)
    key = "registry/versions/000002.safetensors"
    own_store.write(key, own_store.read(key)[:-1])
    assert answering(replica(own_store, InitialModel())) == {"production": "1"}
    ended = Registry(own_store).state()
    assert (ended.canary, ended.shadow) == (None, None) and "000002" in ended.why
    after = watcher.load_changes(begun)
    assert after is not None and answering(after) == {"production": "1"}


def test_a_running_replica_ends_a_damaged_canary_and_goes_on(own_store, monkeypatch):
    put(own_store, "first")
    watcher = RegistryWatcher(own_store, InitialModel(), ServeSection(), {})
    begun = watcher.load_initial()
    put(own_store, "second", PromotionRequest("ana", "", canary=0.1))
    own_store.write("registry/versions/000002.safetensors", b"cut")
    after, loads, load = begun, [], watcher.registry.load
    monkeypatch.setattr(watcher.registry, "load", lambda number: loads.append(number) or load(number))
    with monkeypatch.context() as broken:  # the registry cannot be written yet
        broken.setattr(watcher.registry, "end_canary", lambda number, by, why: failing(number))
        for _ in range(5):
            after = watcher.load_changes(after)
            assert after is not None and answering(after) == {"production": "1"}
    assert Registry(own_store).state().canary == 2
    after = watcher.load_changes(after)
    assert after is not None and answering(after) == {"production": "1"}
    assert loads == [2]  # its whole file, each time
    ended = Registry(own_store).state()
    assert ended.canary is None and "000002" in ended.why
    put(own_store, "swapped", PromotionRequest("ana", "", force="a drill", canary=0.1))
    after = watcher.load_changes(after)
    assert after is not None and answering(after) == {"production": "1", "canary": "3"}


def role_name(role: PromotionRequest) -> str:
    return "shadow" if role.shadow else "canary"


def failing(number: int) -> NoReturn:
    raise StoreError(f"versions/{number}: no answer")


@pytest.fixture
def resizing(own_store, good_spec, good_models, splits) -> FolderStore:
    """The store with a run `resizing`, whose run file sets resize and watch_share."""
    serve = good_spec.serve.model_copy(update={"resize": True, "watch_share": 0.02, "batch_size": 7})
    spec = good_spec.model_copy(update={"serve": serve})
    make_run(own_store, "resizing", spec, good_models, splits, perturb_weights(good_models.classifier, 5))
    return own_store


def test_settings_of_a_version_come_from_its_own_run_file(resizing):
    put(resizing, "first")
    watcher = RegistryWatcher(resizing, InitialModel(), ServeSection(), {})
    begun = watcher.load_initial()
    assert begun.production is not None and not begun.production.input_spec.resize
    put(resizing, "resizing")
    after = watcher.load_changes(begun)
    assert after is not None and after.production is not None
    settings = after.production.section
    assert after.production.input_spec.resize and settings.watch_share == 0.02
    assert settings.batch_size == ServeSection().batch_size  # the server's, which all its versions share
    overridden = replica(resizing, InitialModel(), watch=False)
    assert (
        overridden.production is not None and not overridden.production.section.watch
    )  # --set takes precedence over every run file


def test_equal_weights_with_other_settings_are_another_version(own_store, good_spec):
    put(own_store, "first")
    serve = good_spec.serve.model_copy(update={"resize": True})
    Run.start(own_store, "first", good_spec.model_copy(update={"serve": serve}))
    assert replica(own_store, own_run(own_store)).production.input_spec.resize
    put(own_store, "first")
    now = replica(own_store, InitialModel())
    assert answering(now) == {"production": "2"} and now.production.input_spec.resize


def test_a_damaged_version_leaves_a_server_of_a_run_with_that_run(own_store):
    initial = own_run(own_store)
    put(own_store, "second")
    own_store.write("registry/versions/000001.safetensors", b"cut")
    assert answering(replica(own_store, initial)) == {"production": "first"}


def test_only_a_failure_of_the_store_itself_is_waited_for():
    kinds = (StoreError, DamagedError, DamagedVersionError, InputError)
    assert [is_store_failure(kind("why")) for kind in kinds] == [True, False, False, False]
