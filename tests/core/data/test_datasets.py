"""Data sets that are not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_samples import error_of, section

from defuse_core.data.images import data_root, reading
from defuse_core.errors import DataError


@pytest.mark.parametrize("name", ["mnist", "signs", "svhn", "folder", "npz"])
def test_a_missing_root_is_named_with_what_to_do(tmp_path: Path, name: str):
    message = error_of(section(name, tmp_path / "nowhere"))
    assert f"data.root: {tmp_path / 'nowhere'} does not exist" in message
    assert ("data.download: true" in message) == (name in {"mnist", "signs", "svhn"})


@pytest.mark.parametrize("name", ["mnist", "signs", "svhn"])
def test_a_missing_data_set_names_the_setting_that_downloads_it(tmp_path: Path, name: str):
    assert "set data.download: true" in error_of(section(name, tmp_path))


@pytest.mark.parametrize("name", ["mnist", "signs", "svhn", "folder", "npz"])
def test_a_root_of_the_wrong_kind_is_refused_in_one_line(tmp_path: Path, name: str):
    wrong = tmp_path / "wrong"
    wrong.mkdir() if name == "npz" else wrong.write_text("not images")
    assert str(wrong) in error_of(section(name, wrong))


@pytest.mark.parametrize("name", ["mnist", "signs", "svhn", "folder", "npz"])
def test_a_root_that_may_not_be_read_is_refused_in_one_line(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(Path, "exists", refuse)  # a mode would not stop a test that runs as root
    assert f"cannot read {tmp_path} (Permission denied)" in error_of(section(name, tmp_path))


@pytest.mark.parametrize(
    ("name", "images"), [("npz", "images"), ("folder", "images"), ("signs", "signs images")]
)
def test_a_root_that_does_not_exist_is_to_be_set(tmp_path: Path, name: str, images: str):
    found = error_of(section(name, tmp_path / "gone"))
    assert f"gone does not exist; set it to the path of the {images}" in found


def test_a_root_that_is_downloaded_to_need_not_exist(tmp_path: Path):
    assert data_root(section("mnist", tmp_path / "new", download=True)) == tmp_path / "new"


@pytest.mark.parametrize(("download", "todo"), [(True, "download failed, so put them"), (False, "put them")])
def test_an_error_of_a_reader_says_what_was_expected_and_one_of_our_own_is_kept(
    tmp_path: Path, download: bool, todo: str
):
    with pytest.raises(DataError, match=r"^cat\.png: not a cat$"), reading(tmp_path, "cats", download):
        raise DataError("cat.png: not a cat")
    expected = rf"^data\.root: expected cats under {tmp_path}, found no cat; {todo} there"
    with pytest.raises(DataError, match=expected), reading(tmp_path, "cats", download):
        raise OSError("no cat")
