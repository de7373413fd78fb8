"""Personal access tokens: Label Studio exchanges them for access tokens that are valid for five minutes."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import httpx


class RenewedToken(httpx.Auth):
    """Renews the access token, and repeats the request, once where the server rejects it.

    The SDK renews it when it has expired by this machine's clock, which may be late.
    """

    def __init__(self, tokens: Any) -> None:
        """`tokens` are those of the SDK's client."""
        self.tokens = tokens

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        response = yield request
        is_renewal = request.url.path.endswith("/api/token/refresh/")
        if response.status_code == 401 and not is_renewal and not self.tokens._use_legacy_token:
            self.tokens._access_token = None
            request.headers["Authorization"] = f"Bearer {self.tokens.api_key}"
            yield request
