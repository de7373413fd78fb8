"""What tests run in processes of their own, since theirs is in another Ray. Ray is imported there: not here."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from defuse_core.config import RunFile
from tests.waiting import wait_until


def start_two_clusters(spec: RunFile, folder: Path) -> None:
    """Start one after the other, without a token at first and with temporary files in `folder`."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR"):
        os.environ.pop(name, None)
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None  # which Python has looked for already

    from cluster.compute import RayCompute
    from tests.cluster.fakes import shouting

    for _ in range(2):
        with RayCompute(None, spec) as compute:
            print(compute.task("review", shouting, "help"), os.environ["RAY_AUTH_TOKEN"], flush=True)
            print("processes", *sorted(_global_node().all_processes), flush=True)
        assert "RAY_AUTH_TOKEN" not in os.environ and "RAY_AUTH_MODE" not in os.environ


def sleep_in_full_memory(spec: RunFile, pid: Path) -> None:
    """Run a task in a Ray that finds its memory full as soon as it runs."""
    os.environ |= {
        "RAY_memory_usage_threshold": "0.0",
        "RAY_memory_monitor_refresh_ms": "250",
        "RAY_task_oom_retry_delay_base_ms": "100",
    }
    from cluster import ray_compat

    ray_compat.MEMORY_RETRIES = 1
    _sleep(spec, pid)


def sleep_in_ray_that_ends(spec: RunFile, pid: Path) -> None:
    """Run a task in a Ray whose head is killed meanwhile."""

    def kill_once() -> None:
        wait_until(pid.exists)
        _kill_head()

    threading.Thread(target=kill_once, daemon=True).start()
    _sleep(spec, pid)


def go_on_without_head() -> None:
    """Do nothing while the head of the Ray that this process has started is gone."""
    os.environ.pop("RAY_gcs_rpc_server_reconnect_timeout_s", None)
    from cluster import connection, ray_compat

    ray_compat.HEAD_AWAY_S = 3
    ray_compat.wait_for_absent_head()
    connection.connect(None)
    _kill_head()
    time.sleep(50)  # less than Ray's default


def outlast_the_usual_wait_for_a_head() -> None:
    """Ask for the nodes of a cluster that has lost its head, for longer than Ray waits by default: 3 s here."""
    waits = "RAY_gcs_rpc_server_reconnect_timeout_s"
    import ray
    from ray._raylet import Config  # type: ignore[attr-defined]
    from ray.cluster_utils import Cluster

    from cluster import connection

    os.environ[waits] = "300"  # of the cluster's processes
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    os.environ[waits] = "3"
    Config.initialize("")
    del os.environ[waits]
    connection.connect(cluster.address)
    os.kill(cluster.head_node.all_processes["gcs_server"][0].process.pid, signal.SIGKILL)
    threading.Thread(target=ray.nodes, daemon=True).start()
    time.sleep(12)
    print("outlasted", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)  # the end of Ray would wait for the head


def interrupt_a_start() -> None:
    """Send this process SIGINT when the embedded Ray begins to connect, and print what is left."""
    import psutil
    import ray
    from ray._private import worker

    from cluster import connection

    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the process of the tests may ignore
    connect, how = worker.connect, ["before"]

    def interrupted(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        connect(*args, **kwargs)
        how[0] = "after"

    worker.connect = interrupted
    try:
        connection.connect(None)
    except KeyboardInterrupt:
        left = [child.name() for child in psutil.Process().children()]
        print(f"interrupted {how[0]} the start,", ray.is_initialized(), left, flush=True)


def _sleep(spec: RunFile, pid: Path) -> None:
    from cluster.compute import RayCompute
    from tests.cluster.fakes import sleeping

    with RayCompute(None, spec) as compute:
        compute.task("train", sleeping, pid)


def _global_node() -> Any:
    from ray._private import worker

    return worker._global_node


def _kill_head() -> None:
    os.kill(_global_node().all_processes["gcs_server"][0].process.pid, signal.SIGKILL)
