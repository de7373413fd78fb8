import dataclasses

import numpy as np
import pytest

from defuse_core.artifacts import (
    Failures,
    Models,
    Psi,
    Scenarios,
    Shard,
    Verdicts,
)
from defuse_core.codec import decode, encode
from defuse_core.errors import StoreError


def some_shard() -> Shard:
    failures = Failures(
        np.ones((3, 2), np.float32), np.arange(3), np.zeros(3, np.int64), np.ones(3, np.int64)
    )
    return Shard(failures, images=10, decodings=40, images_with_any=3, zero_noise_flips=1, seconds=0.5)


def test_an_artefact_comes_back_as_it_was():
    shard = decode(Shard, encode(some_shard()), "here")
    assert (shard.images, shard.decodings, shard.seconds) == (10, 40, 0.5)
    np.testing.assert_array_equal(shard.failures.codes, np.ones((3, 2)))
    assert shard.failures.source.dtype == np.int64


def test_weights_tuples_and_numbers_come_back_too():
    weights = {"a.weight": np.ones((2, 3), np.float32), "a.count": np.array(4)}
    models = Models(
        weights, {}, ("x", "y"), {"train": 5}, "f", {"test": 0.5}, ({"loss": 1.0},), (), 0.1, 0.2, np.ones(2)
    )
    back = decode(Models, encode(models), "here")
    assert back.classes == ("x", "y")
    assert back.classifier["a.count"] == 4
    assert back.classifier["a.count"].shape == ()
    assert back.vae == {}
    assert back.classifier_history == ({"loss": 1.0},)


def test_empty_arrays_survive():
    nothing = np.zeros(0)
    scenarios = Scenarios(nothing, np.zeros((0, 4)), np.zeros((0, 4, 4)), nothing, 0, True, 0, 0.0)
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
        (),
    )
    assert np.isnan(decode(Verdicts, encode(verdicts), "here").misclassified[0])


def test_equal_artefacts_have_equal_bytes():
    assert encode(some_shard()) == encode(some_shard())


@pytest.mark.parametrize("where", [-1, -40])
def test_a_changed_byte_is_noticed(where):
    data = bytearray(encode(some_shard()))
    data[where] ^= 1
    with pytest.raises(StoreError, match="psi/0: its bytes changed"):
        decode(Shard, bytes(data), "psi/0")


@pytest.mark.parametrize("data", [b"", b"not safetensors at all", encode(some_shard())[:-5]])
def test_other_or_cut_bytes_are_refused_in_one_line(data):
    with pytest.raises(StoreError, match="^psi/0: "):
        decode(Shard, data, "psi/0")


def test_an_artefact_of_another_kind_is_refused():
    with pytest.raises(StoreError, match="expected a Verdicts artefact, found Shard"):
        decode(Verdicts, encode(some_shard()), "verdicts")


def test_an_artefact_of_another_version_of_defuse_is_told():
    older = dataclasses.make_dataclass("Psi", [("shard_counts", np.ndarray)])
    with pytest.raises(StoreError, match=r"b\.safetensors: another version of Defuse wrote it"):
        decode(Psi, encode(older(np.zeros(1))), "b.safetensors")


def test_axes_that_disagree_are_refused_where_they_are_made():
    with pytest.raises(ValueError, match="axis F has length 2, elsewhere 3"):
        Failures(np.ones((3, 2), np.float32), np.arange(2), np.zeros(3, np.int64), np.ones(3, np.int64))
