"""Progress as a log shows it: what is left is reckoned from what was made since it was first seen."""

from __future__ import annotations

import io
import logging

from rich.console import Console

from services import console
from services.console import ProgressDisplay


def test_a_resumed_step_reckons_the_time_left_from_what_this_command_has_done(monkeypatch, caplog):
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO)
    display = ProgressDisplay(Console(file=io.StringIO()))
    display("finding failures", 900, 1000, "images")  # 900 were there from before
    now[0] += 60
    display("finding failures", 950, 1000, "images")
    assert caplog.messages[-1] == "finding failures: 950 of 1000 images, 60 s left"
    display("finding failures", 0, 1000, "images")  # another sweep under the same name
    now[0] += 60
    display("finding failures", 600, 1000, "images")
    assert caplog.messages[-1] == "finding failures: 600 of 1000 images, 10/s, 40 s left"
