"""Plain chains against Dirac chains at growing depth, and weights I + W over many scales of W, on Fashion-MNIST.

Depth: `plain-n` and `diracnet-n-1` (edgetrain/models), equal but for the weights, with the same seed, data and
schedule. Identity: a wide residual network of 28 layers whose convolutions all have the weight I + W, W ~ N(0, sigma^2)
whatever their shape (Zagoruyko, thesis, section 5.3.3). A small setting that a CPU trains in minutes: images halved to
14x14 pixels, some of them, few channels; batches are drawn alike, nothing is augmented. Figures are the training loss
and the accuracy on test images after each epoch.

    python tools/dirac_depth.py --data data/fashion-mnist --out docs/results     # dirac_depth.json and dirac_depth.png
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from environment import KeptRows, publish
from torch import Tensor, nn

import edgetrain
from edgetrain.errors import TrainingError
from edgetrain.nn import identity_plus_
from edgetrain.train import Recipe, Trainer
from edgetrain.train.data.idx import open_idx
from edgetrain.train.data.source import Split

INPUT = (1, 14, 14)
IDENTITY_DEPTH = 28
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")


@dataclass(frozen=True)
class Case:
    """One training run: a chain of ``depth`` layers, or I + W with ``sigma``."""

    network: str
    depth: int
    seed: int
    sigma: float | None = None


class Batches:
    """Images (n, 1, 14, 14) and labels in an order drawn anew from ``seed`` for each epoch."""

    def __init__(self, images: Tensor, labels: Tensor, *, batch_size: int, seed: int | None) -> None:
        self._images, self._labels, self._size, self._seed, self._epoch = images, labels, batch_size, seed, 0

    def __len__(self) -> int:
        return -(-len(self._labels) // self._size)

    def set_epoch(self, epoch: int) -> None:
        """Of the order."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self._labels)
        order = torch.arange(count)
        if self._seed is not None:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(1000 * self._seed + self._epoch))
        for chosen in order.split(self._size):
            yield self._images[chosen], self._labels[chosen]


