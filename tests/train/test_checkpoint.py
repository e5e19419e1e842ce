"""Checkpoints: all of a model and its optimiser, whole or absent, and refused by another model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from edgetrain.errors import StorageError
from edgetrain.files import write_atomically
from edgetrain.train.checkpoint import Progress, load_checkpoint, load_weights, save_checkpoint
from edgetrain.train.random_state import RandomState
from edgetrain.train.records import EpochRecord, Position
from edgetrain.train.tensor_file import TensorFile


class Odd(nn.Module):
    """A parameter that is not contiguous, a buffer that the state dict leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.tensor(2**40))
        self.register_buffer("hidden", torch.randn(3), persistent=False)
        self.weight = nn.Parameter(torch.randn(4, 5).t())
        self.untrained = nn.Parameter(torch.randn(2))


def progress(epoch: int = 0, step: int = 0) -> Progress:
    random = RandomState.capture()
    history = (EpochRecord(1, 0.1 + 0.2, 0.5, None, 10.0, 1.0),)
    return Progress(Position(epoch=epoch, step=step, batch=2, loss_sum=1 / 3), history, random, random)


@pytest.mark.parametrize(
    ("make", "keys"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True), {"momentum_buffer"}),
        (lambda p: torch.optim.Adam(p, lr=0.1, fused=True), {"step", "exp_avg", "exp_avg_sq"}),
        (lambda p: torch.optim.Adam(p, lr=0.1), {"step", "exp_avg", "exp_avg_sq"}),
        (lambda p: torch.optim.RMSprop(p, lr=0.1), {"step", "square_avg"}),
    ],
)
def test_everything_comes_back(make, keys: set[str], tmp_path: Path):
    model, path = Odd(), tmp_path / "state.safetensors"
    optimizer = make(model.parameters())
    model.weight.square().sum().backward()  # the other one has no gradient, and so no state
    optimizer.step()
    saved = progress(3, 7)
    save_checkpoint(path, model, [optimizer], progress=saved)
    stored = load_file(path)
    assert {name for name in stored if not name.startswith("random.")} == {
        "model.steps",
        "model.weight",
        "model.untrained",
        "buffer.hidden",
        *(f"optimizer.weight.{key}" for key in keys),
    }
    other = Odd()
    again = make(other.parameters())
    loaded = load_checkpoint(TensorFile(path), other, [again])
    assert (loaded.position, loaded.history) == (saved.position, saved.history)
    assert all(torch.equal(value, saved.now.tensors[name]) for name, value in loaded.now.tensors.items())
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(other.hidden, model.hidden)
    assert set(again.state) == {other.weight}
    for _ in range(2):
        for one, its in ((model, optimizer), (other, again)):
            its.zero_grad()
            one.weight.square().sum().backward()
            its.step()
        assert torch.equal(other.weight, model.weight)
    assert load_weights(path, Odd()) == {"epoch": 3, "step": 7}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
def test_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException):
    def pieces() -> Iterator[bytes]:
        yield b"half"
        raise error

    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(StorageError if isinstance(error, OSError) else type(error)):
        write_atomically(path, pieces(), previous=tmp_path / "previous")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Linear(3, 2), r"model\.weight is \(2, 2\) torch\.float32, not \(2, 3\)"),
        (nn.Linear(2, 2, bias=False), r"model\.bias is in one of them only"),
        (nn.Linear(2, 2, dtype=torch.float64), r"float32, not \(2, 2\) torch\.float64"),
    ],
)
def test_of_another_model(model: nn.Linear, reason: str, tmp_path: Path):
    path = tmp_path / "state.safetensors"
    save_checkpoint(path, nn.Linear(2, 2), progress=progress())
    before = model.weight.clone()
    with pytest.raises(StorageError, match=reason):
        load_weights(path, model)
    assert torch.equal(model.weight, before)


def test_missing(tmp_path: Path):
    with pytest.raises(StorageError, match="No such file"):
        load_weights(tmp_path / "missing", nn.Linear(2, 2))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_a_disk_that_is_full_during_a_save(tmp_path: Path):
    """Writing really fails, half way: a process may not make files larger than half a checkpoint (RLIMIT_FSIZE)."""
    path, model = tmp_path / "last.safetensors", nn.Linear(100, 100)
    save_checkpoint(path, model, progress=progress(1, 2))
    before = path.read_bytes()
    code = """
import resource, signal, sys
from pathlib import Path
import torch
from torch import nn
from edgetrain.errors import StorageError
from edgetrain.train.checkpoint import Progress, save_checkpoint
from edgetrain.train.random_state import RandomState
from edgetrain.train.records import Position

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
random = RandomState.capture()
try:
    save_checkpoint(Path(sys.argv[1]), nn.Linear(100, 100), progress=Progress(Position(), (), random, random))
except StorageError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(len(before) // 2)], capture_output=True, text=True, check=True
    )
    assert "last.safetensors could not be written: File too large" in done.stdout
    assert "what was saved before is intact" in done.stdout
    assert path.read_bytes() == before
    assert load_weights(path, nn.Linear(100, 100)) == {"epoch": 1, "step": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["last.safetensors"]
