"""Packages of single features: one that is missing, too old or too new, one whose release nobody knows."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest

from defuse_core.errors import InputError, ModelError
from defuse_core.optional_packages import expect_packages, import_package


def test_a_package_of_the_oldest_release_or_a_newer_one_is_no_error() -> None:
    expect_packages("this test", "timm", "mlflow-skinny", "onnx")


def test_a_missing_and_an_old_package_are_named_together_and_a_good_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    releases = {"timm": "1.0.9", "httpx": "0.28.1"}
    monkeypatch.setattr(metadata, "version", releases.__getitem__)
    with pytest.raises(ModelError) as caught:
        expect_packages("this test", "timm", "httpx", "onnx", error=ModelError)
    assert str(caught.value) == (
        "this test needs timm>=1.0.26 (found 1.0.9) and onnx>=1.17 (found none); "
        "pip install 'timm>=1.0.26' 'onnx>=1.17'"
    )


def test_on_a_python_that_is_too_new_for_a_package_no_command_is_named_that_cannot_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "label_studio_sdk", None)
    monkeypatch.setattr(sys, "version_info", (3, 14, 0, "final", 0))
    with pytest.raises(InputError) as caught:
        expect_packages("this test", "label-studio-sdk", "httpx")
    assert str(caught.value) == (
        "this test needs label-studio-sdk, which has no release for this Python; install Defuse with Python 3.13"
    )


def test_a_module_of_another_package_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-gpu has the module onnxruntime, and no package of that name is installed."""

    def unknown(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", unknown)
    expect_packages("this test", "onnxruntime")


@pytest.mark.parametrize("release", ["5.0.0rc1", "5.0.0.dev0", "from a branch"])
def test_a_development_version_is_not_too_old(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: release)
    expect_packages("this test", "transformers")


def test_a_package_that_cannot_be_imported_is_named_with_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "timm.py").write_text("from torch import nothing_of_this_name")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(ModelError, match="needs timm, which cannot be imported here .cannot import name"):
        import_package("this test", "timm", error=ModelError)
