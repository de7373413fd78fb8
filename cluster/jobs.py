"""Jobs on a Ray cluster, through the HTTP address of its head: submit, follow, list, stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from defuse_core.errors import ComputeError, InputError

RUN = "defuse_run"  # metadata of our jobs: the run's name
TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
DISCONNECTS = 5
PAUSE_S = 2.0


@dataclass(frozen=True)
class Job:
    """One submitted job."""

    id: str
    run: str  # name of its run; the command where the job is not ours
    status: str  # PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED
    started: float | None  # seconds since 1970
    ended: float | None
    exit_code: int | None  # of the command; None before its end, and where it never began
    message: str

    @property
    def is_over(self) -> bool:
        """Whether it will not go on."""
        return JobStatus(self.status).is_terminal()


@dataclass
class Seen:
    """How much of a job's log was shown."""

    characters: int = 0


class Jobs:
    """The jobs of the cluster whose head answers at `address`, such as http://head:8265."""

    def __init__(self, address: str) -> None:
        """Connect. Raises InputError for another kind of address, ComputeError where no head answers."""
        if not address.startswith(("http://", "https://")):
            raise InputError(
                f"--address {address}: expected the address of Ray's dashboard, http://HEAD:8265"
            )
        self.address = address
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # else RAY_ADDRESS would win over what was asked for
        for talkative in TALKATIVE:
            logging.getLogger(talkative).setLevel(logging.WARNING)
        with self._explained():
            self.client = JobSubmissionClient(address)

    def submit(self, command: str, folder: Path, run: str, variables: dict[str, str]) -> str:
        """Run `command` in a copy of `folder` on the cluster, and return the job's id."""
        environment = {"working_dir": str(folder), "env_vars": variables}
        with self._explained():
            return self.client.submit_job(entrypoint=command, runtime_env=environment, metadata={RUN: run})

    def list(self) -> list[Job]:
        """Return all submitted jobs, the oldest first."""
        with self._explained():
            found = [_job(details) for details in self.client.list_jobs() if details.submission_id]
        return sorted(found, key=lambda job: job.started or 0)

    def get(self, job_id: str) -> Job:
        """Return the job. Raises InputError if there is none of that id."""
        with self._explained(job_id):
            return _job(self.client.get_job_info(job_id))

    def logs(self, job_id: str) -> str:
        """Return what the job has written so far."""
        with self._explained(job_id):
            return self.client.get_job_logs(job_id)

    def stop(self, job_id: str) -> bool:
        """Ask the job to end; False if it had ended before. One that is not yet there cannot be asked, so wait."""
        while not self.get(job_id).is_over:
            with self._explained(job_id):
                if self.client.stop_job(job_id):
                    return True
            time.sleep(PAUSE_S)
        return False

    def follow(self, job_id: str, show: Callable[[str], None]) -> Job:
        """Show what the job writes until it ends, across lost connections, and return it as it ended."""
        self.get(job_id)  # says at once that there is none, or no way there
        seen, lost = Seen(), 0
        while True:
            before = seen.characters
            try:
                asyncio.run(self._tail(job_id, show, seen))
                job = self.get(job_id)
            except (ComputeError, RuntimeError, OSError, aiohttp.ClientError) as error:
                lost = 1 if seen.characters > before else lost + 1
                if lost > DISCONNECTS:
                    raise ComputeError(f"job {job_id}: lost the way to {self.address} ({error})") from error
            else:
                if job.is_over:
                    return job
            time.sleep(PAUSE_S)

    async def _tail(self, job_id: str, show: Callable[[str], None], seen: Seen) -> None:
        """Show what was not shown before: the log begins anew with each connection."""
        position = 0
        async for text in self.client.tail_job_logs(job_id):
            fresh = text[max(0, seen.characters - position) :]
            position += len(text)
            if fresh:
                show(fresh)
            seen.characters = max(seen.characters, position)

    @contextlib.contextmanager
    def _explained(self, job_id: str = "") -> Iterator[None]:
        try:
            yield
        except AuthenticationError as error:
            raise ComputeError(
                f"{self.address} asks for a token, or for another one: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN "
                "to the cluster's (`ray get-auth-token` on its head shows it)"
            ) from error
        except (ConnectionError, requests.RequestException) as error:
            raise ComputeError(
                f"no Ray dashboard answers at {self.address} ({type(error).__name__}); check --address: "
                "it is the head's port 8265, not 6379"
            ) from error
        except RuntimeError as error:
            if "404" in str(error) and job_id:
                raise InputError(
                    f"there is no job {job_id} at {self.address}; see `defuse jobs list`"
                ) from error
            raise ComputeError(f"{self.address}: {str(error).splitlines()[0]}") from error


def _job(details: Any) -> Job:
    return Job(
        id=details.submission_id,
        run=(details.metadata or {}).get(RUN) or details.entrypoint,
        status=str(details.status.value),
        started=details.start_time and details.start_time / 1000,
        ended=details.end_time and details.end_time / 1000,
        exit_code=details.driver_exit_code,
        message=details.message or "",
    )
