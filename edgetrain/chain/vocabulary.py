"""What the names of torch's functions, methods and operators say about them.

A name that is missing costs a cut, never a wrong one: an unknown function may return anything and a view of its input.
"""

from __future__ import annotations


def _words(*lines: str) -> frozenset[str]:
    return frozenset(word for line in lines for word in line.split())


PYTHON = _words(
    "shape ndim dtype device layout is_cuda requires_grad size dim numel nelement stride storage_offset item tolist",
    "is_floating_point is_complex is_contiguous element_size get_device _assert len names itemsize nbytes",
)
"""Give Python values, or attributes that are some."""

TUPLES: frozenset[str] = _words(
    "chunk split tensor_split hsplit vsplit dsplit unbind topk sort kthvalue mode cummax cummin meshgrid unsafe_chunk",
    "unsafe_split split_with_sizes broadcast_tensors max_pool2d_with_indices svd qr slogdet frexp nonzero_tuple",
    "multi_head_attention_forward",
)
"""Give several tensors."""

RANDOM = _words(
    "rand randn randint randperm normal bernoulli multinomial poisson rand_like randn_like randint_like empty",
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout gumbel_softmax rrelu empty_like",
    "new_empty scaled_dot_product_attention fractional_max_pool2d uniform_ normal_ bernoulli_ random_",
)
"""Give other numbers each time."""

IN_PLACE_OPERATORS = _words("iadd isub imul itruediv ifloordiv imod ipow iand ior ixor imatmul setitem")
"""Write into their first argument, as do names that end in an underscore."""

FRESH = _words(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear bilinear embedding",
    "batch_norm layer_norm group_norm instance_norm rms_norm local_response_norm normalize",
    "relu relu6 leaky_relu elu selu celu gelu silu mish sigmoid logsigmoid tanh softplus softsign softmax log_softmax",
    "hardswish hardsigmoid hardtanh glu prelu threshold softmin tanhshrink hardshrink softshrink",
    "add sub mul truediv true_divide div floordiv floor_divide mod remainder fmod pow neg matmul bmm mm addmm baddbmm",
    "mv dot outer rsub subtract multiply divide abs exp log log2 log10 log1p expm1 sqrt rsqrt square reciprocal",
    "sin cos tan erf sign floor ceil round clamp clip maximum minimum where lerp addcmul addcdiv atan2 cumsum",
    "cat concat concatenate stack mean sum prod var std amax amin logsumexp norm clone roll flip masked_fill",
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d",
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d lp_pool2d interpolate upsample grid_sample",
    "scaled_dot_product_attention one_hot cross_entropy zeros_like ones_like full_like gt lt ge le eq ne invert",
    "new_zeros new_ones new_full repeat repeat_interleave index_select gather",
    "and_ or_ xor logical_and logical_or logical_not",
)
"""Give one tensor with memory of its own."""

MIXED = _words(
    "cat concat concatenate stack add sub mul truediv floordiv mod pow neg abs floor ceil round gt lt ge le eq ne",
    "and_ or_ xor invert sum matmul",
)
"""Of these, those whose first argument may be a Python value or several tensors."""

FRESH_LAYERS = frozenset(
    f"torch.nn.modules.{name}" for name in _words("conv batchnorm normalization pooling activation instancenorm linear")
)
"""Modules of torch in these files give new memory, ``Identity`` excepted."""

FUNCTIONAL_LAYERS = _words(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear bilinear embedding",
    "scaled_dot_product_attention multi_head_attention_forward",
)
"""Have a weight matrix or a kernel, or are an attention."""

FACTORIES = _words(
    "arange empty eye full linspace logspace normal ones rand randint randn randperm scalar_tensor tensor zeros",
    "as_tensor from_numpy tril_indices triu_indices hann_window hamming_window",
)
"""Make a tensor from none."""
