"""The trials of a sweep over λ: stored after each epoch, and computed one by one or in stacks.

A stack (correct.stack) is several λ fine-tuned as one training, with stacked weights (torch.func).
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.optim import Optimizer

from defuse_core.artifacts import F64, Models, Sweep, Trial, Weights
from defuse_core.codec import decode, encode
from defuse_core.config import CorrectSection, RunFile
from defuse_core.correct import (
    FineTuning,
    TuningSteps,
    after_epoch,
    changes_weights,
    collect_sweep,
    fine_tune,
    require_progress,
)
from defuse_core.device import autocast, cpu_threads, device, is_device_failure, is_out_of_memory
from defuse_core.errors import ANOTHER_NAME, DamagedError, DefuseError, InputError, ModelError, StoreError
from defuse_core.formatting import one_line
from defuse_core.models import set_weights, to_tensor, weights_of
from defuse_core.protocols import SweepRequest
from defuse_core.store import SHARED_STORE, Store
from defuse_core.training import Adam, load_optimizer_state, optimizer_state, train_step

log = logging.getLogger("defuse")
PROBED = 4  # images of which a stack has to give the same logits as its classifiers one by one
Group = dict[float, Trial]  # by λ, all after equally many epochs


def stacks_of(section: CorrectSection) -> list[tuple[float, ...]]:
    """Return the λ of each stack, which one trial of Tune fine-tunes. λ = 0 reads D alone, so it has one of its own."""
    positive = [lam for lam in section.lambdas if lam > 0]
    stacks = [tuple(positive[row : row + section.stack]) for row in range(0, len(positive), section.stack)]
    stacks += [(lam,) for lam in section.lambdas if lam == 0]
    return sorted(stacks, key=lambda lams: section.lambdas.index(lams[0]))


def names_of(lams: Sequence[float]) -> str:
    """Return the λ of a stack, for log lines and traces: 0.1, 1, 10."""
    return ", ".join(f"{lam:g}" for lam in lams)


def run_stack(
    tuning: FineTuning, lams: Sequence[float], store: Store
) -> Iterator[tuple[float, Trial | ModelError]]:
    """Yield λ and its trial after each of its epochs, once `store` holds it, or the error of a λ that diverged.

    λ with equally many stored epochs are trained together until one is done or diverges. One that diverges repeats that
    epoch alone, so that the others have no influence on it; the rest continues as a smaller stack. An error of the
    classifier's own code is raised after the trials of all other λ.
    """
    alone = lams if len(lams) == 1 else (yield from _run_stacked(tuning, lams, store))
    failure: Exception | None = None
    for lam in alone:
        try:
            for trial in run_trial(tuning, lam, store):
                yield lam, trial
        except ModelError as error:
            yield lam, error
        except Exception as error:
            if not is_trial_failure(error):
                raise
            failure = error
    if failure is not None:
        raise failure


def _run_stacked(
    tuning: FineTuning, lams: Sequence[float], store: Store
) -> Generator[tuple[float, Trial], None, list[float]]:
    """Train what can be trained together. Returns the λ that are left: for each that is not done, a trial alone."""
    groups: dict[int, Group] = {}
    alone = []
    for lam in lams:
        trial = read_trial(store, lam) or tuning.new_trial(lam)
        if trial.done:
            alone.append(lam)  # its trial alone is the stored one
        else:
            groups.setdefault(len(trial.rows), {})[lam] = trial
    if any(len(group) > 1 for group in groups.values()):
        why = _why_not_stacked(tuning)
        if why is not None:
            _log_not_stacked(tuning.spec.correct, lams, why)
            return list(lams)
    for epochs in sorted(groups):
        group = groups[epochs]
        while len(group) > 1:
            made: Group = {}
            for made in _fine_tune_stacked(tuning, group):
                for trial in made.values():
                    write_trial(store, trial)
                yield from made.items()
            alone += [lam for lam in group if lam not in made]
            group = {lam: trial for lam, trial in made.items() if not trial.done}
        alone += group
    return alone


def trial_key(lam: float) -> str:
    """Return the key of a trial in the store of its sweep."""
    return f"lam-{lam!r}.safetensors"


def run_trial(tuning: FineTuning, lam: float, store: Store) -> Iterator[Trial]:
    """Yield the trial of one λ after each epoch, once `store` holds it; continues the one that is stored there.

    Another process may work on the same trial, one that was given up for lost: fewer epochs never replace more.
    """
    stored = read_trial(store, lam)
    if stored is not None and stored.done:
        yield stored
        return
    for trial in fine_tune(tuning, lam, stored):
        write_trial(store, trial)
        yield trial


def write_trial(store: Store, trial: Trial) -> None:
    """Store the trial, unless the store holds as many epochs of its λ or more."""
    unless = partial(_has_epochs, trial.lam, len(trial.rows))
    store.write(trial_key(trial.lam), encode(trial), unless=unless)


def finished_trials(spec: RunFile, store: Store) -> dict[float, Trial]:
    """Return the trials in `store` that are done, by λ, without their weights."""
    found = (_finished(store, lam) for lam in spec.correct.lambdas)
    return {trial.lam: trial for trial in found if trial is not None}


def _finished(store: Store, lam: float) -> Trial | None:
    trial = read_trial(store, lam)  # no other one is in memory meanwhile
    return without_weights(trial) if trial is not None and trial.done else None


def without_weights(trial: Trial) -> Trial:
    """Return what a finished trial is compared with others by; its weights stay in the store."""
    return replace(trial, best={})


def stored_trial(store: Store, lam: float) -> Trial:
    """Return the trial of λ that `store` is known to hold. Raises InputError where this process does not find it."""
    key = trial_key(lam)
    try:
        return decode(Trial, store.read(key), key)
    except FileNotFoundError as error:
        raise InputError(
            f"correct: the trial with λ = {lam:g} is done, and this process does not find it in {store.address}; "
            f"{SHARED_STORE}"
        ) from error


def collect_stored(
    request: SweepRequest, models: Models, trials: Sequence[Trial], failures: Mapping[float, DefuseError]
) -> Sweep:
    """Return the sweep of a request by `collect_sweep`, with the weights that its store holds of the chosen trial."""
    sweep = collect_sweep(request.spec, models, trials, failures, comparison=request.comparison)
    if sweep.chosen is None:
        return sweep
    return replace(sweep, weights=stored_trial(request.store, sweep.chosen.lam).best)


def read_trial(store: Store, lam: float) -> Trial | None:
    """Return the stored trial of λ; None where there is none, and where it is damaged, which is logged."""
    key = trial_key(lam)
    if not store.exists(key):
        return None
    data = store.read(key)
    try:
        return _decode_trial(lam, data, f"{store.address}/{key}")
    except StoreError as error:
        log.warning("correct: %s", error)
        return None


def _decode_trial(lam: float, data: bytes, where: str) -> Trial:
    remedy = "the trial begins again"
    trial = decode(Trial, data, where, remedy)
    if trial.lam != lam:
        raise DamagedError(
            f"{where}: expected the trial of λ = {lam:g}, found that of λ = {trial.lam:g}; {remedy}"
        )
    return trial


def _has_epochs(lam: float, epochs: int, data: bytes) -> bool:
    """Whether `data` is the trial of λ after so many epochs or more."""
    try:
        return len(_decode_trial(lam, data, trial_key(lam)).rows) >= epochs
    except StoreError:
        return False


def is_trial_failure(error: BaseException) -> bool:
    """Return whether the sweep leaves out a trial with this error: not if images, store or machines failed."""
    known = isinstance(error, DefuseError | OSError | ImportError)  # of a package that one machine lacks
    return isinstance(error, ModelError) or not (known or is_out_of_memory(error) or is_device_failure(error))


class Stack:
    """n classifiers of one architecture, computed at once: parameters and buffers are stacked, (n, ...)."""

    def __init__(self, template: nn.Module, weights: Sequence[Weights]) -> None:
        """`template` is a classifier on this process's device. Its own weights are overwritten."""
        self.template = template
        self._own = dict(template.named_parameters()) | dict(_buffers(template))
        states = []
        for each in weights:
            set_weights(template, each, "a trial of the run")
            states.append({name: tensor.detach().clone() for name, tensor in self._own.items()})
        stacked = {name: torch.stack([state[name] for state in states]) for name in self._own}
        self.parameters = {
            name: stacked.pop(name).requires_grad_(own.requires_grad)
            for name, own in template.named_parameters()
        }
        self.buffers = stacked

    def logits(self, images: Tensor) -> Tensor:
        """(B, channels, H, W) -> (n, B, C), in the mode of the template. What is drawn, as in dropout, is the same."""
        images = images.contiguous()  # in the layout of to_device, vmap computes some layers one by one

        def of_one(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
            found: Tensor = functional_call(self.template, (parameters, buffers), (images,))
            return found

        found: Tensor = vmap(of_one, randomness="same")(self.parameters, self.buffers)
        return found

    def classifier(self, index: int) -> nn.Module:
        """Return the template in eval mode with the weights of one classifier, until it is asked for another."""
        with torch.no_grad():
            for name, stacked in chain(self.parameters.items(), self.buffers.items()):
                self._own[name].copy_(stacked[index])
        return self.template.eval()


def _buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers with their names, without the file that a SelfContainedClassifier carries along."""
    return ((name, buffer) for name, buffer in module.named_buffers() if buffer.dtype != torch.uint8)


def _fine_tune_stacked(tuning: FineTuning, group: Group) -> Iterator[Group]:
    """Yield the trials after each further epoch, until one of them is done, or is missing since it diverged."""
    spec = tuning.spec
    stack = Stack(tuning.classifier(tuning.models.classifier), [trial.weights for trial in group.values()])
    optimizer = Adam(stack.parameters.values(), spec.correct.learning_rate)
    load_optimizer_state(optimizer, _stacked_moments([trial.moments for trial in group.values()]))
    steps, complete = TuningSteps(tuning), True
    while complete:
        epoch = 1 + len(next(iter(group.values())).rows)
        with cpu_threads(1):
            losses = _stacked_epoch(spec, stack, optimizer, steps, list(group), epoch)
            made = _trials_after_epoch(tuning, stack, optimizer, group, losses)
        yield made
        complete = made.keys() == group.keys() and not any(trial.done for trial in made.values())
        group = made


def _stacked_epoch(
    spec: RunFile, stack: Stack, optimizer: Optimizer, steps: TuningSteps, lams: list[float], epoch: int
) -> F64:
    """One pass over D, with as many images of D_f in every step. Returns the loss of each step and λ, (steps, n).

    The sum of the losses has the gradient of each loss for its own slice of the weights, and Adam goes element by
    element: a step is n steps of one λ.
    """
    stack.template.train()
    weight, losses = torch.tensor(lams, dtype=torch.float64, device=device()).float(), []
    for both, labels, wrong in steps.epoch(epoch, optimizer):
        with autocast(spec.resources.arithmetic("classifier")):
            logits = stack.logits(both).float()  # (n, 2 B, C)
        size = len(labels)
        loss = _cross_entropies(logits[:, :size], labels) + weight * _cross_entropies(logits[:, size:], wrong)
        train_step(loss.sum(), optimizer)
        losses.append(loss.detach())
    table: F64 = torch.stack(losses).cpu().double().numpy()
    return table


def _cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """(n, B, C), (B,) -> the mean cross-entropy of each of n classifiers, (n,)."""
    of_each = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), reduction="none")
    return of_each.view(len(logits), -1).mean(dim=1)


def _trials_after_epoch(
    tuning: FineTuning, stack: Stack, optimizer: Optimizer, group: Group, losses: F64
) -> Group:
    """Return the trials after an epoch with these losses, (steps, n); those that diverged in it are left out."""
    moments, made = optimizer_state(optimizer), {}
    for index, (lam, trial) in enumerate(group.items()):
        classifier, loss = stack.classifier(index), float(losses[:, index].mean())
        own = {name: array if _is_shared(name) else array[index, ...] for name, array in moments.items()}
        try:
            if not np.isfinite(loss):
                raise ModelError(f"its loss became {loss}")
            if changes_weights(len(losses), optimizer):
                require_progress(trial.weights, classifier, own, lam)
            row = tuning.score(classifier, lam, len(trial.rows) + 1, loss)
        except ModelError as error:
            log.info("correct: λ = %g leaves its stack and repeats its epoch alone: %s", lam, error)
        else:
            made[lam] = after_epoch(tuning.rule, trial, row, weights_of(classifier), own)
    return made


def _stacked_moments(moments: Sequence[Weights]) -> Weights:
    """Return the state of one optimiser for a stack, from those of its λ."""
    first = moments[0]
    return {
        name: array if _is_shared(name) else np.stack([each[name] for each in moments])
        for name, array in first.items()
    }


def _is_shared(name: str) -> bool:
    """Whether all λ of a stack share an entry of the optimiser's state: its count of steps."""
    return name.endswith("/step")


def _why_not_stacked(tuning: FineTuning) -> str | None:
    """Return why the classifier does not compute stacked what it computes alone, or None where it does."""
    batch = to_tensor(tuning.data.clean.train.batch(slice(0, PROBED)))
    try:
        with cpu_threads(1):
            weights = tuning.models.classifier
            return _difference(Stack(tuning.classifier(weights), [weights, _shrunk(weights)]), batch)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {one_line(error)}"


def _log_not_stacked(section: CorrectSection, lams: Sequence[float], why: str) -> None:
    """Warn once per sweep: all stacks, which may be computed in different processes, find the same."""
    first = next(stack for stack in stacks_of(section) if len(stack) > 1)
    log.log(
        logging.WARNING if tuple(lams) == first else logging.DEBUG,
        "correct: this classifier cannot be stacked (%s); its λ are fine-tuned one after the other; "
        "correct.stack: 1 does so side by side, under %s",
        why,
        ANOTHER_NAME,
    )


def _shrunk(weights: Weights) -> Weights:
    """Return other weights of the same classifier, which give other logits."""
    return {
        name: (0.9 * array).astype(array.dtype) if np.issubdtype(array.dtype, np.floating) else array
        for name, array in weights.items()
    }


def _difference(stack: Stack, images: Tensor) -> str | None:
    """Return how the results of a stack differ from those of its two classifiers computed one by one, or None.

    The template holds the weights of the second, so a network that ignores the stacked ones is detected. Changes the
    buffers of the stack.
    """
    if any(isinstance(part, torch.jit.ScriptModule) for part in stack.template.modules()):
        return "it is TorchScript, whose compiler may fuse layers later in a way that vmap does not know"
    with torch.no_grad():
        alone = torch.stack([stack.classifier(index)(images).float() for index in range(2)])
        limit = 1e-3 * float(alone.abs().max())
        if not torch.allclose(stack.logits(images).float(), alone, atol=limit, rtol=1e-3, equal_nan=True):
            return "its logits differ when stacked"
    template = stack.template.train()
    buffers = {name: buffer.clone() for name, buffer in _buffers(template)}
    for logits in (stack.logits(images), template(images)):
        loss = logits.float().logsumexp(dim=-1).sum()
        loss.backward()
    for name, parameter in template.named_parameters():
        if (parameter.grad is None) != (stack.parameters[name].grad is None):
            return f"the gradient of {name} is lost when stacked"
    for name, buffer in _buffers(template):
        if torch.equal(buffer, buffers[name]) != torch.equal(stack.buffers[name][1], buffers[name]):
            return f"its buffer {name} is updated differently when stacked"
    return None
