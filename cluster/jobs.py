"""Jobs on a Ray cluster, through the HTTP address of its dashboard: submit, follow, list, stop."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from cluster.connection import OTHER_TOKEN
from cluster.ray_compat import JOB_LOGGERS
from defuse_core.errors import ComputeError, InputError
from defuse_core.formatting import one_line, proxy_remedy, without_credentials

log = logging.getLogger("defuse")
RUN = "defuse_run"  # metadata of our jobs: the run's name
GIVE_UP_AFTER_S = 300.0  # longest silence while a log is followed, such as over a tunnel that is made again
# a head that knows no such job for as long has lost it; one that just starts may still read it
FORGOTTEN_AFTER_S = 30.0
PAUSE_S = 3.0  # interval between two reads of a whole log: some hundred kB after a day
ANSWER_WITHIN_S = 20.0
CHECK_ADDRESS = "check --address or RAY_API_SERVER_ADDRESS: it is the head's port 8265, not 6379"
# in the error of an untrusted certificate, and of a file of trusted ones that is none
UNTRUSTED = ("CERTIFICATE_VERIFY_FAILED", "[X509")
WITHOUT_UPLOAD = (
    "run `defuse run --address` on a machine of the cluster, with the weights at the same absolute path on "
    "every node"
)


class _UnknownJobError(InputError):
    """The cluster has no job of that id."""


class Jobs:
    """The jobs of the cluster whose head answers at `address`, such as http://head:8265."""

    def __init__(self, address: str) -> None:
        """Connect. Raises InputError for another kind of address or another token, ComputeError if no head answers."""
        if not address.startswith(("http://", "https://")):
            raise InputError(
                f"--address {without_credentials(address)}: expected the address of Ray's dashboard, http://HEAD:8265"
            )
        self.address = address.partition("#")[0].rstrip("/")  # a browser shows http://HEAD:8265/#/overview
        self.shown = without_credentials(self.address)  # in messages
        self.option = f"--address {shlex.quote(self.shown)}"  # in their commands
        try:
            with self._errors_translated():
                self.client = self._connect()
        except OSError as error:  # by requests, of a file that does not exist
            raise InputError(f"REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE: {error}") from error

    def _connect(self) -> JobSubmissionClient:
        try:
            return job_client(self.address, ANSWER_WITHIN_S)
        # of an address that is none, or of another server's answer
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"no Ray dashboard answers at {self.shown}; {CHECK_ADDRESS}") from error

    def submit(self, command: str, folder: Path, run: str, variables: dict[str, str]) -> str:
        """Run `command` in a copy of `folder` on the cluster, and return the job's id.

        Names the job where it may have begun although no answer came.
        """
        job_id = f"defuse-{secrets.token_hex(8)}"
        words = f"{job_id} {self.option}"
        begun = f"may have begun: `defuse jobs logs --follow {words}` follows it, `defuse jobs stop {words}` ends it"
        environment = {"working_dir": str(folder), "env_vars": variables}
        try:
            with self._errors_translated():
                return self.client.submit_job(
                    entrypoint=command, runtime_env=environment, metadata={RUN: run}, submission_id=job_id
                )
        except ComputeError as error:
            raise ComputeError(f"{error}; the job {begun}") from error
        except KeyboardInterrupt:
            log.warning("job %s %s", job_id, begun)
            raise

    def list(self) -> list[JobDetails]:
        """Return all submitted jobs, the oldest first."""
        with self._errors_translated():
            found = [job for job in self.client.list_jobs() if job.submission_id]
        return sorted(found, key=lambda job: job.start_time or 0)

    def get(self, job_id: str) -> JobDetails:
        """Return the job. Raises InputError if there is none of that id."""
        with self._errors_translated(job_id):
            return self.client.get_job_info(job_id)

    def logs(self, job_id: str) -> str:
        with self._errors_translated(job_id):
            return self.client.get_job_logs(job_id)

    def stop(self, job_id: str) -> bool:
        """Ask the job to end; False if it had ended before. A job that Ray has not started yet is asked again."""
        while not self.get(job_id).status.is_terminal():
            with self._errors_translated(job_id):
                if self.client.stop_job(job_id):
                    return True
            time.sleep(PAUSE_S)
        return False

    def follow(self, job_id: str, show: Callable[[str], None]) -> JobDetails:
        """Show what the job writes until it ends, across lost connections, and return it as it ended.

        Asks for the whole log again and again: a websocket, by which Ray sends what is new, passes fewer proxies.
        Raises ComputeError where the connection, or the job, is lost for good, and what `show` raises.
        """
        self.get(job_id)  # raises at once for an unknown job, another token or an address without a dashboard
        shown = 0  # characters
        lost_at: float | None = None  # since then nothing answers
        unknown_at: float | None = None  # since then a head answers that knows no such job
        while True:
            try:
                job = self.get(job_id)  # first: an ended job writes no more
                text = self._log_of(job_id, job)
            except (ComputeError, InputError) as error:  # also a refusal, as while the head starts again
                lost = f"job {job_id}: lost the connection to {self.shown} ({str(error).partition('; check')[0]})"
                if lost_at is None:
                    lost_at = time.monotonic()
                    log.warning("%s; trying again for %.0f minutes", lost, GIVE_UP_AFTER_S / 60)
                now = time.monotonic()
                unknown_at = (unknown_at or now) if isinstance(error, _UnknownJobError) else None
                if unknown_at is not None and now - unknown_at > FORGOTTEN_AFTER_S:
                    raise ComputeError(
                        f"job {job_id}: {self.shown} answers again, and has no such job, as where its head was started "
                        "anew; submit again, and the run continues where it stopped"
                    ) from error
                if now - lost_at > GIVE_UP_AFTER_S:
                    raise ComputeError(
                        f"{lost}; the job may go on, and `defuse jobs logs {job_id} --follow {self.option}` "
                        "follows it again"
                    ) from error
            else:
                lost_at = unknown_at = None
                if len(text) > shown:
                    show(text[shown:])
                    shown = len(text)
                if job.status.is_terminal():
                    return job
            time.sleep(PAUSE_S)

    def _log_of(self, job_id: str, job: JobDetails) -> str:
        """Return the log of a job; empty, with a warning, where that of an ended one cannot be read."""
        try:
            return self.logs(job_id)
        except (ComputeError, InputError) as error:
            if not job.status.is_terminal():
                raise
            log.warning("job %s: it has ended, and its log cannot be read (%s)", job_id, error)
            return ""

    def _proxy_hint(self) -> str:
        """Return what to do where requests go through a proxy of the environment, which may not reach the head."""
        address = self.address
        if not requests.utils.select_proxy(address, requests.utils.get_environ_proxies(address)):
            return ""
        return f"; {proxy_remedy(address)}"

    @contextlib.contextmanager
    def _errors_translated(self, job_id: str = "") -> Iterator[None]:
        try:
            yield
        except AuthenticationError as error:
            raise InputError(f"{self.shown} {OTHER_TOKEN}") from error
        except requests.TooManyRedirects as error:
            problem = without_credentials(str(error))
            raise InputError(f"{self.shown} {problem}; give the final address of the dashboard") from error
        except (ConnectionError, requests.RequestException) as error:
            # Ray's own error does not tell the cause
            if any(word in f"{error} {error.__context__}" for word in UNTRUSTED):
                reason = one_line(str(error.__context__ or error), 200)
                raise InputError(
                    f"{self.shown}: its certificate is not accepted ({reason}); if your own CA signed it, set "
                    "REQUESTS_CA_BUNDLE to the file of that CA's certificate"
                ) from error
            raise ComputeError(
                f"no Ray dashboard answers at {self.shown} ({type(error).__name__}); "
                f"{CHECK_ADDRESS}{self._proxy_hint()}"
            ) from error
        except RuntimeError as error:
            if "404" in str(error) and job_id:
                raise _UnknownJobError(
                    f"no job {job_id} at {self.shown}; see `defuse jobs list {self.option}`"
                ) from error
            if "status code 413" in str(error):
                raise InputError(
                    f"{self.shown} does not take a job of this size (413); {WITHOUT_UPLOAD}"
                ) from error
            problem = without_credentials(str(error), self.address).splitlines()[0].rstrip(".")
            raise ComputeError(f"{self.shown}: {problem}") from error


def job_client(address: str, timeout_s: float) -> JobSubmissionClient:
    """Return Ray's client of jobs, which waits `timeout_s` for each answer; by default it waits without limit.

    It still does so for an upload, which may take any time, and for a submission, which may have begun a job. It logs
    nothing, does not use RAY_ADDRESS in place of `address`, and raises TooManyRedirects where one turns POST into GET.
    """
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    for name in JOB_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)

    class TimedClient(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **content: Any) -> requests.Response:
            is_timed = method == "GET" or endpoint.endswith("/stop")
            answer = super()._do_request(method, endpoint, timeout=timeout_s if is_timed else None, **content)
            if any(step.status_code in (301, 302, 303) for step in answer.history):
                raise requests.TooManyRedirects(f"redirects to {answer.url.partition(endpoint)[0]}")
            return answer

    return TimedClient(address)
