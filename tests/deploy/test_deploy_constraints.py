"""deploy/constraints.txt: every dependency pinned, but for torch."""

from __future__ import annotations

import tomllib
from importlib.metadata import requires, version
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from shipped import DEPLOY, ROOT, document, ray_specs

from defuse_core.optional_packages import RELEASES
from services.cli.jobs import PACKAGES

CHOSEN_BY_THE_USER = {"torch", "torchvision", "defuse"}


def pins() -> dict[str, Requirement]:
    lines = (DEPLOY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in found if pin.marker is None or pin.marker.evaluate()}


def pinned_version(name: str) -> str:
    (specifier,) = pins()[name].specifier
    return specifier.version


def declarations() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def project() -> dict[str, Any]:
    found: dict[str, Any] = declarations()["project"]
    return found


def declared() -> list[Requirement]:
    lines = [
        *project()["dependencies"],
        *(line for extra in project()["optional-dependencies"].values() for line in extra),
    ]
    return [Requirement(line) for line in lines]


def test_each_line_pins_one_release_and_none_comes_from_a_file_or_an_address() -> None:
    assert len(pins()) > 100
    for pin in pins().values():
        assert pin.url is None and not pin.extras
        assert [specifier.operator for specifier in pin.specifier] == ["=="], pin


def test_each_declared_dependency_is_pinned_within_its_bounds() -> None:
    for need in declared():
        if need.name not in CHOSEN_BY_THE_USER | {"setuptools"}:
            assert pinned_version(canonicalize_name(need.name)) in need.specifier, need


def test_releases_in_which_a_client_s_bytes_do_harm_are_out_of_bounds() -> None:
    """Pillow before 13 has overflows in decoders; python-multipart before 0.0.27 parses headers for seconds."""
    bounds = {need.name: need.specifier for need in declared()}
    assert "12.3" not in bounds["pillow"]
    assert "0.0.26" not in bounds["python-multipart"]


def test_no_later_setuptools_is_taken_for_the_build_which_could_lack_its_editable_mode_compat() -> None:
    assert "editable_mode=compat" in (ROOT / "Makefile").read_text(encoding="utf-8")
    (needed,) = map(Requirement, declarations()["build-system"]["requires"])
    installed = Version(version("setuptools"))
    assert installed in needed.specifier
    assert str(installed.major + 1) not in needed.specifier
    assert needed in declared()  # the test of the image builds with what is installed


def test_messages_name_the_packages_of_the_extras_with_their_releases() -> None:
    """`defuse[EXTRA]` would install another project's package: `defuse` on PyPI is not this one."""
    extras = project()["optional-dependencies"]
    files = (file for name in PACKAGES for file in (ROOT / name).rglob("*.py"))
    sources = "\n".join(file.read_text(encoding="utf-8") for file in files)
    assert "defuse[" not in sources
    needs = [Requirement(line) for extra in extras.keys() - {"dev"} for line in extras[extra]]
    assert {need.name: need.specifier for need in needs} == {
        name: SpecifierSet(releases) for name, releases in RELEASES.items()
    }


def test_what_the_dependencies_need_at_any_depth_is_pinned_too() -> None:
    pinned, seen = pins(), set()
    needs = [need for need in declared() if need.marker is None or need.marker.evaluate()]
    while needs:
        need = needs.pop()
        name = canonicalize_name(need.name)
        if name in CHOSEN_BY_THE_USER | {"setuptools"} or (name, frozenset(need.extras)) in seen:
            continue
        assert name in pinned, need
        seen.add((name, frozenset(need.extras)))
        for further in map(Requirement, requires(name) or []):
            extras = ("", *need.extras)
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in extras):
                needs.append(further)


def test_torch_is_left_to_the_user() -> None:
    assert not CHOSEN_BY_THE_USER & set(pins())


def test_the_manifests_name_the_pinned_ray() -> None:
    assert {spec["rayVersion"] for _, spec in ray_specs()} == {pinned_version("ray")}
    assert document("RayCluster")["apiVersion"] == "ray.io/v1"
