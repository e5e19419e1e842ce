"""The folded network of a step's state: its weights by a graph, at their places in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn
from train_steps import SHAPE, exported, small, start_of

import edgetrain.lite
from edgetrain.errors import ExportError
from edgetrain.export.fold import fold
from edgetrain.export.images import Normalisation, with_normalisation
from edgetrain.export.train_step import inference, write
from edgetrain.export.train_step.inference import FOLDED, make_inference, raw_offsets, record_folding, updated

GREY = Normalisation((0.5,) * 3, (0.25,) * 3)
NETWORKS: list[tuple[str, dict[str, Any]]] = [
    ("hybrid", {"dirac": True}),
    ("irevnet", {"dirac": True}),
    ("layerwise", {}),
    ("residual", {}),
]


def trained(name: str, **options: Any) -> nn.Module:
    """With statistics and shifts that a fold has to get right."""
    model = small(name, **options).eval()
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dim() == 1:
                tensor.add_(torch.rand(tensor.shape, generator=random))
    return model


@pytest.mark.parametrize(("name", "options"), NETWORKS)
def test_the_graph_computes_what_the_folds_do(name: str, options: dict[str, Any]) -> None:
    """In ONNX's reference implementation; both round the same float64 to float32."""
    model = trained(name, **options)
    whole = with_normalisation(model, GREY)
    plain = fold(whole)
    expected = {key.removeprefix("network."): value.numpy() for key, value in plain.state_dict().items()}
    graph = record_folding(whole, set(expected), opset=17)
    proto = graph.graph.model("fold")
    state = start_of(model)
    names = [output.name for output in proto.graph.output]
    found = ReferenceEvaluator(proto).run(None, {name: state[name] for name in graph.reads})
    compared = dict(zip(names, found, strict=True))
    assert len(compared) >= len([p for p in model.parameters() if p.dim() > 1])
    for key, value in compared.items():
        assert np.allclose(value, expected[key.removeprefix(FOLDED)], rtol=1e-6, atol=1e-7), key


def test_offsets_are_those_of_the_numbers_in_the_file(tmp_path: Path) -> None:
    made = make_inference(trained("hybrid"), SHAPE, GREY, opset=17, folder=tmp_path)
    held = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load_model_from_string(made.model).graph.initializer}
    assert made.offsets
    for name, offset in made.offsets.items():
        data = held[name].tobytes()
        assert made.model[offset : offset + len(data)] == data
    assert raw_offsets(made.model).keys() >= made.offsets.keys()
    new = {name: held[name] + 1 for name in made.offsets}
    other = onnx.load_model_from_string(updated(made.model, new, made.offsets))
    for initialiser in other.graph.initializer:
        array = onnx.numpy_helper.to_array(initialiser)
        assert np.array_equal(array, new.get(initialiser.name, held[initialiser.name]))


def test_a_fresh_network_has_its_biases_too(tmp_path: Path) -> None:
    """Its batch norms shift by zero, of which a fold of values would make no bias; later they do shift."""
    made = make_inference(small("irevnet"), SHAPE, GREY, opset=17, folder=tmp_path)
    biases = [name for name in made.offsets if name.endswith("bias")]
    assert len(biases) >= 4
    plain = fold(with_normalisation(small("irevnet").eval(), GREY))
    assert len(biases) > len([key for key in plain.state_dict() if key.endswith("bias")]), "the test needs a fresh one"


def test_a_weight_that_the_graph_forgets_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(whole: nn.Module, held: set[str], *, opset: int) -> Any:
        return record_folding(whole, {name for name in held if "stem" not in name}, opset=opset)

    monkeypatch.setattr(inference, "record_folding", forgetful)
    with pytest.raises(ExportError, match="differs from training module"):
        make_inference(trained("hybrid"), SHAPE, GREY, opset=17, folder=tmp_path)


def test_where_the_folds_cannot_be_written_the_rest_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise ExportError(found="no counterpart", expected="one", action="none")

    monkeypatch.setattr(write, "make_inference", refuse)
    exported(small("residual"), "keep_all", tmp_path / "step")
    run = edgetrain.lite.load(tmp_path / "step")
    assert run.manifest["inference"] == {"refused": "no counterpart"}
    with pytest.raises(ExportError, match="has no inference model: no counterpart"):
        run.export(tmp_path / "inference.onnx")
    assert not (tmp_path / "inference.onnx").exists()
