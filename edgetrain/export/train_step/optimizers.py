"""The optimisers' updates as nodes, with the formulas of torch's.

SGD (Sutskever et al. 2013 in torch's form, no dampening), g with the weight decay added:
    m' = mu m + g;   w' = w - lr (g + mu m')  with Nesterov's look-ahead, else  w - lr m'
AdamW (Loshchilov, Hutter 2019), t counted from 1:
    m' = m + (1 - b1)(g - m);  v' = b2 v + (1 - b2) g^2;
    w' = w (1 - lr wd) - lr / (1 - b1^t) m' / (sqrt(v') / sqrt(1 - b2^t) + eps)

Each new value is the last node that reads its old one and works element by element, so that a runtime may be given the
old one's memory for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from edgetrain.export.train_step.graph import Value
from edgetrain.export.train_step.recorder import Recorder
from edgetrain.export.train_step.rules.elementwise import binary, unary

State = dict[str, tuple[Value, Value]]
"""By key of the optimiser's state: the value before and after the step."""


class OptimizerSpec(Protocol):
    """An optimiser that a graph can step."""

    @property
    def name(self) -> str:
        """As it stands in the manifest."""
        ...

    @property
    def keys(self) -> tuple[str, ...]:
        """Of the state that each parameter has, of its shape and zero before the first step."""
        ...

    @property
    def counts(self) -> bool:
        """Whether an update depends on the number of the step."""
        ...

    def update(self, step: Step, weight: Value, gradient: Value, state: dict[str, Value], *, decayed: bool) -> Updated:
        """The values after the step."""
        ...


@dataclass(frozen=True)
class Updated:
    """A parameter after a step, and its part of the optimiser's state."""

    weight: Value
    state: dict[str, Value]


@dataclass(frozen=True)
class Step:
    """What all parameters share.

    Attributes:
        rate: learning rate, a number.
        number: of the step, from 1, a number; None where the optimiser does not count.
    """

    recorder: Recorder
    rate: Value
    number: Value | None


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent."""

    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = True
    name: str = "sgd"
    counts: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.momentum else ()

    def update(self, step: Step, weight: Value, gradient: Value, state: dict[str, Value], *, decayed: bool) -> Updated:
        r, new = step.recorder, {}
        if decayed and self.weight_decay:
            decay = binary(r, "Mul", weight, r.number(self.weight_decay, weight.dtype))
            gradient = binary(r, "Add", gradient, decay)
        if self.momentum:
            mu = r.number(self.momentum, weight.dtype)
            moved = binary(r, "Add", binary(r, "Mul", state["momentum_buffer"], mu), gradient)
            new["momentum_buffer"] = moved
            gradient = binary(r, "Add", gradient, binary(r, "Mul", moved, mu)) if self.nesterov else moved
        return Updated(binary(r, "Sub", weight, binary(r, "Mul", gradient, step.rate)), new)


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2
    name: str = "adamw"
    counts: bool = True
    keys: tuple[str, ...] = ("exp_avg", "exp_avg_sq")

    def update(self, step: Step, weight: Value, gradient: Value, state: dict[str, Value], *, decayed: bool) -> Updated:
        r, one = step.recorder, step.recorder.number(1, weight.dtype)
        count = step.number
        assert count is not None

        def number(value: float) -> Value:
            return r.number(value, weight.dtype)

        def correction(beta: float) -> Value:
            return binary(r, "Sub", one, binary(r, "Pow", number(beta), count))

        first, second = state["exp_avg"], state["exp_avg_sq"]
        square = binary(r, "Mul", binary(r, "Mul", gradient, gradient), number(1 - self.beta2))
        second = binary(r, "Add", binary(r, "Mul", second, number(self.beta2)), square)
        towards = binary(r, "Mul", binary(r, "Sub", gradient, first), number(1 - self.beta1))
        first = binary(r, "Add", first, towards)
        root = binary(r, "Div", unary(r, "Sqrt", second), unary(r, "Sqrt", correction(self.beta2)))
        size = binary(r, "Div", step.rate, correction(self.beta1))
        change = binary(r, "Mul", binary(r, "Div", first, binary(r, "Add", root, number(self.eps))), size)
        if decayed and self.weight_decay:
            kept = binary(r, "Sub", one, binary(r, "Mul", step.rate, number(self.weight_decay)))
            weight = binary(r, "Mul", weight, kept)
        return Updated(binary(r, "Sub", weight, change), {"exp_avg": first, "exp_avg_sq": second})


OPTIMIZERS: dict[str, Callable[[], OptimizerSpec]] = {"sgd": SGD, "adamw": AdamW}
"""By the name that ``--optimizer`` takes."""
