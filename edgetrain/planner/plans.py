"""A Plan: one mode per block, the reason for each, and the Program that follows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from edgetrain.chain import MODES, Block, Mode, chain_of
from edgetrain.errors import ModelError, UsageError, near_matches
from edgetrain.planner.schedule import schedule
from edgetrain.runtime.program import Program

UniformMode = Literal["keep_all", "recompute", "invert", "invert_layerwise"]

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Plan:
    """What is kept and what is computed again in one training step.

    Attributes:
        modes: one per block.
        reasons: why, one per block.
        program: the step.
    """

    modes: tuple[Mode, ...]
    reasons: tuple[str, ...]
    program: Program

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of a batch, (n, c, h, w)."""
        return self.program.shapes[0]

    def explain(self) -> str:
        """Mode and reason of every block as text, a line each."""
        return "\n".join(
            f"{name or 'model':<24} {mode:<18} {reason}"
            for name, mode, reason in zip(self.program.names, self.modes, self.reasons, strict=True)
        )

    def to_json(self) -> str:
        """JSON that :meth:`from_json` reads without loss."""
        data = {
            "version": FORMAT_VERSION,
            "modes": self.modes,
            "reasons": self.reasons,
            "program": json.loads(self.program.to_json()),
        }
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The Plan that :meth:`to_json` wrote.

        Raises:
            ModelError: the text is none, or of another version.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            modes = tuple(data["modes"])
            if data["version"] != FORMAT_VERSION or not set(modes) <= set(MODES):
                raise ValueError("another version or an unknown mode")
            program = Program.from_json(json.dumps(data["program"]))
            if not len(modes) == len(data["reasons"]) == len(program.names):
                raise ValueError("as many modes and reasons as blocks are needed")
            return cls(modes, tuple(str(reason) for reason in data["reasons"]), program)
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(
                found=f"a plan that cannot be read ({error})",
                expected=f"JSON of a plan of version {FORMAT_VERSION}",
                action="make the plan again with this version of edgetrain",
            ) from error


def uniform_plan(
    model: nn.Module,
    mode: UniformMode,
    *,
    input_shape: tuple[int, int, int],
    batch_size: int,
    update_in_backward: bool = False,
) -> Plan:
    """The same mode in every block that allows it.

    Args:
        model: any module; a ``torch.nn.Sequential`` is cut into its blocks.
        mode: ``"keep_all"``, ``"recompute"``, ``"invert"`` or ``"invert_layerwise"``.
        input_shape: (c, h, w) of one sample.
        batch_size: samples per step.
        update_in_backward: step the optimiser of each block as soon as its gradients are there; the optimiser is
            then given to :func:`edgetrain.wrap`.

    Raises:
        UsageError: no such mode.
        ModelError: the model does not take the input.
    """
    if mode not in get_args(UniformMode):
        raise UsageError(
            found=f"no mode is called {mode!r}",
            expected="one of " + ", ".join(get_args(UniformMode)),
            action=near_matches(mode, list(get_args(UniformMode))),
        )
    chain = chain_of(model)
    wanted: Mode = "store" if mode == "keep_all" else mode
    decisions = [
        _decide(block, wanted, first=i == 0, last=i == len(chain.blocks) - 1) for i, block in enumerate(chain.blocks)
    ]
    modes = tuple(mode for mode, _ in decisions)
    program = schedule(
        [block.name for block in chain.blocks],
        chain.shapes((batch_size, *input_shape)),
        modes,
        update_in_backward=update_in_backward,
    )
    return Plan(modes, tuple(reason for _, reason in decisions), program)


def _decide(block: Block, wanted: Mode, *, first: bool, last: bool) -> tuple[Mode, str]:
    if wanted == "recompute" and first and not _saves_more_than_input(block):
        return "store", "keeps nothing but the batch itself"
    if wanted == "recompute" and last:
        return "store", "its backward pass comes first: dropping and recomputing it would save nothing"
    if block.allows(wanted):
        return wanted, "asked for"
    if wanted == "invert_layerwise" and block.allows("invert"):
        return "invert", block.refusals["invert_layerwise"]
    reason = block.refusals[wanted]
    if not block.has_parameters and block.allows("recompute"):
        return "recompute", f"{reason}; without parameters, recomputing it from its input costs little"
    return "store", reason


def _saves_more_than_input(block: Block) -> bool:
    return not isinstance(block.module, nn.Conv2d | nn.Linear)
