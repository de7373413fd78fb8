"""A port for a server that a test starts."""

from __future__ import annotations

import itertools
import os
import socket

# Above the ports of Ray's workers and below those of Serve's replicas (from 30,000). Linux gives ports from 32,768 on
# to processes that name none, as Ray's do by the dozen: such a port may be taken before the test's server starts.
_FIRST, _END = 20_000, 30_000
_PROCESSES = 8
_count = itertools.count(os.getpid() * 17)


def free_port() -> int:
    """Return a TCP port that nobody listens on, and that neither this nor another process of the tests was given."""
    share = (_END - _FIRST) // _PROCESSES
    process = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _PROCESSES
    for number in itertools.islice(_count, share):
        port = _FIRST + process * share + number % share
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("", port))
            except OSError:
                continue
        return port
    raise OSError(f"every port from {_FIRST} to {_END} is taken")
