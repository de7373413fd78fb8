"""The containers' own start commands and health checks, run here with other ports and folders, all else the same."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from shipped import ENVIRONMENT, ROOT, compose, document, ray_specs

from tests.ports import free_port
from tests.waiting import wait_until

BIN = Path(sys.executable).parent
WAIT_S = 270.0  # a head that starts beside other work took over 120 s
TOKEN = "0123456789abcdef" * 4


def changed(words: list[str], replacements: Mapping[str, str]) -> list[str]:
    """Return a command line with parts of its words replaced, and its program from this environment if it is there."""
    program, *rest = (replaced(word, replacements) for word in words)
    return [str(BIN / program) if (BIN / program).exists() else program, *rest]


def replaced(text: str, replacements: Mapping[str, str]) -> str:
    for old, new in replacements.items():
        text = text.replace(old, new)
    return text


@contextlib.contextmanager
def started(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command that stays, in a process group of its own, and end the group."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


def healthy(check: list[str], environment: dict[str, str]) -> bool:
    """Whether a check passes. One that takes too long has failed, as in a container, where it has 5 s."""
    try:
        done = subprocess.run(check, env=environment, capture_output=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def wait_healthy(
    check: list[str], environment: dict[str, str], log: Path, process: subprocess.Popen[bytes] | None = None
) -> None:
    """Wait until a health check passes, or the process ends; it must have failed once, else it says nothing."""
    wait_until(
        lambda: healthy(check, environment) or (process is not None and process.poll() is not None),
        lambda: f"{shlex.join(check)} does not pass: {log.read_text(errors='replace')[-2000:]}",
        WAIT_S,
        every_s=0.5,  # each check is a process
    )


def clean() -> dict[str, str]:
    """Return this process's environment without what Ray and AWS would read, and the packages in this tree."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    return kept | {"PYTHONPATH": str(ROOT)}


