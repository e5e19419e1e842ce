"""Training exactly K of N residual modules in each step (Veit, thesis ch. 4, on residual networks as ensembles).

A step runs a network in which, of the N_s interchangeable modules of stage s, only K_s stand, drawn anew each time and
in their order; the others are the identity, store nothing and are not updated. Interchangeable are modules that follow
each other, are built alike and preserve the shape; a module that changes it always runs. As the same number of each
stage is drawn, every draw is the same chain to a planner: one plan holds for all, and the peak does not vary.

**This changes training.** The whole network answers as the drawn ones do on average only if each residual branch is
scaled by the chance that it ran,

    x + F(x)  ->  x + K_s/N_s F(x),        y1 = x1 + K_s/N_s F(x2),  y2 = x2 + K_s/N_s G(y1)

and if the statistics of batch norm are taken again with the branches scaled. The scale goes into the weights of the
last layer of a branch (its batch norm), so what is deployed is a plain network of the same architecture; layers behind
that one must be positively homogeneous, as ReLU is.

Deviation: the source draws K of all modules; here of each stage, without which the peak would depend on the draw.
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgetrain.chain.chain import Block, Drawing, chain_of
from edgetrain.chain.freezing import is_frozen
from edgetrain.chain.knowledge import signature
from edgetrain.errors import ModelError, UsageError
from edgetrain.nn import InvertibleBatchNorm

Keep = str | float | Fraction | Sequence[int]
"""How many modules of each stage run: a part of each, ``"5/9"`` or 0.5, or their numbers, ``"5,4,4"`` or (5, 4, 4)."""


@dataclass(frozen=True)
class Stage:
    """Interchangeable modules.

    Attributes:
        names: their paths in the model, first to last.
        kept: how many of them run in a step.
        ends: paths inside each of the layers that end its residual branches.
    """

    names: tuple[str, ...]
    kept: int
    ends: tuple[str, ...]

    @property
    def scale(self) -> float:
        """Factor on the branches when all modules run."""
        return self.kept / len(self.names)


class SampledNetwork(Drawing):
    """The network of one step: ``model`` without the modules that were not drawn.

    It is planned, estimated and wrapped like any other; its parameters are all those of ``model``, so the weights and
    the optimiser state of skipped modules count. Plan and model keep their names whatever is drawn: ``stage1_0`` is the
    first of the drawn modules of stage 1.

    Args:
        model: any module whose chain has runs of equal residual modules; shared, not copied.
        keep: see :data:`Keep`; a part is rounded to the nearest number, at least one.
        input_shape: (c, h, w) of one sample.
        branch_ends: per type of residual module, the paths inside it of the last layers of its branches, such as
            ``{BasicBlock: ("bn2",)}``; modules of the zoo and reversible blocks say it themselves.
        seed: of the draws. A draw depends on seed and step alone: a run that goes on from a step draws the same.

    Attributes:
        model: the whole network.
        stages: whose modules are drawn.
        current: per stage, indices of the modules that stand; at first as those of step 0.

    Raises:
        ModelError: the model has no such modules, or ``branch_ends`` does not name the ends of all their branches.
        UsageError: ``keep`` is none, or does not go with the model.
    """

    def __init__(
        self,
        model: nn.Module,
        keep: Keep,
        *,
        input_shape: tuple[int, int, int],
        branch_ends: Mapping[type[nn.Module], Sequence[str]] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        chain = chain_of(model)
        shapes = chain.shapes((2, *input_shape))
        runs = _runs(model, chain.blocks, shapes, branch_ends or {})
        if not runs:
            raise ModelError(
                found=f"no two equal residual modules in a row in {type(model).__name__}",
                expected="stages of modules that preserve the shape and say where their branches end",
                action="choose a deeper network, or name the layers with branch_ends={Block: ('bn2',)}",
            )
        kept = _numbers(keep, [len(run) for run in runs])
        found = []
        for run, count in zip(runs, kept, strict=True):
            ends = _ends(chain.blocks[run[0]].module, branch_ends or {})
            _check_identity(chain.blocks[run[0]], ends, shapes[run[0]][1:])
            found.append(Stage(tuple(chain.blocks[i].name for i in run), count, ends))
        self.stages = tuple(found)
        self.seed = seed
        self.current: tuple[tuple[int, ...], ...] = ()
        skipped = {i for run, count in zip(runs, kept, strict=True) for i in run[count:]}
        sampled = {i: s for s, run in enumerate(runs) for i in run}
        self.drawn = nn.Sequential()
        self._places: list[list[str]] = [[] for _ in runs]
        for i, block in enumerate(chain.blocks):
            if i in skipped:
                continue
            name = block.name.replace(".", "_") or "model"
            while hasattr(self.drawn, name):
                name += "_"
            self.drawn.add_module(name, block.module)
            if i in sampled:
                self._places[sampled[i]].append(name)
        self.model = model  # after the places, so that a module that stands in one is found there
        self._check_blocks()
        self.draw(0)

    def draw(self, step: int) -> tuple[tuple[int, ...], ...]:
        """Puts the modules of ``step`` in place; gives their indices, rising, per stage."""
        numbers = random.Random(f"{self.seed} {step}")  # a text is hashed: near seeds draw independently
        draws = [sorted(numbers.sample(range(len(stage.names)), stage.kept)) for stage in self.stages]
        self.current = tuple(tuple(draw) for draw in draws)
        for stage, places, draw in zip(self.stages, self._places, self.current, strict=True):
            for place, index in zip(places, draw, strict=True):
                self.drawn._modules[place] = self.model.get_submodule(stage.names[index])
        return self.current

    def in_places(self, blocks: Sequence[Block]) -> tuple[Block, ...]:
        """``blocks`` of the chain of this network, whatever was drawn when it was cut, with what stands there now."""
        places = {f"drawn.{place}": place for stage in self._places for place in stage}
        return tuple(
            block if block.name not in places else replace(block, module=self.drawn.get_submodule(places[block.name]))
            for block in blocks
        )

    def members(self) -> list[nn.Module]:
        """All modules that can be drawn."""
        return [self.model.get_submodule(name) for stage in self.stages for name in stage.names]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained, for one optimiser: a group for each module that can be drawn, and one for the rest.

        A step finds gradients in all of a group or in none. Fused optimisers of torch need that: they refuse a group in
        which some parameters have momentum already and others do not.
        """
        groups = [[p for p in module.parameters() if p.requires_grad] for module in self.members()]
        drawn = {p for group in groups for p in group}
        rest = [p for p in self.model.parameters() if p.requires_grad and p not in drawn]
        return [{"params": group} for group in (rest, *groups) if group]

    @contextlib.contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """Inside, :attr:`model` has its branches scaled: to evaluate or export it during training."""
        before = [(p, p.detach().clone()) for end, _ in self._branches() for p in end.parameters(recurse=False)]
        try:
            self._scale()
            yield self.model
        finally:
            with torch.no_grad():
                for parameter, value in before:
                    parameter.copy_(value)

    def recalibrate(self, images: Iterable[Tensor]) -> None:
        """Batch norm's running statistics become those of the whole, scaled network, averaged over batches.

        Everything but batch norm works as in evaluation.

        Args:
            images: batches (n, c, h, w) of training data; a few dozen do.

        Raises:
            UsageError: no batch at all.
        """
        with self.whole():
            _recalibrate(self.model, images)

    def finish(self, images: Iterable[Tensor]) -> nn.Module:
        """Ends sampling: scales the branches for good and recalibrates; gives the whole network, ready to deploy.

        Args:
            images: as for :meth:`recalibrate`.
        """
        self._scale()
        _recalibrate(self.model, images)
        return self.model

    def extra_repr(self) -> str:
        return ", ".join(f"{stage.kept} of {len(stage.names)}" for stage in self.stages)

    def _branches(self) -> Iterator[tuple[nn.Module, float]]:
        for stage in self.stages:
            for name in stage.names:
                for end in stage.ends:
                    yield self.model.get_submodule(name).get_submodule(end), stage.scale

    def _scale(self) -> None:
        for end, scale in self._branches():
            _scale_output(end, scale)

    def _check_blocks(self) -> None:
        blocks = {block.name: block.module for block in chain_of(self).blocks}
        for stage, places in zip(self.stages, self._places, strict=True):
            for name, place in zip(stage.names, places, strict=False):
                if blocks.get(f"drawn.{place}") is not self.model.get_submodule(name):
                    raise ModelError(
                        found=f"{name}, which is no block of the chain by itself",
                        expected="a module that a draw can put in the place of another",
                        action="put the layers around it into modules of their own",
                    )


