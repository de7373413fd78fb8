"""What went wrong on the cluster, as an error of Defuse in one line."""

from __future__ import annotations

from ray.exceptions import RayActorError, RayError, RayTaskError, RuntimeEnvSetupError

from defuse_core.errors import ComputeError, DefuseError


def cause_of(error: BaseException) -> BaseException:
    """Return what was raised in the worker, where it is an error of a task; else the error itself."""
    return error.cause if isinstance(error, RayTaskError) else error


def as_defuse_error(error: BaseException, where: str) -> DefuseError:
    """Return the error of the tree that a Ray `error` carries, or a ComputeError that says where and why."""
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
    if isinstance(cause, RuntimeEnvSetupError):
        return f"a node could not set up the job's environment: {_last_line(cause)}"
    if isinstance(cause, RayActorError):
        return f"its worker process died ({_first_line(cause)})"
    if isinstance(cause, RayError):
        return _first_line(cause)
    return f"{type(cause).__name__}: {_flat(cause)}"


def _of_task(error: RayTaskError, cause: BaseException) -> str:
    if "No module named" in str(cause):
        return f"{_last_line(cause)}; install it on every node, or use `defuse submit`, which brings it along"
    if isinstance(cause, RayTaskError):  # its own exception did not survive the trip: only the text is left
        return _last_line(error)
    return f"{type(cause).__name__}: {_flat(cause)}"


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split())


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
