"""The bearer token, limits that keep slow and many clients from blocking others, and the errors that answer a request.

Headers are limited where the HTTP server parses them, so `limit_headers` runs in the process of that server: Serve
calls it by the name in RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH. Bodies and requests in progress are limited in the
application.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import ClassVar

import uvicorn.config
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from cluster.ray_compat import reuse_addresses
from defuse_core.config import ServeSection
from services.settings import read_environment

HEALTH_ROUTES = ("/healthz", "/readyz")
DOCS_ROUTES = ("/docs", "/openapi.json")
RETRY_AFTER_S = 1
FAST_UPLOAD_S = 1.0  # a body that arrives within this time counts as fast, and is never limited
MAX_UPLOADS = 1024  # bodies that one replica receives at once; Ray counts them as ongoing requests
# The limit by address applies from here on, and where half of the memory for bodies is in use: fewer slow bodies harm
# nobody, and on a busy machine every body is slow.
MANY_SLOW_UPLOADS = 128
MAX_SLOW_UPLOADS = 8  # most slow bodies of one address where the limit applies
HEADER_TIMEOUT_S = 10.0
MAX_HEADERS_PER_ADDRESS = 512  # connections of one address without complete headers
# Each piece of a body costs a call from Serve's proxy to a replica, however small it is. After a few small pieces a
# connection is therefore read now and then only, and what arrived meanwhile becomes one piece.
SMALL_PIECE_BYTES = 1024  # less than a TCP segment, in which ordinary bodies arrive
MAX_SMALL_PIECES = 8
PIECE_INTERVAL_S = 0.5


class RejectedInput(HTTPException):
    """The request itself is at fault: another one can be answered."""


class Unavailable(HTTPException):
    """The server cannot answer now: the same request can be answered after RETRY_AFTER_S seconds."""

    def __init__(self, message: str) -> None:
        super().__init__(503, message, {"Retry-After": str(RETRY_AFTER_S)})


@contextlib.asynccontextmanager
async def answering_within(seconds: float) -> AsyncIterator[None]:
    """Raise Unavailable where the block takes longer."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise Unavailable(f"no answer within {seconds:g} s") from None


class UploadLimits:
    """Receives request bodies within limits of size, time, memory, and slow uploads per client address."""

    def __init__(self, section: ServeSection) -> None:
        self.max_bytes = int(section.max_body_mb * 1e6)
        self.timeout_s = section.timeout_s
        self.forwarded_for = read_environment().forwarded_for
        self.slow: Counter[str] = Counter()  # slow uploads by address
        self.memory = self.max_bytes * section.max_ongoing  # bytes of all bodies
        self.budget = self.memory  # bytes that may still be buffered

    async def receive(self, request: Request, held: contextlib.ExitStack) -> bytes:
        """Return the body of a request. Raises HTTPException at the first sign that it exceeds a limit.

        Its memory counts until `held` is closed.
        """
        _expect_body_is_read(request)
        content_length = request.headers.get("content-length", "0")
        if not content_length.isdecimal() or int(content_length) > self.max_bytes:
            raise self.too_large()
        upload = _Upload(self, request)
        held.callback(upload.release_memory)
        try:
            return await upload.receive()
        finally:
            upload.release_slow_slot()

    def is_memory_short(self) -> bool:
        return self.budget < self.memory / 2

    def too_large(self) -> RejectedInput:
        return RejectedInput(413, f"the body exceeds the limit of {self.max_bytes / 1e6:g} MB")


def _expect_body_is_read(request: Request) -> None:
    """Raise RejectedInput where the HTTP server took what follows the headers for another protocol.

    That is so for each request that offers to change it, as `curl --http2` and Java's HttpClient do.
    """
    protocol, connection = request.headers.get("upgrade"), ",".join(request.headers.getlist("connection"))
    if protocol and "upgrade" in {each.strip().lower() for each in connection.split(",")}:
        raise RejectedInput(
            400,
            f"the body of a request with the header Upgrade: {protocol[:20]} is not read; send it as plain HTTP/1.1 "
            "(with curl: --http1.1)",
            {"Connection": "close"},  # the rest of the body would be taken for the next request
        )


