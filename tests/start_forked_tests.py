"""The command by which xdist starts a process of tests: it has one forked that has imported torch, and ends with it."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.start_forked_worker import ask_for

FORKED = "forked"

if __name__ == "__main__":
    if sys.argv[1:] == [FORKED]:
        exec(eval(sys.stdin.readline()))  # as execnet begins each of its processes
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the forked process, and this one after it
        ask_for([__file__, FORKED], own_group=False)
