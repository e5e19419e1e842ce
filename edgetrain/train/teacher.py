"""A frozen network as teacher, and the student that it teaches attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from edgetrain.chain import Chain, Group, Tapped, chain_of, groups_of
from edgetrain.errors import ModelError
from edgetrain.memory.forward import Guest, forward_memory
from edgetrain.memory.operators import DeviceKind
from edgetrain.nn.attention import Mapping, attention_map, normalised_maps
from edgetrain.nn.slices import CUDA_FACTOR
from edgetrain.train.distillation import Answers
from edgetrain.units import MIB

FORWARD_BYTES = 16 * MIB
"""Most that a teacher's forward pass takes at once; one sample at least. A CUDA device keeps busy only with more."""

Statistics = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation per channel by which images were normalised."""


class Teacher:
    """Asks a network in evaluation mode. It is made at the first question: a memory cap that holds then counts it.

    Args:
        make: makes the network with its weights; must be picklable where trials run in another process.
        groups: of the student, whose attention is asked for.
        mapping, power: of the attention.
        samples: at most so many at once; None: all, or as :meth:`memory` chooses.
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
        self._make, self.groups, self._mapping, self._power = make, tuple(groups), mapping, power
        self._affine = _renormalisation(student_statistics, own_statistics)
        self._chain: Chain | None = None
        self._asked: tuple[tuple[Group, Group], ...] = ()

    def __getstate__(self) -> dict[str, object]:
        """Another process makes the network itself, under its own cap."""
        return {**self.__dict__, "_chain": None, "_asked": ()}

    @torch.no_grad()
    def __call__(self, images: Tensor, indices: Tensor | None = None) -> Answers:
        """Its answers for ``images`` (n, c, h, w)."""
        chain = self._ready(images)
        parts = [self._answer(chain, self._asked, part) for part in images.split(self.samples or len(images))]
        if len(parts) == 1:
            return parts[0]
        targets = zip(*(part.targets for part in parts), strict=True)
        return Answers(torch.cat([part.logits for part in parts]), tuple(torch.cat(some) for some in targets))

    def make(self) -> nn.Module:
        """The network; random numbers that it draws are nobody's, so a run that goes on makes it again unnoticed."""
        with torch.random.fork_rng():
            return self._make()

    def memory(self, *, input_shape: tuple[int, int, int], batch_size: int, device: DeviceKind = "cpu") -> Guest:
        """What it takes beside a student's step on batches of images (c, h, w).

        Where :attr:`samples` is None it is chosen first: as many as stay below :data:`FORWARD_BYTES`, so that the
        teacher's activations are a small matter; a function of the two networks alone, as a run that goes on needs it.
        """
        model = self.make()
        pairs = self._pairs(chain_of(model), input_shape)

        def ask(network: nn.Module, images: Tensor) -> Answers:
            return self._answer(chain_of(network), pairs, images)

        most = FORWARD_BYTES * (CUDA_FACTOR if device == "cuda" else 1)
        samples = min(self.samples or batch_size, batch_size)
        while True:
            passed = forward_memory(model, ask, input_shape=input_shape, batch_size=samples, device=device)
            if self.samples is not None or samples == 1 or passed.peak_bytes <= most:
                break
            samples = max(1, min(samples // 2, samples * most // passed.peak_bytes))
        self.samples = samples
        answers = -(-passed.output_bytes * batch_size // samples)
        joining = answers if samples < batch_size else 0  # the parts' answers, and all of them in one
        return Guest(passed.weight_bytes + answers, max(0, passed.peak_bytes - passed.output_bytes) + joining)

    def forget(self) -> None:
        """Drops the network; the next question makes it again."""
        self._chain, self._asked = None, ()

    def _ready(self, images: Tensor) -> Chain:
        if self._chain is None:
            model = self.make().to(images.device).eval().requires_grad_(False)
            self._chain = chain_of(model)
            self._asked = self._pairs(self._chain, (images.shape[1], images.shape[2], images.shape[3]))
        return self._chain

    def _pairs(self, chain: Chain, input_shape: tuple[int, int, int]) -> tuple[tuple[Group, Group], ...]:
        return paired(self.groups, groups_of(chain, input_shape)) if self.groups else ()

    def _answer(self, chain: Chain, pairs: Sequence[tuple[Group, Group]], z: Tensor) -> Answers:
        if self._affine is not None:
            factor, offset = (value.to(z.device, z.dtype) for value in self._affine)
            z = z * factor + offset
        targets: dict[int, Tensor] = {}
        for i, block in enumerate(chain.blocks):
            z = block.module(z)
            for number, (student, own) in enumerate(pairs):
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
