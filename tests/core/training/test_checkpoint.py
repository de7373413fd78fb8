"""The checkpoint of a training: damaged ones begin again, and none replaces a later one."""

import pytest
import torch
from torch import nn

from defuse_core.artifacts import Checkpoint, ClassifierEpoch
from defuse_core.codec import decode
from defuse_core.errors import RunBusyError
from defuse_core.store import FolderStore
from defuse_core.training import checkpoint
from defuse_core.training.checkpoint import Training

KEY = "training/net.safetensors"


@pytest.fixture
def store(tmp_path, monkeypatch) -> FolderStore:
    monkeypatch.setattr(checkpoint, "CHECKPOINT_EVERY_S", -1.0)  # after each epoch
    return FolderStore(tmp_path)


def training(store) -> Training:
    module = nn.Linear(2, 2)
    return Training(module, torch.optim.Adam(module.parameters()), store, "net", "these images")


def train(started: Training, epochs: int) -> None:
    for epoch in started.epochs(epochs):
        started.optimizer.zero_grad()
        started.module(torch.ones(1, 2)).sum().backward()
        started.optimizer.step()
        started.history.append(ClassifierEpoch(epoch + 1, 0.5))


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
