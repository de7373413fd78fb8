"""Errors that answer a request, each with its HTTP status and a one-sentence message."""

from __future__ import annotations

from collections.abc import Mapping

from defuse_core.errors import DamagedError, StoreError


class RequestError(Exception):
    """A request that is answered with `status`, `message`, and `headers` beside its content type."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers


class RejectedInput(RequestError):  # noqa: N818 - the client's error, not a failure of the server
    """The request itself is at fault: another one can be answered."""


class Unavailable(RequestError):  # noqa: N818 - a state of the server
    """The server cannot answer now: the same request can be answered after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(503, message, {"Retry-After": str(retry_after_s)})


def is_store_outage(error: BaseException) -> bool:
    """Whether the store does not answer now, and may at the next attempt; a damaged file stays damaged."""
    return isinstance(error, StoreError) and not isinstance(error, DamagedError)
