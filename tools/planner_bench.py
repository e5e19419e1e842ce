"""Plans against torch's checkpointing and against keeping everything, at fractions of the keep-all peak, paired.

For each network: the peak of a step of plain autograd (weights, gradients, momentum and batch included) is 100 %. At
each fraction of it the planner makes a plan with block times measured here, the optimiser after the backward pass or
block by block in it, channels first or last, whichever it finds fastest. Its peak is measured at the allocator, and its
time in rounds in which every contestant runs two steps, of which the second is timed. Contestants: keep all and
torch.utils.checkpoint with every number of segments, each with its batch given channels first and channels last;
torch.compile with activation_memory_budget where --compile asks for it. At each budget the fastest contestant whose
measured peak fits is the peer; the fastest without a compiler is named as well. All run in one process whose heap keeps
what is freed, as edgetrain's own runs do where a cap has room (:func:`edgetrain.targets.keep_freed_blocks`): peers
gain from it too.

    python tools/planner_bench.py
    python tools/planner_bench.py --networks hybrid18 resnet56 --rounds 7
    python tools/planner_bench.py --out docs/results/planner_bench_cpu.json
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import random
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from environment import KeptRows, earlier_rows, publish, versions
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

import edgetrain
from edgetrain.chain import chain_of
from edgetrain.memory import measure_peak, measured_times
from edgetrain.memory.step import OPTIMIZERS
from edgetrain.nn.layouts import with_channels_last
from edgetrain.planner import Plan, Planner
from edgetrain.planner.search import CLOCK_ERROR
from edgetrain.runtime import Wrapped
from edgetrain.runtime.program import Update
from edgetrain.targets import keep_freed_blocks
from edgetrain.units import MIB

FRACTIONS = (0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
OPTIMIZER = "sgd"


@dataclass(frozen=True)
class Case:
    """A network, its batch and the side of its images."""

    name: str
    batch: int
    size: int
    timm: bool = False


CASES = (
    Case("hybrid18", 64, 32),
    Case("revnet18", 64, 32),
    Case("layerwise18", 64, 32),
    Case("resnet56", 64, 32),
    Case("plain60", 32, 32),
    Case("resnet50", 16, 128, timm=True),
    Case("mobilenetv2_100", 16, 96, timm=True),
    Case("densenet121", 8, 128, timm=True),
)


def plain60() -> nn.Module:
    """Sixty 3x3 convolutions of 16 channels, each with a ReLU, and a classifier."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()]
    for _ in range(59):
        layers += [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def build(case: Case) -> nn.Module:
    """The network of ``case``, with weights of seed 0."""
    torch.manual_seed(0)
    if case.timm:
        from timm_networks import create

        return create(case.name)
    return plain60() if case.name == "plain60" else edgetrain.create_model(case.name, num_classes=10)


class Contestant:
    """One way to run a training step, on a network of its own.

    Attributes:
        parts: micro-batches of a step.
        peak_bytes: measured at the allocator; weights, momentum and batch included.
        seconds: of each timed step.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        forward: Callable[[Tensor], Tensor],
        x: Tensor,
        labels: Tensor,
        *,
        parts: int = 1,
    ) -> None:
        self.name, self._model, self._forward, self._x, self._labels = name, model, forward, x, labels
        in_backward = list(forward.optimizers.values()) if isinstance(forward, Wrapped) else []
        self._after = None if in_backward else OPTIMIZERS[OPTIMIZER](model.parameters())
        self._optimizers = in_backward if self._after is None else [self._after]
        self.parts = parts
        self._sizes = random.Random(0)
        self.seconds: list[float] = []
        self.peak_bytes = 0

    @property
    def is_compiled(self) -> bool:
        """Whether torch.compile made it."""
        return self.name.startswith("compile")

    def step(self) -> None:
        """One training step; gradients are gone before it."""
        for x, labels in zip(self._x.chunk(self.parts), self._labels.chunk(self.parts), strict=True):
            (F.cross_entropy(self._forward(x), labels) / self.parts).backward()
        if self._after is not None:
            self._after.step()
            self._after.zero_grad(set_to_none=True)

    def measure(self) -> None:
        """The peak, over a step after a first one that makes the optimiser's state."""
        self.step()
        states = [state for optimizer in self._optimizers for state in optimizer.state.values()]
        state = [t for state in states for t in state.values() if isinstance(t, Tensor)]
        tensors = [*self._model.parameters(), *self._model.buffers(), *state, self._x]
        resident = sum(t.numel() * t.element_size() for t in tensors)
        self.peak_bytes = resident + measure_peak(self.step).allocator_peak_bytes

    def time(self) -> None:
        """One timed step, right after one that is not: a training run repeats its step.

        Another contestant's step leaves other pages in the heap; the first step after it pays for that. Where tensors
        lie decides too, by a fifth and more where some share sets of the cache, and a contestant would meet the same
        addresses every time: so blocks of random sizes are put between them.
        """
        gc.collect()
        blocks = [torch.empty(self._sizes.randrange(1, 12 * MIB), dtype=torch.uint8) for _ in range(8)]
        blocks = blocks[::2]
        self.step()
        began = time.perf_counter()
        self.step()
        self.seconds.append(time.perf_counter() - began)
        del blocks


def segmented(model: nn.Module, segments: int) -> Callable[[Tensor], Tensor]:
    """Torch's checkpointing of the chain's blocks."""
    blocks = nn.Sequential(*(block.module for block in chain_of(model).blocks))
    return lambda x: checkpoint_sequential(blocks, segments, x, use_reentrant=False)


def compiled(model: nn.Module, budget: float) -> Callable[[Tensor], Tensor]:
    """torch.compile that keeps about ``budget`` of the activations."""
    import torch._functorch.config as config

    def run(x: Tensor) -> Tensor:
        return model(x)  # type: ignore[no-any-return]

    # what was compiled is found again by its code object, whatever the budget was: each has one of its own
    code = run.__code__.replace(co_name=f"run_{str(budget).replace('.', '_')}")
    optimized = torch.compile(types.FunctionType(code, run.__globals__, closure=run.__closure__))

    def forward(x: Tensor) -> Tensor:
        with config.patch(activation_memory_budget=budget):
            return optimized(x)  # type: ignore[no-any-return]

    return forward


def run(case: Case, rounds: int, *, compile_budgets: list[float]) -> list[dict[str, Any]]:
    """A row per fraction."""
    keep_freed_blocks()
    model = build(case)
    shape = (3, case.size, case.size)
    x, labels = torch.randn(case.batch, *shape), torch.zeros(case.batch, dtype=torch.long)

    def contestant(
        name: str,
        make: Callable[[nn.Module], Callable[[Tensor], Tensor]],
        parts: int = 1,
        images: Tensor = x,
    ) -> Contestant:
        own = copy.deepcopy(model)
        made = Contestant(name, own, make(own), images, labels, parts=parts)
        made.measure()
        return made

    count = len(chain_of(model).blocks)
    peers: list[Contestant] = []
    for last in (False, True):
        images, where = (with_channels_last(x), ", channels last") if last else (x, "")
        peers.append(contestant(f"keep all{where}", lambda own: own, images=images))
        peers[-1].time()
        for segments in range(1, count + 1):
            make = partial(segmented, segments=segments)
            peers.append(contestant(f"checkpoint, {segments} segments{where}", make, images=images))
            peers[-1].time()
    keep_all = peers[0]
    for budget in compile_budgets:
        try:
            peers.append(contestant(f"compile, {budget}", partial(compiled, budget=budget)))
        except Exception as error:  # no compiler, or it does not take this network
            print(f"{case.name}: compile, {budget} does not run: {error}", file=sys.stderr)

    began = time.perf_counter()
    times = [
        measured_times(
            model,
            input_shape=shape,
            batch_size=case.batch,
            optimizer=OPTIMIZER,
            budget_s=20.0,
            channels_last=channels_last,
        )
        for channels_last in (False, True)
    ]
    times_s = time.perf_counter() - began
    planners = [
        Planner(
            model,
            input_shape=shape,
            batch_size=case.batch,
            optimizer=OPTIMIZER,
            times=of_layout,
            update_in_backward=update_in_backward,
        )
        for of_layout in times
        for update_in_backward in (False, True)
    ]
    rows: list[dict[str, Any]] = []
    plans: list[Contestant | None] = []
    for fraction in FRACTIONS:
        budget = int(fraction * keep_all.peak_bytes)
        row: dict[str, Any] = {"network": case.name, "batch": case.batch, "size": case.size, "budget": fraction}
        row |= {"keep_all_bytes": keep_all.peak_bytes, "budget_bytes": budget, "times_s": times_s}
        began = time.perf_counter()
        fitting_plans = [plan for planner in planners if (plan := planner.fitting(budget)) is not None]
        plan = min(fitting_plans, key=_clocked_seconds, default=None)
        if plan is None:
            plans.append(None)
            needed = min(planner.needed()[0] for planner in planners)
            rows.append(row | {"plan_s": time.perf_counter() - began, "infeasible": needed})
            continue
        row |= {"plan_s": time.perf_counter() - began, "predicted_bytes": plan.peak_bytes}
        row |= {"predicted_s": plan.step_seconds, "summary": ", ".join(plan.summary().splitlines()[:-2])}
        row["channels_last"] = plan.program.channels_last
        row["update_in_backward"] = updates = any(isinstance(step, Update) for step in plan.program.instructions)
        factory = OPTIMIZERS[OPTIMIZER] if updates else None
        wrapped = partial(edgetrain.wrap, plan=plan, optimizer=factory)
        plans.append(contestant(f"plan {fraction:.0%}", wrapped, plan.micro_batches))
        row["peak_bytes"] = plans[-1].peak_bytes
        rows.append(row)

    racing = _front(peers, [row["budget_bytes"] for row in rows])
    runners = [*racing, *(plan for plan in plans if plan is not None)]
    for runner in runners:
        runner.seconds.clear()
    order = random.Random(0)
    for _ in range(rounds):
        # what ran before leaves pages and caches behind: nobody always comes after the same one
        for runner in order.sample(runners, len(runners)):
            runner.time()
    for row, plan_runner in zip(rows, plans, strict=True):
        fitting = [peer for peer in racing if peer.peak_bytes <= row["budget_bytes"]]
        best, eager = _fastest(fitting), _fastest([peer for peer in fitting if not peer.is_compiled])
        row |= {"keep_all_s": statistics.median(keep_all.seconds), "peer": None if best is None else best.name}
        row["eager_peer"] = None if eager is None else eager.name
        if best is not None:
            row |= {"peer_s": statistics.median(best.seconds), "peer_bytes": best.peak_bytes}
        if plan_runner is not None:
            row["seconds"] = statistics.median(plan_runner.seconds)
            row["over_keep_all"] = _ratio(plan_runner, keep_all)
            row["over_peer"] = None if best is None else _ratio(plan_runner, best)
            row["over_eager_peer"] = None if eager is None else _ratio(plan_runner, eager)
    return rows


def _clocked_seconds(plan: Plan) -> float:
    """As the planner chooses: channels come last where that is faster by more than the clock's error."""
    return plan.step_seconds * (1 / (1 - CLOCK_ERROR) if plan.program.channels_last else 1)


def _front(peers: list[Contestant], budgets: list[int]) -> list[Contestant]:
    """Keep all, and for every budget the three that were fastest among those that fit."""
    chosen = {id(peers[0]): peers[0]}
    for budget in budgets:
        fitting = [peer for peer in peers if peer.peak_bytes <= budget and peer.seconds]
        for peer in sorted(fitting, key=lambda peer: min(peer.seconds))[:3]:
            chosen[id(peer)] = peer
    return list(chosen.values()) + [peer for peer in peers if peer.is_compiled]


def _fastest(contestants: list[Contestant]) -> Contestant | None:
    return min(contestants, key=lambda one: statistics.median(one.seconds), default=None)


def _ratio(a: Contestant, b: Contestant) -> float:
    """Median over the rounds."""
    return statistics.median(one / other for one, other in zip(a.seconds, b.seconds, strict=True))


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    head = f"{row['network']:<16} {row['budget']:>5.0%} {row['budget_bytes'] / 2**20:>7.1f} MiB"
    peer = "no peer fits" if row["peer"] is None else f"{row['peer']} {row['peer_s']:.3f} s"
    if "infeasible" in row:
        return f"{head}  no plan fits; {peer}"
    over_peer = "" if row["over_peer"] is None else f" plan/peer {row['over_peer']:.2f}"
    if row["eager_peer"] != row["peer"] and row["over_eager_peer"] is not None:
        over_peer += f", plan/{row['eager_peer']} {row['over_eager_peer']:.2f}"
    return (
        f"{head}  plan {row['peak_bytes'] / 2**20:.1f} MiB ({row['predicted_bytes'] / row['peak_bytes'] - 1:+.1%}) "
        f"{row['seconds']:.3f} s (predicted {row['predicted_s']:.3f}) plan/keep all {row['over_keep_all']:.2f} | "
        f"{peer}{over_peer} | {row['summary']}"
    )


def _in_fresh_process(case: Case, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    command = [sys.executable, __file__, "--rounds", str(arguments.rounds), "--case", json.dumps(vars(case))]
    if arguments.compile:
        command += ["--compile", *(str(budget) for budget in arguments.compile)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: list[dict[str, Any]] = json.loads(answer.splitlines()[-1])
    return found


def main() -> None:
    """Measures, prints, writes; every network in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=[], help="names; all without it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", nargs="*", type=float, default=[], help="budgets for torch.compile, like 0.5")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    parser.add_argument("--out", type=Path, help="write the JSON document to this file too")
    parser.add_argument("--onto", type=Path, help="with --networks: the others' lines are those of this result")
    parser.add_argument("--keep", type=Path, help="keep every network's lines in this file too, and go on from there")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        case = Case(**json.loads(arguments.case))
        print(json.dumps(run(case, arguments.rounds, compile_budgets=arguments.compile)))
        return
    stream = sys.stderr if arguments.json else sys.stdout
    kept = KeptRows(arguments.keep)
    commit = versions()["edgetrain"]
    others = earlier_rows(arguments.onto)
    rows: list[dict[str, Any]] = []
    for case in CASES:
        if arguments.networks and case.name not in arguments.networks:
            rows += [row for row in others if row["network"] == case.name]
            continue
        key = json.dumps([vars(case), arguments.rounds, arguments.compile])
        known = kept.get(key)
        found = _in_fresh_process(case, arguments) if known is None else known["rows"]
        if known is None:
            kept.add(key, {"rows": found})
        rows += [row | {"commit": commit} for row in found]
        for row in found:
            print(line(row), file=stream, flush=True)
    publish(rows, out=arguments.out, as_json=arguments.json, seed=0)


if __name__ == "__main__":
    main()
