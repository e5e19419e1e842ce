"""Keeping the results of a block's expensive operators, and running the cheap ones again around them.

Convolutions and matrix products take nearly all of a block's time; what lies between them (normalisation, activations,
additions, pooling) takes nearly none and leaves as many activations. So between forward and backward the block keeps
its input and the results of its products alone; in the backward pass it runs again under autograd, each product handing
out the result that was kept (:mod:`edgetrain.nn.products`). Chen, Xu, Zhang, Guestrin 2016, "Training deep nets with
sublinear memory cost", section 4.2, drop the results of cheap operators in the same way.

Not every product is expensive for what its result holds: the last 1 x 1 convolution of a bottleneck takes a quarter of
the block's multiplications, and its result two thirds of these bytes. A result is kept if an element of it takes at
least half as many multiplications as one of the block's results does on average. Below 64 multiplications an element
counts as 64: the product then waits for memory, whatever it multiplies (at 5e10 operations and 6e9 bytes per second, a
core, 33 take as long as reading and writing an element of 4 bytes; at 1e13 and 5e11, a GPU, 80).

A result that an operator overwrites in place is not kept either: the product is computed again. So is one that does
not come in the same order as in the first pass, and every one after it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from edgetrain.nn.interception import unseen
from edgetrain.nn.products import Product, product_of

_LEAST_SHARE = 0.5
"""Of the mean length of a block's products, below which a result is not kept."""

_LEAST_LENGTH = 64
"""Multiplications for an element, in the time in which it is read and written."""


@dataclass
class _Kept:
    """The result of one call.

    Attributes:
        call: the function and the shapes of its factors.
        length: multiplications for each element of the result, or what counts as such.
        result: None if it is to be computed again.
        version: of the result when it was new.
    """

    call: tuple[Any, ...]
    length: float
    result: Tensor | None
    version: int

    def forget_if_overwritten(self) -> None:
        if self.result is not None and self.result._version != self.version:
            self.result = None


class Products:
    """The results of a block's products, in the order in which they were computed, and perhaps its output.

    :meth:`keeping` and :meth:`taking` go inside the contexts of :class:`edgetrain.nn.replay.Replay`, near to the
    call of the module: what they do not know themselves goes on to those.
    """

    def __init__(self) -> None:
        self._kept: deque[_Kept] = deque()
        self._output: tuple[Tensor, int] | None = None

    @property
    def storages(self) -> set[int]:
        """Of what is still here."""
        results = [kept.result for kept in self._kept]
        if self._output is not None:
            results.append(self._output[0])
        return {int(result.untyped_storage()._cdata) for result in results if result is not None}

    def keeping(self) -> TorchFunctionMode:
        """Inside, without autograd, every product leaves its result here until :meth:`choose` is called."""
        return _Keeping(self._kept)

    def choose(self, *, cheap: bool = False, dead: Sequence[bool] = (), output: Tensor | None = None) -> None:
        """Lets the results go that are not worth their memory.

        Args:
            cheap: whether those of cheap products stay.
            dead: for each product whether the next pass can do without; none by default.
            output: of the block, to be kept as well.
        """
        if len(dead) == len(self._kept):  # else the block took another course than when that was found out
            for kept, is_dead in zip(self._kept, dead, strict=True):
                kept.result = None if is_dead else kept.result
        if output is not None:
            self._output = output, output._version
        if cheap:
            return
        sizes = [(kept, kept.result.numel()) for kept in self._kept if kept.result is not None]
        mean = sum(kept.length * size for kept, size in sizes) / max(1, sum(size for _, size in sizes))
        for kept, _ in sizes:
            if kept.length < _LEAST_SHARE * mean:
                kept.result = None

    def pass_over(self) -> None:
        """The next product is not asked for."""
        if self._kept:
            self._kept.popleft()

    def take_output(self) -> Tensor | None:
        """The output, once, if it was kept and nobody has overwritten it."""
        found, self._output = self._output, None
        return None if found is None or found[0]._version != found[1] else found[0]

    def taking(self) -> TorchFunctionMode:
        """Inside, under autograd, every product takes its result from here and computes nothing."""
        return _Taking(self._kept)


class _Keeping(TorchFunctionMode):
    def __init__(self, kept: deque[_Kept]) -> None:
        super().__init__()
        self._kept = kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        with unseen():
            for kept in self._kept:
                kept.forget_if_overwritten()
            product = product_of(func, args, kwargs or {})
            if product is not None:
                length = max(_LEAST_LENGTH, product.length)
                self._kept.append(_Kept(_call(func, product), length, result, result._version))
        return result


class _Taking(TorchFunctionMode):
    def __init__(self, kept: deque[_Kept]) -> None:
        super().__init__()
        self._kept = kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with unseen():
            product = product_of(func, args, kwargs or {})
            if product is not None and self._kept:
                kept = self._kept.popleft()
                if kept.call != _call(func, product):
                    self._kept.clear()
                elif kept.result is not None:
                    return product.under_autograd(kept.result)
        return func(*args, **(kwargs or {}))


def _call(func: Any, product: Product) -> tuple[Any, ...]:
    return func, product.shapes
