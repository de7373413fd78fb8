"""The working directory of a job."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import time
import zipfile
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray._private.runtime_env.packaging import create_package
from ray.job_submission import JobDetails, JobStatus, JobType

from defuse_core.config import RunFile, load_run_file
from defuse_core.errors import ComputeError, InputError, ModelError, RunFileError
from defuse_core.files import source_digest
from services.cli.jobs import (
    PACKAGES,
    RUN_FILE,
    _copy_module,
    _expect_uploadable,
    _jobs_at,
    _row,
    build_working_dir,
)
from tests.command_line import call
from tests.conftest import ROOT, tiny


def own_classifier(weights: Path, module: str = "mine") -> RunFile:
    """A run file with the user's own classifier."""
    return tiny(
        classifier={
            "architecture": "custom",
            "import_path": f"{module}:build",
            "weights": str(weights),
            "epochs": 0,
        }
    )


def test_weights_and_code_are_copied_and_the_run_file_names_the_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("build = None")
    (tmp_path / "best.safetensors").write_bytes(b"weights")
    job = tmp_path / "job"
    job.mkdir()
    build_working_dir(own_classifier(tmp_path / "best.safetensors"), job)
    copied = load_run_file(job / RUN_FILE)
    assert copied.classifier.weights == Path("weights/classifier.safetensors")
    assert (job / "weights/classifier.safetensors").read_bytes() == b"weights"
    assert (job / "mine.py").read_text() == "build = None"
    assert (job / "defuse_core/pipeline.py").is_file() and not list(job.rglob("*.pyc"))


def test_models_that_screen_and_judge_are_copied_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "screening.py").write_text("build = None")
    (tmp_path / "large.safetensors").write_bytes(b"of the screening model")
    one = {"architecture": "custom", "import_path": "screening:build", "count": 1, "epochs": 0}
    own = one | {"weights": str(tmp_path / "large.safetensors")}
    job = tmp_path / "job"
    job.mkdir()
    build_working_dir(tiny(review={"reference": own}, judges=own), job)
    copied = load_run_file(job / RUN_FILE)
    assert copied.review.reference.weights == Path("weights/review.reference.safetensors")
    assert (job / "weights/judges.safetensors").read_bytes() == b"of the screening model"
    assert (job / "screening.py").is_file()


def test_what_the_nodes_could_not_find_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("")
    with pytest.raises(RunFileError, match=r"classifier.weights .*gone\.pt: cannot be read \(No such file"):
        build_working_dir(own_classifier(tmp_path / "gone.pt"), tmp_path / "a")
    with pytest.raises(ModelError, match="no module absent in this folder or on PYTHONPATH"):
        build_working_dir(own_classifier(tmp_path / "gone.pt", "absent"), tmp_path / "b")
    with pytest.raises(ModelError, match="no module __main__ in this folder"):
        build_working_dir(own_classifier(tmp_path / "gone.pt", "__main__"), tmp_path / "e")
    with pytest.raises(ModelError, match="services is a package of Defuse; rename yours"):
        build_working_dir(own_classifier(tmp_path / "gone.pt", "services.nets"), tmp_path / "d")
    with pytest.raises(RunFileError, match=r"data.root images.npz: expected the absolute path"):
        build_working_dir(tiny(data={"name": "npz", "root": "images.npz"}), tmp_path / "c")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the user's package, beside a file of weights and an empty folder for the job."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "job"):
        (tmp_path / name).mkdir()
    (tmp_path / "best.safetensors").write_bytes(b"weights")
    return tmp_path / "mine"


def test_what_an_ignore_file_of_the_users_package_names_travels_too(tmp_path: Path, package: Path) -> None:
    job = tmp_path / "job"
    for name, text in {"__init__.py": "", "_version.py": "", ".gitignore": "_version.py\n"}.items():
        (package / name).write_text(text)
    build_working_dir(own_classifier(tmp_path / "best.safetensors"), job)
    archive = tmp_path / "job.zip"
    create_package(str(job), archive, include_gitignore=True)
    assert "mine/_version.py" in zipfile.ZipFile(archive).namelist()


class EditableFinder(MetaPathFinder):
    """What an editable install of a flat layout puts on sys.meta_path: modules by their files, outside sys.path."""

    def __init__(self, mapping: dict[str, Path]) -> None:
        self.mapping = mapping

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        file = self.mapping.get(fullname)
        return None if file is None else spec_from_file_location(fullname, file)


