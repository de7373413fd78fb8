"""Start Label Studio as deploy/compose.yaml does, against PostgreSQL, outside containers: some 40 s, by hand.

    PYTHONPATH=. python tests/deploy/try_label_studio.py

Needs `defuse label-studio install` and a PostgreSQL below /usr/lib/postgresql. Says what it saw, or raises.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
from shipped import ENVIRONMENT, compose

from services.labeling.local_server import Installation
from services.settings import read_environment
from tests.ports import free_port

WAIT_S = 240.0


def as_postgres(*command: str) -> list[str]:
    """Return the command run by the user `postgres`; the server refuses to be root's."""
    return ["runuser", "--user", "postgres", "--", *command] if os.getuid() == 0 else list(command)


@contextlib.contextmanager
def postgres(folder: Path, port: int) -> Iterator[Path]:
    """A PostgreSQL with the database and the login of compose's `postgres`; yields its programs' folder."""
    given = compose()["services"]["postgres"]["environment"]
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1]
    secret = folder / "password"
    secret.write_text(ENVIRONMENT["POSTGRES_PASSWORD"])
    for place in (folder, secret):
        shutil.chown(place, "postgres") if os.getuid() == 0 else None
    data = str(folder / "db")
    login = ("--username", given["POSTGRES_USER"], "--pwfile", str(secret), "--auth", "scram-sha-256")
    subprocess.run(as_postgres(str(programs / "initdb"), *login, data), check=True, stdout=subprocess.DEVNULL)
    options = ("-D", data, "-p", str(port), "-c", "listen_addresses=127.0.0.1", "-k", str(folder))
    with subprocess.Popen(
        as_postgres(str(programs / "postgres"), *options), stderr=subprocess.DEVNULL
    ) as server:
        try:
            check = compose()["services"]["postgres"]["healthcheck"]["test"][1:]
            await_true(
                lambda: healthy(
                    [str(programs / check[0]), *check[1:-1], "--dbname=postgres", f"--port={port}"]
                )
            )
            create = [
                str(programs / "createdb"),
                "-h",
                "127.0.0.1",
                "-p",
                str(port),
                "-U",
                given["POSTGRES_USER"],
            ]
            password = os.environ | {"PGPASSWORD": ENVIRONMENT["POSTGRES_PASSWORD"]}
            subprocess.run([*create, given["POSTGRES_DB"]], check=True, env=password)
            yield programs
        finally:
            server.terminate()


def healthy(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def await_true(condition: Callable[[], bool]) -> float:
    """Return the seconds until the condition holds."""
    begun = time.monotonic()
    while not condition():
        if time.monotonic() - begun > WAIT_S:
            raise TimeoutError("not healthy in time")
        time.sleep(0.5)
    return time.monotonic() - begun


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="try-"))
    folder.chmod(0o755)
    database, port = free_port(), free_port()
    service = compose()["services"]["label-studio"]
    places = {
        "POSTGRE_HOST": "127.0.0.1",
        "POSTGRE_PORT": str(database),
        "LABEL_STUDIO_BASE_DATA_DIR": str(folder / "ls"),
    }
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder)} | service["environment"] | places
    environment["LABEL_STUDIO_HOST"] = f"http://127.0.0.1:{port}"
    program = Installation(read_environment().cache).program
    command = [
        word.replace("0.0.0.0", "127.0.0.1").replace("8080", str(port)) for word in service["command"][1:]
    ]
    check = [word.replace("8080", str(port)) for word in service["healthcheck"]["test"][1:]]
    log = (folder / "log").open("wb")
    with postgres(folder, database) as programs:
        with subprocess.Popen([str(program), *command], env=environment, stdout=log, stderr=log) as server:
            try:
                took = await_true(lambda: healthy([sys.executable, *check[1:]]))
                token = {"Authorization": f"Token {service['environment']['LABEL_STUDIO_USER_TOKEN']}"}
                who = httpx.get(f"http://127.0.0.1:{port}/api/current-user/whoami", headers=token).json()
                version = httpx.get(f"http://127.0.0.1:{port}/api/version", headers=token).json()["release"]
                assert who["email"] == service["environment"]["LABEL_STUDIO_USERNAME"], who
            finally:
                server.terminate()
        tables = query(
            programs, database, "select count(*) from information_schema.tables where table_name like 'task%'"
        )
    print(f"Label Studio {version}: healthy after {took:.0f} s, knows {who['email']} by the token")
    print(f"PostgreSQL: {tables} of its task tables")
    shutil.rmtree(folder, ignore_errors=True)


def query(programs: Path, port: int, statement: str) -> str:
    given = compose()["services"]["postgres"]["environment"]
    command = [
        str(programs / "psql"),
        "-h",
        "127.0.0.1",
        "-p",
        str(port),
        "-U",
        given["POSTGRES_USER"],
        "-Atc",
        statement,
    ]
    environment = os.environ | {"PGPASSWORD": ENVIRONMENT["POSTGRES_PASSWORD"]}
    run = subprocess.run(
        [*command, given["POSTGRES_DB"]], env=environment, check=True, capture_output=True, text=True
    )
    return run.stdout.strip()


if __name__ == "__main__":
    main()
