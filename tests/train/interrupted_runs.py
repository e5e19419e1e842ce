"""Small runs of every kind that has state of its own, and what is left of a run when it has ended."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from edgetrain.chain import SampledNetwork
from edgetrain.models import cifar_resnet, hybrid
from edgetrain.planner import Plan, uniform_plan
from edgetrain.train import Recipe, Trainer
from edgetrain.train.data import Loader, Subset
from edgetrain.train.data.digits import DigitsSource
from edgetrain.train.tensor_file import TensorFile

SHAPE = (1, 16, 16)
BATCH, STEPS, EPOCHS = 8, 5, 2
KINDS = ("loader", "dropout", "update in backward", "micro-batches", "sampled", "workers' seeds", "own generator")


class Noisy(Dataset[tuple[Tensor, int]]):
    """Images made of the random numbers of torch, Python and NumPy when they are asked for."""

    def __len__(self) -> int:
        return BATCH * STEPS

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.randn(SHAPE) + random.gauss(0, 1) + np.random.standard_normal(), index % 10


def network(kind: str) -> nn.Module:
    if kind == "sampled":
        return SampledNetwork(cifar_resnet(20, in_channels=1, width=8), "2/3", input_shape=SHAPE, seed=5)
    if kind in ("loader", "update in backward"):
        return hybrid(in_channels=1, width=8)
    norm = nn.GroupNorm(2, 8) if kind == "micro-batches" else nn.BatchNorm2d(8)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 8, 3, 2, padding=1), norm, nn.ReLU(), nn.Dropout(0.3)),
        nn.Sequential(nn.Conv2d(8, 8, 3, 2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.3)),
        nn.Sequential(nn.Flatten(), nn.Linear(128, 10)),
    )


def make_run(kind: str, folder: Path, *, seed: int = 0, **options: Any) -> tuple[Trainer, Any, Any]:
    """A trainer and its training and test data; ``seed`` is that of the random numbers of this process."""
    torch.manual_seed(seed)
    model = network(kind)
    parts = 2 if kind == "micro-batches" else 1
    mode = {"loader": "invert_layerwise", "sampled": "keep_all"}.get(kind, "recompute")
    plan = uniform_plan(
        model,
        mode,  # type: ignore[arg-type]
        input_shape=SHAPE,
        batch_size=BATCH // parts,
        update_in_backward=kind == "update in backward",
    )
    plan = Plan(plan.modes, plan.reasons, plan.program, micro_batches=parts)
    recipe = Recipe(epochs=EPOCHS, batch_size=BATCH, peak_rate=0.1)
    trainer = Trainer(model, plan, run_dir=folder, recipe=recipe, **options)
    shared: dict[str, Any] = {"batch_size": BATCH, "image_size": SHAPE, "seed": 3}
    tested = Loader(
        Subset(DigitsSource("test"), np.arange(16)), augment=False, shuffle=False, drop_last=False, **shared
    )
    random.seed(seed)  # here: what the lines above import draws too
    np.random.seed(seed)
    if kind == "workers' seeds":  # order and images from the generators of the process
        return trainer, DataLoader(Noisy(), BATCH, shuffle=True), tested
    if kind == "own generator":
        return trainer, DataLoader(Noisy(), BATCH, shuffle=True, generator=torch.Generator().manual_seed(seed)), tested
    source = Subset(DigitsSource("train"), np.arange(BATCH * STEPS))
    return trainer, Loader(source, augment=True, shuffle=True, drop_last=True, **shared), tested


def left(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors and all JSON of a checkpoint but the times: weights, optimiser, random states, metrics."""
    file = TensorFile(checkpoint)
    state = file.state
    for record in (*state["history"], state["position"]):
        for key in ("seconds", "images_per_second"):
            record.pop(key, None)
    return {name: file.tensor(name) for name in file.names("")}, state


def assert_equal(checkpoint: Path, other: Path) -> None:
    """Bit for bit."""
    (tensors, state), (others, other_state) = left(checkpoint), left(other)
    assert state == other_state
    assert tensors.keys() == others.keys()
    for name, value in tensors.items():
        assert value.dtype == others[name].dtype, name
        assert value.numpy().tobytes() == others[name].numpy().tobytes(), name
