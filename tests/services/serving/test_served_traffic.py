"""The sample of served inputs that probably fail or are inside a failure scenario."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest

from defuse_core.artifacts import F32, NO_SCENARIO, Gallery
from defuse_core.codec import encode
from defuse_core.errors import DamagedError, InputError, StoreError
from defuse_core.export.finished import components_digest
from defuse_core.files import UNFINISHED
from defuse_core.store import FolderStore
from services.serving.traffic import (
    Reservoir,
    SampledInput,
    delete_traffic,
    new_inputs,
    read_traffic,
    traffic_gallery,
)


@pytest.fixture(autouse=True)
def registry(tmp_path):
    """What a server reads its model from, beside the traffic."""
    (tmp_path / "registry").mkdir()


def drawn_images(level: float) -> Gallery:
    """What a run with components of its own has drawn from them."""
    images = np.full((1, 3, 1, 2, 2), level, np.float32)
    return Gallery(images, np.zeros((1, 3, 0), np.float32), np.zeros((1, 3), np.int64), ("zero", "one"))


DRAWN = drawn_images(0.5)


def sampled_input(
    image: F32, scenario: int, predicted: int, failure: float | None = None, run: Gallery = DRAWN
) -> SampledInput:
    """An input that the run of DRAWN, or one that has drawn other images, received now."""
    digest = components_digest(run)
    return SampledInput(image, scenario, predicted, "1", time.time(), run.classes, digest, failure)


FOLDER = components_digest(DRAWN)[:16]  # folder of the inputs that its run received


def test_the_reservoir_stays_bounded_and_samples_evenly(tmp_path):
    store = FolderStore(tmp_path)
    reservoir = Reservoir(store, 5)
    for number in range(200):
        image = np.full((1, 2, 2), number / 200, np.float32)
        reservoir.offer("mnist", sampled_input(image, 3, number % 10))
        while reservoir._pending:
            time.sleep(0.001)
    traffic = read_traffic(store, "mnist", DRAWN)
    levels = [sampled.image.mean() for sampled in traffic]
    assert len(traffic) == 5 and {sampled.scenario for sampled in traffic} == {3}
    assert max(levels) > 0.1  # not just the first five
    assert (np.diff(levels) > 0).all()  # oldest first


def test_a_smaller_reservoir_deletes_what_a_larger_one_stored_above_it(tmp_path):
    store = FolderStore(tmp_path)
    for capacity, scenarios in ((20, (3, NO_SCENARIO)), (4, (3,))):
        reservoir = Reservoir(store, capacity)
        for number in range(30):
            image = np.full((1, 2, 2), number / 30, np.float32)
            for scenario in scenarios:
                reservoir.offer("mnist", sampled_input(image, scenario, 0))
        reservoir._thread.shutdown()
    assert store.within(f"traffic/mnist/{FOLDER}/003").list() == [
        f"{slot:04d}.safetensors" for slot in range(4)
    ]
    assert len(store.within(f"traffic/mnist/{FOLDER}/none").list()) == 20  # nothing was offered to it since


class RecordingExecutor:
    """An executor that records the writes in place of making them."""

    def __init__(self, slots):
        self.slots = slots

    def submit(self, _, folder, drawn, seen):
        self.slots[folder, drawn[1]] = seen.predicted


def test_every_input_has_the_same_chance_to_be_stored(tmp_path):
    reservoir = Reservoir(FolderStore(tmp_path), 4)
    kept = np.zeros(40)
    for _ in range(400):
        slots: dict[tuple[str, int], int] = {}
        reservoir._kept.clear()
        reservoir._thread = RecordingExecutor(slots)
        for number in range(40):
            reservoir._pending = 0
            reservoir.offer("r", sampled_input(np.zeros((1, 1, 1), np.float32), 0, number))
        kept[list(slots.values())] += 1
    assert kept.sum() == 1600 and kept.min() > 15 and kept.max() < 75


def test_the_likelier_an_input_fails_the_likelier_it_is_stored(tmp_path):
    reservoir = Reservoir(FolderStore(tmp_path), 10)
    kept = np.zeros(2)
    for _ in range(100):
        slots: dict[tuple[str, int], int] = {}
        reservoir._kept.clear()
        reservoir._thread = RecordingExecutor(slots)
        for number in range(100):
            reservoir._pending = 0
            likely = number % 10 == 0
            image = np.zeros((1, 1, 1), np.float32)
            reservoir.offer("r", sampled_input(image, 0, int(likely), 0.8 if likely else 0.02))
        kept += np.bincount(list(slots.values()), minlength=2)
    assert kept.sum() == 1000 and kept[1] > 0.6 * kept.sum() and kept[0] > 50


def test_flagged_inputs_outside_all_scenarios_are_a_group_of_their_own(tmp_path):
    reservoir = Reservoir(FolderStore(tmp_path), 10)
    for number in range(3):
        image = np.full((1, 2, 2), number / 10, np.float32)
        reservoir.offer("mnist", sampled_input(image, NO_SCENARIO, number, 0.25 * (1 + number)))
        reservoir.offer("mnist", sampled_input(1 - image, 2, number))
    reservoir._thread.shutdown()
    gallery = traffic_gallery(
        new_inputs(read_traffic(FolderStore(tmp_path), "mnist", DRAWN), ()), DRAWN.classes
    )
    assert gallery.numbers == (NO_SCENARIO, 2) and gallery.classes == DRAWN.classes
    np.testing.assert_allclose(gallery.failure, [[0.25, 0.5, 0.75], [np.nan] * 3])


def test_inputs_that_were_shown_and_duplicates_are_left_out(tmp_path):
    store = FolderStore(tmp_path)
    for slot, level in enumerate((0.1, 0.2, 0.1, 0.3, 0.3)):
        image = np.full((1, 2, 2), level, np.float32)
        sampled = replace(sampled_input(image, slot, slot + 1, slot / 10), when=100.0 + slot)
        store.write(f"traffic/mnist/{slot:03d}/0000.safetensors", encode(sampled))
    traffic = read_traffic(store, "mnist", DRAWN)
    assert [sampled.predicted for sampled in traffic] == [1, 2, 3, 4, 5]
    left = new_inputs(traffic, {np.full((1, 2, 2), 0.2, np.float32).tobytes()})
    gallery = traffic_gallery(left, DRAWN.classes)
    assert gallery.images[:, 0, 0, 0, 0].tolist() == pytest.approx([0.1, 0.3])
    assert (gallery.numbers, gallery.predicted.tolist()) == ((0, 3), [[1], [4]])
    assert (gallery.failure.tolist(), gallery.classes) == ([[0], [0.3]], DRAWN.classes)


def test_an_input_that_is_replaced_while_the_sample_is_read_is_left_out(tmp_path, monkeypatch):
    store = FolderStore(tmp_path)
    keep(store, 0)
    listed = FolderStore.list
    monkeypatch.setattr(
        FolderStore, "list", lambda store, *prefix: [*listed(store, *prefix), "003/0009.safetensors"]
    )
    assert len(read_traffic(store, "mnist", DRAWN)) == 1


def test_inputs_above_the_number_of_writes_that_may_wait_are_dropped(tmp_path):
    reservoir, slots = Reservoir(FolderStore(tmp_path), 100), dict[tuple[str, int], int]()
    reservoir._thread = RecordingExecutor(slots)  # which is never done
    for number in range(70):
        reservoir.offer("r", sampled_input(np.zeros((1, 1, 1), np.float32), 0, number))
    assert sorted(slots.values()) == list(range(64))


def test_runs_have_samples_of_their_own_and_an_input_that_cannot_fail_is_stored_too(tmp_path):
    reservoir = Reservoir(FolderStore(tmp_path), 1)
    for run in ("a", "b"):
        reservoir.offer(run, sampled_input(np.zeros((1, 2, 2), np.float32), 3, 0, 0.0))
    reservoir._thread.shutdown()
    assert [len(read_traffic(FolderStore(tmp_path), run, DRAWN)) for run in ("a", "b")] == [1, 1]


def test_a_store_that_fails_is_a_warning_and_other_files_in_a_sample_stay(tmp_path, caplog):
    store = FolderStore(tmp_path)
    store.write(f"traffic/a/{FOLDER}/003/notes.safetensors", b"")
    (tmp_path / "traffic" / "b").write_text("")  # no folder can be made there
    reservoir = Reservoir(store, 1)
    for run in ("b", "a"):
        reservoir.offer(run, sampled_input(np.zeros((1, 2, 2), np.float32), 3, 0))
    reservoir._thread.shutdown()
    assert "an input was not stored: " in caplog.text and reservoir._pending == 0
    assert store.within(f"traffic/a/{FOLDER}/003").list() == ["0000.safetensors", "notes.safetensors"]


def test_what_a_killed_server_was_writing_into_a_sample_is_removed(tmp_path):
    store = FolderStore(tmp_path)
    store.write(f"traffic/a/{FOLDER}/003/.0000.safetensors.1{UNFINISHED}", b"half")
    (left,) = (path for path in tmp_path.rglob(".*") if path.is_file())
    os.utime(left, (0, 0))
    reservoir = Reservoir(store, 1)
    reservoir.offer("a", sampled_input(np.zeros((1, 2, 2), np.float32), 3, 0))
    reservoir._thread.shutdown()
    assert [path.name for path in left.parent.iterdir()] == ["0000.safetensors"]


def offer_in_turn(reservoir: Reservoir, count: int, failure: float | None = None) -> None:
    for number in range(count):
        image = np.full((1, 2, 2), number / count, np.float32)
        reservoir.offer("a", sampled_input(image, 3, number % 10, failure))
        while reservoir._pending:
            time.sleep(0.001)


def test_a_slot_whose_write_failed_takes_the_next_input_and_the_others_stay(tmp_path, monkeypatch, caplog):
    store = FolderStore(tmp_path)
    reservoir, write = Reservoir(store, 5), FolderStore.write

    def fail(*_):
        raise StoreError("read-only")

    offer_in_turn(reservoir, 1000, 0.9)
    monkeypatch.setattr(FolderStore, "write", fail)
    while reservoir._kept[f"a/{FOLDER}/003"][0][0] > -np.inf:  # until an input is drawn
        offer_in_turn(reservoir, 1, 0.9)
    offer_in_turn(reservoir, 10, 0.9)
    assert caplog.text.count("an input was not stored") == 1
    monkeypatch.setattr(FolderStore, "write", write)
    offer_in_turn(reservoir, 20, 0.001)
    assert [sampled.failure for sampled in read_traffic(store, "a", DRAWN)] == [0.9] * 4 + [0.001]
    monkeypatch.setattr(FolderStore, "write", fail)
    while reservoir._kept[f"a/{FOLDER}/003"][0][0] > -np.inf:
        offer_in_turn(reservoir, 1, 0.9)
    assert caplog.text.count("an input was not stored") == 2  # once for each time that the store fails


def test_a_sample_whose_first_writes_failed_is_filled(tmp_path, monkeypatch):
    store = FolderStore(tmp_path)
    reservoir = Reservoir(store, 5)
    with monkeypatch.context() as patched:
        patched.setattr(reservoir, "store", FolderStore(tmp_path / "moved" / "traffic"))
        offer_in_turn(reservoir, 200)
    offer_in_turn(reservoir, 5)
    assert len(read_traffic(store, "a", DRAWN)) == 5


@pytest.mark.parametrize("left", [None, "", "traffic"])
def test_a_store_that_was_moved_or_unmounted_is_not_made_again(left, tmp_path, caplog):
    root = tmp_path / "store"
    if left is not None:  # a mount point, with what an earlier server may have left there
        (root / left).mkdir(parents=True)
    reservoir = Reservoir(FolderStore(root), 5)
    reservoir.offer("a", sampled_input(np.zeros((1, 2, 2), np.float32), 3, 0))
    reservoir._thread.shutdown()
    said = "No such file or directory; was the store moved?" if left is None else "no store is there any more"
    assert f"an input was not stored: {root}: {said}" in caplog.text
    assert list(root.rglob("*.safetensors")) == [] and root.exists() == (left is not None)


def test_a_folder_is_searched_for_slots_above_the_capacity_once(tmp_path, monkeypatch):
    listed: list[str] = []
    monkeypatch.setattr(FolderStore, "list", lambda store, *prefix: listed.append(store.address) or [])
    reservoir = Reservoir(FolderStore(tmp_path), 5)
    for _ in range(3):
        reservoir.offer("a", sampled_input(np.zeros((1, 2, 2), np.float32), 3, 0))
    reservoir._thread.shutdown()
    assert len(listed) == 1


def test_without_traffic_the_error_says_how_to_store_some(tmp_path):
    with pytest.raises(InputError, match=r"serve\.reservoir"):
        read_traffic(FolderStore(tmp_path), "mnist", DRAWN)


def test_a_sample_that_cannot_be_read_is_an_error_that_says_what_to_delete(tmp_path):
    store = FolderStore(tmp_path)
    store.write("traffic/mnist/003/0001.safetensors", encode(ForeignInput(3)))
    with pytest.raises(
        DamagedError, match=r"found ForeignInput; delete .*traffic/mnist and restart the server to start"
    ):
        read_traffic(store, "mnist", DRAWN)


def test_a_sample_whose_store_does_not_answer_is_kept(tmp_path, monkeypatch):
    store = FolderStore(tmp_path)
    keep(store, 1)

    def silent(*_):
        raise StoreError("no answer; run again to continue")

    monkeypatch.setattr(FolderStore, "read", silent)
    with pytest.raises(StoreError, match="^no answer; run again to continue$"):
        read_traffic(store, "mnist", DRAWN)


def keep(store: FolderStore, slot: int) -> None:
    sampled = sampled_input(np.zeros((1, 2, 2), np.float32), 3, 0)
    store.write(f"traffic/mnist/003/{slot:04d}.safetensors", encode(sampled))


def test_runs_of_one_name_share_no_slots_and_do_not_read_each_others_inputs(tmp_path, caplog):
    """As where a server goes on sampling for a run that was deleted while another one got its name."""
    store, first, second = FolderStore(tmp_path), drawn_images(0.1), drawn_images(0.2)
    reservoir = Reservoir(store, 2)
    for run, count in ((first, 2), (second, 1)):
        for number in range(count):
            image = np.full((1, 2, 2), number, np.float32)
            reservoir.offer("mnist", sampled_input(image, 3, number, run=run))
    reservoir._thread.shutdown()
    assert [len(read_traffic(store, "mnist", run)) for run in (first, second)] == [2, 1]
    assert "traffic/mnist: left out 1 of 3 inputs, which another run of this name received" in caplog.text
    with pytest.raises(InputError, match=r"traffic/mnist: all 3 inputs were received by another run of this"):
        read_traffic(store, "mnist", drawn_images(0.3))
    assert delete_traffic(store, "mnist") == 3


def test_the_inputs_of_a_run_can_be_deleted_and_those_of_others_stay(tmp_path):
    store = FolderStore(tmp_path)
    keep(store, 0)
    keep(store, 1)
    other = "traffic/mnist-2/003/0000.safetensors"
    store.write(other, store.read("traffic/mnist/003/0000.safetensors"))
    assert delete_traffic(store, "mnist") == 2
    assert store.list() == [other]
    assert delete_traffic(store, "mnist") == 0
    assert delete_traffic(store, "mnist-2") == 1 and store.list() == []


@dataclass
class ForeignInput:
    """An artefact of another kind."""

    scenario: int
