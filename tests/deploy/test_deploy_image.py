"""The Dockerfile and what its build may see."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from shipped import DEPLOY, ROOT, arguments, instructions, pods

PACKAGES = ("defuse_core", "cluster", "services")
PINNED = re.compile(r"^[\w./-]+:\d+\.\d+\.\d+[\w.-]*$")


def copies() -> list[tuple[list[str], str]]:
    """Return sources and target of each COPY from the build context."""
    words = [shlex.split(rest) for word, rest in instructions() if word == "COPY"]
    kept = [[part for part in line if not part.startswith("--chown")] for line in words]
    return [(line[:-1], line[-1]) for line in kept if not line[0].startswith("--from")]


def project() -> dict[str, object]:
    tree: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return tree


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or "hadolint"
    found = subprocess.run(
        [hadolint, str(DEPLOY / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout) == (0, "")


def test_every_stage_starts_from_a_pinned_image_or_an_earlier_stage() -> None:
    given, stages = arguments(), set()
    for word, rest in instructions():
        if word != "FROM":
            continue
        image, _, stage = rest.partition(" AS ")
        for variant in ("cpu", "cuda"):
            source = re.sub(r"\$\{(\w+)\}", lambda m, v=variant: {**given, "VARIANT": v}[m[1]], image)
            assert source in stages or PINNED.match(source), source
        stages.add(stage)


def test_both_variants_have_the_torch_that_the_package_asks_for() -> None:
    needs = {r.name: r for r in (Requirement(line) for line in project()["dependencies"])}  # type: ignore[attr-defined]
    given = arguments()
    assert given["TORCH_VERSION"] in needs["torch"].specifier
    assert given["TORCHVISION_VERSION"] in needs["torchvision"].specifier
    installs = [rest for word, rest in instructions() if word == "RUN" and "torch==" in rest]
    assert len(installs) == 2 and all("torchvision==" in line for line in installs)


def test_it_runs_as_the_user_that_the_pods_run_as() -> None:
    (user,) = (rest for word, rest in instructions() if word == "USER")
    uid, gid = map(int, user.split(":"))
    assert uid != 0
    for where, pod in pods():
        context = pod["securityContext"]
        assert (context["runAsUser"], context["runAsGroup"], context["runAsNonRoot"]) == (uid, gid, True), (
            where
        )


def test_home_is_in_the_environment_since_ray_up_looks_for_it_there() -> None:
    environment = " ".join(rest for word, rest in instructions() if word == "ENV")
    (workdir,) = {rest for word, rest in instructions()[-8:] if word == "WORKDIR"}
    assert f"HOME={workdir}" in shlex.split(environment)
    assert load_mounts() == {f"{workdir}/.ray"}


def test_a_login_shell_such_as_ray_up_runs_its_commands_in_finds_what_the_image_has(tmp_path: Path) -> None:
    """Debian's /etc/profile sets PATH, and then reads /etc/profile.d."""
    (venv,) = re.findall(
        r"VIRTUAL_ENV=(\S+)", " ".join(rest for word, rest in instructions() if word == "ENV")
    )
    *_, last_run = (rest for word, rest in instructions() if word == "RUN")
    (command,) = re.findall(r"echo .* > /etc/profile\.d/\w+\.sh", last_run)
    profile = tmp_path / "image.sh"
    made = re.sub(r"> \S+$", f"> {profile}", command)
    subprocess.run(["/bin/sh", "-c", made], env={"VIRTUAL_ENV": venv, "PATH": "/built"}, check=True)
    login = ["/bin/sh", "-c", f'PATH=/usr/bin:/bin; . {profile}; echo "$PATH"']
    assert subprocess.check_output(login, text=True).strip() == f"{venv}/bin:/usr/bin:/bin"


def load_mounts() -> set[str]:
    from shipped import load

    return set(load(DEPLOY / "ray-cluster.yaml")["file_mounts"])


def test_nothing_is_left_to_root_and_there_is_a_health_check() -> None:
    words = [word for word, _ in instructions()]
    assert words.index("USER") < words.index("HEALTHCHECK") < words.index("CMD")
    assert "RUN" not in words[words.index("USER") :]


def test_the_build_context_is_a_list_of_what_is_copied() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert patterns[0] == "*"
    allowed = {pattern[1:] for pattern in patterns if pattern.startswith("!")}
    assert allowed == {source for sources, _ in copies() for source in sources}


def test_what_is_copied_is_enough_to_build_the_package_with_all_its_files(tmp_path: Path) -> None:
    context = tmp_path / "src"
    context.mkdir()
    for sources, target in copies():
        if target.startswith("/home"):
            continue
        for source in sources:
            found, place = ROOT / source, context / source
            place.parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if found.is_dir() else shutil.copy
            copy(found, place)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    subprocess.run([*build, "--wheel-dir", str(tmp_path)], cwd=context, check=True, timeout=270)
    (wheel,) = tmp_path.glob("*.whl")
    assert tracked() - set(zipfile.ZipFile(wheel).namelist()) == set()


def tracked() -> set[str]:
    """Return the packages' files but for compiled ones and pages for readers, relative to the repository."""
    files = (file for name in PACKAGES for file in (ROOT / name).rglob("*") if file.is_file())
    return {
        str(file.relative_to(ROOT)) for file in files if not {"__pycache__", "README.md"} & set(file.parts)
    }


@pytest.mark.parametrize("sources", [sources for sources, _ in copies()], ids=" ".join)
def test_what_is_copied_exists(sources: list[str]) -> None:
    assert [source for source in sources if not (ROOT / source).exists()] == []
