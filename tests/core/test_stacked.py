"""correct.stack: λ that are fine-tuned together give what they give one by one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from defuse_core.artifacts import Models, SweepRow, Trial, Weights
from defuse_core.codec import decode, encode
from defuse_core.config import RunFile, changed_field
from defuse_core.correct import FineTuning, fine_tune
from defuse_core.data import Splits
from defuse_core.errors import ModelError, StoreError
from defuse_core.local import LocalCompute
from defuse_core.models import (
    build_classifier,
    load_classifier,
    predict_probabilities,
    to_device,
    to_tensor,
    weights_of,
)
from defuse_core.protocols import SweepRequest
from defuse_core.store import FolderStore, Store
from defuse_core.training import Adam
from defuse_core.trials import (
    Stack,
    _trials_after_epoch,
    is_trial_failure,
    read_trial,
    run_stack,
    run_trial,
    stacks_of,
    trial_key,
    write_trial,
)
from defuse_core.tuning_data import FineTuningData
from tests.conftest import tiny
from tests.own_classifiers import (
    Net,
    Scaled,
    trained,
)

LAMBDAS = (0.01, 1.0, 10.0)
OWN = {"architecture": "custom", "import_path": "tests.own_classifiers:trained", "epochs": 1}


def stacking(count: int = 3, **correct: object) -> RunFile:
    return tiny(correct={"lambdas": LAMBDAS, "stack": count, **correct})


def with_classifier(spec: RunFile, section: dict[str, object]) -> RunFile:
    return spec.model_copy(update={"classifier": tiny(classifier=section).classifier})


def trials_in(store: Store, lams: Sequence[float]) -> dict[float, Trial]:
    return {lam: decode(Trial, store.read(trial_key(lam)), "") for lam in lams}


def separate(
    spec: RunFile, models: Models, data: FineTuningData, lams: Sequence[float]
) -> dict[float, Trial]:
    return {lam: [*fine_tune(FineTuning(spec, models, data), lam, None)][-1] for lam in lams}


def together(
    spec: RunFile, models: Models, data: FineTuningData, lams: Sequence[float], store: Store
) -> dict[float, Trial | ModelError]:
    return dict(run_stack(FineTuning(spec, models, data), lams, store))


def assert_close_rows(rows: Sequence[SweepRow], others: Sequence[SweepRow], rtol: float = 1e-5) -> None:
    """The same accuracies, and losses within `rtol`."""
    assert [replace(row, loss=0.0) for row in rows] == [replace(row, loss=0.0) for row in others]
    np.testing.assert_allclose([row.loss for row in rows], [row.loss for row in others], rtol=rtol)


def assert_close_weights(weights: Weights, others: Weights, atol: float) -> None:
    assert weights.keys() == others.keys()
    for name, array in others.items():
        np.testing.assert_allclose(weights[name], array, atol=atol, err_msg=name)


@pytest.mark.parametrize(
    ("stack", "lambdas", "expected"),
    [
        (1, (1.0, 0.0, 2.0), [(1.0,), (0.0,), (2.0,)]),
        (2, (5.0, 1.0, 0.0, 2.0), [(5.0, 1.0), (0.0,), (2.0,)]),
        (9, (0.0, 1.0, 2.0), [(0.0,), (1.0, 2.0)]),
    ],
)
def test_lambdas_are_stacked_in_their_order_and_lambda_0_has_a_trial_of_its_own(stack, lambdas, expected):
    assert stacks_of(tiny(correct={"stack": stack, "lambdas": lambdas}).correct) == expected


def test_a_resumed_run_has_to_keep_its_stacks_and_one_of_an_older_version_had_none():
    assert changed_field(stacking(1), stacking(2)) == "correct.stack: 1 in the run, 2 now"
    assert tiny().correct.stack == 1


def built(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if kind == "own, with dropout":
        return to_device(Net())
    spec = tiny(classifier={"architecture": kind, "stem": "small"} if kind == "resnet18" else {})
    return to_device(build_classifier(spec, 10))


@pytest.mark.parametrize("kind", ["cnn", "resnet18", "own, with dropout"])
def test_a_stack_has_the_logits_gradients_and_batch_statistics_of_its_classifiers(kind):
    """Dropout draws the same mask for each; batch normalisation keeps the statistics of each apart."""
    classifiers = [built(kind, seed).train() for seed in range(2)]
    stack = Stack(built(kind, 9), [weights_of(each) for each in classifiers])
    stack.template.train()
    images = to_tensor(np.random.default_rng(0).random((8, 1, 16, 16), np.float32))
    torch.manual_seed(7)
    logits = stack.logits(images)
    (logits**2).sum().backward()
    for index, classifier in enumerate(classifiers):
        torch.manual_seed(7)
        own = classifier(images)
        (own**2).sum().backward()
        torch.testing.assert_close(logits[index], own, rtol=1e-4, atol=1e-4)
        for name, parameter in classifier.named_parameters():
            scale = float(parameter.grad.abs().max())
            close = {"rtol": 1e-3, "atol": 1e-3 * scale + 1e-3, "msg": name}
            torch.testing.assert_close(stack.parameters[name].grad[index], parameter.grad, **close)
        assert_close_weights(weights_of(stack.classifier(index)), weights_of(classifier), atol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "augment", "precision"),
    [("constant", False, "f32"), ("one_cycle", True, "f32"), ("one_cycle", False, "bf16")],
)
def test_stacked_trials_equal_separate_ones_up_to_rounding(
    schedule, augment, precision, tiny_models, data, tmp_path
):
    spec = stacking(schedule=schedule, augment=augment).with_fields("resources", precision=precision)
    alone = separate(spec, tiny_models, data, LAMBDAS)
    made = together(spec, tiny_models, data, LAMBDAS, FolderStore(tmp_path))
    tolerance = 1e-5 if precision == "f32" else 1e-2
    for lam, trial in made.items():
        assert (trial.lam, trial.done, trial.best_epoch) == (lam, True, alone[lam].best_epoch)
        assert_close_weights(trial.best, alone[lam].best, atol=tolerance)
        if precision == "f32":
            assert_close_rows(trial.rows, alone[lam].rows)
    assert encode(made[1.0]) != encode(alone[1.0])  # rounding: these were stacked
    assert made.keys() == alone.keys()


def test_batch_normalisation_and_dropout_give_the_same_answers_stacked(tiny_models, data, tmp_path):
    """Biases before a batch normalisation differ more: their gradient is rounding alone, and Adam scales it up."""
    spec = with_classifier(stacking(epochs=2, augment=True, schedule="one_cycle"), OWN)
    models = replace(tiny_models, classifier=weights_of(trained()))
    alone = separate(spec, models, data, LAMBDAS)
    made = together(spec, models, data, LAMBDAS, FolderStore(tmp_path))
    shown = data.clean.train.pixels
    for lam, trial in made.items():
        assert [row.loss for row in trial.rows] == pytest.approx(
            [row.loss for row in alone[lam].rows], rel=1e-4
        )
        first, second = (
            predict_probabilities(load_classifier(spec, each.best, 10), shown) for each in (trial, alone[lam])
        )
        np.testing.assert_allclose(first, second, atol=0.05)


def test_the_running_statistics_of_a_stacked_resnet18_are_those_of_its_trials(tiny_models, data, tmp_path):
    spec = with_classifier(stacking(epochs=1, batch_size=24), {"architecture": "resnet18", "stem": "small"})
    models = replace(tiny_models, classifier=weights_of(built("resnet18", 0)))
    some = Splits(data.clean.train.take(slice(24)), None, None, data.clean.classes)
    short, lams = replace(data, clean=some, right_before={}), (0.1, 10.0)
    alone = separate(spec, models, short, lams)
    made = together(spec, models, short, lams, FolderStore(tmp_path))
    for lam, trial in made.items():
        statistics = [name for name in trial.best if "running" in name or "tracked" in name]
        assert len(statistics) == 60  # of 20 layers
        for name in statistics:
            close = {"rtol": 1e-5, "atol": 1e-6, "err_msg": name}
            np.testing.assert_allclose(trial.best[name], alone[lam].best[name], **close)
            assert not np.array_equal(trial.best[name], models.classifier[name])
        assert trial.rows[0].loss == pytest.approx(alone[lam].rows[0].loss, rel=1e-5)


@pytest.mark.parametrize("lam", [1e30, 1e39])
def test_a_lambda_that_diverges_is_left_out_and_does_no_harm_to_its_stack(
    lam, tiny_models, fixes, data, tmp_path
):
    spec = stacking(lambdas=(1.0, lam, 10.0))
    stacked, single = (
        LocalCompute().sweeps(
            tiny_models, [SweepRequest(each, fixes, None, FolderStore(tmp_path / str(each.correct.stack)))]
        )[0]
        for each in (spec, stacking(1, lambdas=(1.0, lam, 10.0)))
    )
    assert stacked.failed == single.failed
    assert [failed.lam for failed in stacked.failed] == [lam]
    assert_close_rows(stacked.rows, single.rows)


def test_a_sweep_whose_lambdas_all_diverge_fails_as_one_of_single_trials_does(tiny_models, fixes, tmp_path):
    spec = stacking(lambdas=(1e30, 1e39))
    with pytest.raises(ModelError, match=r"every trial failed; λ = 1e\+30: training .* diverged"):
        LocalCompute().sweeps(tiny_models, [SweepRequest(spec, fixes, None, FolderStore(tmp_path))])


def losing(models: Models, alone: dict[float, Trial], hopeless: float) -> Models:
    """Return the models with such an accuracy that with stop_at_loss 0.2 one λ is hopeless after its first epoch."""
    reached = {lam: trial.rows[0].validation for lam, trial in alone.items()}
    rest = min(value for lam, value in reached.items() if lam != hopeless)
    assert reached[hopeless] < rest
    limit = 0.2 + (reached[hopeless] + rest) / 2
    return replace(models, accuracy={**models.accuracy, "validation": limit})


HARD = {"max_loss": 0.2, "epochs": 3, "learning_rate": 0.01, "choose_by": "tune"}


def test_a_hopeless_lambda_leaves_the_stack_and_the_others_go_on(tiny_models, data, tmp_path):
    lams = (0.01, 300.0, 0.1)
    plain = separate(stacking(1, **HARD | {"epochs": 1}), tiny_models, data, lams)
    models = losing(tiny_models, plain, 300.0)
    spec = stacking(**HARD, stop_at_loss=0.2, lambdas=lams)
    alone = separate(spec, models, data, lams)
    made = together(spec, models, data, lams, FolderStore(tmp_path))
    assert len(made[300.0].rows) == 1 and made[300.0].done
    assert {lam: len(trial.rows) for lam, trial in made.items()} == {
        lam: len(trial.rows) for lam, trial in alone.items()
    }
    for lam in lams:
        np.testing.assert_allclose(
            [row.loss for row in made[lam].rows], [row.loss for row in alone[lam].rows], rtol=1e-3
        )


@pytest.mark.parametrize(("schedule", "augment"), [("constant", False), ("one_cycle", True)])
@pytest.mark.parametrize("with_hopeless", [False, True])
def test_an_interrupted_stack_goes_on_to_the_same_end_bit_for_bit(
    schedule, augment, with_hopeless, tiny_models, data, tmp_path
):
    lams, models = (0.01, 300.0, 0.1), tiny_models
    spec = stacking(**HARD, schedule=schedule, augment=augment, lambdas=lams)
    if with_hopeless:
        every_epoch_is_scored = spec.with_fields("correct", stop_at_loss=1.0)
        first = {
            lam: next(fine_tune(FineTuning(every_epoch_is_scored, models, data), lam, None)) for lam in lams
        }
        models = losing(models, first, 300.0)
        spec = spec.with_fields("correct", stop_at_loss=0.2)
    whole, stopped = (FolderStore(tmp_path / name) for name in ("whole", "stopped"))
    together(spec, models, data, lams, whole)
    list(itertools.islice(run_stack(FineTuning(spec, models, data), lams, stopped), 3))
    assert {len(trial.rows) for trial in trials_in(stopped, lams).values()} == {1}
    together(spec, models, data, lams, stopped)
    for lam in lams:
        assert stopped.read(trial_key(lam)) == whole.read(trial_key(lam))
    assert len(trials_in(whole, lams)[300.0].rows) == (1 if with_hopeless else 3)


def test_a_single_number_among_the_parameters_is_stored_and_resumed(data, tiny_models, tmp_path):
    spec = with_classifier(stacking(), OWN | {"import_path": "tests.own_classifiers:Scaled"})
    torch.manual_seed(0)
    models = replace(tiny_models, classifier=weights_of(Scaled()))
    whole, stopped = (FolderStore(tmp_path / name) for name in ("whole", "stopped"))
    together(spec, models, data, LAMBDAS, whole)
    list(itertools.islice(run_stack(FineTuning(spec, models, data), LAMBDAS, stopped), 3))
    moments = [trial.moments["0/exp_avg"] for trial in trials_in(stopped, LAMBDAS).values()]
    assert all(moment.shape == () for moment in moments) and len(set(map(float, moments))) == 3
    together(spec, models, data, LAMBDAS, stopped)
    assert all(stopped.read(trial_key(lam)) == whole.read(trial_key(lam)) for lam in LAMBDAS)


def test_lambdas_of_unequal_epochs_are_not_stacked_together(tiny_models, data, tmp_path, monkeypatch):
    """As a process leaves them that is killed between two writes of an epoch."""
    sizes = []

    class Noting(Stack):
        def __init__(self, template: nn.Module, weights: Sequence[Weights]) -> None:
            sizes.append(len(weights))
            super().__init__(template, weights)

    spec, store = stacking(), FolderStore(tmp_path)
    next(run_trial(FineTuning(spec, tiny_models, data), 1.0, store))
    monkeypatch.setattr("defuse_core.trials.Stack", Noting)
    made = together(spec, tiny_models, data, LAMBDAS, store)
    assert sizes == [2, 2]  # the look whether it can be stacked, and λ = 0.01 with 10
    alone = separate(spec, tiny_models, data, LAMBDAS)
    for lam in LAMBDAS:
        assert_close_rows(made[lam].rows, alone[lam].rows)
    assert encode(made[1.0]) == encode(alone[1.0])


def test_a_lambda_that_is_added_to_a_finished_stack_is_trained_alone(tiny_models, data, tmp_path):
    store = FolderStore(tmp_path)
    together(stacking(4), tiny_models, data, LAMBDAS, store)
    before = {lam: store.read(trial_key(lam)) for lam in LAMBDAS}
    spec = stacking(4, lambdas=(*LAMBDAS, 3.0))
    (lams,) = stacks_of(spec.correct)
    made = together(spec, tiny_models, data, lams, store)
    assert {lam: store.read(trial_key(lam)) for lam in LAMBDAS} == before
    assert encode(made[3.0]) == encode(separate(spec, tiny_models, data, [3.0])[3.0])
    assert made.keys() == set(lams)


def test_lambda_0_beside_a_stack_is_the_trial_that_it_is_alone(tiny_models, fixes, data, tmp_path):
    spec, store = stacking(lambdas=(0.0, *LAMBDAS)), FolderStore(tmp_path)
    told = []
    compute = LocalCompute(lambda *args: told.append(args))
    (sweep,) = compute.sweeps(tiny_models, [SweepRequest(spec, fixes, None, store)])
    assert {row.lam for row in sweep.rows} == {0.0, *LAMBDAS}
    assert store.read(trial_key(0.0)) == encode(separate(spec, tiny_models, data, [0.0])[0.0])
    assert [args for args in told if args[0] == "fine-tuning over λ"] == [
        ("fine-tuning over λ", 1, 4, "trials"),
        ("fine-tuning over λ", 4, 4, "trials"),
    ]


def test_the_trial_of_another_lambda_is_logged_and_begins_again(tmp_path, caplog):
    store = FolderStore(tmp_path)
    write_trial(store, Trial(1.0, (), {}, {}, {}, 0, False))
    store.write(trial_key(2.0), store.read(trial_key(1.0)))
    assert read_trial(store, 1.0) is not None and read_trial(store, 2.0) is None
    assert "expected the trial of λ = 2, found that of λ = 1; the trial begins again" in caplog.text


def test_a_stored_trial_is_replaced_by_one_of_more_epochs_alone_and_where_it_is_damaged(tmp_path):
    store, kept = FolderStore(tmp_path), list[int]()
    for number, epochs in enumerate((2, 1, 2, 3)):
        rows = tuple(SweepRow(1.0, epoch, 0.1) for epoch in range(epochs))
        write_trial(store, Trial(1.0, rows, {}, {}, {}, number, False))
        kept.append(trials_in(store, [1.0])[1.0].best_epoch)
    assert kept == [0, 0, 0, 3]
    store.write(trial_key(1.0), b"damaged")
    write_trial(store, Trial(1.0, (), {}, {}, {}, 9, False))
    assert trials_in(store, [1.0])[1.0].best_epoch == 9


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ModelError("its loss became nan"), True),
        (ValueError("of the classifier's code"), True),
        (RuntimeError("shapes differ"), True),
        (StoreError("damaged"), False),
        (OSError("no space left"), False),
        (ModuleNotFoundError("No module named 'einops'"), False),
        (MemoryError(), False),
        (RuntimeError("CUDA error: unspecified launch failure"), False),
    ],
)
def test_a_sweep_leaves_out_a_trial_that_failed_itself_and_none_whose_machine_or_store_did(error, expected):
    assert is_trial_failure(error) is expected


def test_an_epoch_of_a_stack_that_changes_nothing_since_the_one_before_has_diverged(tiny_models, data):
    tuning = FineTuning(tiny(), tiny_models, data)
    moved = {name: array + np.float32(0.01) for name, array in tiny_models.classifier.items()}
    stack = Stack(tuning.classifier(moved), [moved, moved])
    group = {lam: replace(tuning.new_trial(lam), weights=moved) for lam in (1.0, 2.0)}
    optimizer = Adam(stack.parameters.values(), 1e-3)
    assert _trials_after_epoch(tuning, stack, optimizer, group, np.ones((5, 2))) == {}
