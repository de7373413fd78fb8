"""`defuse delete`: what it asks, what it refuses, and that nothing is left."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from defuse_core.artifacts import Gallery
from defuse_core.codec import encode
from defuse_core.config import RunFile, dump_run_file
from defuse_core.files import digest_of
from defuse_core.pipeline import EVALUATION, expect_may_go_on
from defuse_core.runs import RECORDED_FIELDS, WEIGHTS, Run
from defuse_core.store import FolderStore
from services.serving import candidate
from services.serving.candidate import Candidate, prepare_candidate
from services.serving.checks import CandidateReport
from services.serving.registry import Registry
from tests.command_line import call, one_line

NOTHING_DELETED = "nothing was deleted; to delete without being asked, give --yes"


def opened(store: FolderStore) -> Run:
    return Run.open(store, "digits")


def give_run_file(store: FolderStore, spec: RunFile) -> None:
    """Let the run have been made with another run file."""
    store.delete(f"digits/{RECORDED_FIELDS}")
    store.write("digits/run.yaml", dump_run_file(spec).encode())


def test_a_deleted_run_leaves_nothing(own_store, monkeypatch, capsys):
    own_store.within("traffic").within("digits").write("0001.safetensors", b"an input that was served")
    code, out, _ = call(monkeypatch, capsys, "delete", "digits", "--store", own_store.address, "--yes")
    assert code == 0
    assert out.startswith("deleted digits: ")
    assert [path for path in own_store.folder.rglob("*") if path.is_file()] == []  # hidden files too
    assert call(monkeypatch, capsys, "delete", "digits", "--store", own_store.address, "--yes")[0] == 2


@pytest.mark.parametrize("answer", ["n\n", "\n", ""], ids=["no", "return", "end of input"])
def test_deleting_asks_first_and_a_no_deletes_nothing(answer, own_store, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    code, out, err = call(monkeypatch, capsys, "delete", "digits", "--store", own_store.address)
    assert f"files in {own_store.within('digits').address}? [y/N]" in out
    assert (code, one_line(err.strip())) == (2, f"defuse: {NOTHING_DELETED}")
    assert own_store.exists("digits/run.yaml")


def test_deleting_with_a_closed_input_deletes_nothing(own_store, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", None)  # what Python makes of `<&-`
    code, _, err = call(monkeypatch, capsys, "delete", "digits", "--store", own_store.address)
    assert (code, one_line(err.strip())) == (2, f"defuse: {NOTHING_DELETED}")
    assert own_store.exists("digits/run.yaml")


def test_ctrl_c_at_the_question_stops_the_command_and_deletes_nothing(own_store, monkeypatch, capsys):
    def interrupted() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", SimpleNamespace(readline=interrupted))
    code, _, err = call(monkeypatch, capsys, "delete", "digits", "--store", own_store.address)
    assert code == 130 and "--yes" not in err
    assert own_store.exists("digits/run.yaml")


def test_a_run_is_not_promoted_while_the_prompt_of_its_deletion_waits(own_store, monkeypatch, capsys):
    promote = ("promote", "digits", "--store", own_store.address, "--force", "a test")

    def promote_first(question: str) -> bool:
        code, _, err = call(monkeypatch, capsys, *promote)
        assert code == 4 and "is writing this run" in one_line(err)
        return True

    monkeypatch.setattr("click.confirm", promote_first)
    assert call(monkeypatch, capsys, "delete", "digits", "--store", own_store.address)[0] == 0
    assert own_store.list() == []


def test_a_run_is_not_deleted_while_it_is_promoted(own_store, monkeypatch, capsys):
    where, refused = ["--store", own_store.address], list[str]()

    def delete_first(registry: Registry, *arguments: Any, **options: Any) -> int:
        code, _, err = call(monkeypatch, capsys, "delete", "digits", *where, "--yes")
        refused.append(f"{code}: {one_line(err)}")
        return add(registry, *arguments, **options)

    add = Registry.add
    monkeypatch.setattr(Registry, "add", delete_first)
    assert call(monkeypatch, capsys, "promote", "digits", *where, "--force", "a test")[0] == 0
    assert len(refused) == 1 and "4: " in refused[0] and "is writing this run" in refused[0]
    assert own_store.exists("digits/run.yaml")


def test_a_run_that_is_deleted_before_its_promotion_is_not_promoted(own_store, monkeypatch, capsys):
    where = ["--store", own_store.address]

    def prepare_and_delete(*arguments: Any, **options: Any) -> tuple[str, Candidate]:
        prepared = prepare_candidate(*arguments, **options)
        assert call(monkeypatch, capsys, "delete", "digits", *where, "--yes")[0] == 0
        return prepared

    monkeypatch.setattr("services.serving.candidate.prepare_candidate", prepare_and_delete)
    code, _, err = call(monkeypatch, capsys, "promote", "digits", *where, "--force", "a test")
    assert code == 2 and "run digits was deleted meanwhile; it is not promoted" in one_line(err)
    assert list(own_store.folder.iterdir()) == []


def test_a_run_that_is_changed_before_its_promotion_is_not_promoted(own_store, monkeypatch, capsys):
    where = ["--store", own_store.address]

    def prepare_and_change(*arguments: Any, **options: Any) -> tuple[str, Candidate]:
        prepared = prepare_candidate(*arguments, **options)
        redo = ["review", "set", "digits", "0", "--reject", "--reason", "no digit", "--redo"]
        assert call(monkeypatch, capsys, *redo, *where)[0] == 0
        return prepared

    monkeypatch.setattr("services.serving.candidate.prepare_candidate", prepare_and_change)
    code, _, err = call(monkeypatch, capsys, "promote", "digits", *where, "--force", "a test")
    assert code == 2 and "run digits was changed meanwhile; it is not promoted" in one_line(err)
    assert not own_store.list("registry/")


def test_checks_of_a_run_that_is_deleted_meanwhile_do_not_begin_it_again(own_store, monkeypatch, caplog):
    run, evaluate = opened(own_store), candidate.evaluate_candidate
    run.store.existing = None  # as in a bucket, where a write makes a deleted folder again

    def delete_first(*arguments: Any) -> CandidateReport:
        own_store.within("digits").delete_all()
        return evaluate(*arguments)

    monkeypatch.setattr(candidate, "evaluate_candidate", delete_first)
    assert prepare_candidate(run, must_store=False)[1].run == "digits"
    assert own_store.list() == [] and "this run is gone" in caplog.text


def test_a_run_that_cannot_be_locked_is_promoted_with_a_warning(own_store, monkeypatch, capsys, caplog):
    (
        own_store.folder / "digits" / ".lock"
    ).mkdir()  # cannot be opened, as on a read-only disk, by root either
    where = ["--store", own_store.address]
    code, out, _ = call(monkeypatch, capsys, "promote", "digits", *where, "--force", "a test")
    assert (code, "version 1 to production" in out) == (0, True)
    assert "run digits is promoted without a lock; do not delete or change it meanwhile" in caplog.text


def test_a_run_whose_run_file_is_damaged_can_be_deleted(own_store, monkeypatch, capsys):
    own_store.write("digits/run.yaml", b"data: [")
    code, out, _ = call(monkeypatch, capsys, "delete", "digits", "--store", own_store.address, "--yes")
    assert (code, out.startswith("deleted digits: ")) == (0, True)
    assert own_store.list() == []


def test_a_folder_that_is_no_run_is_not_deleted_whatever_its_files_are_called(own_store, monkeypatch, capsys):
    for key in ("labeling.json", "report.html"):
        own_store.write(f"docs/{key}", b"not of a run")
    code, _, err = call(monkeypatch, capsys, "delete", "docs", "--store", own_store.address, "--yes")
    assert (code, "no run called docs" in one_line(err)) == (2, True)
    assert len(own_store.list("docs/")) == 2


def test_a_link_to_a_run_of_another_store_is_not_deleted(own_store, tmp_path, monkeypatch, capsys):
    """Its registry, in which it may be a version, and its traffic are there."""
    stored = own_store.list()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "link").symlink_to(Path(own_store.address) / "digits")
    code, _, err = call(monkeypatch, capsys, "delete", "link", "--store", tmp_path / "other", "--yes")
    assert code == 2
    assert f"is a link to {Path(own_store.address) / 'digits'}; delete that run in its own store" in one_line(
        err
    )
    assert own_store.list() == stored


def test_a_run_that_a_driver_writes_is_not_deleted(own_store, monkeypatch, capsys):
    with own_store.within("digits").lock():
        code, _, err = call(monkeypatch, capsys, "delete", "digits", "--store", own_store.address, "--yes")
    assert code == 4
    assert "is writing this run" in one_line(err)
    assert own_store.exists("digits/run.yaml")


def test_a_run_in_the_registry_is_not_deleted(own_store, monkeypatch, capsys):
    where = ["--store", own_store.address]
    assert call(monkeypatch, capsys, "promote", "digits", *where, "--force", "a test")[0] == 0
    code, _, err = call(monkeypatch, capsys, "delete", "digits", *where, "--yes")
    assert code == 2
    assert "version 1 in the registry was made from it" in one_line(err)
    assert own_store.exists("digits/run.yaml")


def test_a_run_in_the_registry_is_not_changed_but_its_copy_is(own_store, monkeypatch, capsys):
    where = ["--store", own_store.address]
    assert call(monkeypatch, capsys, "promote", "digits", *where, "--force", "a test")[0] == 0
    stored = {key: own_store.read(key) for key in own_store.list()}
    redo = ["0", "--reject", "--reason", "no digit", "--redo", *where]
    more = own_store.folder / "digits" / "run.yaml", "--name", "digits", *where, "--on", "local"
    for words in (
        ["review", "set", "digits", *redo],
        ["review", "reopen", "digits", "--discard", *where],
        ["run", *more, "--set", "correct.lambdas=[0.001, 1.0, 10.0, 20.0]"],
    ):
        code, _, err = call(monkeypatch, capsys, *words)
        assert (code, "version 1 in the registry was made from it" in one_line(err)) == (2, True), err
        assert "copy its folder in the store, and change the copy" in err
    assert {key: own_store.read(key) for key in own_store.list()} == stored
    shutil.copytree(own_store.folder / "digits", own_store.folder / "copy")
    assert call(monkeypatch, capsys, "review", "set", "copy", *redo)[0] == 0


@pytest.mark.parametrize("damage", ["cut off", "missing"])
def test_no_lambda_is_added_to_a_run_in_the_registry_whose_components_cannot_be_read(
    damage, own_store, monkeypatch, capsys
):
    where = ["--store", own_store.address]
    assert call(monkeypatch, capsys, "promote", "digits", *where, "--force", "a test")[0] == 0
    if damage == "missing":
        own_store.delete("digits/gallery.safetensors")
    else:
        own_store.write("digits/gallery.safetensors", b"cut")
    more = own_store.folder / "digits" / "run.yaml", "--name", "digits", *where, "--on", "local"
    code, _, err = call(
        monkeypatch, capsys, "run", *more, "--set", "correct.lambdas=[0.001, 1.0, 10.0, 20.0]"
    )
    assert (code, "version 1 in the registry was made from it" in one_line(err)) == (2, True), err


def test_a_lambda_is_added_to_a_stopped_run_that_has_the_name_of_a_removed_one_in_the_registry(
    own_store, monkeypatch, capsys
):
    where = ["--store", own_store.address]
    assert call(monkeypatch, capsys, "promote", "digits", *where, "--force", "a test")[0] == 0
    for key in set(own_store.within("digits").list()) - {"run.yaml", RECORDED_FIELDS, "models.safetensors"}:
        own_store.delete(f"digits/{key}")
    spec = opened(own_store).spec
    more = spec.with_fields("correct", lambdas=(*spec.correct.lambdas, 20.0))
    assert Run.start(own_store, "digits", more, check=expect_may_go_on).with_added == more


def test_a_vote_of_a_run_that_is_promoted_while_all_answers_are_read_is_not_reopened(
    own_store, monkeypatch, capsys
):
    where = ["--store", own_store.address]
    give_run_file(own_store, opened(own_store).spec.with_fields("review", annotators="label-studio"))

    def promote_first(*_: object) -> None:
        assert call(monkeypatch, capsys, "promote", "digits", *where, "--force", "a test")[0] == 0

    monkeypatch.setattr(import_module("services.cli.review"), "_expect_no_answer_lost", promote_first)
    code, _, err = call(monkeypatch, capsys, "review", "reopen", "digits", *where)
    assert (code, "version 1 in the registry was made from it" in one_line(err)) == (2, True)
    assert own_store.exists("digits/votes.safetensors")


def test_a_run_in_the_registry_is_not_deleted_by_another_case_of_its_name(own_store, monkeypatch, capsys):
    """On macOS, and below /mnt/c in WSL, both names are one folder."""
    where = ["--store", own_store.address]
    assert call(monkeypatch, capsys, "promote", "digits", *where, "--force", "a test")[0] == 0
    (own_store.folder / "digits").rename(own_store.folder / "Digits")
    code, _, err = call(monkeypatch, capsys, "delete", "Digits", *where, "--yes")
    assert (code, "version 1 in the registry was made from it" in one_line(err)) == (2, True)
    assert own_store.exists("Digits/run.yaml")


def test_a_run_that_was_renamed_after_its_promotion_is_not_deleted(own_store, monkeypatch, capsys):
    where = ["--store", own_store.address]
    assert call(monkeypatch, capsys, "promote", "digits", *where, "--force", "a test")[0] == 0
    (own_store.folder / "digits").rename(own_store.folder / "january")
    code, _, err = call(monkeypatch, capsys, "delete", "january", *where, "--yes")
    assert (code, "version 1 in the registry was made from it" in one_line(err)) == (2, True)
    shutil.copytree(own_store.folder / "january", own_store.folder / "digits")
    assert call(monkeypatch, capsys, "delete", "january", *where, "--yes")[0] == 0  # a copy


def test_a_run_that_only_has_the_name_of_one_in_the_registry_can_be_deleted(own_store, monkeypatch, capsys):
    where = ["--store", own_store.address]
    assert call(monkeypatch, capsys, "promote", "digits", *where, "--force", "a test")[0] == 0
    gallery = opened(own_store).require(Gallery)
    other = dataclasses.replace(gallery, codes=gallery.codes + 1)
    own_store.write("digits/gallery.safetensors", encode(other)[:-1])
    assert call(monkeypatch, capsys, "delete", "digits", *where, "--yes")[0] == 2  # it may be that run
    own_store.write("digits/gallery.safetensors", encode(other))
    assert call(monkeypatch, capsys, "delete", "digits", *where, "--yes")[0] == 0
    assert list(Registry(own_store).state().versions) == [1]


def other_weights(store: FolderStore, spec: RunFile, folder: Path) -> RunFile:
    weights = folder / "w.safetensors"
    weights.write_bytes(b"before")
    store.write(f"digits/{WEIGHTS}", json.dumps({"classifier.weights": digest_of(weights)}).encode())
    weights.write_bytes(b"after")
    return spec.with_fields("classifier", weights=weights)


def other_images(store: FolderStore, spec: RunFile, folder: Path) -> RunFile:
    store.write(f"digits/{EVALUATION}", b"of a finished run")
    labels = np.arange(200) % 10
    np.savez(folder / "other.npz", train_images=np.zeros((200, 16, 16), np.uint8), train_labels=labels)
    return spec.with_fields("data", name="npz", root=folder / "other.npz", train_images=None)


def other_code(store: FolderStore, spec: RunFile, folder: Path) -> RunFile:
    gallery = opened(store).require(Gallery)
    answered = dataclasses.replace(gallery, predicted=(gallery.predicted + 1) % 10)
    store.write("digits/gallery.safetensors", encode(answered))
    return spec.with_fields(
        "classifier", architecture="custom", import_path="tests.services.suite_runs:the_tiny_cnn"
    )


def code_of_another_network(store: FolderStore, spec: RunFile, folder: Path) -> RunFile:
    return spec.with_fields("classifier", architecture="custom", import_path="tests.own_classifiers:Net")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (other_weights, "classifier.weights: the weights file has changed since the run began"),
        (other_images, "the images differ from those that the run was trained on"),
        (other_code, "stored images otherwise than when"),
        (code_of_another_network, "are they of another architecture?"),
    ],
)
def test_a_correction_that_could_not_be_made_again_is_not_deleted(
    change, line, own_store, tmp_path_factory, monkeypatch, capsys
):
    spec = opened(own_store).spec.with_fields("review", annotators="label-studio")
    give_run_file(own_store, change(own_store, spec, tmp_path_factory.mktemp("weights")))
    where, stored = ["--store", own_store.address], {key: own_store.read(key) for key in own_store.list()}
    for words in (
        ["set", "digits", "0", "--reject", "--reason", "no digit", "--redo"],
        ["reopen", "digits", "--discard"],
    ):
        code, _, err = call(monkeypatch, capsys, "review", *words, *where)
        assert (code, line in one_line(err)) == (2, True), err
    assert {key: own_store.read(key) for key in own_store.list()} == stored


def test_a_correction_is_made_again_from_another_machine_that_has_not_its_images_weights_and_code(
    own_store, monkeypatch, capsys
):
    spec = opened(own_store).spec.with_fields("data", name="npz", root=own_store.folder / "elsewhere.npz")
    network = {"architecture": "custom", "import_path": "elsewhere.nets:build", "weights": "elsewhere.pt"}
    give_run_file(own_store, spec.with_fields("classifier", **network))
    own_store.write(f"digits/{EVALUATION}", b"of a finished run")
    own_store.write(f"digits/{WEIGHTS}", json.dumps({"classifier.weights": "another"}).encode())
    redo = ["0", "--reject", "--reason", "no digit", "--redo", "--store", own_store.address]
    assert call(monkeypatch, capsys, "review", "set", "digits", *redo)[0] == 0
    assert not own_store.exists("digits/verdicts.safetensors")