class _Upload:
    def __init__(self, limits: UploadLimits, request: Request) -> None:
        self._limits, self._request = limits, request
        self._body = bytearray()
        self._size = 0  # bytes that have arrived
        self._slow_address: str | None = None

    async def receive(self) -> bytes:
        limits, loop = self._limits, asyncio.get_running_loop()
        started = loop.time()
        deadline = started + min(FAST_UPLOAD_S, limits.timeout_s)
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    while await self._receive_chunk():
                        pass
                body, self._body = bytes(self._body), bytearray()
                return body
            except TimeoutError:
                if self._slow_address is not None or limits.timeout_s <= FAST_UPLOAD_S:
                    raise RejectedInput(
                        408, f"the body did not arrive within {limits.timeout_s:g} s"
                    ) from None
            self._become_slow()
            deadline = started + limits.timeout_s

    async def _receive_chunk(self) -> bool:
        """Add the next chunk to the body; False after the last one."""
        message = await self._request.receive()
        if message["type"] == "http.disconnect":
            raise RejectedInput(400, "the client disconnected before the body was complete")
        chunk, limits = message.get("body", b""), self._limits
        if self._size + len(chunk) > limits.max_bytes:
            raise limits.too_large()
        if len(chunk) > limits.budget:
            raise Unavailable("too many large bodies at once")
        limits.budget -= len(chunk)
        self._size += len(chunk)
        self._body += chunk
        is_incomplete = bool(message.get("more_body", False))
        if is_incomplete and self._slow_address is not None and limits.is_memory_short():
            self._expect_few_slow(limits.slow[self._slow_address] - 1)
        return is_incomplete

    def _become_slow(self) -> None:
        slow, address = self._limits.slow, client_address(self._request, self._limits.forwarded_for)
        if slow.total() >= MANY_SLOW_UPLOADS or self._limits.is_memory_short():
            self._expect_few_slow(slow[address])
        if slow.total() >= MAX_UPLOADS // 2:
            raise Unavailable("too many slow bodies at once")
        slow[address] += 1
        self._slow_address = address

    def _expect_few_slow(self, others: int) -> None:
        """Raise RejectedInput where too many other slow bodies of this address are arriving."""
        if others >= MAX_SLOW_UPLOADS:
            raise RejectedInput(
                408,
                f"the body did not arrive within {FAST_UPLOAD_S:g} s, and {others} other slow bodies from this address "
                "are arriving",
            )

    def release_memory(self) -> None:
        self._limits.budget += self._size

    def release_slow_slot(self) -> None:
        if self._slow_address is not None:
            self._limits.slow[self._slow_address] -= 1
            if not self._limits.slow[self._slow_address]:
                del self._limits.slow[self._slow_address]


def client_address(request: Request, forwarded_for: bool) -> str:
    """Return the address of the client; with `forwarded_for`, the one that a proxy on this machine adds.

    Without such a proxy the header is the client's own.
    """
    peer = request.client.host if request.client is not None else ""
    if forwarded_for and peer in ("127.0.0.1", "::1"):
        forwarded = request.headers.getlist("x-forwarded-for")
        if forwarded:
            return forwarded[-1].rpartition(",")[2].strip()
    return peer


class RequestSlots:
    """Bounds the requests that a replica decodes and predicts at once, and those that wait for that."""

    def __init__(self, section: ServeSection) -> None:
        self._section = section
        self._slots = asyncio.Semaphore(section.max_ongoing)
        self._waiting = 0

    async def acquire(self, held: contextlib.ExitStack) -> None:
        """Occupy a slot until `held` is closed. Raises Unavailable at once where too many requests wait."""
        if self._slots.locked():
            await self._wait()
        else:
            await self._slots.acquire()
        held.callback(self._slots.release)

    async def _wait(self) -> None:
        section = self._section
        if self._waiting >= section.max_queued:
            raise Unavailable(
                f"overloaded: {section.max_ongoing} requests in progress and {self._waiting} waiting"
            )
        self._waiting += 1
        try:
            async with answering_within(section.timeout_s):
                await self._slots.acquire()
        finally:
            self._waiting -= 1


