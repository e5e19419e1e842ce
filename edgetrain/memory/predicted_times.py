"""Seconds of every instruction, from the work that its operators do and the rates of a device.

No clock and no device: the same costs and rates give the same times. :mod:`edgetrain.memory.measured_times` measures
the same; ``tools/step_prediction.py`` compares the two with whole steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgetrain.memory.costs import BlockCosts, Costs
from edgetrain.memory.rates import OperatorRates, rates_of
from edgetrain.memory.times import BlockTimes, Times

if TYPE_CHECKING:
    from edgetrain.profiles import Profile
    from edgetrain.profiles.profile import Precision


def predicted_times(costs: Costs, rates: Profile | OperatorRates, precision: Precision = "fp32") -> Times:
    """What every instruction takes on a device that need not be here.

    Args:
        costs: of the chain at the batch size of the step, measured with the optimiser that it is trained with.
        rates: of the device; of a profile those at ``precision`` are taken.

    Raises:
        UsageError: the profile does not say how fast the device is.
    """
    found = rates if isinstance(rates, OperatorRates) else rates_of(rates, precision)
    some_head = next(iter(costs.heads.values()))
    return Times(
        blocks=tuple(_block_times(block, found) for block in costs.blocks),
        head=found.seconds(costs.heads.get(None, some_head).work),
        copy_bytes_per_s=found.copy_bytes_per_s,
        rounding_bytes_per_s=found.rounding_bytes_per_s,
        source=f"rates of profile {found.name}",
        shapes=costs.shapes,
        element_bytes=costs.element_bytes,
        channels_last=costs.channels_last,
    )


def _block_times(block: BlockCosts, rates: OperatorRates) -> BlockTimes:
    def seconds(name: str) -> float | None:
        effect = block.usual(name)
        return None if effect is None else rates.seconds(effect.work)

    forward = seconds("forward input")
    in_place = seconds("forward nothing")
    assert in_place is not None
    return BlockTimes(
        forward=in_place if forward is None else forward,
        forward_all=seconds("forward all") or 0.0,
        backward_saved=seconds("backward saved after forward all") or 0.0,
        backward_recompute=seconds("backward recompute after input"),
        backward_invert=seconds("backward invert"),
        backward_invert_layerwise=seconds("backward invert_layerwise"),
        update=seconds("update") or 0.0,
        forward_in_place=in_place if block.invertible else None,
        forward_products=seconds("forward products"),
        backward_selective=seconds("backward selective after forward products"),
        forward_products_only=seconds("forward products_only"),
        backward_invert_selective=seconds("backward invert_selective after forward products_only"),
        forward_all_products=seconds("forward all_products"),
        backward_selective_all=seconds("backward selective_all after forward all_products"),
    )
