"""What each choice of what is trained costs in memory, before anything runs.

Two figures for a step of one batch, from a trace (:mod:`edgetrain.memory.estimate`): keeping everything, as plain
autograd does, and the leanest of the uniform modes, below which a plan that mixes modes may still come. Weights,
gradients, the optimiser's state and the batch are in them; what libraries take of a process is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from edgetrain.chain import parts_of
from edgetrain.memory.estimate import estimate
from edgetrain.nn import Invertible
from edgetrain.planner import SNR_LIMIT, UniformMode, uniform_plan
from edgetrain.planner.samples import mixing_layer, possible_counts
from edgetrain.runtime import wrap
from edgetrain.train.advice import LEAN, lean_mode
from edgetrain.train.recipe import Recipe


@dataclass(frozen=True)
class Price:
    """What one choice costs.

    Attributes:
        trained: the choice, as ``--train``.
        parameters: numbers that are trained.
        keep_all_bytes: peak of a step that keeps everything.
        least_bytes: peak of the leanest uniform mode, in ``parts`` micro-batches.
    """

    trained: str
    parameters: int
    keep_all_bytes: int
    least_bytes: int
    parts: int


def offered_choices(model: nn.Module, chosen: str) -> list[str]:
    """Choices to show beside each other, the dearest first: ``chosen`` is among them."""
    blocks = len(parts_of(model))
    offered = ["all", *(f"last:{n}" for n in dict.fromkeys((blocks // 2, blocks // 4)) if 1 < n < blocks)]
    if chosen.startswith("last:") and chosen not in offered:
        offered = sorted([*offered, chosen], key=lambda name: -int(name.partition(":")[2] or blocks + 1))
    return [*offered, "bias-norm", "head"]


def prices(
    make: Callable[[str], nn.Module],
    choices: Iterable[str],
    *,
    input_shape: tuple[int, int, int],
    recipe: Recipe,
    snr_limit: float = SNR_LIMIT,
) -> list[Price]:
    """The price of each of ``choices``.

    Args:
        make: makes the network for a choice.
        input_shape: (c, h, w).
        snr_limit: least ratio of signal to noise of what plans invert.
    """
    lean = lean_mode(snr_limit)
    return [_price(make(choice), choice, input_shape, recipe, lean) for choice in choices]


def _price(
    model: nn.Module, choice: str, input_shape: tuple[int, int, int], recipe: Recipe, lean: UniformMode
) -> Price:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradient_bytes = sum(p.numel() * p.element_size() for p in trained)
    sample_bytes = 4 * input_shape[0] * input_shape[1] * input_shape[2]
    optimizer = recipe.optimizer_for(model)

    def peak_bytes(samples: int, mode: UniformMode | None) -> int:
        def planned(module: nn.Module) -> nn.Module:
            assert mode is not None
            return wrap(module, uniform_plan(module, mode, input_shape=input_shape, batch_size=samples))

        return estimate(
            model,
            input_shape=input_shape,
            batch_size=samples,
            optimizer=optimizer,
            wrap=None if mode is None else planned,
        ).peak_bytes

    most = peak_bytes(recipe.batch_size, None)
    parts = 1 if mixing_layer(model) or lean != LEAN else possible_counts(recipe.batch_size)[-1]
    part = recipe.batch_size // parts
    # besides one part there are the others, and from the second on the gradients of the first
    standing_bytes = (recipe.batch_size - part) * sample_bytes + (gradient_bytes if parts > 1 else 0)
    modes: list[UniformMode] = ["recompute"]  # the leanest where nothing can be inverted
    if any(isinstance(module, Invertible) for module in model.modules()):
        modes.append(lean)
    least = min(most, *(peak_bytes(part, mode) + standing_bytes for mode in modes))
    return Price(choice, sum(p.numel() for p in trained), most, least, parts)
