"""Additive couplings of arbitrary modules: this package against the public libraries, on the same mathematics.

Network: conv3x3(3 -> C), `depth` couplings with f = g = conv3x3-BN-ReLU-conv3x3-BN on C/2, mean pool, linear(10),
cross-entropy, float32, batch 16 of 3x32x32. Peak above weights and zeroed gradients, at the allocator, each case in
a fresh process; times alternate between all contenders in one process, as ratios to plain autograd of the same
round; gradients against plain autograd in float64; batches that batch norm counts in one step.

The peers are those that are installed (pip install memcnn==1.5.2 revlib==1.7.2 RevTorch==0.2.4); absent ones are
listed as absent.

    python tools/peers_bench.py
    python tools/peers_bench.py --json
    python tools/peers_bench.py --out docs/results/peers_cpu.json
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from environment import publish
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import edgetrain
from edgetrain.memory import measure_peak

BATCH = 16


def module(channels: int) -> nn.Sequential:
    """f or g."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
    )


class Mean(nn.Module):
    """Mean over the pixels."""

    def forward(self, x: Tensor) -> Tensor:
        """x (n, c, h, w) -> (n, c)."""
        return x.mean((2, 3))


class Body(nn.Module):
    """The couplings run by ``run``; their modules are registered here for every contender alike."""

    def __init__(self, pairs: nn.ModuleList, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pairs, self.run = pairs, run

    def forward(self, x: Tensor) -> Tensor:
        """x (n, c, h, w) -> (n, c, h, w)."""
        return self.run(x)


def couplings(pairs: nn.ModuleList) -> list[nn.Module]:
    """The couplings as plain differentiable modules."""
    return [edgetrain.nn.ReversibleBlock(f, g) for f, g in pairs]


def build_plain(pairs: nn.ModuleList) -> Callable[[Tensor], Tensor]:
    """Autograd keeps everything."""
    return nn.Sequential(*couplings(pairs))


def build_checkpoint_each(pairs: nn.ModuleList) -> Callable[[Tensor], Tensor]:
    """torch.utils.checkpoint around every coupling."""
    blocks = couplings(pairs)

    def run(x: Tensor) -> Tensor:
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    return run


def build_checkpoint_sqrt(pairs: nn.ModuleList) -> Callable[[Tensor], Tensor]:
    """torch.utils.checkpoint_sequential with sqrt(depth) segments."""
    blocks = nn.Sequential(*couplings(pairs))
    segments = max(1, round(math.sqrt(len(pairs))))
    return lambda x: checkpoint_sequential(blocks, segments, x, use_reentrant=False)


def build_revtorch(pairs: nn.ModuleList) -> Callable[[Tensor], Tensor]:
    """RevTorch."""
    import revtorch

    return revtorch.ReversibleSequence(nn.ModuleList(revtorch.ReversibleBlock(f, g) for f, g in pairs))


def build_revlib(pairs: nn.ModuleList) -> Callable[[Tensor], Tensor]:
    """revlib."""
    import revlib

    return revlib.ReversibleSequential(*[half for pair in pairs for half in pair])


def build_memcnn(pairs: nn.ModuleList) -> Callable[[Tensor], Tensor]:
    """memcnn."""
    import memcnn

    return nn.Sequential(
        *[memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(Fm=f, Gm=g), keep_input=False) for f, g in pairs]
    )


BUILDERS: dict[str, Callable[[nn.ModuleList], Callable[[Tensor], Tensor]]] = {
    "plain autograd": build_plain,
    "torch checkpoint, sqrt(n) segments": build_checkpoint_sqrt,
    "torch checkpoint, every block": build_checkpoint_each,
    "memcnn": build_memcnn,
    "revlib": build_revlib,
    "RevTorch": build_revtorch,
}
OURS = "edgetrain, invert"
NAMES = [*BUILDERS, OURS]


