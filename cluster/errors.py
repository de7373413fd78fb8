"""Errors of Ray as errors of Defuse, in one line."""

from __future__ import annotations

from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError, RuntimeEnvSetupError

from defuse_core.errors import ComputeError, DefuseError

OTHER_TOKEN = (
    "requires another token than this process has: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's "
    "(`ray get-auth-token` on its head shows it)"
)

MORE_MEMORY = "use nodes with more memory, or let fewer tasks run on a node or GPU (section resources)"


def cause_of(error: BaseException) -> BaseException:
    """Return the exception that a task raised, for an error of a task; any other error is its own cause."""
    return error.cause if isinstance(error, RayTaskError) else error


def is_worker_lost(error: BaseException) -> bool:
    """Whether a process, a node or an object was lost, in contrast to an exception that the task raised."""
    cause = cause_of(error)
    return isinstance(cause, RayError) and not isinstance(cause, RayTaskError)


def as_defuse_error(error: BaseException, where: str) -> DefuseError:
    """Return the error of the tree that a Ray `error` carries, else a ComputeError with `where` and the cause."""
    cause = cause_of(error)
    if isinstance(cause, DefuseError):
        return cause
    return ComputeError(f"{where}: {one_line(error)}")


def one_line(error: BaseException) -> str:
    """Return the cause of `error` as one line, without the traceback that Ray puts around it."""
    cause = cause_of(error)
    if isinstance(cause, DefuseError):
        return _flat(cause)
    if isinstance(error, RayTaskError):
        return _of_task(error, cause)
    if isinstance(cause, RayError):
        return _of_ray(cause)
    return f"{type(cause).__name__}: {_flat(cause)}"


def _of_ray(cause: RayError) -> str:
    if isinstance(cause, RuntimeEnvSetupError):
        return f"a node could not set up the job's environment: {_last_line(cause)}"
    if isinstance(cause, OutOfMemoryError):
        return f"{_first_line(cause)}; {MORE_MEMORY}"
    if isinstance(cause, RayActorError):
        return f"its worker process died ({_first_line(cause)})"
    return _first_line(cause)


def _of_task(error: RayTaskError, cause: BaseException) -> str:
    if "No module named" in str(cause):
        return f"{_last_line(cause)}; install it on every node, or use `defuse submit`, which uploads it"
    if isinstance(cause, RayTaskError):  # the exception could not be pickled: only its text arrived
        return _last_line(error)
    from defuse_core.device import is_out_of_memory  # late: torch takes a second

    remedy = f"; {MORE_MEMORY}" if is_out_of_memory(cause) else ""
    return f"{type(cause).__name__}: {_flat(cause)}{remedy}"


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split())


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
