"""Every instruction on every block of a chain, each once: what :func:`edgetrain.memory.measure_costs` is made from.

A block runs short sequences that begin with its forward pass, as if it were all of the step. Gradients and activations
that come in another layout than row by row make an operator copy, so each layout that occurs is tried.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from edgetrain.chain import Block, Chain, restore_state, saved_state
from edgetrain.memory.bench import Bench, Form, Given, History, Observation, layout_of
from edgetrain.memory.effects import Effect, Key, Layout, Operand, first_pass, key_of, owned_layout
from edgetrain.memory.fingerprint import fingerprint
from edgetrain.memory.step import Loss, OptimizerFactory, create_state, update_parameters
from edgetrain.memory.trace import Recorder
from edgetrain.nn.invertible import Invertible, keeps_layout
from edgetrain.runtime.program import DROPPING, SELECTIVE, Backward, Forward, Recompute, Update


@dataclass
class _Kind:
    """Blocks that are equal in structure and shapes.

    Attributes:
        seen: layouts of z[i] and g[i+1] that were tried.
    """

    observations: dict[Key, Observation] = field(default_factory=dict)
    seen: set[tuple[Layout, Layout]] = field(default_factory=set)
    gradient_bytes: int = 0


class Survey:
    """Runs every instruction of every kind of block once for every layout of its operands that can occur.

    Attributes:
        blocks: of the chain.
        forms: of z[0] ... z[L].
        heads: the loss, by the layout of z[L].
    """

    def __init__(self, chain: Chain, recorder: Recorder, batch: Form, optimizer: OptimizerFactory | None) -> None:
        self.blocks, self._recorder, self._optimizer = chain.blocks, recorder, optimizer
        self.forms = [batch]
        self._initial = [saved_state(block.module) for block in self.blocks]
        self._prints = [fingerprint(block.module, i) for i, block in enumerate(self.blocks)]
        users = [(p, i) for i, block in enumerate(self.blocks) for p in block.module.parameters()]
        self._first, self._last = dict(reversed(users)), dict(users)
        self._kinds: dict[Any, _Kind] = {}
        self._of_block: list[_Kind] = []
        self.heads: dict[Layout, Observation] = {}

    def run(self, loss: Loss) -> None:
        """Forward through the chain, the head, and back for gradients that are not contiguous."""
        count = len(self.blocks)
        first = {None} if count and keeps_layout(self.blocks[0].module) else set()
        inputs: list[set[Layout]] = [{self.forms[0].layout, *first}]
        for i in range(count):
            self._of_block.append(self._kind(i))
            for layout in inputs[i]:
                self._observe(i, layout, None)
            form, layouts = _outputs(self._of_block[i], "y")
            self.forms.append(form)
            # what comes back from an inverse may be contiguous, and then what comes back from that of the block before
            inverted = isinstance(self.blocks[i].module, Invertible)
            inverted |= i + 1 < count and keeps_layout(self.blocks[i + 1].module)
            inputs.append(layouts if self.forms[0].layout is not None and not inverted else {None, *layouts})
        gradients: set[Layout] = set()
        for layout in inputs[count]:
            self.heads[layout] = _observe_head(replace(self.forms[count], layout=layout), loss, self._recorder)
            gradients.add(self.heads[layout].outputs["dy"].form.layout)
        for i in reversed(range(count)):
            for layout in inputs[i]:
                for gradient in gradients:
                    self._observe(i, layout, gradient)
            gradients = _outputs(self._of_block[i], "dx")[1] if i else set()

    def observations(self) -> list[Observation]:
        """All of them."""
        return [seen for kind in self._kinds.values() for seen in kind.observations.values()] + [*self.heads.values()]

    def effects(self, history: History) -> list[dict[Key, Effect]]:
        """What each block's instructions do to memory; equal blocks have the same dictionary."""
        found = {
            id(kind): {key: history.effect(seen) for key, seen in kind.observations.items()}
            for kind in self._kinds.values()
        }
        return [found[id(kind)] for kind in self._of_block]

    def gradient_bytes(self) -> list[int]:
        """Of each block's parameters, those of later blocks left out."""
        return [kind.gradient_bytes for kind in self._of_block]

    def _kind(self, i: int) -> _Kind:
        overwritten = i + 1 < len(self.blocks) and isinstance(self.blocks[i + 1].module, Invertible)
        ties = tuple((self._first[p] < i, self._last[p] > i) for p in self.blocks[i].module.parameters())
        key = self._prints[i], i == 0, overwritten, self.forms[i].shape, self.forms[i].dtype, ties
        return self._kinds.setdefault(key, _Kind())

    def _observe(self, i: int, x: Layout, dy: Layout) -> None:
        kind = self._of_block[i]
        if (x, dy) in kind.seen:
            return
        kind.seen.add((x, dy))
        for sequence in _sequences(self.blocks[i], i):
            self._observe_sequence(i, sequence, x, dy)

    def _observe_sequence(self, i: int, sequence: list[_Step], x_layout: Layout, dy_layout: Layout) -> None:
        """Runs ``sequence``, from a forward pass on, as if it were all of the step."""
        block, kind, x = self.blocks[i], self._of_block[i], replace(self.forms[i], layout=x_layout)
        keeps = keeps_layout(block.module)
        restore_state(self._initial[i])
        stepper = self._stepper(i)
        bench = Bench(self.blocks, self._recorder, update=functools.partial(self._update, stepper))
        first, stored_by, y = "", "", x
        for step in sequence:
            if isinstance(step, Forward | Recompute):
                in_place = step.keep in DROPPING and isinstance(block.module, Invertible)
                given = replace(x, layout=owned_layout(x.shape, x_layout, keeps=keeps)) if in_place else x
                if isinstance(step, Forward):
                    first = first_pass(step.keep)
                    key = key_of(f"forward {step.keep}", x=given.layout)
                else:
                    key = key_of(f"recompute {step.keep}", after=first, x=given.layout)
                if step.keep not in ("input", "nothing"):
                    stored_by = key[0]
                seen = bench.observe(key, step, x=given)
                y = seen.outputs["y"].form
                y = replace(y, layout=owned_layout(y.shape, y.layout, keeps=keeps))
            elif isinstance(step, Backward):
                self._clear_gradients(i)
                before = self._gradient_bytes(i)
                dy = replace(y, layout=dy_layout)
                if step.how == "saved":
                    seen = bench.observe(
                        key_of("backward saved", after=stored_by, x=x_layout, dy=dy_layout), step, dy=dy
                    )
                elif step.how in SELECTIVE or step.how == "recompute":
                    after = first if step.how == "recompute" else stored_by
                    if step.how == "selective" and isinstance(block.module, Invertible):
                        dy = y  # in its memory
                    key = key_of(f"backward {step.how}", after=after, x=x_layout, dy=dy.layout)
                    seen = bench.observe(key, step, x=x, dy=dy)
                else:
                    after = stored_by if step.how == "invert_selective" else ""
                    seen = bench.observe(key_of(f"backward {step.how}", after=after, dy=y.layout), step, y=y, dy=y)
                kind.gradient_bytes = self._gradient_bytes(i) - before
            elif stepper is not None:
                seen = bench.observe(key_of("update"), step)
            kind.observations.setdefault(seen.key, seen)
        for parameter in block.module.parameters():
            parameter.grad = None

    def _clear_gradients(self, i: int) -> None:
        """As they are before the backward pass of block i: only those of later blocks are there."""
        for p in self.blocks[i].module.parameters():
            p.grad = torch.empty_like(p) if self._last[p] > i and p.requires_grad else None

    def _gradient_bytes(self, i: int) -> int:
        gradients = [p.grad for p in self.blocks[i].module.parameters() if p.grad is not None]
        return sum({g.untyped_storage()._cdata: g.untyped_storage().nbytes() for g in gradients}.values())

    def _stepper(self, i: int) -> torch.optim.Optimizer | None:
        """The optimiser of those parameters of block i that no earlier block has, as a wrapped model makes it."""
        owned = [p for p in self.blocks[i].module.parameters() if p.requires_grad and self._first[p] == i]
        if self._optimizer is None or not owned:
            return None
        stepper = self._optimizer(owned)
        create_state(stepper, self._recorder)
        return stepper

    def _update(self, stepper: torch.optim.Optimizer | None, block: int) -> None:
        if stepper is not None:
            with self._recorder.in_phase("optimizer", scalars=True):
                update_parameters(stepper)
            for parameter in self.blocks[block].module.parameters():
                if self._first[parameter] == block:
                    parameter.grad = None  # zero_grad() does so too, and imports torch's compiler


