"""A model as a chain of blocks: z[0] -> block 0 -> z[1] -> ... -> z[L], one tensor between two blocks.

Nested ``torch.nn.Sequential`` containers are opened; everything else is one block. An activation that works in
place belongs to the block whose output it overwrites. What a block can do in
place of storing its activations follows from what it is; each refusal carries its reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from edgetrain.errors import ModelError
from edgetrain.nn import Invertible

Mode = Literal["store", "recompute", "invert", "invert_layerwise"]
"""How a block's backward pass comes by its activations."""

MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True)
class Block:
    """One block of a chain.

    Attributes:
        name: path of the module in the model, "" for the model itself.
        module: takes z[i] and gives z[i+1].
        refusals: mode -> why this block cannot do it.
    """

    name: str
    module: nn.Module
    refusals: dict[Mode, str]

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
        with FakeTensorMode() as fake, torch.no_grad(), torch.random.fork_rng(devices=[]):
            z = torch.empty(input_shape, dtype=dtype)
            for block in self.blocks:
                state: dict[str, torch.Tensor] = {
                    name: fake.from_tensor(value)
                    for name, value in [*block.module.named_parameters(), *block.module.named_buffers()]
                }
                saved = saved_state(block.module)
                try:
                    z = functional_call(block.module, state, (z.to(next(iter(state.values())).device) if state else z,))
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


def chain_of(model: nn.Module) -> Chain:
    """Cuts ``model`` into a chain of blocks.

    Raises:
        ModelError: the model is empty.
    """
    blocks = tuple(Block(name, module, _refusals(module)) for name, module in _leaves("", model))
    if not blocks:
        raise ModelError(
            found="a model without blocks", expected="at least one module", action="put layers into the Sequential"
        )
    return Chain(model, blocks)


def saved_state(module: nn.Module) -> list[tuple[Invertible, object | None]]:
    """What the last forward pass left in the invertible layers of ``module``."""
    return [(layer, layer.saved) for layer in module.modules() if isinstance(layer, Invertible)]


def restore_state(state: list[tuple[Invertible, object | None]]) -> None:
    """Puts back what :func:`saved_state` took."""
    for layer, saved in state:
        layer.saved = saved


def _leaves(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    # a hook on a container would be lost if the container were opened
    opened = type(module) is nn.Sequential and not (module._forward_hooks or module._forward_pre_hooks)
    if not opened:
        yield name, module
        return
    held: tuple[str, nn.Module] | None = None
    for child_name, child in module.named_children():
        for leaf_name, leaf in _leaves(f"{name}.{child_name}" if name else child_name, child):
            if held is not None and getattr(leaf, "inplace", False):
                held = (f"{held[0]}+{leaf_name.rpartition('.')[2]}", nn.Sequential(held[1], leaf))
                continue
            if held is not None:
                yield held
            held = leaf_name, leaf
    if held is not None:
        yield held


def _refusals(module: nn.Module) -> dict[Mode, str]:
    if not isinstance(module, Invertible):
        reason = f"{type(module).__name__} has no inverse"
        return {"invert": reason, "invert_layerwise": reason}
    if not module.layerwise:
        return {"invert_layerwise": "the modules inside have no inverse, so their hidden activations must be held"}
    return {}
