"""Checkpoints: read back by the safetensors library, and whole or absent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from edgetrain.errors import StorageError
from edgetrain.files import write_atomically
from edgetrain.train.checkpoint import load_weights, save_checkpoint


class Odd(nn.Module):
    """Buffers of every kind, one whose length leaves what follows unaligned."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("wide", torch.randn(2, 3, dtype=torch.float64))
        self.register_buffer("steps", torch.tensor(2**40))
        self.register_buffer("scalar", torch.tensor(1.5))
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("coarse", torch.randn(3).to(torch.bfloat16))
        self.register_buffer("narrow", torch.tensor([-3], dtype=torch.int16))
        self.weight = nn.Parameter(torch.randn(4, 5).t())


def test_file_reads_back_equal(tmp_path: Path):
    model, path = Odd(), tmp_path / "state.safetensors"
    save_checkpoint(path, model, epoch=3, step=7)
    read = load_file(path)
    assert set(read) == {f"model.{name}" for name in model.state_dict()}
    for name, value in model.state_dict().items():
        assert read[f"model.{name}"].dtype == value.dtype
        assert read[f"model.{name}"].shape == value.shape
        assert torch.equal(read[f"model.{name}"], value)
    other = Odd()
    assert load_weights(path, other) == {"epoch": 3, "step": 7}
    assert torch.equal(other.weight, model.weight)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
def test_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException):
    def pieces() -> Iterator[bytes]:
        yield b"half"
        raise error

    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(StorageError if isinstance(error, OSError) else type(error)):
        write_atomically(path, pieces())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_missing_and_foreign_files(tmp_path: Path):
    path = tmp_path / "state.safetensors"
    save_checkpoint(path, nn.Linear(2, 2), epoch=0, step=0)
    with pytest.raises(StorageError):
        load_weights(path, nn.Linear(3, 2))
    path.write_bytes(path.read_bytes()[:-3])
    for file in (path, tmp_path / "missing"):
        with pytest.raises(StorageError):
            load_weights(file, nn.Linear(2, 2))
