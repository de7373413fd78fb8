"""The operators of torch that files of torch.export may call: those that image classifiers are made of.

aten has some 1,700. Two touch files (`save`, `from_file`), and many trust sizes and indices that they get, and so
read or write anywhere: those that torch alone calls, of quantized and sparse tensors, of gradients, `lstm`, `gru` and
others. None of these is listed that was found; those that trust some arguments alone are refused with these. No list
can make the kernels of torch free of bugs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

ELEMENTWISE = """
__and__ __iand__ __ior__ __ixor__ __lshift__ __or__ __rshift__ __xor__ abs absolute acos acosh add addcdiv addcmul
angle arccos arccosh arcsin arcsinh arctan arctan2 arctanh asin asinh atan atan2 atanh bitwise_and bitwise_left_shift
bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil celu clamp clamp_max clamp_min clip complex conj
conj_physical copysign cos cosh deg2rad digamma div divide elu eq erf erfc erfinv exp exp2 expm1 fix float_power floor
floor_divide fmax fmin fmod frac gcd ge gelu glu greater greater_equal gt hardshrink hardsigmoid hardswish hardtanh
heaviside hypot i0 imag isclose isfinite isin isinf isnan isneginf isposinf le leaky_relu lerp less less_equal lgamma
log log10 log1p log2 log_sigmoid logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit lt
masked_fill maximum minimum mish mul multiply nan_to_num ne neg negative not_equal polar positive pow prelu rad2deg
real reciprocal relu relu6 remainder resolve_conj resolve_neg round rrelu rsqrt rsub selu sgn sigmoid sign signbit
silu sin sinc sinh softplus softshrink sqrt square sub subtract tan tanh threshold true_divide trunc where xlogy
"""
REDUCTIONS = """
all allclose amax amin any argmax argmin argsort count_nonzero cummax cummin cumprod cumsum dist equal frobenius_norm
kthvalue linalg_matrix_norm linalg_norm linalg_vector_norm log_softmax logcumsumexp logsumexp max mean median min mode
nanmean nanmedian nansum norm prod quantile softmax sort std std_mean sum topk trace var var_mean
"""  # and sorting
SHAPES = """
alias atleast_1d atleast_2d atleast_3d block_diag broadcast_tensors broadcast_to cat channel_shuffle chunk col2im
column_stack concat concatenate contiguous diag diag_embed diagonal diagonal_scatter dsplit dstack expand expand_as
fill_diagonal flatten flip fliplr flipud gather hsplit hstack im2col index index_add index_copy index_fill index_put
index_select masked_scatter masked_select matrix_H meshgrid mH moveaxis movedim mT narrow nonzero numpy_T one_hot
permute pixel_shuffle pixel_unshuffle ravel repeat repeat_interleave reshape reshape_as roll rot90 scatter scatter_add
scatter_reduce select select_scatter slice slice_scatter split split_with_sizes squeeze stack swapaxes swapdims t take
take_along_dim tensor_split tile transpose tril triu unbind unflatten unfold unsqueeze view view_as view_as_complex
view_as_real vsplit vstack
"""  # and indices
TENSORS = """
_assert_async _assert_scalar _assert_tensor_metadata _local_scalar_dense _shape_as_tensor arange bernoulli can_cast
clone copy detach dim empty empty_like exponential eye fill full full_like get_device is_complex is_conj is_contiguous
is_floating_point is_inference is_neg is_nonzero is_same_size is_signed item lift lift_fresh lift_fresh_copy linspace
logspace new_empty new_full new_ones new_zeros normal numel ones ones_like promote_types rand rand_like randint randn
randn_like randperm result_type scalar_tensor size storage_offset stride sym_constrain_range
sym_constrain_range_for_size sym_numel sym_size sym_storage_offset sym_stride to tril_indices triu_indices type_as
uniform zero zeros zeros_like
"""  # properties, types, new tensors
LAYERS = """
_convolution _convolution_mode adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
adaptive_max_pool2d adaptive_max_pool3d addbmm addmm addmv addr affine_grid_generator alpha_dropout avg_pool1d
avg_pool2d avg_pool3d baddbmm batch_norm bilinear bmm cdist constant_pad_nd conv1d conv2d conv3d conv_transpose1d
conv_transpose2d conv_transpose3d convolution cosine_similarity cross dot dropout einsum embedding
feature_alpha_dropout feature_dropout fft_fft fft_fft2 fft_fftshift fft_ifft fft_ifft2 fft_ifftshift fft_irfft
fft_irfft2 fft_rfft fft_rfft2 ger grid_sampler group_norm inner instance_norm kron layer_norm linalg_cross linear
matmul max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices mm mv
outer pad pairwise_distance reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
replication_pad3d rms_norm scaled_dot_product_attention tensordot upsample_bicubic2d upsample_bilinear2d
upsample_nearest2d _upsample_nearest_exact2d vdot
"""  # and products
KNOWN_OPERATORS = frozenset(f"{ELEMENTWISE} {REDUCTIONS} {SHAPES} {TENSORS} {LAYERS}".split())
WITHOUT_OPERATOR = (
    "save the network without it (of weight_norm: torch.nn.utils.remove_weight_norm, or "
    "torch.nn.utils.parametrize.remove_parametrizations first), or give its function and weights "
    "(classifier.architecture: custom, import_path, weights)"
)
STRIDED = 7  # torch.strided in torch's schema of programs
POSITIONAL, KEYWORD = 1, 2  # the kinds of inputs there
CONSTANTS = {"as_int", "as_ints", "as_bool", "as_float", "as_floats", "as_none"}
LARGEST, TO_THE_END = 2**31 - 1, 2**63 - 1  # of whole numbers; the latter is the end of images[1:]
LEAST_SCALE, LARGEST_SCALE = 1e-6, 1e6
# One shows whole numbers as others, such as those at which pooling writes its gradient; of repeats in a tensor torch
# trusts the sum, which can overflow.
REFUSED_OVERLOADS = {("view", "dtype"), ("repeat_interleave", "Tensor"), ("repeat_interleave", "self_Tensor")}


def is_harmless_operator(name: str, overload: str) -> bool:
    """Whether aten has an overload of one of KNOWN_OPERATORS, also with _, that writes into no tensor given as `out`.

    An empty `overload` is the default one. Those of TorchScript's interpreter alone, such as `remainder.int`, are none.
    """
    is_known = name in KNOWN_OPERATORS or name.removesuffix("_") in KNOWN_OPERATORS
    is_registered = f"aten::{name}.{overload}".removesuffix(".") in _registered_operators()
    if not is_known or not is_registered or (name, overload) in REFUSED_OVERLOADS:
        return False
    return not any(argument.is_out for argument in torch._C._get_schema(f"aten::{name}", overload).arguments)


@functools.cache
def _registered_operators() -> frozenset[str]:
    return frozenset(torch._C._dispatch_get_all_op_names())


def wrong_argument(target: str, inputs: list[dict[str, Any]]) -> str | None:
    """Return what a node gives its operator that torch's kernels could trust wrongly, with a remedy, or None.

    `target` is an operator that has passed `is_harmless_operator`, or one that is not of aten.
    """
    given = {each["name"]: each["arg"] for each in inputs}
    if given.get("layout", {"as_none": True}) not in ({"as_layout": STRIDED}, {"as_none": True}):
        return "a layout, and sparse tensors are not loaded; export dense ones"
    name, _, overload = target.removeprefix("torch.ops.aten.").partition(".")
    has_end = name.startswith(("slice", "sym_constrain_range"))
    for number in _numbers([each["arg"] for each in inputs]):
        if isinstance(number, int) and abs(number) > LARGEST and not (has_end and number == TO_THE_END):
            return f"the number {str(number)[:80]}, expected one under 2**31 in size; export the network without it"
    check = next((check for prefix, check in CHECKS.items() if name.startswith(prefix)), None)
    if check is None:
        return None
    if not _is_in_order(name, "" if overload == "default" else overload, inputs):
        return "its inputs in an order that torch.export does not write; export it again"
    return check(given)


def _wrong_window(given: dict[str, Any]) -> str | None:
    for key, value in given.items():
        if key not in ("self", "input") and not value.keys() <= CONSTANTS:
            return f"a {key} that is computed; export it with numbers"
    dilation, padding = (list(_numbers(given.get(key))) for key in ("dilation", "padding"))
    if any(number > 1 for number in dilation) and any(padding):
        return (
            f"dilation {dilation} together with padding {padding}, with which torch can write outside of tensors; pad "
            "the images before it, with torch.nn.functional.pad(images, sizes, value=-torch.inf)"
        )
    return None


def _wrong_scale(given: dict[str, Any]) -> str | None:
    for key, value in given.items():
        scales = [each for part in value.values() for each in (part if isinstance(part, list) else [part])]
        in_bounds = [
            isinstance(each, int | float) and LEAST_SCALE <= each <= LARGEST_SCALE for each in scales
        ]
        if key.startswith("scale") and not (value.keys() <= CONSTANTS and all(in_bounds)):  # "NaN" is a text
            return f"{key} other than numbers from 1e-6 to 1e6; set the size in place of scale_factor"
    return None


def _wrong_heads(given: dict[str, Any]) -> str | None:
    if given.get("enable_gqa", {"as_none": True}) in ({"as_none": True}, {"as_bool": False}):
        return None
    return "enable_gqa, with which torch can divide by 0; repeat key and value instead"


CHECKS = {  # start of an operator's name -> check of its arguments
    "max_pool": _wrong_window,
    "scaled_dot_product": _wrong_heads,
    "upsample_": _wrong_scale,
    "_upsample_": _wrong_scale,
}


def _is_in_order(name: str, overload: str, inputs: list[dict[str, Any]]) -> bool:
    """Whether each input is the argument of its name: torch moves those by place forward over one that is left out."""
    kinds = {each["name"]: each["kind"] for each in inputs}
    arguments = [argument.name for argument in torch._C._get_schema(f"aten::{name}", overload).arguments]
    placed = [argument for argument in arguments if kinds.get(argument) == POSITIONAL]
    is_known = kinds.keys() <= set(arguments) and set(kinds.values()) <= {POSITIONAL, KEYWORD}
    return is_known and len(kinds) == len(inputs) and placed == arguments[: len(placed)]


def _numbers(tree: Any) -> Iterator[int | float]:
    """Yield the numbers in a tree of JSON, but those of graphs in it, whose nodes are inspected themselves."""
    if isinstance(tree, dict):
        tree = [value for key, value in tree.items() if key != "as_graph"]
    if isinstance(tree, list):
        for value in tree:
            yield from _numbers(value)
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield tree
