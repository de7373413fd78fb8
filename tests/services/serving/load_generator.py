"""A small HTTP load generator: so many clients, each sending one request after the other over its own connection."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Reply:
    """One answer; status 0 where the connection broke."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float
    at: float = field(default_factory=time.monotonic)

    def json(self) -> Any:
        return json.loads(self.body)


def request_bytes(body: bytes, path: str, kind: str, **headers: str) -> bytes:
    """Return a whole HTTP/1.1 POST."""
    lines = {"Host": "127.0.0.1", "Content-Type": kind, "Content-Length": str(len(body)), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


class Client:
    """One keep-alive connection, made anew when it breaks."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes, timeout_s: float = 120.0) -> Reply:
        started = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                status, headers, body = await self._exchange(request)
        except (OSError, EOFError, TimeoutError, ValueError) as error:
            self.close()
            return Reply(0, {}, repr(error).encode(), time.monotonic() - started)
        return Reply(status, headers, body, time.monotonic() - started)

    async def _exchange(self, request: bytes) -> tuple[int, dict[str, str], bytes]:
        if self.streams is None:
            self.streams = await asyncio.open_connection("127.0.0.1", self.port, limit=2**20)
        reader, writer = self.streams
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:] if line)}
        if headers.get("transfer-encoding") == "chunked":
            body = await _chunks(reader)
        else:
            body = await reader.readexactly(int(headers.get("content-length", 0)))
        if headers.get("connection") == "close":
            self.close()
        return int(head[0].split(" ")[1]), headers, body

    def close(self) -> None:
        if self.streams is not None:
            self.streams[1].close()
        self.streams = None


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int(await reader.readline(), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readline()
    return body


async def _client(
    port: int, requests: Callable[[], bytes | None], replies: list[Reply], pause_s: float
) -> None:
    client = Client(port)
    while (request := requests()) is not None:
        replies.append(await client.ask(request))
        await asyncio.sleep(pause_s)
    client.close()


def load(
    port: int,
    clients: int,
    requests: Callable[[], bytes | None],
    replies: list[Reply] | None = None,
    pause_s: float = 0.0,
) -> list[Reply]:
    """Return the replies of `clients` at once that send what `requests` returns until it returns None.

    With `replies` they are appended to that list as they come. Each client pauses after each reply.
    """
    replies = [] if replies is None else replies

    async def run() -> list[Reply]:
        await asyncio.gather(*(_client(port, requests, replies, pause_s) for _ in range(clients)))
        return replies

    return asyncio.run(run())


def limited(requests: list[bytes], count: int, seconds: float = 240) -> Callable[[], bytes | None]:
    """Return a function that cycles through `requests` and returns None after `count` calls or `seconds`."""
    end, sent = time.monotonic() + seconds, 0

    def next_request() -> bytes | None:
        nonlocal sent
        if sent >= count or time.monotonic() > end:
            return None
        sent += 1
        return requests[sent % len(requests)]

    return next_request
