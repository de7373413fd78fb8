"""Which versions a replica answers with, whenever it begins."""

from __future__ import annotations

from typing import Any

import pytest
from planted import nudged, plant_run

from defuse_core.config import ServeSection
from defuse_core.errors import StoreError
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from services.serving.candidate import prepare
from services.serving.lineup import Follower, Lineup, Source
from services.serving.promotion import How, promote
from services.serving.registry import Registry

ANA = How(by="ana", why="")


def put(store: FolderStore, name: str, how: How = ANA) -> None:
    promote(Registry(store), prepare(Run.open(store, name))[1], how)


def own_run(store: FolderStore, name: str = "first") -> Source:
    """What `defuse serve NAME` begins with at this moment."""
    key, _ = prepare(Run.open(store, name))
    return Source(f"{name}/{key}", Registry(store).standing())


def replica(store: FolderStore, source: Source, **changes: Any) -> Lineup:
    """The lineup of a replica that begins now."""
    return Follower(store, source, ServeSection(), changes).first()


def answering(lineup: Lineup) -> dict[str, str]:
    return {role: served.name for role, served in lineup.roles().items()}


def test_a_replica_that_begins_later_answers_with_what_the_others_went_over_to(own_store):
    source = own_run(own_store)
    assert answering(replica(own_store, source)) == {"production": "first"}
    put(own_store, "second")
    put(own_store, "swapped", How("ana", "", force="a drill", canary=0.1))
    assert answering(replica(own_store, source)) == {"production": "1", "canary": "2"}


def test_a_trial_beside_production_does_not_take_a_server_away_from_its_own_run(own_store):
    put(own_store, "second")
    source = own_run(own_store)
    follower = Follower(own_store, source, ServeSection(), {})
    begun = follower.first()
    assert answering(begun) == {"production": "first"}
    put(own_store, "swapped", How("ana", "", force="a drill", shadow=True))
    after = follower.next(begun)
    assert after is not None and answering(after) == {"production": "first", "shadow": "2"}
    assert answering(replica(own_store, source)) == answering(after)


def test_promoting_what_is_in_production_already_takes_a_server_away_from_its_own_run(own_store):
    put(own_store, "second")
    follower = Follower(own_store, own_run(own_store), ServeSection(), {})
    begun = follower.first()
    put(own_store, "second")
    after = follower.next(begun)
    assert after is not None and answering(after) == {"production": "1"}


def test_a_run_whose_name_is_a_number_is_not_taken_for_a_version(own_store, good_spec, good_models, splits):
    plant_run(own_store, "1", good_spec, good_models, splits, nudged(good_models.classifier, 9))
    follower = Follower(own_store, own_run(own_store, "1"), ServeSection(), {})
    begun = follower.first()
    put(own_store, "second")
    after = follower.next(begun)
    assert after is not None and after.production is not None
    assert after.production.candidate.run == "second"


def test_a_store_that_fails_for_a_moment_ends_no_trial(own_store, monkeypatch):
    put(own_store, "first")
    follower = Follower(own_store, Source(), ServeSection(), {})
    begun = follower.first()
    put(own_store, "second", How("ana", "", canary=0.1))
    with monkeypatch.context() as broken:
        broken.setattr(follower.registry, "load", failing)
        with pytest.raises(StoreError):
            follower.next(begun)
    after = follower.next(begun)
    assert after is not None and answering(after) == {"production": "1", "canary": "2"}


def failing(number: int) -> None:
    raise StoreError(f"versions/{number}: no answer")


@pytest.fixture
def resizing(own_store, good_spec, good_models, splits) -> FolderStore:
    """The store, with a run `resizing` whose run file lets pictures be resized and watches otherwise."""
    serve = good_spec.serve.model_copy(update={"resize": True, "watch_share": 0.02, "batch_size": 7})
    spec = good_spec.model_copy(update={"serve": serve})
    plant_run(own_store, "resizing", spec, good_models, splits, nudged(good_models.classifier, 5))
    return own_store


def test_what_belongs_to_a_version_comes_from_its_own_run_file(resizing):
    put(resizing, "first")
    follower = Follower(resizing, Source(), ServeSection(), {})
    begun = follower.first()
    assert begun.production is not None and not begun.production.expected.resize
    put(resizing, "resizing")
    after = follower.next(begun)
    assert after is not None and after.production is not None
    settings = after.production.settings
    assert after.production.expected.resize and settings.watch_share == 0.02
    assert settings.batch_size == ServeSection().batch_size  # the server's, which all its versions share
    told = replica(resizing, Source(), watch=False)
    assert (
        told.production is not None and not told.production.settings.watch
    )  # --set stands above every run file


def test_a_changed_setting_of_a_run_makes_another_version_of_equal_weights(own_store, good_spec):
    put(own_store, "first")
    serve = good_spec.serve.model_copy(update={"resize": True})
    Run.start(own_store, "first", good_spec.model_copy(update={"serve": serve}))
    assert replica(own_store, own_run(own_store)).production.expected.resize
    put(own_store, "first")
    now = replica(own_store, Source())
    assert answering(now) == {"production": "2"} and now.production.expected.resize
