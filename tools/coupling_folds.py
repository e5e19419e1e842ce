"""Batch norm after a coupling: five exact ways to compute it, timed against each other in ONNX Runtime.

    u = x1 + F x2,   z1 = s1 u + t1,   z2 = s2 (x2 + G u) + t2,   then leaky ReLU of both

joined    as it stands: the halves joined, one batch norm, split again
halves    the halves stay apart and have a batch norm each
factors   s into the weights, a factor left on the identity paths: u' = s1 x1 + (s1 F) x2, z1 = u' + t1,
          z2 = s2 x2 + (s2 G / s1) u' + t2
carried   z = d z~ with d the product of all s so far, taken in by the weights; t1 is left, and d at the end
delta     the identity paths as Dirac deltas: u' = [diag(s1) I, s1 F] [x1, x2], z1 = u' + t1,
          z2 = [s2 G / s1, diag(s2) I] [u', x2] + t2

t1 stays in all of them, as G pads u with zeros. "carried" needs s > 0, which invertible batch norm has: leaky ReLU lets
such factors through. Its channels then differ by products of many scales, which half precision and INT8 do not bear.

Timed are stacks of coupling layers as the stages of the networks have them, with random weights and one image. All
graphs of a stage are open at once, each runs once in every round in random order, ratios are medians over the rounds.
The outputs are compared in float64.

    python tools/coupling_folds.py --out docs/results/coupling_folds.json
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import torch.nn.functional as F
from environment import publish
from torch import Tensor, nn

WAYS = ("joined", "halves", "factors", "carried", "delta")
STAGES = (
    *[("layerwise18", *stage) for stage in ((32, 32, 4, 1), (128, 16, 4, 1), (512, 8, 4, 1), (512, 4, 2, 4))],
    *[("hybrid18", *stage) for stage in ((16, 32, 8, 1), (64, 16, 8, 1), (256, 8, 8, 1), (256, 4, 4, 4))],
)
"""Network, channels, pixels of a side, coupling layers, images after batch pooling; hybrid18 has them in f and g."""
SLOPE = 0.1


class Coupling(nn.Module):
    """One coupling layer; takes and gives halves. ``d``: the factors that its input carries, (2, h)."""

    def __init__(self, way: str, source: dict[str, Tensor], d: Tensor) -> None:
        super().__init__()
        f, g, s, t = (source[name] for name in ("f", "g", "s", "t"))  # s, t: (2, h)
        h = len(f)
        self.way, self.h, bias = way, h, None
        column, row = (lambda v: v.view(-1, 1, 1, 1)), (lambda v: v.view(1, -1, 1, 1))
        if way in ("joined", "halves"):
            norms = [(s.flatten(), t.flatten())] if way == "joined" else list(zip(s, t, strict=True))
            self.norms = nn.ModuleList(_norm(scale, shift) for scale, shift in norms)
        elif way == "carried":
            f, g = f * row(d[1]) / column(d[0]), g * row(d[0]) / column(d[1])
            bias, shift = t[1] / (s[1] * d[1]), t[0] / (s[0] * d[0])
        else:
            f, g, bias, shift = f * column(s[0]), g * column(s[1]) / row(s[0]), t[1], t[0]
            if way == "delta":
                eyes = [nn.init.dirac_(torch.zeros(h, h, 3, 3, dtype=f.dtype)) * column(s[k]) for k in (0, 1)]
                f, g = torch.cat([eyes[0], f], 1), torch.cat([g, eyes[1]], 1)
        self.f, self.g = _conv(f, None), _conv(g, bias)
        if bias is not None:
            self.shift = nn.Parameter(shift.view(1, -1, 1, 1))
            self.s1, self.s2 = (nn.Parameter(scale.view(1, -1, 1, 1)) for scale in s)

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        if self.way == "delta":
            u = self.f(torch.cat([x1, x2], 1))
            z1, z2 = u + self.shift, self.g(torch.cat([u, x2], 1))
        elif self.way == "factors":
            u = x1 * self.s1 + self.f(x2)
            z1, z2 = u + self.shift, x2 * self.s2 + self.g(u)
        else:
            u = x1 + self.f(x2)
            z1, z2 = u, x2 + self.g(u)
            if self.way == "joined":
                joined = F.leaky_relu(self.norms[0](torch.cat([z1, z2], 1)), SLOPE)
                return torch.split(joined, [self.h, self.h], 1)  # type: ignore[return-value]
            z1, z2 = (z1 + self.shift, z2) if self.way == "carried" else (self.norms[0](z1), self.norms[1](z2))
        return F.leaky_relu(z1, SLOPE), F.leaky_relu(z2, SLOPE)


class Stage(nn.Module):
    """Coupling layers on x (n, c, h, w), whose factors are put right at its end."""

    def __init__(self, way: str, sources: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.h = len(sources[0]["f"])
        d, layers = torch.ones(2, self.h, dtype=torch.double), []
        for source in sources:
            layers.append(Coupling(way, source, d))
            d = d * source["s"]
        self.layers = nn.ModuleList(layers)
        self.factors = nn.Parameter(d.reshape(1, -1, 1, 1)) if way == "carried" else None

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = torch.split(x, [self.h, self.h], 1)
        for layer in self.layers:
            x1, x2 = layer(x1, x2)
        x = torch.cat([x1, x2], 1)
        return x if self.factors is None else x * self.factors


def _norm(scale: Tensor, shift: Tensor) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(len(scale), eps=0.0)
    norm.weight, norm.bias = nn.Parameter(scale), nn.Parameter(shift)
    return norm


def _conv(weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1, bias=bias is not None)
    conv.weight = nn.Parameter(weight)
    if bias is not None:
        conv.bias = nn.Parameter(bias)
    return conv


def measure(
    network: str, channels: int, side: int, layers: int, count: int, *, rounds: int, folder: Path
) -> list[dict[str, Any]]:
    """A row for each way of one stage."""
    torch.manual_seed(0)
    h = channels // 2
    sources = [
        {
            **{name: torch.randn(h, h, 3, 3, dtype=torch.double) / (27 * h) ** 0.5 for name in ("f", "g")},
            "s": torch.rand(2, h, dtype=torch.double) + 0.5,
            "t": torch.randn(2, h, dtype=torch.double),
        }
        for _ in range(layers)
    ]
    x = torch.randn(count, channels, side, side, dtype=torch.double)
    sessions, differences, expected = {}, {}, x
    for way in WAYS:
        stage = Stage(way, sources).double().eval()
        with torch.no_grad():
            found = stage(x)
        expected = found if way == "joined" else expected
        differences[way] = float((found - expected).abs().max() / expected.abs().max())
        path = folder / f"{way}.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                stage.float(),
                (x.float(),),
                str(path),
                dynamo=False,
                training=torch.onnx.TrainingMode.PRESERVE,
                opset_version=17,
                input_names=["x"],
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        sessions[way] = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(-5, rounds):
        for way in random.Random(number).sample(WAYS, len(WAYS)):
            began = time.perf_counter()
            sessions[way].run(None, {"x": x.float().numpy()})
            if number >= 0:
                seconds[way].append(time.perf_counter() - began)
    return [
        {
            **{"network": network, "channels": channels, "side": side, "layers": layers, "batch_size": count},
            **{"way": way, "max_difference": differences[way]},
            "latency_ms": 1e3 * statistics.median(seconds[way]),
            "over_joined": statistics.median(a / b for a, b in zip(seconds[way], seconds["joined"], strict=True)),
        }
        for way in WAYS
    ]


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--stages", type=int, default=len(STAGES), help="how many of them")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--out", type=Path, help="write it to this file")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for stage in STAGES[: options.stages]:
            rows += measure(*stage, rounds=options.rounds, folder=Path(folder))
    publish(rows, out=options.out, as_json=options.json, seed=0)
    if not options.json:
        for row in rows:
            print(
                f"{row['network']:<11} {row['channels']:>4} channels, {row['side']:>2} pixels  {row['way']:<8} "
                f"{row['latency_ms']:7.3f} ms  "
                f"/ joined {row['over_joined']:.3f}  difference {row['max_difference']:.1e}"
            )


if __name__ == "__main__":
    main()
