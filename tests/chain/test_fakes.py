"""Our rules for what operators give, against what they give for real on the CPU, and what they leave to torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from edgetrain.chain.fake_rules import in_given_memory, rule_for
from edgetrain.chain.fakes import FakeTensor, fake_like, fake_mode
from edgetrain.chain.layer_rules import form_of

aten = torch.ops.aten
X, Y = torch.rand(2, 4, 6, 6) + 1, torch.rand(2, 4, 6, 6) + 1
LAST = X.to(memory_format=torch.channels_last)
HALF, PER_CHANNEL, CHANNELS = X[:, :2], torch.rand(1, 4, 1, 1), torch.rand(4)
EXPANDED = torch.rand(2, 4, 1, 1).expand(2, 4, 6, 6)
WEIGHT, WINDOW = torch.rand(8, 4, 3, 3), ([1, 1], [1, 1], [1, 1])
LOGITS, LABELS = torch.rand(5, 3), torch.tensor([0, 1, 2, 0, 1])
STATISTICS = (CHANNELS,) * 5

KNOWN: dict[str, tuple[Any, list[Any], dict[str, Any]]] = {
    "sum of two": (aten.add.Tensor, [X, Y], {}),
    "of two channels last": (aten.add.Tensor, [LAST, LAST], {}),
    "of a half": (aten.mul.Tensor, [HALF, HALF], {}),
    "of two halves of different strides": (aten.sub.Tensor, [HALF, HALF.contiguous()], {}),
    "with a factor per channel": (aten.mul.Tensor, [X, PER_CHANNEL], {}),
    "with a number": (aten.div.Tensor, [X, 2], {}),
    "of an expanded one": (aten.div.Scalar, [EXPANDED, 36], {}),
    "power": (aten.pow.Tensor_Scalar, [X, 2], {}),
    "root": (aten.rsqrt.default, [LAST], {}),
    "sign": (aten.sgn.default, [CHANNELS], {}),
    "activation backward": (aten.leaky_relu_backward.default, [X, Y, 0.1, True], {}),
    "rounded quotient": (aten.div.Tensor_mode, [LABELS, 2], {"rounding_mode": "floor"}),
    "like": (aten.empty_like.default, [LAST], {}),
    "like, contiguous": (aten.empty_like.default, [LAST], {"memory_format": torch.contiguous_format}),
    "like, another type": (aten.ones_like.default, [X], {"dtype": torch.bfloat16}),
    "mean": (aten.mean.dim, [X, [0, 2, 3]], {}),
    "mean that keeps dimensions": (aten.mean.dim, [LAST, [-1, -2], True], {}),
    "sum of all": (aten.sum.dim_IntList, [X, None], {}),
    "joined": (aten.cat.default, [[X, Y, X], 1], {}),
    "convolution": (aten.convolution.default, [X, WEIGHT, None, *WINDOW, False, [0, 0], 1], {}),
    "max pooling": (aten.max_pool2d_with_indices.default, [X, [3, 3], [2, 2], [1, 1]], {}),
    "batch norm": (aten.native_batch_norm.default, [X, CHANNELS, CHANNELS, None, None, True, 0.1, 1e-5], {}),
    "batch norm, frozen": (aten.native_batch_norm.default, [X, *(CHANNELS,) * 4, False, 0.1, 1e-5], {}),
    "batch norm backward": (
        aten.native_batch_norm_backward.default,
        [X, Y, *STATISTICS, True, 1e-5, [True, True, True]],
        {},
    ),
    "batch norm, sums alone": (
        aten.native_batch_norm_backward.default,
        [X, Y, *STATISTICS, False, 0.0, [False, True, True]],
        {},
    ),
    "product": (aten.mm.default, [LOGITS, LOGITS.t()], {}),
    "product and bias": (aten.addmm.default, [torch.rand(5), LOGITS, LOGITS.t()], {}),
    "logarithm": (aten._log_softmax.default, [LOGITS, 1, False], {}),
    "logarithm backward": (aten._log_softmax_backward_data.default, [LOGITS, LOGITS, 1, torch.float32], {}),
    "loss": (aten.nll_loss_forward.default, [LOGITS, LABELS, None, 1, -100], {}),
    "loss backward": (
        aten.nll_loss_backward.default,
        [torch.tensor(1.0), LOGITS, LABELS, None, 1, -100, torch.tensor(5.0)],
        {},
    ),
}
UNKNOWN: dict[str, tuple[Any, list[Any], dict[str, Any]]] = {
    "two layouts": (aten.add.Tensor, [X, LAST], {}),
    "two types": (aten.add.Tensor, [X, X.double()], {}),
    "the larger one last": (aten.add.Tensor, [PER_CHANNEL, X], {}),
    "complex": (aten.mul.Tensor, [X, 1j], {}),
    "integers": (aten.add.Tensor, [LABELS, LABELS], {}),
    "wrong channels": (aten.mm.default, [LOGITS, LOGITS], {}),
    "with ceiling": (aten.max_pool2d_with_indices.default, [X, [3, 3], [2, 2], [1, 1], [1, 1], True], {}),
}


def faked(value: Any) -> Any:
    if isinstance(value, Tensor):
        return fake_like(value)
    return [faked(item) for item in value] if isinstance(value, list) else value


def forms(result: Any) -> Any:
    if isinstance(result, Tensor):
        return form_of(result)
    return [None if tensor is None else form_of(tensor) for tensor in result]


@pytest.mark.parametrize("name", KNOWN)
def test_a_rule_gives_what_the_operator_gives(name: str) -> None:
    func, args, kwargs = KNOWN[name]
    real = forms(func(*args, **kwargs))
    with fake_mode():
        if func is not aten.convolution.default:  # whose layout is asked of torch first
            assert rule_for(func, faked(args), kwargs) == real
        for _ in range(2):  # found out, remembered
            result = func(*faked(args), **kwargs)
            made = [result] if isinstance(result, Tensor) else [tensor for tensor in result if tensor is not None]
            assert forms(result) == real
            assert all(isinstance(tensor, FakeTensor) for tensor in made)


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_cases_are_left_to_torch(name: str) -> None:
    func, args, kwargs = UNKNOWN[name]
    with fake_mode():
        assert rule_for(func, faked(args), kwargs) is None


def test_convolution_backward_in_both_layouts() -> None:
    for x in (X, LAST):
        y = aten.convolution.default(x, WEIGHT, None, *WINDOW, False, [0, 0], 1)
        for mask in ([True, True, True], [False, True, False]):
            arguments = [y, x, WEIGHT, [8], *WINDOW, False, [0, 0], 1, mask]
            real = aten.convolution_backward.default(*arguments)
            with fake_mode():
                made = aten.convolution_backward.default(*faked(arguments))
            assert [t is None for t in made] == [t is None for t in real]
            assert all(form_of(a)[0] == form_of(b)[0] for a, b in zip(made, real, strict=True) if a is not None)


def test_numbers_of_different_types_are_told_apart() -> None:
    with fake_mode():
        x = torch.ones(3, dtype=torch.int64)
        assert [(x * factor).dtype for factor in (1, 1.0, True, 1)] == [torch.int64, torch.float32, *[torch.int64] * 2]


def test_results_do_not_share_memory() -> None:
    with fake_mode():
        x = torch.ones(3)
        made = [x + 1 for _ in range(3)]
        assert len({t.untyped_storage()._cdata for t in [x, *made]}) == 4
        assert made[0].detach().untyped_storage()._cdata == made[0].untyped_storage()._cdata


def test_memory_that_was_given() -> None:
    given = fake_like(X)
    func = aten.leaky_relu_backward.grad_input
    assert in_given_memory(func, faked([X, Y, 0.1, True]), {"grad_input": given}) is given
    assert in_given_memory(aten.add_.Tensor, [given, 1], {}) is given
    assert in_given_memory(aten.add.Tensor, [given, 1], {}) is None