class BearerAuthMiddleware:
    """Rejects requests without the bearer token; health routes are open. Without a token, all routes are open.

    Browsers cannot send a bearer token, so the pages of DOCS_ROUTES also accept it as the password of HTTP Basic.
    """

    def __init__(self, app: ASGIApp, token: str | None, count_rejected: Callable[[int], None]) -> None:
        """`count_rejected` is called with the status of each answer to a request without the token."""
        self.app, self._count_rejected = app, count_rejected
        self._digest = _digest(token.encode()) if token else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or self._is_allowed(path, dict(scope["headers"])):
            await self.app(scope, receive, send)
            return
        if path in DOCS_ROUTES:
            message, challenge = "expected the token of this server as password", 'Basic realm="Defuse"'
        else:
            message = "expected the header Authorization: Bearer TOKEN with the token of this server"
            challenge = "Bearer"
        self._count_rejected(401)
        response = JSONResponse({"error": message}, 401, {"WWW-Authenticate": challenge})
        await response(scope, receive, send)

    def _is_allowed(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if self._digest is None or path in HEALTH_ROUTES:
            return True
        scheme, _, credentials = headers.get(b"authorization", b"").partition(b" ")
        given = credentials.strip()
        if scheme.lower() == b"basic" and path in DOCS_ROUTES:
            given = _basic_password(given)
        elif scheme.lower() != b"bearer":
            return False
        return hmac.compare_digest(_digest(given), self._digest)


def _basic_password(credentials: bytes) -> bytes:
    try:
        return base64.b64decode(credentials, validate=True).partition(b":")[2]
    except ValueError:
        return b""


def _digest(token: bytes) -> bytes:
    """Return a digest, so that comparing it takes the same time for tokens of any length."""
    return hashlib.sha256(token).digest()


class LimitedHttpProtocol(AutoHTTPProtocol):  # type: ignore[misc,valid-type]
    """uvicorn's HTTP protocol that closes connections without headers and reads bodies in few pieces.

    uvicorn itself closes idle connections after a response, but neither new ones nor those with incomplete headers.
    """

    _incomplete: ClassVar[Counter[str]] = Counter()  # connections without complete headers, by address

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._timer: asyncio.TimerHandle | None = None
        self._small_pieces = 0  # of the body that is arriving
        self._resume: asyncio.TimerHandle | None = None
        self._address = self.client[0] if self.client else ""
        if self._incomplete[self._address] >= MAX_HEADERS_PER_ADDRESS:
            transport.close()
        else:
            self._start_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._start_timer()
        else:
            self._stop_timer()
        self._limit_pieces(len(data))

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        if self._resume is not None:
            self._resume.cancel()
        super().connection_lost(exc)

    def _limit_pieces(self, size: int) -> None:
        if self.cycle is None or not self.cycle.more_body:
            self._small_pieces = 0
        elif size < SMALL_PIECE_BYTES:
            self._small_pieces += 1
            if self._small_pieces > MAX_SMALL_PIECES and self._resume is None:
                self.transport.pause_reading()
                self._resume = self.loop.call_later(PIECE_INTERVAL_S, self._resume_reading)

    def _resume_reading(self) -> None:
        self._resume = None
        if not self.flow.read_paused and not self.transport.is_closing():
            self.transport.resume_reading()

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEADER_TIMEOUT_S, self._on_timeout)
            self._incomplete[self._address] += 1

    def _on_timeout(self) -> None:
        self._stop_timer()  # here too: after a change to another protocol, connection_lost is not called
        self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._incomplete[self._address] -= 1
            if not self._incomplete[self._address]:
                del self._incomplete[self._address]


class NoDisconnectCheck:
    """Lets Serve complete requests whose clients disconnect: watching for that costs more than it saves."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["headers"] = [*scope["headers"], (b"x-request-disconnect-disabled", b"?1")]
        await self.app(scope, receive, send)


def limit_headers() -> list[Middleware]:
    """Let the HTTP servers that this process starts from now on use LimitedHttpProtocol; return their middleware.

    They listen also where a server that was killed did a moment ago. uvicorn takes no client's address from
    X-Forwarded-For, as by default for loopback: `client_address` decides.
    """
    reuse_addresses()
    os.environ["FORWARDED_ALLOW_IPS"] = ""
    name = f"{LimitedHttpProtocol.__module__}:{LimitedHttpProtocol.__qualname__}"
    uvicorn.config.HTTP_PROTOCOLS["auto"] = name
    return [Middleware(NoDisconnectCheck)]
