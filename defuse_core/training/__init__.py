"""Training, and what every one shares: minibatches, Adam, optimisation steps, and checkpoints to resume from."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from inspect import unwrap
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from defuse_core.artifacts import I64, Checkpoint, ClassifierEpoch, VaeEpoch, Weights
from defuse_core.codec import decode, encode
from defuse_core.config import CorrectSection, VaeSection
from defuse_core.errors import ANOTHER_NAME, ModelError, RunMismatchError, StoreError
from defuse_core.formatting import percent
from defuse_core.models import set_weights, weights_of
from defuse_core.store import SHARED_STORE, Store
from defuse_core.training.batches import is_first_worker, mean_over_workers, require_same_on_all_workers

log = logging.getLogger("defuse")
CHECKPOINT_EVERY_S = 20.0  # a killed training repeats at most this much work and one epoch
CHECK_LOSS_EVERY = 100  # steps after which a training that diverged is noticed at the latest


def minibatches(count: int, batch_size: int, rng: np.random.Generator) -> Iterator[I64]:
    """Yield one epoch of row indices in a fresh order, up to `batch_size` at a time.

    Without a last batch of one, since batch normalisation needs two.
    """
    order = rng.permutation(count)
    for start in range(0, count, batch_size):
        rows = order[start : start + batch_size]
        if len(rows) > 1 or count == 1:
            yield rows


def cycle(count: int, size: int, rng: np.random.Generator) -> Iterator[I64]:
    """Yield `size` of `count` rows, (size,), without end, with a fresh shuffle for each pass."""
    rows: I64 = np.zeros(0, np.int64)
    while True:
        while len(rows) < size:
            rows = np.concatenate([rows, rng.permutation(count)])
        yield rows[:size]
        rows = rows[size:]


class Losses:
    """The losses of one epoch. They stay on the device, since a step that reads its loss waits for the device."""

    def __init__(self, what: str) -> None:
        self.what = what  # "the classifier", for messages
        self._rows: list[Tensor] = []
        self._checked = 0

    def add(self, *terms: Tensor) -> None:
        """Add a step's loss, and terms of it that are to be averaged, too. Raises as `mean` does, some steps late."""
        self._rows.append(torch.stack([term.detach().float() for term in terms]))
        if len(self._rows) - self._checked >= CHECK_LOSS_EVERY:
            self._check()

    def mean(self) -> tuple[float, list[float]]:
        """Return the mean loss, and the mean of each term. Raises ModelError where a loss is not finite."""
        self._check()
        table = mean_over_workers(torch.stack(self._rows)).cpu().double().numpy()
        loss, terms = (np.ascontiguousarray(part) for part in (table[:, 0], table[:, 1:]))
        return float(loss.mean()), terms.mean(axis=0).tolist()

    def _check(self) -> None:
        unchecked, self._checked = self._rows[self._checked :], len(self._rows)
        losses = mean_over_workers(torch.stack(unchecked)[:, 0]) if unchecked else torch.zeros(0)
        values = losses.cpu().numpy()  # of all workers, so that all of them end
        wrong = values[~np.isfinite(values)]
        if len(wrong):
            raise ModelError(
                f"training {self.what} diverged: its loss became {wrong[0]}; "
                "lower the learning rate or check the images"
            )


class Adam(torch.optim.Adam):
    """torch's Adam (Kingma and Ba, 2015), fused, with the methods below its decorators.

    These import torch._dynamo, a second in the process of each trial.
    """

    add_param_group = unwrap(torch.optim.Adam.add_param_group)
    zero_grad = unwrap(torch.optim.Adam.zero_grad)
    step = torch.no_grad()(unwrap(torch.optim.Adam.step))

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        # torch refuses an empty list; a β-VAE that is not trained may have no parameters
        super().__init__(list(parameters) or [torch.zeros(0)], lr=lr, fused=True)


