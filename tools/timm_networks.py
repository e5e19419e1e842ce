"""Networks of timm without torchvision, for trying edgetrain on models that nobody here wrote.

timm imports torchvision for data transforms, data sets and one frozen batch norm; its network definitions need only
torch. Where torchvision is not installed, empty modules take its place.

    python tools/timm_networks.py        # how each network is cut
"""

from __future__ import annotations

import argparse
import enum
import importlib.machinery
import importlib.util
import sys
import time
import types
from typing import Any

from torch import nn

NETWORKS = (
    "resnet50",
    "mobilenetv2_100",
    "mobilenetv3_large_100",
    "efficientnet_b0",
    "convnext_tiny",
    "vit_small_patch16_224",
    "densenet121",
)


def create(name: str, **options: Any) -> nn.Module:
    """timm's network ``name`` with random weights.

    Raises:
        ImportError: timm, or what it needs besides torchvision, is not installed.
    """
    if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        _stand_in_for_torchvision()
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False, **options)
    return model


class _Absent(types.ModuleType):
    """A module that has every name, each an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (nn.Module,), {})


def _stand_in_for_torchvision() -> None:
    for path in ("", ".transforms", ".transforms.functional", ".ops", ".ops.misc", ".datasets", ".utils"):
        module = _Absent(f"torchvision{path}")
        module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(module.__name__, None), []
        sys.modules[f"torchvision{path}"] = module
        if path:
            parent, _, name = f"torchvision{path}".rpartition(".")
            setattr(sys.modules[parent], name, module)
    modes = enum.Enum("InterpolationMode", "NEAREST NEAREST_EXACT BILINEAR BICUBIC BOX HAMMING LANCZOS")
    for path in ("torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules[path].InterpolationMode = modes  # type: ignore[attr-defined]


def main() -> None:
    from edgetrain.chain import chain_of

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--blocks", action="store_true", help="list every block")
    for name in parser.parse_args().networks:
        model = create(name)
        began = time.perf_counter()
        chain = chain_of(model)
        seconds = time.perf_counter() - began
        whole = [block for block in chain.blocks if block.uncut]
        print(f"{name}: {len(chain.blocks)} blocks in {seconds:.2f} s, {len(whole)} with a reason not to cut further")
        for block in chain.blocks if parser.parse_args().blocks else ():
            print(f"    {block.name:<48} {block.uncut or ''}")


if __name__ == "__main__":
    main()
