"""How `defuse serve` ends."""

from __future__ import annotations

import time

from serve_process import serve_process


def test_a_signal_that_rays_processes_get_too_ends_serve_soon_and_without_a_warning(own_store, short_folder):
    options = ("--store", own_store.address, "--set", "serve.cpus_per_replica=0.5")
    with serve_process(short_folder, "first", *options) as running:
        before, started = running.output(), time.monotonic()
        assert running.stop_group() == 0
        assert time.monotonic() - started < 30  # for so long serve.shutdown waits for the controller alone
        assert running.output().removeprefix(before) == ""
