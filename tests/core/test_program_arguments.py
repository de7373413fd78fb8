"""Programs of torch.export are refused for operators, and for values given to them, that torch's kernels trust.

With such, torch 2.13 ends the process, or reads or writes outside of tensors.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defuse_core.device import plain_attention
from defuse_core.errors import ModelError
from defuse_core.models.operators import KNOWN_OPERATORS
from defuse_core.models.programs import load_program
from tests.core.test_program_inspection import MODEL, changed, entries_of, first_node, packed

IMAGES = torch.rand(2, 3, 8, 8)
REPEATS = torch.ones(8, dtype=torch.long)
MOST = 2**63 - 1


class Calling(nn.Module):
    """A classifier that also calls a function, on which its logits do not depend."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(192, 3), function

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layer(images.flatten(1))
        return logits + self.function(images).sum() * 0


def calling(function: Callable[[Tensor], Tensor]) -> dict[str, bytes]:
    """Return the entries of an exported program that calls the function."""
    shapes = ({0: torch.export.Dim("batch")},)
    return entries_of(torch.export.export(Calling(function).eval(), (IMAGES,), dynamic_shapes=shapes))


def with_inputs(target: str, inputs: dict[str, Any], left_out: str = "") -> Callable[[dict[str, Any]], None]:
    """Return the change that gives all nodes of an operator these inputs too, by name and place."""

    def change(program: dict[str, Any]) -> None:
        found = [
            node for node in program["graph_module"]["graph"]["nodes"] if node["target"].endswith(target)
        ]
        assert found
        for node in found:
            known = {each["name"]: each for each in node["inputs"] if each["name"] != left_out}
            added = {name: {"name": name, "arg": arg, "kind": 1} for name, arg in inputs.items()}
            node["inputs"] = list((known | added).values())

    return change


def pooled(images: Tensor) -> Tensor:
    return F.max_pool2d(images, 2, 1, 1)


def resized(images: Tensor) -> Tensor:
    return F.interpolate(images, scale_factor=0.5)


@pytest.mark.parametrize(
    ("function", "target", "inputs", "said"),
    [
        (
            lambda images: F.scaled_dot_product_attention(images, images, images, enable_gqa=True),
            "scaled_dot_product_attention.default",
            {},
            "enable_gqa, with which torch can divide by 0",
        ),
        (
            lambda images: F.interpolate(images, scale_factor=0.5, mode="nearest-exact"),
            "_upsample_nearest_exact2d.vec",
            {"scale_factors": {"as_floats": [1e-30, 1e-30]}},
            "scale_factors other",
        ),
        (
            lambda images: F.max_pool2d(images, [2, 1], [1, 1], [1, 0], [2, 1]),
            "max_pool2d.default",
            {},
            "dilation [2, 1] together with padding [1, 0], ",
        ),
        (
            lambda images: F.max_pool3d(images[:, None], 2, 1, 1, 2),
            "max_pool3d.default",
            {},
            "dilation [2, 2, 2] together with padding [1, 1, 1], ",
        ),
        (
            pooled,
            "max_pool2d.default",
            {"stride": {"as_sym_ints": [{"as_name": "s0"}, {"as_int": 1}]}},
            "a stride that is computed",
        ),
        (
            lambda images: F.max_pool1d(images.flatten(2), 2),
            "max_pool1d.default",
            {"kernel_size": {"as_ints": [MOST]}},
            f"the number {MOST}, expected one under 2**31 in size",
        ),
        (lambda images: images[:, 1:], "slice.Tensor", {"start": {"as_int": -(2**31)}}, "the number -2147483648"),
        (resized, "upsample_nearest2d.vec", {"scale_factors": {"as_floats": [1e-30, 1e-30]}}, "scale_factors other"),
        (resized, "upsample_nearest2d.vec", {"scale_factors": {"as_floats": [1e7, 1e7]}}, "scale_factors other"),
        (resized, "upsample_nearest2d.vec", {"scale_factors": {"as_floats": ["Infinity", 2.0]}}, "scale_factors"),
        (resized, "upsample_nearest2d.vec", {"scale_factors": {"as_sym_ints": []}}, "scale_factors other than"),
    ],
)  # fmt: skip
def test_values_that_kernels_trust_are_refused(function, target, inputs, said):
    entries = changed(calling(function), MODEL, with_inputs(target, inputs))
    with pytest.raises(ModelError) as refusal:
        load_program(packed(entries), "net.pt2")
    assert str(refusal.value).startswith(f"net.pt2: gives torch.ops.aten.{target} {said}")


