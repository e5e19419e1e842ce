"""Random programs with nested checkpoints, what a planner may emit and more, and small networks of every kind of block.

    run(a, b):      needs z[a] and, unless b is the end, g[b]; gives g[a] and leaves z[a]
      = leaf(a, b)  every block of a..b-1 forward in a mode of its own, the head at the end, then backward; or
      = split at k: block a keeps its input, those up to k-1 keep nothing; run(k, b); then run(a, k) again

A block is first passed once and recomputed as often as the splits around it say.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

import edgetrain
from edgetrain.chain import Block, Chain, chain_of
from edgetrain.nn import (
    BatchPool,
    ChannelPool,
    CouplingLayer,
    HybridBlock,
    InvertibleBatchNorm,
    InvertibleLeakyReLU,
    InvertibleSequential,
    ReversibleBlock,
)
from edgetrain.planner import Plan
from edgetrain.runtime import Backward, Forward, Free, Head, Instruction, Program, Recompute
from edgetrain.runtime.program import SELECTIVE, How, Keep

NESTED_SHAPE = (3, 3, 8, 8)


def nested_program(chain: Chain, input_shape: tuple[int, ...], seed: int) -> Program:
    """A program drawn at random; equal seeds give equal programs."""
    steps = _Writer(chain.blocks, random.Random(seed)).run(0, len(chain.blocks), first=True)
    return Program(tuple(block.name for block in chain.blocks), chain.shapes(input_shape), tuple(steps))


class _Writer:
    def __init__(self, blocks: Sequence[Block], draw: random.Random) -> None:
        self._blocks, self._draw = blocks, draw

    def run(self, a: int, b: int, *, first: bool) -> list[Instruction]:
        """Forward and backward through blocks a..b-1, as the head of this file says."""
        if b - a > 1 and self._draw.random() < 0.7 and self._blocks[a].allows("recompute"):
            return self._split(a, b, first=first)
        return self._leaf(a, b, first=first)

    def _split(self, a: int, b: int, *, first: bool) -> list[Instruction]:
        k = self._draw.randint(a + 1, b - 1)
        steps = self._pass(a, "input", first=first)
        if not first and k - a > 1:
            steps.append(Recompute(a + 1, k - 1, "nothing"))
        else:
            for j in range(a + 1, k):
                steps += self._pass(j, "nothing", first=first)
        steps += self.run(k, b, first=first)
        if self._draw.random() < 0.5:
            steps.append(Free(k))
        return steps + self.run(a, k, first=False)

    def _leaf(self, a: int, b: int, *, first: bool) -> list[Instruction]:
        keeps, hows = zip(*(self._mode(j) for j in range(a, b)), strict=True)
        steps: list[Instruction] = []
        for j, keep, how in zip(range(a, b), keeps, hows, strict=True):
            # z[b] of a repeated segment serves nothing but the inversion of its last block
            if first or j < b - 1 or how != "recompute" or self._draw.random() < 0.5:
                steps += self._pass(j, keep, first=first)
        if b == len(self._blocks) and first:
            steps.append(Head())
        for j, how in zip(reversed(range(a, b)), reversed(hows), strict=True):
            steps.append(Backward(j, how))
        return steps

    def _mode(self, j: int) -> tuple[Keep, How]:
        block = self._blocks[j]
        modes: list[tuple[Keep, How]] = [("all", "saved")]
        if block.allows("recompute"):
            modes.append(("input", "recompute"))
        for selective, keep in SELECTIVE.items():
            if block.allows(selective):
                modes.append((keep, selective))
        if block.allows("invert_selective"):
            modes += [("products_only", "invert_selective")] * 2
        for how in ("invert", "invert_layerwise"):
            if block.allows(how):
                modes += [("nothing", how), ("input", how)]
        return self._draw.choice(modes)

    def _pass(self, j: int, keep: Keep, *, first: bool) -> list[Instruction]:
        return [Forward(j, keep) if first else Recompute(j, j, keep)]


class Closed(nn.Module):
    """One block, whatever is inside."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def stateful(channels: int) -> nn.Sequential:
    return nn.Sequential(conv(channels, channels), nn.BatchNorm2d(channels), nn.Dropout(0.3), nn.ReLU(inplace=True))


def plain() -> nn.Sequential:
    return nn.Sequential(
        Closed(conv(3, 8), nn.BatchNorm2d(8)),
        nn.ReLU(inplace=True),
        nn.Dropout(0.2),
        Closed(nn.utils.parametrizations.spectral_norm(conv(8, 8)), nn.BatchNorm2d(8), nn.ReLU()),
        Closed(InvertibleBatchNorm(8), ReversibleBlock(stateful(4), HybridBlock(4))),
        nn.BatchNorm2d(8, momentum=0.3),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def reversible(*, exact: bool = False) -> nn.Sequential:
    return nn.Sequential(
        Closed(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU()),
        ReversibleBlock(stateful(4), stateful(4), exact=exact),
        HybridBlock(8, exact=exact),
        ChannelPool(),
        ReversibleBlock(CouplingLayer(16), stateful(16), exact=exact),
        ReversibleBlock(ReversibleBlock(stateful(8), stateful(8), exact=exact), CouplingLayer(16), exact=exact),
        BatchPool(),
        InvertibleBatchNorm(32),
        edgetrain.models.parts.Head(32, 10, parts=4),
    )


def invertible() -> nn.Sequential:
    return nn.Sequential(
        conv(3, 8),
        InvertibleBatchNorm(8),
        InvertibleLeakyReLU(0.5),
        CouplingLayer(8, slope=0.5),
        nn.Dropout(0.1),
        InvertibleSequential(a=CouplingLayer(8, slope=0.5), b=ReversibleBlock(stateful(4), stateful(4))),
        Closed(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
    )


class Cut(nn.Module):
    """No Sequential: cut into segments, one batch norm called in two of them, a size found once and used later."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.middle = conv(3, 8), nn.BatchNorm2d(8), conv(8, 8)
        self.reversible, self.hybrid = ReversibleBlock(stateful(4), stateful(4)), HybridBlock(8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        size = x.size(0)
        x = F.relu(self.norm(self.stem(x)))
        x = self.reversible(x)
        x = F.dropout(F.relu(self.norm(self.middle(x))), 0.2, self.training)
        x = self.hybrid(x)
        return self.fc(F.adaptive_avg_pool2d(x, 1).view(size, -1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "reversible": reversible,
    "exact": lambda: reversible(exact=True),
    "invertible": invertible,
    "cut": Cut,
}
"""By name: how to make it; x (n, 3, 8, 8) -> logits (n, 10)."""


def nested_plan(model: nn.Module, seed: int) -> Plan:
    chain = chain_of(model)
    count = len(chain.blocks)
    return Plan(("store",) * count, ("",) * count, nested_program(chain, NESTED_SHAPE, seed))
