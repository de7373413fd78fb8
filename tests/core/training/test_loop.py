"""Adam is torch's to the bit; damaged checkpoints begin again, and none replaces a later one."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F

from defuse_core.artifacts import Checkpoint, ClassifierEpoch
from defuse_core.codec import decode
from defuse_core.errors import ComputeError, ModelError, RunBusyError
from defuse_core.store import FolderStore
from defuse_core.train import _is_better, _with_validation
from defuse_core.training import (
    Adam,
    Losses,
    Training,
    format_row,
    load_optimizer_state,
    minibatches,
    optimizer_state,
    train_step,
)
from defuse_core.training.batches import averaged, group_size, training_together

KEY = "training/net.safetensors"


@pytest.fixture
def store(tmp_path, monkeypatch) -> FolderStore:
    monkeypatch.setattr("defuse_core.training.CHECKPOINT_EVERY_S", -1.0)  # after each epoch
    return FolderStore(tmp_path)


def training(store, name: str = "net") -> Training:
    module = nn.Linear(2, 2)
    return Training(module, torch.optim.Adam(module.parameters()), store, name, "these images")


def train(started: Training, epochs: int) -> None:
    for epoch in started.epochs(epochs):
        started.optimizer.zero_grad()
        started.module(torch.ones(1, 2)).sum().backward()
        started.optimizer.step()
        started.history.append(ClassifierEpoch(epoch + 1, 0.5))


def train_in_group(rank: int, folder: Path, meeting: Path) -> None:
    """Be one of two workers that train together, each of which sees a store of its own."""
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    assert group_size() == 1  # a group of the user's program
    with training_together():
        train_in_two_parts(rank, FolderStore(folder / str(rank)))
    distributed.destroy_process_group()


def train_in_two_parts(rank: int, store: FolderStore) -> None:
    assert group_size() == 2
    with pytest.raises(ComputeError, match=r"one has 0, another 3"):
        training(store)
    train(training(store, "other"), 1)
    losses = Losses("net")
    losses.add(torch.tensor(1.0 + rank))
    assert losses.mean() == (1.5, [])
    losses.add(torch.tensor(torch.inf if rank else 1.0))
    with pytest.raises(ModelError, match="training net diverged"):
        losses.mean()


def test_workers_train_together_from_one_checkpoint_which_the_first_writes_and_diverge_together(tmp_path):
    stores = tmp_path / "stores"
    train(training(FolderStore(stores / "0")), 3)
    torch.multiprocessing.start_processes(
        train_in_group, (stores, tmp_path / "meeting"), nprocs=2, start_method="forkserver"
    )
    assert FolderStore(stores).list() == [f"0/{KEY}", "0/training/other.safetensors"]


def train_averaged(store: FolderStore, epochs: int) -> Training:
    """Train up to so many epochs of three steps; go on from the checkpoint in `store`."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
    started = Training(net, Adam(net.parameters(), 1e-3), store, "net", "these images")
    loss_of = averaged(net, lambda images: net(images).square().mean())
    for epoch in started.epochs(epochs):
        for step in range(3):
            noise = torch.Generator().manual_seed(1000 * distributed.get_rank() + 10 * epoch + step)
            train_step(loss_of(torch.randn(8, 20, generator=noise)), started.optimizer)
        started.history.append(ClassifierEpoch(epoch + 1, 0.5))
    return started


def interrupt_in_group_of_three(rank: int, folder: Path, meeting: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=3)
    with training_together():
        whole = train_averaged(FolderStore(folder / "whole"), 2)
        train_averaged(FolderStore(folder / "resumed"), 1)
        distributed.barrier()  # the first worker has written the checkpoint
        resumed = train_averaged(FolderStore(folder / "resumed"), 2)
    for ours, other in zip(resumed.module.parameters(), whole.module.parameters(), strict=True):
        assert torch.equal(ours, other)
    distributed.destroy_process_group()


def test_a_training_of_three_workers_that_is_interrupted_ends_with_the_same_weights(tmp_path):
    torch.multiprocessing.start_processes(
        interrupt_in_group_of_three,
        (tmp_path / "stores", tmp_path / "meeting"),
        nprocs=3,
        start_method="forkserver",
    )
    store = FolderStore(tmp_path / "stores" / "resumed")
    assert epochs_stored(store) == 2


def epochs_stored(store: FolderStore) -> int:
    return len(decode(Checkpoint, store.read(KEY), KEY).history)


def test_a_training_that_was_given_up_for_lost_replaces_no_later_checkpoint(store):
    given_up = training(store)
    train(given_up, 1)
    train(training(store), 4)
    train(given_up, 2)
    assert epochs_stored(store) == 4


def test_a_training_whose_driver_lost_the_run_writes_no_checkpoint(store):
    with store.lock():
        orphan = training(store)
        orphan.store = FolderStore(store.folder)
        orphan.store.holders = dict(store.holders)  # as in a worker, to which the store was sent
    with store.lock(), pytest.raises(RunBusyError):
        train(orphan, 1)
    assert store.list() == []


def test_a_damaged_checkpoint_is_logged_and_the_training_begins_again(store, caplog):
    train(training(store), 2)
    store.write(KEY, store.read(KEY)[:-7])
    again = training(store)
    assert again.history == []
    assert f"{store.address}/{KEY}: expected a Checkpoint artefact, found unreadable bytes" in caplog.text
    assert "the training begins again" in caplog.text
    train(again, 2)
    assert epochs_stored(store) == 2


