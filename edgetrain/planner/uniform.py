"""One mode for all blocks that allow it, and what the others do instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import nn

from edgetrain.chain import Block, Mode

UniformMode = Literal["keep_all", "selective", "recompute", "invert", "invert_selective", "invert_layerwise"]
UNIFORM_MODES: tuple[UniformMode, ...] = get_args(UniformMode)


def decide(blocks: Sequence[Block], mode: UniformMode) -> list[tuple[Mode, str]]:
    """Mode and reason for each block."""
    wanted: Mode = "store" if mode == "keep_all" else mode
    return [_decide(block, wanted, first=i == 0, last=i == len(blocks) - 1) for i, block in enumerate(blocks)]


def _decide(block: Block, wanted: Mode, *, first: bool, last: bool) -> tuple[Mode, str]:
    again = wanted in ("selective", "recompute")
    if again and first and not _saves_more_than_input(block):
        return "store", "keeps nothing but the batch itself"
    if again and last:
        return "store", "its backward pass comes first: dropping and recomputing it would save nothing"
    if wanted == "selective" and not _saves_more_than_input(block):
        return "store", "keeps nothing but its input"
    if block.allows(wanted):
        return wanted, "asked for"
    if wanted in ("invert_layerwise", "invert_selective") and block.allows("invert"):
        return "invert", block.refusals[wanted]
    reason = block.refusals[wanted]
    if wanted == "selective" and block.allows("recompute"):
        return "recompute", reason
    if not block.has_parameters and block.allows("recompute"):
        return "recompute", f"{reason}; without parameters, recomputing it from its input costs little"
    return "store", reason


def _saves_more_than_input(block: Block) -> bool:
    return not isinstance(block.module, nn.Conv2d | nn.Linear)
