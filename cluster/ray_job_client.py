"""Ray's client of jobs, with what of it is private. tests/cluster/test_ray_compat.py checks that."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import requests
    from ray.job_submission import JobSubmissionClient

DASHBOARD = "ray.dashboard.modules"
JOB_LOGGERS = (f"{DASHBOARD}.dashboard_sdk", f"{DASHBOARD}.job.sdk", "ray._private.runtime_env.packaging")


def job_client(address: str, timeout_s: float) -> JobSubmissionClient:
    """Return Ray's client of jobs, which waits `timeout_s` for each answer; by default it waits without limit.

    It still does so for an upload, which may take any time, and for a submission, which may have begun a job. It logs
    nothing, does not use RAY_ADDRESS in place of `address`, and raises TooManyRedirects where one turns POST into GET.
    """
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    for name in JOB_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    import requests
    from ray.job_submission import JobSubmissionClient

    class TimedClient(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **content: Any) -> requests.Response:
            is_timed = method == "GET" or endpoint.endswith("/stop")
            answer = super()._do_request(method, endpoint, timeout=timeout_s if is_timed else None, **content)
            if any(step.status_code in (301, 302, 303) for step in answer.history):
                raise requests.TooManyRedirects(f"redirects to {answer.url.partition(endpoint)[0]}")
            return answer

    return TimedClient(address)
