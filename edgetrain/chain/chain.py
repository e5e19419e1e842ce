"""A model as a chain of blocks: z[0] -> block 0 -> z[1] -> ... -> z[L], one tensor between two blocks.

Nested ``torch.nn.Sequential`` containers are opened, a block for each module inside; any other module is cut where
one tensor alone is alive (:mod:`edgetrain.chain.cutting`). What cannot be cut is one block and says why. An
activation that works in place belongs to the block whose output it overwrites. Leading modules whose parameters are all
frozen belong to the first block that is trained: nothing asks for a gradient below it, so none is computed and nothing
is stored for one. What a block can do in place of storing its activations follows from what it is; each refusal carries
its reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from edgetrain.chain.cutting import Cutter
from edgetrain.chain.fakes import fake_like, fake_mode
from edgetrain.chain.pieces import Piece, name_of
from edgetrain.chain.segment import Note, Segment, join
from edgetrain.errors import ModelError
from edgetrain.nn import Invertible

Mode = Literal["store", "selective_all", "selective", "recompute", "invert", "invert_selective", "invert_layerwise"]
"""How a block's backward pass comes by its activations."""

MODES: tuple[Mode, ...] = get_args(Mode)
_SELECTIVE: tuple[Mode, ...] = ("selective", "selective_all")


@dataclass(frozen=True)
class Block:
    """One block of a chain.

    Attributes:
        name: path of the module in the model, "" for the model itself.
        module: takes z[i] and gives z[i+1].
        refusals: mode -> why this block cannot do it.
        uncut: why there is no cut inside; None where there is nothing to cut.
    """

    name: str
    module: nn.Module
    refusals: dict[Mode, str]
    uncut: str | None = None

    def allows(self, mode: Mode) -> bool:
        """Whether the backward pass can run in ``mode``."""
        return mode not in self.refusals

    @property
    def has_parameters(self) -> bool:
        """Whether there is anything to train in it."""
        return any(True for _ in self.module.parameters())


