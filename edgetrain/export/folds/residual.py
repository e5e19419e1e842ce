"""A residual of one convolution becomes a plain convolution: its identity path is a Dirac delta.

    x + W * x = (I + W) * x

with I one at the kernel's centre from channel i to channel i: the inverse reading of the Dirac parameterisation
(Zagoruyko and Komodakis 2017). An addition less and not one multiplication more, for any padding, since the centre
never reads it. The convolution must preserve the shape, be called once, and its result be used by the addition alone.
"""

from __future__ import annotations

import torch.fx

from edgetrain.export.folds.after import is_sum
from edgetrain.export.folds.draft import Draft
from edgetrain.export.folds.layers import add_identity, keeps_shape
from edgetrain.export.folds.report import Fold


def fold_residuals(draft: Draft) -> None:
    """Folds every ``x + layer(x)``."""
    for node in list(draft.graph.nodes):
        if not is_sum(node):
            continue
        for branch, x in (node.args, reversed(node.args)):
            if not isinstance(branch, torch.fx.Node) or not _single_residual(draft, branch, x):
                continue
            layer = draft.weighted(branch)
            assert layer is not None
            add_identity(layer)
            draft.done.append(Fold("Dirac delta", node.name, f"the identity path beside {branch.target}, into it"))
            draft.replace(node, branch)
            break


def _single_residual(draft: Draft, branch: torch.fx.Node, x: object) -> bool:
    layer = draft.weighted(branch)
    alone = layer is not None and len(branch.users) == 1 and draft.times_called(branch) == 1
    return alone and branch.args[0] is x and layer is not None and keeps_shape(layer)
