"""The page /docs loads nothing from elsewhere, and has a command for each route."""

from __future__ import annotations

import asyncio
import re
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from services.serving.api import build_api
from services.serving.monitoring import ServingMetrics


def page(token: str | None) -> httpx.Response:
    deployment: Any = SimpleNamespace(token=token, metrics=ServingMetrics())
    transport = httpx.ASGITransport(build_api(cast(Any, deployment)))

    async def get() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://replica:8000") as client:
            return await client.get("/docs", headers={"Authorization": f"Bearer {token}"} if token else {})

    return asyncio.run(get())


@pytest.mark.parametrize("token", [None, "a-long-secret"])
def test_the_page_of_routes_loads_nothing_and_never_holds_the_token(token: str | None):
    answer = page(token)
    assert answer.status_code == 200
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert "<script" not in answer.text and "a-long-secret" not in answer.text
    assert re.findall(r"(?:src|href)=\S*", answer.text) == ['href="openapi.json">openapi.json</a>']


def test_each_route_has_a_command_with_the_token_where_it_is_asked_for():
    found = page("a-long-secret").text.replace("&quot;", '"')
    token = '-H "Authorization: Bearer $DEFUSE_SERVE_TOKEN"'
    assert f"curl {token} -F image=@picture.png http://replica:8000/v1/predict<" in found
    assert f"curl {token} http://replica:8000/v1/model<" in found
    assert "curl http://replica:8000/readyz<" in found
    assert "curl -F image=@picture.png http://replica:8000/v1/predict<" in page(None).text