def test_a_checkpoint_is_saved_some_seconds_after_the_last_one_and_after_the_last_epoch(
    tmp_path, monkeypatch
):
    now, store, kept = [0.0], FolderStore(tmp_path), []
    monkeypatch.setattr("defuse_core.training.time.monotonic", lambda: now[0])
    started = training(store)
    ends = iter((10.0, 21.0, 22.0, 41.0, 42.0, 43.0))
    for epoch in started.epochs(6):
        kept.append(epochs_stored(store) if store.exists(KEY) else 0)
        started.history.append(ClassifierEpoch(epoch + 1, 0.5))
        now[0] = next(ends)
    assert (*kept, epochs_stored(store)) == (0, 0, 2, 2, 2, 5, 6)


def test_a_training_goes_on_with_its_best_epoch(store):
    started = training(store)
    started.best = {"weight": np.ones(2, np.float32)}
    train(started, 1)
    np.testing.assert_array_equal(training(store).best["weight"], [1, 1])


def test_a_longer_training_on_other_images_and_a_damaged_checkpoint_are_replaced(store):
    started = training(store)
    other = training(store)
    other.data_fingerprint = "other images"
    train(other, 3)
    train(started, 1)
    assert epochs_stored(store) == 1
    store.write(KEY, store.read(KEY)[:-7])
    train(started, 2)
    assert epochs_stored(store) == 2


def test_the_log_has_the_figures_of_an_epoch_that_were_measured():
    assert format_row(ClassifierEpoch(3, 0.12345)) == "loss 0.1235"
    assert format_row(ClassifierEpoch(3, 0.5, 0.75)) == "loss 0.5, validation 75.0 %"


def test_a_single_image_is_a_minibatch():
    assert [rows.tolist() for rows in minibatches(1, 4, np.random.default_rng(0))] == [[0]]
    assert sorted(len(rows) for rows in minibatches(9, 4, np.random.default_rng(0))) == [4, 4]


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = nn.ModuleDict({"first": nn.Conv2d(1, 4, 3), "last": nn.Linear(4, 3), "unused": nn.Linear(2, 2)})
    net["first"].weight.data = net["first"].weight.data.to(memory_format=torch.channels_last)
    return net


def steps(net, optimizer, numbers):
    for number in numbers:
        rng = torch.Generator().manual_seed(number)
        images, labels = torch.randn(8, 1, 6, 6, generator=rng), torch.randint(3, (8,), generator=rng)
        optimizer.param_groups[0]["lr"] = 0.01 / (1 + number)
        train_step(F.cross_entropy(net["last"](net["first"](images).mean((2, 3))), labels), optimizer)
    return [parameter.detach() for parameter in net.parameters()]


def assert_equal(found, expected):
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_the_steps_of_adam_are_those_of_torch_to_the_bit(net):
    other = copy.deepcopy(net)
    found = steps(net, Adam(net.parameters(), 0.01), range(20))
    assert_equal(found, steps(other, torch.optim.Adam(other.parameters(), lr=0.01, fused=True), range(20)))


def test_the_state_of_adam_is_that_of_torch_and_continues_to_the_bit(net):
    other = copy.deepcopy(net)
    optimizer, oracle = (
        Adam(net.parameters(), 0.01),
        torch.optim.Adam(other.parameters(), lr=0.01, fused=True),
    )
    steps(net, optimizer, range(10))
    steps(other, oracle, range(10))
    state, expected = optimizer_state(optimizer), optimizer_state(oracle)
    assert state.keys() == expected.keys()
    assert all((state[name] == expected[name]).all() for name in state)
    resumed = Adam(net.parameters(), 0.01)
    load_optimizer_state(resumed, expected)
    assert_equal(steps(net, resumed, range(10, 20)), steps(other, oracle, range(10, 20)))


def test_without_parameters_there_is_nothing_to_train():
    optimizer = Adam([], 0.01)
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer_state(optimizer) == {}


@pytest.mark.parametrize(
    ("epochs", "best"),
    [
        ([(0.9, False), (0.95, False), (0.95, False)], 1),
        (
            [(0.98, True), (0.969, False), (0.96, False), (0.981, True)],
            1,
        ),  # it answers the largest class always
        ([(0.1, True), (0.2, True)], 1),
        ([(0.0, False)], 0),
        ([(None, False)], None),
    ],
)
def test_an_epoch_that_only_guesses_is_kept_before_no_other(epochs, best):
    rows = [ClassifierEpoch(n, 1.0, *epoch) for n, epoch in enumerate(epochs)]
    kept = [place for place, row in enumerate(rows) if _is_better(row, rows[:place])]
    assert (kept[-1] if kept else None) == best


def test_an_epoch_guesses_by_the_mean_over_the_classes():
    labels = np.repeat([0, 1], [1000, 20])
    for found, guesses in ((np.zeros(1020), True), (np.where(np.arange(1020) < 30, 1, labels), False)):
        row = _with_validation(ClassifierEpoch(1, 1.0), found == labels, labels, 3)
        assert (row.guesses, row.validation) == (guesses, (found == labels).mean())
    assert format_row(row) == "loss 1, validation 97.1 %"


def test_the_images_of_each_class_are_counted_where_the_shares_that_are_right_are_stored(tiny_models):
    for part, shares in tiny_models.class_accuracy.items():
        counts = tiny_models.class_images[part]
        assert counts.sum() == tiny_models.images[part]
        assert shares @ counts / counts.sum() == pytest.approx(tiny_models.accuracy[part])