def test_code_that_an_editable_install_maps_travels_under_its_own_name(
    tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package.rename(tmp_path / "lib")
    for file in ("lib/__init__.py", "lib/nets.py", "single.py"):
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path / "job")
    mapping = {"mine": tmp_path / "lib/__init__.py", "single": tmp_path / "single.py"}
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, EditableFinder(mapping)])
    for number, module in enumerate(("mine.nets", "single")):
        job = tmp_path / f"job-{number}"
        job.mkdir()
        build_working_dir(own_classifier(tmp_path / "best.safetensors", module), job)
    assert (tmp_path / "job-0/mine/nets.py").is_file() and (tmp_path / "job-1/single.py").is_file()


def test_a_link_to_nothing_in_the_users_package_is_left_out(tmp_path: Path, package: Path) -> None:
    job = tmp_path / "job"
    (package / "__init__.py").touch()
    (package / ".#net.py").symlink_to("ana@laptop.4711")  # Emacs locks a file that is edited by such a link
    build_working_dir(own_classifier(tmp_path / "best.safetensors"), job)
    assert [path.name for path in (job / "mine").iterdir()] == ["__init__.py"]


def test_a_file_of_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "vit", "job", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine" / "__init__.py").touch()
    os.mkfifo(tmp_path / "mine" / "pipe")  # which nobody reads, root neither
    (tmp_path / "best.safetensors").write_bytes(b"weights")
    with pytest.raises(RunFileError, match=r"classifier.import_path .*mine: cannot be read \(.*mine/pipe"):
        build_working_dir(own_classifier(tmp_path / "best.safetensors"), tmp_path / "job")
    (tmp_path / "vit" / "model.safetensors").symlink_to("gone")
    fields = {"architecture": "transformers", "weights": str(tmp_path / "vit"), "epochs": 0}
    with pytest.raises(RunFileError, match=r"classifier.weights .*vit: cannot be read \(.*No such file"):
        build_working_dir(tiny(classifier=fields), tmp_path / "other")


def test_a_device_among_the_files_of_a_job_is_refused_before_it_is_read(
    tmp_path: Path, package: Path
) -> None:
    (package / "__init__.py").touch()
    (package / "noise.bin").symlink_to(os.devnull)  # /dev/zero would fill the disk
    special = "a pipe, a device or a socket"
    with pytest.raises(RunFileError, match=rf"mine: cannot be read \(.*{special}.*noise.bin"):
        build_working_dir(own_classifier(tmp_path / "best.safetensors"), tmp_path / "job")
    (tmp_path / "other").mkdir()
    fields = {"architecture": "cnn", "weights": os.devnull, "epochs": 0}
    with pytest.raises(RunFileError, match=rf"classifier.weights /dev/null: cannot be read \({special}\)"):
        build_working_dir(tiny(classifier=fields), tmp_path / "other")