def network(name: str, channels: int, depth: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The contender ``name`` with the weights that all contenders share."""
    torch.manual_seed(0)
    stem = nn.Conv2d(3, channels, 3, padding=1)
    pairs = nn.ModuleList(nn.ModuleList([module(channels // 2), module(channels // 2)]) for _ in range(depth))
    linear = nn.Linear(channels, 10)
    if name == OURS:
        model = nn.Sequential(stem, *couplings(pairs), Mean(), linear).to(dtype)
        plan = edgetrain.uniform_plan(model, "invert", input_shape=(3, 32, 32), batch_size=BATCH)
        return edgetrain.wrap(model, plan)
    pairs = pairs.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = BUILDERS[name](pairs)
    return nn.Sequential(stem, Body(pairs, run), Mean(), linear).to(dtype)


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The one batch of this benchmark."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator, dtype=torch.double).to(dtype)
    return images, torch.randint(0, 10, (BATCH,), generator=generator)


def step(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Seconds of one forward and backward pass."""
    start = time.perf_counter()
    F.cross_entropy(net(images), labels).backward()
    return time.perf_counter() - start


def peak(name: str, channels: int, depth: int) -> int:
    """Bytes at the allocator above weights and zeroed gradients."""
    net, (images, labels) = network(name, channels, depth), batch()
    step(net, images, labels)
    net.zero_grad(set_to_none=False)
    return measure_peak(lambda: step(net, images, labels)).allocator_peak_bytes


def parameters(net: nn.Module) -> list[nn.Parameter]:
    """Each parameter once, in an order that all contenders share."""
    model = net.model if isinstance(net, edgetrain.Wrapped) else net
    stem, linear = model[0], model[-1]
    if isinstance(net, edgetrain.Wrapped):
        pairs = [half for block in list(model)[1:-2] for half in (block.f, block.g)]
    else:
        pairs = [half for pair in model[1].pairs for half in pair]
    return [p for part in (stem, *pairs, linear) for p in part.parameters()]


def gradients(name: str, channels: int, depth: int, dtype: torch.dtype) -> Tensor:
    """All gradients after one step, flat, in float64."""
    net = network(name, channels, depth, dtype)
    step(net, *batch(dtype))
    return torch.cat([p.grad.double().flatten() for p in parameters(net) if p.grad is not None])


def counted_batches(name: str, channels: int) -> int:
    """``num_batches_tracked`` of the first batch norm after one step."""
    net = network(name, channels, 2)
    step(net, *batch())
    return int(next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)).num_batches_tracked)


def available() -> tuple[list[str], dict[str, str]]:
    """Contenders that run here, and why the others do not."""
    present, absent = [], {}
    for name in NAMES:
        try:
            step(network(name, 8, 2), *batch())
            present.append(name)
        except Exception as error:
            absent[name] = str(error).splitlines()[0]
    return present, absent


def times(names: list[str], channels: int, depth: int, repeats: int) -> dict[str, dict[str, float]]:
    """Median step time of each contender and its median ratio to plain autograd in the same round."""
    nets = {name: network(name, channels, depth) for name in names}
    images, labels = batch()
    for _ in range(2):
        for net in nets.values():
            step(net, images, labels)
    rounds = [{name: step(net, images, labels) for name, net in nets.items()} for _ in range(repeats)]
    plain = NAMES[0]
    return {
        name: {
            "ms": 1e3 * statistics.median(r[name] for r in rounds),
            "time_over_plain": statistics.median(r[name] / r[plain] for r in rounds),
        }
        for name in names
    }


def in_fresh_process(name: str, channels: int, depth: int) -> int:
    """:func:`peak` in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--peak", name, str(channels), str(depth)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 24])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    parser.add_argument("--out", type=Path, help="write the JSON document to this file too")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.peak:
        name, channels, depth = arguments.peak
        print(peak(name, int(channels), int(depth)))
        return
    stream = sys.stderr if arguments.json else sys.stdout
    names, absent = available()
    rows: list[dict[str, Any]] = []
    for depth in arguments.depths:
        timed = times(names, arguments.channels, depth, arguments.repeats)
        exact = gradients(NAMES[0], arguments.channels, depth, torch.double)
        print(
            f"C = {arguments.channels}, depth {depth:<21} peak MiB  time/plain  gradient error  BN counts", file=stream
        )
        for name in names:
            error = gradients(name, arguments.channels, depth, torch.float32) - exact
            row = {
                "name": name,
                "channels": arguments.channels,
                "depth": depth,
                "peak_bytes": in_fresh_process(name, arguments.channels, depth),
                **timed[name],
                "gradient_error": float(error.norm() / exact.norm()),
                "batches_counted": counted_batches(name, arguments.channels),
            }
            rows.append(row)
            print(
                f"{name:<36} {row['peak_bytes'] / 2**20:>8.1f} {row['time_over_plain']:>10.2f}x "
                f"{row['gradient_error']:>14.1e} {row['batches_counted']:>10}",
                file=stream,
                flush=True,
            )
    for name, reason in absent.items():
        print(f"{name:<36} absent: {reason}", file=stream)
    publish(rows, out=arguments.out, as_json=arguments.json, absent=absent, batch=BATCH, seed=0)


if __name__ == "__main__":
    main()
