"""Failures of requests to Label Studio as errors in one line that says what to do."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx

from defuse_core.errors import DefuseError, InputError, ServiceError
from services.settings import proxy_for

try:
    from label_studio_sdk.core.api_error import ApiError
    from label_studio_sdk.core.parse_error import ParsingError
except ModuleNotFoundError as error:
    raise InputError("Label Studio needs its client here: pip install 'defuse[label-studio]'") from error


@contextlib.contextmanager
def translated_errors(address: str) -> Iterator[None]:
    """Raise failures of a request as ServiceError or InputError in one line.

    The SDK's own errors contain headers and whole pages, so they are not chained.
    """
    try:
        yield
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise InputError(f"LABEL_STUDIO_URL: {address} is not a usable address") from error
    except httpx.ConnectError as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise InputError(
                f"Label Studio at {address}: its certificate is not trusted; set SSL_CERT_FILE to that of your CA"
            ) from None
        raise _unreachable(address) from None
    except httpx.ProxyError:
        raise _unreachable(address) from None
    except httpx.TimeoutException:
        raise ServiceError(
            f"Label Studio at {address} is too slow to answer; run again, nothing is lost"
        ) from None
    except httpx.HTTPError:
        raise ServiceError(
            f"Label Studio at {address} cut the connection; run again, nothing is lost"
        ) from None
    except ApiError as error:
        raise _status_error(address, error.status_code or 0, error.body) from None
    except (ParsingError, ValueError, TypeError, AttributeError, KeyError):
        raise ServiceError(
            f"{address} sent a reply that Label Studio 1.23 does not send; check LABEL_STUDIO_URL"
        ) from None


@contextlib.contextmanager
def missing_allowed() -> Iterator[None]:
    """Ignore that a task does not exist: someone deleted it in the meantime."""
    try:
        yield
    except ApiError as error:
        if error.status_code != 404:
            raise


def _unreachable(address: str) -> ServiceError:
    """Return the error of a server that cannot be reached, which names the proxy that the request went through."""
    if proxy_for(address) is None:
        remedy = "start it or correct LABEL_STUDIO_URL, then run again"
    else:
        scheme, host = urlsplit(address).scheme, urlsplit(address).hostname
        remedy = (
            f"if the proxy of {scheme.upper()}_PROXY does not reach it, set NO_PROXY={host}; else start it"
        )
    return ServiceError(f"Label Studio at {address} cannot be reached; {remedy}")


def _status_error(address: str, status: int, body: Any) -> DefuseError:
    if status == 401:
        problem = "rejects the token (401); set LABEL_STUDIO_API_KEY to a valid one"
        return InputError(f"Label Studio at {address} {problem}")
    if status == 403:
        problem = "forbids this request to the token's account (403); use an administrator's token"
        return InputError(f"Label Studio at {address} {problem}")
    if status == 429:
        problem = "is limiting requests (429); wait a minute and run again"
    elif status >= 500 and not is_json(body) and proxy_for(address) is not None:
        return _unreachable(address)
    elif status >= 500:
        problem = f"failed ({status}); see its log, then run again, nothing is lost"
    elif 300 <= status < 400:
        return InputError(
            f"{address} redirects elsewhere ({status}); set LABEL_STUDIO_URL to the final address"
        )
    elif not is_json(body):
        return InputError(
            f"{address} answered with a web page ({status}), not as Label Studio does; correct LABEL_STUDIO_URL"
        )
    else:
        problem = f"did not accept the request ({status}): {_detail(body)}"
    return ServiceError(f"Label Studio at {address} {problem}")


def is_json(body: Any) -> bool:
    return isinstance(body, (dict, list)) or body is None or hasattr(body, "model_dump")


def _detail(body: Any) -> str:
    plain = body.model_dump() if hasattr(body, "model_dump") else body
    if isinstance(plain, dict):
        plain = plain.get("validation_errors") or plain.get("detail") or plain
    return json.dumps(plain, default=str)[:300]
