"""Where modules that are no Sequential are cut, and why not."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Residual
from torch import Tensor, nn

import edgetrain
from edgetrain.chain import chain_of
from edgetrain.errors import ModelError


def names(model: nn.Module) -> list[str]:
    return [block.name for block in chain_of(model).blocks]


class Base(nn.Module):
    """Two layers, so that there is something to cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)


class NoGradient(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.a(x)
        return self.b(x)


class Drawing(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * random.random())


class Noting(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.a(x)
        return self.b(self.seen)


class Listing(Base):
    def __init__(self) -> None:
        super().__init__()
        self.all: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        self.all.append(self.a(x))
        return self.b(self.all[-1])


class Looping(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.b(self.a(part)) for part in x])


class Branching(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x) if x.shape[-1] > 4 else x


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return dy * s * (1 + x * (1 - s))


class OwnFunction(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(Swish.apply(self.a(x)))


class Peeking(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(self.a(x), 0.5, self.b.training))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (NoGradient, "a part without gradients or under autocast in NoGradient.forward (test_any_module.py:"),
        (Drawing, "draws random numbers outside torch"),
        (Noting, "writes the attribute seen"),
        (Listing, "writes into the attribute all"),
        (Looping, "a loop over a traced value in Looping.forward (test_any_module.py:"),
        (Branching, "data-dependent control flow in Branching.forward (test_any_module.py:"),
        (OwnFunction, "OwnFunction.forward"),
        (Peeking, "depends on the mode of its submodules"),
    ],
)
def test_what_cannot_be_followed_is_one_block_with_the_reason(kind: type[Base], reason: str) -> None:
    model = kind()
    before = (random.getstate(), torch.get_rng_state(), sorted(model.__dict__), list(getattr(model, "all", ())))
    (block,) = chain_of(model).blocks
    assert block.uncut is not None
    assert reason in block.uncut
    assert block.module is model
    after = (random.getstate(), torch.get_rng_state(), sorted(model.__dict__), list(getattr(model, "all", ())))
    assert before[0] == after[0]
    assert torch.equal(before[1], after[1])
    assert before[2:] == after[2:]


@dataclasses.dataclass
class Result:
    logits: Tensor


@pytest.mark.parametrize("wrap", [lambda x: (x, x), lambda x: {"logits": x}, Result])
def test_a_model_that_returns_no_tensor(wrap: Any) -> None:
    class Several(Base):
        def forward(self, x: Tensor) -> Any:
            return wrap(self.b(self.a(x)))

    chain = chain_of(Several())
    assert len(chain.blocks) == 1
    assert chain.blocks[0].uncut is not None
    assert "no single tensor" in chain.blocks[0].uncut
    with pytest.raises(ModelError, match="gives"):
        chain.shapes((1, 3, 4, 4))


def test_a_submodule_that_returns_several_tensors_is_not_cut_off() -> None:
    class Encoder(Base):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    class Decoder(Base):
        def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
            return self.a(pair[0]) + self.b(pair[1])

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.encoder, self.decoder, self.last = (
                nn.Conv2d(3, 3, 1),
                Encoder(),
                Decoder(),
                nn.Conv2d(3, 2, 1),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.decoder(self.encoder(self.stem(x))))

    chain = chain_of(Both())
    assert [block.name for block in chain.blocks] == ["stem", "encoder..decoder", "last"]
    assert chain.shapes((2, 3, 4, 4))[-1] == (2, 2, 4, 4)


def test_in_place_operations_stay_with_the_memory_they_overwrite() -> None:
    class Views(Base):
        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).flatten(2).transpose(1, 2)
            x = x.sigmoid_()
            return self.b(x.transpose(1, 2).unflatten(2, (4, 4)))

    assert names(Views()) == ["a", "b"]
    assert names(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Identity(), nn.LeakyReLU(inplace=True))) == ["0+1+2"]

    class Norm(Base):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.fc = nn.Sequential(self.a, self.b, nn.BatchNorm2d(3)), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.features(x), inplace=True).mean((2, 3)))

    blocks = names(Norm())
    assert len(blocks) == 3, blocks


def test_a_stage_inside_a_sequential_is_cut_and_a_unit_is_not() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Residual(4) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Conv2d(4, 16, 1), nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.relu(self.up(x)))

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Stage(), Unit(), nn.Conv2d(4, 2, 1))
    chain = chain_of(model)
    assert [block.name for block in chain.blocks] == ["0", "1.blocks.0", "1.blocks.1", "1.blocks.2", "2", "3"]
    assert chain.blocks[4].uncut is None, "nothing forbids a cut in a unit"
    assert chain.blocks[1].uncut == "Residual: 2 tensors are alive between conv1 and norm2"


@pytest.mark.parametrize("name", ["resnet18", "revnet18", "irevnet18", "layerwise18", "hybrid18", "resnet20"])
def test_blocks_of_the_zoo_are_the_modules_of_its_containers(name: str) -> None:
    def leaves(path: str, module: nn.Module) -> list[str]:
        if type(module) is not nn.Sequential:
            return [path]
        return [leaf for key, m in module.named_children() for leaf in leaves(f"{path}.{key}" if path else key, m)]

    model = edgetrain.create_model(name)
    found = [part for block in names(model) for part in _parts(block)]
    assert found == leaves("", model)


def _parts(name: str) -> list[str]:
    first, *others = name.split("+")
    return [first, *(f"{first.rpartition('.')[0]}.{other}".lstrip(".") for other in others)]
