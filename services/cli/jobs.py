"""`defuse submit`, with the working directory that it makes for a job, and `defuse jobs ...`."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from defuse_core.errors import ComputeError, InputError, ModelError, RunFileError
from defuse_core.files import FULL_DISK, expect_no_special_file, temporary_folder
from defuse_core.formatting import escape_control_characters
from services import stopped_exit_code
from services.cli.options import (
    GivenPath,
    checked_text,
    name_option,
    set_option,
    text_option,
    track_option,
    until_option,
)
from services.cli.runs import run_name
from services.settings import read_environment, variables

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

    from cluster.jobs import Jobs
    from defuse_core.config import RunFile

LOCAL_DASHBOARD = "http://127.0.0.1:8265"
RUN_EXIT_CODES = (2, 3, 4)  # exit codes of a `defuse run` that did not finish
PACKAGES = ("defuse_core", "cluster", "services")
ROOT = Path(__file__).parents[2]
INSTALLED = {"site-packages", "dist-packages"}  # folders of pip, the second one of Debian's Python
RUN_FILE = "run.yaml"
# Ray would leave out what ignore files name
SKIPPED = shutil.ignore_patterns("__pycache__", "*.pyc", ".git", ".gitignore", ".rayignore")
MOST_MB = 99  # Ray's dashboard takes 100 MiB at most

dashboard_option = text_option(
    "--address",
    help="Address of Ray's dashboard. [default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS if it is an http:// address, else "
    f"{LOCAL_DASHBOARD}]",
)


@click.command(short_help="Run a run file as a job on a Ray cluster.")
@click.argument("runfile", type=GivenPath())
@dashboard_option
@name_option
@text_option(
    "--store", default="runs", show_default=True, help="s3://bucket/prefix, or a folder that all nodes share."
)
@set_option(help="Change a field: --set identify.draws=20")
@until_option
@track_option
@click.option(
    "--env",
    "wanted",
    multiple=True,
    metavar="NAME",
    help="Pass on this environment variable. Whoever sees the dashboard can read its value.",
)
@text_option("--python", default="python", show_default=True, help="Python on the nodes, one with Ray.")
@click.option("--detach", is_flag=True, help="Print the job's id and return at once.")
def submit(
    runfile: Path,
    address: str | None,
    name: str | None,
    store: str,
    overrides: tuple[str, ...],
    until: str,
    track: str | None,
    wanted: tuple[str, ...],
    python: str,
    detach: bool,
) -> None:
    """Run RUNFILE as a job on a Ray cluster, follow its log, and end with its exit code.

    Uploads the run file, the weights that it names, the top-level package or module of each import_path unless it is
    installed by pip, and Defuse itself. Nodes need its dependencies (deploy/Dockerfile is an image with them), and any
    other module. No environment variable is uploaded but those that --env names: nodes have their own AWS_* and
    LABEL_STUDIO_*. With token authentication set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN here.

    \b
    defuse submit deploy/runs/mnist-laptop.yaml --address http://head:8265 \\
      --store s3://our/runs --set data.root=/data
    """
    from defuse_core.config import load_run_file
    from defuse_core.data import check_class_names

    spec = load_run_file(runfile, overrides)
    check_class_names(spec.data)
    run, passed_on = run_name(name, runfile), variables(wanted)
    command = [python, "-m", "services.cli", "run", RUN_FILE, "--name", run, "--store", _shared(store)]
    command += ["--until", until]
    if track is not None:
        command += ["--track", track]
    jobs = _jobs_at(address)
    with temporary_folder("defuse-job-") as folder:
        build_working_dir(spec, Path(folder))
        with _full_disk_named():  # Ray packs the folder in another one
            job_id = jobs.submit(shlex.join(command), Path(folder), run, passed_on)
    if detach:
        click.echo(job_id)
        return
    click.echo(f"job {job_id}: run {run} on {jobs.shown}", err=True)
    _follow(jobs, job_id)


@click.group()
def jobs() -> None:
    """See and stop submitted jobs.

    \b
    defuse jobs list --address http://head:8265
    """


@jobs.command(name="list")
@dashboard_option
def list_jobs(address: str | None) -> None:
    """List the jobs of the cluster."""
    rows = [_row(job) for job in _jobs_at(address).list()]
    table = [("id", "status", "started", "took", "run"), *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        click.echo("  ".join(map(str.ljust, row, widths)).rstrip())


@jobs.command()
@click.argument("job_id", callback=checked_text)
@dashboard_option
@click.option("--follow", is_flag=True, help="Follow the log until the job ends, and end with its exit code.")
def logs(job_id: str, address: str | None, follow: bool) -> None:
    """Show what the job JOB_ID has written."""
    found = _jobs_at(address)
    if follow:
        _follow(found, job_id)
    else:
        click.echo(found.logs(job_id), nl=False)


@jobs.command()
@click.argument("job_id", callback=checked_text)
@dashboard_option
def stop(job_id: str, address: str | None) -> None:
    """Stop the job JOB_ID. Submitted again, its run continues where it stopped."""
    stopped = _jobs_at(address).stop(job_id)
    click.echo(f"job {job_id} {'is being stopped' if stopped else 'had ended before'}")


def _row(job: JobDetails) -> tuple[str, ...]:
    from cluster.jobs import RUN

    submitted = (str(job.submission_id), (job.metadata or {}).get(RUN) or job.entrypoint)
    name, run = map(escape_control_characters, submitted)  # what others typed
    if not job.start_time:
        return name, job.status.value, "-", "-", run
    begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.start_time / 1000))
    # the head's clock may be ahead of this machine's
    took = max(0, int((job.end_time or time.time() * 1000) - job.start_time))
    minutes, seconds = divmod(took // 1000, 60)
    return name, job.status.value, begun, f"{minutes // 60}:{minutes % 60:02}:{seconds:02}", run


def _jobs_at(address: str | None) -> Jobs:
    """Return the jobs of the dashboard at `address`, or of the environment's: RAY_ADDRESS only if it is http://."""
    from cluster.jobs import Jobs

    environment = read_environment()
    joined = environment.ray_address or ""
    return Jobs(
        address or environment.ray_dashboard or (joined if joined.startswith("http") else LOCAL_DASHBOARD)
    )


