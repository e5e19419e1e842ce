"""The state of every generator of random numbers a step may draw from, as tensors that a checkpoint can hold.

These are torch's on the CPU and on every CUDA device, Python's, NumPy's global one, and those given by hand (a
DataLoader's). Augmentation and order of a ``Loader`` have no state: they follow from seed, epoch and image.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """All states at one moment.

    Attributes:
        tensors: ``torch``, ``cuda.K``, ``python``, ``numpy`` and, of the generators given, ``given.K``.
    """

    tensors: Mapping[str, Tensor]

    @classmethod
    def capture(cls, *generators: torch.Generator) -> RandomState:
        """The states now."""
        found = {"torch": torch.get_rng_state()}
        if torch.cuda.is_initialized():
            found |= {f"cuda.{k}": state for k, state in enumerate(torch.cuda.get_rng_state_all())}
        _, words, gauss = random.getstate()
        found["python"] = torch.tensor(words, dtype=torch.int64)
        found["python.gauss"] = torch.tensor([] if gauss is None else [gauss], dtype=torch.float64)
        _, keys, *place, cached = np.random.get_state()
        found["numpy"] = torch.tensor([*np.asarray(keys).tolist(), *place], dtype=torch.int64)
        found["numpy.gauss"] = torch.tensor([cached], dtype=torch.float64)
        found |= {f"given.{k}": generator.get_state() for k, generator in enumerate(generators)}
        return cls(found)

    def equals(self, other: RandomState) -> bool:
        """Whether both are the same, of the generators that both have."""
        both = self.tensors.keys() & other.tensors.keys()
        return all(torch.equal(self.tensors[name], other.tensors[name]) for name in both)

    def restore(self, *generators: torch.Generator) -> None:
        """Puts the states back; of ``generators`` those that were captured, in their order."""
        torch.set_rng_state(self.tensors["torch"])
        if torch.cuda.is_available():
            for name, state in self.tensors.items():
                if name.startswith("cuda.") and int(name[5:]) < torch.cuda.device_count():
                    torch.cuda.set_rng_state(state, int(name[5:]))
        gauss = self.tensors["python.gauss"].tolist()
        random.setstate((3, tuple(self.tensors["python"].tolist()), gauss[0] if gauss else None))
        *keys, place, has_gauss = self.tensors["numpy"].tolist()
        cached = self.tensors["numpy.gauss"].item()
        np.random.set_state(("MT19937", np.array(keys, np.uint32), place, has_gauss, cached))
        for k, generator in enumerate(generators):
            if f"given.{k}" in self.tensors:
                generator.set_state(self.tensors[f"given.{k}"])


def generators_of(batches: Any) -> list[torch.Generator]:
    """The generators that a DataLoader and its sampler were given, each once; none of anything else."""
    places = (batches, getattr(batches, "sampler", None))
    found = [getattr(place, "generator", None) for place in places]
    return list(dict.fromkeys(generator for generator in found if isinstance(generator, torch.Generator)))
