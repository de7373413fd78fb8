"""One replica of the served application, without Ray, and what is sent to it."""

from __future__ import annotations

from typing import Any

import httpx

from defuse_core.config import ServeSection
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from services.serving.active_versions import InitialModel
from services.serving.api import build_api
from services.serving.candidate import prepare_candidate
from services.serving.deployment import ClassifierDeployment
from services.serving.registry import Registry, promote
from services.serving.registry_state import PromotionRequest


def new_replica(store: FolderStore, **settings: Any) -> ClassifierDeployment:
    return ClassifierDeployment(
        store.address, InitialModel(), ServeSection(**settings), {}, require_token=False
    )


def put(store: FolderStore, name: str) -> None:
    promote(Registry(store), prepare_candidate(Run.open(store, name))[1], PromotionRequest("ana", ""))


async def post(
    replica: ClassifierDeployment, body: bytes, content_type: str = "image/png", **headers: str
) -> httpx.Response:
    """Send one request to the replica's application, without a server."""
    transport = httpx.ASGITransport(build_api(replica), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
        return await client.post(
            "/v1/predict", content=body, headers={"Content-Type": content_type, **headers}
        )
