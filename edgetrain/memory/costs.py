"""The memory of a chain of blocks, instruction by instruction, measured once under fake tensors.

From it :func:`edgetrain.memory.simulate` rates any Program of the chain. Each block runs each instruction that it
allows, alone (:mod:`edgetrain.memory.bench`); blocks that are equal in structure and shapes share what one of them
shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from edgetrain.chain import chain_of
from edgetrain.chain.fakes import fake_mode, spare_the_compiler
from edgetrain.errors import EdgetrainError, ModelError
from edgetrain.memory.bench import Form, History, layout_of
from edgetrain.memory.effects import Effect, Key, Layout
from edgetrain.memory.operators import DeviceKind, InnerAllocations
from edgetrain.memory.step import (
    Loss,
    OptimizerFactory,
    classification_loss,
    classify_resident,
    create_state,
    explained,
    fake_model,
    optimizer_factory,
)
from edgetrain.memory.survey import Survey, observe_update
from edgetrain.memory.timeline import numbered_events
from edgetrain.memory.trace import Kind, Recorder
from edgetrain.nn.invertible import Invertible, keeps_layout
from edgetrain.nn.layouts import with_channels_last
from edgetrain.nn.slices import abridged_slices
from edgetrain.runtime.program import SELECTIVE, Selective


@dataclass(frozen=True)
class BlockCosts:
    """One block.

    Attributes:
        invertible: whether it runs in the memory of its input.
        gradient_bytes: of its parameters, those of later blocks left out.
        effects: of the instructions it allows.
        channels_last: as of the :class:`Costs`.
        keeps_layout: whether it is invertible with channels last too.
    """

    name: str
    invertible: bool
    gradient_bytes: int
    effects: Mapping[Key, Effect]
    channels_last: bool = False
    keeps_layout: bool = False

    @property
    def inverts_in_layout(self) -> bool:
        """Whether what follows comes laid out as it would if the block were stored, however it is inverted."""
        if not self.invertible or not self.channels_last or self.keeps_layout:
            return True
        stored = self.usual("forward all")
        return stored is not None and all(o.layout is None for o in stored.outputs if o.name == "y")

    @property
    def saved_bytes(self) -> int:
        """What ``forward all`` leaves besides its output; its input does not count, held or not."""
        return self._left_by("forward all")

    def products_bytes(self, how: Selective) -> int:
        """Likewise of the forward pass before ``how``, for a block that allows it."""
        return self._left_by(f"forward {SELECTIVE[how]}")

    @property
    def products_only_bytes(self) -> int:
        """Likewise of ``forward products_only``."""
        return self._left_by("forward products_only")

    def _left_by(self, name: str) -> int:
        effect = self.usual(name)
        if effect is None:
            raise _unknown(self, name)
        return effect.net_bytes - sum(o.nbytes for o in effect.outputs if o.inside is None)

    def usual(self, name: str) -> Effect | None:
        """The effect of an instruction by its name alone, on tensors as they mostly come; None where it has none.

        That is row by row, or else with channels last.
        """
        found = [(key, effect) for key, effect in self.effects.items() if key[0] == name]
        sign = -1 if self.channels_last else 1
        return min(found, key=lambda pair: sign * sum(o is not None for o in pair[0][1:]), default=("", None))[1]

    def effect(self, key: Key) -> Effect:
        """The effect of an instruction.

        Raises:
            ModelError: the block cannot run it.
        """
        found = self.effects.get(key)
        if found is None:
            raise _unknown(self, key[0])
        return found


def _unknown(block: BlockCosts, name: str) -> ModelError:
    return ModelError(
        found=f"instruction {name!r} for block {block.name!r}",
        expected="one of " + ", ".join(sorted({name for name, _, _ in block.effects})),
        action="give the block a mode that it allows",
    )


@dataclass(frozen=True)
class Costs:
    """A chain at one batch size, exactly: slices and workspaces are not affine in the batch, so measure each one.

    Attributes:
        shapes: of z[0] ... z[L], batch first.
        dtypes: of z[0] ... z[L].
        device: whose operators were assumed.
        weight_bytes: parameters and buffers.
        optimizer_bytes: state of the optimiser.
        update_bytes: temporaries of one step of the optimiser over all parameters.
        heads: the caller's loss, by the layout of z[L].
        channels_last: as of the Program.
        draws_by_layout: whether random numbers are drawn for whole activations: which of them goes where depends on how
            these are laid out.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    device: DeviceKind
    weight_bytes: int
    optimizer_bytes: int
    update_bytes: int
    blocks: tuple[BlockCosts, ...]
    heads: Mapping[Layout, Effect]
    channels_last: bool = False
    draws_by_layout: bool = False

    @property
    def batch_size(self) -> int:
        """Samples in a step."""
        return self.shapes[0][0]

    @property
    def input_layout(self) -> Layout:
        """Of z[0]; where it is not row by row, z[0] is a copy of the batch."""
        return _batch_layout(self.shapes[0]) if self.channels_last else None

    @property
    def element_bytes(self) -> tuple[int, ...]:
        """Of one element of z[0] ... z[L]."""
        return tuple(dtype.itemsize for dtype in self.dtypes)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the blocks."""
        return tuple(block.name for block in self.blocks)

    @property
    def gradient_bytes(self) -> int:
        """Of all parameters."""
        return sum(block.gradient_bytes for block in self.blocks)


def measure_costs(
    model: nn.Module | Callable[[], nn.Module],
    *,
    input_shape: tuple[int, ...],
    batch_size: int,
    dtype: torch.dtype = torch.float32,
    optimizer: str | OptimizerFactory | None = "sgd",
    loss: Loss = classification_loss,
    device: DeviceKind = "cpu",
    measured: bool = True,
    channels_last: bool = False,
) -> Costs:
    """What every instruction of any Program of ``model`` does to memory.

    Args:
        model: a module, which is left alone, or a function that makes one without arguments.
        input_shape: of one sample, (c, h, w).
        dtype: of weights and batch.
        optimizer: a name of :data:`edgetrain.memory.OPTIMIZERS`, a function of the parameters, or None.
        loss: from the model's output.
        measured: whether convolutions may be run here on a few samples, to see what they take inside (CPU only).
        channels_last: of Programs whose z[0] has its channels last.

    Raises:
        ModelError: a block cannot run without data; names the module.
        UsageError: an unknown optimiser.
    """
    spare_the_compiler(torch.optim.Optimizer.add_param_group)
    factory = None if optimizer is None else optimizer_factory(optimizer)
    mode = fake_mode()
    recorder = Recorder()
    fake = fake_model(model, mode, dtype)
    with torch.random.fork_rng(devices=[]), mode, abridged_slices(device), recorder.naming(fake):
        try:
            stepper = None if factory is None else factory([p for p in fake.parameters() if p.requires_grad])
            if stepper is not None:
                create_state(stepper, recorder)
            shape = (batch_size, *input_shape)
            batch = Form(shape, dtype, _batch_layout(shape) if channels_last else None)
            classify_resident(recorder, fake, stepper, batch.make())
            with recorder, torch.no_grad():
                survey = Survey(chain_of(fake), recorder, batch, factory)
                survey.run(loss)
                update = observe_update(fake, stepper, recorder)
        except EdgetrainError:
            raise
        except Exception as error:
            raise explained(error, recorder, fake) from error
    trace = recorder.finish()
    events = list(numbered_events(trace, InnerAllocations(trace.calls, device, measured=measured)))
    history = History(events, survey.observations(), trace.calls, first_inner=len(trace.blocks))
    resident = Counter[Kind]()
    for number in trace.resident:
        resident[trace.blocks[number].kind] += trace.blocks[number].nbytes
    per_block = zip(survey.blocks, survey.gradient_bytes(), survey.effects(history), strict=True)
    return Costs(
        shapes=tuple(form.shape for form in survey.forms),
        dtypes=tuple(form.dtype for form in survey.forms),
        device=device,
        weight_bytes=resident["weights"],
        optimizer_bytes=resident["optimizer"],
        update_bytes=history.peak_between(*update),
        blocks=tuple(
            BlockCosts(
                block.name,
                isinstance(block.module, Invertible),
                gradient_bytes,
                effects,
                channels_last,
                keeps_layout(block.module),
            )
            for block, gradient_bytes, effects in per_block
        ),
        heads={layout: history.effect(seen) for layout, seen in survey.heads.items()},
        channels_last=channels_last,
        draws_by_layout=trace.draws_by_layout,
    )


def _batch_layout(shape: tuple[int, ...]) -> Layout:
    """Of a batch with channels last, None where that is row by row too."""
    return layout_of(with_channels_last(torch.empty(shape, device="meta")))
