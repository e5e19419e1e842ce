"""What a process loads once, loaded before anything is measured or counted."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from edgetrain.models import create_model
from edgetrain.planner import uniform_plan
from edgetrain.runtime import wrap
from edgetrain.train.data.prefetch import ready_thread
from edgetrain.train.recipe import Recipe


def warm_up(device: str) -> None:
    """One small training step, so that libraries, threads and kernels are loaded before anything is counted."""
    state = torch.get_rng_state()
    model = create_model("hybrid18", width=8).to(device)
    plan = uniform_plan(model, "invert_layerwise", input_shape=(3, 16, 16), batch_size=2)
    F.cross_entropy(
        wrap(model, plan)(torch.randn(2, 3, 16, 16, device=device)), torch.zeros(2, dtype=torch.long, device=device)
    ).backward()
    Recipe().optimizer(model.parameters()).step()  # the first optimiser imports torch's compiler, 50 MB
    torch.set_rng_state(state)
    ready_thread()
