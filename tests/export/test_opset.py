"""The opset follows from what the profile says of the device's TensorRT."""

from __future__ import annotations

import pytest

from edgetrain.errors import ExportError
from edgetrain.export.opset import choose_opset
from edgetrain.profiles import load_profile, profile_names

# JetPack 4.6: TensorRT 8.2 (operators.md of onnx-tensorrt 8.2: opset 13); JetPack 5.1: TensorRT 8.5 (opset 17);
# JetPack 7: newer than the graph writer, which ends at 20; no TensorRT: 17
EXPECTED = {
    "jetpack4": 13,
    "jetpack5": 17,
    "jetpack7": 20,
    "desktop-cu126": 17,
    "no stack": 17,
}


def stack_of(name: str) -> str:
    """The software stack at the end of the line of ``extends``."""
    profile = load_profile(name)
    if profile.software.jetpack is None:
        return "desktop-cu126" if profile.software.cuda is not None else "no stack"
    return f"jetpack{profile.software.jetpack.value[0]}"


@pytest.mark.parametrize("name", profile_names())
def test_every_profile(name: str):
    assert choose_opset(load_profile(name)).version == EXPECTED[stack_of(name)]


def test_the_reason_names_the_parser():
    assert choose_opset(load_profile("nano-4gb")).reason == "TensorRT 8.2.1 of nano-4gb reads up to 13"
    assert "ends at 20" in choose_opset(load_profile("thor")).reason
    assert "ONNX Runtime" in choose_opset(None).reason


def test_a_parser_that_is_too_old_is_refused():
    nano = load_profile("nano-4gb")
    assert nano.software.onnx_opset is not None
    software = nano.software.model_copy(
        update={"onnx_opset": nano.software.onnx_opset.model_copy(update={"value": 11.0})}
    )
    with pytest.raises(ExportError, match="up to 11; expected 13 or more"):
        choose_opset(nano.model_copy(update={"software": software}))