def load(root: Path, split: Split, count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` images, each 2x2 pixels averaged, to mean 0 and variance 1 by fixed numbers; labels."""
    source = open_idx(root, split)
    count = min(count, len(source))
    # not permuted, which torch takes for channels that are last: oneDNN 3.12 (torch 2.13; AVX2, one thread) then writes
    # outside its memory in the weights' gradient of strided 1x1 convolutions with fewer than 8 inputs
    pixels = torch.from_numpy(np.stack([source.decode(i) for i in range(count)]))[..., 0].unsqueeze(1)
    images = F.avg_pool2d(pixels.float().div_(255), 2).sub_(0.286).div_(0.32)
    return images, torch.from_numpy(np.asarray(source.labels[:count]).astype(np.int64))


def network_of(case: Case, *, width: int) -> nn.Module:
    """The network, with weights from the seed of ``case``."""
    torch.manual_seed(case.seed)
    if case.sigma is None:
        name = {"plain": "plain-{}", "dirac": "diracnet-{}-1"}[case.network].format(case.depth)
        return edgetrain.create_model(name, in_channels=INPUT[0], width=width)
    model = edgetrain.create_model(f"wrn-{case.depth}-1", in_channels=INPUT[0], width=width)
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d):
            identity_plus_(module, sigma=case.sigma)
    return model


def train(
    case: Case, train_data: tuple[Tensor, Tensor], test_data: tuple[Tensor, Tensor], options: Any
) -> dict[str, Any]:
    """The row of ``case``."""
    model = network_of(case, width=options.width)
    recipe = Recipe(epochs=options.epochs, batch_size=options.batch, seed=case.seed)
    plan = edgetrain.uniform_plan(model, "keep_all", input_shape=INPUT, batch_size=options.batch)
    row: dict[str, Any] = {**asdict(case), "parameters": sum(p.numel() for p in model.parameters()), "ended": None}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, plan, run_dir=folder, recipe=recipe)
        try:
            trainer.fit(
                Batches(*train_data, batch_size=options.batch, seed=case.seed),
                Batches(*test_data, batch_size=500, seed=None),
            )
        except TrainingError as error:
            row["ended"] = error.found
    row["curve"] = [
        {"epoch": r.epoch, "loss": r.loss, "accuracy": r.accuracy, "test_accuracy": r.test_accuracy}
        for r in trainer.history
    ]
    row["seconds"] = sum(r.seconds for r in trainer.history)
    return row


def cases(options: Any) -> list[Case]:
    """All runs, the quick ones first."""
    seeds = range(options.seeds)
    chains = [Case(network, depth, s) for depth in options.depths for network in ("plain", "dirac") for s in seeds]
    return chains + [Case("I + W", IDENTITY_DEPTH, s, sigma) for sigma in options.sigmas for s in seeds]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Training loss of the chains, their accuracy against depth, accuracy with I + W; medians over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def median(chosen: Callable[[dict[str, Any]], bool], figure_of: str) -> list[float]:
        curves = [[point[figure_of] for point in row["curve"]] for row in rows if chosen(row)]
        return [float(np.median(values)) for values in zip(*curves, strict=False)]

    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    depths = sorted({row["depth"] for row in rows if row["sigma"] is None})
    sigmas = sorted({row["sigma"] for row in rows if row["sigma"] is not None})
    for network, style, marker in (("plain", "--", "o"), ("dirac", "-", "s")):
        last = []
        for depth, colour in zip(depths, COLOURS, strict=False):

            def chosen(row: dict[str, Any], of: tuple[str, int] = (network, depth)) -> bool:
                return (row["network"], row["depth"]) == of

            losses = median(chosen, "loss")
            axes[0].plot(range(1, len(losses) + 1), losses, style, color=colour, label=f"{network}, {depth} layers")
            last.append((median(chosen, "test_accuracy") or [0.0])[-1])
        axes[1].plot(
            depths, last, style, marker=marker, color="#0072B2" if network == "dirac" else "#D55E00", label=network
        )
    for sigma, colour in zip(sigmas, COLOURS, strict=False):
        accuracies = median(lambda row, of=sigma: row["sigma"] == of, "test_accuracy")  # type: ignore[misc]
        axes[2].plot(range(1, len(accuracies) + 1), accuracies, color=colour, label=f"sigma = {sigma:g}")
    titles = ("training loss", "test accuracy after the last epoch", f"test accuracy, I + W, {IDENTITY_DEPTH} layers")
    for axis, title, words in zip(axes, titles, ("epoch", "layers", "epoch"), strict=True):
        axis.set_title(title)
        axis.set_xlabel(words)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[1].set_xticks(depths)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Trains, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the four idx files")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--out", type=Path, help="folder for dirac_depth.json and dirac_depth.png")
    parser.add_argument("--keep", type=Path, help="file of finished runs, from which a stopped measurement goes on")
    parser.add_argument("--depths", type=int, nargs="+", default=[10, 34, 52, 100])
    parser.add_argument("--sigmas", type=float, nargs="*", default=[1e-6, 1e-4, 1e-2, 0.1])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=8, help="channels of the first group")
    parser.add_argument("--train", type=int, default=6000, help="training images")
    parser.add_argument("--test", type=int, default=2000, help="test images")
    options = parser.parse_args()
    train_data, test_data = load(options.data, "train", options.train), load(options.data, "test", options.test)
    kept, rows = KeptRows(options.keep), []
    setting = [options.epochs, options.batch, options.width, options.train, options.test]
    for case in cases(options):
        key = f"{case} {setting}"
        row = kept.get(key)
        if row is None:
            row = train(case, train_data, test_data, options)
            kept.add(key, row)
        rows.append(row)
        if not options.json:
            sigma = "" if case.sigma is None else f" sigma {case.sigma:g}"
            last = row["curve"][-1] if row["curve"] else {"loss": float("nan"), "test_accuracy": 0.0}
            print(
                f"{case.network + sigma:<20} {case.depth:>4} layers  loss {last['loss']:.3f}  "
                f"test accuracy {last['test_accuracy']:.1%}  {row['seconds']:.0f} s  {row['ended'] or ''}".rstrip(),
                flush=True,
            )
    json_file = None if options.out is None else options.out / "dirac_depth.json"
    publish(rows, out=json_file, as_json=options.json)
    if options.out is not None:
        draw(rows, options.out / "dirac_depth.png")


if __name__ == "__main__":
    main()