def test_no_input_moves_to_the_place_of_another_that_is_left_out():
    """Without its stride torch takes padding for it, dilation for the padding and ceil_mode for the dilation."""
    inputs = {
        "padding": {"as_ints": [1, 1]},
        "dilation": {"as_ints": [1, 0]},
        "ceil_mode": {"as_ints": [2, 1]},
    }
    change = with_inputs("max_pool2d.default", inputs, left_out="stride")
    with pytest.raises(ModelError, match="max_pool2d.default its inputs in an order that"):
        load_program(packed(changed(calling(pooled), MODEL, change)), "net.pt2")


@pytest.mark.parametrize(
    "function",
    [
        lambda images: images[:, 1:],
        pooled,
        lambda images: F.max_pool2d(images, 2, dilation=2),
        lambda images: F.max_pool2d(images, images.shape[2:]),
        lambda images: images.repeat_interleave(2, 1),
        resized,
        lambda images: F.interpolate(images, scale_factor=2, mode="nearest-exact"),
        lambda images: F.scaled_dot_product_attention(images, images, images),
        lambda images: F.interpolate(images, size=(4, 4), mode="bicubic"),
        lambda images: ((images > 0) & (images < 1)).float(),
        lambda images: images.clone().copy_(images),
        lambda images: torch.split(images, 2, 1)[0],
    ],
)
def test_what_classifiers_give_these_operators_is_loaded(function):
    assert load_program(packed(calling(function)), "net.pt2")(torch.rand(5, 3, 8, 8)).shape == (5, 3)


@pytest.mark.parametrize(
    "name",
    [
        "_batch_norm_no_update", "_batch_norm_with_update", "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training", "_native_multi_head_attention", "_nested_tensor_from_mask",
        "_nested_tensor_from_mask_left_aligned", "_reshape_alias", "_sparse_coo_tensor_unsafe",
        "_transform_bias_rescale_qkv", "_transformer_encoder_layer_fwd", "_upsample_bilinear2d_aa",
        "_upsample_nearest_exact1d", "_upsample_nearest_exact3d", "_weight_norm",
        "_weight_norm_interface", "batch_norm_update_stats", "fbgemm_pack_gemm_matrix_fp16",
        "fbgemm_pack_quantized_matrix", "from_file", "fused_moving_avg_obs_fake_quant", "gru", "lstm",
        "max_pool2d_with_indices_backward", "mkldnn_rnn_layer", "native_batch_norm", "rnn_tanh", "save",
        "segment_reduce", "slow_conv3d_forward", "slow_conv_transpose2d", "sparse_coo_tensor", "to_padded_tensor",
        "unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes", "upsample_linear1d", "upsample_nearest1d",
        "upsample_nearest3d", "upsample_trilinear3d",
    ],
)  # fmt: skip
def test_operators_that_trust_their_arguments_are_refused_by_name(name):
    (_, overloads) = torch._C._jit_get_operation(f"aten::{name}")
    assert overloads, f"torch has no {name}"
    entries = calling(lambda images: images)
    for overload in overloads:
        target = f"torch.ops.aten.{name}.{overload or 'default'}"
        with pytest.raises(ModelError, match=rf"calls {target}, which is none .*remove_parametrizations"):
            load_program(packed(changed(entries, MODEL, first_node(target=target))), "net.pt2")


def indices_as_numbers(images: Tensor) -> Tensor:
    """Let batch normalisation write into the places at which pooling will write its gradient, unseen by autograd."""
    _, places = F.max_pool2d(images[:1, :1], 4, return_indices=True)
    statistics = places.flatten().view(torch.float64)
    ones = torch.ones(4, dtype=torch.float64)
    return F.batch_norm(ones.expand(2, 4), statistics, ones, training=True, momentum=1.0)


