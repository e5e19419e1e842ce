"""What cannot be true of one device: each contradiction names the fields that contradict each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgetrain.profiles.quantity import SIZES
from edgetrain.units import format_mib

if TYPE_CHECKING:
    from edgetrain.profiles.profile import Profile

_OF_A_GPU = ("compute_capability", "context", "cublas_workspace", "cudnn_workspace")
_SIZES = ("memory", "carve_out", "system_reserved", "context", "framework", "default_budget", "cublas_workspace")
_BF16_SINCE = (8, 0)  # CUDA C++ programming guide, arithmetic instructions by compute capability
_OPSETS = range(1, 100)


def check_consistency(profile: Profile) -> None:
    """Refuses a profile that contradicts itself.

    Raises:
        ValueError: it does; the text begins with the name of a field.
    """
    _check_kind(profile)
    _check_sizes(profile)
    _check_capability(profile)
    if profile.training != "pytorch" and not profile.training_reason:
        raise ValueError(f"training is {profile.training!r}, which needs a training_reason")
    opset = profile.software.onnx_opset
    if opset is not None and opset.value not in _OPSETS:
        raise ValueError(f"software.onnx_opset is {opset.value:g}, expected a whole number below {_OPSETS.stop}")


def _check_kind(profile: Profile) -> None:
    if profile.kind != "cpu":
        return
    for name in _OF_A_GPU:
        if getattr(profile, name) is not None:
            raise ValueError(f"{name} belongs to a GPU, but kind is 'cpu'")
    if profile.unified:
        raise ValueError("unified is true, but kind is 'cpu': there is no GPU to share the memory with")
    if profile.software.cuda is not None or profile.software.cudnn is not None:
        raise ValueError("software.cuda and software.cudnn belong to a GPU, but kind is 'cpu'")


def _check_sizes(profile: Profile) -> None:
    for name in _SIZES:
        quantity = getattr(profile, name)
        if quantity is not None and quantity.value * SIZES[quantity.unit] < 1:
            raise ValueError(f"{name} is less than one byte")
    if profile.carve_out is not None and not (profile.unified or profile.kind == "cpu"):
        raise ValueError("carve_out is what firmware keeps of the host's memory, but unified is false")
    memory, available, budget = profile.memory_bytes, profile.available_bytes, profile.default_budget_bytes
    if memory is None or available is None:
        return
    if available <= 0:
        raise ValueError(
            f"system_reserved and the other overheads take {format_mib(memory - available)}, "
            f"but memory is {format_mib(memory)}"
        )
    if budget is not None and budget > available:
        known = ", ".join(name for name in _SIZES[1:5] if getattr(profile, name) is not None)
        raise ValueError(
            f"default_budget is {format_mib(budget)}, above the {format_mib(available)} of memory"
            + (f" that {known} leave" if known else "")
        )


def _check_capability(profile: Profile) -> None:
    capability = profile.compute_capability
    if capability is None:
        return
    if abs(capability.value * 10 - round(capability.value * 10)) > 1e-9:
        raise ValueError(f"compute_capability is {capability.value:g}, expected one digit after the point")
    pair = profile.compute_capability_pair
    if pair is not None and pair < _BF16_SINCE and profile.rates.bf16 is not None:
        raise ValueError(f"rates.bf16 is given, but compute_capability is {pair[0]}.{pair[1]}: bf16 begins at 8.0")