@dataclass(frozen=True)
class Chain:
    """The blocks of ``model``, first to last.

    Attributes:
        model: the module that was cut.
        blocks: at least one.
    """

    model: nn.Module
    blocks: tuple[Block, ...]

    def shapes(self, input_shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Shapes of z[0] ... z[L] for z[0] of ``input_shape`` (n, c, h, w), found without computing anything.

        Raises:
            ModelError: a block does not take what the one before gives; names the block.
        """
        dtype = next((p.dtype for p in self.model.parameters()), torch.float32)
        shapes: list[tuple[int, ...]] = [tuple(input_shape)]
        with torch.random.fork_rng(devices=[]), torch.no_grad(), fake_mode(), _ScalarsAreOne():
            z = torch.empty(input_shape, dtype=dtype)
            for block in self.blocks:
                state: dict[str, torch.Tensor] = {
                    name: fake_like(value)
                    for name, value in [*block.module.named_parameters(), *block.module.named_buffers()]
                }
                saved = saved_state(block.module)
                try:
                    z = functional_call(block.module, state, (z,))
                except ModelError:
                    raise
                except Exception as error:
                    raise ModelError(
                        found=f"block {block.name or type(block.module).__name__} fails on {shapes[-1]}: {error}",
                        expected="a block that takes the output of the one before it",
                        action="check the input size and the channel counts of the model",
                    ) from error
                finally:
                    restore_state(saved)
                if not isinstance(z, torch.Tensor):
                    raise ModelError(
                        found=f"block {block.name} gives {type(z).__name__}",
                        expected="one tensor",
                        action="wrap the model so that it returns the logits alone",
                    )
                shapes.append(tuple(z.shape))
        return tuple(shapes)


class SelfCut(nn.Module):
    """A module that says itself what its blocks are."""

    def blocks(self) -> tuple[Block, ...]:
        """At least one."""
        raise NotImplementedError


class Drawing(nn.Module):
    """A module that computes what ``drawn`` computes at the moment, and is cut as that is."""

    drawn: nn.Sequential

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.drawn(x)
        return y


def chain_of(model: nn.Module) -> Chain:
    """Cuts ``model`` into a chain of blocks. Nothing is attached to the model; parameters and buffers are shared.

    The blocks compute what the model computes in training and in evaluation mode, and run in order.

    Raises:
        ModelError: the model is empty.
    """
    blocks = model.blocks() if isinstance(model, SelfCut) else tuple(_blocks(model))
    if not blocks:
        raise ModelError(
            found="a model without blocks", expected="at least one module", action="put layers into the Sequential"
        )
    return Chain(model, blocks)


State = list[tuple[Invertible | Segment, Any]]


class _ScalarsAreOne(TorchDispatchMode):
    """Lets control flow that asks for the value of a fake tensor take the branch that a 1 takes."""

    def __init__(self, limit: int = 1000) -> None:
        super().__init__()
        self._left = limit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten._local_scalar_dense.default:
            return func(*args, **(kwargs or {}))
        self._left -= 1
        if self._left < 0:
            raise RuntimeError("a loop that ends only with data")
        dtype = args[0].dtype
        return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1


def saved_state(module: nn.Module) -> State:
    """What the last forward pass left in ``module`` for running it again."""
    return [(layer, layer.saved) for layer in module.modules() if isinstance(layer, Invertible | Segment)]


def restore_state(state: State) -> None:
    """Puts back what :func:`saved_state` took."""
    for layer, saved in state:
        layer.saved = saved


def block_of(name: str, module: nn.Module) -> Block:
    """``module`` as a block, with what it refuses to do."""
    return Block(name, module, _refusals(module))


def _blocks(model: nn.Module) -> Iterator[Block]:
    names: dict[str, int] = {}
    for i, part in enumerate(_join_frozen(parts_of(model))):
        names[part.name] = names.get(part.name, 0) + 1
        name = part.name if names[part.name] == 1 else f"{part.name}#{names[part.name]}"
        refusals = _refusals(part.module)
        if part.frozen:
            refusals["selective"] = refusals["selective_all"] = "its frozen modules need no results for a gradient"
        if i == 0 and part.overwrites:
            refusals["recompute"] = "it overwrites its input, from which it would be recomputed"
            for mode in _SELECTIVE:
                refusals.setdefault(mode, refusals["recompute"])
        yield Block(name, part.module, refusals, part.uncut)


@dataclass(frozen=True)
class Part:
    """A block before the frozen ones are joined.

    Attributes:
        overwrites: whether it writes to the memory of its input; ``fresh``: whether it begins in memory of its own.
        uncut: as in :class:`Block`.
        frozen: whether it begins with modules that are not trained.
    """

    name: str
    module: nn.Module
    overwrites: bool
    fresh: bool
    uncut: str | None
    frozen: bool = False


def parts_of(model: nn.Module) -> list[Part]:
    """The blocks of ``model`` as they are where everything is trained."""
    cutter, notes = Cutter(model), dict[Note, Any]()
    parts: list[Part] = []
    for path in _leaves("", model):
        for group in cutter.groups(path):
            parts.append(_part(model, group, notes))
            if parts[-1].overwrites:
                _join_last(parts)
    return parts


def _part(model: nn.Module, group: tuple[Piece, ...], notes: dict[Note, Any]) -> Part:
    only = group[0].module if len(group) == 1 else None
    module = Segment(model, [step for piece in group for step in piece.steps], notes) if only is None else None
    return Part(
        name_of(model, group),
        model.get_submodule(only) if module is None and only is not None else module or model,
        _overwrites(group),
        any(piece.fresh for piece in group),
        next((piece.uncut for piece in group if piece.uncut), None),
    )


def _overwrites(group: tuple[Piece, ...]) -> bool:
    """Whether memory of the input is written, perhaps through a view that an earlier piece has made."""
    for piece in group:
        if piece.overwrites or piece.fresh:
            return piece.overwrites
    return False


def _join_last(parts: list[Part]) -> None:
    """Joins the last part to the one whose memory it overwrites, and to all between."""
    while len(parts) > 1 and parts[-1].overwrites:
        last, before = parts.pop(), parts.pop()
        parts.append(
            Part(
                f"{before.name}+{last.name.rpartition('.')[2]}",
                nn.Sequential(before.module, last.module),
                before.overwrites or not before.fresh,
                before.fresh or last.fresh,
                before.uncut or last.uncut,
            )
        )


def _join_frozen(parts: list[Part]) -> list[Part]:
    """Joins leading parts without anything to train, where something is frozen in them, to the next."""
    trained = next((i for i, part in enumerate(parts) if any(p.requires_grad for p in part.module.parameters())), 0)
    first = parts[: trained + 1]
    if not any(True for part in first[:-1] for _ in part.module.parameters()):
        return parts
    joined = Part(
        f"{first[0].name}..{first[-1].name}",
        nn.Sequential(*(part.module for part in first)),
        first[0].overwrites,
        any(part.fresh for part in first),
        next((part.uncut for part in first if part.uncut), None),
        frozen=True,
    )
    return [joined, *parts[trained + 1 :]]


def _leaves(path: str, module: nn.Module) -> Iterator[str]:
    if isinstance(module, Drawing):
        path, module = join(path, "drawn"), module.drawn
    # a hook on a container would be lost if the container were opened
    if type(module) is not nn.Sequential or module._forward_hooks or module._forward_pre_hooks:
        yield path
        return
    for name, child in module._modules.items():
        if child is not None:
            yield from _leaves(join(path, name), child)


def _refusals(module: nn.Module) -> dict[Mode, str]:
    refusals: dict[Mode, str] = {}
    between = isinstance(module, Invertible) and module.between
    factors = [p for p in module.parameters() if is_lazy(p) or p.dim() > 1]
    if not between and any(isinstance(inner, Invertible) for inner in module.modules()):
        refusals = dict.fromkeys(_SELECTIVE, "its invertible layers come by their activations in better ways")
    elif not factors:
        reason = "no weights of a convolution or a matrix product, whose results could be kept"
        refusals = dict.fromkeys(_SELECTIVE, reason)
    elif between:
        refusals["selective_all"] = "it goes back from its input and output"
    elif len(factors) == 1:
        refusals["selective_all"] = "it has the weights of one convolution or matrix product alone"
    if not isinstance(module, Invertible):
        reason = f"{type(module).__name__} has no inverse"
        return {**refusals, "invert": reason, "invert_selective": reason, "invert_layerwise": reason}
    if not module.selective:
        refusals["invert_selective"] = "no ordinary modules inside whose results could be kept"
    if not module.layerwise:
        refusals["invert_layerwise"] = "the modules inside have no inverse, so their hidden activations must be held"
    return refusals