@pytest.mark.parametrize("last", ["pipeline.py", "best.safetensors", "__init__.py", RUN_FILE])
def test_a_disk_that_is_full_while_the_job_is_put_together_is_one_line(
    last: str, tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (package / "__init__.py").touch()
    copyfile, write_text = shutil.copyfile, Path.write_text

    def full(path: object) -> None:
        if Path(str(path)).name == last:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def copied(source: str, target: str, **options: Any) -> str:
        full(source)
        return copyfile(source, target, **options)

    def written(path: Path, text: str, **options: Any) -> int:
        full(path)
        return write_text(path, text, **options)

    monkeypatch.setattr(shutil, "copyfile", copied)
    monkeypatch.setattr(Path, "write_text", written)
    with pytest.raises(ComputeError, match="^no space left in .*, so nothing was submitted; .* set TMPDIR"):
        build_working_dir(own_classifier(tmp_path / "best.safetensors"), tmp_path / "job")


def test_a_job_larger_than_ray_takes_is_refused_before_it_is_uploaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("build = None")
    with (tmp_path / "large.safetensors").open("wb") as large:
        large.truncate(120 * 2**20)
    job = tmp_path / "job"
    job.mkdir()
    expected = r"large\.safetensors: over 99 MiB, and Ray accepts 100 MiB: run `defuse run --address`"
    with pytest.raises(InputError, match=expected):
        build_working_dir(own_classifier(tmp_path / "large.safetensors"), job)
    assert not list((job / "weights").iterdir())


def test_code_that_lies_beside_data_is_refused_before_all_of_it_is_copied(
    tmp_path: Path, package: Path
) -> None:
    (package / "__init__.py").touch()
    (package / "data").mkdir()
    for number in range(5):
        (package / "data" / str(number)).touch()
        os.truncate(package / "data" / str(number), 40 * 2**20)
    with pytest.raises(
        InputError, match=r"classifier\.import_path .*mine: over 99 MiB \(.*data/\d alone 40\), and Ray"
    ):
        build_working_dir(own_classifier(tmp_path / "best.safetensors"), tmp_path / "job")
    assert len(list((tmp_path / "job/mine/data").iterdir())) == 2


def test_a_folder_of_transformers_is_copied_whole(tmp_path: Path) -> None:
    folder, job = tmp_path / "vit", tmp_path / "job"
    folder.mkdir()
    job.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(name)
    fields = {"architecture": "transformers", "weights": str(folder), "epochs": 0}
    build_working_dir(tiny(classifier=fields), job)
    copied = load_run_file(job / RUN_FILE).classifier.weights
    assert copied is not None
    assert sorted(path.name for path in (job / copied).iterdir()) == ["config.json", "model.safetensors"]


def test_a_module_without_a_file_is_no_code_to_take_along(tmp_path):
    with pytest.raises(ModelError, match="no module sys in this folder"):
        _copy_module("classifier.import_path", "sys:build", tmp_path)


@pytest.fixture
def small_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the one that Defuse is in, with its three packages."""
    root = tmp_path / "root"
    for name in PACKAGES:
        (root / name).mkdir(parents=True)
    # services.cli has the command under the name of its module
    monkeypatch.setattr(import_module("services.cli.jobs"), "ROOT", root)
    return root


def test_caches_and_ignore_files_stay_behind(tmp_path: Path, package: Path, small_root: Path) -> None:
    for folder in (package, *(small_root / name for name in PACKAGES)):
        for name in ("nets.py", "sub/deep.py", "stale.pyc", ".git/HEAD", "__pycache__/nets.c", ".gitignore"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).touch()
        (folder / "sub/.rayignore").touch()
    job = tmp_path / "job"
    build_working_dir(own_classifier(tmp_path / "best.safetensors"), job)
    for name in ("mine", *PACKAGES):
        files = {str(path.relative_to(job / name)) for path in (job / name).rglob("*") if path.is_file()}
        assert files == {"nets.py", "sub/deep.py"}
    assert source_digest(job) == source_digest(small_root)


def test_a_job_may_be_as_large_as_ray_takes_and_the_largest_file_is_named(tmp_path: Path) -> None:
    for name, size in (("first.pt", 60 * 2**20), ("second.pt", 39 * 2**20)):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, size)
    _expect_uploadable(tmp_path)
    os.truncate(tmp_path / "second.pt", 39 * 2**20 + 1)
    with pytest.raises(
        InputError, match=r"the job is 99 MiB \(first\.pt alone 60\), and Ray accepts 100 MiB: "
    ):
        _expect_uploadable(tmp_path)


def test_a_file_whose_name_ray_does_not_take_is_named(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).touch()
    with pytest.raises(InputError, match=r"^caf.+\.txt: Ray takes only UTF-8 in the names of files"):
        _expect_uploadable(tmp_path)


def test_weights_keep_the_ending_that_says_how_they_are_read(
    tmp_path: Path, package: Path, small_root: Path
) -> None:
    (tmp_path / "Größe.pt").write_bytes(b"program")
    spec = tiny(
        data={"root": "/Bilder/größe"},
        classifier={"architecture": "program", "weights": str(tmp_path / "Größe.pt"), "epochs": 0},
    )
    build_working_dir(spec, tmp_path / "job")
    copied = load_run_file(tmp_path / "job" / RUN_FILE)
    assert copied.classifier.weights == Path("weights/classifier.pt")
    assert copied.data.root == Path("/Bilder/größe")
    assert (tmp_path / "job/weights/classifier.pt").read_bytes() == b"program"


def test_code_in_the_current_folder_comes_before_that_on_the_path(
    tmp_path: Path, package: Path, small_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (package / "here.py").touch()
    (tmp_path / "elsewhere" / "mine").mkdir(parents=True)
    for folder in (package, tmp_path / "elsewhere" / "mine"):
        (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    build_working_dir(own_classifier(tmp_path / "best.safetensors", "mine.here"), tmp_path / "job")
    assert (tmp_path / "job/mine/here.py").is_file()


@pytest.mark.parametrize("folder", ["site-packages", "dist-packages"])
def test_a_package_of_two_models_is_copied_once_and_installed_ones_are_on_the_nodes(
    folder: str,
    tmp_path: Path,
    package: Path,
    small_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (package / "__init__.py").touch()
    installed = tmp_path / folder
    installed.mkdir()
    (installed / "theirs.py").touch()
    monkeypatch.syspath_prepend(installed)
    one = {"architecture": "custom", "import_path": "mine:build", "count": 1, "epochs": 0}
    own = one | {"weights": str(tmp_path / "best.safetensors")}
    spec = tiny(review={"reference": own}, judges=own | {"import_path": "mine.other:build"})
    build_working_dir(spec, tmp_path / "job")
    _copy_module("judges.import_path", "theirs:build", tmp_path / "job")
    assert capsys.readouterr().err == (
        "judges.import_path theirs:build: theirs is installed here, so it is not uploaded: every node needs it "
        "installed\n"
    )
    assert {path.name for path in (tmp_path / "job").iterdir()} == {*PACKAGES, "mine", "weights", RUN_FILE}


def test_a_module_without_a_spec_is_no_code_to_take_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "made_at_run_time", type(sys)("made_at_run_time"))
    with pytest.raises(ModelError, match="no module made_at_run_time in this folder"):
        _copy_module("classifier.import_path", "made_at_run_time:build", tmp_path)


def test_a_job_is_the_command_of_its_run_in_the_python_that_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = list[str]()
    accepting = SimpleNamespace(submit=lambda command, *_: asked.append(command) or "job-1")
    monkeypatch.setattr("cluster.jobs.Jobs", lambda address: accepting)
    words = [ROOT / "deploy/runs/mnist-laptop.yaml", "--set", "data.root=/data", "--store", "s3://our/runs"]
    words += ["--name", "mine", "--until", "train", "--track", "mlflow", "--detach"]
    code, out, err = call(monkeypatch, capsys, "submit", *words, "--python", "/opt/venv/bin/python")
    assert (code, out) == (0, "job-1\n"), err
    run = "services.cli run run.yaml --name mine --store s3://our/runs --until train --track mlflow"
    assert asked == [f"/opt/venv/bin/python -m {run}"]


def a_job(status: JobStatus, *, name: str = "j1", command: str = "", **details: Any) -> JobDetails:
    return JobDetails(
        type=JobType.SUBMISSION, submission_id=name, entrypoint=command, status=status, **details
    )


@pytest.mark.parametrize("started", [None, 1000])
def test_what_others_submitted_cannot_act_on_the_terminal(started: int | None) -> None:
    odd = {"name": "raysubmit\n1", "command": "bash -c '\x1b[2J'"}
    row = _row(a_job(JobStatus.RUNNING, **odd, start_time=started))
    assert row[-1].startswith("bash -c ")
    assert not any("\n" in cell or "\x1b" in cell for cell in row)


def test_a_job_is_listed_with_its_beginning_and_the_time_that_it_took() -> None:
    begun = 1000 * int(time.mktime((2026, 1, 31, 12, 5, 0, 0, 0, -1)))
    ended, run = begun + 1000 * (3 * 3600 + 61), {"defuse_run": "digits"}
    job = a_job(JobStatus.SUCCEEDED, start_time=begun, end_time=ended, metadata=run)
    assert _row(job) == ("j1", "SUCCEEDED", "2026-01-31 12:05", "3:01:01", "digits")
    assert _row(a_job(JobStatus.PENDING))[2:4] == ("-", "-")


def test_a_job_that_began_by_a_clock_ahead_of_this_one_has_taken_no_time() -> None:
    job = a_job(JobStatus.RUNNING, start_time=int(1000 * time.time()) + 40_000)
    assert _row(job)[3] == "0:00:00"


@pytest.mark.parametrize(
    ("given", "dashboard", "cluster", "asked"),
    [
        ("http://given", "http://dashboard", "http://cluster", "http://given"),
        (None, "http://dashboard", "http://cluster", "http://dashboard"),
        (None, "", "http://cluster", "http://cluster"),
        (None, "", "cluster:6379", "http://127.0.0.1:8265"),  # of Ray itself, and no dashboard's
    ],
)
def test_the_dashboard_is_the_one_that_is_given_and_else_that_of_the_environment(
    given: str | None, dashboard: str, cluster: str, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.jobs.Jobs", lambda address: address)  # which connects
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", dashboard)
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    assert str(_jobs_at(given)) == asked
