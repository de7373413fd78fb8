"""A server that gives no answer: one warning per outage and process, and an end after about a minute."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from defuse_core.errors import without_credentials
from services.storage.s3_errors import NO_ANSWER

log = logging.getLogger("defuse")
SILENCE_S = 50.0  # without an answer to one request, the pauses between its attempts not counted
WARN_S = 5.0  # after the request was sent; what the next attempts mend before is no outage

_silent: set[str] = set()  # servers of which this process has warned
_lock = threading.Lock()


class OutageWatch:
    """Watches the requests of one client. botocore itself counts attempts only, of which each can take a timeout."""

    def __init__(self, client: Any, timeout_s: float) -> None:
        """`timeout_s` is the longest silence in one attempt, after which botocore ends it."""
        self.server, self.timeout_s = without_credentials(client.meta.endpoint_url), timeout_s
        self.silence_s = max(SILENCE_S, 2 * timeout_s)  # at least two attempts
        client.meta.events.register("request-created.s3", self._on_attempt)
        client.meta.events.register_first("needs-retry.s3", self._on_result)

    def _on_attempt(self, request: Any, **_: Any) -> None:
        request.context["defuse_begun"] = time.monotonic()

    def _on_result(self, request_dict: Any, caught_exception: Exception | None, **_: Any) -> None:
        """Raise the attempt's error, which ends its request, once the request was without an answer for too long."""
        if not isinstance(caught_exception, NO_ANSWER):
            self._report_end()
            return
        context, now = request_dict["context"], time.monotonic()
        # a slow line takes the rest of the time to send the body
        waited_s = min(now - context["defuse_begun"], self.timeout_s)
        context.setdefault("defuse_silent_since", now - waited_s)
        context["defuse_silent_s"] = context.get("defuse_silent_s", 0.0) + waited_s
        if context["defuse_silent_s"] >= self.silence_s:
            raise caught_exception
        if now - context["defuse_silent_since"] >= WARN_S:
            self._report()

    def _report(self) -> None:
        with _lock:
            if self.server in _silent:
                return
            _silent.add(self.server)
        log.warning("the S3 server %s does not answer, trying again", self.server)

    def _report_end(self) -> None:
        with _lock:
            if self.server not in _silent:
                return
            _silent.remove(self.server)
        log.info("the S3 server %s answers again", self.server)
