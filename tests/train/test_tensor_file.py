"""Files of tensors: read back by the safetensors library, and what is damaged or malicious is refused."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from edgetrain.errors import StorageError
from edgetrain.files import write_atomically
from edgetrain.train.tensor_file import TensorFile, write_tensor_file


def tensors() -> dict[str, Tensor]:
    """Of every kind, one whose length leaves what follows unaligned."""
    torch.manual_seed(0)
    return {
        "flags": torch.tensor([True, False, True]),
        "wide": torch.randn(2, 3, dtype=torch.float64),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "coarse": torch.randn(3).to(torch.bfloat16),
        "narrow": torch.tensor([-3], dtype=torch.int16),
        "steps": torch.tensor(2**40),
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_tensor_file(tmp_path / "file.safetensors", tensors(), {"step": 7, "x": [0.1, None]})
    return tmp_path / "file.safetensors"


def test_it_comes_back_here_and_in_the_library(path: Path):
    file, read = TensorFile(path), load_file(path)
    assert file.state == {"step": 7, "x": [0.1, None]}
    assert file.names("") == list(tensors())
    for name, value in tensors().items():
        for found in (file.tensor(name), read[name]):
            assert found.dtype == value.dtype
            assert found.shape == value.shape
            assert torch.equal(found, value)


def test_the_digest_is_that_of_the_file_with_zeros_in_its_place(path: Path):
    with safe_open(path, framework="pt") as file:
        digest = file.metadata()["sha256"]
    content = re.sub(digest.encode(), b"0" * 64, path.read_bytes())
    assert hashlib.sha256(content).hexdigest() == digest


def test_every_flipped_bit_is_found(path: Path):
    whole = path.read_bytes()
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        path.write_bytes(content)
        with pytest.raises(StorageError, match="cannot be read"):
            TensorFile(path)


@pytest.mark.parametrize("cut", [0, 3, 8, 100, -1])
def test_cut_off(path: Path, cut: int):
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(StorageError, match="cannot be read"):
        TensorFile(path)


class Bomb:
    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was opened",)


def forged(header: dict[str, Any], data: bytes = b"") -> bytes:
    """A file with a right digest, whatever its header says."""
    text = json.dumps({"__metadata__": {"sha256": "0" * 64, "format": "2", "state": "{}"}} | header).encode()
    begin = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(begin + data).hexdigest()
    return begin.replace(b"0" * 64, digest.encode()) + data


def test_a_forged_file_that_is_right_is_read(path: Path):
    path.write_bytes(forged({"x": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, b"ab"))
    assert TensorFile(path).tensor("x").tolist() == [97, 98]


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Bomb()),
        b"PK\x03\x04" + bytes(200),
        (2**63).to_bytes(8, "little") + b"{}",
        forged({"x": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}),
        forged({"x": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4]}}, bytes(4)),
        forged({"x": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, bytes(4)),
        forged({"x": {"dtype": "F32", "shape": [1], "data_offsets": [-8, -4]}}, bytes(4)),
        forged({"x": {"dtype": "O", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        forged({"x": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        forged({"x": [1, 2]}),
        forged({"__metadata__": {}}),
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
    ],
)
def test_what_is_malicious_is_refused(content: bytes, path: Path):
    path.write_bytes(content)
    with pytest.raises(StorageError, match="cannot be read"):
        TensorFile(path)


@pytest.mark.parametrize("links", ["links", "no links"])
def test_what_was_there_before_is_kept(links: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if links == "no links":  # as on a FAT file system

        def refuse(*arguments: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr("os.link", refuse)
    path, previous = tmp_path / "file", tmp_path / "previous"
    for content, before in ((b"a", None), (b"b", b"a"), (b"c", b"b"), (b"d", b"c")):
        write_atomically(path, content, previous=previous)
        assert path.read_bytes() == content
        assert (previous.read_bytes() if previous.exists() else None) == before
    assert {file.name for file in tmp_path.iterdir()} == {"file", "previous"}
