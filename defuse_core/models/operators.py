"""The operators of torch that files of TorchScript and torch.export may call: those that image classifiers are made of.

aten has some 1,700. Two touch files (`save`, `from_file`), and many trust sizes and indices that they get, and so
read or write anywhere: those that torch alone calls, of quantized and sparse tensors, of gradients, `lstm`, `gru` and
others. None of these is listed that was found. No list of names can make the kernels of torch free of bugs.
"""

from __future__ import annotations

import torch

LANGUAGE = """
Bool Complex ComplexImplicit Float FloatImplicit Int IntImplicit ScalarImplicit __and__ __contains__ __derive_index
__getitem__ __iand__ __ior__ __is__ __isnot__ __ixor__ __lshift__ __not__ __or__ __range_length
__round_to_zero_floordiv __rshift__ __xor__ _get_tracing_state _set_item _unwrap_optional append bin capitalize center
chr clear copy count degrees dict divmod endswith expandtabs extend fabs factorial find floordiv format gamma gcd get
hash hex insert isalnum isalpha isclose isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle
isupper items join keys len list ljust lower lstrip mathremainder modf oct ord partition percentFormat pop popitem
radians remove replace reverse rfind rindex rjust rpartition rsplit rstrip setdefault sorted split splitlines
startswith str strip swapcase title update upper values warn zfill
"""  # of numbers, texts, lists and dictionaries
ELEMENTWISE = """
abs absolute acos acosh add addcdiv addcmul angle arccos arccosh arcsin arcsinh arctan arctan2 arctanh asin asinh atan
atan2 atanh bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil celu clamp
clamp_max clamp_min clip complex conj conj_physical copysign cos cosh deg2rad digamma div divide elu eq erf erfc
erfinv exp exp2 expm1 fix float_power floor floor_divide fmax fmin fmod frac ge gelu glu greater greater_equal gt
hardshrink hardsigmoid hardswish hardtanh heaviside hypot i0 imag isfinite isin isinf isnan isneginf isposinf le
leaky_relu lerp less less_equal lgamma log log10 log1p log2 log_sigmoid logaddexp logaddexp2 logical_and logical_not
logical_or logical_xor logit lt masked_fill maximum minimum mish mul multiply nan_to_num ne neg negative not_equal
polar positive pow prelu rad2deg real reciprocal relu relu6 remainder resolve_conj resolve_neg round rrelu rsqrt rsub
selu sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink sqrt square sub subtract tan tanh threshold
true_divide trunc where xlogy
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
index_select mH mT masked_scatter masked_select matrix_H meshgrid moveaxis movedim narrow nonzero numpy_T one_hot
permute pixel_shuffle pixel_unshuffle ravel repeat repeat_interleave reshape reshape_as roll rot90 scatter scatter_add
scatter_reduce select select_scatter slice slice_scatter split_with_sizes squeeze stack swapaxes swapdims t take
take_along_dim tensor_split tile transpose tril triu unbind unflatten unfold unsafe_chunk unsafe_split
unsafe_split_with_sizes unsqueeze view view_as view_as_complex view_as_real vsplit vstack
"""  # and indices
TENSORS = """
_assert_async _assert_scalar _assert_tensor_metadata _local_scalar_dense _shape_as_tensor arange as_tensor bernoulli
can_cast clone cpu cuda detach device dim element_size empty empty_like exponential eye fill full full_like get_device
indices is_autocast_cpu_enabled is_autocast_enabled is_complex is_conj is_contiguous is_floating_point is_grad_enabled
is_inference is_neg is_nonzero is_same_size is_scripting is_signed item lift lift_fresh lift_fresh_copy linspace
logspace new_empty new_full new_ones new_zeros normal numel ones ones_like promote_types rand rand_like randint randn
randn_like randperm result_type scalar_tensor set_grad_enabled size storage_offset stride sym_constrain_range
sym_constrain_range_for_size sym_numel sym_size sym_storage_offset sym_stride tensor to tril_indices triu_indices
type_as uniform zero zeros zeros_like
"""  # properties, types, new tensors
LAYERS = """
_convolution _convolution_mode _native_multi_head_attention _nested_tensor_from_mask
_nested_tensor_from_mask_left_aligned _transformer_encoder_layer_fwd _upsample_nearest_exact1d
_upsample_nearest_exact2d _upsample_nearest_exact3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d addbmm addmm addmv addr affine_grid_generator
alpha_dropout avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm bilinear bmm cdist constant_pad_nd conv1d conv2d
conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution cosine_similarity cross dot dropout einsum
embedding feature_alpha_dropout feature_dropout fft_fft fft_fft2 fft_fftshift fft_ifft fft_ifft2 fft_ifftshift
fft_irfft fft_irfft2 fft_rfft fft_rfft2 ger grid_sampler group_norm inner instance_norm kron layer_norm linalg_cross
linear matmul max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices
mm mv outer pad pairwise_distance reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d
replication_pad2d replication_pad3d rms_norm scaled_dot_product_attention tensordot to_padded_tensor
upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d
upsample_trilinear3d vdot
"""  # and products
KNOWN_OPERATORS = frozenset(f"{LANGUAGE} {ELEMENTWISE} {REDUCTIONS} {SHAPES} {TENSORS} {LAYERS}".split())
# Arguments that operators write their result into: not all of them check that it is no tensor that they read,
# as div does, which scripts of torch.nn.functional.normalize call so.
WRITTEN = {"out", "out0", "out1", "indices", "values", "max_values", "min_indices"}
WITHOUT_OPERATOR = (
    "save the network without it (of weight_norm: torch.nn.utils.remove_weight_norm, or "
    "torch.nn.utils.parametrize.remove_parametrizations first), or give its function and weights "
    "(classifier.architecture: custom, import_path, weights)"
)


def is_harmless_operator(name: str) -> bool:
    """Whether a name is one of KNOWN_OPERATORS, also with the _ of those that work in place, or of none in aten."""
    is_known = name in KNOWN_OPERATORS or name.removesuffix("_") in KNOWN_OPERATORS
    return is_known or not torch._C._jit_get_operation(f"aten::{name}")[1]