def test_the_s3_server_starts_has_its_bucket_and_takes_the_clusters_keys_alone(tmp_path: Path) -> None:
    services = compose()["services"]
    port = str(free_port())
    places = {
        "0.0.0.0:9000": f"127.0.0.1:{port}",
        "s3:9000": f"127.0.0.1:{port}",
        "/data": str(tmp_path / "data"),
    }
    (tmp_path / "data").mkdir()
    given = {name: replaced(value, places) for name, value in services["s3"]["environment"].items()}
    environment = clean() | given | {"XDG_CONFIG_HOME": str(tmp_path)}
    server = changed(["rclone", *services["s3"]["command"]], places)
    check = changed(services["s3"]["healthcheck"]["test"][1:], places)
    assert not healthy(check, environment)
    with started(server, environment, tmp_path / "log"):
        wait_healthy(check, environment, tmp_path / "log")
        bucket = changed(["rclone", *services["bucket"]["command"]], places)
        for _ in range(2):  # it runs again with every `compose up`
            subprocess.run(bucket, env=environment, check=True, capture_output=True)
        head = services["ray-head"]["environment"]
        keys = {
            name: head[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
        }
        aws = keys | {"AWS_ENDPOINT_URL": head["AWS_ENDPOINT_URL"].replace("s3:9000", f"127.0.0.1:{port}")}
        assert stores("s3://defuse/runs", clean() | aws) == (0, "stored\n")
        # deploy/README copies a run's page as a file
        assert (tmp_path / "data" / "defuse" / "runs" / "x.bin").read_bytes() == b"stored"
        code, said = stores("s3://defuse/runs", clean() | aws | {"AWS_SECRET_ACCESS_KEY": "wrong"})
        assert code == 1 and "refused the credentials" in said


def stores(address: str, environment: dict[str, str]) -> tuple[int, str]:
    """Return exit code and output of a process that writes one object to the store and reads it back."""
    program = (
        "from services.storage import open_store\n"
        f"store = open_store({address!r})\n"
        "store.write('x.bin', b'stored')\n"
        "print(store.read('x.bin').decode())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    return run.returncode, run.stdout + run.stderr


@pytest.fixture(scope="module")
def nodes(short_folder: Path) -> Iterator[dict[str, str]]:
    """Compose's head and worker, started as they are there; yields what became of their addresses."""
    services, folder = compose()["services"], short_folder
    gcs, dashboard, head_agent, worker_agent = (str(free_port()) for _ in range(4))
    token = folder / "token"
    token.write_text(TOKEN)
    head = {
        "--port=6379": f"--port={gcs}",
        "=8265": f"={dashboard}",
        "0.0.0.0": "127.0.0.1",
        ":8265": f":{dashboard}",
    }
    worker = {"ray-head:6379": f"127.0.0.1:{gcs}", ":52365": f":{worker_agent}"}
    environments = {}
    own = {f"RAY_SERVE_HAPROXY_{what}_PORT": str(free_port()) for what in ("METRICS", "STATS")}
    own |= {
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        "RAY_worker_niceness": "0",  # these two as in tests/conftest.py
        "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    }
    for name in ("ray-head", "ray-worker"):
        given = services[name]["environment"] | {"RAY_AUTH_TOKEN_PATH": str(token)}
        environments[name] = clean() | given | {"HOME": str(folder)} | own
    with contextlib.ExitStack() as stack:
        for name, places, agent in (("ray-head", head, head_agent), ("ray-worker", worker, worker_agent)):
            command = changed(services[name]["command"], places) + one_host(folder / name[4:5], agent)
            log = folder / f"{name}.log"
            check = changed(services[name]["healthcheck"]["test"][1:], places)
            assert not healthy(check, environments[name])
            assert services[name]["restart"] == "unless-stopped"
            for _ in range(3):  # Ray gives up where it does not start within 30 s, as beside much other work
                process = stack.enter_context(started(command, environments[name], log))
                wait_healthy(check, environments[name], log, process)
                if process.poll() is None:
                    break
            assert process.poll() is None, log.read_text(errors="replace")[-2000:]
        yield {
            "token": str(token),
            "dashboard": dashboard,
            "agent": head_agent,
            "head log": str(folder / "ray-head.log"),
            "log": str(folder / "ray-worker.log"),
        }


def one_host(folder: Path, agent: str) -> list[str]:
    """Return what two nodes need to live on one host and on loopback; in containers they have a network each."""
    ports = ["--min-worker-port=0", "--max-worker-port=0", f"--metrics-export-port={free_port()}"]
    agents = [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={free_port()}"]
    return [
        *ports,
        *agents,
        "--node-ip-address=127.0.0.1",
        f"--temp-dir={folder}",
        "--object-store-memory=100000000",
    ]


def get(url: str, token: str | None) -> Any:
    """Return the JSON at `url`, or the status of a refusal."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code


def test_head_and_worker_join_and_want_the_token(nodes: dict[str, str]) -> None:
    dashboard = f"http://127.0.0.1:{nodes['dashboard']}"
    assert get(f"{dashboard}/api/jobs/", None) == 401
    assert get(f"{dashboard}/api/jobs/", "wrong" * 8) in {401, 403}
    assert get(f"{dashboard}/api/jobs/", TOKEN) == []
    wait_until(lambda: len(states(dashboard)) >= 2, lambda: Path(nodes["log"]).read_text()[-2000:], WAIT_S)
    assert states(dashboard) == ["ALIVE", "ALIVE"], Path(nodes["log"]).read_text()[-2000:]


def states(dashboard: str) -> list[str]:
    found = get(f"{dashboard}/nodes?view=summary", TOKEN)["data"]["summary"]
    return [node["raylet"]["state"] for node in found]


def test_the_head_pods_probe_passes_on_a_head(nodes: dict[str, str]) -> None:
    """Kubernetes runs the same probe against KubeRay's own `ray start`."""
    for _, spec in ray_specs():
        probe = spec["headGroupSpec"]["template"]["spec"]["containers"][0]["readinessProbe"]["exec"][
            "command"
        ]
        there = {":52365": f":{nodes['agent']}", ":8265": f":{nodes['dashboard']}"}
        wait_healthy(changed(probe, there), clean(), Path(nodes["head log"]))  # it gives a busy head 2 s
        assert not healthy(changed(probe, there | {":8265": ":1"}), clean())


def test_the_service_of_kubernetes_comes_up_on_these_nodes_and_waits_for_a_version(
    nodes: dict[str, str], tmp_path: Path
) -> None:
    port = free_port()
    config = yaml.safe_load(document("RayService")["spec"]["serveConfigV2"])
    config["proxy_location"] = "HeadOnly"  # two nodes of one host cannot both have the port
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    arguments = config["applications"][0]["args"]
    arguments["store"] = str(tmp_path / "runs")
    arguments["settings"]["gpus_per_replica"] = 0  # these nodes have none
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": nodes["token"]}
    address = ["--address", f"http://127.0.0.1:{nodes['dashboard']}"]
    deploy = [str(BIN / "serve"), "deploy", *address, "serve.yaml"]
    with deployed(deploy, tmp_path, clean() | token):
        check_it_waits(nodes, port)


@contextlib.contextmanager
def deployed(command: list[str], folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """Deploy with `serve deploy`, and shut Serve down at the end, since HAProxy outlives a killed Ray."""
    try:
        said = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=WAIT_S, check=False
        )
        assert said.returncode == 0, said.stdout + said.stderr
        yield
    finally:
        command = [command[0], "shutdown", *command[2:4], "--yes"]
        subprocess.run(command, env=environment, capture_output=True, timeout=WAIT_S, check=False)


def check_it_waits(nodes: dict[str, str], port: int) -> None:
    """Nothing is promoted yet: the worker pod's probe passes, and what needs a version answers 503."""
    worker = document("RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]
    probe = worker["containers"][0]["readinessProbe"]["exec"]["command"]
    there = {":52365": f":{nodes['agent']}", ":8000": f":{port}"}
    wait_healthy(changed(probe, there), clean(), Path(nodes["log"]))
    address = f"http://127.0.0.1:{port}"
    await_status(f"{address}/v1/model", None, 401)  # the proxy has no such answer of its own
    assert get(f"{address}/readyz", None) == 503
    assert get(f"{address}/v1/model", ENVIRONMENT["DEFUSE_SERVE_TOKEN"]) == 503


def await_status(url: str, token: str | None, wanted: int) -> None:
    """Wait until `url` answers so; a server that starts may refuse connections, or let its first answers wait."""
    got: list[Any] = []

    def answered() -> bool:
        try:
            got.append(get(url, token))
        except OSError as error:
            got.append(error)
        return got[-1] == wanted

    wait_until(answered, lambda: f"{url}: expected {wanted}, found {got[-1]!r}", WAIT_S)
