"""A proxy in front of the server that loses or delays replies, cuts connections, or sends other replies, as asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx


@dataclass(frozen=True)
class Reply:
    """What to answer in the server's place."""

    status: int
    body: str = "{}"
    kind: str = "application/json"
    location: str = ""  # of a redirection


LOSE, CUT = "lose the reply", "cut the connection before the server sees anything"
Rule = Callable[
    [str, str], "str | Reply | float | None"
]  # method, path -> what to do; seconds delay; None passes


@dataclass
class Proxy:
    address: str
    seen: list[str] = field(default_factory=list)
    rule: Rule = lambda method, path: None

    def lose(self, method: str, fragment: str, times: int = 1) -> None:
        self._plan(LOSE, method, fragment, times)

    def cut(self, method: str, fragment: str, times: int = 1) -> None:
        self._plan(CUT, method, fragment, times)

    def answer(self, reply: Reply) -> None:
        self.rule = lambda method, path: reply

    def _plan(self, deed: str, method: str, fragment: str, times: int) -> None:
        left = [times]

        def rule(asked: str, path: str) -> str | None:
            if asked == method and fragment in path and left[0]:
                left[0] -= 1
                return deed
            return None

        self.rule = rule


@contextmanager
def proxy_to(server: str) -> Iterator[Proxy]:
    upstream = httpx.Client(base_url=server, timeout=60, trust_env=False)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            proxy.seen.append(f"{self.command} {self.path}")
            deed = proxy.rule(self.command, self.path)
            if isinstance(deed, float):
                time.sleep(deed)
            if isinstance(deed, Reply):
                return self.send(deed.status, deed.kind, deed.body.encode(), deed.location)
            if deed == CUT:
                return self.hang_up()
            headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "content-length")}
            reply = upstream.request(self.command, self.path, content=body, headers=headers)
            if deed == LOSE:
                return self.hang_up()
            return self.send(reply.status_code, reply.headers.get("content-type", ""), reply.content)

        do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = handle_any  # noqa: N815

        def hang_up(self) -> None:
            self.close_connection = True

        def send(self, status: int, kind: str, body: bytes, location: str = "") -> None:
            self.send_response(status)
            if location:
                self.send_header("Location", location)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Log nothing."""

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    proxy = Proxy(f"http://127.0.0.1:{listener.server_address[1]}")
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield proxy
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()
        upstream.close()