def _runs(
    model: nn.Module,
    blocks: Sequence[Block],
    shapes: Sequence[tuple[int, ...]],
    branch_ends: Mapping[type[nn.Module], Sequence[str]],
) -> list[list[int]]:
    """Indices of the interchangeable blocks, stage by stage."""
    modules = dict(model.named_modules())
    runs: list[list[int]] = []
    before = None
    for i, block in enumerate(blocks):
        alike = None
        if shapes[i] == shapes[i + 1] and modules.get(block.name) is block.module:
            ends = _ends(block.module, branch_ends)
            sizes = tuple((p.shape, p.dtype, p.requires_grad) for p in block.module.parameters())
            alike = (signature(block.module), sizes) if ends else None
        if alike is not None:
            if alike != before:
                runs.append([])
            runs[-1].append(i)
        before = alike
    return [run for run in runs if len(run) > 1]


def _ends(module: nn.Module, branch_ends: Mapping[type[nn.Module], Sequence[str]]) -> tuple[str, ...]:
    named = branch_ends.get(type(module))
    return tuple(getattr(module, "branch_ends", ()) if named is None else named)


def _check_identity(block: Block, ends: Sequence[str], shape: tuple[int, ...]) -> None:
    """With its branches scaled to nothing a module must be the identity, at least where no ReLU cuts."""
    module = copy.deepcopy(block.module).eval()
    try:
        for end in ends:
            _scale_output(module.get_submodule(end), 0.0)
    except AttributeError as error:
        raise ModelError(
            found=f"no layer {end} in {block.name}",
            expected="paths of layers inside the module",
            action="correct branch_ends",
        ) from error
    like = next(module.parameters())
    x = torch.linspace(0.5, 1.5, math.prod(shape), dtype=like.dtype, device=like.device).reshape(1, *shape)
    with torch.no_grad():
        y = module(x.clone())
    if not torch.allclose(y, x, rtol=1e-4, atol=1e-4):
        raise ModelError(
            found=f"{block.name}, which is not the identity when {', '.join(ends)} give nothing",
            expected="a residual module, and the last layer of each of its branches",
            action="name these layers in branch_ends; a module without a plain shortcut cannot be skipped",
        )