_Step = Forward | Recompute | Backward | Update


def _sequences(block: Block, i: int) -> list[list[_Step]]:
    """What can follow each other on one block: a stored pass, a dropped one, and one that all others may follow."""
    from_input: list[_Step] = [Backward(i, "recompute"), Recompute(i, i, "input")]
    dropping: list[_Step] = [Recompute(i, i, "nothing")]
    storing: list[_Step] = [Recompute(i, i, "all"), Backward(i, "saved")]
    inverting: list[_Step] = [Backward(i, how) for how in ("invert", "invert_layerwise") if block.allows(how)]
    keeping: list[list[_Step]] = []
    if block.allows("invert_selective"):
        inverting += [Recompute(i, i, "products_only"), Backward(i, "invert_selective")]
        keeping = [[Forward(i, "products_only"), Backward(i, "invert_selective")]]
    stored: list[_Step] = [Forward(i, "all"), Backward(i, "saved"), Update(i)]
    if not block.allows("recompute"):
        return [stored, *keeping, [Forward(i, "nothing"), *inverting]]
    selecting: list[list[_Step]] = []
    for how, keep in SELECTIVE.items():
        if block.allows(how):
            storing += [Recompute(i, i, keep), Backward(i, how)]
            selecting.append([Forward(i, keep), Backward(i, how)])
    recorded: list[_Step] = [Forward(i, "input"), *from_input, *dropping, *storing, *inverting]
    return [stored, *selecting, *keeping, [Forward(i, "nothing")], recorded]


