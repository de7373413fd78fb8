"""Artefacts as bytes: equal after a round trip, refused when altered or of another format."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
from safetensors.numpy import save

from defuse_core.artifacts import (
    Checkpoint,
    ClassifierEpoch,
    FailedTrial,
    MeasuredPrecision,
    Models,
    Override,
    Psi,
    ReferenceSet,
    Scenarios,
    Shard,
    Sweep,
    SweepRow,
    VaeEpoch,
    Verdicts,
)
from defuse_core.codec import FORMATS, array_digest, decode, encode
from defuse_core.errors import DamagedError
from tests.sample_components import FIT, sample_failures, sample_scenarios
from tests.sample_findings import sample_findings


def some_shard() -> Shard:
    failures = sample_failures(
        np.ones((3, 2), np.float32), np.arange(3), np.zeros(3, np.int64), np.ones(3, np.int64)
    )
    return Shard(failures, images=10, decodings=40, images_with_any=3, zero_noise_flips=1, seconds=0.5)


def test_an_artefact_is_equal_after_a_round_trip():
    shard = decode(Shard, encode(some_shard()), "here")
    assert (shard.images, shard.decodings, shard.seconds) == (10, 40, 0.5)
    np.testing.assert_array_equal(shard.failures.codes, np.ones((3, 2)))
    assert shard.failures.source.dtype == np.int64


def test_weights_tuples_and_numbers_survive_a_round_trip():
    weights = {"a.weight": np.ones((2, 3), np.float32), "a.count": np.array(4)}
    models = Models(
        weights,
        {},
        ("x", "y"),
        {"train": 5},
        "f",
        {"test": 0.5},
        (ClassifierEpoch(1, 1.0),),
        (),
        0.1,
        0.2,
        np.ones(2),
        FIT,
        class_images={"test": np.array([3, 4])},
    )
    back = decode(Models, encode(models), "here")
    assert back.classes == ("x", "y")
    assert back.classifier["a.count"] == 4
    assert back.classifier["a.count"].shape == ()
    assert back.vae == {}
    assert back.classifier_history == (ClassifierEpoch(1, 1.0, None),)
    assert back.class_images["test"].tolist() == [3, 4]


@pytest.mark.parametrize(
    "history",
    [(), (ClassifierEpoch(1, 0.5, 0.9),), (VaeEpoch(1, 90.0, 8.0, 0.4), VaeEpoch(2, 80.0, 9.0, 0.4))],
)
def test_the_epochs_of_a_checkpoint_keep_their_type(history):
    checkpoint = Checkpoint({}, {"0/step": np.ones(1)}, history, {}, "f")
    back = decode(Checkpoint, encode(checkpoint), "here")
    assert back.history == history
    assert list(back.moments) == ["0/step"]


def test_a_sweep_keeps_its_rows_its_choice_and_its_failed_trials():
    row = SweepRow(0.1, 2, 0.03, 0.99, None, 0.97, 1.0, 0.95)
    for sweep in (
        Sweep((row, row), row, {"w": np.ones(2)}, (FailedTrial(1e39, "diverged"),)),
        Sweep((), None, {}, ()),
    ):
        back = decode(Sweep, encode(sweep), "here")
        assert (back.rows, back.chosen, back.failed) == (sweep.rows, sweep.chosen, sweep.failed)


def test_empty_arrays_survive():
    nothing = np.zeros(0)
    scenarios = sample_scenarios(nothing, np.zeros((0, 4)), np.zeros((0, 4, 4)), nothing, 0, True, 0, 0.0)
    assert decode(Scenarios, encode(scenarios), "here").means.shape == (0, 4)


def test_undefined_shares_stay_undefined():
    verdicts = Verdicts(
        np.array([-1]),
        np.array([np.nan]),
        np.zeros(1),
        np.full((1, 2), -1),
        np.full((1, 2), np.nan),
        0,
        2,
        ("rejected",),
        (Override(0, None, "Ada", "blurred", "2026-01-01T00:00:00Z"),),
        np.zeros(1, np.int64),
    )
    back = decode(Verdicts, encode(verdicts), "here")
    assert np.isnan(back.misclassified[0])
    assert back.overrides == verdicts.overrides


def test_equal_artefacts_have_equal_bytes():
    assert encode(some_shard()) == encode(some_shard())


def test_artefacts_are_equal_whatever_the_order_of_their_keys():
    one, other = (
        MeasuredPrecision(dict.fromkeys(kinds, "f32")) for kinds in (("vae", "answers"), ("answers", "vae"))
    )
    assert encode(one) == encode(other)


def test_the_digest_is_of_names_types_shapes_and_bytes_in_any_order():
    same, other = np.zeros(4, np.int32), np.ones(2)
    digests = [
        array_digest(arrays)
        for arrays in (
            {"a": same},
            {"b": same},
            {"a": same.astype(np.float32)},
            {"a": same.reshape(2, 2)},
            {"a": same + 1},
        )
    ]
    assert len(set(digests)) == 5
    assert array_digest({"a": same, "b": other}) == array_digest({"b": other, "a": same})


def test_an_artefact_with_a_field_too_many_or_an_array_too_few_is_refused():
    psi = Psi(np.array([3]), 10, 40, 2, 1, 0.5)
    more = dataclasses.make_dataclass("Psi", [*vars(psi), ("later", int, 1)])
    with pytest.raises(DamagedError, match=r"here: .* found a Psi with other fields \(later: "):
        decode(Psi, encode(more(**vars(psi))), "here")
    fields = {name: value for name, value in vars(psi).items() if not isinstance(value, np.ndarray)}
    arrays = {name: {"tensor": name} for name in vars(psi).keys() - fields.keys()}
    body = json.dumps({"format": FORMATS["Psi"], "kind": "Psi", "fields": fields | arrays})
    data = save({}, metadata={"defuse": json.dumps([array_digest({}, body), body])})
    with pytest.raises(DamagedError, match="here: .* found a Psi without the array 'codes'"):
        decode(Psi, data, "here")


@pytest.mark.parametrize("where", [-1, -40])
def test_a_changed_byte_is_noticed(where):
    data = bytearray(encode(some_shard()))
    data[where] ^= 1
    with pytest.raises(DamagedError, match="psi/0: its bytes changed"):
        decode(Shard, bytes(data), "psi/0")


@pytest.mark.parametrize(
    "data", [b"", b"not safetensors at all", encode(some_shard())[:-5], (3).to_bytes(8, "little") + b"[1]"]
)
def test_other_or_cut_bytes_are_refused_in_one_line(data):
    with pytest.raises(DamagedError, match="^psi/0: "):
        decode(Shard, data, "psi/0")


def test_an_artefact_of_another_kind_is_refused():
    with pytest.raises(DamagedError, match="expected a Verdicts artefact, found Shard"):
        decode(Verdicts, encode(some_shard()), "verdicts")


def test_an_artefact_with_other_fields_is_refused():
    older = dataclasses.make_dataclass("Psi", [("shard_counts", np.ndarray)])
    with pytest.raises(
        DamagedError, match=r"b\.safetensors: .* found a Psi with other fields \(codes: Field req"
    ):
        decode(Psi, encode(older(np.zeros(1))), "b.safetensors")


def test_models_of_a_set_that_were_stored_without_accuracies_by_class_are_read():
    fields = [("models", tuple), ("train_images", int), ("validation", np.ndarray), ("test", np.ndarray)]
    older = dataclasses.make_dataclass("ReferenceSet", fields)(({},), 10, np.ones(1), np.ones(1))
    assert decode(ReferenceSet, encode(older), "references").class_accuracy == {}


def test_an_artefact_of_another_format_version_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setitem(FORMATS, "Shard", 1)
    older = encode(some_shard())
    other = encode(ReferenceSet(({},), 10, np.ones(1), np.ones(1), {}))
    monkeypatch.undo()
    decode(ReferenceSet, other, "references")  # the format of one kind refuses no other
    with pytest.raises(
        DamagedError,
        match=r"psi/0: expected artefact format 8, found artefact format 1; use the .* run again",
    ):
        decode(Shard, older, "psi/0")
    with pytest.raises(DamagedError, match="psi/0: .* found artefact format 1; the trial begins again$"):
        decode(Shard, older, "psi/0", "the trial begins again")
    with pytest.raises(DamagedError, match="psi/0: .* found artefact format 1; use another Defuse$"):
        decode(Shard, older, "psi/0", "the trial begins again", "use another Defuse")
    with pytest.raises(DamagedError, match=r"psi/0: .*; the trial begins again$"):
        decode(Shard, older[:-1], "psi/0", "the trial begins again", "use another Defuse")


def test_an_artefact_from_before_format_versions_is_refused():
    body = json.dumps({"kind": "Shard", "fields": {}})
    data = save({}, metadata={"defuse": json.dumps([hashlib.sha256(body.encode()).hexdigest(), body])})
    with pytest.raises(
        DamagedError, match="found artefact format 1; use the version of Defuse that wrote it, or"
    ):
        decode(Shard, data, "psi/0")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf"), np.float64("nan")])
def test_numbers_that_json_lacks_survive_and_are_none_in_optional_fields(number):
    row = SweepRow(1.0, 1, loss=number, train=0.5, validation=number, test=None, tune=0.5, scenario=0.5)
    sweep = decode(Sweep, encode(Sweep((row,), None, {}, ())), "here")
    np.testing.assert_equal(sweep.rows[0].loss, float(number))
    assert sweep.rows[0].validation is None


def test_numbers_that_json_lacks_survive_in_dicts():
    models = sample_findings(1, 1)[0].models
    models = dataclasses.replace(models, accuracy={"test": np.inf})
    assert decode(Models, encode(models), "here").accuracy == {"test": np.inf}


def test_numbers_that_json_lacks_survive_in_lists():
    numbers = dataclasses.make_dataclass("Numbers", [("losses", tuple[float, ...])])
    back = decode(numbers, encode(numbers((0.5, float("nan"), np.float32("-inf")))), "here")
    np.testing.assert_equal(back.losses, (0.5, float("nan"), float("-inf")))
