"""What went wrong between us and a Label Studio server, in one line that says what to do."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import httpx
from label_studio_sdk.core.api_error import ApiError
from label_studio_sdk.core.parse_error import ParsingError

from defuse_core.errors import InputError, ServiceError


@contextlib.contextmanager
def unless_gone() -> Iterator[None]:
    """A task that someone deleted in the meantime needs nothing any more."""
    try:
        yield
    except ApiError as error:
        if error.status_code != 404:
            raise


@contextlib.contextmanager
def explained(address: str) -> Iterator[None]:
    """Turn what went wrong into one line.

    The SDK's own errors hold headers and whole pages, so they are not chained.
    """
    try:
        yield
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise InputError(f"LABEL_STUDIO_URL: {address} is not a usable address") from error
    except httpx.ConnectError:
        raise ServiceError(
            f"Label Studio at {address} cannot be reached; start it or correct LABEL_STUDIO_URL, then run again"
        ) from None
    except httpx.TimeoutException:
        raise ServiceError(
            f"Label Studio at {address} is too slow to answer; run again, nothing is lost"
        ) from None
    except httpx.HTTPError:
        raise ServiceError(
            f"Label Studio at {address} cut the connection; run again, nothing is lost"
        ) from None
    except ApiError as error:
        raise _of_status(address, error.status_code or 0, error.body) from None
    except (ParsingError, ValueError, TypeError, AttributeError, KeyError):
        raise ServiceError(
            f"{address} answered something that Label Studio 1.23 does not; is LABEL_STUDIO_URL right?"
        ) from None


def _of_status(address: str, status: int, body: Any) -> Exception:  # noqa: PLR0911 - one line per status
    if status == 401:
        return InputError(
            f"Label Studio at {address} refused the token (401); set LABEL_STUDIO_API_KEY to a valid one"
        )
    if status == 403:
        return InputError(
            f"Label Studio at {address} forbids this to the token's account (403); use an administrator's"
        )
    if status == 429:
        return ServiceError(
            f"Label Studio at {address} is limiting requests (429); wait a minute and run again"
        )
    if status >= 500:
        return ServiceError(
            f"Label Studio at {address} failed ({status}); see its log, then run again, nothing is lost"
        )
    if 300 <= status < 400:
        return InputError(f"{address} redirects elsewhere ({status}); set LABEL_STUDIO_URL to where it leads")
    if not is_json(body):
        return InputError(
            f"{address} answered a web page ({status}), not as Label Studio does; correct LABEL_STUDIO_URL"
        )
    return ServiceError(f"Label Studio at {address} did not accept the request ({status}): {_detail(body)}")


def is_json(body: Any) -> bool:
    return isinstance(body, (dict, list)) or body is None or hasattr(body, "model_dump")


def _detail(body: Any) -> str:
    plain = body.model_dump() if hasattr(body, "model_dump") else body
    if isinstance(plain, dict):
        plain = plain.get("validation_errors") or plain.get("detail") or plain
    return json.dumps(plain, default=str)[:300]
