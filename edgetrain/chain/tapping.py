"""A network with attention taps between its blocks: still a chain, which any plan runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from edgetrain.chain.chain import Block, Chain, Mode, SelfCut, block_of, chain_of
from edgetrain.errors import ModelError
from edgetrain.nn.attention import AttentionTap, Mapping
from edgetrain.nn.invertible import Invertible


@dataclass(frozen=True)
class Group:
    """The blocks of a chain that give activations of one resolution.

    Attributes:
        last: number of the last of them, after which the attention is looked at.
        size: (height, width) of its attention map, batch poolings undone.
        poolings: batch poolings before it.
    """

    last: int
    size: tuple[int, int]
    poolings: int


def groups_of(chain: Chain, input_shape: tuple[int, int, int]) -> tuple[Group, ...]:
    """The groups of ``chain`` for images (c, h, w), finest first; a single pixel is no map.

    The source looks at the "last pre-downsampling activation maps" and, at the top, at those before the pooling.
    """
    found: list[Group] = []
    for i, (n, *shape) in enumerate(chain.shapes((2, *input_shape))[1:]):
        if len(shape) != 3 or min(shape[1:]) < 2:
            continue
        poolings = round(math.log(n / 2, 4)) if n >= 2 else 0
        if 2 * 4**poolings != n:
            continue
        group = Group(i, (shape[1] << poolings, shape[2] << poolings), poolings)
        if found and found[-1].size == group.size:
            found.pop()
        found.append(group)
    return tuple(found)


class Tapped(SelfCut):
    """``model`` with an :class:`AttentionTap` after some of its blocks; in evaluation mode it is the model itself.

    Args:
        model: any module that is cut into blocks.
        groups: where.
        mapping, power: of all taps.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], *, mapping: Mapping = "sum", power: int = 2) -> None:
        super().__init__()
        self.model = model
        self.groups = tuple(groups)
        self.taps = nn.ModuleList(AttentionTap(mapping=mapping, power=power, poolings=g.poolings) for g in groups)
        self._blocks = self._place(chain_of(model).blocks)

    def blocks(self) -> tuple[Block, ...]:
        return self._blocks

    def forward(self, x: Tensor) -> Tensor:
        """What the model gives for ``x`` (n, c, h, w)."""
        if not self.training:
            y: Tensor = self.model(x)
            return y
        for block in self._blocks:
            x = block.module(x)
        return x

    def aim(self, targets: Sequence[Tensor]) -> None:
        """Gives each tap its target for the next step, (n, elements of its map)."""
        for tap, target in zip(self._own_taps(), targets, strict=True):
            tap.target, tap.term = target, None

    def release(self) -> None:
        """Drops the targets: the next forward pass takes no term."""
        for tap in self._own_taps():
            tap.target = tap.term = None

    def take_terms(self) -> Tensor:
        """The sum of the terms of the last forward pass, once.

        Raises:
            ModelError: there is none: the taps had no targets.
        """
        terms = [tap.term for tap in self._own_taps()]
        for tap in self._own_taps():
            tap.term = None
        found = [term for term in terms if term is not None]
        if len(found) != len(terms):
            raise ModelError(
                found="attention taps without a term",
                expected="targets before the forward pass, and one loss after it",
                action="call aim() with the teacher's maps before every forward pass",
            )
        return torch.stack(found).sum()

    def target_bytes(self, samples: int) -> int:
        """Of the targets for a batch, in float32."""
        return sum(4 * samples * math.prod(group.size) for group in self.groups)

    def _own_taps(self) -> list[AttentionTap]:
        return [tap for tap in self.taps if isinstance(tap, AttentionTap)]

    def _place(self, blocks: Sequence[Block]) -> tuple[Block, ...]:
        taps = {group.last: tap for group, tap in zip(self.groups, self._own_taps(), strict=True)}
        placed: list[Block] = []
        for i, block in enumerate(blocks):
            placed.append(block)
            if i in taps:
                following = blocks[i + 1] if i + 1 < len(blocks) else None
                placed.append(_tap_block(f"{block.name}+attention", taps[i], following))
        return tuple(placed)


def _tap_block(name: str, tap: AttentionTap, following: Block | None) -> Block:
    """A tap is inverted where that costs nothing: before a block that gives its input back."""
    block = block_of(name, tap)
    if following is not None and isinstance(following.module, Invertible):
        return block
    refusals: dict[Mode, str] = {
        mode: "the block after it keeps its input, which is the tap's too"
        for mode in ("invert", "invert_selective", "invert_layerwise")
    }
    return replace(block, refusals={**block.refusals, **refusals})
