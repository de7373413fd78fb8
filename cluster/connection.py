"""Ray for this process: joining a cluster or starting one inside, and Ray's errors as errors of Defuse, in one line."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
)

from cluster.ray_compat import (
    MAX_TEMPORARY_FOLDER,
    connection_error,
    forget_private_token,
    is_unauthenticated,
    keep_idle_workers,
    limit_memory_retries,
    set_private_token,
    shorten_socket_paths,
    signals_wait_for_ray,
    wait_for_absent_head,
    without_unused_processes,
)
from defuse_core.config import RunFile, model_sections
from defuse_core.errors import ComputeError, DefuseError, InputError, RunFileError
from defuse_core.files import FULL_DISK, WRONG_PLACE
from defuse_core.formatting import without_credentials

log = logging.getLogger("defuse")
CONNECT_WITHIN_S = 20.0
START_ATTEMPTS = 3  # Ray gives its agents 15 s to start, whatever is set; their first import may take longer
INSIST = "DEFUSE_UNAUTHENTICATED_RAY"  # 1: start Ray although RAY_AUTH_MODE turns authentication off
OTHER_TOKEN = (
    "requires another token than this process has: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's "
    "(`ray get-auth-token` on its head shows it)"
)
HOST_AND_PORT = re.compile(r"([^\s:/\[\]]+|\[[^\s/\[\]]+\]):\d{1,5}")
# of the RuntimeErrors of ray.init where a cluster answers
CANNOT_JOIN = ("Version mismatch", "No node info found", "This node has an IP address")
MORE_MEMORY = "use nodes with more memory, or let fewer tasks run on a node or GPU (section resources)"
FREE_DISK = (
    "free space on the disk of Ray's folder (/tmp/ray, or RAY_TMPDIR): Ray uses it until it is 95 % full"
)
UNUSABLE_FOLDER = WRONG_PLACE | {errno.EEXIST, errno.EROFS}
INSTALL = "install it on every node, or use `defuse submit`, which uploads it"
# in Ray's texts: the lines about a lost actor before the cause, and the address of a node
LOST_ACTOR = re.compile(r"^\t(?:class_name|actor_id|pid|name|namespace|ip): .*\n", re.MULTILINE)
NODE = re.compile(r"(?:\t|pid=\d+, )ip(?:: |=)([^\s,)]+)")


def connect(address: str | None, cpus: int = 0) -> bool:
    """Join the cluster at `address`, or start an embedded Ray; True if this call made the connection.

    The embedded Ray has the CPUs that this process may use, or `cpus` where these are more.

    Raises InputError for an address of another kind, another token than the cluster's and a folder of temporary files
    that Ray cannot use, ComputeError where no cluster answers or Ray does not start.
    """
    if ray.is_initialized():
        joined = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", joined):  # a warning, since names and addresses of one head differ
            log.warning(
                "this process has joined the Ray at %s, and computes there; is that %s?", joined, address
            )
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    limit_memory_retries()
    if address is None:
        _start_embedded(cpus, quiet)
        return True
    if address != "auto" and not HOST_AND_PORT.fullmatch(address):
        raise InputError(
            f"{without_credentials(address)} (--address or RAY_ADDRESS): expected HOST:PORT of a cluster that this "
            "machine is a node of, or auto; from elsewhere `defuse submit` takes the dashboard's http:// address"
        )
    wait_for_absent_head()
    if found := connection_error(address, CONNECT_WITHIN_S):
        raise _unreachable(address, found)
    try:
        with nothing_left_of_a_failed_start(), signals_wait_for_ray(again_interrupts=True):
            ray.init(address=address, **quiet)
    except Exception as error:
        found = explained_line(error)
        if any(text in found for text in CANNOT_JOIN):
            raise InputError(
                f"this process cannot join the cluster at {address} ({found}); it must run on a node of the cluster, "
                "with the cluster's Ray and Python; from elsewhere use `defuse submit`"
            ) from error
        raise _unreachable(address, found) from error
    return True


def _start_embedded(cpus: int, quiet: dict[str, Any]) -> None:
    from defuse_core.device import usable_cpus  # late: torch takes a second

    prepare_embedded_ray()
    num_cpus = max(usable_cpus(), cpus)
    keep_idle_workers(num_cpus)
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            with (
                nothing_left_of_a_failed_start(),
                signals_wait_for_ray(again_interrupts=True),
                without_unused_processes(),
                _hangups_blocked(),
            ):
                ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **quiet)
            return
        except Exception as error:  # Ray raises bare ones
            failed = f"Ray did not start on this machine ({explained_line(error)})"
            if _is_folder_unusable(error):
                raise InputError(
                    f"{failed}; set RAY_TMPDIR to a folder that can be written, whose path has at most "
                    f"{MAX_TEMPORARY_FOLDER} characters"
                ) from error
            if isinstance(error, OSError) and error.errno in FULL_DISK:
                raise ComputeError(f"{failed}; {FREE_DISK}") from error
            if attempt == START_ATTEMPTS:
                raise ComputeError(
                    f"{failed} in {START_ATTEMPTS} attempts; end other work where it is busy, or compute without Ray: "
                    "`defuse run --on local`; Ray's logs are in session_latest/logs of its folder (/tmp/ray)"
                ) from error
            log.warning("%s; starting it again", failed)


def _is_folder_unusable(error: Exception) -> bool:
    """Whether Ray's folder of temporary files cannot be written, or has too long a path."""
    is_wrong = isinstance(error, OSError) and error.errno in UNUSABLE_FOLDER
    return is_wrong or isinstance(error, PermissionError) or "AF_UNIX path length" in str(error)


