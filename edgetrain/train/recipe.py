"""The authors' training recipe (Hascoet, section 3.5): SGD with Nesterov momentum and a triangular learning rate.

50 epochs, batch 512, momentum 0.9, weight decay 5e-4, learning rate linear from 0 to 0.4 at a tenth of the run and
back to 0 at its end, for the mean loss of a batch. For another batch size the peak rate is scaled in proportion
(Goyal et al. 2017).

Weight decay leaves alone what a module declares in ``undecayed``, a tuple of the names of its own parameters: the
scales a and b of a Dirac weight, which it would pull to zero, where the layer ends (Zagoruyko, section 5.3.1).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgetrain.train.schedule import triangular_rate

REFERENCE_BATCH_SIZE = 512
REFERENCE_PEAK_RATE = 0.4


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        epochs: passes over the data.
        batch_size: samples per step.
        peak_rate: highest learning rate; None scales 0.4 at batch 512 to ``batch_size``.
        warmup: part of the run until it is reached.
        momentum: of SGD, Nesterov's form.
        weight_decay: of SGD, on every parameter but those of :func:`undecayed_parameters`.
        seed: of the weights, the order of the data and the augmentation.
    """

    epochs: int = 50
    batch_size: int = REFERENCE_BATCH_SIZE
    peak_rate: float | None = None
    warmup: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    seed: int = 0

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of step ``step`` of ``steps``."""
        return triangular_rate(step, steps, peak=self.highest_rate, warmup=self.warmup)

    @property
    def highest_rate(self) -> float:
        """``peak_rate``, or what follows from the batch size."""
        if self.peak_rate is not None:
            return self.peak_rate
        return REFERENCE_PEAK_RATE * self.batch_size / REFERENCE_BATCH_SIZE

    def optimizer(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        undecayed: Set[nn.Parameter] = frozenset(),
    ) -> torch.optim.SGD:
        """The optimiser; its fused form updates in place without temporaries.

        Args:
            parameters: or groups of them.
            undecayed: those among them that weight decay leaves alone.
        """
        return torch.optim.SGD(
            _groups(parameters, undecayed),
            lr=0.0,
            momentum=self.momentum,
            nesterov=True,
            weight_decay=self.weight_decay,
            fused=True,
        )

    def optimizer_for(self, model: nn.Module) -> Callable[..., torch.optim.SGD]:
        """:meth:`optimizer` for parameters of ``model``, in the groups that its modules ask for."""
        return functools.partial(self.optimizer, undecayed=undecayed_parameters(model))


def undecayed_parameters(model: nn.Module) -> frozenset[nn.Parameter]:
    """The parameters of ``model`` that its modules declare in ``undecayed``."""
    return frozenset(
        module.get_parameter(name) for module in model.modules() for name in getattr(module, "undecayed", ())
    )


def _groups(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], undecayed: Set[nn.Parameter]
) -> list[dict[str, Any]]:
    """The parameters, or each group of them, in two groups: with weight decay and without; none is empty."""
    given = list(parameters)
    grouped = [group for group in given if isinstance(group, dict)] or [{"params": given}]
    found = []
    for group in grouped:
        members = [group["params"]] if isinstance(group["params"], nn.Parameter) else list(group["params"])
        decayed = [parameter for parameter in members if parameter not in undecayed]
        found.append({**group, "params": decayed})
        found.append({**group, "params": [p for p in members if p in undecayed], "weight_decay": 0.0})
    return [group for group in found if group["params"]]