def _outputs(kind: _Kind, name: Operand) -> tuple[Form, set[Layout]]:
    """Shape and type of an output, and the layouts that it comes in."""
    forms = [seen.outputs[name].form for seen in kind.observations.values() if name in seen.outputs]
    return forms[0], {form.layout for form in forms}


class _Handover(torch.autograd.Function):
    """Stands for the planned step as the loss sees it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, held: list[Tensor], reached: Callable[[Tensor], None]) -> Tensor:
        ctx.reached = reached
        return held[0].view_as(held[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, None]:
        ctx.reached(dy)
        return None, None, None


def _observe_head(form: Form, loss: Loss, recorder: Recorder) -> Observation:
    held = [form.make()]
    number = recorder.number_of(held[0])
    found: list[Observation] = []

    def reached(dy: Tensor) -> None:
        end = recorder.mark()
        given = Given(
            recorder.number_of(dy), dy.untyped_storage().nbytes(), Form(tuple(dy.shape), dy.dtype, layout_of(dy))
        )
        held.clear()
        found.append(Observation(("head", None, None), start, end, recorder.mark(), {"y": number}, {"dy": given}))

    anchor = torch.empty(0, requires_grad=True)
    start = recorder.mark()
    with torch.enable_grad():
        value = loss(_Handover.apply(anchor, held, reached))
        value.backward()
    return found[0]


def observe_update(model: nn.Module, stepper: torch.optim.Optimizer | None, recorder: Recorder) -> tuple[int, int]:
    """Marks around a step of the optimiser over all parameters."""
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    start = recorder.mark()
    if stepper is not None:
        with recorder.in_phase("optimizer", scalars=True):
            update_parameters(stepper)
    return start, recorder.mark()