def _shared(store: str) -> str:
    """Return the store as the job addresses it; print what must hold for a folder. Raises InputError for no store."""
    from services.storage import bucket_and_prefix, store_folder

    if store.startswith("s3://"):
        bucket_and_prefix(store)
        return store
    folder = store_folder(store)
    click.echo(
        f"store {folder}: must be the same shared folder on every node; s3://bucket/prefix need not", err=True
    )
    return str(folder)


def _follow(jobs: Jobs, job_id: str) -> None:
    """Show the job's log until it ends, and exit with the run's exit code."""
    try:
        job = jobs.follow(job_id, partial(click.echo, nl=False))
    except (KeyboardInterrupt, BrokenPipeError):  # nobody reads it any more
        click.echo(
            f"\njob {job_id} continues: `defuse jobs logs {job_id} --follow {jobs.option}` follows it again, "
            f"`defuse jobs stop {job_id} {jobs.option}` stops it",
            err=True,
        )
        raise click.exceptions.Exit(stopped_exit_code()) from None
    if job.status != "SUCCEEDED":
        click.echo(f"job {job_id}: {_ending(job)}", err=True)
    raise click.exceptions.Exit(_exit_code(job))


def _exit_code(job: JobDetails) -> int:
    """Return the run's own exit code; 4 for a job that was stopped, was killed or never began.

    A 1 is the interpreter's, such as for a missing dependency, or Ray's: `defuse run` itself never ends with it.
    """
    if job.status == "SUCCEEDED":
        return 0
    code = job.driver_exit_code
    return code if code in RUN_EXIT_CODES else 4


def _ending(job: JobDetails) -> str:
    code = job.driver_exit_code
    if code is None:
        return f"{job.status.value.lower()}: {' '.join((job.message or '').split())}"
    if code in RUN_EXIT_CODES:
        return f"exit code {code}"
    return f"exit code {code}, which is not one of `defuse run`: look at the job's log for what ended it"


