"""Whether the server that `defuse serve` started can still answer, or come to answer again."""

from __future__ import annotations

import http.client
import logging
from urllib.parse import urlsplit

import ray

from defuse_core.errors import ComputeError

log = logging.getLogger("defuse")
ANSWER_S = 5.0  # within which /healthz is answered
MAX_FAILURES = 3  # in a row


class LivenessCheck:
    """Finds that nothing answers at `url` and nothing will: Ray has no node left that could replace a replica.

    A replica that is being replaced, or a slow machine, is no failure: Serve starts replicas as long as it has a node.
    """

    def __init__(self, url: str) -> None:
        self._url, self._failures = url, 0

    def __call__(self) -> None:
        """Ask once. Raises ComputeError at the MAX_FAILURES-th failure in a row."""
        if _answers(self._url) or _has_node():
            self._failures = 0
            return
        self._failures += 1
        if self._failures == 1:  # Ray may end this process before an error is shown
            log.warning("nothing answers at %s, and Ray has no node left to start a replica on", self._url)
        if self._failures >= MAX_FAILURES:
            raise ComputeError(
                f"nothing answers at {self._url}, and Ray, which would start a replica, has ended (a process of it was "
                "killed, as where memory is short); start the command again"
            )


def _answers(url: str) -> bool:
    address = urlsplit(url)
    assert address.hostname is not None
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=ANSWER_S)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _has_node() -> bool:
    return any(node["Alive"] for node in ray.nodes())  # type: ignore[no-untyped-call]
