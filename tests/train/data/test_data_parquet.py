"""Parquet files in the hub's layout."""

import json
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from edgetrain.errors import DataError
from edgetrain.train.data import BrokenImage, open_source


def png(value: int) -> bytes:
    file = BytesIO()
    Image.fromarray(np.full((4, 5, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write(
    path: Path, labels: list, *, image: str = "image", label: str = "label", names=None, plain=False, first=0
) -> None:
    """Image k of a file is filled with ``first + k``."""
    images = [png(first + k) for k in range(len(labels))]
    column = pyarrow.array(images if plain else [{"bytes": data, "path": None} for data in images])
    table = pyarrow.table({image: column, label: labels})
    if names:
        features = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    path.parent.mkdir(exist_ok=True, parents=True)
    pyarrow.parquet.write_table(table, path, row_group_size=3)


def test_several_files_and_names_from_the_metadata(tmp_path):
    write(tmp_path / "train-00000-of-00002.parquet", [0, 1, 0, 1], names=["cat", "dog"])
    write(tmp_path / "train-00001-of-00002.parquet", [1, 1], names=["cat", "dog"], first=4)
    write(tmp_path / "validation-00000-of-00001.parquet", [1], names=["cat", "dog"], first=9)
    train, test = open_source(tmp_path, split="train"), open_source(tmp_path, split="test")
    assert train.classes == test.classes == ("cat", "dog")
    assert train.labels.tolist() == [0, 1, 0, 1, 1, 1]
    assert [int(train.decode(k)[0, 0, 0]) for k in range(6)] == [0, 1, 2, 3, 4, 5]
    assert train.decode(5).shape == (4, 5, 3)
    assert int(test.decode(0)[0, 0, 0]) == 9


@pytest.mark.parametrize("options", [{"image": "img", "label": "fine_label"}, {"plain": True}])
def test_other_columns_and_subfolder(tmp_path, options):
    write(tmp_path / "data" / "train.parquet", [0, 2, 1], **options)
    write(tmp_path / "data" / "test.parquet", [1], **options)
    assert open_source(tmp_path, split="train").classes == ("0", "1", "2")
    assert open_source(tmp_path, split="test").classes == ("0", "1", "2")  # counted in the train split


def test_limit_copies_only_the_chosen_rows(tmp_path):
    write(tmp_path / "train.parquet", [0, 1] * 40)
    whole, part = open_source(tmp_path, split="train"), open_source(tmp_path, split="train", limit=10)
    assert np.bincount(part.labels).tolist() == [5, 5]
    assert part._stored.size_bytes < whole._stored.size_bytes / 7
    values = [int(part.decode(k)[0, 0, 0]) for k in range(10)]
    assert [value % 2 for value in values] == part.labels.tolist()
    assert len(set(values)) == 10


def test_single_file(tmp_path):
    write(tmp_path / "some.parquet", [0, 1])
    write(tmp_path / "test.parquet", [0, 1])
    assert len(open_source(tmp_path / "some.parquet", split="train")) == 2
    assert len(open_source(tmp_path / "test.parquet", split="test")) == 2
    with pytest.raises(DataError, match="no test split"):
        open_source(tmp_path / "some.parquet", split="test")
    with pytest.raises(DataError, match="no train split"):
        open_source(tmp_path / "test.parquet", split="train")


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0, 2], "label 2 at image 1"), ([-1, 0], "label -1 at image 0"), ([0, None], "label -1 at image 1")],
)
def test_labels_out_of_range(tmp_path, labels, message):
    write(tmp_path / "train.parquet", labels, names=["cat", "dog"])
    with pytest.raises(DataError, match=message):
        open_source(tmp_path, split="train")


def test_text_labels_and_missing_columns(tmp_path):
    write(tmp_path / "a" / "train.parquet", ["cat", "dog"])
    with pytest.raises(DataError, match="holds string"):
        open_source(tmp_path / "a", split="train")
    write(tmp_path / "b" / "train.parquet", [0, 1], image="picture")
    with pytest.raises(DataError, match="column of images called image or img"):
        open_source(tmp_path / "b", split="train")


def test_damaged_file(tmp_path):
    write(tmp_path / "train.parquet", [0, 1])
    data = (tmp_path / "train.parquet").read_bytes()
    (tmp_path / "train.parquet").write_bytes(data[:-20])
    with pytest.raises(DataError, match="whole Parquet file"):
        open_source(tmp_path, split="train")


def test_row_without_bytes_is_broken(tmp_path):
    rows = [{"bytes": png(1), "path": "a.png"}, {"bytes": None, "path": "b.png"}]
    pyarrow.parquet.write_table(pyarrow.table({"image": rows, "label": [0, 1]}), tmp_path / "train.parquet")
    source = open_source(tmp_path, split="train")
    assert int(source.decode(0)[0, 0, 0]) == 1
    with pytest.raises(BrokenImage, match="row 1"):
        source.decode(1)


def test_source_outlives_its_files(tmp_path):
    write(tmp_path / "d" / "train.parquet", [0, 1])
    source = open_source(tmp_path / "d", split="train")
    shutil.rmtree(tmp_path / "d")
    assert int(source.decode(1)[0, 0, 0]) == 1