@contextlib.contextmanager
def _hangups_blocked() -> Iterator[None]:
    """Block SIGHUP in processes that begin in the block: a terminal sends it to all, and this process ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def nothing_left_of_a_failed_start() -> Iterator[None]:
    """End the processes that Ray began in the block where it fails: it leaves them beside the next start."""
    import psutil  # type: ignore[import-untyped]  # which Ray brings along

    before, was_connected = set(psutil.Process().children()), ray.is_initialized()
    try:
        yield
    except BaseException:
        if not was_connected:
            ray.shutdown()
        for child in set(psutil.Process().children()) - before:
            with contextlib.suppress(psutil.Error):
                if any("/ray/" in part for part in child.cmdline()):
                    for each in (*child.children(recursive=True), child):
                        each.kill()
                    child.wait()
        raise


def disconnect() -> None:
    """End the connection that `connect` made; an embedded Ray ends with it, and its token is forgotten."""
    with signals_wait_for_ray(again_interrupts=False):
        ray.shutdown()
        forget_private_token()


@contextlib.contextmanager
def connection(address: str | None, cpus: int) -> Iterator[None]:
    """Connect as `connect` for the block, and leave a connection that existed before as it was."""
    made = connect(address, cpus)
    try:
        yield
    finally:
        if made:
            disconnect()


def prepare_embedded_ray() -> None:
    """Give the embedded Ray a token that only this process knows, since it listens on every interface of the machine.

    Its sockets go where their paths are short enough. Raises InputError where RAY_AUTH_MODE turns authentication off
    and DEFUSE_UNAUTHENTICATED_RAY does not insist.
    """
    shorten_socket_paths()
    if not is_unauthenticated():
        set_private_token()
    elif os.environ.get(INSIST) == "1":
        log.warning(
            "RAY RUNS WITHOUT AUTHENTICATION: WHOEVER REACHES THIS MACHINE CAN RUN CODE ON IT (%s=1)", INSIST
        )
    else:
        raise InputError(
            f"RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']}: expected `token` or no such variable, since whoever reaches "
            f"this machine could run code in its Ray; unset it, or set {INSIST}=1 where nobody else reaches it"
        )


def _unreachable(address: str, found: str) -> DefuseError:
    if any(word in found.lower() for word in ("token", "authenticat", "unauthorized")):
        return InputError(f"Ray at {address} {OTHER_TOKEN}")
    return ComputeError(
        f"no Ray cluster answers at {address} ({found}); check --address or RAY_ADDRESS: it is port 6379 of the head"
    )


def require_absolute_root(root: Path | None) -> None:
    """Raise RunFileError for a `data.root` that each node would resolve against a folder of its own."""
    if root is not None and not root.is_absolute():
        raise RunFileError(f"data.root {root}: expected the absolute path of the images on the nodes")


def require_absolute_paths(spec: RunFile) -> None:
    """Raise RunFileError for relative paths of images or weights, once joined. A job brings its weights along."""
    require_absolute_root(spec.data.root)
    if ray.get_runtime_context().runtime_env.get("working_dir"):
        return
    for name, section in model_sections(spec).items():
        if section.weights is not None and not section.weights.is_absolute():
            raise RunFileError(
                f"{name}.weights {section.weights}: expected the absolute path of the weights on the nodes"
            )


def cause_of(error: BaseException) -> BaseException:
    """Return the exception that a task raised, for an error of a task; any other error is its own cause."""
    return error.cause if isinstance(error, RayTaskError) else error


def is_worker_lost(error: BaseException) -> bool:
    """Whether a process, a node or an object was lost, in contrast to an exception that the task raised."""
    cause = cause_of(error)
    return isinstance(cause, RayError) and not isinstance(cause, RayTaskError)


def as_defuse_error(error: BaseException, where: str) -> DefuseError:
    """Return the error of the tree that a Ray `error` carries, else a ComputeError with `where` and the cause.

    One from another node names it: what this node has, such as images or credentials, that one may lack.
    """
    cause = cause_of(error)
    if not isinstance(cause, DefuseError):
        return ComputeError(f"{where}: {explained_line(error)}")
    here = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    node = _node(error)
    return type(cause)(f"{cause} ({node.strip()})") if node not in ("", f" on {here}") else cause


@contextlib.contextmanager
def ray_errors(where: str) -> Iterator[None]:
    """Raise errors of Ray, also of what its store does not take, and of its full disk, as those of the tree."""
    try:
        yield
    except RayError as error:
        raise as_defuse_error(error, where) from error
    except OSError as error:  # of Tune's files, in this process
        if error.errno not in FULL_DISK:
            raise
        raise ComputeError(f"{where}: {error}; {FREE_DISK}") from error


def explained_line(error: BaseException) -> str:
    """Return the cause of `error` as one line, without the traceback that Ray puts around it."""
    cause = cause_of(error)
    if isinstance(cause, DefuseError):
        return str(cause)  # one line already
    if isinstance(cause, OutOfDiskError | ObjectStoreFullError):
        remedy = FREE_DISK if isinstance(cause, OutOfDiskError) else MORE_MEMORY
        return f"{_line(cause, 0)}{_node(error)}; {remedy}"
    if isinstance(cause, RayActorError):  # also in a task that waited for the actor
        return _of_actor(cause)
    if isinstance(error, RayTaskError):
        return _of_task(error, cause)
    if isinstance(cause, RayError):
        return _of_ray(cause)
    return f"{type(cause).__name__}: {_flat(cause)}"


def _of_ray(cause: RayError) -> str:
    if isinstance(cause, RuntimeEnvSetupError):
        return f"a node could not set up the job's environment: {_line(cause, -1)}"
    if isinstance(cause, OutOfMemoryError):
        return f"{_line(cause, 0)}; {MORE_MEMORY}"
    return _line(cause, 0)


def _of_actor(cause: RayActorError) -> str:
    if cause.actor_init_failed:
        why = _line(cause, -1) + (f"; {INSTALL}" if "No module named" in str(cause) else "")
    else:
        why = " ".join(LOST_ACTOR.sub("", str(cause)).removeprefix(ActorDiedError.BASE_ERROR_MSG).split())
    return f"its worker process{_node(cause)} died ({why or _line(cause, 0)})"


def _of_task(error: RayTaskError, cause: BaseException) -> str:
    if "No module named" in str(cause):
        return f"{_line(cause, -1)}{_node(error)}; {INSTALL}"
    if isinstance(cause, RayTaskError):  # the exception could not be pickled: only its text arrived
        return _line(error, -1)
    from defuse_core.device import is_out_of_memory  # late: torch takes a second

    remedy = f"; {MORE_MEMORY}" if is_out_of_memory(cause) else ""
    return f"{type(cause).__name__}: {_flat(cause)}{remedy}"


def _node(error: BaseException) -> str:
    found = NODE.findall(str(error))
    # the last: before it are tasks that needed the failed one's result
    return f" on {found[-1]}" if found else ""


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split())


def _line(error: BaseException, place: int) -> str:
    """Return the first (0) or last (-1) line of an error; its type where it has no text."""
    lines = str(error).strip().splitlines()
    return lines[place].strip() if lines else type(error).__name__
