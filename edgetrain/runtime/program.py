"""A training step as a value: a frozen list of instructions that is simulated, executed, printed and exported.

Blocks are numbered 0..L-1; ``z[i]`` is the input of block i and ``g[i]`` the gradient with respect to it.

| instruction                  | needs                  | gives                                                   |
|------------------------------|------------------------|---------------------------------------------------------|
| forward i keep=all           | z[i]                   | z[i+1], and what autograd saves for block i; z[i] stays |
| forward i keep=products      | z[i]                   | z[i+1], and results of its products (*); z[i] stays     |
| forward i keep=all_products  | z[i]                   | likewise, with the results of all its products          |
| forward i keep=products_only | z[i]                  | the same, but z[i] is gone, z[i+1] in its memory        |
| forward i keep=input         | z[i]                   | z[i+1]; z[i] stays                                      |
| forward i keep=nothing       | z[i]                   | z[i+1]; z[i] is gone, in its memory where block i can   |
| recompute i..j keep          | z[i]                   | the same again for blocks i to j, without side effects  |
| head                         | z[L]                   | g[L]: the loss is the caller's                          |
| backward i saved             | g[i+1], saved          | g[i]                                                    |
| backward i selective         | g[i+1], z[i], products | g[i]; z[i] stays, the products are gone                 |
| backward i selective_all     | as selective           | as selective, after keep=all_products                   |
| backward i recompute         | g[i+1], z[i]           | g[i]; z[i] stays                                        |
| backward i invert            | g[i+1], z[i+1]         | g[i] and z[i], in the memory of g[i+1] and z[i+1]       |
| backward i invert_selective  | as invert, products    | as invert; the products are gone                        |
| backward i invert_layerwise  | as invert              | as invert, holding no hidden activation                 |
| offload / fetch z[i]         | z[i]                   | moves it to another place, or to bfloat16, and back     |
| update i                     | gradients of block i   | optimiser step of block i; its gradients are freed      |
| free z[i]                    | z[i]                   |                                                         |

(*) convolutions and matrix products that take long for what their results hold: :mod:`edgetrain.nn.selective`
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, get_args

from edgetrain.errors import ModelError

Keep = Literal["all", "products", "all_products", "products_only", "input", "nothing"]
Inversion = Literal["invert", "invert_selective", "invert_layerwise"]
INVERSIONS: tuple[Inversion, ...] = get_args(Inversion)
Selective = Literal["selective", "selective_all"]
SELECTIVE: dict[Selective, Keep] = {"selective": "products", "selective_all": "all_products"}
"""Backward passes that start from results of products, and the forward passes that leave these."""
How = Literal["saved", Selective, "recompute", Inversion]
DROPPING: tuple[Keep, ...] = ("products_only", "nothing")
"""Passes after which z[i] is gone."""
Place = Literal["host", "disk", "bfloat16"]


def kept_by(inversion: Inversion) -> Keep:
    """The forward pass before it."""
    return "products_only" if inversion == "invert_selective" else "nothing"


FORMAT_VERSION = 1
MOST_ELEMENTS = 2**48  # of a tensor in a program that is read


@dataclass(frozen=True)
class Forward:
    """z[block + 1] from z[block]."""

    op: ClassVar[str] = "forward"
    block: int
    keep: Keep


@dataclass(frozen=True)
class Recompute:
    """Forward again through blocks first..last, inclusive."""

    op: ClassVar[str] = "recompute"
    first: int
    last: int
    keep: Keep


@dataclass(frozen=True)
class Head:
    """The caller's loss: z[L] leaves, g[L] comes back."""

    op: ClassVar[str] = "head"


@dataclass(frozen=True)
class Backward:
    """g[block] from g[block + 1]."""

    op: ClassVar[str] = "backward"
    block: int
    how: How


@dataclass(frozen=True)
class Offload:
    """z[index] leaves the device's memory for the host's, or for a file, or stays there rounded to bfloat16."""

    op: ClassVar[str] = "offload"
    index: int
    to: Place = "host"


@dataclass(frozen=True)
class Fetch:
    """z[index] comes back."""

    op: ClassVar[str] = "fetch"
    index: int


@dataclass(frozen=True)
class Update:
    """Optimiser step of one block; its gradients are freed."""

    op: ClassVar[str] = "update"
    block: int


@dataclass(frozen=True)
class Free:
    """z[index] is dropped."""

    op: ClassVar[str] = "free"
    index: int


Instruction = Forward | Recompute | Head | Backward | Offload | Fetch | Update | Free
_BY_OP: dict[str, type[Any]] = {kind.op: kind for kind in get_args(Instruction)}


