"""Hostile files, each with who opens it; run as a program it opens all of them inside a memory cap and reports.

``python malicious_inputs.py FOLDER`` prints one JSON object: for each case the error's type and text, and by how many
MiB the process grew. Every case must end in an error made for people.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import resource
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

CAP_MIB = 512  # what all of them together may add; a bomb that goes off asks for gigabytes
Make, Open = Callable[[Path], Path], Callable[[Path], object]


class Pickle:
    """Unpickled, it leaves a file ``ran`` in the folder."""

    def __init__(self, folder: Path) -> None:
        self._mark = str(folder / "ran")

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self._mark, "w")


def written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# checkpoints


def checkpoint(content: Callable[[Path], bytes]) -> Make:
    return lambda folder: written(folder / "checkpoints" / "last.safetensors", content(folder))


def torch_save(folder: Path) -> bytes:
    import torch

    torch.save({"model": Pickle(folder)}, folder / "saved.pt")
    return (folder / "saved.pt").read_bytes()


def zip_archive(folder: Path) -> bytes:
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Pickle(folder)))
    return (folder / "a.zip").read_bytes()


def safetensors(header: bytes, data: bytes = b"", *, length: int | None = None) -> Callable[[Path], bytes]:
    return lambda _: struct.pack("<Q", len(header) if length is None else length) + header + data


def proven(**tensors: object) -> Callable[[Path], bytes]:
    """A header that lies, in a file whose digest is right."""
    import hashlib

    def content(_: Path) -> bytes:
        metadata = {"sha256": "0" * 64, "format": "2", "state": "{}"}
        text = json.dumps({"__metadata__": metadata} | tensors).encode()
        begin = struct.pack("<Q", len(text)) + text
        whole = begin + bytes(16)
        return whole.replace(b"0" * 64, hashlib.sha256(whole).hexdigest().encode(), 1)

    return content


def entry(shape: list[int], offsets: list[int]) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": offsets}


def open_checkpoint(path: Path) -> object:
    from edgetrain.models import hybrid
    from edgetrain.train.checkpoint import load_weights

    return load_weights(path, hybrid(width=8))


# plans


def plan_json(change: Callable[[dict], None]) -> Make:
    def make(folder: Path) -> Path:
        from edgetrain.models import hybrid
        from edgetrain.planner import uniform_plan

        plan = uniform_plan(hybrid(in_channels=1, width=8), "keep_all", input_shape=(1, 16, 16), batch_size=8)
        data = json.loads(plan.to_json())
        change(data)
        return written(folder / "plan.json", json.dumps(data).encode())

    return make


def shape_of_input(*shape: int) -> Callable[[dict], None]:
    def change(data: dict) -> None:
        data["program"]["shapes"][0] = list(shape)

    return change


def many_instructions(data: dict) -> None:
    data["program"]["instructions"] *= 40_000


def many_micro_batches(data: dict) -> None:
    data["micro_batches"] = -(10**18)


def train_with_plan(path: Path) -> object:
    from edgetrain.cli.train import run_training
    from edgetrain.targets.ledger import read_ledger

    return run_training(
        data="digits", model="hybrid18", budget_bytes=None, ledger=read_ledger(), epochs=1, batch_size=8,
        mode="planned", plan_file=path,
        image_size=None, learning_rate=None, limit_train=64, limit_test=16, seed=0, out=path.parent / "run", quiet=True,
    )  # fmt: skip


def text_plan(content: bytes) -> Make:
    return lambda folder: written(folder / "plan.json", content)


# images


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(10_000_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def jpeg(width: int, height: int) -> bytes:
    from io import BytesIO

    from PIL import Image

    buffer = BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    content = buffer.getvalue()
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + struct.pack(">HH", height, width) + content[at + 4 :]


def tiff(width: int, height: int) -> bytes:
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 200), (278, 4, height)]
    body = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in [*tags, (279, 4, 16)])
    return b"II*\0" + struct.pack("<IH", 8, len(tags) + 1) + body + bytes(200)


def gif(width: int, height: int) -> bytes:
    from io import BytesIO

    from PIL import Image

    buffer = BytesIO()
    Image.new("P", (16, 16)).save(buffer, "GIF")
    content = buffer.getvalue()
    return content[:6] + struct.pack("<HH", width, height) + content[10:]


def image(name: str, content: Callable[[], bytes]) -> Make:
    return lambda folder: written(folder / name, content())


def open_image(path: Path) -> object:
    from edgetrain.train.data.decode import decode_image

    return decode_image(str(path), path=str(path), channels=3)


# data sets


def parquet_rows(folder: Path) -> Path:
    """100 million rows of one empty image and one label, run-length encoded: a file of kilobytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "train.parquet"
    rows = pa.table({"image": pa.array([b""] * 1_000_000, pa.binary()), "label": pa.array([0] * 1_000_000, pa.int64())})
    with pq.ParquetWriter(path, rows.schema, compression="zstd") as writer:
        for _ in range(100):
            writer.write_table(rows, row_group_size=1_000_000)
    return path