@contextlib.contextmanager
def _full_disk_named() -> Iterator[None]:
    """Raise ComputeError where the job does not fit into the folder of temporary files."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise ComputeError(
            f"no space left in {tempfile.gettempdir()}, where the job is built, so nothing was submitted; free some, "
            "or set TMPDIR to a folder elsewhere"
        ) from error


@_full_disk_named()
def build_working_dir(spec: RunFile, folder: Path) -> None:
    """Fill `folder` with all that `defuse run run.yaml` needs, apart from the dependencies that nodes have installed.

    Raises RunFileError for a relative data.root and for weights or code that cannot be read, ModelError for missing
    code, InputError for more than Ray accepts, ComputeError where the disk is full.
    """
    from cluster.connection import require_absolute_root
    from defuse_core.config import dump_run_file, model_sections

    require_absolute_root(spec.data.root)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=SKIPPED, copy_function=_copy_file)
    for name, section in model_sections(spec).items():
        if section.import_path:
            _copy_module(f"{name}.import_path", section.import_path, folder)
    (folder / RUN_FILE).write_text(dump_run_file(_with_weights(spec, folder)), encoding="utf-8")
    _expect_uploadable(folder)


def _expect_uploadable(folder: Path) -> None:
    paths = list(folder.rglob("*"))
    for path in paths:
        try:
            os.fspath(path).encode()
        except UnicodeEncodeError as error:  # which Ray would raise
            name = path.relative_to(folder)
            raise InputError(
                f"{name}: Ray takes only UTF-8 in the names of files; rename or remove it"
            ) from error
    files = {path: path.stat().st_size for path in paths if path.is_file()}
    largest = max(files, key=lambda path: files[path])
    if sum(files.values()) > MOST_MB * 2**20:
        raise _too_large(
            f"the job is {sum(files.values()) / 2**20:.0f} MiB ({largest.relative_to(folder)} alone "
            f"{files[largest] / 2**20:.0f})"
        )


def _too_large(found: str) -> InputError:
    from cluster.jobs import WITHOUT_UPLOAD

    return InputError(f"{found}, and Ray accepts {MOST_MB + 1} MiB: {WITHOUT_UPLOAD}")


def _with_weights(spec: RunFile, folder: Path) -> RunFile:
    """Copy the weights that the run file names, and return it with their paths in the working directory."""
    from defuse_core.config import model_sections, with_weights

    copies = {}
    for name, section in model_sections(spec).items():
        if section.weights is not None:
            copies[name] = Path("weights") / f"{name}{section.weights.suffix}"
            _copy(section.weights, folder / copies[name], f"{name}.weights")
    return with_weights(spec, copies)


@_full_disk_named()  # copytree goes on after an OSError, and raises one of all files
def _copy_file(source: str, target: str) -> None:
    expect_no_special_file(Path(source))
    shutil.copy2(source, target)


def _copy(source: Path, target: Path, field: str, *, dangling_links: bool = True) -> None:
    """Copy a file or folder. Raises RunFileError for what cannot be read, such as a link to nothing, if these count.

    Raises InputError before it copies more than Ray accepts.
    """
    copied, largest = 0, (0, "")

    def copy_file(file: str, to: str) -> None:
        nonlocal copied, largest
        size = Path(file).stat().st_size
        copied, largest = copied + size, max(largest, (size, file))
        if copied > MOST_MB * 2**20:
            alone = f" ({largest[1]} alone {largest[0] / 2**20:.0f})" if source.is_dir() else ""
            raise _too_large(f"{field} {source}: over {MOST_MB} MiB{alone}")
        _copy_file(file, to)

    target.parent.mkdir(exist_ok=True)
    try:
        with _full_disk_named():
            if source.is_dir():
                shutil.copytree(
                    source,
                    target,
                    ignore=SKIPPED,
                    copy_function=copy_file,
                    ignore_dangling_symlinks=not dangling_links,
                )
            else:
                copy_file(str(source), str(target))
    except OSError as error:
        # copytree raises one error for all files: source, target and reason of each
        reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror
        raise RunFileError(f"{field} {source}: cannot be read ({reason})") from error


def _copy_module(field: str, import_path: str, folder: Path) -> None:
    """Copy the top-level package or module of a user's model, unless it is installed or copied already."""
    name = import_path.partition(":")[0].partition(".")[0]
    if name in PACKAGES:
        raise ModelError(f"{field} {import_path}: {name} is a package of Defuse; rename yours")
    found = importlib.machinery.PathFinder.find_spec(name, [str(Path.cwd()), *sys.path])
    if found is None and name != "__main__":
        with contextlib.suppress(ValueError):  # a module that has no spec
            found = importlib.util.find_spec(name)  # by the finders that editable installs have
    if found is None or not (found.has_location or found.submodule_search_locations):
        raise ModelError(f"{field} {import_path}: no module {name} in this folder or on PYTHONPATH")
    if found.submodule_search_locations:
        source = Path(next(iter(found.submodule_search_locations)))
        target = folder / name
    else:
        source = Path(str(found.origin))
        target = folder / source.name
    if INSTALLED & {*source.parts}:
        note = f"{name} is installed here, so it is not uploaded: every node needs it installed"
        click.echo(f"{field} {import_path}: {note}", err=True)
    elif not target.exists():
        _copy(source, target, field, dangling_links=False)  # Emacs locks a file by a link to nothing