@torch.no_grad()
def _scale_output(layer: nn.Module, scale: float) -> None:
    """Multiplies what ``layer`` gives by ``scale``, in its weights."""
    for name, parameter in layer.named_parameters(recurse=False):
        # an invertible batch norm multiplies by |weight + eps_i|
        shift = layer.eps_i if isinstance(layer, InvertibleBatchNorm) and name == "weight" else 0.0
        parameter.add_(shift).mul_(scale).sub_(shift)


@torch.no_grad()
def _recalibrate(model: nn.Module, images: Iterable[Tensor]) -> None:
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm | InvertibleBatchNorm) and not is_frozen(m)]
    if not norms:
        return
    momenta, modes = [norm.momentum for norm in norms], [(m, m.training) for m in model.modules()]
    model.eval()
    seen = 0
    try:
        for norm in norms:
            norm.training = True
        for batch in images:
            seen += 1
            for norm in norms:
                norm.momentum = 1.0 / seen  # the mean of all batches so far
            model(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode
    if not seen:
        raise UsageError(
            found="no batch to take batch norm's statistics from",
            expected="training data",
            action="pass the images of some training batches, (n, c, h, w) each",
        )


def _numbers(keep: Keep, counts: Sequence[int]) -> list[int]:
    """K_s of each stage of ``counts`` modules."""
    wrong = UsageError(
        found=f"{keep!r} modules to sample",
        expected=f"a part above 0 and up to 1, or a number for each of {len(counts)} stages of "
        + ", ".join(map(str, counts)),
        action=f"write 1/2, or {','.join(str(-(-n // 2)) for n in counts)}",
    )
    try:
        if isinstance(keep, str) and "," in keep:
            keep = [int(part) for part in keep.split(",")]
        if isinstance(keep, str | float | int | Fraction):
            part = Fraction(keep)
            if not 0 < part <= 1:
                raise wrong
            return [max(1, math.floor(part * n + Fraction(1, 2))) for n in counts]
        numbers = [int(n) for n in keep]
    except (ValueError, ZeroDivisionError, OverflowError, TypeError) as error:
        raise wrong from error
    if len(numbers) != len(counts) or not all(1 <= k <= n for k, n in zip(numbers, counts, strict=True)):
        raise wrong
    return numbers
