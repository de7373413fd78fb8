"""One replica, without Ray: what it answers beside a damaged version, and how long it follows the registry."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from defuse_core.config import ServeSection
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from services.serving.active_versions import InitialModel
from services.serving.api import build_api
from services.serving.candidate import prepare_candidate
from services.serving.deployment import ClassifierDeployment
from services.serving.errors import Unavailable
from services.serving.registry import PromotionRequest, Registry, promote


def new_replica(store: FolderStore) -> ClassifierDeployment:
    return ClassifierDeployment(store.address, InitialModel(), ServeSection(), {}, require_token=False)


def test_a_replica_beside_a_damaged_version_starts_answers_503_with_the_reason_and_recovers(own_store):
    promote(
        Registry(own_store), prepare_candidate(Run.open(own_store, "first"))[1], PromotionRequest("ana", "")
    )
    key = "registry/versions/000001.safetensors"
    whole = own_store.read(key)
    own_store.write(key, whole[:-1])
    replica = new_replica(own_store)
    with pytest.raises(
        Unavailable, match=r"the version in production cannot be loaded: .*000001"
    ) as rejected:
        replica.input_spec()
    assert rejected.value.status == 503
    own_store.write(key, whole)
    versions = replica.watcher.load_changes(replica.active)
    assert versions is not None and versions.names() == {"production": "1"}


async def post(replica: ClassifierDeployment, body: bytes, content_type: str = "image/png") -> httpx.Response:
    """Send one request to the replica's application, without a server."""
    transport = httpx.ASGITransport(build_api(replica), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
        return await client.post("/v1/predict", content=body, headers={"Content-Type": content_type})


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (MemoryError("Unable to allocate 22 TiB"), 503, "out of memory"),
        (KeyError("x"), 500, "KeyError"),
    ],
)
def test_errors_that_nobody_expected_are_answered_in_json(
    own_store, pictures, monkeypatch, error, status, words
):
    def failing(*_: object) -> None:
        raise error

    monkeypatch.setattr("services.serving.api.decode_body", failing)
    promote(
        Registry(own_store), prepare_candidate(Run.open(own_store, "first"))[1], PromotionRequest("ana", "")
    )
    reply = asyncio.run(post(new_replica(own_store), pictures[0]))
    assert reply.status_code == status and words in reply.json()["error"]


def test_the_registry_is_not_polled_after_the_block_ends_with_an_error(own_store):
    async def tasks_left() -> set[asyncio.Task[None]]:
        with pytest.raises(RuntimeError, match="shut down"):
            async with new_replica(own_store).following_registry():
                raise RuntimeError("shut down")
        await asyncio.sleep(0)
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert not asyncio.run(tasks_left())