@dataclass(frozen=True)
class Program:
    """One training step of a chain.

    Attributes:
        names: of the blocks.
        shapes: of z[0] ... z[L], batch first.
        instructions: in order.
        channels_last: whether z[0] is the batch with channels last (:mod:`edgetrain.nn.layouts`). What ordinary blocks
            give is laid out so too, and what they and blocks that ``keeps_layout`` get back from it.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    instructions: tuple[Instruction, ...]
    channels_last: bool = False

    @functools.cached_property
    def is_plain(self) -> bool:
        """Whether every block is stored and nothing else is done: the step of plain autograd."""
        return all(
            isinstance(step, Head | Free)
            or (isinstance(step, Forward) and step.keep == "all")
            or (isinstance(step, Backward) and step.how == "saved")
            for step in self.instructions
        )

    @functools.cached_property
    def joins(self) -> dict[int, tuple[int, ...]]:
        """Blocks that are stored right after the block before and go back right before it: their graphs can be one.

        Nothing but ``free`` comes in between. For each, the z that are freed after its backward pass.
        """
        joined: set[int] = set()
        freed: dict[int, list[int]] = {}
        stored = gone_back = None  # the block that the last instruction but ``free`` stored, or went back through
        for step in self.instructions:
            if isinstance(step, Forward | Recompute) and step.keep == "all":
                first, last = (step.block, step.block) if isinstance(step, Forward) else (step.first, step.last)
                joined.update(range(first + 1, last + 1))
                (joined.add if stored == first - 1 else joined.discard)(first)
                stored, gone_back = last, None
            elif isinstance(step, Backward) and step.how == "saved":
                if gone_back != step.block + 1:
                    joined.discard(step.block + 1)
                stored, gone_back = None, step.block
                freed[step.block] = []
            elif not isinstance(step, Free):
                stored = gone_back = None
            elif gone_back is not None:
                freed[gone_back].append(step.index)
        return {i: tuple(freed[i]) for i in sorted(joined) if i in freed and i - 1 in freed}

    def table(self) -> str:
        """The instructions as text, a line each, with the shape they give."""
        rows = [f"{'':>4} {'instruction':<34} {'block':<22} gives"]
        for number, step in enumerate(self.instructions):
            rows.append(f"{number:>4} {describe(step):<34} {self._name(step):<22} {self._gives(step)}".rstrip())
        return "\n".join(rows)

    def to_json(self) -> str:
        """JSON that :meth:`from_json` reads without loss."""
        return json.dumps(
            {
                "version": FORMAT_VERSION,
                "names": self.names,
                "shapes": self.shapes,
                "channels_last": self.channels_last,
                "instructions": [{"op": step.op, **asdict(step)} for step in self.instructions],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Program:
        """The Program that :meth:`to_json` wrote.

        Raises:
            ModelError: the text is none, or of another version.
        """
        try:
            data = json.loads(text)
            if data["version"] != FORMAT_VERSION:
                raise ValueError(f"version {data['version']}")
            return cls(
                names=tuple(str(name) for name in data["names"]),
                shapes=tuple(_sizes(shape) for shape in data["shapes"]),
                instructions=tuple(_instruction(step) for step in data["instructions"]),
                channels_last=_truth(data.get("channels_last", False)),
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ModelError(
                found=f"a program that cannot be read ({error})",
                expected=f"JSON of a program of version {FORMAT_VERSION}",
                action="make the plan again with this version of edgetrain",
            ) from error

    def _name(self, step: Instruction) -> str:
        block = getattr(step, "block", getattr(step, "last", None))
        return "" if block is None else self.names[block]

    def _gives(self, step: Instruction) -> str:
        if isinstance(step, Forward):
            return f"z[{step.block + 1}] {_shape(self.shapes[step.block + 1])}"
        if isinstance(step, Recompute):
            return f"z[{step.last + 1}] {_shape(self.shapes[step.last + 1])}"
        if isinstance(step, Backward):
            also = f", z[{step.block}]" if step.how.startswith("invert") else ""
            return f"g[{step.block}]{also} {_shape(self.shapes[step.block])}"
        return ""


def _sizes(shape: Iterable[object]) -> tuple[int, ...]:
    """A shape from JSON; raises ValueError where it is none or of more elements than any memory holds."""
    sizes = tuple(int(size) for size in shape)  # type: ignore[call-overload]
    if min(sizes, default=1) < 0 or math.prod(sizes) > MOST_ELEMENTS:
        raise ValueError(f"a tensor of {'x'.join(map(str, sizes))}")
    return sizes


def _truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r}, where true or false is expected")
    return value


def _instruction(data: dict[str, Any]) -> Instruction:
    kind = _BY_OP[data["op"]]
    arguments = {key: value for key, value in data.items() if key != "op"}
    allowed = {"keep": get_args(Keep), "how": get_args(How), "to": get_args(Place)}
    for field in fields(kind):
        value = arguments.get(field.name)
        if field.name in allowed and value is not None and value not in allowed[field.name]:
            raise ValueError(f"{field.name} {value!r}")
        if field.name not in allowed and not isinstance(value, int):
            raise ValueError(f"{field.name} {value!r}")
    return kind(**arguments)


def describe(step: Instruction) -> str:
    """``step`` in a few words: ``forward 3 keep=input``."""
    if isinstance(step, Forward):
        return f"forward {step.block} keep={step.keep}"
    if isinstance(step, Recompute):
        return f"recompute {step.first}..{step.last} keep={step.keep}"
    if isinstance(step, Backward):
        return f"backward {step.block} {step.how}"
    if isinstance(step, Update):
        return f"update {step.block}"
    if isinstance(step, Offload):
        return f"offload z[{step.index}] to {step.to}"
    if isinstance(step, Fetch | Free):
        return f"{step.op} z[{step.index}]"
    return step.op


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(str(size) for size in shape)
