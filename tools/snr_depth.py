"""Signal-to-noise ratio of inverted activations against depth and slope: the authors' figure, measured again.

For networks of 3 to 12 layers at 32 channels, float32 and random weights, the output is inverted down to the
input and compared with the true input. Layer-wise: coupling layers, inverted one by one. Hybrid: reversible
blocks of two coupling layers per module, inverted block by block; `hidden` is the worst activation inside a
module, inverted layer by layer from the module's output. `predicted` is what edgetrain.chain.measure_noise says
beforehand from a quarter of the batch, each block inverted on its own.

    python tools/snr_depth.py --json                       # to stdout
    python tools/snr_depth.py --out docs/results           # snr_depth.json and snr_depth.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from environment import publish
from torch import nn

from edgetrain.chain import measure_noise
from edgetrain.nn import CouplingLayer, CouplingStack, HybridBlock, Invertible, InvertibleSequential
from edgetrain.nn.noise import snr

SLOPES = (0.05, 0.1, 0.2, 0.4)
DEPTHS = tuple(range(3, 13))
# the authors' figure, read off by them at 3 and 12 layers (layer-wise) and over all depths (hybrid)
PRINTED = {0.4: (1e9, 1e2), 0.2: (1e9, 1e-1), 0.1: (1e9, 1e-2), 0.05: (1e9, 3e-3)}


def walk_back(layers: list[Invertible], x: torch.Tensor) -> list[float]:
    """SNR of the input of every layer when the output of the last one is inverted down, first layer first."""
    inputs = [x.clone()]
    for layer in layers:
        inputs.append(layer.forward_(inputs[-1].clone()))
    y, ratios = inputs[-1], []
    for layer, true_input in zip(reversed(layers), reversed(inputs[:-1]), strict=True):
        y = layer.inverse(y)
        ratios.append(snr(true_input, y))
    return ratios[::-1]


def hidden(block: HybridBlock, x: torch.Tensor) -> float:
    """Worst SNR of an activation inside the modules of ``block``."""
    worst = float("inf")
    for stack in (block.f, block.g):
        assert isinstance(stack, CouplingStack)
        # the first layer's activation is computed again from the exact input, the others are inverted
        worst = min(worst, *walk_back(stack.layers(), x.chunk(2, 1)[0].clone())[1:])
    return worst


def predicted(layers: list[Invertible], x: torch.Tensor) -> float:
    """Smallest SNR on the way down, as a planner would know it."""
    return measure_noise(nn.Sequential(*layers), x[: len(x) // 4]).run_snr(0, len(layers) - 1, way="invert")


def measure(seeds: int) -> list[dict[str, Any]]:
    """One row per family, slope, depth and seed."""
    rows = []
    for slope in SLOPES:
        for depth in DEPTHS:
            for seed in range(seeds):
                torch.manual_seed(seed)
                x = torch.randn(32, 32, 16, 16)
                layers: list[Invertible] = [CouplingLayer(32, slope=slope) for _ in range(depth)]
                rows.append({"family": "layerwise", "slope": slope, "depth": depth, "seed": seed})
                rows[-1]["snr"] = walk_back(layers, x)[0]
                rows[-1]["predicted_snr"] = predicted(layers, x)
                blocks: list[Invertible] = [HybridBlock(32, slope=slope) for _ in range(depth)]
                rows.append({"family": "hybrid", "slope": slope, "depth": depth, "seed": seed})
                rows[-1]["snr"] = min(walk_back(blocks, x))
                rows[-1]["predicted_snr"] = predicted(blocks, x)
                last = InvertibleSequential(**{f"b{k}": b for k, b in enumerate(blocks[:-1])})
                assert isinstance(blocks[-1], HybridBlock)
                rows[-1]["hidden_snr"] = hidden(blocks[-1], last.forward_(x.clone()))
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The figure: depth against SNR, one line per slope."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for axis, family in zip(axes, ("layerwise", "hybrid"), strict=True):
        for slope, colour, marker in zip(SLOPES, ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), "os^D", strict=True):
            medians = [
                sorted(r["snr"] for r in rows if (r["family"], r["slope"], r["depth"]) == (family, slope, depth))
                for depth in DEPTHS
            ]
            axis.semilogy(
                DEPTHS, [m[len(m) // 2] for m in medians], color=colour, marker=marker, label=f"slope {slope}"
            )
        axis.axhline(1.0, color="grey", linestyle=":", linewidth=1)
        axis.set_xlabel("layers" if family == "layerwise" else "reversible blocks")
        axis.set_title("layer-wise: every layer inverted" if family == "layerwise" else "hybrid: inverted by blocks")
        axis.grid(alpha=0.3)
        axis.set_xticks(DEPTHS)
    axes[0].text(3, 1.6, "below 1, training fails", fontsize=8, color="grey")
    axes[0].set_ylabel("SNR of the inverted input, float32")
    axes[0].legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for snr_depth.json and snr_depth.png")
    arguments = parser.parse_args()
    rows = measure(arguments.seeds)
    json_file = None if arguments.out is None else arguments.out / "snr_depth.json"
    publish(rows, out=json_file, as_json=arguments.json)
    if arguments.out is not None:
        draw(rows, arguments.out / "snr_depth.png")
    if arguments.json:
        return
    print(f"{'family':<10} {'slope':>6} {'':<9} " + " ".join(f"{d:>7}" for d in DEPTHS) + "   printed at 3 and 12")
    for family in ("layerwise", "hybrid"):
        for slope in SLOPES:
            printed = "{:.0e}, {:.0e}".format(*PRINTED[slope]) if family == "layerwise" else "1.2e9 - 1.3e9"
            for what, key, end in (("measured", "snr", printed), ("predicted", "predicted_snr", "")):
                cells = []
                for depth in DEPTHS:
                    of_depth = (r for r in rows if (r["family"], r["slope"], r["depth"]) == (family, slope, depth))
                    ratios = sorted(r[key] for r in of_depth)
                    cells.append(f"{ratios[len(ratios) // 2]:>7.0e}")
                print(f"{family:<10} {slope:>6} {what:<9} " + " ".join(cells) + f"   {end}".rstrip())


if __name__ == "__main__":
    main()
