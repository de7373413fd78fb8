"""What `defuse check --suite` says to a classifier that fails since it is used otherwise than it was trained."""

from __future__ import annotations

import torch
from safetensors.torch import save_file

from defuse_core.data import open_splits
from defuse_core.export.suite import SuiteResult, SuiteScenario, save_suite, worse_than_corrected
from defuse_core.store import FolderStore
from tests.command_line import call, one_line
from tests.conftest import tiny
from tests.services.serving.synthetic_runs import make_run, swap_classes
from tests.services.suite_runs import EASY, NET, the_tiny_cnn


def rolled() -> torch.nn.Module:
    """The tiny CNN with its last class first, as after a class was renamed."""
    net = the_tiny_cnn()
    net.register_forward_hook(lambda _, images, logits: logits.roll(1, dims=1))
    return net


def test_a_failing_classifier_that_numbers_its_classes_differently_is_told_so(
    tiny_models, tmp_path, monkeypatch, capsys
):
    spec, good = tiny(**EASY), tiny_models.classifier
    splits = open_splits(spec.data, spec.seed)
    suite = tmp_path / "suite"
    save_suite(make_run(FolderStore(tmp_path / "runs"), "first", spec, tiny_models, splits, good), suite)
    for name, weights in (("good", good), ("bad", swap_classes(good, (3, 8)))):
        arrays = {key: torch.tensor(array) for key, array in weights.items()}
        save_file(arrays, tmp_path / f"{name}.safetensors")
    check = ["check", "--suite", suite, "--weights", tmp_path / "good.safetensors"]
    other = [*check, "--classifier", "tests.services.test_suite_hints:rolled"]
    code, _, err = call(monkeypatch, capsys, *other)
    assert code == 1
    line = "of its answers are neither the label nor the class that it was mistaken for: if it numbers the classes in "
    line += "another order, add --set classifier.class_order=[...]"
    assert f" % {line}" in one_line(err)
    for expected, order in enumerate(([*range(1, 10), 0], [*range(10)])):
        code, _, err = call(monkeypatch, capsys, *other, "--set", f"classifier.class_order={order}")
        assert code == expected and line not in err
    bad = [*check[:-1], tmp_path / "bad.safetensors", "--classifier", NET]
    code, _, err = call(monkeypatch, capsys, *bad)
    assert code == 1 and line not in err


def test_a_scenario_is_told_that_passes_where_the_corrected_classifier_is_better_beyond_chance():
    def result(number: int, accuracy: float, least: float) -> SuiteResult:
        scenario = SuiteScenario(
            number=number, label="8", mistaken_for="3", pictures=24, before=0.0, after=1.0, least=least
        )
        return SuiteResult(scenario, accuracy)

    clear, by_chance = result(0, 0.625, 0.5), result(1, 0.9, 0.5)
    failed, unasked = result(2, 0.4, 0.5), result(3, 0.4, 0.0)
    assert worse_than_corrected([clear, by_chance, failed, unasked]) == ["8 read as 3 (scenario 0)"]
    borderline = result(4, 0.8, 0.5)  # alone it is significant, among ten it is not
    assert worse_than_corrected([borderline]) and not worse_than_corrected([borderline] + [by_chance] * 9)
    assert worse_than_corrected([]) == []
