"""A frozen network as teacher, and the student that it teaches attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from edgetrain.chain import Chain, Group, Tapped, chain_of, groups_of
from edgetrain.errors import ModelError
from edgetrain.nn.attention import Mapping, attention_map, normalised_maps
from edgetrain.train.distillation import Answers

Statistics = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation per channel by which images were normalised."""


class Teacher:
    """Asks a network in evaluation mode. It is made at the first question: a memory cap that holds then counts it.

    Args:
        make: makes the network with its weights; must be picklable where trials run in another process.
        groups: of the student, whose attention is asked for.
        mapping, power: of the attention.
        samples: at most so many at once; None: all.
        student_statistics, own_statistics: by which the images were normalised for the student, and should be for the
            teacher; None: the same.
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        *,
        groups: Sequence[Group] = (),
        mapping: Mapping = "sum",
        power: int = 2,
        samples: int | None = None,
        student_statistics: Statistics | None = None,
        own_statistics: Statistics | None = None,
    ) -> None:
        self.samples = samples
        self._make, self._groups, self._mapping, self._power = make, tuple(groups), mapping, power
        self._affine = _renormalisation(student_statistics, own_statistics)
        self._chain: Chain | None = None
        self._asked: dict[int, tuple[Group, Group]] = {}

    @torch.no_grad()
    def __call__(self, images: Tensor, indices: Tensor | None = None) -> Answers:
        """Its answers for ``images`` (n, c, h, w)."""
        chain = self._ready(images)
        parts = [self._answer(chain, part) for part in images.split(self.samples or len(images))]
        if len(parts) == 1:
            return parts[0]
        targets = zip(*(part.targets for part in parts), strict=True)
        return Answers(torch.cat([part.logits for part in parts]), tuple(torch.cat(some) for some in targets))

    def _ready(self, images: Tensor) -> Chain:
        if self._chain is None:
            model = self._make().to(images.device).eval().requires_grad_(False)
            self._chain = chain_of(model)
            own = groups_of(self._chain, (images.shape[1], images.shape[2], images.shape[3])) if self._groups else ()
            self._asked = {number: pair for number, pair in enumerate(paired(self._groups, own))}
        return self._chain

    def _answer(self, chain: Chain, z: Tensor) -> Answers:
        if self._affine is not None:
            factor, offset = (value.to(z.device, z.dtype) for value in self._affine)
            z = z * factor + offset
        targets: dict[int, Tensor] = {}
        for i, block in enumerate(chain.blocks):
            z = block.module(z)
            for number, (student, own) in self._asked.items():
                if own.last == i:
                    maps = attention_map(z, mapping=self._mapping, power=self._power, poolings=own.poolings)
                    targets[number] = normalised_maps(maps, student.size)
        return Answers(z, tuple(targets[number] for number in sorted(targets)))


def paired(student: Sequence[Group], teacher: Sequence[Group]) -> tuple[tuple[Group, Group], ...]:
    """Each group of the student with the teacher's of the nearest resolution.

    Raises:
        ModelError: the teacher has no activation with a resolution.
    """
    if student and not teacher:
        raise ModelError(
            found="a teacher none of whose blocks gives a map",
            expected="a convolutional network that is cut into blocks",
            action="take another teacher, or distillation, which needs its outputs alone",
        )

    def apart(one: Group, other: Group) -> float:
        return abs(math.log(one.size[0] * one.size[1]) - math.log(other.size[0] * other.size[1]))

    return tuple((group, min(teacher, key=lambda other: apart(group, other))) for group in student)


def tapped_student(
    make: Callable[[], nn.Module], *, input_shape: tuple[int, int, int], mapping: Mapping = "sum", power: int = 2
) -> Tapped:
    """The network of ``make`` with a tap at the end of every group.

    Raises:
        ModelError: it has none.
    """
    model = make()
    groups = groups_of(chain_of(model), input_shape)
    if not groups:
        raise ModelError(
            found=f"{type(model).__name__}, none of whose blocks gives a map",
            expected="a convolutional network that is cut into blocks",
            action="take another network, or distillation, which needs its outputs alone",
        )
    return Tapped(model, groups, mapping=mapping, power=power)


def _renormalisation(given: Statistics | None, wanted: Statistics | None) -> tuple[Tensor, Tensor] | None:
    """Factor and offset (1, c, 1, 1) from one normalisation to another; None where they are the same."""
    if given is None or wanted is None or [*map(tuple, given)] == [*map(tuple, wanted)]:
        return None
    mean, std, own_mean, own_std = (
        torch.tensor([*values], dtype=torch.double).view(1, -1, 1, 1) for pair in (given, wanted) for values in pair
    )
    return std / own_std, (mean - own_mean) / own_std