def train_step(loss: Tensor, optimizer: Optimizer) -> None:
    """Take one optimisation step on `loss`, a scalar."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def set_learning_rate(
    optimizer: Optimizer, section: VaeSection | CorrectSection, step: int, steps: int
) -> None:
    """Set the learning rate of step 1 to `steps`. It depends on nothing else, so a resumed training needs no state."""
    if section.schedule == "constant":
        return
    rising = max(1, steps // 10)
    falling = max(0, step - rising) / max(1, steps - rising)  # share of the steps after the rise
    share = min(1.0, step / rising) * 0.5 * (1 + math.cos(math.pi * falling))
    for group in optimizer.param_groups:
        group["lr"] = section.learning_rate * share


def optimizer_state(optimizer: Optimizer) -> Weights:
    """Return the optimiser's state as arrays named `parameter/moment`."""
    states = enumerate(optimizer.state[parameter] for parameter in optimizer.param_groups[0]["params"])
    return {
        f"{index}/{name}": moment.cpu().numpy().copy()
        for index, state in states
        for name, moment in state.items()
    }


def load_optimizer_state(optimizer: Optimizer, moments: Weights) -> None:
    """Load what optimizer_state returned, in the memory layout and on the device that fused kernels rely on."""
    group = optimizer.param_groups[0]
    for key, array in moments.items():
        index, name = key.split("/")
        parameter, moment = group["params"][int(index)], torch.tensor(array)
        if moment.shape == parameter.shape:
            moment = torch.empty_like(parameter).copy_(moment)
        elif group.get("fused"):  # Adam's count of steps, which without `fused` stays on the CPU
            moment = moment.to(parameter.device)
        optimizer.state[parameter][name] = moment


def format_row(row: ClassifierEpoch | VaeEpoch) -> str:
    """Return an epoch's figures for the log."""
    figures = {
        name: value
        for name, value in asdict(row).items()
        if name not in ("epoch", "guesses") and value is not None
    }
    return ", ".join(
        f"{name} {percent(value) if name == 'validation' else f'{value:.4g}'}"
        for name, value in figures.items()
    )


class Training:
    """One training with checkpoints in `store`; an interrupted one resumes to the same weights, to the bit."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        store: Store,
        name: str,
        data_fingerprint: str,
    ) -> None:
        """Resume from the checkpoint if one exists. Raises RunMismatchError if it was trained on other images,
        ComputeError where several workers train and do not find the same checkpoint.
        """
        self.module, self.optimizer, self.store = module, optimizer, store
        self.data_fingerprint = data_fingerprint
        self.key = f"training/{name}.safetensors"
        self.history: list[Any] = []  # ClassifierEpoch or VaeEpoch, one per finished epoch
        self.best: Weights = {}
        self.saved_at = time.monotonic()
        if store.exists(self.key):
            self._resume(store.read(self.key))
        require_same_on_all_workers(
            len(self.history), f"the epochs of their checkpoint {self.key} ({SHARED_STORE})"
        )

    def _resume(self, data: bytes) -> None:
        try:
            checkpoint = decode(
                Checkpoint, data, f"{self.store.address}/{self.key}", "the training begins again"
            )
        except StoreError as error:
            log.warning("train: %s", error)
            return
        if checkpoint.data_fingerprint != self.data_fingerprint:
            raise RunMismatchError(
                "the images changed since this run began to train on them; put them back, or choose "
                f"{ANOTHER_NAME}"
            )
        self.history, self.best = list(checkpoint.history), checkpoint.best
        set_weights(self.module, checkpoint.weights, self.key)
        load_optimizer_state(self.optimizer, checkpoint.moments)

    def epochs(self, count: int) -> Iterator[int]:
        """Yield the remaining epochs; save a checkpoint every CHECKPOINT_EVERY_S seconds and after the last epoch."""
        for epoch in range(len(self.history), count):
            yield epoch
            if epoch + 1 == count or time.monotonic() - self.saved_at > CHECKPOINT_EVERY_S:
                self._save_checkpoint()

    def _save_checkpoint(self) -> None:
        self.saved_at = time.monotonic()
        if is_first_worker():
            weights, moments = weights_of(self.module), optimizer_state(self.optimizer)
            checkpoint = Checkpoint(weights, moments, tuple(self.history), self.best, self.data_fingerprint)
            self.store.write(self.key, encode(checkpoint), unless=self._is_ahead)

    def _is_ahead(self, data: bytes) -> bool:
        """Whether `data` is a later checkpoint: of a retry of this task, which was given up for lost."""
        try:
            stored = decode(Checkpoint, data, self.key)
        except StoreError:
            return False
        return stored.data_fingerprint == self.data_fingerprint and len(stored.history) > len(self.history)