@pytest.mark.parametrize(
    ("function", "target"),
    [
        (indices_as_numbers, "view.dtype"),
        (lambda _: torch.repeat_interleave(REPEATS), "repeat_interleave.Tensor"),
        (lambda images: images.repeat_interleave(REPEATS, 2), "repeat_interleave.self_Tensor"),
    ],
)
def test_overloads_that_trust_their_arguments_are_refused(function, target):
    """A sum of repeats that overflows is too small for what is written, and places given as numbers lie anywhere."""
    with pytest.raises(
        ModelError, match=rf"calls torch\.ops\.aten\.{target}, which is none of the operators"
    ):
        load_program(packed(calling(function)), "net.pt2")


@pytest.mark.parametrize("name", ["remainder.int", "add.t", "floordiv.int", "__round_to_zero_floordiv.int"])
def test_an_overload_that_torchscript_alone_calls_is_refused(name):
    change = first_node(target=f"torch.ops.aten.{name}")
    with pytest.raises(ModelError, match=rf"calls torch\.ops\.aten\.{name}, "):
        load_program(packed(changed(calling(lambda images: images), MODEL, change)), "net.pt2")


def test_save_and_from_file_are_the_only_operators_of_torch_that_take_a_files_name():
    found = {
        schema.name
        for schema in torch._C._jit_get_all_schemas()
        for argument in schema.arguments
        if "str" in str(argument.type)
        and any(word in argument.name for word in ("file", "path", "dir", "url"))
    }
    assert {name for name in found if name.startswith("aten::")} == {"aten::save", "aten::from_file"}
    assert not {"save", "from_file"} & KNOWN_OPERATORS


class Attending(nn.Module):
    """Gives attention a value that is longer than its key, behind which torch's faster kernel reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.key = nn.Linear(192, 3), nn.Parameter(torch.ones(1, 1, 1, 8))

    def forward(self, images: Tensor) -> Tensor:
        value = self.key.new_ones(1, 1, 8, 8)
        found = F.scaled_dot_product_attention(images[:1, :1], self.key, value)
        return self.layer(images.flatten(1)) + found.sum() * 0


def test_attention_of_programs_is_computed_by_the_kernel_that_compares_key_and_value():
    shapes = ({0: torch.export.Dim("batch")},)
    entries = entries_of(torch.export.export(Attending().eval(), (IMAGES,), dynamic_shapes=shapes))
    program = load_program(packed(entries), "net.pt2")
    with pytest.raises(RuntimeError, match="Expected size"):
        program(IMAGES)


def test_attention_stays_plain_while_another_thread_is_inside_and_is_as_before_at_the_end():
    def kernels() -> tuple[bool, bool]:
        return torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()

    before = kernels()
    entered, left = threading.Event(), threading.Event()

    def inside() -> None:
        with plain_attention:
            entered.set()
            left.wait(60)

    thread = threading.Thread(target=inside)
    with plain_attention:
        thread.start()
        assert entered.wait(60)
    assert kernels() == (False, False)
    left.set()
    thread.join()
    assert kernels() == before == (True, True)


def two_directories(shown: bytes, read: bytes) -> bytes:
    """Return a zip file in which Python finds the entries of `shown`, and torch those of `read`."""
    data = bytearray(read[:-22] + shown)
    (at,) = struct.unpack_from("<I", read, len(read) - 6)  # where the directory of `read` is
    struct.pack_into("<I", data, len(data) - 6, at)
    return bytes(data)


def test_archives_that_can_be_read_in_two_ways_are_refused():
    entries = calling(lambda images: images)
    harmless = packed(entries)
    shown, read = (packed(entries | {f"extra/{name}": b""}) for name in "xy")
    for data in (two_directories(shown, read), packed(entries | {MODEL.upper(): b""})):
        with pytest.raises(ModelError, match="zip archive are ambiguous"):
            load_program(data, "net.pt2")
    load_program(harmless, "net.pt2")