def parquet_repeated(folder: Path) -> Path:
    """64 times one value of 48 MB, which a dictionary holds once and zstd as nearly nothing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    value = pa.array([bytes(48_000_000)], pa.binary())
    images = pa.DictionaryArray.from_arrays(pa.array([0] * 64, pa.int32()), value)
    path = folder / "train.parquet"
    table = pa.table({"image": images, "label": pa.array([0, 1] * 32, pa.int64())})
    pq.write_table(table, path, compression="zstd", store_schema=False)
    return path


def idx(images: bytes, *, declared: tuple[int, int, int]) -> Make:
    def make(folder: Path) -> Path:
        header = struct.pack(">4B3I", 0, 0, 8, 3, *declared)
        with gzip.open(written(folder / "train-images-idx3-ubyte.gz", b""), "wb", compresslevel=1) as file:
            file.write(header + images)
            for _ in range(0 if declared[0] > 10**6 else 1100):
                file.write(bytes(2**20))
        labels = struct.pack(">4BI", 0, 0, 8, 1, 10) + bytes(range(10))
        written(folder / "train-labels-idx1-ubyte.gz", gzip.compress(labels))
        return folder

    return make


def cifar(size: int) -> Make:
    return lambda folder: written(folder / "data_batch_1.bin", bytes(size)).parent


def cifar_pickle(folder: Path) -> Path:
    return written(folder / "data_batch_1", pickle.dumps(Pickle(folder))).parent


def open_data(path: Path) -> object:
    from edgetrain.train.data import open_source

    source = open_source(str(path), split="train")
    return [source.decode(k) for k in range(len(source))]


# run directories


def run_json(change: dict[str, object]) -> Make:
    record = {
        "model": "hybrid18", "data": "digits", "classes": ["a", "b"], "input_shape": [1, 16, 16], "mean": [0.5],
        "std": [0.5], "seed": 0,
    }  # fmt: skip

    def make(folder: Path) -> Path:
        import torch

        from edgetrain.models import hybrid
        from edgetrain.train.checkpoint import Progress, save_checkpoint
        from edgetrain.train.random_state import RandomState
        from edgetrain.train.records import Position

        random = RandomState.capture()
        torch.manual_seed(0)
        progress = Progress(Position(), (), random, random)
        model = hybrid(2, in_channels=1)
        save_checkpoint(folder / "checkpoints" / "last.safetensors", model, progress=progress)
        return written(folder / "run.json", json.dumps(record | change).encode()).parent

    return make


def open_run(path: Path) -> object:
    from edgetrain.cli.trained import load_run

    return load_run(path)


def linked_checkpoint(folder: Path) -> Path:
    run_json({})(folder)
    (folder / "checkpoints" / "last.safetensors").unlink()
    (folder / "checkpoints" / "last.safetensors").symlink_to("/etc/passwd")
    return folder


def linked_device(folder: Path) -> Path:
    run_json({})(folder)
    (folder / "checkpoints" / "last.safetensors").unlink()
    (folder / "checkpoints" / "last.safetensors").symlink_to("/dev/zero")
    return folder


def linked_partial(folder: Path) -> Path:
    """What a run writes goes through a temporary name; here that is a link to a file outside."""
    written(folder / "outside" / "precious", b"precious")
    (folder / "run").mkdir()
    (folder / "run" / ".result.json.partial").symlink_to(folder / "outside" / "precious")
    (folder / "run" / "result.json").symlink_to(folder / "outside" / "precious")
    return folder


def write_beside_links(folder: Path) -> object:
    from edgetrain.errors import StorageError
    from edgetrain.files import write_atomically

    write_atomically(folder / "run" / "result.json", b"{}")
    assert (folder / "outside" / "precious").read_bytes() == b"precious"
    assert (folder / "run" / "result.json").read_bytes() == b"{}"
    raise StorageError(found="a link", expected="nothing written through it", action="that is so")


HUGE = 10**18
CASES: dict[str, tuple[Make, Open]] = {
    "checkpoint: torch.save": (checkpoint(torch_save), open_checkpoint),
    "checkpoint: pickle": (checkpoint(lambda folder: pickle.dumps(Pickle(folder))), open_checkpoint),
    "checkpoint: zip": (checkpoint(zip_archive), open_checkpoint),
    "checkpoint: header of 2**63 bytes": (checkpoint(safetensors(b"{}", length=2**63)), open_checkpoint),
    "checkpoint: header of 90 MB in 10 bytes": (checkpoint(safetensors(b"{}", length=90_000_000)), open_checkpoint),
    "checkpoint: nested header": (checkpoint(safetensors(b"[" * 500_000)), open_checkpoint),
    "checkpoint: tensor of 10**18": (checkpoint(proven(x=entry([HUGE], [0, 4 * HUGE]))), open_checkpoint),
    "checkpoint: shape beyond its bytes": (checkpoint(proven(x=entry([10**6, 10**6], [0, 16]))), open_checkpoint),
    "checkpoint: offsets beyond the file": (checkpoint(proven(x=entry([4], [16, 32]))), open_checkpoint),
    "checkpoint: overlapping": (checkpoint(proven(x=entry([4], [0, 16]), y=entry([4], [0, 16]))), open_checkpoint),
    "plan: batch of 10**18": (plan_json(shape_of_input(HUGE, 1, 16, 16)), train_with_plan),
    "plan: images of 10**9 x 10**9": (plan_json(shape_of_input(8, 1, 10**9, 10**9)), train_with_plan),
    "plan: images of 20,000 x 20,000": (plan_json(shape_of_input(8, 1, 20_000, 20_000)), train_with_plan),
    "plan: a million instructions": (plan_json(many_instructions), train_with_plan),
    "plan: negative micro-batches": (plan_json(many_micro_batches), train_with_plan),
    "plan: nested": (text_plan(b"[" * 200_000), train_with_plan),
    "plan: nested where a block is": (text_plan(b'{"version": ' + b"[" * 200_000), train_with_plan),
    "plan: number of a million digits": (text_plan(b'{"version": ' + b"9" * 10**6 + b"}"), train_with_plan),
    "plan: 200 MB": (text_plan(b"[" + b"[]," * 70_000_000 + b"[]]"), train_with_plan),
    "plan: no text": (text_plan(bytes(range(128, 256))), train_with_plan),
    "image: png": (image("a.png", lambda: png(100_000, 100_000)), open_image),
    "image: jpeg": (image("a.jpg", lambda: jpeg(65_500, 65_500)), open_image),
    "image: tiff": (image("a.tif", lambda: tiff(100_000, 100_000)), open_image),
    "image: gif": (image("a.gif", lambda: gif(65_500, 65_500)), open_image),
    "image: pickle": (lambda folder: written(folder / "a.png", pickle.dumps(Pickle(folder))), open_image),
    "data: Parquet with 1e8 rows in little": (parquet_rows, open_data),
    "data: Parquet that repeats 48 MB": (parquet_repeated, open_data),
    "data: idx that unpacks to 1.1 GB": (idx(b"", declared=(10, 28, 28)), open_data),
    "data: idx of 10**9 images": (idx(b"", declared=(10**9, 28, 28)), open_data),
    "data: CIFAR cut off": (cifar(3073 * 4 + 1), open_data),
    "data: CIFAR empty": (cifar(0), open_data),
    "data: CIFAR pickled": (cifar_pickle, open_data),
    "run: data outside by ../": (run_json({"classes": ["../../x", "b"], "model": "../../../etc/passwd"}), open_run),
    "run: images of 10**9 channels": (run_json({"input_shape": [10**9] * 3}), open_run),
    "run: 10**12 wide": (run_json({"options": {"width": 2**40}}), open_run),
    "run: nested": (lambda folder: written(folder / "run.json", b"[" * 10**6).parent, open_run),
    "run: checkpoint linked to a file elsewhere": (linked_checkpoint, open_run),
    "run: checkpoint linked to /dev/zero": (linked_device, open_run),
    "run: names linked to a file elsewhere": (linked_partial, write_beside_links),
}


def status_kib(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise KeyError(name)


def main(root: Path) -> None:
    from edgetrain.errors import EdgetrainError
    from edgetrain.train.data import BrokenImage, open_source
    from edgetrain.train.warm_up import warm_up

    warm_up("cpu")
    open_source("digits", split="train").decode(0)
    import pyarrow.parquet  # noqa: F401

    paths = {}
    for k, (name, (make, _)) in enumerate(CASES.items()):
        folder = root / str(k)
        folder.mkdir()
        paths[name] = make(folder)
    limit = (status_kib("VmData") + CAP_MIB * 1024) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    report = {}
    for name, (_, use) in CASES.items():
        Path("/proc/self/clear_refs").write_text("5")
        before = status_kib("VmRSS")
        try:
            use(paths[name])
            kind, text = "", "it was accepted"
        except (EdgetrainError, BrokenImage) as error:
            kind, text = type(error).__name__, str(error)
        except BaseException as error:
            kind, text = f"not for people: {type(error).__name__}", str(error)[:300]
        report[name] = (kind, text, (status_kib("VmHWM") - before) / 1024)
    print(json.dumps(report))


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main(Path(sys.argv[1]))
